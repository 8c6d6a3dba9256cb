"""Nonsense at the server's door, and behind it.

    python -m tests.fuzz --cases 1000000                # without the key: spoiled hellos, proofs and frames
    python -m tests.fuzz --authenticated 200000         # with the key: messages that no honest peer sends
    python -m tests.fuzz --cases 1000 --seed 42         # the same thousand again

Without the key, each case ends as Malformed, the end of the stream, or a silent close: nothing else is raised, nothing
waits, nothing is opened, nobody is let in, no message is taken but those that an honest peer wrote.

With the key, connections of all roles say what comes to their mind: messages of others, of no type, with numbers too
large, about jobs and workers that are not theirs. Nine of ten such worlds are the pure scheduler, fed as the server
feeds it; the tenth is a server with sockets. The scheduler's invariants hold after each batch, all that it says can be
said, no batch makes it stumble, and an honest client, with its own node and worker in the same pool, gets its results.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import inspect
import logging
import os
import pickle
import random
import resource
import socket
import struct
import sys
import threading
import time
import traceback

import minipool
from minipool import BIGGEST, MAGIC, PROTOCOL, PYTHON, Connection, Malformed, Plain, Scheduler, Secret, SessionKeys

CHUNK = 1000                    # cases, or messages, of one seed
AT_THE_DOOR = 0.03              # of the cases without the key: over TCP, through a Doorkeeper with its thread
FRAMES = 0.45                   # of them: frames for Connection.receive, over a socket pair
INSTANCE = b"instance of fuzz"


def first_seed(given=None):
    """The seed to begin with: given, or MINIPOOL_SEED, or a new one."""
    if given is not None:
        return given
    return int(os.environ.get("MINIPOOL_SEED") or random.SystemRandom().randrange(10**9))


# ---- what must not happen ----


class Watch:
    """Counts the control parts that are opened, and the globals that any unpickler of this process resolves."""

    def __init__(self):
        self.is_on, self.opened, self.resolved = False, 0, []

    def hear(self, event, arguments):
        if event == "pickle.find_class" and self.is_on:
            self.resolved.append(arguments)


WATCH = Watch()


@contextlib.contextmanager
def watching():
    """Yield the Watch, with counts from zero."""
    class Counted(minipool._BuiltinsOnly):
        def load(self):
            WATCH.opened += 1
            return super().load()
    if WATCH.hear not in _hooks:
        sys.addaudithook(WATCH.hear)        # for good, so only once
        _hooks.append(WATCH.hear)
    WATCH.is_on, WATCH.opened, WATCH.resolved = True, 0, []
    original, minipool._BuiltinsOnly = minipool._BuiltinsOnly, Counted
    try:
        yield WATCH
    finally:
        minipool._BuiltinsOnly, WATCH.is_on = original, False


_hooks: list = []


# ---- spoiling ----


def spoil(rng, data, others):
    """Return bytes that are nearly `data`, or not at all."""
    place = rng.randrange(len(data))
    match rng.randrange(9):
        case 0 | 1:
            spoiled = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(spoiled)
        case 2: return data[:place]
        case 3: return data[:place] + rng.randbytes(rng.randint(1, 40)) + data[place:]
        case 4: return data[:place] + data[place + rng.randint(1, 8):]
        case 5: return data[:place] + rng.choice(others)[place:]
        case 6: return data[:place] + bytes([rng.choice((0, 1, 127, 128, 255))]) * rng.randint(1, 8) + data[place + 8:]
        case 7: return rng.choice(others)
        case _: return rng.randbytes(rng.choice((1, 8, 63, 64, 65, 96, 200)))


class Letter:
    """The seam of a stranger who has said all that he will say: the door reads it, in pieces."""
    binding = b""

    def __init__(self, data, rng):
        self.data, self.rng, self.answer, self.closed = data, rng, b"", False

    def recv(self, size):
        size = self.rng.randint(1, size) if self.rng.random() < 0.1 else size
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    def sendall(self, data):
        self.answer += data

    def close(self):
        self.closed = True


class Nobody:
    """A selector in which nobody is registered."""

    def unregister(self, sock):
        pass


class Outsider:
    """A thousand cases of somebody who has recordings of honest sessions, and not the secret."""

    def __init__(self, seed, door):
        self.rng, self.door, self.outcomes = random.Random(seed), door, collections.Counter()
        self.hellos, self.proofs, self.frames = [], [], []
        minor = sys.version_info[1]
        for role in (1, 2, 3, 3):
            identity = self.rng.randbytes(20) if role == 3 else b""
            first = minipool._HELLO.pack(MAGIC, PROTOCOL, role, minor, identity, self.rng.randbytes(32))
            second = minipool._HELLO.pack(MAGIC, PROTOCOL, 0, minor, bytes(5) + INSTANCE, self.rng.randbytes(32))
            keys = SessionKeys.derive(door.secret.role_key([*minipool.ROLES][role], INSTANCE, identity), first, second)
            self.hellos += [first, first, second]
            self.proofs += [keys.dialer_proof, keys.server_proof, minipool.REFUSED]
        self.keys = keys
        self.sent = [[("delivered", [1])], [("ask", 1, "info"), ("cancel", [1, 2])], [("put", (b"s", 1), b"abc")],
                     [("range", (b"s", 1), 0, minipool.hashlib.sha256(b"body" * 9).digest(), b"body" * 9)],
                     [("submit", 7, (b"s", 1), self.rng.randbytes(500), 0, {"retries": 2})]]
        self.up = self.record(keys.up)
        self.strange = [*self.record(keys.down), *self.record(b"another connection's"), pickle.dumps([os.system])]
        self.keeper = object.__new__(minipool.Doorkeeper)       # the door's code, without its thread
        self.keeper._guests, self.keeper._spoken, self.keeper._selector = {}, {}, Nobody()
        self.keeper._binding = b""
        self.keeper._secret, self.keeper._instance = door.secret.role_key, INSTANCE
        self.keeper._admit = self.forged

    def record(self, key):
        """The frames of a few honest batches."""
        connection = Connection(Plain(socket.socket()), key, key, "server")
        frames = []
        for batch in self.sent:
            *message, body = batch[0] if batch[0][0] == "range" else (*batch[0], b"")
            connection._encode_frame([tuple(message)] if body else batch, body)
            frames.append(b"".join(connection._rest))
        connection._seam.sock.close()
        return frames

    def forged(self, *guest):
        raise AssertionError("a stranger was let in")

    def run(self, cases):
        for _ in range(cases):
            draw = self.rng.random()
            if draw < AT_THE_DOOR:
                self.door.knock(self, self.opening())
            elif draw < AT_THE_DOOR + FRAMES:
                self.frame()
            else:
                self.letter()
        self.door.wait(self)

    def opening(self):
        """A hello and a proof, of which at least one is no good."""
        rng, hello = self.rng, self.rng.choice(self.hellos)
        if rng.random() < 0.6:
            hello = spoil(rng, hello, self.hellos)
        proof = rng.choice(self.proofs)
        if rng.random() < 0.6:
            proof = spoil(rng, proof, self.proofs)
        return hello + proof + (rng.randbytes(rng.randint(1, 99)) if rng.random() < 0.1 else b"")

    def letter(self):
        """An opening for the functions behind the door."""
        sock = Letter(self.opening(), self.rng)
        guest = minipool._Guest(sock, "127.0.0.1")
        self.keeper._guests[sock] = guest
        for _ in range(400):
            if sock.closed:
                return self.judge(sock.answer)
            self.keeper._hear(guest)
            assert len(guest.data) <= 64, "a stranger fills the memory"
        raise AssertionError("the door listens on and on")

    def judge(self, answer):
        """What the door may say: nothing, its hello, and that it refuses."""
        assert len(answer) in (0, 64, 96) and answer[:8] == MAGIC[:len(answer)], f"the door answered {answer!r}"
        assert answer[64:] in (b"", minipool.REFUSED), "the door gave a proof away"
        self.outcomes[{0: "closed in silence", 64: "closed after the hello", 96: "refused"}[len(answer)]] += 1

    def frame(self):
        """Some honest frames, then what is none, for a receiver that has the key, or one that has another."""
        rng = self.rng
        knows = rng.random() < 0.5
        before = rng.randrange(len(self.up)) if knows else 0
        stream = b"".join(self.up[:before])
        wrong = self.spoiled_frame(self.up[before])
        if wrong.startswith(self.up[before]):               # an honest frame and more: then the more comes first
            wrong = wrong[::-1]
        ours, theirs = socket.socketpair()
        connection = Connection(Plain(ours), b"", self.keys.up if knows else b"a key that nobody knows", "client")
        with theirs:
            theirs.sendall(stream + wrong)
        expected, taken = [m for batch in self.sent[:before] for m in batch], []
        signed = 40 + struct.unpack("!I", self.up[before][:4])[0]       # of these bytes an honest one has the tag
        may_open = WATCH.opened + before + (knows and wrong[:signed] == self.up[before][:signed])
        try:
            for _ in range(len(self.up) + 1):
                taken += [(*m[:4], bytes(m[4])) if m[0] == "range" else m for m in connection.receive()]
            raise AssertionError("the end of the stream was not noticed")
        except (Malformed, EOFError, OSError) as error:
            kind = type(error).__name__
        finally:
            held = len(connection._pending)
            ours.close()
        assert WATCH.opened == may_open, "what has no good tag was opened"
        assert held <= 65536 + len(stream + wrong), "more was allocated than was sent"
        if len(taken) > len(expected) and knows:            # a body is covered by the digest, which its reader checks
            *_, digest, body = spoiled = taken.pop()
            assert spoiled[0] == "range" and minipool.hashlib.sha256(body).digest() != digest, "a forgery was taken"
            kind = "body that its digest tells"
        assert taken == expected, "not what the honest peer wrote"
        self.outcomes[kind] += 1

    def spoiled_frame(self, frame):
        rng = self.rng
        header, tag, rest = frame[:8], frame[8:40], frame[40:]
        match rng.randrange(7):
            case 0:
                sizes = 0, 1, len(rest), len(rest) - 1, minipool.MAX_CONTROL, minipool.RANGE + 1, 1 << 31
                return struct.pack("!II", rng.choice(sizes), rng.choice(sizes)) + tag + rest
            case 1: return header + spoil(rng, tag, self.proofs)[:32].ljust(32) + rest
            case 2: return header + tag + spoil(rng, rest, self.strange)
            case 3: return rng.choice(self.strange)
            case 4: return frame[:40] + rng.choice(self.strange)[:len(rest)]
            case 5: return b"".join(f for f in rng.sample(self.up, len(self.up)) if f is not frame)
            case _: return spoil(rng, frame, self.strange)


class Door:
    """A Doorkeeper with its thread, on loopback, and those who knock at it together."""

    def __init__(self, rng):
        self.secret = Secret("mp1_" + base64.urlsafe_b64encode(rng.randbytes(32)).decode().rstrip("="))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address, self.admitted, self.waiting = listener.getsockname(), [], []
        self.stopping = threading.Event()
        self.keeper = minipool.Doorkeeper(listener, self.secret.role_key, INSTANCE,
                                          lambda *guest: self.admitted.append(guest), self.stopping)

    def knock(self, outsider, data):
        sock = socket.create_connection(self.address, timeout=10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))      # no port waits after it
        with contextlib.suppress(OSError):          # it may have closed already
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        self.waiting.append(sock)
        if len(self.waiting) >= 16:
            self.wait(outsider)

    def wait(self, outsider):
        for sock in self.waiting:
            answer = b""
            with sock, contextlib.suppress(ConnectionError):
                while more := sock.recv(200):       # within 10 seconds, or it hangs
                    answer += more
            outsider.judge(answer if len(answer) in (0, 64, 96) else answer[:64])
            assert len(answer) in (0, 64, 96)
        self.waiting.clear()
        assert not self.admitted, "a stranger was let in"

    def close(self):
        """An honest one still gets in; then the door is closed."""
        with socket.create_connection(self.address, timeout=10) as sock:
            minipool.handshake(sock, "client", self.secret.role_key)
        self.stopping.set()
        self.keeper.thread.join(5)
        assert len(self.admitted) == 1 and not self.keeper._guests
        self.admitted[0][0].close()


def outside(cases, seed):
    """Run cases without the key; return the counts of their ends."""
    outcomes, door = collections.Counter(), Door(random.Random(seed))
    with watching() as watch, quiet():
        for chunk in range(-(-cases // CHUNK)):
            outsider = Outsider(seed + chunk, door)
            try:
                outsider.run(min(CHUNK, cases - chunk * CHUNK))
            except BaseException as error:
                error.add_note(f"python -m tests.fuzz --cases {CHUNK} --seed {seed + chunk}")
                raise
            outcomes += outsider.outcomes
        door.close()
    assert not watch.resolved, watch.resolved
    return outcomes


@contextlib.contextmanager
def quiet():
    """Keep the server's log for ourselves."""
    handler = Records()
    log, before = logging.getLogger("minipool"), logging.getLogger("minipool").propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield handler.texts
    finally:
        log.removeHandler(handler)
        log.propagate = before


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.texts = []

    def emit(self, record):
        where = where_it_broke(record.exc_info[1]) if record.exc_info and record.exc_info[1] else ""
        self.texts.append(f"{record.getMessage()} {where}".strip())


