"""Who has not the secret gets nowhere, who has it harms nobody else, and the secret stays where it belongs."""

import ast
import contextlib
import hashlib
import io
import logging
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from harness import Cluster
from processes import ROOT, SECRET, free_port, marked, read, wait_for_workers, wait_until

import minipool
from minipool import PYTHON, Connection, Malformed, Plain, Refused, Secret, Server, SessionKeys
from tests import fuzz

INSTANCE = b"instance of test"
MANY = 1000
WORKER, OTHER_WORKER = b"worker 1".ljust(20), b"worker 2".ljust(20)


@pytest.fixture
def rng():
    """Chance that can be repeated: MINIPOOL_SEED=..."""
    seed = fuzz.first_seed()
    print("seed", seed)
    return random.Random(seed)


# ---- nonsense ----


class TestNonsense:
    def test_without_the_key_gets_nowhere(self):
        seed = fuzz.first_seed()
        print("seed", seed)
        outcomes = fuzz.outside(50_000, seed)
        assert outcomes.total() >= 50_000
        assert {"Malformed", "EOFError", "refused", "closed in silence", "closed after the hello"} <= set(outcomes)

    def test_with_the_key_breaks_nothing_and_holds_up_nobody(self):
        seed = fuzz.first_seed()
        print("seed", seed)
        report = fuzz.inside(5_000, seed)
        for _, _, kind, error in report.failures.values():
            print(kind, *error.__notes__)
        assert not report.failures and report.honest >= 5


# ---- recorded frames ----


class Line:
    """Honest frames from one end, whatever a test makes of them at the other."""

    def __init__(self, rng):
        self.rng, self.keys = rng, [rng.randbytes(32) for _ in range(3)]
        self.mine, self.back, self.others = map(self.record, self.keys)

    @staticmethod
    def record(key):
        """Three frames of one direction of one connection."""
        connection = Connection(Plain(socket.socket()), key, key, "server")
        frames = []
        long = [("put", (b"s", 1), b"abc" * 300)]
        for batch in ([("delivered", [1])], [("ask", 1, "info"), ("cancel", [2])], long):
            connection._encode_frame(batch, b"")
            frames.append(b"".join(connection._rest))
        connection._seam.sock.close()
        return frames

    def hear(self, *frames):
        """How many batches a receiver takes of these bytes, and what ends it."""
        ours, theirs = socket.socketpair()
        connection, taken = Connection(Plain(ours), b"", self.keys[0], "client"), 0
        with ours, theirs:
            theirs.sendall(b"".join(frames))
            theirs.shutdown(socket.SHUT_WR)
            try:
                while True:
                    connection.receive()
                    taken += 1
            except (Malformed, EOFError) as error:
                return taken, type(error)

    def flip(self, start, end):
        """A frame with one to three bits of this part changed."""
        frame = bytearray(self.mine[2])
        for place in self.rng.sample(range(start, len(frame) if end is None else end), self.rng.randint(1, 3)):
            frame[place] ^= 1 << self.rng.randrange(8)
        return bytes(frame)


class TestFrames:
    """A thousand of each are refused, after the honest ones before them."""

    def refused(self, rng, frames, taken):
        """`frames(line)` gives what arrives; of it the first `taken` are honest."""
        line = Line(rng)
        assert line.hear(*line.mine) == (3, EOFError)
        for number in range(MANY):
            if number % 100 == 0:
                line = Line(rng)
            assert line.hear(*frames(line)) == (taken, Malformed)

    def test_played_again(self, rng):
        self.refused(rng, lambda line: [*line.mine, rng.choice(line.mine)], 3)

    def test_out_of_order(self, rng):
        self.refused(rng, lambda line: [line.mine[i] for i in rng.choice(([0, 2, 1], [0, 0, 1], [0, 2, 0]))], 1)

    def test_left_out(self, rng):
        self.refused(rng, lambda line: rng.choice(([line.mine[1]], [line.mine[2]], line.mine[1:])), 0)

    def test_sent_back_to_who_wrote_them(self, rng):
        self.refused(rng, lambda line: [rng.choice(line.back)], 0)

    def test_of_another_connection(self, rng):
        self.refused(rng, lambda line: [*line.mine[:2], line.others[2]], 2)

    def test_with_the_head_of_one_and_the_tail_of_another(self, rng):
        self.refused(rng, lambda line: [line.mine[0][:40] + rng.choice((line.mine[1], line.others[1]))[40:]], 0)

    def test_cut_short_with_another_behind(self, rng):
        def cut(frame):
            return frame[:rng.randrange(8, len(frame))]
        self.refused(rng, lambda line: [line.mine[0], cut(line.mine[1]), line.mine[2]], 1)

    def test_cut_short_deliver_nothing(self, rng):
        line = Line(rng)
        for _ in range(MANY):
            cut = line.mine[1][:rng.randrange(len(line.mine[1]))]
            assert line.hear(line.mine[0], cut) == (1, EOFError)

    @pytest.mark.parametrize("start, end", [(8, 40), (40, None)], ids=["tag", "control"])
    def test_with_flipped_bits(self, rng, start, end):
        self.refused(rng, lambda line: [*line.mine[:2], line.flip(start, end)], 2)

    def test_with_flipped_bits_in_the_header(self, rng):
        line = Line(rng)
        for _ in range(MANY):       # a length that is too large waits for bytes that do not come
            taken, error = line.hear(*line.mine[:2], line.flip(0, 8))
            assert taken == 2 and error in (Malformed, EOFError)

    def test_with_a_flipped_body_are_told_by_the_digest(self, rng):
        body = rng.randbytes(500)
        client, server = socket.socketpair()
        sender = Connection(Plain(client), b"k", b"", "server")
        receiver = Connection(Plain(server), b"", b"k", "client")
        for _ in range(MANY):
            sender._encode_frame([("range", (b"s", 1), 0, hashlib.sha256(body).digest())], body)
            frame = bytearray(b"".join(sender._rest))
            frame[rng.randrange(len(frame) - 500, len(frame))] ^= 1 << rng.randrange(8)
            client.sendall(frame)
            [(_, _, _, digest, spoiled)] = receiver.receive()
            assert hashlib.sha256(spoiled).digest() != digest
        client.close()
        server.close()