# ---- with the key ----


def nested(depth, kind=list):
    """A list in a list in a list."""
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"in": value}
    return value


def endless():
    value: list = []
    value.append(value)
    return value


SESSIONS = [b"session %d" % i for i in range(4)]
NODES = [b"node %7d" % i for i in range(3)]
WORKERS = [node + bytes([0, 0, 0, slot, 0, 0, 0, generation]) for node in NODES for slot in (0, 1)
           for generation in (1, 2)]
HONEST_CLIENT, HONEST_NODE = b"honest client", b"honest  node"
HONEST_WORKER = HONEST_NODE + bytes([0, 0, 0, 0, 0, 0, 0, 1])
CODE, TAG = b"honest code", "honest"
KINDS = {check: kind for kind, check in minipool._CHECKS.items()}


class Nonsense:
    """Draws messages: mostly of the right types, and seldom of any sense."""

    def __init__(self, rng):
        self.rng = rng
        self.tokens = [0, 1]            # that the server has used
        self.speaker = b""              # whose words these are
        self.wildness = rng.choice((0.002, 0.03))       # how often a field is no such field

    def bad(self):
        """A value that the wire can carry, and that is hardly what was expected."""
        return self.rng.choice([
            lambda: float("nan"), lambda: float("inf"), lambda: -float("inf"), lambda: -1, lambda: BIGGEST,
            lambda: 10**400, lambda: -10**400, lambda: True, lambda: None, lambda: 1.5, lambda: "text",
            lambda: b"bytes",
            lambda: (), lambda: [], lambda: {}, lambda: {1, 2}, lambda: frozenset("ab"), lambda: bytearray(b"x"),
            lambda: nested(3000), lambda: nested(3000, dict), endless, lambda: [endless()], lambda: (b"x" * 65, 1),
            lambda: ("", 1), lambda: (b"", -1), lambda: [(1, 2, 3)], lambda: [[]], lambda: "\ud800",
            lambda: {"lost": 5, 7: 7, "job": 3}, lambda: {b"": "position"}])()

    def number(self):
        rng = self.rng
        return rng.choice([lambda: rng.randrange(6), lambda: rng.randrange(6), lambda: rng.choice(self.tokens[-20:]),
                           lambda: rng.choice((255, 65536, 1 << 20, 10**9, 10**12, 1 << 53, BIGGEST - 1))])()

    def id(self):
        rng = self.rng
        return rng.choice([*SESSIONS, *WORKERS, *NODES, HONEST_CLIENT, HONEST_WORKER, HONEST_NODE, b"",
                           rng.randbytes(20)])

    def some(self, make):
        return [make() for _ in range(self.rng.choice((0, 1, 1, 2, 5)))]

    def name(self):
        return self.speaker if self.rng.random() < 0.7 else self.id(), self.number()

    def text(self):
        return self.rng.choice(["", "ok", "raised", "died", "killed", "unfit", "info", "node", "x" * 300, "\ud800\0",
                                "%s%n", *(f"node-{i}" for i in range(3))])

    def data(self):
        return self.rng.choice([self.id(), self.rng.randbytes(self.rng.choice((0, 1, 20, 33, 1000)))])

    def value(self):
        return self.data() if self.rng.random() < 0.7 else (self.name(), self.number(), self.text())

    def options(self):
        rng = self.rng
        makers = {"name": self.text, "priority": lambda: rng.choice([self.number(), -5, 1e300, float("inf"), -0.0]),
                  "retries": lambda: rng.choice([self.number(), -5]), "max_deaths": lambda: rng.choice([0, 1, 3, 9]),
                  "job_timeout": lambda: rng.choice([0, 0.01, 5, 1e9]), "max_tasks": self.number,
                  "on": lambda: tuple(self.some(self.text)), "soft": self.bad, "attempts": self.number,
                  "cancel_running": lambda: True, "say": self.bad}
        chosen = rng.sample(list(makers), rng.randrange(4))
        return {name: self.bad() if rng.random() < self.wildness else makers[name]() for name in chosen} or None

    def positions(self):
        return {self.id(): self.number() for _ in range(2)}

    def cause(self):
        return {name: self.text() if self.rng.random() < 0.9 else self.bad()
                for name in self.rng.sample(["what", "lost", "planned", "stderr", "job", "reason"], 2)}

    def field(self, kind):
        """A field of this kind of the catalogue; now and then one that is not."""
        rng = self.rng
        if rng.random() < self.wildness:
            return self.bad()
        makers = {
            int: self.number, float: lambda: rng.choice((0, 0.0001, 0.001, 1.5, 1e18)),
            bool: lambda: rng.random() < 0.5,
            str: self.text, bytes: self.data, list: lambda: self.some(self.value), dict: self.cause,
            "name": self.name, "value": self.value, "options": self.options,
            "int?": lambda: rng.choice((None, 0, 1, 5, -1, 10**30)), "bytes?": lambda: rng.choice((None, self.data())),
            "dict?": lambda: rng.choice((None, self.cause())), "numbers": lambda: self.some(self.number),
            "names": lambda: self.some(self.name), "texts": lambda: self.some(self.text),
            "attempts": lambda: self.some(lambda: (self.number(), self.name(),
                                                   rng.choice(("inbox", "begun", "outcome", "text", None)))),
            "any": self.value}
        if kind in makers:
            return makers[kind]()
        guesses = [rng.choice([self.cause, self.positions, self.number, self.text, self.data])() for _ in range(9)]
        return next(filter(minipool._CHECKS[kind], guesses), guesses[0])        # of a kind that is new to us

    def message(self, role):
        """A message; mostly one of its role's."""
        rng, draw = self.rng, self.rng.random()
        if draw < self.wildness / 2:
            return self.bad()
        own = [k for k, (senders, _) in minipool.CATALOGUE.items() if role in senders and k not in minipool.ROLES]
        kind = rng.choice(own if draw < 1 - self.wildness else list(minipool.CATALOGUE))
        if kind == "bye" and rng.random() < 0.8:
            kind = own[0]
        fields = [self.field(KINDS.get(check, dict)) for check in minipool.CATALOGUE[kind][1].values()]
        if kind == "range" and rng.random() < 0.9:
            fields.append(rng.randbytes(rng.choice((0, 1, 100))))
        elif rng.random() < 0.01:
            fields = fields[:-1] if fields and rng.random() < 0.5 else [*fields, self.bad()]
        return ("no such kind", *fields) if rng.random() < 0.005 else (kind, *fields)

    def announcement(self, role, identity):
        fixed = {"session": identity, "id": identity, "python": PYTHON}
        fields = inspect.getclosurevars(minipool.CATALOGUE[role][1]["info"]).nonlocals["fields"]
        info = {name: fixed.get(name) or self.field(KINDS[check]) for name, check in fields.items()}
        if role == "worker":
            info["node"] = self.rng.choice([identity[:12], identity[:12], *NODES])
            if self.rng.random() < 0.7:
                info["positions"] = self.positions()
        if self.rng.random() < self.wildness:
            info[self.rng.choice(list(info))] = self.bad()
        last = {"client": [self.some(self.number)], "worker": [self.field("attempts")], "node": []}[role]
        return (role, info, *last) if self.rng.random() < 0.97 else self.message(role)

    def newcomer(self):
        """A role and an identity."""
        return self.rng.choice([("client", self.rng.choice(SESSIONS)), ("client", self.rng.choice(SESSIONS)),
                                ("node", self.rng.choice(NODES)), ("worker", self.rng.choice(WORKERS))])