class TestHandshakes:
    def shake(self, server_secret, spoil):
        """One handshake through a middleman, who changes the steps as `spoil(step, bytes)` says; who believed whom."""
        admitted, believed = [], []
        keeper = object.__new__(minipool.Doorkeeper)
        keeper._guests, keeper._spoken, keeper._selector = {}, {}, fuzz.Nobody()
        keeper._binding = b""
        keeper._secret, keeper._instance = server_secret.role_key, INSTANCE
        keeper._admit = lambda *guest: admitted.append(guest)
        first = minipool.first_hello("client")
        letter = fuzz.Letter(spoil(1, first), random.Random(0))
        guest = minipool._Guest(letter, "127.0.0.1")
        keeper._guests[letter] = guest
        keeper._hear(guest)
        while not letter.closed and guest.wanted != 32:
            keeper._hear(guest)
        second = spoil(2, letter.answer) if guest.wanted == 32 else b""
        if second:
            keys = SessionKeys.derive(server_secret.role_key("client", second[16:32]), first, second)
            letter.data += spoil(3, keys.dialer_proof)
            while letter in keeper._guests:
                keeper._hear(guest)
            believed = [keys] if spoil(4, letter.answer[64:]) == keys.server_proof else []
        return bool(admitted), bool(believed)

    def test_with_a_bit_changed_on_the_way_never_join_two_who_disagree(self, rng):
        secret = Secret.new()
        assert self.shake(secret, lambda step, data: data) == (True, True)
        for _ in range(MANY):
            chosen, bit = rng.randint(1, 4), rng.random()

            def spoil(step, data, chosen=chosen, bit=bit):
                if step != chosen:
                    return data
                place = int(bit * len(data) * 8)
                return data[:place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1:]
            # the last step is the server's own proof: it has admitted the dialer, who leaves
            assert self.shake(secret, spoil) == (chosen == 4, False)


# ---- recorded sessions ----


class Tape(FaultProxy):
    """A proxy that records both ways, and lets the test change frames that the dialer sends."""

    def __init__(self, host, port):
        self.ways, self.up, self.down = threading.local(), bytearray(), bytearray()
        self.change = None              # change(frame number, frame): what goes on in its place
        self._parts = bytearray()
        self._frames = 0
        super().__init__(host, port)

    def _carry(self, pair, source, sink, way):
        self.ways.name = way
        super()._carry(pair, source, sink, way)

    def _spoil(self, pair, data):
        if self.ways.name == "down":
            self.down += data
            return data
        self.up += data
        before, whole = len(self.up) - len(data), b""
        shaken = data[:max(0, 96 - before)]             # the handshake goes on as it is
        self._parts += data[len(shaken):]
        while len(self._parts) >= 40:
            size = 40 + sum(minipool._FRAME.unpack(self._parts[:8]))
            if len(self._parts) < size:
                break
            frame, self._parts = bytes(self._parts[:size]), self._parts[size:]
            whole += self.change(self._frames, frame) if self.change else frame
            self._frames += 1
        return shaken + whole


class Member:
    """One authenticated connection, and what is said over it."""

    def __init__(self, address, role, identity=b"", key=None, announce=True):
        sock = socket.create_connection(address, timeout=10)
        try:
            keys, _ = minipool.handshake(sock, role, key or Secret(SECRET).role_key, identity)
        except BaseException:
            sock.close()
            raise
        self.connection = Connection(Plain(sock), keys.up, keys.down, "server")
        if announce:
            self.say({"client": a_client, "node": a_node, "worker": lambda: a_worker(identity)}[role]())

    def say(self, *messages):
        self.connection.post(messages)
        self.connection.flush()

    def hear(self, kind):
        """Return the next message of this kind; whatever comes with it or before is passed over."""
        while True:
            assert self.connection.has_input(10), f"no {kind!r} came"
            for message in self.connection.receive():
                if message[0] == kind:
                    return message

    def is_closed(self):
        """Whether the server closes this connection now."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.has_input(3):
                self.connection.receive()
            return False
        return True


def a_client(session=b"a client"):
    return "client", {"session": session, "name": "me", "max_workers": None, "workers_seen": 0}, []


def a_node(id=b"node        "):
    return "node", {"id": id, "name": "node", "python": PYTHON, "host": "here", "pid": 1}


def a_worker(identity, attempts=(), **info):
    return "worker", {"id": identity, "node": b"node        ", "node_name": "node", "slot": 0, "pid": 1,
                      "device": "cpu", "tags": [], "has": [], "positions": {},
                      "returns": False, **info}, list(attempts)


@pytest.fixture
def address(server):
    return minipool.parse_address(server.address)


@pytest.fixture
def join(address):
    """join(role): a member of the server's pool, played by the test."""
    members = []

    def join(*arguments, **options):
        members.append(Member(*options.pop("address", [address]), *arguments, **options))
        return members[-1]
    yield join
    for member in members:
        member.connection.dispose()


@pytest.fixture
def tape(address):
    with Tape(*address) as tape:
        yield tape