def honest_words():
    """What the honest three begin with."""
    return {
        "node": ("node", {"id": HONEST_NODE, "python": PYTHON, "name": TAG, "host": "here", "pid": 1}),
        "worker": ("worker", {"id": HONEST_WORKER, "node": HONEST_NODE, "node_name": TAG, "slot": 0,
                              "pid": 2, "device": "cpu", "tags": [TAG], "has": [], "positions": {},
                              "returns": False}, []),
        "client": ("client", {"session": HONEST_CLIENT, "name": TAG, "max_workers": None,
                              "workers_seen": 1}, [])}


class Honest:
    """An honest client, node and worker: each answers what it hears, and complains of what should not be."""

    def __init__(self):
        self.objects, self.outcomes, self.submitted, self.results = {}, {}, 0, {}
        self.dismissed = ""

    def submit(self):
        """A job for the honest worker, which returns its number."""
        self.submitted += 1
        function = [("put", (HONEST_CLIENT, 1 << 40), CODE)] if self.submitted == 1 else []
        job = self.submitted, (HONEST_CLIENT, 1 << 40), b"%d" % self.submitted, 0, {"on": [TAG]}
        return [*function, ("submit", *job)]

    def answer(self, who, message):
        """What the honest member `who` says to a message of the server's."""
        kind, *fields = message
        match kind:
            case "broken": self.dismissed = f"the honest {who} heard {message}"
            case "bye": self.dismissed = f"the honest {who} was sent away"
            case "put": self.objects[fields[0]] = fields[1]
            case "drop": [self.objects.pop(name, None) for name in fields[0]]
            case "run": return self.execute(*fields)
            case "recall": return [("recalled", fields[0], [])]
            case "resend": return [self.outcomes[token] for token in fields[0] if token in self.outcomes]
            case "pull": return [("gone", fields[0])]
            case "done":
                self.results[fields[0]] = fields[1:3]
                return [("delivered", [fields[0]])]
        return []

    def execute(self, token, job, fn, payload, log, options):
        if job[0] == HONEST_CLIENT:
            assert self.objects.get(fn) == CODE, f"an honest job was to run {self.objects.get(fn)!r}"
        value = payload if isinstance(payload, bytes) else b"pulled"
        self.outcomes[token] = ("finished", token, "ok", value, 0.01, False)
        return [("started", token), self.outcomes[token]]

    def check(self):
        """All jobs have ended, as they should."""
        expected = {number: ["ok", b"%d" % number] for number in range(1, self.submitted + 1)}
        wrong = {n: (self.results.get(n), e) for n, e in expected.items() if self.results.get(n) != e}
        assert not wrong, f"of {self.submitted} honest jobs these went wrong: {dict(list(wrong.items())[:3])}"