def all_of(sock):
    """What a server says until it closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(65536):
            answer += more
    return answer


class TestRecordedSessions:
    @pytest.mark.parametrize("round", range(5))
    def test_played_again_are_refused(self, server, join, tape, address, round):
        member = join("client", address=[("127.0.0.1", tape.port)])
        member.say(("put", (b"a client", 1), b"f"), ("submit", 1, (b"a client", 1), b"", 0, None))
        member.say(("ask", 1, "info"))
        member.hear("answer")
        accepted = server._scheduler.counters["accepted"]
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(tape.up)
            answer = all_of(sock)
        assert len(answer) <= 96 and answer[64:] in (b"", minipool.REFUSED)
        assert server._scheduler.counters["accepted"] == accepted == 1
        member.say(("ask", 2, "info"))
        member.hear("answer")

    def test_played_again_below_an_honest_handshake_are_refused(self, server, join, tape):
        first = join("client", address=[("127.0.0.1", tape.port)])
        first.say(("submit", 1, (b"a client", 1), b"", 0, None), ("ask", 1, "info"))
        first.hear("answer")
        second = join("client", announce=False)
        second.connection._seam.sock.sendall(tape.up[96:])
        assert second.is_closed() and server._scheduler.counters["accepted"] == 1

    def test_of_the_server_sent_back_to_it_are_closed_in_silence(self, join, tape, address):
        join("client", address=[("127.0.0.1", tape.port)]).hear("welcome")
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(tape.down)
            assert all_of(sock) == b""

    def test_of_the_server_do_not_deceive_a_dialer(self, join, tape):
        join("client", address=[("127.0.0.1", tape.port)]).hear("welcome")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(tape.down)
            with pytest.raises(ConnectionError, match="could not prove"):
                minipool.handshake(ours, "client", Secret(SECRET).role_key)

    @pytest.mark.parametrize("how", ["doubled", "swapped", "left out", "flipped", "cut", "reflected", "foreign"])
    def test_changed_on_the_way_end_there_and_others_go_on(self, server, join, tape, how, caplog):
        other = join("client", announce=False)
        other.say(a_client(b"another"))
        other.hear("welcome")
        kept = []

        def change(number, frame):
            if number != 2:
                return frame + (kept.pop() if kept else b"")
            if how == "swapped":
                kept.append(frame)
            flipped = frame[:-1] + bytes([frame[-1] ^ 1])
            return {"doubled": frame * 2, "swapped": b"", "left out": b"", "flipped": flipped, "cut": frame[:-1],
                    "reflected": bytes(tape.down[96:]), "foreign": Line.record(b"key")[2]}[how]
        tape.change = change
        member = join("client", address=[("127.0.0.1", tape.port)])
        member.hear("welcome")
        for number in range(1, 5):
            member.say(("submit", number, (b"a client", 1), b"", 0, None))
        assert member.is_closed()
        assert server._scheduler.counters["accepted"] <= 2 + (how == "doubled")
        other.say(("ask", 1, "info"))
        other.hear("answer")


# ---- others' jobs ----


class TestOthersJobs:
    """Who has the key still acts on what is its own, and on nothing else."""

    def two(self):
        """Two clients, of which one has a running, a queued and a finished job."""
        pool = Cluster(workers=["w1", "w2"], clients=["c1", "c2"])
        done, running = pool.submit(on=["host-1"]), None
        pool.finish(done)
        running = pool.submit(on=["host-1"])
        pool.start(running)
        queued = pool.submit(on=["host-1"])
        pool.clear()
        return pool, [done, running, queued]

    def states(self, pool, jobs):
        return [pool.state(job) for job in jobs]

    @pytest.mark.parametrize("words", [
        lambda jobs: ("cancel", jobs), lambda jobs: ("delivered", jobs), lambda jobs: ("kill", jobs, "because"),
        lambda jobs: ("leave", b"c1".ljust(16, b".")), lambda jobs: ("drop", [(b"c1".ljust(16, b"."), 1)]),
        lambda jobs: ("put", (b"c1".ljust(16, b"."), 1), b"evil"), lambda jobs: ("gone", (b"c1".ljust(16, b"."), 1)),
        lambda jobs: ("log", 0, (b"c1".ljust(16, b"."), 1), b"x"),
        lambda jobs: ("bye", "gone"),
    ], ids=["cancel", "delivered", "kill", "leave", "drop", "put", "gone", "log", "bye"])
    def test_are_not_a_client_s_to_touch(self, words):
        pool, jobs = self.two()
        before, objects = self.states(pool, jobs), dict(pool.scheduler.sessions[pool.session("c1")].objects)
        pool.submit(client="c2", on=["host-1"])             # so that it has been at that worker too
        pool.clear()
        with contextlib.suppress(Malformed):
            pool.feed("c2", words(jobs))
        assert self.states(pool, jobs) == before == ["delivering", "running", "ready"]
        assert not pool.told("n1", "kill") and not pool.told("w1", "recall") and not pool.told("w1", "drop")
        assert not pool.told("c1", "done") and not pool.told("c1", "broken")
        session = pool.scheduler.sessions[pool.session("c1")]
        assert session.objects == objects
        assert not any(session.log for session in pool.scheduler.sessions.values())     # from there it goes to workers

    def test_run_their_own_function_even_if_another_client_names_one_like_it(self):
        pool = Cluster(clients=["c1", "c2"])
        name = (pool.session("c1"), 1)
        with contextlib.suppress(Malformed):
            pool.feed("c2", ("put", name, b"evil"), ("submit", 1, name, b"", 0, None))
            pool.finish(1, client="c2")
        sent = pool.told("w1", "put")
        pool.submit(client="c1")
        sent += pool.told("w1", "put")
        assert sent[-1:] == [(name, b"f")] or (name, b"evil") not in sent

    def test_keep_their_function_when_another_client_drops_it(self):
        pool = Cluster(clients=["c1", "c2"])
        pool.finish(pool.submit(client="c2"), client="c2")  # the worker has seen both
        pool.finish(pool.submit())
        pool.clear()
        with contextlib.suppress(Malformed):
            pool.feed("c2", ("drop", [(pool.session("c1"), 1)]))
        assert not pool.told("w1", "drop")

    def test_end_by_the_word_of_who_holds_them_only(self):
        pool, (_, running, queued) = self.two()
        token = pool.token(running)
        pool.feed("w2", ("started", token), ("finished", token, "ok", b"forged", 0.1, False))
        pool.feed("w2", ("recalled", [token], [token]), ("finished", token + 1, "ok", b"forged", 0.1, False))
        assert pool.state(running) == "running" and pool.state(queued) == "ready" and not pool.told("c1", "done")
        pool.finish(running)
        assert [value for _, _, value, *_ in pool.told("c1", "done")] == [b"value"]

    def test_are_not_lost_by_the_word_of_another_node(self):
        pool, (_, running, _) = self.two()
        pool.join_node("n2", called="other")
        with contextlib.suppress(Malformed):
            pool.feed("n2", ("died", pool.id_of("w1"), pool.token(running), {"what": "signal 9"}))
            pool.feed("n2", ("retire", "because"))
        assert pool.knows("w1") and pool.state(running) == "running" and pool.inbox("w1")

    def test_are_pulled_whole_though_another_client_asks_for_a_range_that_cannot_be(self):
        pool = Cluster(clients=["c1", "c2"])
        job, value = pool.submit(), ((pool.id_of("w1"), 1), 300_000, "")
        pool.finish(job, value=value)
        pool.clear()
        with contextlib.suppress(Malformed):
            pool.feed("c2", ("pull", value[0], 0, minipool.RANGE + 1))
        pool.feed("c1", ("pull", value[0], 0, minipool.RANGE))
        for _, _, length in pool.told("w1", "pull"):        # as Peer does it
            pool.feed("w1", ("gone", value[0]) if length > minipool.RANGE else
                      ("range", value[0], 0, hashlib.sha256(bytes(length)).digest(), bytes(length)))
        assert len(pool.told("c1", "range")) == 1 and not pool.told("c1", "gone")


# ---- honest words with senseless numbers ----


class TestSenselessNumbers:
    def test_no_worker_s_token_is_so_large_that_the_next_cannot_be_said(self, server, join):
        mad = join("worker", WORKER, announce=False)
        mad.say(a_worker(WORKER, [(minipool.BIGGEST - 1, (b"s", 1), "outcome")]))
        mad.connection.has_input(1)
        mad.connection.dispose()
        good = join("worker", OTHER_WORKER, announce=False)
        good.say(a_worker(OTHER_WORKER, tags=["good"]))
        good.hear("welcome")
        client = join("client")
        client.say(("put", (b"a client", 1), b"f"), ("submit", 1, (b"a client", 1), b"", 0, {"on": ["good"]}))
        assert good.hear("run")[1] < minipool.BIGGEST

    @pytest.mark.parametrize("limit", [1e300, float("inf"), 10**400, 1e10, -1],
                             ids=["vast", "infinite", "no float", "300 years", "negative"])
    def test_no_time_limit_stops_the_server_s_clock(self, server, join, limit, caplog):
        worker, client = join("worker", WORKER), join("client")
        client.say(("put", (b"a client", 1), b"f"), ("submit", 1, (b"a client", 1), b"", 0, {"job_timeout": limit}))
        worker.hear("welcome")
        if worker.connection.has_input(1):              # else its client was thrown out
            worker.say(("started", worker.hear("run")[1]))
            client.hear("began")
        with server._lock:                  # as when nobody else is there any more: no other timer is left
            server._scheduler._timers[:] = [t for t in server._scheduler._timers if t[0] > time.monotonic() + 1e6]
            server._clock.notify()
        time.sleep(0.1)
        node = join("node", announce=False)
        node.say(a_node(b"another node"))
        node.hear("welcome")
        give_up = time.monotonic() + 10
        while not 0 < server._planned - time.monotonic() < 2 and time.monotonic() < give_up:
            time.sleep(0.01)                # until the ticker looks after the new host
        assert time.monotonic() < give_up
        assert server._ticker.is_alive() and "stumbled" not in caplog.text

    @pytest.mark.parametrize("options", [{"max_deaths": -5}, {"retries": -5}, {"max_tasks": -1}, {"priority": 10**400},
                                         {"name": "x" * 10**5}], ids=lambda options: next(iter(options)))
    def test_no_option_breaks_an_invariant(self, options):
        pool = Cluster()
        with contextlib.suppress(Malformed):
            pool.submit(**options)          # which checks
            pool.lose("w1")
            pool.pass_time(20)

    @pytest.mark.parametrize("positions", [{5: 1}, {b"c1".ljust(16, b"."): "x"}, {b"c1".ljust(16, b"."): -1}],
                             ids=["key", "text", "negative"])
    def test_no_place_in_a_log_is_anything_else_than_a_number(self, server, join, positions, caplog):
        worker = join("worker", WORKER, announce=False)
        worker.say(a_worker(WORKER, positions=positions))
        assert worker.is_closed()
        assert "stumbled" not in caplog.text and not server._scheduler.sessions

    def test_an_attempt_listed_under_another_job_s_name_loses_neither(self):
        pool = Cluster(clients=["c1"], restarted=True)
        pool.scheduler._end_adoption(True, pool.now)
        running = pool.submit()
        pool.start(running)
        waiting = (b"elsewhere", 9)         # a job of a session that only this worker tells of
        pool.cut("w1")
        pool.join_worker("w1", [(pool.token(running), waiting, "begun")])       # which checks
        assert pool.state(running) in ("running", "ready")

    def test_a_cause_nested_too_deeply_to_be_told_ends_nobody_s_connection(self, server, join, address):
        worker, client = join("worker", WORKER), join("client")
        worker.hear("welcome")
        client.say(("put", (b"a client", 1), b"f"), ("submit", 1, (b"a client", 1), b"", 0, {"max_deaths": 0}))
        token, depth = worker.hear("run")[1], 50_000        # which is opened without recursion, and written with it
        worker.say(("started", token))
        client.hear("began")
        node = fuzz.Membership(address, Secret(SECRET), "node")
        node.say(a_node())
        control = pickle.dumps([("died", WORKER, token, {"what": "it ended", "more": "HERE"})], 3)
        node.say_raw(control.replace(b"X\4\0\0\0HERE", b"]" * (depth + 1) + b"a" * depth))
        wait_until(lambda: len(server._scheduler._peers) < 3)    # the worker is lost, or the node thrown out
        client.say(("ask", 1, "info"))
        client.hear("answer")
        node.connection.dispose()


# ---- tickets ----


class TestTickets:
    @pytest.fixture
    def ticket(self):
        key = Secret(SECRET).role_key("worker", INSTANCE, WORKER)
        return lambda *_: key

    def test_open_their_own_place(self, join, ticket):
        join("worker", WORKER, ticket).hear("welcome")

    @pytest.mark.parametrize("role, identity", [("worker", OTHER_WORKER), ("worker", bytes(20)), ("client", b""),
                                                ("node", b"")])
    def test_open_no_other_place_and_no_other_role(self, server, join, ticket, role, identity):
        with pytest.raises(Refused):
            join(role, identity, ticket)
        assert not server._readers

    def test_open_no_server_of_another_secret(self, join, ticket):
        with Server(port=0, secret=Secret.new().text) as other, pytest.raises(Refused):
            join("worker", WORKER, ticket, address=[minipool.parse_address(other.address)])

    def test_of_a_password_open_no_other_life_of_the_server(self, join):
        text = "correct horse battery"
        with Server(port=0, secret=text) as first, Server(port=0, secret=text) as second:
            instances = [s._doorkeeper._instance for s in (first, second)]
            key = Secret(text).role_key("worker", instances[0], WORKER)
            join("worker", WORKER, lambda *_: key, address=[minipool.parse_address(first.address)]).hear("welcome")
            with pytest.raises(Refused):
                join("worker", WORKER, lambda *_: key, address=[minipool.parse_address(second.address)])

    def test_do_not_let_a_worker_announce_another(self, server, join, ticket):
        worker = join("worker", WORKER, ticket, announce=False)
        worker.say(a_worker(OTHER_WORKER))
        assert worker.is_closed() and not server._scheduler.workers

    @pytest.mark.parametrize("together", [True, False])
    def test_do_not_let_a_worker_say_goodbye_and_announce_another(self, server, join, ticket, together, caplog):
        worker = join("worker", WORKER, ticket)
        worker.hear("welcome")
        words = ("bye", "done"), a_worker(OTHER_WORKER)
        for batch in [words] if together else [[word] for word in words]:
            worker.say(*batch)
        assert worker.is_closed()
        assert OTHER_WORKER not in server._scheduler.workers and "stumbled" not in caplog.text

    def test_are_what_a_worker_needs_a_client_s_key_is_none(self, server, join):
        key = Secret(SECRET).role_key("client", INSTANCE)
        for role, identity in (("worker", WORKER), ("worker", b""), ("node", b"")):
            with pytest.raises(Refused):
                join(role, identity, lambda *_: key)
        assert not server._readers


# ---- where it listens ----


def listening(pids):
    """Return the addresses that these processes listen on."""
    links = []
    for pid in pids:
        with contextlib.suppress(OSError):              # the process ended meanwhile
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):      # or closed this one
                    links.append(os.readlink(entry.path))
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        found += [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]
    return found


def test_in_a_whole_pool_one_process_listens_and_only_on_loopback(cluster, own_mark):
    cluster.node(cpu_workers=2)
    with cluster.executor() as ex:
        wait_for_workers(ex, 2)
        assert listening(marked(own_mark)) == [f"0100007F:{cluster.port:04X}"]      # 127.0.0.1


def test_an_embedded_pool_listens_on_loopback_only(embedded, own_mark):
    ex = embedded(2)
    ex.submit(abs, 1).result(60)
    [address] = listening(marked(own_mark))
    assert address.startswith("0100007F:")


# ---- where the secret is ----


class TestSecretFile:
    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        path = tmp_path / "the secret"
        path.touch(mode=0o600)
        path.write_text(SECRET)
        monkeypatch.setenv("MINIPOOL_SECRET_FILE", str(path))
        return path

    def test_that_others_can_read_is_refused_and_the_command_named_helps(self, path):
        path.chmod(0o644)
        with pytest.raises(Refused) as error:
            minipool.find_secret()
        assert str(error.value) == f"others can read the secret file {path}: run chmod 600 {path}"
        path.chmod(0o600)
        assert minipool.find_secret().text == SECRET

    @pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
    def test_of_another_user_is_refused(self, path):
        os.chown(path, 65534, 65534)
        with pytest.raises(Refused, match="belongs to another user"):
            minipool.find_secret()

    def test_that_is_a_link_or_no_file_is_refused(self, path, tmp_path, monkeypatch):
        (tmp_path / "link").symlink_to(path)
        monkeypatch.setenv("MINIPOOL_SECRET_FILE", str(tmp_path / "link"))
        with pytest.raises(Refused, match="cannot be read"):
            minipool.find_secret()

    def test_that_is_a_pipe_is_refused_and_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "pipe", 0o600)
        code = "import minipool, sys\ntry: minipool.find_secret(path=sys.argv[1])\nexcept minipool.Refused: print('no')"
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], cwd=ROOT, capture_output=True, text=True,
                              timeout=20)
        assert done.stdout == "no\n"


def search_memory(digest):
    """A job: how many copies of the secret with this digest the worker's memory holds."""
    import hashlib as hashes
    import re as expressions
    found = set()
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            start, end = (int(place, 16) for place in span.split("-"))
            if rights.startswith("rw") and end - start < 1 << 28:
                try:
                    memory.seek(start)
                    data = memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue
                found |= {m for m in expressions.findall(rb"mp1_[A-Za-z0-9_-]{43}", data)}
    return sum(hashes.sha256(text).hexdigest() == digest for text in found)