class Insider:
    """One world: a scheduler, fed as the server feeds it, by many who talk nonsense and three who do not."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.nonsense, self.now, self.peers = Nonsense(self.rng), 1000.0, 0
        self.scheduler = Scheduler(self.now, 1_000_000)
        if self.rng.random() < 0.5:
            self.scheduler._end_adoption(True, self.now)
        self.talkers = {}               # peer: role, identity, whether it has announced itself
        self.outcomes, self.honest, self.who = collections.Counter(), Honest(), {}
        for who, words in honest_words().items():
            self.peers += 1
            self.who[self.peers] = who
            self.perform(self.scheduler.receive, self.peers, [words])

    def perform(self, step, *arguments):
        """Feed the scheduler, and let the honest answer until nothing is left to say."""
        todo = collections.deque([(step, *arguments)])
        while todo:
            step, *arguments = todo.popleft()
            actions = step(*arguments, self.now)
            for peer, messages in actions.sends.items():
                self.listen(peer, messages, todo)
            for peer in actions.closes:
                self.talkers.pop(peer, None)
                assert peer not in self.who, f"the connection of the honest {self.who[peer]} was closed"
        assert not self.honest.dismissed, self.honest.dismissed
        left = self.scheduler.deadline - self.now
        assert left == minipool.FOREVER or left < threading.TIMEOUT_MAX, "no thread can wait for this deadline"

    def listen(self, peer, messages, todo):
        for message in messages:
            try:                        # what the server says, its peers accept: else they close their connections
                minipool.check_message(message[:4] if message[0] == "range" else message, "server")
                pickle.dumps(message, 5)
            except (Malformed, RecursionError) as error:
                raise AssertionError(f"the server would say what nobody accepts: {error}") from error
            if message[0] == "run":
                self.nonsense.tokens.append(message[1])
            if peer in self.who:
                answers = self.honest.answer(self.who[peer], message)
                if answers:
                    todo.append((self.scheduler.receive, peer, answers))

    def run(self, messages):
        while self.outcomes.total() < messages:
            draw = self.rng.random()
            if draw < 0.08 or not self.talkers:
                self.peers += 1
                self.talkers[self.peers] = [*self.nonsense.newcomer(), False]
            elif draw < 0.12:
                self.leave(self.rng.choice(list(self.talkers)))
            elif draw < 0.17:
                self.pass_time(self.rng.choice((0.01, 0.06, 1.1, 4, 16, 70)))
            elif draw < 0.2:
                self.perform(self.scheduler.receive, self.peer_of("client"), self.honest.submit())
            else:
                self.talk(self.rng.choice(list(self.talkers)))
            self.scheduler.check()
        for peer in list(self.talkers):
            self.leave(peer)
        self.pass_time(100)
        self.scheduler.check()
        self.honest.check()

    def peer_of(self, who):
        return next(peer for peer, name in self.who.items() if name == who)

    def leave(self, peer):
        self.talkers.pop(peer, None)
        self.perform(self.scheduler.disconnected, peer)

    def pass_time(self, seconds):
        end = self.now + seconds
        for _ in range(1000):
            deadline = self.scheduler.deadline
            if deadline > end:
                break
            self.now = max(self.now, deadline)
            self.perform(self.scheduler.tick)
            self.perform(self.scheduler.receive, self.peer_of("node"), [("beat",)])
        self.now = end
        self.perform(self.scheduler.tick)

    def talk(self, peer):
        """A batch of one who has the key: checked, then fed, as `Server._serve_peer` does it."""
        role, identity, announced = self.talkers[peer]
        self.nonsense.speaker = identity
        batch = [self.nonsense.message(role) for _ in range(self.rng.choice((1, 1, 2, 4)))]
        if not announced:
            batch.insert(0, self.nonsense.announcement(role, identity))
            self.talkers[peer][2] = True
        try:
            for message in batch:
                body = type(message) is tuple and message[:1] == ("range",) and type(message[-1]) is bytes and (
                    len(message) == 5 and len(batch) == 1)
                minipool.check_message(message[:4] if body else message, role)
            if batch[0][0] == "worker" and batch[0][1]["id"] != identity:
                raise Malformed("a worker announces another worker's identity")
            self.perform(self.scheduler.receive, peer, batch)
            self.outcomes["taken"] += len(batch)
        except Malformed:
            self.outcomes["Malformed"] += len(batch)
            self.leave(peer)


class Membership:
    """One authenticated connection to a real server."""

    def __init__(self, address, secret, role, identity=b""):
        sock = socket.create_connection(address, timeout=10)
        keys, _ = minipool.handshake(sock, role, secret.role_key, identity)
        self.connection = Connection(Plain(sock), keys.up, keys.down, "server")
        self.role, self.identity = role, identity

    def say(self, *messages):
        self.connection.post(messages)
        self.connection.flush()

    def say_raw(self, control, body=b""):
        """Bytes that no pickler of ours would write, in a frame with a good tag."""
        connection = self.connection
        header = minipool._FRAME.pack(len(control), len(body))
        tag = minipool._tag(connection._send_key, connection._send_number, header, control)
        connection._send_number += 1
        connection._seam.sock.sendall(header + tag + control + body)


class Behind:
    """One world with sockets: a server, the honest three, and guests with the key that talk nonsense."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.nonsense, self.outcomes, self.honest = Nonsense(self.rng), collections.Counter(), Honest()
        self.secret = Secret.new()

    def run(self, messages):
        with quiet() as errors, minipool.Server(port=0, secret=self.secret.text) as server:
            self.address = minipool.parse_address(server.address)
            self.members = {}
            for who, words in honest_words().items():
                self.members[who] = Membership(self.address, self.secret, who, HONEST_WORKER * (who == "worker"))
                self.members[who].say(words)
            self.members["client"].say(*self.honest.submit())
            while self.outcomes.total() < messages:
                self.visit()
                with server._lock:
                    server._scheduler.check()
                self.hear(0)
            self.members["client"].say(*self.honest.submit())
            give_up = time.monotonic() + 20
            while len(server._scheduler._peers) > 3 or len(self.honest.results) < self.honest.submitted:
                assert time.monotonic() < give_up and not errors, f"no end of it: {errors} {self.honest.results}"
                self.hear(0.005)
            self.honest.check()
            with server._lock:
                server._scheduler.check()
            assert server._ticker.is_alive() and server._doorkeeper.thread.is_alive(), "a thread died"
            assert server.failure is None and not errors, errors
            for member in self.members.values():
                member.connection.dispose()

    def hear(self, seconds):
        for who, member in self.members.items():
            while member.connection.has_input(seconds):
                for message in member.connection.receive():
                    member.say(*self.honest.answer(who, message))
        assert not self.honest.dismissed, self.honest.dismissed

    def visit(self):
        """Somebody comes, says a few things, and goes, or is thrown out."""
        role, identity = self.nonsense.newcomer()
        self.nonsense.speaker = identity
        proven = identity if role == "worker" else b""
        guest = Membership(self.address, self.secret, role, proven)
        guest.connection._seam.sock.settimeout(10)
        try:
            guest.connection._encode_frame([self.nonsense.announcement(role, identity)], b"")
            guest.connection._seam.send(guest.connection._rest)
            self.outcomes["over sockets"] += 1
            for _ in range(self.rng.choice((0, 1, 3, 10))):
                self.outcomes["over sockets"] += 1
                if self.rng.random() < 0.1:
                    guest.say_raw(self.raw(), self.rng.choice((b"", b"", b"body")))
                else:
                    guest.connection._encode_frame([self.nonsense.message(role)], b"")
                    guest.connection._seam.send(guest.connection._rest)
        except (OSError, RecursionError):           # it was thrown out; or we cannot say this ourselves
            pass
        finally:
            guest.connection.dispose()

    def raw(self):
        rng = self.rng
        return rng.choice([
            lambda: pickle.dumps([(os.system, "false")], rng.randrange(6)), lambda: b'cos\nsystem\n(S"false"\ntR.',
            lambda: pickle.dumps([("delivered", [1])], rng.randrange(6))[:-2], lambda: b"Pid\n.",
            lambda: b"\x80\x05]Q.",
            lambda: b"\x80\x05\x82\x01.", lambda: b"\x97.", lambda: b"(" * 50_000 + b"t" * 50_000 + b".",
            lambda: b"\x80\x05" + b"]\x94" * 50_000 + b"a" * 49_999 + b".", lambda: rng.randbytes(200), lambda: b"\0",
            lambda: spoil(rng, pickle.dumps([self.nonsense.message("client")], 5), [b"x" * 300]) or b"x"])()