class TestSecretStays:
    def absent(self, mark, workers, secret):
        """It is in nobody's command line and in no worker's environment."""
        text = secret.encode()
        assert len(workers) >= 1 and set(workers) <= set(marked(mark))
        assert not [read(pid, "cmdline") for pid in marked(mark) if text in read(pid, "cmdline")]
        for pid in workers:
            assert text not in read(pid, "environ") and b"MINIPOOL_SECRET" not in read(pid, "environ")

    def test_out_of_a_cluster_s_command_lines_workers_and_logs(self, program, cluster, own_mark, monkeypatch):
        server = program(ROOT / "minipool.py", "serve", "--port", port := free_port(), "-v",
                         MINIPOOL_SECRET=cluster.secret)
        server.says("server on")
        node = program(ROOT / "minipool_worker.py", "connect", f"127.0.0.1:{port}", "--cpu-workers", 1,
                       "--gpus", "none", "-v", MINIPOOL_SECRET=cluster.secret)
        node.says("connected to")
        monkeypatch.setenv("MINIPOOL_SECRET", cluster.secret)
        with minipool.Executor(f"127.0.0.1:{port}") as ex:
            workers = wait_for_workers(ex, 1)
            assert ex.submit(dict, a=1).result(60) == {"a": 1}
            environment = ex.submit(eval, "dict(__import__('os').environ)").result(60)
            assert cluster.secret not in environment.values() and "MINIPOOL_SECRET" not in environment
            self.absent(own_mark, workers, cluster.secret)
            assert cluster.secret not in repr((ex, ex._client, ex.info(), vars(ex)))
        assert "<" in server.err and "submit" in server.err         # it does log every message
        for text in (server.out, server.err, node.out, node.err):
            assert cluster.secret not in text and cluster.secret[4:] not in text

    def test_out_of_an_embedded_pool_s_command_lines_and_workers(self, embedded, own_mark, monkeypatch):
        monkeypatch.setenv("MINIPOOL_SECRET", SECRET)
        ex = embedded(2)
        self.absent(own_mark, wait_for_workers(ex, 2), SECRET)
        assert ex.submit(os.getenv, "MINIPOOL_SECRET").result(60) is None

    def test_out_of_a_worker_s_memory(self, cluster):
        cluster.node(MINIPOOL_SECRET=cluster.secret)
        with cluster.executor() as ex:
            digest = hashlib.sha256(cluster.secret.encode()).hexdigest()
            assert ex.submit(search_memory, digest).result(60) == 0
            decoy = "_1pm" + Secret.new().text[4:]          # a search that finds nothing would prove nothing
            search = ex.submit(lambda text: (text := "mp1_" + text[4:], search_memory(
                hashlib.sha256(text.encode()).hexdigest()))[1], decoy)
            assert search.result(60) == 1

    def test_out_of_reprs_and_the_log_of_this_process(self, caplog, own_mark):
        caplog.set_level(logging.DEBUG)
        with Server(port=0, secret=SECRET) as server:
            with minipool.Executor(server.address, secret=SECRET) as ex:
                ex.info()
                shown = "".join(map(repr, (server, server._secret, ex, ex._client, ex._client.peer, [server._secret],
                                           server._doorkeeper, server._scheduler.snapshot(0))))
            with pytest.raises(Refused):
                minipool.Executor(server.address, secret=Secret.new().text, connect_timeout=5).submit(abs, 1)
        assert SECRET[4:] not in shown and SECRET[4:] not in caplog.text

    def test_out_of_the_traceback_of_a_server_that_does_not_start(self, server, address):
        shown = io.StringIO()
        try:
            Server(port=address[1], secret=SECRET).start()
        except OSError as error:
            trace = traceback.TracebackException.from_exception(error, capture_locals=True)
            trace.stack[:] = [frame for frame in trace.stack if frame.filename == minipool.__file__]
            shown.write("".join(trace.format()))
        assert "in start" in shown.getvalue() and SECRET[4:] not in shown.getvalue()


# ---- what the source says ----


MODULES = {name: ast.parse((ROOT / name).read_text()) for name in ("minipool.py", "minipool_worker.py")}


def section(title):
    """The lines of a section of minipool.py."""
    lines = (ROOT / "minipool.py").read_text().splitlines()
    heads = [number for number, line in enumerate(lines, 1) if re.fullmatch(r"# \d \w+", line)] + [len(lines)]
    start = next(number for number in heads if lines[number - 1].endswith(f" {title}"))
    return range(start, heads[heads.index(start) + 1])


def called(node):
    """The dotted name of what is called."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def calls(pattern):
    """(module, line) of each call of something so named."""
    return [(name, node.lineno) for name, tree in MODULES.items() for node in ast.walk(tree)
            if re.fullmatch(pattern, called(node))]


class TestSource:
    def test_tags_and_proofs_are_compared_by_compare_digest_only(self):
        secretive = re.compile(r"\b(tag|expected|proof|\w+_proof|REFUSED|answer|guest\.data|_raw|text)\b")
        spots = [*section("wire"), *section("server")]
        compared = [ast.unparse(node) for node in ast.walk(MODULES["minipool.py"])
                    if isinstance(node, ast.Compare) and node.lineno in spots
                    and any(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops)]
        assert compared and not [text for text in compared if secretive.search(text)
                                 and not text.startswith(("guest.data[:8] != MAGIC", "len("))]
        assert len(calls(r"hmac\.compare_digest")) == 4
        assert not [text for text in compared if "compare_digest" in text]

    def test_one_class_decides_what_a_pickle_may_name(self):
        classes = [node.name for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
                   and any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body)]
        assert classes == ["_BuiltinsOnly"]
        assert "raise Malformed" in ast.unparse(next(
            node for node in ast.walk(MODULES["minipool.py"]) if getattr(node, "name", "") == "find_class"))

    def test_one_place_opens_what_came_over_the_wire(self):
        [(name, line)] = calls(r".*Unpickler|_BuiltinsOnly")
        assert name == "minipool.py" and line in section("wire")
        assert [line for _, line in calls("decode_messages")] and len(calls("decode_messages")) == 1
        assert not calls(r"(marshal|shelve|cloudpickle|dill)\.loads?|pickle\.load|eval|exec")

    def test_users_bytes_are_opened_among_the_values_only(self):
        spots = calls(r"pickle\.loads")
        assert spots and {name for name, _ in spots} == {"minipool.py"}
        assert all(line in section("values") for _, line in spots)

    def test_names_from_the_wire_become_methods_by_the_catalogue_only(self):
        tree = MODULES["minipool.py"]
        spots = [node for node in ast.walk(tree)
                 if called(node) == "getattr" and not isinstance(node.args[1], ast.Constant)]
        allowed = {*section("wire"), *section("values"), *section("client"), *section("instances"), *section("CLI")}
        assert [ast.unparse(node) for node in spots if node.lineno not in allowed] == ["getattr(self, f'_{k}')"]


# ---- the audit of all server processes (tests/audit) ----


PLANTED = """
import pickle, sys, minipool
minipool._BuiltinsOnly = pickle.Unpickler       # the bug that the audit is there to find
sys.exit(minipool.main(sys.argv[1:]))
"""


class TestAudit:
    @pytest.fixture
    def audit(self, tmp_path, monkeypatch):
        """A file of this test's own for what its server processes resolve."""
        monkeypatch.setenv("MINIPOOL_TEST_AUDIT", str(tmp_path / "resolved"))
        return tmp_path / "resolved"

    def say_a_global(self, port):
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as sock:
            keys, _ = minipool.handshake(sock, "client", Secret(SECRET).role_key)
            control = pickle.dumps([("delivered", [os.getcwd])])
            header = minipool._FRAME.pack(len(control), 0)
            sock.sendall(header + minipool._hmac(keys.up, bytes(8) + header + control) + control)
            assert all_of(sock) == b""

    @pytest.mark.parametrize("planted", [True, False])
    def test_hears_a_server_that_resolves_a_global_and_ours_does_not(self, program, audit, planted):
        start = ("-c", PLANTED) if planted else (ROOT / "minipool.py",)
        server = program(*start, "serve", "--port", port := free_port(), MINIPOOL_SECRET=SECRET, cwd=ROOT)
        server.says("server on")
        self.say_a_global(port)
        heard = audit.read_text() if audit.exists() else ""
        assert ("posix.getcwd" in heard) == planted and bool(heard) == planted

    def test_leaves_other_processes_alone(self, program, audit):
        code = "import os, pickle; pickle.loads(pickle.dumps(os.getcwd)); print('done')"
        program("-c", code, "connect").says("done")
        assert not audit.exists()

    def test_runs_the_sitecustomize_that_it_hides(self, program, tmp_path):
        (tmp_path / "sitecustomize.py").write_text("print('I am hidden')")
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
        program("-c", "print('and the program')", PYTHONPATH=path).says("I am hidden\nand the program")

    def test_is_on_the_way_of_the_processes_of_these_tests(self, cluster):
        words = read(cluster.server.pid, "environ").split(b"\0")
        assert any(word.startswith(b"MINIPOOL_TEST_AUDIT=") for word in words)
        assert any(word.startswith(b"PYTHONPATH=") and b"audit" in word for word in words)