def where_it_broke(error):
    """The kind of an error and the place in minipool.py where it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith("minipool.py")]
    place = f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:150]}{place}"


class Report:
    """What came of it: counts, and each kind of failure with its number and the seed of the first."""

    def __init__(self):
        self.outcomes, self.failures, self.honest, self.worlds = collections.Counter(), {}, 0, 0


def inside(messages, seed, real=0.1):
    """Run messages with the key: worlds of CHUNK messages, one of ten with sockets. Failures are collected."""
    report, done = Report(), 0
    with watching() as watch, quiet():
        while done < messages:
            size = min(CHUNK, messages - done)
            world = (Behind if (seed + report.worlds) % round(1 / real) == 0 else Insider)(seed + report.worlds)
            try:
                world.run(size)
            except Exception as error:
                error.add_note(f"python -m tests.fuzz --authenticated {size} --seed {seed + report.worlds}")
                kind = where_it_broke(error)
                known = report.failures.setdefault(kind.rpartition(" in ")[2] if " in _" in kind else kind[:60],
                                                   [0, seed + report.worlds, kind, error])
                known[0] += 1
            report.worlds += 1
            report.outcomes += world.outcomes
            report.honest += len(world.honest.results)
            done += max(1, world.outcomes.total())
    assert not watch.resolved, watch.resolved
    return report


def show(counts):
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())


def main():
    parser = argparse.ArgumentParser(description="Say nonsense to minipool's server, without and with the key.")
    parser.add_argument("--seed", type=int, help="where to begin")
    parser.add_argument("--cases", type=int, default=0, help="how many without the key")
    parser.add_argument("--authenticated", type=int, default=0, metavar="N", help="how many messages with the key")
    options = parser.parse_args()
    seed, failed = first_seed(options.seed), False
    if options.cases:
        memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        outcomes = outside(options.cases, seed)
        rate, memory = options.cases / (time.perf_counter() - began), resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss - memory
        print(f"minipool {minipool.__version__}, seed {seed}: {outcomes.total():,} cases without the key, "
              f"{rate:,.0f}/s\n  0 let in, 0 forged, 0 globals resolved, memory +{memory / 1024:.0f} MB\n"
              f"  {show(outcomes)}")
    if options.authenticated:
        began = time.perf_counter()
        report = inside(options.authenticated, seed)
        rate = report.outcomes.total() / (time.perf_counter() - began)
        print(f"minipool {minipool.__version__}, seed {seed}: {report.outcomes.total():,} messages with the key in "
              f"{report.worlds:,} worlds, {rate:,.0f}/s, {report.honest:,} honest jobs done, 0 globals resolved, "
              f"{sum(f[0] for f in report.failures.values())} failures\n  {show(report.outcomes)}")
        for count, first, kind, _ in sorted(report.failures.values(), key=lambda f: -f[0]):
            print(f"  {count} worlds ended by {kind}; first: --seed {first}")
        failed = bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
