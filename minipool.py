"""A pool of GPU workers across machines, used like concurrent.futures.

    from minipool import Executor

    def train(lr):
        import torch                      # one process per GPU: the device is always cuda:0
        ...
        return lr, loss

    with Executor() as ex:                # this machine; MINIPOOL_ADDRESS=host makes it a cluster
        for lr, loss in ex.map(train, [0.1, 0.03, 0.01]):
            print(lr, loss)

How it hangs together: everybody dials the server, and the server is a switch, not a store.

      your program                     minipool.py serve                    minipool_worker.py connect HOST
    +--------------+  submit   +--------------------------------+   run    +--------------------------------+
    |  Executor    | ========> |  doorkeeper: who may come in   | =======> |  worker: one process, one GPU  |
    |   Future     |           |  scheduler: pure state machine |          |   main thread runs your code   |
    |   (values)   | <======== |  one outbox per peer           | <======= |   I/O thread talks, (values)   |
    +--------------+ finished  +--------------------------------+ finished +--------------------------------+
           |                        ^   relays ranges   |                     ^ spawns, watches, respawns
           +---- large values: ---- | pulled, in ranges + -------> reader     | node: never runs your code

Small values (64 KiB at most) ride inside messages. Larger ones stay with who made them: a reader on the same host
maps their memory, any other pulls byte ranges through the server. Everything on the wire is a batch: one pickle of
builtins, one HMAC, one system call for many messages. A job is done when its client has the outcome; until then the
client keeps the job, the worker keeps the outcome, and the server can be restarted without losing either.

Sections, bottom-up; each uses only what is above it:

    1 errors      what went wrong, by what the caller can do next
    2 messages    everything that may cross the wire: the protocol's documentation
    3 wire        secrets, handshake, Connection (framed, authenticated), Peer (who dials, and dials again)
    4 scheduler   pure: messages and time in, messages out
    5 server      threads, one lock, outboxes, the clock
    6 values      pickles of functions, arguments and results; what travels by value
    7 client      Future, Executor and its views, the embedded pool
    8 instances   Actor, Pool: objects that live in workers
    9 CLI         serve, status, drain, versions, secret

The worker's half is in minipool_worker.py, which imports this module; never the reverse.
"""
from __future__ import annotations

import argparse
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import io
import itertools
import json
import logging
import mmap
import operator
import os
import pickle
import queue
import random
import resource
import secrets
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed, wait
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    import ssl

    import minipool_worker

__version__ = "0.1.0"

__all__ = [
    # pools and clients
    "Executor", "Future", "Server", "is_server_running", "as_completed", "wait", "gather", "get_executor",
    # objects that live in workers
    "Actor", "Pool", "WorkerInterface",
    # inside a job
    "current_job", "secede", "rejoin", "Reschedule",
    # errors
    "MinipoolError", "WorkerDied", "JobTimeout", "JobKilled", "RemoteError", "ServerLost", "Refused",
    "VersionMismatch", "TooLarge",
]

DEFAULT_PORT = 8899

log = logging.getLogger("minipool")
log.addHandler(logging.NullHandler())       # a library is silent unless its user asks; the commands ask


# ==================================================================================================================
# 1 errors
#
# One root, and subclasses by what the caller can do next. Evidence is in attributes, the sentence in the text.
#
#     MinipoolError
#       WorkerDied       (RuntimeError)                    look at the job: it took workers down
#       JobTimeout       (RuntimeError)                    allow more time, or make it faster
#       JobKilled        (RuntimeError)                    nothing: it was asked for
#       RemoteError      (Exception)                       read the remote traceback in it
#       Reschedule                                         raised by a job: it wants to run again later
#       ServerLost       (BrokenExecutor, ConnectionError) start the server, check the address
#       Refused          (PermissionError)                 give the right secret; trying again does not help
#       VersionMismatch  (RuntimeError)                    use the same Python minor and minipool on both sides
#       TooLarge         (ValueError)                      send less, or raise the server's --max-value
# ==================================================================================================================


class MinipoolError(Exception):
    """The root of what minipool itself raises."""


class WorkerDied(MinipoolError, RuntimeError):
    """A job took down more workers than `max_deaths` allows.

    `job`, `attempts`, `worker`, `node`, `device`, `exitcode` (negative: the signal) and `stderr` say what is known.
    """
    job = attempts = worker = node = device = exitcode = stderr = cast(Any, None)

    def __init__(self, text: str, **evidence: Any) -> None:
        super().__init__(text)
        self.__dict__.update(evidence)


class JobTimeout(MinipoolError, RuntimeError):
    """A job ran longer than its `job_timeout`. Not a TimeoutError: a loop over `result(timeout=1)` must end."""


class JobKilled(MinipoolError, RuntimeError):
    """A job was ended by `kill`, `kill_workers` or `terminate_workers`."""


class RemoteError(MinipoolError):
    """A job's exception that could not travel or be rebuilt: its type's name, its text, the remote traceback."""

    def __init__(self, type_name: str, text: str = "", remote_traceback: str = "") -> None:
        super().__init__(type_name, text, remote_traceback)
        self.type_name, self.text, self.remote_traceback = type_name, text, remote_traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


class Reschedule(MinipoolError):
    """Raised by a job, it sends the job back to the end of its queue; as often as that happens."""


class ServerLost(concurrent.futures.BrokenExecutor, ConnectionError, MinipoolError):
    """No server within `connect_timeout`, or gone for `reconnect_timeout` seconds."""


class Refused(MinipoolError, PermissionError):
    """The secret is wrong, or none was found: trying again does not help."""


class VersionMismatch(MinipoolError, RuntimeError):
    """The Python minor version or the protocol differs between two members of a pool."""


class TooLarge(MinipoolError, ValueError):
    """A value is larger than the server's `--max-value`."""


class Malformed(MinipoolError):
    """Bytes or fields that no honest peer sends. Ends the connection; never reaches a user's code."""


# ==================================================================================================================
# 2 messages
#
# A message is a tuple of builtins, its kind first; a frame carries a list of them. Each arriving message is checked
# once against this table (who may send it, how many fields; at the server also their types, numbers finite and in
# range) before anybody looks at it; a misfit ends the connection. From this alone a stranger could write a client.
#
# A Name is (creator, number): whoever makes a job, function or value names it, so that the name survives a restart
# of the server. A client's creator id is its session, a worker's its identity (node, slot, generation). A token is
# one attempt at a job; the server counts them and never uses one twice. A Value is bytes, or, when larger than
# INLINE, (Name, size, place) of an object that its creator keeps and the reader pulls, or opens at its place: "", or
# "pid descriptor token" of a memory file of the creator's host, in which it lies after HEAD bytes with the token.
#
#     client: submit -> server: ready -> run -> worker: started, finished -> server: finished -> client: delivered
#                            ^_____ recalled, worker lost, retry _____|              (then the worker may forget)
# ==================================================================================================================

INLINE = 64 * 1024              # bytes of a payload or outcome that ride inside a message; larger ones are pulled
RANGE = 256 * 1024              # bytes of a large value asked for at a time: about 0.2 ms of a 10 Gbit/s line
BIGGEST = 1 << 62               # no honest number is larger, and NaN compares false with everything

OK, RAISED, DIED, KILLED, TIMED_OUT = "ok", "raised", "died", "killed", "timed out"     # how a job can end
UNFIT = "unfit"                 # how an attempt can: the session's log raised on that worker, and the job never began
AGAIN = "again"                 # or: the job wants to run again, later

Name = tuple[bytes, int]
Value = bytes | tuple[Name, int, str]
Message = tuple[Any, ...]
Check = Callable[[Any], bool]


def _is_number(field: Any) -> bool:
    return type(field) is int and 0 <= field < BIGGEST


def _is_name(field: Any) -> bool:
    return (type(field) is tuple and len(field) == 2 and type(field[0]) is bytes and len(field[0]) <= 64
            and _is_number(field[1]))


def _are_options(field: Any) -> bool:
    if type(field) is not dict:
        return field is None
    for name in field:          # few: a loop over what may be there would cost more than the rest of a submission
        is_good = _OPTIONS_READ.get(name)
        if not (is_good and is_good(field[name])):
            return False
    return True


def _one_of(*accepted: type) -> Check:
    return lambda field: type(field) in accepted


def _list_of(is_good: Check) -> Check:
    return lambda field: type(field) is list and all(map(is_good, field))


_CHECKS: dict[Any, Check] = {       # by the types that the catalogue names; numbers are finite and never negative
    int: _is_number, float: lambda field: type(field) in (int, float) and 0 <= field < BIGGEST,
    **{accepted: _one_of(accepted) for accepted in (bool, str, bytes, list, dict)},
    "name": _is_name,
    "value": lambda field: type(field) is bytes or (
        type(field) is tuple and len(field) == 3 and _is_name(field[0]) and _is_number(field[1])
        and type(field[2]) is str and len(field[2]) <= 64),
    "options": _are_options, "int?": _one_of(int, type(None)),
    "numbers": _list_of(_is_number), "names": _list_of(_is_name), "texts": _list_of(_one_of(str)),
    "attempts": _list_of(lambda item: type(item) is tuple and len(item) == 3 and _is_name(item[1])
                         and _is_number(item[0]) and item[0] < BIGGEST // 2),       # the server counts on from there
    "length": lambda field: _is_number(field) and field <= RANGE,
    "positions": lambda field: type(field) is dict and all(
        type(session) is bytes and _is_number(position) for session, position in field.items()),
    "cause": lambda field: type(field) is dict and all(type(what) in (str, int, bool) for what in field.values()),
    "priority": lambda field: isinstance(field, (int, float)) and -BIGGEST < field < BIGGEST,
    "tags": lambda field: type(field) in (list, tuple) and bool(field) and all(type(tag) is str for tag in field),
    "any": _one_of(int, float, bool, str, bytes, list, dict, tuple, type(None)),
}

CATALOGUE: dict[str, tuple[frozenset[str], dict[str, Check]]] = {}     # by kind: who sends it, what each field may be


def _fields(**kinds: Any) -> dict[str, Check]:
    return {name: _CHECKS.get(kind, kind) for name, kind in kinds.items()}


def _record(**kinds: Any) -> Check:
    fields = _fields(**kinds)
    return lambda field: type(field) is dict and all(is_good(field.get(name)) for name, is_good in fields.items())


def _message(kind: str, senders: str, _meaning: str, **kinds: Any) -> None:
    CATALOGUE[kind] = frozenset(senders.split()), _fields(**kinds)


# what a server takes of a job's options; the scheduler makes fields of its Job of them
_OPTIONS_READ = _fields(name=str, priority="priority", retries=int, max_deaths=int, attempts=int, job_timeout=float,
                        max_tasks=int, on="tags", soft=bool, beside=bool, cancel_running=bool)

# joining: the first message of every connection says all that its sender holds; the answer says what to do with it
_message("client", "client", "a client's announcement: who I am, the jobs I wait for",
         info=_record(session=bytes, name=str, max_workers="int?", workers_seen=int), jobs="numbers")
_message("node", "node", "a node's announcement: who I am",
         info=_record(id=bytes, python=str, name=str, host=str, pid=int))
_message("worker", "worker", "what I run, queue and hold, as (token, job, kind)",
         info=_record(id=bytes, node=bytes, node_name=str, slot=int, pid=int, device=str, tags="texts", has="names",
                      positions="positions", returns=bool), attempts="attempts")
_message("welcome", "server", "you are in; info is per role", info=dict)
_message("bye", "client node worker server", "a planned end: nothing of mine is to be kept", reason=str)
_message("beat", "node", "still here (any other byte says the same)")

# a job's life
_message("put", "client server", "an object that jobs will name", name="name", value="value")
_message("drop", "client server", "objects nobody will ask for again", names="names")
_message("submit", "client", "run fn with payload once the session's log is applied up to there",
         number=int, fn="name", payload="value", log=int, options="options")
_message("missing", "server", "jobs that this server does not know: send them again", numbers="numbers")
_message("run", "server", "execute this attempt of a job", token=int, job="name", fn="name", payload="value",
         log=int, options=dict)
_message("started", "worker", "the main thread began this attempt", token=int)
_message("slot", "worker", "this attempt, which waits for others, leaves its slot to them; or (held) has it again",
         token=int, held=bool)
_message("finished", "worker", "this attempt ended; retry: its exception is one that the job wants retried",
         token=int, status=str, value="value", seconds=float, retry=bool)
_message("began", "server", "a worker began this job", number=int, worker=str, attempts=int)
_message("done", "server", "a job's outcome", number=int, status=str, value="any", worker=str, attempts=int)
_message("delivered", "client", "these outcomes have arrived", numbers="numbers")
_message("forget", "server", "the outcomes of these attempts have arrived or are not wanted", tokens="numbers")
_message("resend", "server", "send the outcomes of these attempts again: their client is back", tokens="numbers")
_message("cancel", "client", "these jobs are not wanted any more", numbers="numbers")
_message("recall", "server", "hand back those of these attempts that you have not begun", tokens="numbers")
_message("recalled", "worker", "of those asked for, these never began and never will", asked="numbers", taken="numbers")
_message("retire", "worker node", "a planned exit: give me nothing new; I go when all I hold is delivered", reason=str)
_message("kill", "client server", "end these running attempts by ending their worker (client: numbers of its jobs; "
         "to a node: tokens)", numbers="numbers", reason=str)
_message("died", "node", "this worker process is no more; token: what its cell showed (0: it was idle)",
         worker=bytes, token=int, cause="cause")

# a session's log: what every worker must have run before the session's jobs
_message("log", "client server", "a call, at `position` of its creator's log", position=int, name="name", value="value")
_message("broken", "server", "every worker that tried the session's log is unfit", value="value")
_message("leave", "server", "forget this session: its functions, its log, its globals", session=bytes)

# large values
_message("pull", "client worker server", "send me this range of an object", name="name", offset=int, length="length")
_message("range", "client worker server", "a range; its bytes follow the frame, their SHA-256 is here",
         name="name", offset=int, digest=bytes)
_message("gone", "client worker server", "nobody holds this object", name="name")

# looking and steering
_message("workers", "server", "who is in the pool now", workers=list, credit=int)
_message("ask", "client", "a question, answered under the same number", number=int, what=str)
_message("answer", "server", "its answer", number=int, value="any")


def check_message(message: Any, sender: str) -> None:
    """Raise Malformed unless `message` is one that a peer of role `sender` may send."""
    if type(message) is not tuple or not message or type(message[0]) is not str:
        raise Malformed("a message is a tuple that begins with its kind")
    senders, fields = CATALOGUE.get(message[0]) or (frozenset(), {})
    if sender not in senders:
        raise Malformed(f"a {sender} sends no {message[0]!r}")
    if len(message) - 1 != len(fields):
        raise Malformed(f"{message[0]!r} has {len(fields)} fields, not {len(message) - 1}")
    if sender == "server":      # who has the secret can give workers any code anyway
        return
    for position, is_good in enumerate(fields.values(), 1):
        if not is_good(message[position]):
            raise Malformed(f"{message[0]!r}: {[*fields][position - 1]} is out of range or not what it should be")


def brief(message: Message) -> str:
    """Return a short text of a message for the log: kind, numbers and names, sizes instead of bytes."""
    def show(field: Any) -> str:
        if isinstance(field, tuple) and field and isinstance(field[0], bytes):
            return f"{field[0][:3].hex()}:{field[1]}"
        return f"{type(field).__name__}[{len(field)}]" if isinstance(field, (bytes, list, dict)) else repr(field)
    return f"{message[0]}({', '.join(show(f) for f in message[1:])})"


# ==================================================================================================================
# 3 wire
#
# Secrets, the handshake, and Connection: framed, authenticated messages over one socket. Then Peer: what client,
# worker and node have in common. Nothing here knows what a message means, and the bytes of a user are never opened.
#
# The handshake "MP1", all of fixed size so that nothing is parsed before it is authenticated:
#
#     1  dialer -> server  64 bytes  magic, version, role, Python's minor version, identity, nonce
#     2  server -> dialer  64 bytes  magic, version, role 0, Python's minor version, instance, nonce
#        both: T = SHA-256(label, 1, 2, channel binding);  K = HMAC(secret, role);  PRK = HMAC(K, T)
#        four keys from PRK, one per purpose: proof of dialer, proof of server, frames up, frames down
#     3  dialer -> server  32 bytes  HMAC(proof-of-dialer key, T): the dialer proves first
#     4  server -> dialer  32 bytes  HMAC(proof-of-server key, T, 3), or the constant "refused"
#
# A frame: header (length of control, length of body) | tag (32) | control | body.
#     tag = HMAC-SHA-256(direction's key, sequence number | header | control)
# so nothing can be replayed, reordered, truncated, reflected or spliced. Control is a pickle of builtins, opened by
# an Unpickler that refuses every global, after its tag was verified. A body is one range of a large value; the
# digest in the authenticated control covers it, and its final reader checks that.
# ==================================================================================================================

PROTOCOL = 1
MAGIC = b"minipool"
ROLES = {"server": 0, "client": 1, "node": 2, "worker": 3}      # and their bytes in a hello
REFUSED = hashlib.sha256(b"minipool/1 refused").digest()

_HELLO = struct.Struct("!8sBBB21s32s")      # magic, version, role, Python's minor version, identity, nonce
_FRAME = struct.Struct("!II")

MAX_CONTROL = 8 << 20           # a batch stays far below; the rest is room for one announcement of everything
BATCH_MESSAGES = 256            # with BATCH_BYTES: no step under the scheduler's lock takes more than about 3 ms
BATCH_BYTES = 256 * 1024
BORROWED_FRAMES = 4             # then a borrowed thread passes the writer role on, to get back to its own work
PULLS_IN_FLIGHT = 2             # ranges asked for, over all pulls of a connection: bounds the server's memory
HANDSHAKE_SECONDS = 5.0         # absolute, for the whole handshake
LEAD_SECONDS = 0.05             # until a thread that waits, and reads, sees what it waits for ended by another thread
FOREVER = float("inf")          # a time that never comes

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

KeySource = Callable[[str, bytes, bytes], bytes]            # Secret.role_key, or what gives a worker its one ticket
_hmac = functools.partial(hmac.digest, digest="sha256")     # of key and message
# of a password, with a salt: once per process and server life, never per connection
_stretch = functools.lru_cache(8)(functools.partial(hashlib.scrypt, n=2**15, r=8, p=1, maxmem=64 << 20, dklen=32))


class Secret:
    """What all members of a pool share: `mp1_` and 43 characters, or a password.

    Never in argv, a URL, a log or a repr. Each role has a key derived from it: a proof for one is none for another.
    """

    def __init__(self, text: str, source: str = "") -> None:
        self.text, self.source = text.strip(), source       # and where it was found
        if not self.text:
            raise ValueError("the secret is empty")
        self._is_password = not self.text.startswith("mp1_")        # that is stretched; the others hold 256 random bits
        if not self._is_password and (len(self.text) != 47 or not self.text.isascii()):
            raise ValueError("a secret that begins with mp1_ has 43 more characters; this one was cut or mistyped")

    @classmethod
    def new(cls) -> Secret:
        """Return a fresh secret of 32 random bytes."""
        return cls("mp1_" + secrets.token_urlsafe(32))

    def role_key(self, role: str, instance: bytes, identity: bytes = b"") -> bytes:
        """Return the key of a role; for a worker, the ticket of the worker `identity`, which opens nothing else."""
        text = self.text.encode()
        master = _stretch(text, salt=instance) if self._is_password else text
        key = _hmac(master, b"minipool/1 role " + role.encode())
        return _hmac(key, identity) if role == "worker" else key


class SessionKeys(NamedTuple):
    """What both sides of one connection derive: the proofs of steps 3 and 4, and a key for each direction."""
    dialer_proof: bytes
    server_proof: bytes
    up: bytes
    down: bytes

    @classmethod
    def derive(cls, role_key: bytes, first: bytes, second: bytes, binding: bytes = b"") -> SessionKeys:
        """Derive them from both hellos; `binding` is what a layer below adds, a digest of its certificate."""
        transcript = hashlib.sha256(
            b"minipool/1 transcript" + first + second + bytes([len(binding)]) + binding).digest()
        prk = _hmac(role_key, b"minipool/1 session" + transcript)
        labels = (b"dialer proof", b"server proof", b"up", b"down")
        of_dialer, of_server, up, down = (_hmac(prk, b"minipool/1 " + label + b"\x01") for label in labels)
        dialer_proof = _hmac(of_dialer, transcript)
        return cls(dialer_proof, _hmac(of_server, transcript + dialer_proof), up, down)


def first_hello(role: str, identity: bytes = b"") -> bytes:
    """Return step 1, with the identity of a worker (20 bytes); or step 2, with 5 zeros and the server's instance."""
    return _HELLO.pack(MAGIC, PROTOCOL, ROLES[role], sys.version_info[1], identity.ljust(21, b"\0"),
                       secrets.token_bytes(32))


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while len(data) < size and (more := sock.recv(size - len(data))):
            data += more
    if len(data) < size:
        raise ConnectionError("the connection was closed during the handshake: it may not be a minipool server, or "
                              "one that wants TLS (--tls, tls=True)")
    return data


def handshake(sock: socket.socket, role: str, key: KeySource, identity: bytes = b"",
              binding: bytes = b"") -> tuple[SessionKeys, bytes]:
    """Dial in: run the four steps on a connected socket; return the keys and the server's instance.

    Raises Refused (the secret does not match), VersionMismatch, or ConnectionError (not a minipool server).
    """
    first = first_hello(role, identity)
    sock.sendall(first)
    second = _read_exactly(sock, _HELLO.size)
    magic, version, _role, python, named, _nonce = _HELLO.unpack(second)
    instance = named[5:]
    if magic != MAGIC:
        raise ConnectionError("what answers there is not a minipool server")
    if (version, python) != (PROTOCOL, sys.version_info[1]):
        raise VersionMismatch(f"the server speaks minipool protocol {version}, this side {PROTOCOL}, and runs Python 3."
                              f"{python}, this side {PYTHON}: functions travel as byte code, so all need the same")
    keys = SessionKeys.derive(key(role, instance, identity), first, second, binding)
    sock.sendall(keys.dialer_proof)
    answer = _read_exactly(sock, 32)
    if hmac.compare_digest(answer, keys.server_proof):
        return keys, instance
    if hmac.compare_digest(answer, REFUSED):
        raise Refused("the secret does not match the server's")
    raise ConnectionError("the server could not prove that it knows the secret")


class _BuiltinsOnly(pickle.Unpickler):
    """Opens control messages: any global in them, the way to run code, is refused (as persistent ids are anyway)."""

    def find_class(self, module: str, name: str) -> Any:
        raise Malformed(f"a message names the global {module}.{name}")


def decode_messages(control: bytes, sender: str) -> list[Message]:
    """Open the control part of a frame whose tag has been verified; raise Malformed for anything unexpected."""
    try:
        messages = _BuiltinsOnly(io.BytesIO(control)).load()
    except Exception as error:          # a hostile pickle fails in many ways; all mean the same
        raise Malformed(f"a frame does not open: {error}") from None
    if type(messages) is not list or not messages:
        raise Malformed("a frame holds a list of messages")
    for message in messages:
        check_message(message, sender)
    return messages


_TUNING = (         # what makes latency low and a dead peer noticed; each is optional, as platforms differ
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),             # finds an idle peer that vanished: 5 s + 3 probes
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 2),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 30_000),   # ms; one with data in flight; 2 s cut off live, slow readers
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", 256 * 1024),  # control overtakes ranges in our queue, not below it
)


class Plain:
    """The seam between Connection and the socket: bytes out without blocking, bytes in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(None)                   # the handshake had a deadline
        for level, option, setting in _TUNING:
            with contextlib.suppress(OSError, AttributeError):
                sock.setsockopt(level, getattr(socket, option), setting)

    def send(self, buffers: Sequence[Any]) -> int:
        """Send what fits now, or the first part of it; return how many bytes went, 0 if the kernel's buffer is full."""
        try:
            return self.sock.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive_into(self, view: memoryview) -> int:
        """Block until bytes are there; return how many, or raise EOFError at the end of the stream."""
        count = self.sock.recv_into(view)
        if not count:
            raise EOFError
        return count

    def poll(self, event: int, seconds: float) -> bool:
        """Wait until the socket can be read (select.POLLIN) or written (select.POLLOUT), or is broken."""
        poll = select.poll()
        poll.register(self.sock, event)
        return bool(poll.poll(seconds * 1000))


class Tls(Plain):
    """The same over TLS 1.3. OpenSSL's state is not for two threads: a lock is held round each call, and none waits.

    The certificate needs nobody's word: its digest goes into the handshake, so only who has the secret can vouch for
    it, and a middleman with a certificate of his own ends up with keys that are not ours.
    """
    would_block: tuple[type[OSError], ...] = (BlockingIOError,)     # and two more once `ssl` is imported

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self.sock: ssl.SSLSocket = sock
        self._lock = threading.Lock()           # two calls at once are a deadlock in Python 3.13.6

    def send(self, buffers: Sequence[Any]) -> int:
        try:
            # records of one buffer: who has read a frame to its end holds nothing decrypted that a poll() would miss
            with self._lock:
                return self.sock.send(buffers[0])   # one record; if 0 went it is offered again, as OpenSSL demands
        except Tls.would_block:
            return 0

    def receive_into(self, view: memoryview) -> int:
        while True:
            try:
                with self._lock:
                    return super().receive_into(view)
            except Tls.would_block:
                self.poll(select.POLLIN, 60)


def tls_context(is_server: bool = False) -> ssl.SSLContext:
    """Return the context of who dials, or of a server that has no certificate yet."""
    import ssl  # late: slow to import, and few need it
    Tls.would_block = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE      # the handshake does it: see Tls
    return context


def dial_tls(sock: socket.socket, context: ssl.SSLContext) -> tuple[ssl.SSLSocket, bytes]:
    """Begin TLS as the one who dialled; return the new socket and the digest of the server's certificate."""
    with contextlib.suppress(OSError):      # else its last word and our first wait 40 ms for an acknowledgement
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        encrypted = context.wrap_socket(sock)
    except OSError as error:
        raise ConnectionError(f"no TLS there ({error}): the server may have been started without --tls") from None
    return encrypted, hashlib.sha256(encrypted.getpeercert(binary_form=True) or b"").digest()


def server_tls() -> tuple[ssl.SSLContext, bytes]:
    """Return a server's context and the digest of its certificate, which is made for one life of the server."""
    import tempfile  # late, as is ssl
    context = tls_context(is_server=True)
    context.num_tickets = 0             # nobody resumes a session
    with tempfile.NamedTemporaryFile(prefix="minipool-") as file:   # of key and certificate; for us alone
        try:
            subprocess.run(["openssl", "req", "-x509", "-nodes", "-subj", "/CN=minipool", "-days", "3650",
                            "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                            "-keyout", file.name, "-out", file.name], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"TLS needs the command `openssl` on the server's machine ({error}): install it") from None
        context.load_cert_chain(file.name)
        first = file.read().partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0]
    return context, hashlib.sha256(base64.b64decode(first)).digest()


def _tag(key: hmac.HMAC, number: int, header: bytes, control: bytes) -> bytes:
    """Return the tag of a connection's frame of this number."""
    tag = key.copy()
    tag.update(number.to_bytes(8, "big") + header + control)
    return tag.digest()


class Connection:
    """Framed, authenticated messages over one socket.

    One thread receives. Many threads send: they append to the outbox, and whoever finds the *writer role* free takes
    it under `_lock`. Draining, numbering, tagging and writing happen only while holding the role, so frames
    leave in the order of their numbers; the role is given back under the lock only if the outbox is empty at that
    moment, so nothing is left behind. A borrowed thread never blocks: what the kernel does not take at once is left
    to the connection's writer thread, and with it the role. That thread starts when it is first needed.
    """

    def __init__(self, seam: Plain, send_key: bytes, receive_key: bytes, remote: str) -> None:
        self.remote = remote                    # the other end's role, proven by the handshake
        self.closed = False                     # by either side; written under _lock
        self._seam = seam
        # the outbox and the role; both are looked at together, under _lock
        self._lock = threading.Lock()
        self._control: collections.deque[Message] = collections.deque()
        self._ranges: collections.deque[Message] = collections.deque()      # control messages overtake these
        self._role = threading.Lock()           # the writer role; it passes from thread to thread
        self._writer: threading.Thread | None = None
        self._handed: queue.SimpleQueue[bool] = queue.SimpleQueue()     # True: the role, to the writer; False: the end
        # only for the holder of the writer role
        self._send_key = hmac.new(send_key, digestmod="sha256")     # a copy of it costs less than a key prepared anew
        self._send_number = 0
        self._rest: list[memoryview] = []       # of a frame of which a part was written
        self._fit = BATCH_MESSAGES              # messages that lately filled BATCH_BYTES
        # only for the receiving thread
        self._receive_key = hmac.new(receive_key, digestmod="sha256")
        self._receive_number = 0
        self._scratch = memoryview(mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE))    # its pages cost an idle peer nothing
        self._pending = bytearray()             # received and not yet consumed

    def post(self, messages: Iterable[Message]) -> None:
        """Append messages to the outbox; a later flush() sends them. Cheap enough to call under other locks."""
        # it takes no lock: who gives the writer role back looks once more, or flush() finds the role free
        for message in messages:
            (self._ranges if message[0] == "range" else self._control).append(message)

    def flush(self, frames: int = BORROWED_FRAMES) -> None:
        """Write up to `frames` frames (0: more is coming) of what waits, without blocking; the writer does the rest."""
        with self._lock:
            if self.closed or not (self._control or self._ranges) or not self._role.acquire(blocking=False):
                return
        self._write(frames)

    def start_writer(self) -> None:
        """Start the writer thread; early where it may be needed at interpreter shutdown, when none can start."""
        def write_on() -> None:
            while self._handed.get():       # the role
                self._write(sys.maxsize)
        if self._writer is None:
            self._writer = threading.Thread(target=write_on, name=f"minipool-{self.remote}-writer", daemon=True)
            self._writer.start()

    def _write(self, frames: int) -> None:
        """Write up to `frames` frames; the caller holds the role and has not got it afterwards."""
        try:
            while frames:
                if not (self._rest or self._next_frame()):
                    return
                if not (sent := self._seam.send(self._rest)):
                    break
                while self._rest and sent >= len(self._rest[0]):
                    sent -= len(self._rest.pop(0))
                if sent:
                    self._rest[0] = self._rest[0][sent:]
                frames -= not self._rest
            self.start_writer()
            if threading.current_thread() is self._writer:
                self._seam.poll(select.POLLOUT, 60)     # the kernel takes no more; then it goes on itself
            self._handed.put(True)
        except BaseException as error:      # also a bug, or Ctrl-C: it must not leave a connection that looks alive
            self.close()
            self._rest = []
            with contextlib.suppress(RuntimeError):     # Ctrl-C may come just after the role was given back
                self._role.release()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, OSError):      # a bug, for which the borrowed thread is not to blame: tell the log
                log.exception("writing to the %s failed", self.remote)

    def _next_frame(self) -> bool:
        """Encode the next frame into `_rest`; give the role back if nothing waits, or never will."""
        with self._lock:
            if self.closed or not (self._control or self._ranges):
                self._role.release()
                return False
            body: Any = b""
            if self._control:
                batch = [self._control.popleft() for _ in range(min(self._fit, len(self._control)))]
            else:
                *message, body = self._ranges.popleft()
                batch = [tuple(message)]
        self._encode_frame(batch, body)
        return True

    def _encode_frame(self, batch: list[Message], body: Any) -> None:
        control = pickle.dumps(batch, 5)
        if len(control) > 2 * BATCH_BYTES and len(batch) > 1:      # a sudden run of fat messages
            half = len(batch) // 2
            self._control.extendleft(reversed(batch[half:]))
            return self._encode_frame(batch[:half], body)
        if len(control) > MAX_CONTROL:
            raise ValueError(f"a message of {len(control)} bytes cannot be sent: {brief(batch[0])}")
        if not body:
            self._fit = max(1, min(BATCH_MESSAGES, len(batch) * BATCH_BYTES // len(control)))
        header = _FRAME.pack(len(control), len(body))
        tag = _tag(self._send_key, self._send_number, header, control)
        self._send_number += 1
        self._rest = [memoryview(header + tag + control), *([memoryview(body).cast("B")] if len(body) else ())]

    def receive(self, places: dict[tuple[Name, int], memoryview] | None = None) -> list[Message]:
        """Block for the next frame; return its messages. The body of a range goes to its (name, offset) in `places`.

        Raises EOFError at the end of the stream, OSError if the connection broke, Malformed if no honest peer sends
        such a frame. Lengths are bounded before anything is allocated, a tag is verified before anything is opened.
        """
        prefix = self._take(_FRAME.size + 32)
        header, tag = prefix[:_FRAME.size], prefix[_FRAME.size:]
        control_size, body_size = _FRAME.unpack(header)
        if not 0 < control_size <= MAX_CONTROL or body_size > RANGE:
            raise Malformed("a frame's lengths are out of range")
        control = self._take(control_size)
        if not hmac.compare_digest(tag, _tag(self._receive_key, self._receive_number, header, control)):
            raise Malformed("a frame's tag does not verify")
        self._receive_number += 1
        messages = decode_messages(control, self.remote)
        if not body_size:
            return messages
        if len(messages) != 1 or messages[0][0] != "range":
            raise Malformed("only a range has a body")
        place = (places or {}).get(messages[0][1:3])
        body = place if place and len(place) == body_size else memoryview(bytearray(body_size))
        have = min(body_size, len(self._pending))
        body[:have] = self._take(have)
        while have < body_size:
            have += self._seam.receive_into(body[have:])
        return [(*messages[0], body)]

    def has_input(self, seconds: float) -> bool:
        """Wait up to `seconds` for bytes; True if a receive() would find some."""
        return bool(self._pending) or self._seam.poll(select.POLLIN, seconds)

    def _take(self, size: int) -> bytes:
        """Receive until `size` bytes are there, and consume them."""
        while len(self._pending) < size:
            self._pending += self._scratch[:self._seam.receive_into(self._scratch)]
        taken = bytes(self._pending[:size])
        del self._pending[:size]
        return taken

    @property
    def waiting(self) -> int:
        """Messages and ranges in the outbox, and whether one is being written."""
        return len(self._control) + len(self._ranges) + self._role.locked()

    def close(self) -> None:
        """End the connection; its threads wake. The descriptor goes when nobody can be using it any more."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            with contextlib.suppress(OSError):      # wakes both ends; an SSLSocket's own would go on without TLS
                socket.socket.shutdown(self._seam.sock, socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Close, called by the receiving thread when it has finished: nobody reads from the descriptor any more."""
        self.close()
        # who writes fails at once and gives the role back, unless Ctrl-C hit that thread just when it had taken it
        if self._role.acquire(timeout=HANDSHAKE_SECONDS):
            self._role.release()            # of a closed connection nobody takes it again
        self._seam.sock.close()
        self._handed.put(False)


def parse_address(address: str | None) -> tuple[str, int]:
    """Split "host", "host:port" or "[::1]:port"; None: MINIPOOL_ADDRESS, or this machine. Raises ValueError."""
    if address is None:
        address = os.environ.get("MINIPOOL_ADDRESS") or "127.0.0.1"
    host, port = address.strip(), str(DEFAULT_PORT)
    if host.count(":") == 1 or "]:" in host:
        host, _, port = host.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    with contextlib.suppress(OSError, ValueError):
        if ":" in host:
            socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        if host and 0 < int(port) < 65536:
            return host, int(port)
    raise ValueError(f"{address!r} is not an address: expected host or host:port, and no URL")


def format_address(host: str, port: int) -> str:
    """Return host:port, with brackets round an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


HEAD = 64               # bytes of a memory file before the value: its token, and space so that arrays lie well
MAPPED = 1 << 20        # bytes; below, a copy costs no more than the faults of a mapping, and takes no descriptor
REUSED = 128 << 20      # bytes of the largest memory file that is used again


# memory files that nobody needs any more, and who made them; two, as in a chain of jobs one is being read
_idle: collections.deque[tuple[int, Any]] = collections.deque(maxlen=2)


def _memory_file(size: int) -> Any:
    """Return a memory file to be written: one that was used if it can be had, as fresh pages cost more than a copy."""
    for _ in range(len(_idle) if MAPPED <= size <= REUSED else 0):
        maker, file = _idle.popleft()
        with contextlib.suppress(BlockingIOError):
            if maker == os.getpid():        # else of the process that we are a fork of
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # a reader's lock lives as long as its mapping
                return file
        _idle.append((maker, file))
    return open(os.memfd_create("minipool"), "r+b", buffering=0)


def _is_spare(file: Any) -> bool:
    """Tell whether we may keep a descriptor; given lowest first, its number says how many the program has in use."""
    return bool(file.fileno() < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


class Blob:
    """A large value: a snapshot, read by range without ever being joined.

    Its buffers are copied into a memory file at `place`, from which a process of this host has it (see open_place).
    Where there is none, or none is wanted, only buffers that can be written to are copied.
    """

    def __init__(self, parts: Sequence[Any], share: bool = True) -> None:
        self.parts = [memoryview(part).cast("B") for part in parts]
        self.size = sum(len(part) for part in self.parts)
        self.place = ""
        with contextlib.suppress(OSError, AttributeError, IndexError):      # no descriptor or memory; no Linux; a race
            if share and os.environ.get("MINIPOOL_SHARED_MEMORY") != "0" and _is_spare(file := _memory_file(self.size)):
                token = secrets.token_hex(16)
                file.seek(0)
                for part in (memoryview(token.encode().ljust(HEAD)), *self.parts):
                    while part:         # half the time of a mapping, whose pages would be zeroed first
                        part = part[file.write(part):]
                fcntl.flock(file, fcntl.LOCK_UN)
                self._file, self.parts, self.place = file, [], f"{os.getpid()} {file.fileno()} {token}"
                if MAPPED <= self.size <= REUSED:
                    weakref.finalize(self, _idle.append, (os.getpid(), file))
        if not self.place:
            self.parts = [part if part.readonly else memoryview(bytes(part)) for part in self.parts]

    def read(self, offset: int, length: int) -> Any:
        """Return `length` bytes from `offset` on; a view where they lie in one buffer."""
        if self.place:
            return b"".join(os.pread(self._file.fileno(), min(1 << 30, offset + length - place), HEAD + place)
                            for place in range(offset, offset + length, 1 << 30))      # one call reads 2 GiB at most
        found = []
        for part in self.parts:
            if piece := part[offset:offset + length]:
                found.append(piece)
            length -= len(piece)
            offset = max(0, offset - len(part))
        return found[0] if len(found) == 1 else b"".join(found)


def open_place(place: str, size: int) -> Any:
    """Return the bytes at a Blob's place, to be written to without reaching others; None if they cannot be had."""
    try:
        pid, number, token = place.split()
        path = f"/proc/{int(pid)}/fd/{int(number)}"
        if not os.readlink(path).startswith("/memfd:minipool"):     # looked at before it is opened: it may be a device
            return None
        with open(os.open(path, os.O_NONBLOCK), "rb") as file:      # or by now a pipe
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)        # until the file is closed and unmapped
            # it is the same file if it has the token of the place: no need to compare hosts, or to hash anything
            if file.read(HEAD) != token.encode().ljust(HEAD):
                return None
            if size >= MAPPED and _is_spare(file):
                return memoryview(mmap.mmap(file.fileno(), HEAD + size, access=mmap.ACCESS_COPY))[HEAD:]
            buffer = bytearray(size)
            return buffer if file.readinto(buffer) == size else None
    except (OSError, ValueError):       # of another host, pid namespace or user; or its maker is gone, or forgot it
        return None


class Pull:
    """A large value on its way here: where its bytes go, and which of its ranges are still missing."""

    def __init__(self, size: int, done: Callable[[Any], None]) -> None:
        self.done = done                        # done(buffer), or done(None): nobody holds it
        self.buffer = bytearray(size)
        self.missing = collections.deque(range(0, max(1, size), RANGE))     # offsets; the first are asked for
        self.spoiled: collections.Counter[int] = collections.Counter()  # digests that did not match, by offset


class Peer:
    """What client, worker and node have in common: dial, handshake, announce, send, pull, serve; and dial again.

    The owner gives callbacks: `announce()` returns the messages to open a connection with, `on_batch(messages)`
    gets what arrives, `on_lost()` hears of a lost connection. All run in the I/O thread, `thread`, which the owner
    starts, but `on_batch` also in one that waits, see lead(); no user code does. `lock` is the owner's: a connection
    becomes visible with its announcement under it, so what is done under it is in that or sent after it, never neither.
    """

    def __init__(self, role: str, address: tuple[str, int], key: KeySource, *,
                 lock: threading.Lock | threading.RLock, announce: Callable[[], list[Message]],
                 on_batch: Callable[[list[Message]], None], on_lost: Callable[[], None] = lambda: None,
                 on_idle: Callable[[], bool] = lambda: False, identity: bytes = b"", tls: bool = False) -> None:
        self.role, self.address, self.key, self.identity = role, address, key, identity
        self._tls = tls_context() if tls else None
        self.lock = lock
        self.connection: Connection | None = None           # written by the I/O thread under lock
        self.instance = b""                                 # which life of the server we talk to
        self.trouble: BaseException | None = None           # why there is no connection
        self.lost_at: float | None = time.monotonic()       # since when; None while connected
        self._failures = 0                                  # dials since a connection lasted
        self.values: dict[Name, Blob] = {}                  # large values that others may pull; written under lock
        self._announce, self._on_batch, self._on_lost, self._on_idle = announce, on_batch, on_lost, on_idle
        self._pulls: dict[Name, Pull] = {}                  # guarded by lock, as is
        self._asked: dict[tuple[Name, int], memoryview] = {}    # ranges on their way, (name, offset): where they belong
        self._reading = threading.Lock()                    # held by the thread that reads the socket
        self._leads = 0                                     # how often a thread that waits took that over
        self._stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"minipool-{role}-io", daemon=True)

    def stop(self, *farewell: Message) -> None:
        """Say farewell and end the threads; blocks for at most a second of unsent words."""
        self.send(*farewell)
        connection, give_up = self.connection, time.monotonic() + 1
        while connection and connection.waiting and not connection.closed and time.monotonic() < give_up:
            time.sleep(0.002)
        self._stopping.set()
        with self.lock:                 # so that a connection made meanwhile is seen here, or sees _stopping
            if self.connection:
                self.connection.close()
            self.values.clear()
        _idle.clear()
        if self.thread is not threading.current_thread() and self.thread.ident:
            self.thread.join(HANDSHAKE_SECONDS)

    def send(self, *messages: Message) -> None:
        """Send, or drop what there is no connection for: the next announcement says it again."""
        if connection := self.connection:
            connection.post(messages)
            connection.flush()

    # ---- reading: by the I/O thread, or by a thread that has nothing else to do ----

    def lead(self, is_over: Callable[[], bool], give_up: float = FOREVER) -> None:
        """Read the socket in the calling thread, which waits for something: an answer then costs no hand-over.

        Returns once is_over(), at `give_up`, or without a connection; at once if another thread reads: wait for that.
        """
        connection = self.connection
        if connection is None or not self._reading.acquire(blocking=False):
            return
        try:
            self._leads += 1
            while not (is_over() or connection.closed or (left := give_up - time.monotonic()) <= 0):
                if self._await_input(connection, min(left, LEAD_SECONDS)):
                    self._hear(connection)
        finally:
            self._reading.release()

    def _await_input(self, connection: Connection, seconds: float) -> bool:
        # the owner may hold small words back to ride on the next frame; after a quiet moment they go alone
        while self._on_idle() and not connection.has_input(0.02):
            connection.flush()
        return connection.has_input(seconds)

    def _hear(self, connection: Connection) -> None:
        """Read one frame and act on it; the caller holds `_reading`."""
        try:
            rest = [m for m in connection.receive(self._asked) if not self._handle_range(connection, m)]
            if rest:
                self._on_batch(rest)
        except BaseException as error:      # whatever it is, even Ctrl-C: over the next connection all is settled
            connection.close()
            if not isinstance(error, Exception):
                raise
            self._note(error)

    def _note(self, error: Exception) -> None:
        if not isinstance(error, EOFError):         # else it may have said why
            self.trouble = error
        if not isinstance(error, OSError | EOFError | UnicodeError | MinipoolError):    # UnicodeError: of a host's name
            log.exception("minipool: the %s stumbled", self.role)       # a bug of ours: dial again

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._failures += 1                         # until a connection lasts
            try:
                self._serve(self._dial())
                self.trouble = self.trouble or ConnectionError("the server closed the connection")
            except Exception as error:
                self._note(error)
            self._on_lost()
            if self._failures:      # full jitter: a thousand peers do not return at once; the cap keeps a restart short
                self._stopping.wait(random.uniform(0, min(3.0, 0.1 * 2 ** min(self._failures, 6))))

    def _dial(self) -> Connection:
        """Return an authenticated connection; tries every address of the host, resolved anew each time."""
        sock, binding = socket.create_connection(self.address, timeout=HANDSHAKE_SECONDS), b""
        try:
            if self._tls:
                sock, binding = dial_tls(sock, self._tls)
            keys, self.instance = handshake(sock, self.role, self.key, self.identity, binding)
        except BaseException:
            sock.close()
            raise
        connection = Connection(Tls(sock) if binding else Plain(sock), keys.up, keys.down, "server")
        connection.start_writer()
        return connection

    def _serve(self, connection: Connection) -> None:
        """Announce, then hear until the connection is lost."""
        began = time.monotonic()
        try:
            with self.lock:
                if self._stopping.is_set():
                    return
                connection.post(self._announce())
                self.connection, self.trouble, self.lost_at = connection, None, None
                self._ask_more()            # what was wanted while there was no connection
            connection.flush()
            leads = self._leads
            while not connection.closed:
                if leads != self._leads:            # threads that wait come and go: to wake beside them costs them time
                    leads = self._leads
                    time.sleep(0.002)
                elif self._await_input(connection, 0.5):    # who waits reads faster, and leaves small words to this one
                    with self._reading:
                        if connection.has_input(0):         # else a thread that waits was faster
                            self._hear(connection)
        finally:
            with self.lock:
                self.connection, self.lost_at = None, time.monotonic()
                self._asked.clear()             # what is missing is asked for again
            if self.lost_at > began + 0.2:      # else we, or the server, may say again and again what the other rejects
                self._failures = 0
            connection.close()
            with self._reading:             # nobody else reads from the descriptor any more
                connection.dispose()

    # ---- large values ----

    def share(self, name: Name, data: bytes | Blob) -> Value:
        """Return what a message says of some data: itself if small, else where it is to be had. Under the lock."""
        if not isinstance(data, Blob):
            return data
        self.values[name] = data
        return name, data.size, data.place

    def pull(self, value: tuple[Name, int, str], done: Callable[[Any], None]) -> None:
        """Fetch a large value; `done(buffer)` is called where it arrives, `done(None)` if nobody holds it.

        At once if it lies in this host's memory. The caller is the thread that reads, holds the lock, and flushes.
        """
        name, size, place = value
        if name in self._pulls:
            return
        if (buffer := open_place(place, size)) is not None:
            return done(buffer)
        self._pulls[name] = Pull(size, done)
        self._ask_more()

    def forget_pull(self, name: Name) -> Pull | None:
        """Stop wanting a value. The caller holds the lock."""
        pull = self._pulls.pop(name, None)
        for asked in [asked for asked in self._asked if asked[0] == name]:
            del self._asked[asked]          # the dict stays the one that a receive() looks into
        self._ask_more()
        return pull

    def _ask_more(self, bound: int = PULLS_IN_FLIGHT) -> None:
        """Ask for ranges up to the bound, oldest pull first."""
        for name, pull in self._pulls.items():
            for offset in pull.missing:
                if not self.connection or len(self._asked) >= bound:
                    return
                if (name, offset) not in self._asked:
                    place = self._asked[name, offset] = memoryview(pull.buffer)[offset:offset + RANGE]
                    self.connection.post([("pull", name, offset, len(place))])

    def _handle_range(self, connection: Connection, message: Message) -> bool:
        """Act on a message about large values; return False for any other."""
        if message[0] == "pull":
            _, name, offset, length = message
            blob = self.values.get(name)
            if blob is None or offset + length > blob.size:
                connection.post([("gone", name)])
            else:
                body = blob.read(offset, length)
                connection.post([("range", name, offset, hashlib.sha256(body).digest(), body)])
        elif message[0] == "range":
            self._take_range(connection, *message[1:])
        elif message[0] == "gone":
            with self.lock:
                if pull := self.forget_pull(message[1]):
                    pull.done(None)
        else:
            return False
        connection.flush()
        return True

    def _take_range(self, connection: Connection, name: Name, offset: int, digest: bytes, body: Any = b"") -> None:
        """Check an arrived range; a spoiled one is asked for again, three times, then the value counts as lost."""
        with self.lock:
            if (place := self._asked.get((name, offset))) is None:
                return              # it is not wanted any more
            self._ask_more(PULLS_IN_FLIGHT + 1)
        connection.flush()          # the next one is on its way while this one is checked
        intact = len(body) == len(place) and hashlib.sha256(body).digest() == digest
        with self.lock:             # until now it counts as missing: Ctrl-C may have come before
            self._asked.pop((name, offset), None)
            pull = self._pulls[name]
            if intact:
                pull.missing.remove(offset)
            else:
                pull.spoiled[offset] += 1
            lost = pull.spoiled[offset] > 3
            if not lost and pull.missing:
                return self._ask_more()
            self.forget_pull(name)
        pull.done(None if lost else pull.buffer)


# ==================================================================================================================
# 4 scheduler
#
# A pure state machine: receive(peer, messages, now), disconnected(peer, now) and tick(now) in, messages and closings
# out. No socket, thread, lock, clock, random number, pickle, file or print, so that a race is the order of two calls
# and millions of histories can be simulated. `peer` is any hashable that names a connection; user bytes pass unread.
#
# Records hold data, the Scheduler holds all rules. A Session is a client, whose lease all its things hang on. The
# three entries never call one another; private steps append to the outboxes, only the entries hand them out.
#
#     waiting --> ready --> running --> done | failed | cancelled
#        ^----------^----------'         back when a worker is lost, a job is handed back, or a retry is due
#
# A running job whose worker has finished it is `delivering`: it holds no slot, and is done when its client has it.
# ==================================================================================================================


class State:
    """The states of a job; the same words in code, log, status page and CLI."""
    WAITING, READY, RUNNING, DONE, FAILED, CANCELLED = "waiting", "ready", "running", "done", "failed", "cancelled"


LEGAL = {
    State.WAITING: {State.READY, State.RUNNING, State.FAILED, State.CANCELLED},     # running: adopted after a restart
    State.READY: {State.WAITING, State.RUNNING, State.DONE, State.FAILED, State.CANCELLED},
    State.RUNNING: {State.WAITING, State.READY, State.DONE, State.FAILED, State.CANCELLED},
    State.DONE: set(), State.FAILED: {State.DONE, State.CANCELLED}, State.CANCELLED: set(),
}       # ready -> done: delivered just before its holder was lost; failed -> done: its client has the sentence

T_SUSPECT = 5.0         # seconds without a byte from any connection of a host: it gets no new jobs
T_DEAD = 15.0           # seconds of the same after which the host is dead; `serve --dead-after`
T_GONE = 3.0            # seconds a closed connection may stay away when no node vouches for the process
T_LEASE = 60.0          # seconds that a vanished client's jobs are kept
T_ADOPT = 10.0          # seconds after the server's start in which resent jobs wait to be claimed by workers
T_BEAT = 1.0            # seconds between the heartbeats of a node; a fifth of T_DEAD if that is set to less than 5
T_RECALL = 1.0          # seconds a recall may stay unanswered
T_KILL_AGAIN = 0.1      # seconds between looks at an attempt that is to be killed
T_STALL = 0.05          # seconds without a finished job after which a window is recalled
SHORT = 0.02            # s; shorter jobs are streamed (at 0.005, 10 ms jobs kept workers busy for 0.85 of the time)
WINDOW_SECONDS = 0.02   # of estimated work that may lie in a worker's inbox
WINDOW_JOBS = 256       # at most; so no job is estimated shorter than WINDOW_SECONDS / WINDOW_JOBS
LONG = 1e9              # the estimate of a function not known to be short: nothing else fits beside it
UNACKNOWLEDGED = 16 << 20   # bytes of outcomes on their way to a client; with more, it does not read: its jobs wait
CREDIT_JOBS = 4096      # jobs a session may have at the server; the rest waits at the client, so memory is constant


class Member:
    """What dials the server: a client's Session, a Worker, a Node."""
    grace = T_GONE                                  # seconds that it may stay away

    def __init__(self, id: bytes, name: str = "") -> None:
        self.id, self.name = id, name
        self.peer: Any = None                       # its connection
        self.lost_at = FOREVER                      # when it lost that; FOREVER while it has one, and after its end
        self.asked: dict[tuple[Name, int, int], list[Any]] = {}     # ranges asked of it, and by which peers


class Node(Member):
    """A host's supervisor: it owns death, and vouches for its workers."""

    def __init__(self, id: bytes, name: str, now: float) -> None:
        super().__init__(id, name)
        self.heard_at = now                         # a byte from any connection of the host
        self.is_suspect = False                     # none for T_SUSPECT
        self.workers: dict[bytes, Worker] = {}
        self.info: dict[str, Any] = {}


class Selection:
    """The workers that have a tag, or all, sorted by room, so that dispatch finds one without a search."""

    def __init__(self) -> None:
        self.members: set[Worker] = set()
        self.idle: dict[Worker, None] = {}      # nothing in the inbox
        self.roomy: dict[Worker, None] = {}     # room for another short job; used in turn


class Worker(Member):
    """One process, one device."""

    def __init__(self, node: Node, info: dict[str, Any]) -> None:
        super().__init__(info["id"], f"{node.name}-{info['slot']}")
        self.node, self.device, self.pid = node, info["device"], info["pid"]
        self.tags = sorted({self.name, node.name, *info["tags"]})       # all that `on` can name
        # what clients and the status page are told of it
        self.told = {"name": self.name, "node": node.name, "device": self.device, "pid": self.pid, "tags": self.tags}
        self.returns: bool = info["returns"]        # it was in the pool of an earlier server
        self.finished = 0
        self.inbox: dict[int, Job | None] = {}      # attempts it has, oldest first; None: one that nobody wants
        self.beside: dict[int, Job | None] = {}     # attempts that take no room
        self.delivering: dict[int, Job] = {}        # outcomes it keeps for clients
        self.load = 0.0                             # estimated seconds of work in the inbox
        self.moved_at = 0.0                         # when it last finished something
        self.selections: list[Selection] = []       # that have it as a member: of its tags, and of all
        self.has: set[Name] = set()                 # objects it was sent
        self.positions: dict[bytes, int] = {}       # how much it was sent of the log of each session that it knows
        self.unfit: dict[bytes, Value] = {}         # sessions whose log raised there, and what
        self.acks: list[int] = []                   # outcomes it may forget; they ride on the next run
        self.recalled: list[int] = []               # asked back, not answered yet
        self.watched = False                        # a timer looks after its window


class Session(Member):
    """A client: what it sent, and how long it is waited for."""
    grace = T_LEASE

    def __init__(self, id: bytes) -> None:
        super().__init__(id)
        self.limit: int | None = None               # max_workers
        self.jobs: dict[int, Job] = {}              # all whose outcome it has not said to have
        self.objects: dict[Name, Value] = {}        # functions
        self.log: list[tuple[Name, Value]] = []
        self.workers: dict[Worker, int] = {}        # how many attempts each worker has of it
        self.load = 0                               # their sum
        self.latest: Worker | None = None           # who last finished something of it
        self.unacknowledged = 0                     # bytes of outcomes that it has not said to have
        self.broken: Value | None = None            # the exception that broke it
        self.estimates: dict[Name, float] = {}      # seconds, of functions that measure short


class Job:
    """One call: what to run, where it stands, and who has it."""
    # what to run; without a payload: a worker or an announcement told of this job, its client has still to send it
    fn: Name = (b"", 0)
    payload: Value | None = None
    options: dict[str, Any] = {}
    # those of them that are read here
    name = ""
    priority: float = 0
    on: Sequence[str] | None = None
    soft = False                    # `on` is a preference
    retries, max_deaths = 0, 3
    job_timeout: float | None = None    # seconds that it may run
    cancel_running = False          # who cancels it wants its worker's process ended
    beside = False                  # it runs on the worker named by `on`, at once, whatever else runs there
    attempts = 0                    # at first as its client says: it counts them in what it sends again
    # where it stands
    state = State.WAITING
    token = 0                       # of the current attempt; 0: none yet
    worker: Worker | None = None    # who runs it, or holds its outcome
    estimate = LONG                 # seconds that it is taken for; LONG unless its function measures short
    deaths = 0
    delivering = False              # finished, and its client has not said that it has the outcome
    size = 0                        # of the outcome, as far as it rides in messages
    begun = False                   # the worker said that user code runs
    killed: tuple[str, str] | None = None       # status and reason, once its end by force was asked for
    verdict: tuple[Any, ...] | None = None      # the outcome of a job that failed without a worker's word
    history: tuple[str, ...] = ()   # the last states, for story()

    def __init__(self, session: Session, number: int, sequence: int) -> None:
        self.session, self.number = session, number
        self.sequence = sequence    # order of arrival: ties of priority, and the way back to the front
        self.log = 0                # how much of the session's log must have run before


Key = tuple[Session, Sequence[str] | None, bool]     # what the jobs of a queue share: session, `on`, soft
Actions = collections.namedtuple("Actions", "sends closes")     # what the shell must do: messages by peer, connections


class Scheduler:
    """Who is there, what is queued, who runs what: all rules, no I/O."""

    def __init__(self, now: float, first_token: int, max_value: int = 64 << 30, dead_after: float = T_DEAD) -> None:
        self.sessions: dict[bytes, Session] = {}
        self.workers: dict[bytes, Worker] = {}
        self.nodes: dict[bytes, Node] = {}
        self.max_value, self.dead_after, self.beat = max_value, dead_after, min(T_BEAT, dead_after / 5)
        self.is_paused = False          # nothing is handed out: the server is about to stop
        self.about: dict[str, Any] = {}     # what the shell knows: address and such, for the snapshot
        self.counters: collections.Counter[str] = collections.Counter()     # lifetime: accepted, delivered, ...
        self._peers: dict[Any, Member | None] = {}      # None: superseded or given up, what it says is ignored
        self._token = first_token       # the server's start in microseconds: later lives never repeat one
        self._order = itertools.count()                 # of arrival: it breaks ties of jobs, and of timers
        self._queues: dict[Key, list[tuple[float, int, Job]]] = {}      # heaps of ready jobs, and of some ready no more
        self._selections = collections.defaultdict[str | None, Selection](Selection)        # by tag; None: all
        self._adopting = now + self.beat                # so long only those count who were in before; 0: it is over
        self._dead: dict[bytes, bytes] = {}             # newest process of each slot that is known to be dead
        self._leaving: dict[Worker, None] = {}          # draining: they go when they hold nothing any more
        self._expected_workers = 0                      # as many as any returning client last saw
        self._timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._entered_at = now
        self._sends: dict[Any, list[Message]] = collections.defaultdict(list)
        self._closes: list[Any] = []
        # the method that takes a message is named after it: "submit" goes to _submit
        self._handlers = {k: getattr(self, f"_{k}") for k, (senders, _) in CATALOGUE.items() if senders - {"server"}}
        self._arm(self._adopting, self._end_adoption, False)
        self._arm(now + T_ADOPT, self._end_adoption, True)

    # ---- the three ways in ----

    def receive(self, peer: Any, messages: list[Message], now: float) -> Actions:
        """Advance on a batch of messages from one peer; return what the server must do."""
        self._enter(now)
        known = self._peers.get(peer, peer)     # itself: a newcomer
        for message in messages:
            if (message[0] in ROLES) != (known is peer):
                raise Malformed("the first message, and no other, is an announcement")
            if known is None:
                break
            self._handlers[message[0]](known, now, *message[1:])
            known = self._peers.get(peer)
        if isinstance(known, Worker | Node):        # any byte from a host is its heartbeat
            self._beat(known.node if isinstance(known, Worker) else known, now)
        if isinstance(known, Worker):       # once for all that it has said
            self._refresh(known)
        return self._take_actions(now)

    def disconnected(self, peer: Any, now: float) -> Actions:
        """Advance on the loss of a connection. What hung on it is kept for a grace: losing one is harmless."""
        self._enter(now)
        if member := self._peers.pop(peer, None):
            member.peer = None
            self._await(member, now)
            if isinstance(member, Worker):
                self._refresh(member)
                self._tell_workers(self.sessions.values())
        return self._take_actions(now)

    def tick(self, now: float) -> Actions:
        """Advance on time alone; call it when `deadline` has come."""
        self._enter(now)
        while self._timers and self._timers[0][0] <= now:
            _, _, step, (about, *rest) = heapq.heappop(self._timers)
            step(about, now, *rest)
        return self._take_actions(now)

    @property
    def deadline(self) -> float:
        """When tick() is due; FOREVER: not before something happens."""
        return self._timers[0][0] if self._timers else FOREVER

    def _beat(self, node: Node, now: float) -> None:
        node.heard_at = now

    def _enter(self, now: float) -> None:
        """Note the time; whoever enters first after we were stopped or starved excuses all hosts: not their fault."""
        if now - self._entered_at > 2 * self.beat:
            for node in self.nodes.values():
                self._beat(node, now)
        self._entered_at = max(now, self._entered_at)

    def _take_actions(self, now: float) -> Actions:
        self._dispatch(now)
        actions = Actions(self._sends, self._closes)
        self._sends, self._closes = collections.defaultdict(list), []
        return actions

    def _send(self, peer: Any, message: Message) -> None:
        if peer is not None and message[-1] != []:      # an empty list is not worth a message
            self._sends[peer].append(message)

    def _arm(self, when: float, step: Callable[..., None], *about: Any) -> None:
        """Call step(about, now, ...) at `when`; a step checks for itself whether it still has a reason."""
        # it compares `now` with the very sum it was armed with: (a + b) - a can be less than b
        heapq.heappush(self._timers, (when, next(self._order), step, about))

    def _move(self, job: Job, state: str) -> None:
        """Change a job's state, if the table allows it."""
        if state not in LEGAL[job.state]:
            raise AssertionError(f"job {job.number} cannot go from {job.state} to {state}: {self.story(job)}")
        job.state = state
        job.history = (*job.history[-11:], state)

    # ---- joining: one announcement for joining, reconnecting and the restart of the server ----

    def _client(self, peer: Any, now: float, info: dict[str, Any], jobs: list[int]) -> None:
        """Admit a client, and reconcile: what it does not list it does not want, what we do not know it sends."""
        session = self._session(info["session"], now)
        held = dict.fromkeys(jobs if session.broken is None else ())     # a broken session has no jobs any more
        session.name, session.limit = info["name"], info.get("max_workers")
        self._expected_workers = max(self._expected_workers, info["workers_seen"])
        self._admit(session, peer, {"log": len(session.log), "max_value": self.max_value})
        self._tell_workers([session])
        self._release(session, now, [n for n in session.jobs if n not in held])
        for number in held:
            job = session.jobs.get(number) or self._new_job(session, number)
            if job.verdict:                 # what the old connection may have lost on its way to the client
                self._send(peer, ("done", number, *job.verdict))
            elif job.delivering and job.worker:
                self._send(job.worker.peer, ("resend", [job.token]))
            elif job.begun and job.worker:
                self._send(peer, ("began", number, job.worker.name, job.attempts))
        self._send(peer, ("missing", [n for n in held if session.jobs[n].payload is None]))
        if session.broken is not None:
            self._send(peer, ("broken", session.broken))
        self._end_adoption(False, now)

    def _session(self, id: bytes, now: float) -> Session:
        """Return a session; one that only a worker tells of, after a restart, has its lease to come back."""
        if id not in self.sessions:
            self.sessions[id] = Session(id)
            self._await(self.sessions[id], now)
        return self.sessions[id]

    def _new_job(self, session: Session, number: int) -> Job:
        self.counters["accepted"] += 1
        session.jobs[number] = job = Job(session, number, next(self._order))
        return job

    def _node(self, peer: Any, now: float, info: dict[str, Any]) -> None:
        """Admit a node; a name that another host has gets a suffix."""
        node = self.nodes.get(info["id"]) or self._new_node(info["id"], info["name"], now)
        node.info = {name: info[name] for name in ("host", "pid", "python")}
        self._admit(node, peer, {"name": node.name, "beat": self.beat})

    def _new_node(self, id: bytes, name: str, now: float) -> Node:
        taken = {node.name for node in self.nodes.values()}
        names = itertools.chain([name or "node"], (f"{name}~{i}" for i in itertools.count(2)))
        node = self.nodes[id] = Node(id, next(name for name in names if name not in taken), now)
        self._await(node, now)
        self._arm(now + self.beat, self._watch_host, node)
        return node

    def _worker(self, peer: Any, now: float, info: dict[str, Any], attempts: list[Any]) -> None:
        """Admit a worker, and reconcile its attempts with ours by set difference."""
        # after a restart of the server a worker may be back before its node
        node = self.nodes.get(info["node"]) or self._new_node(info["node"], info["node_name"], now)
        worker = self.workers.get(info["id"])
        slot = info["id"][:16]                      # what follows says which process of it: later ones are larger
        if worker is None and info["id"] <= self._dead.get(slot, b""):
            self._peers[peer] = None                # its last words, read after its death was told
            return self._closes.append(peer)
        if worker is None:
            for older in [id for id in node.workers if id[:16] == slot and id < info["id"]]:
                self._died(node, now, older, None, {"what": "was replaced by a newer process"})
            worker = self.workers[info["id"]] = node.workers[info["id"]] = Worker(node, info)
            worker.selections = [self._selections[tag] for tag in (None, *worker.tags)]
            for selection in worker.selections:
                selection.members.add(worker)
        worker.has, worker.recalled, worker.acks = set(info["has"]), [], []
        # of a session that it does not list it may have functions all the same: it is told when that one leaves
        worker.positions = {**dict.fromkeys(worker.positions, 0), **info["positions"]}
        for session_id in worker.positions:
            self._session(session_id, now)
        self._admit(worker, peer, {"name": worker.name, "node_name": node.name, "max_value": self.max_value})
        self._reconcile(worker, {token: (name, kind) for token, name, kind in attempts}, now)
        self._guard_window(worker, now)
        self._tell_workers(self.sessions.values())
        self._end_adoption(False, now)

    def _admit(self, member: Member, peer: Any, welcome: dict[str, Any]) -> None:
        """Make `peer` the connection of `member`. What it was asked over an older one it is asked again."""
        self._detach(member)
        member.peer = peer
        self._peers[peer] = member
        self._send(peer, ("welcome", welcome))
        for name, offset, length in member.asked:
            self._send(peer, ("pull", name, offset, length))

    def _detach(self, member: Member) -> None:
        """Close the connection of a member, if it has one; what still comes over it is ignored."""
        member.lost_at = FOREVER
        if member.peer is not None:
            self._peers[member.peer] = None
            self._closes.append(member.peer)
            member.peer = None

    def _await(self, member: Member, now: float) -> None:
        """Give a member without a connection its grace to come back."""
        member.lost_at = now
        self._arm(now + member.grace, self._give_up, member)

    def _reconcile(self, worker: Worker, listed: dict[int, tuple[Name, str]], now: float) -> None:
        """Settle what a worker holds: assigned but unlisted goes back, listed but unassigned is adopted or dropped."""
        held = {**worker.inbox, **worker.beside, **worker.delivering}
        self._take_back(worker, [token for token, job in held.items() if token not in listed or (
            job is not None and listed[token][0] != (job.session.id, job.number))], now)
        for token, (name, kind) in listed.items():
            self._token = max(self._token, token)
            session = self._session(name[0], now)
            job = session.jobs.get(name[1])
            if kind != "inbox" and job is None and session.peer is None:
                job = self._new_job(session, name[1])       # its client is not back yet
            if kind != "inbox" and job is not None and job.state == State.WAITING:
                self._unassign(worker, token)       # as an attempt that nobody wanted
                job.attempts = max(1, job.attempts)         # its client may have counted this one
                job.estimate, job.beside = LONG, job.beside or kind == "beside"
                self._place(job, worker, token)     # it survived the server: the job is not run again
                if job.killed:
                    self._kill_attempt(worker, now, token)
            if kind in ("begun", "parked"):     # the old connection may have lost the word
                self._slot(worker, now, token, kind == "begun")
            if self._current(worker, token) is None:
                self._unassign(worker, token)
                if kind in ("begun", "parked"):     # what comes of it is stale: the slot is wanted for others
                    (worker.inbox if kind == "begun" else worker.beside)[token] = None
                    self._kill_attempt(worker, now, token)
                else:
                    worker.acks.append(token)
            elif kind != "inbox":       # an outcome follows, by the usual way: it may be one that wants a retry
                self._started(worker, now, token)       # the old connection may have lost the word
        worker.load = sum(job.estimate if job else LONG for job in worker.inbox.values())
        self._send_acks(worker)

    def _end_adoption(self, is_due: bool, now: float) -> None:
        """Once all workers are back that clients knew, or it is due: jobs sent again that none claims run anew."""
        connected = sum(w.peer is not None and (w.returns or now >= self._adopting) for w in self.workers.values())
        if not self._adopting or not (is_due or 0 < self._expected_workers <= connected):
            return
        self._adopting = 0.0
        for session in self.sessions.values():
            for job in session.jobs.values():
                if job.state == State.WAITING and job.payload is not None:
                    self._run_anew(job, now)

    # ---- jobs ----

    def _put(self, session: Session, now: float, name: Name, value: Value) -> None:
        if name[0] == session.id:       # who names what is another's is not heard
            session.objects[name] = value

    def _drop(self, session: Session, now: float, names: list[Any]) -> None:
        """Forget objects that nobody will ask for again, here and in the workers."""
        names = [name for name in names if name[0] == session.id]
        for name in names:
            session.objects.pop(name, None)
            session.estimates.pop(name, None)
        for worker in self.workers.values():
            if had := [name for name in names if name in worker.has]:
                worker.has.difference_update(had)
                self._send(worker.peer, ("drop", had))

    def _submit(self, session: Session, now: float, number: int, fn: Name, payload: Value, log: int,
                options: dict[str, Any] | None) -> None:
        """Take a job, or what was missing of one that a worker told of. The same job sent twice is one job."""
        job = session.jobs.get(number)
        if (job is not None and job.payload is not None) or session.broken is not None:
            return              # of a broken session the client was told, and fails its futures
        job = job or self._new_job(session, number)
        job.fn, job.payload, job.log, job.options = fn, payload, log, options or {}
        for option, setting in job.options.items():
            setattr(job, option, setting)
        job.deaths = min(job.deaths, job.max_deaths + 1)        # it may have died before its client told how often
        if job.begun and job.job_timeout is not None:   # its limit was not known then
            self._arm(now + job.job_timeout, self._time_out, job, job.token)
        if job.state == State.WAITING and not (self._adopting and "attempts" in job.options):   # it may be claimed
            self._run_anew(job, now)

    def _run_anew(self, job: Job, now: float) -> None:
        """No worker claims it: it is new, or was lost; what may begin only once does not begin a second time."""
        if job.attempts and not job.max_deaths:
            job.deaths = 1
        self._put_back(job, now, cause={"what": "was lost while the server was away"})

    def _take_back(self, worker: Worker, tokens: Iterable[int], now: float) -> None:
        """Return attempts that a worker has not begun to the queue, uncharged."""
        for token in tokens:
            job = self._current(worker, token)
            self._unassign(worker, token)
            if job is not None:
                job.attempts -= 1           # it never began
                self._put_back(job, now)

    def _put_back(self, job: Job, now: float, charged: bool = False, cause: dict[str, Any] | None = None) -> None:
        """Put a job into the queue, or back; a charge counts, and beyond max_deaths it is the end, as is a kill."""
        job.deaths += charged
        there = next((w for s in self._admitting(job) for w in s.members), None) if job.beside else None
        if job.killed or job.deaths > job.max_deaths or (job.beside and (not there or job.worker not in (None, there))):
            return self._fail(job, cause or {"what": "is not there"})
        job.worker, job.delivering, job.begun = None, False, False
        self._move(job, State.READY if job.payload is not None else State.WAITING)
        if there:
            return self._assign(job, there, now)
        if job.payload is not None:         # else it waits until its client has sent it
            heap = self._queues.setdefault((job.session, job.on and tuple(job.on), job.soft), [])
            heapq.heappush(heap, (-job.priority, job.sequence, job))

    def _fail(self, job: Job, cause: dict[str, Any]) -> None:
        """End a job without a worker's word; the verdict is kept until its client has it."""
        self._move(job, State.FAILED)
        job.delivering = False
        worker = job.worker
        status, reason = job.killed or (DIED, "")
        evidence = {**cause, "job": job.name, "attempts": job.attempts, "deaths": job.deaths, "reason": reason}
        if worker is not None:
            evidence.update(worker=worker.name, node=worker.node.name, device=worker.device)
        job.verdict = (status, evidence, worker.name if worker else "", job.attempts)
        self._send(job.session.peer, ("done", job.number, *job.verdict))

    @staticmethod
    def _current(worker: Worker, token: int) -> Job | None:
        """The fence: return the job of a worker's attempt if that is the one that counts; every other is stale."""
        job = worker.inbox.get(token) or worker.delivering.get(token) or worker.beside.get(token)
        return job if job is not None and job.state == State.RUNNING else None

    def _started(self, worker: Worker, now: float, token: int) -> None:
        job = self._current(worker, token)
        if job and not (job.begun or job.delivering):
            job.begun = True
            self._send(job.session.peer, ("began", job.number, worker.name, job.attempts))
            if job.job_timeout is not None:
                self._arm(now + job.job_timeout, self._time_out, job, token)

    def _time_out(self, job: Job, now: float, token: int) -> None:
        """A job has run for its job_timeout, unless that attempt is over."""
        if job.token == token and job.state == State.RUNNING:
            reason = f"it ran longer than its job_timeout of {job.job_timeout:g} s"
            self._kill(job.session, now, [job.number], reason, TIMED_OUT)

    def _finished(self, worker: Worker, now: float, token: int, status: str, value: Value, seconds: float,
                  retry: bool) -> None:
        """Take an outcome, if the attempt is current; a stale one is dropped here, in this one place."""
        job = self._current(worker, token)
        if token in worker.inbox:
            worker.moved_at = now
        worker.finished += token in worker.inbox or token in worker.beside
        if job is not None and status == UNFIT:     # the session's log raised there: it gets no more of that session
            worker.unfit.setdefault(job.session.id, value)
            self._take_back(worker, [token], now)
            self._judge_fitness(job.session, now, [w for w in self.workers.values() if job.session.id in w.positions])
        self._unassign(worker, token)
        if worker in self._leaving:     # what came while a job there waited for others may never begin there
            self._retire(worker, now, "")
        if job is None or status == UNFIT:
            return self._forget(worker, token)
        session = job.session
        old = session.estimates.pop(job.fn, seconds)        # one sent again counts again: they tend to what is true
        estimate = max(old + (seconds - old) / 4, WINDOW_SECONDS / WINDOW_JOBS)
        if estimate < SHORT and seconds <= 2 * SHORT:       # one long sample ends the streaming of a function
            session.estimates[job.fn] = estimate
        if status == AGAIN or (status == RAISED and retry and (job.retries > 0 or job.payload is None)):
            job.retries -= status == RAISED
            job.sequence = next(self._order) if status == AGAIN else job.sequence   # behind those that are there
            self._forget(worker, token)
            return self._put_back(job, now)
        job.delivering, job.size = True, len(value) if isinstance(value, bytes) else 0
        session.unacknowledged += job.size
        session.latest = worker
        worker.delivering[token] = job
        self._send(session.peer, ("done", job.number, status, value, worker.name, job.attempts))

    def _release(self, session: Session, now: float, numbers: list[int], state: str = State.DONE) -> None:
        """Forget jobs: their client has the outcomes, or does not want them, or is no more."""
        for job in [session.jobs.pop(number) for number in numbers if number in session.jobs]:
            # what had not finished was not delivered: its client lists it no more
            ended = job.delivering or job.verdict or job.state == State.READY
            end = state if ended else State.CANCELLED
            self.counters["delivered" if end == State.DONE else "cancelled"] += 1
            if job.delivering and job.worker:
                self._unassign(job.worker, job.token)
                self._forget(job.worker, job.token)
            elif job.worker and job.state == State.RUNNING:     # it keeps the slot until the worker answers
                if job.cancel_running or session.id not in self.sessions:
                    job.killed = KILLED, "nobody wants its outcome any more"
                self._kill_attempt(job.worker, now, job.token)
            self._move(job, end)
        for (owner, _, _), heap in self._queues.items():
            if owner is session and len(heap) > 64 + 2 * len(session.jobs):     # most of it is dead: sweep
                heap[:] = [entry for entry in heap if entry[2].state == State.READY]
                heapq.heapify(heap)

    _delivered, _cancel = _release, functools.partialmethod(_release, state=State.CANCELLED)

    def _forget(self, worker: Worker, token: int) -> None:
        """Let a worker forget an outcome; the word rides on its next run, or goes now if it has nothing to do."""
        worker.acks.append(token)
        if not worker.inbox or len(worker.acks) >= 64:
            self._send_acks(worker)

    def _send_acks(self, worker: Worker) -> None:
        if worker.acks:
            self._send(worker.peer, ("forget", worker.acks))
            worker.acks = []

    # ---- dispatch: heads of classes, in the order of priority, fairness, arrival ----

    def _dispatch(self, now: float) -> None:
        """Hand out ready jobs while there is room for them; let those go that wait to go."""
        for idler in [w for w in self._leaving if not (w.inbox or w.beside or w.delivering)]:
            self._send(idler.peer, ("bye", "nothing is left to do or to deliver"))
            self._end(idler, now, {"what": "left", "planned": True})
        everybody = self._selections[None]
        if not (everybody.idle or everybody.roomy):
            return
        turns = sorted(filter(None, map(self._turn, list(self._queues))))
        while turns and (everybody.idle or everybody.roomy):
            _, load, _, key = heapq.heappop(turns)
            heap = self._queues[key]
            job = heap[0][2]
            if load == job.session.load:            # else its session was given something meanwhile: not its turn yet
                worker = self._room_for(job)
                if worker is None:
                    continue                        # nor will there be: within a pass room only shrinks
                heapq.heappop(heap)
                self._assign(job, worker, now)
            if turn := self._turn(key):
                heapq.heappush(turns, turn)

    def _turn(self, key: Key) -> tuple[float, int, int, Key] | None:
        """Return the rank of a queue: priority, load of its session (least first), arrival. An empty queue goes."""
        heap, session = self._queues[key], key[0]
        while heap and heap[0][2].state != State.READY:
            heapq.heappop(heap)
        if heap:
            return heap[0][0], session.load, heap[0][1], key
        del self._queues[key]
        return None

    def _room_for(self, job: Job) -> Worker | None:
        """Settle what a job is taken for, and return the worker that should take it now; None if none has room."""
        session, selections = job.session, self._admitting(job)
        if self.is_paused or session.unacknowledged > UNACKNOWLEDGED:
            return None
        is_suspect = job.deaths or not job.max_deaths       # it runs alone, so that no second charge can be wrong
        job.estimate = LONG if is_suspect else session.estimates.get(job.fn, LONG)
        idle = [selection.idle for selection in selections]
        rooms = idle + [selection.roomy for selection in selections if job.estimate < LONG]
        candidates: Iterable[Worker] = itertools.chain(*rooms)
        if session.limit is not None and len(session.workers) >= session.limit:
            candidates = [w for w in session.workers if any(w in room for room in rooms)]       # its own
        elif (latest := session.latest) and any(latest in room for room in idle):
            candidates = itertools.chain([latest], candidates)      # it is warm, and may forget in the same frame
        for worker in candidates:       # one that leaves takes only what its own jobs submitted, which may wait for it
            if session.id not in worker.unfit and (worker not in self._leaving or session.id.startswith(worker.id)):
                return worker
        return None

    def _assign(self, job: Job, worker: Worker, now: float) -> None:
        """Begin an attempt: everything the worker lacks goes before the run, in the same frame."""
        self._token += 1
        if not worker.inbox:
            worker.moved_at = now
        job.attempts += 1
        self._place(job, worker, self._token)
        self._refresh(worker)
        session = job.session
        position = worker.positions.setdefault(session.id, 0)
        for name, value in session.log[position:job.log]:
            self._send(worker.peer, ("log", position, name, value))
            worker.positions[session.id] = position = position + 1
        if job.fn not in worker.has and job.fn in session.objects:
            worker.has.add(job.fn)
            self._send(worker.peer, ("put", job.fn, session.objects[job.fn]))
        self._send_acks(worker)
        options = job.options       # as they came: of many jobs they are one object, which a batch holds once
        if job.attempts > 1:
            options = {**options, "attempt": job.attempts}
        if job.estimate >= LONG or job.job_timeout is not None:
            options = {**options, "say": True}      # tell when it begins; a short one is over before anybody asks
        self._send(worker.peer, ("run", job.token, (session.id, job.number), job.fn, job.payload, job.log, options))
        self._guard_window(worker, now)

    def _place(self, job: Job, worker: Worker, token: int) -> None:
        """Put an attempt into a worker's inbox, or beside it."""
        self._move(job, State.RUNNING)
        job.token, job.worker = token, worker
        if job.beside:
            worker.beside[token] = job
            return
        worker.inbox[token] = job
        worker.load += job.estimate
        session = job.session
        session.load += 1
        session.workers[worker] = session.workers.pop(worker, 0) + 1    # at the end, so that they are used in turn

    def _slot(self, worker: Worker, now: float, token: int, held: bool) -> None:
        """A job that waits for others leaves its slot to them, and goes on beside them until it has one again."""
        if token in (worker.beside if held else worker.inbox):
            self._started(worker, now, token)
            if held:        # it goes before what came meanwhile
                worker.inbox = {token: worker.beside.pop(token), **worker.inbox}
                if len(worker.inbox) > 1 and not worker.recalled:
                    self._recall(worker, now)
            else:
                worker.beside[token] = worker.inbox.pop(token)
            worker.load = LONG if worker.inbox else 0.0         # nothing joins what is there

    def _unassign(self, worker: Worker, token: int) -> None:
        """Take an attempt out of a worker's inbox or shelf, or from beside them."""
        was_inside = token in worker.inbox
        job = worker.inbox.pop(token, None) or worker.beside.pop(token, None)
        if was_inside:
            worker.load = worker.load - (job.estimate if job else LONG) if worker.inbox else 0.0
            if not worker.inbox:
                self._send_acks(worker)
        if job is not None and (was_inside or not job.beside):
            session = job.session
            session.load -= 1
            session.workers[worker] -= 1
            if not session.workers[worker]:
                del session.workers[worker]
        if job := worker.delivering.pop(token, None):
            job.session.unacknowledged -= job.size

    # ---- room, windows, recall ----

    def _admitting(self, job: Job) -> list[Selection]:
        """Return the selections of the workers that a job's `on` admits; of all, if it has none, or a vain wish."""
        found = [self._selections[tag] for tag in job.on or () if tag in self._selections]
        return found if job.on and not (job.soft and not found) else [self._selections[None]]

    def _refresh(self, worker: Worker) -> None:
        """Sort a worker by its room; it moves to the end, so that equals are used in turn."""
        able = self._is_able(worker)
        idle = able and not worker.inbox
        roomy = able and not idle and worker.load < WINDOW_SECONDS
        for selection in worker.selections:
            selection.idle.pop(worker, None)
            selection.roomy.pop(worker, None)
            if idle:
                selection.idle[worker] = None
            elif roomy:
                selection.roomy[worker] = None

    def _is_able(self, worker: Worker) -> bool:
        is_leaving = worker in self._leaving and not any(job and not job.beside for job in worker.beside.values())
        return not (worker.peer is None or is_leaving or worker.recalled or worker.node.is_suspect)

    def _guard_window(self, worker: Worker, since: float) -> None:
        if not worker.watched:
            worker.watched = True
            self._arm(since + T_STALL, self._watch_window, worker)

    def _watch_window(self, worker: Worker, now: float) -> None:
        """A window that does not move holds a job that is not short: ask back what has not begun."""
        worker.watched = False
        # a lone job is asked about too if it was not to tell when it begins: the answer tells
        quiet = [job for job in worker.inbox.values() if job is not None and job.estimate < LONG and not job.begun]
        if worker.recalled or not (quiet or len(worker.inbox) > 1):
            return
        if now >= worker.moved_at + T_STALL:
            self._recall(worker, now)
        else:
            self._guard_window(worker, worker.moved_at)

    def _recall(self, worker: Worker, now: float) -> None:
        """Ask for all that has not begun. A question: only the worker knows, so the jobs stay assigned."""
        worker.recalled = list(worker.inbox)
        for job in filter(None, worker.inbox.values()):
            job.session.estimates.pop(job.fn, None)     # the next ones come alone, and tell when they begin
        self._send(worker.peer, ("recall", worker.recalled))
        self._refresh(worker)
        self._arm(now + T_RECALL, self._despair_of_recall, worker, worker.recalled)

    def _recalled(self, worker: Worker, now: float, asked: list[int], taken: list[int]) -> None:
        """The worker's answer: what it took out goes back uncharged; what it did not has begun, and is not short."""
        self._take_back(worker, taken, now)
        for token in set(asked).difference(taken):
            self._started(worker, now, token)
        if worker.recalled == asked:
            worker.recalled = []
            worker.load = LONG if worker.inbox else 0.0     # nothing joins what is not short until it ends

    def _despair_of_recall(self, worker: Worker, now: float, asked: list[int]) -> None:
        """No answer: the process cannot even read. All but the job it must be at run elsewhere, under new tokens."""
        if worker.recalled is not asked:        # it was answered, or the worker has joined anew
            return
        lost = [token for token in asked[1:] if token in worker.inbox
                and (job := self._current(worker, token)) and not job.begun]
        self._take_back(worker, lost, now)
        worker.inbox.update(dict.fromkeys(lost))    # they keep the slot busy: the worker still has them
        worker.load = LONG

    def _log(self, session: Session, now: float, position: int, name: Name, value: Value) -> None:
        if position == len(session.log) and name[0] == session.id:
            session.log.append((name, value))

    def _judge_fitness(self, session: Session, now: float, judges: Iterable[Worker] | None = None) -> None:
        """A session whose log raised on each of these workers, or of all, is broken: its client fails its futures."""
        raised = [worker.unfit.get(session.id) for worker in judges or self.workers.values()]
        if raised and None not in raised and session.broken is None:
            session.broken = raised[-1]
            self._send(session.peer, ("broken", session.broken))
            self._cancel(session, now, list(session.jobs))

    def _bye(self, member: Member, now: float, reason: str) -> None:
        """A planned end: nothing is waited for."""
        self._end(member, now, {"what": reason, "planned": True})

    def _give_up(self, member: Member, now: float) -> None:
        """Let go of what stayed away, but for a worker for which its node vouches, and a node that has workers."""
        if now < member.lost_at + member.grace:
            return
        if isinstance(member, Worker) and member.node.peer is not None:
            self._arm(now + T_GONE, self._give_up, member)
        elif not (isinstance(member, Node) and member.workers):
            self._end(member, now, {"what": "its host went away"})

    def _end(self, member: Member, now: float, cause: dict[str, Any], token: int | None = None) -> None:
        """Forget a member and all that hung on it."""
        self._detach(member)
        self._gone(member, now)
        if isinstance(member, Worker):
            self._lose(member, now, token, cause)
        elif isinstance(member, Node):
            del self.nodes[member.id]
            for worker in list(member.workers.values()):
                self._end(worker, now, cause)
        elif isinstance(member, Session):
            del self.sessions[member.id]
            self._cancel(member, now, list(member.jobs))
            for worker in self.workers.values():
                worker.unfit.pop(member.id, None)
                if worker.positions.pop(member.id, None) is not None:
                    worker.has = {name for name in worker.has if name[0] != member.id}
                    self._send(worker.peer, ("leave", member.id))

    def _died(self, node: Node, now: float, worker_id: bytes, token: int | None, cause: dict[str, Any]) -> None:
        """A node's word on the death of its worker is final, and its cell's token says who is to blame."""
        worker = node.workers.get(worker_id)            # of another's it knows nothing
        if len(self._dead) > 100_000:       # slots; a dead worker's words may be read after it and its node have gone
            self._dead.clear()
        self._dead[worker_id[:16]] = max(self._dead.get(worker_id[:16], b""), worker_id)
        if "lost" in cause:
            node.info["lost"] = [*node.info.get("lost", ()), cause["lost"]]
        if worker is not None:
            self._end(worker, now, cause, token)

    def _lose(self, worker: Worker, now: float, token: int | None, cause: dict[str, Any]) -> None:
        """Remove a worker. `token` is what its cell showed; None: nobody could read it, the oldest is charged."""
        del self.workers[worker.id], worker.node.workers[worker.id]
        self._leaving.pop(worker, None)
        self._refresh(worker)
        for tag in (None, *worker.tags):
            self._selections[tag].members.remove(worker)
            if not self._selections[tag].members:
                del self._selections[tag]
        if token is None and not cause.get("planned"):
            token = next(iter(worker.inbox), 0)
        guilty, waiting = self._current(worker, token or 0), list(worker.beside)
        # who submitted what took itself down as well is charged with it: nobody is left to count that one's deaths
        is_own = guilty is not None and guilty.session.id.startswith(worker.id)
        for attempt in [*worker.inbox, *worker.beside, *worker.delivering]:
            job = self._current(worker, attempt)
            self._unassign(worker, attempt)
            if job is not None:
                # max_deaths=0 promises at most once: then what may have begun is charged, and so is what had finished
                once = not job.max_deaths and (job.begun or job.delivering)
                blamed = attempt == token or (is_own and attempt in waiting and not job.beside)
                self._put_back(job, now, once or (blamed and not job.delivering), cause)
        for session in [s for s in self.sessions.values() if s.id.startswith(worker.id)]:
            self._end(session, now, cause)      # what its jobs submitted goes with them
        # if all who are left are unfit, nobody will ever run its jobs; time enough for who replaces it to come
        for session_id in dict.fromkeys(id for left in self.workers.values() for id in left.unfit):
            self._arm(now + T_DEAD, self._judge_fitness, self.sessions[session_id])
        self._tell_workers(self.sessions.values())

    def _watch_host(self, node: Node, now: float) -> None:
        """Look at a host regularly: one of which no connection carried a byte for long is suspect, then dead."""
        if self.nodes.get(node.id) is not node:
            return
        dead_at = node.heard_at + self.dead_after
        if now >= dead_at:
            return self._end(node, now, {"what": f"its host was silent for {self.dead_after:g} s"})
        if node.is_suspect != (now >= node.heard_at + T_SUSPECT):
            node.is_suspect = not node.is_suspect
            for worker in node.workers.values():
                self._refresh(worker)
        self._arm(min(now + self.beat, dead_at), self._watch_host, node)
        self._give_up(node, now)

    def _retire(self, who: Worker | Node, now: float, reason: str) -> None:
        """A planned exit of a worker, or of all of a node's: nothing new, what has not begun comes back."""
        workers = [who] if isinstance(who, Worker) else [w for w in who.workers.values() if w not in self._leaving]
        for worker in workers:      # a node says it at every beat, for those that have joined meanwhile
            self._leaving[worker] = None
            if worker.inbox and not worker.recalled:
                self._recall(worker, now)
            self._refresh(worker)
        self._tell_workers(self.sessions.values() if workers else ())       # mostly that is no news

    def _kill(self, session: Session, now: float, numbers: list[int], reason: str, status: str = KILLED) -> None:
        """End jobs by force: the node of a running one reads the cell, and kills only what is still at it."""
        for number in numbers:
            job = session.jobs.get(number)
            if job is None or job.delivering or job.verdict or job.killed:
                continue
            job.killed = status, reason             # this is the last attempt
            if job.worker and job.state == State.RUNNING:
                self._kill_attempt(job.worker, now, job.token)
            elif job.state == State.READY or not self._adopting:    # else a worker may tell that it runs
                self._put_back(job, now)

    def _kill_attempt(self, worker: Worker, now: float, token: int) -> None:
        """Two words race for an attempt: the worker hands it back if it has not begun, the node ends it if it has."""
        held = {**worker.beside, **worker.inbox}
        job = held.get(token)
        if token in held and not (job and job.beside):
            self._send(worker.peer, ("recall", [token]))
            if job is None or job.killed:
                reason = job.killed[1] if job and job.killed else "its job is not wanted here any more"
                self._send(worker.node.peer, ("kill", [token], reason))
                # either word may be lost, and it may begin just after both have looked: repeated until it is over
                self._arm(now + T_KILL_AGAIN, self._kill_attempt, worker, token)

    # ---- ranges: relayed as they come, to whoever asked ----

    def _pull(self, reader: Member, now: float, name: Name, offset: int, length: int) -> None:
        """Ask a value's creator for a range. Who else asks for it meanwhile shares the answer."""
        owner = self.sessions.get(name[0]) or self.workers.get(name[0])
        if owner is None:
            return self._send(reader.peer, ("gone", name))
        readers = owner.asked.setdefault((name, offset, length), [])
        if reader.peer not in readers:
            readers.append(reader.peer)
        if len(readers) == 1:
            self._send(owner.peer, ("pull", name, offset, length))

    def _range(self, owner: Member, now: float, name: Name, offset: int, digest: bytes, body: Any = b"") -> None:
        for peer in owner.asked.pop((name, offset, len(body)), ()):
            self._send(peer, ("range", name, offset, digest, body))

    def _gone(self, owner: Member, now: float, name: Name | None = None) -> None:
        """An owner has a value no more, or (None) is no more itself."""
        for key in [key for key in owner.asked if name in (None, key[0])]:
            for peer in owner.asked.pop(key):
                self._send(peer, ("gone", key[0]))

    def _tell_workers(self, sessions: Iterable[Session]) -> None:
        """Tell clients which workers can be given jobs now, and what credit that gives a session."""
        workers = [w.told for w in self.workers.values() if w.peer is not None and w not in self._leaving]
        for session in sessions:
            self._send(session.peer, ("workers", workers, max(CREDIT_JOBS, 4 * WINDOW_JOBS * len(self.workers))))

    def _ask(self, session: Session, now: float, number: int, what: str) -> None:
        """Answer a question of a client: `info` is the snapshot."""
        self._send(session.peer, ("answer", number, self.snapshot(now) if what == "info" else None))

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return what `status --json` prints: nodes, workers, counts of jobs, objects."""
        states = collections.Counter("delivering" if job.delivering else job.state
                                     for session in self.sessions.values() for job in session.jobs.values())
        return {
            "schema": 1, **self.about,
            "nodes": [{"name": n.name, "connected": n.peer is not None, "workers": len(n.workers),
                       "silent_s": round(max(0.0, now - n.heard_at), 1),
                       **{k: n.info.get(k) for k in ("host", "pid", "python", "lost")}}
                      for n in self.nodes.values()],
            "workers": [{**w.told, "connected": w.peer is not None, "finished": w.finished,
                         "state": ("draining" if w in self._leaving else "suspect" if w.node.is_suspect else
                                   "busy" if w.inbox else "idle"),
                         "jobs": [job.name or f"job {job.number}" for job in list(w.inbox.values())[:3] if job]}
                        for w in self.workers.values()],
            "jobs": {**{s: states[s] for s in (State.WAITING, State.READY, State.RUNNING, "delivering", State.FAILED)},
                     **{k: self.counters[k] for k in ("accepted", "delivered", "cancelled")}},
            "clients": [{"name": s.name, "connected": s.peer is not None, "jobs": len(s.jobs)}
                        for s in self.sessions.values()],
            "objects": {"count": sum(len(s.objects) for s in self.sessions.values()),
                        "bytes": sum(len(v) for s in self.sessions.values() for v in s.objects.values()
                                     if isinstance(v, bytes))},
        }

    def story(self, job: Job) -> str:
        """Return the recent history of a job in words, for logs and failed checks."""
        where = job.worker.name if job.worker else "nowhere"
        return (f"job {job.number} {job.name!r}: {' > '.join(['...', *job.history, job.state])}, token {job.token} "
                f"on {where}, attempts {job.attempts}, deaths {job.deaths}")

    def check(self) -> None:
        """Assert every invariant; the only step that walks everything. For tests, and after a stumble."""
        queued = collections.Counter(entry[2] for heap in self._queues.values() for entry in heap)
        for session in self.sessions.values():
            for number, job in session.jobs.items():
                story = self.story(job)
                assert job.session is session and job.number == number, story
                assert job.state in (State.WAITING, State.READY, State.RUNNING, State.FAILED), story
                assert (job.verdict is not None) == (job.state == State.FAILED), story
                assert job.deaths <= job.max_deaths + 1, story
                assert job.state != State.READY or queued[job] == 1, f"{story}: queued {queued[job]} times"
                holders = [w for w in self.workers.values()
                           if job in (w.inbox.get(job.token), w.beside.get(job.token), w.delivering.get(job.token))]
                assert holders == ([job.worker] if job.state == State.RUNNING else []), f"{story}: others hold it"
            load = sum(job is not None and job.session is session for w in self.workers.values()
                       for job in [*w.inbox.values(), *(j for j in w.beside.values() if j and not j.beside)])
            assert session.load == load == sum(session.workers.values()), "a session's load is miscounted"
            sizes = sum(job.size for job in session.jobs.values() if job.delivering)
            assert session.unacknowledged == sizes, "a session's unacknowledged bytes are miscounted"
        for worker in self.workers.values():
            assert not set(worker.inbox) & set(worker.delivering), worker.name
            for token, job in worker.delivering.items():
                assert job.token == token and job.delivering and job.state == State.RUNNING, self.story(job)
            for tag, selection in self._selections.items():
                is_idle = self._is_able(worker) and not worker.inbox and tag in (None, *worker.tags)
                assert (worker in selection.idle) == is_idle, worker.name
        for (session, _, _), heap in self._queues.items():
            assert len(heap) <= 64 + 2 * len(session.jobs), "dead entries pile up"
            for _, _, job in sorted(entry for entry in heap if entry[2].state == State.READY)[:1]:
                assert self._room_for(job) is None, f"an eligible worker idles beside {self.story(job)}"
        alive = sum(len(session.jobs) for session in self.sessions.values())
        ended = self.counters["delivered"] + self.counters["cancelled"]
        assert self.counters["accepted"] == alive + ended, "jobs went missing"


# ==================================================================================================================
# 5 server
#
# The shell round the scheduler: sockets, threads, the clock. One lock guards the scheduler; under it a batch is fed
# and its actions are appended to the peers' outboxes, outside it they are written. Lock order: scheduler, then
# outbox; no other nesting. Threads: the doorkeeper (strangers), the ticker (time), one reader per authenticated peer.
# ==================================================================================================================

GUESTS = 1024               # strangers at a time; beyond it the oldest is dropped, never is accept() held up
GUESTS_PER_SOURCE = 64      # of one address, loopback exempt
PEERS = 4096                # authenticated connections, a thread each
DRAIN_SECONDS = 30.0        # that running jobs may take after SIGTERM, to a server as to a node


class _Guest:
    """A socket that has proved nothing yet: it gets no thread, and never more than 64 + 32 bytes of memory."""

    def __init__(self, sock: socket.socket, source: str) -> None:
        self.sock, self.source = sock, source
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self.data, self.wanted = b"", _HELLO.size   # of the step that is awaited, and how long that is
        self.steps: Iterator[int] | None = None     # the server's half of the handshake, under way


def find_secret(secret: str | None = None, path: str | None = None, *, make: bool = False) -> Secret:
    """Return the secret: given, `path`, MINIPOOL_SECRET_FILE, MINIPOOL_SECRET, or this user's file, in this order.

    A source that is named and fails is fatal. Raises Refused if there is none, unless `make`: then one is written.
    """
    if secret is not None:
        return Secret(secret)
    path = path or os.environ.get("MINIPOOL_SECRET_FILE")
    if not path and os.environ.get("MINIPOOL_SECRET"):
        return Secret(os.environ["MINIPOOL_SECRET"], "MINIPOOL_SECRET")
    if not path:
        folder = os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "minipool")
        path = os.path.join(folder, "secret")
        if make and not os.path.lexists(path):
            import tempfile  # late: slow to import, and needed once per user
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder) as draft:     # nobody else can read it
                print(Secret.new().text, file=draft, flush=True)
                with contextlib.suppress(FileExistsError):      # another process of ours was faster
                    os.link(draft.name, path)                   # appears whole or not at all
        elif not os.path.lexists(path):
            raise Refused("no secret found: give secret= (--secret-file on the command line), set MINIPOOL_SECRET_FILE "
                          f"or MINIPOOL_SECRET, or start the server as this user, which makes {path}")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            status, text = os.fstat(file.fileno()), file.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the secret file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"the secret file {path} is no file")
    if status.st_uid not in (os.getuid(), 0):
        raise Refused(f"the secret file {path} belongs to another user")
    if status.st_mode & 0o077:
        raise Refused(f"others can read the secret file {path}: run chmod 600 {path}")
    return Secret(text, path)


class Doorkeeper:
    """The one thread that talks to strangers. It answers nothing until 64 right bytes have arrived."""

    def __init__(self, listener: socket.socket, secret: KeySource, instance: bytes,
                 admit: Callable[[socket.socket, str, bytes, SessionKeys], None], stopping: threading.Event,
                 binding: bytes = b"") -> None:
        self._listener, self._secret, self._instance, self._admit = listener, secret, instance, admit
        self._stopping, self._binding = stopping, binding
        self._guests: dict[socket.socket, _Guest] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._spare = socket.socket()               # its descriptor is given up for a moment to turn somebody away
        listener.setblocking(False)
        self._spoken: dict[str, float] = {}         # when a source was last written of in the log
        self.thread = threading.Thread(target=self._run, name="minipool-doorkeeper", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            ready = {key.fileobj for key, _ in self._selector.select(0.2)}  # so soon a deadline is noticed, or the end
            for sock in self._guests.keys() & ready:
                self._hear(self._guests[sock])
            if self._listener in ready:                     # a newcomer comes last, as it may need room
                self._welcome_guest()
            now = time.monotonic()
            for guest in [guest for guest in self._guests.values() if guest.deadline < now]:
                self._dismiss(guest, "it was silent")
        for guest in list(self._guests.values()):
            self._dismiss(guest)
        for closing in (self._selector, self._listener, self._spare):
            closing.close()

    def _welcome_guest(self) -> None:
        try:
            sock, (source, *_) = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):    # it has gone again
                return
            # out of descriptors: nobody is left to wait for an answer that will not come; who is in does not notice
            self._spare.close()
            with contextlib.suppress(OSError), self._listener.accept()[0]:
                log.warning("somebody was turned away: %s (`ulimit -n` sets how many descriptors there are)", error)
            with contextlib.suppress(OSError):
                self._spare = socket.socket()
            return time.sleep(0.05)     # they may be given back; and the log is not flooded
        sock.setblocking(False)
        same = sum(guest.source == source for guest in self._guests.values())
        if same >= GUESTS_PER_SOURCE and not source.startswith(("127.", "::1")):
            return sock.close()
        if len(self._guests) >= GUESTS:
            self._dismiss(next(iter(self._guests.values())), "it made room")     # the oldest: the honest are quick
        self._guests[sock] = _Guest(sock, source)
        self._selector.register(sock, selectors.EVENT_READ)

    def _hear(self, guest: _Guest) -> None:
        """Take what a stranger says; every step is of a known size, any misfit is a quiet close."""
        try:
            data = guest.sock.recv(guest.wanted - len(guest.data))
            guest.data += data
            if not guest.steps and guest.data[:8] != MAGIC[:len(guest.data)]:
                raise Malformed(f"it begins with {guest.data[:8]!r}")     # HTTP and TLS are easily told
            if len(guest.data) == guest.wanted:
                guest.steps = guest.steps or self._meet(guest)
                guest.wanted = next(guest.steps, 0)
            elif not data:
                self._dismiss(guest)
        except Tls.would_block:
            return
        except (OSError, Malformed, RuntimeError) as error:     # the last: there is no room for it
            self._dismiss(guest, str(error))

    def _meet(self, guest: _Guest) -> Iterator[int]:
        """The server's half of the handshake, from step 1 on; yields how many bytes it needs before it goes on."""
        first, guest.data = guest.data, b""
        magic, version, place, python, named, _nonce = _HELLO.unpack(first)
        reserved = named[20:] if place == ROLES["worker"] else named
        if magic != MAGIC or not 1 <= place < len(ROLES) or any(reserved):
            raise Malformed("that is not a hello")
        role, identity = [*ROLES][place], named[:20]
        second = first_hello("server", bytes(5) + self._instance)
        guest.sock.sendall(second)
        if (version, python) != (PROTOCOL, sys.version_info[1]):    # the dialer reads ours in it, and names both
            raise Malformed(f"it speaks protocol {version} and runs Python 3.{python}")
        keys = SessionKeys.derive(self._secret(role, self._instance, identity), first, second, self._binding)
        yield len(keys.dialer_proof)
        if not hmac.compare_digest(guest.data, keys.dialer_proof):
            guest.sock.sendall(REFUSED)
            raise Malformed("it has another secret")
        guest.sock.sendall(keys.server_proof)
        self._admit(guest.sock, role, identity, keys)
        self._selector.unregister(guest.sock)
        del self._guests[guest.sock]

    def _dismiss(self, guest: _Guest, why: str = "") -> None:
        self._selector.unregister(guest.sock)
        del self._guests[guest.sock]
        guest.sock.close()
        now = time.monotonic()
        if why and now - self._spoken.get(guest.source, -60) > 10:      # one line per source and 10 s
            self._spoken[guest.source] = now
            if len(self._spoken) > 10_000:
                self._spoken.clear()
            log.info("somebody at %s was turned away: %s", guest.source, why)


class Server:
    """The pool's switch: `start()`, `stop()`, `wait()`, or a `with` block.

    `host` and `port` say where to listen (`port=0`: a free one); `secret` is text, by default what `find_secret`
    finds, else a new one in this user's secret file. `address` can be dialled, also after host="0.0.0.0".
    After `dead_after` seconds of silence a host is lost. With `tls` all is encrypted, under a certificate that the
    command `openssl` makes. Raises OSError if the port is in use, ValueError for a weak password beyond loopback.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = DEFAULT_PORT, *, secret: str | None = None,
                 max_value: int = 64 << 30, dead_after: float = T_DEAD, tls: bool = False,
                 embedded: bool = False) -> None:
        self._host, self._port, self._embedded, self.tls = host, port, embedded, tls
        self._tls: tuple[ssl.SSLContext | None, bytes] = server_tls() if tls else (None, b"")
        self._secret = find_secret(secret, make=True)
        self.is_local = host in ("localhost", "::1") or host.startswith("127.")
        if len(self._secret.text) < 12 and not self.is_local:
            raise ValueError("a password of under 12 characters is for loopback only: use a longer one, or "
                             "leave it out and let the server make a secret")
        self.secret = self._secret.text                 # to hand to clients and nodes
        self.max_value, self.dead_after = max_value, dead_after
        self.failure: BaseException | None = None       # a broken invariant, which stops the server
        self._lock = threading.Lock()
        self._clock = threading.Condition(self._lock)   # wakes the ticker when a deadline comes nearer
        self._planned = 0.0                             # until when the ticker sleeps; guarded by _lock
        self._readers: dict[threading.Thread, Connection] = {}      # of whom they hear, and some that have ended
        self._stopping = threading.Event()
        self._scheduler: Scheduler                      # made by start()
        self._doorkeeper: Doorkeeper | None = None
        self._ticker = threading.Thread(target=self._tick, name="minipool-ticker", daemon=True)

    @property
    def address(self) -> str:
        """host:port that a client can dial."""
        host = self._host
        if host in ("0.0.0.0", "::", ""):       # then as others see us: where a datagram to elsewhere would come from
            host = socket.gethostname()
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
                host = sock.getsockname()[0]
        return format_address(host, self._port)

    def start(self) -> Server:
        """Listen, and start the threads."""
        v6 = ":" in self._host                          # "::" is for IPv4 too
        listener = socket.create_server((self._host, self._port), backlog=1024, dualstack_ipv6=v6,
                                        family=socket.AF_INET6 if v6 else socket.AF_INET)
        self._port = listener.getsockname()[1]
        context, binding = self._tls
        if context:         # then so is what it accepts; the handshake of TLS is a part of what is received
            listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
        instance = secrets.token_bytes(16)
        self._secret.role_key("client", instance)       # a password is stretched once, here
        self._scheduler = Scheduler(time.monotonic(), time.time_ns() // 1000, self.max_value, self.dead_after)
        self._scheduler.about = {"address": self.address, "embedded": self._embedded, "python": PYTHON}
        self._ticker.start()
        self._doorkeeper = Doorkeeper(listener, self._secret.role_key, instance, self._admit, self._stopping, binding)
        return self

    def stop(self) -> None:
        """Close the port and every connection; nothing that a living client or worker holds is lost."""
        if self._doorkeeper is None or self._stopping.is_set():
            return
        self._stopping.set()
        self._doorkeeper.thread.join(5)     # from now on nobody comes
        with self._lock:
            self._clock.notify_all()
        for connection in self._readers.values():
            connection.close()
        for thread in (self._ticker, *self._readers):
            thread.join(2)

    def drain(self, patience: float, hurry: threading.Event) -> None:
        """Hand out nothing new, and let what runs end and be delivered: for `patience` seconds, or until `hurry`."""
        give_up = time.monotonic() + patience
        self._scheduler.is_paused = busy = True
        while busy and time.monotonic() < give_up and not hurry.wait(0.05):
            with self._lock:
                busy = any(w.inbox or w.delivering or not all(job and job.beside for job in w.beside.values())
                           for w in self._scheduler.workers.values())       # for runs nobody waits

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the server is stopped; False if `timeout` seconds passed first."""
        return self._stopping.wait(timeout)

    def __enter__(self) -> Server:
        return self if self._doorkeeper else self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _admit(self, sock: socket.socket, role: str, identity: bytes, keys: SessionKeys) -> None:
        """Give a peer that proved itself its thread, or raise RuntimeError; called by the doorkeeper."""
        self._readers = {thread: connection for thread, connection in self._readers.items() if thread.is_alive()}
        if len(self._readers) >= PEERS:
            raise RuntimeError(f"{PEERS} peers are connected, which is the limit")
        connection = Connection((Tls if self.tls else Plain)(sock), keys.down, keys.up, role)
        thread = threading.Thread(target=self._serve_peer, args=(connection, identity),
                                  name=f"minipool-{role}-{sock.fileno()}", daemon=True)
        thread.start()      # out of threads it raises: this peer has to come again, the others do not notice
        self._readers[thread] = connection

    def _serve_peer(self, connection: Connection, identity: bytes) -> None:
        who = threading.current_thread().name
        try:
            messages = connection.receive()
            if messages[0][0] == "worker" and messages[0][1]["id"] != identity:
                raise Malformed("a worker announces another worker's identity")
            while not connection.closed:            # else it said goodbye, or was superseded
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("< %s %s", who, ", ".join(map(brief, messages)))
                self._perform(Scheduler.receive, connection, messages)
                messages = connection.receive()
        except (OSError, EOFError):
            pass
        except Malformed as error:
            log.warning("%s sent what no honest peer sends (%s): closed", who, error)
        except Exception:
            self._stumbled()
        finally:
            connection.dispose()
            with contextlib.suppress(Exception):
                self._perform(Scheduler.disconnected, connection)

    def _perform(self, step: Callable[..., Actions], *arguments: Any) -> None:
        """Feed the scheduler and do what it asks: append under the lock, write outside it."""
        with self._lock:
            actions = step(self._scheduler, *arguments, time.monotonic())
            for connection, sent in actions.sends.items():
                connection.post(sent)       # if it is gone, for nobody
            if self._scheduler.deadline < self._planned:
                self._clock.notify()
        for connection in actions.sends:
            connection.flush()
        for connection in actions.closes:
            connection.close()

    def _tick(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                self._planned = self._scheduler.deadline
                left = self._planned - time.monotonic()
                if left > 0 and not self._stopping.is_set():
                    self._clock.wait(min(60, left))
                    continue            # the deadline may have moved meanwhile
            try:
                self._perform(Scheduler.tick)
            except Exception:
                self._stumbled()

    def _stumbled(self) -> None:
        """A bug of ours: go on if all invariants hold, else stop loudly; the peers can rebuild everything."""
        log.exception("the server stumbled")
        try:
            with self._lock:
                self._scheduler.check()
        except Exception as error:
            log.critical("an invariant of the scheduler is broken (%s): the server stops", error)
            self.failure = error
            threading.Thread(target=self.stop, name="minipool-stop").start()


def is_server_running(address: str | None = None) -> bool:
    """Return whether a minipool server answers at `address` (default: this machine's port 8899), by TLS or not."""
    with contextlib.suppress(OSError):
        for is_tls in (False, True):
            sock = socket.create_connection(parse_address(address or "127.0.0.1"), timeout=2)
            with contextlib.suppress(ConnectionError), sock if not is_tls else dial_tls(sock, tls_context())[0] as sock:
                sock.sendall(first_hello("client"))
                return _read_exactly(sock, _HELLO.size).startswith(MAGIC)
    return False


# ==================================================================================================================
# 6 values
#
# Functions, arguments and outcomes as bytes. `Functions` (client) pickles each function once, and again when
# something that it names became another object; the module-level functions below it are what those pickles call in
# a worker. The server never comes here, and cloudpickle is imported with the first pickle, not before.
#
# Plain cloudpickle gives every pickle a private copy of the globals, so what an initializer stores is not there for
# the next job. Here all by-value functions of one client module share one real module object per worker process and
# session. Each name in it has a version, raised by the client when it binds another object; a worker sets a name
# only if the version is newer than its own. So a worker's own `global model; model = ...` outlives later pickles,
# and a redefined helper arrives. Only bindings are compared: a list changed in place is not sent again.
# ==================================================================================================================

_PicklerBase: Any = object  # _pickler() adds cloudpickle's class, once that is imported
ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})  # nothing in them can refer to anything
OUT_OF_BAND = 32 * 1024  # bytes; below, copying into the pickle is cheaper than a buffer of its own
KEPT, KEPT_BYTES = 1000, 32 << 20  # of what was pickled last, so that it need not be again; more than a program has
_MISSING: Any = object()
_PLACE = pickle.PickleBuffer(bytearray(1))  # where a future's value will be: writable, as that is
# One name to be set in a module at the worker. A soft one, met while a module is filled, may be left out.
_Slot = collections.namedtuple("_Slot", "module name value version soft")
_BY_NAME = (TypeVar, type(functools.lru_cache(int)))  # pickle as a name of their module, be it importable or not
_OWN = frozenset({"__name__", "__doc__", "__builtins__", "__spec__", "__loader__", "__cached__", "__minipool__"})


def _cloudpickle() -> Any:
    import cloudpickle.cloudpickle
    return cloudpickle.cloudpickle


# ---- both halves: classes ----
# cloudpickle knows a by-value class again by an id, but sets all its attributes anew with every pickle. That undoes
# what a job stored in the class and, on the way back, rebuilds the client's own class. So a class has a version, raised
# only by the process that made it; the others set attributes only if the version is newer than theirs.

_MADE_HERE = sys.maxsize  # newer than every version
_classes: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()  # the version that was set, or _MADE_HERE
# Of a class made here: version, names and values of its attributes. Bounded, since values refer to their class.
_snapshots: dict[type, tuple[int, tuple[Any, ...]]] = {}


def _class_version(cls: type) -> int:
    """Return the version of `cls`, raised if it was made here and one of its attributes became another object."""
    if _classes.setdefault(cls, _MADE_HERE) != _MADE_HERE:
        return _classes[cls]
    now = (*cls.__dict__, *cls.__dict__.values())
    version, then = _snapshots.get(cls, (0, ()))
    if len(now) != len(then) or not all(map(operator.is_, now, then)):
        if len(_snapshots) >= KEPT:
            _snapshots.clear()  # a forgotten class only costs a newer version
        version = time.monotonic_ns()  # newer than all before
        _snapshots[cls] = version, now
    return version


def _set_class(cls: type, state: tuple[Any, Any, int]) -> None:
    if state[2] > _classes.get(cls, 0):
        _cloudpickle()._class_setstate(cls, state[:2])
        _classes[cls] = state[2]


# ---- client half ----

@functools.cache  # files do not move while a program runs
def _is_users(name: str, module: types.ModuleType) -> bool:
    import sysconfig
    if name.partition(".")[0] in ("minipool", "minipool_worker", "cloudpickle"):
        return False  # there on every worker, though often under the cwd
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if file is None:
        return getattr(module, "__spec__", None) is None  # made by hand; built-in modules have a spec
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    homes = [os.getcwd(), *([os.path.dirname(os.path.realpath(main))] if main else [])]
    home, system = (tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
                    for folders in (homes, (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())))
    path = os.path.realpath(file)
    return (path.startswith(home) and not path.startswith(system) and not path.endswith((".so", ".pyd"))
            and not {"site-packages", "dist-packages"} & set(path.split(os.sep)))


def travels_by_value(name: str) -> bool:
    """Tell whether a worker cannot be expected to import module `name`: the user's own files and made-up modules."""
    module = sys.modules.get(name)
    return name in ("__main__", "__mp_main__") or module is None or _is_users(name, module)


class _Module:
    """One globals dictionary of the client; pickled, it is the worker's module object for it."""

    def __init__(self, session: bytes, space: dict[str, Any]) -> None:
        name = str(space.get("__name__") or "?")
        self.space = space
        self.names: dict[str, tuple[Any, int]] = {}  # what was sent: object and version
        self.left_out: dict[str, Any] = {}  # what could not be pickled, as long as it is that object
        # A wrapper made by a library's decorator has the library's globals: the worker imports them, locks and all.
        self.importable = getattr(sys.modules.get(name), "__dict__", None) is space and not travels_by_value(name)
        self.reduced = (_cloudpickle().subimport, (name,)) if self.importable else (
            _shared, (session, id(space), name))  # by id, as two dictionaries may bear one name: notebooks


class _Pickler(_PicklerBase):  # type: ignore[misc]
    """cloudpickle's pickler with versioned classes: enough for results; with an owner, functions share its modules.

    It collects in `seen` what the validity of the pickle depends on, and keeps in `path` the slots it is inside of.
    """

    def __init__(self, owner: Any = None, root: Any = None) -> None:
        self.file = io.BytesIO()
        # What rides beside the pickle: large buffers, and futures in the place of their values' bytes. A function
        # (then it is the root) has none: its bytes tell whether it is known.
        self.buffers: list[Any] | None = [] if root is None else None
        super().__init__(self.file, 5, buffer_callback=functools.partial(_keep_large, self.buffers))
        self.owner, self.root, self.path, self.filled = owner, root, list[_Slot](), set[int]()
        self.seen: dict[Any, tuple[Any, Any]] = {}  # a call, and what it returned
        self.last: Any = _MISSING  # what is being reduced: the culprit if that fails

    def saw(self, get: Callable[..., Any], *args: Any) -> Any:
        """Return what `get` returns; the pickle stands for its object as long as that is the same."""
        value = get(*args)
        self.seen[get, *map(id, args)] = functools.partial(get, *args), value
        return value

    def reducer_override(self, obj: Any) -> Any:
        self.last, kind = obj, type(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.CodeType:      # cloudpickle 3.1.3 takes its file's name away: remote tracebacks need it
            make, parts = _cloudpickle()._code_reduce(obj)
            return make, (*parts[:10], obj.co_filename, *parts[11:])
        if self.owner is None:
            return super().reducer_override(obj)
        if isinstance(obj, concurrent.futures.Future):
            if self.buffers is None:
                raise pickle.PicklingError("give it as an argument, for its value")
            self.buffers.append(obj)
            return decode_value, (_PLACE,)
        if kind is _Module:
            return obj.reduced
        if kind is _Slot:
            if self.path and self.path[-1] is obj:  # as its own last argument, so its value is through
                self.path.pop()
                return int, ()
            self.path.append(obj)
            return _set_name, (obj.module, obj.name, obj.version, obj.value, obj)
        if isinstance(obj, types.ModuleType) and not (module := self.owner.module(vars(obj))).importable:
            self.saw(lambda space, size: len(space) == size, module.space, len(module.space))
            slots = self._slots(module, list(module.space), soft=True)
            self.filled.add(id(module))  # they bring all its names; so the depth does not grow with the call graph
            return *module.reduced, slots, None, None, operator.is_  # a setter that does nothing
        if kind is types.FunctionType and obj.__module__ and travels_by_value(obj.__module__):
            return self._dynamic_function_reduce(obj)
        if kind in _BY_NAME and travels_by_value(obj.__module__):
            if kind is TypeVar:
                return _cloudpickle()._make_typevar, _cloudpickle()._decompose_typevar(obj)
            return functools.lru_cache(**obj.cache_parameters()), (obj.__wrapped__,)
        if kind is object:
            self.owner.sentinels[id(obj)] = obj
            return _shared, (self.owner.session, id(obj))
        return super().reducer_override(obj)

    def _reduce_class(self, cls: type) -> Any:
        by_value = self.owner and isinstance(cls.__module__, str) and travels_by_value(cls.__module__)
        reduced = _cloudpickle()._dynamic_class_reduce(cls) if by_value else super().reducer_override(cls)
        if isinstance(reduced, tuple) and len(reduced) == 6:
            reduced = *reduced[:2], (*reduced[2], self.saw(_class_version, cls)), None, None, _set_class
        return reduced

    def _dynamic_function_reduce(self, fn: Any) -> Any:
        # A proxy of the function itself: the record must not keep a lambda and what it captured alive.
        seen = weakref.proxy(fn) if fn is self.root else fn
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.saw(getattr, seen, name)
        for cell in fn.__closure__ or ():
            self.saw(_cloudpickle()._get_cell_contents, cell)
        _, (code, _, *new), (attributes, state), *rest = reduced = super()._dynamic_function_reduce(fn)
        if self.owner is None:
            return reduced
        module, soft = self.owner.module(fn.__globals__), bool(self.path and self.path[-1].soft)
        slots = self._slots(module, _cloudpickle()._extract_code_globals(code), soft)
        state["__globals__"] = {}  # the slots ride where cloudpickle has what is to be loaded and thrown away
        state["_cloudpickle_submodules"] = state["_cloudpickle_submodules"], slots
        return _make_function, (module, code, *new), (attributes, state), *rest

    def _slots(self, module: _Module, names: Iterable[str], soft: bool) -> list[_Slot]:
        """Return what sets `names` in a worker; the version of each is raised if it binds another object by now."""
        slots = list[_Slot]()
        for name in () if module.importable or soft and id(module) in self.filled else names:
            if name in _OWN:
                continue
            with self.owner.lock:  # of two threads, the one that saw the newer object comes last
                value = self.saw(module.space.get, name, _MISSING)
                old, version = module.names.get(name, (_MISSING, 0))
                if value is not _MISSING and value is not old:
                    version += 1
                    module.names[name] = value, version
            if value is not _MISSING and not (soft and module.left_out.get(name, _MISSING) is value):
                slots.append(_Slot(module, name, value, version, soft))
        return slots


@functools.cache
def _pickler() -> Any:
    return type("_Pickler", (_Pickler, _cloudpickle().Pickler), {})


def _keep_large(buffers: list[Any] | None, buffer: pickle.PickleBuffer) -> bool:
    """Take a large buffer out of a pickle, as it is: pack() makes the snapshot."""
    if buffer is _PLACE:
        return False
    view = buffer.raw()
    if buffers is not None and view.nbytes >= OUT_OF_BAND:
        buffers.append(view)
        return False
    return True  # into the pickle


class Entry:
    """One pickled function. It lives as long as what it was made of or a job with it; then nobody will ask for it."""

    def __init__(self, number: int, blob: bytes, gone: list[int]) -> None:
        self.number, self.blob = number, blob
        weakref.finalize(self, gone.append, number)  # takes no lock: a collector may be what calls this


def name_of(fn: Any) -> str:
    """Return what to call a function in logs and errors."""
    fn = fn.func if isinstance(fn, functools.partial) else fn
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__


def _dump(what: str, fn: Any, value: Any, owner: Any = None) -> Any:
    """Return a pickler that has pickled `value`: `fn`, or something of a call; an error says `what` it is."""
    while True:  # each turn leaves one more unpicklable name out of a module
        pickler = _pickler()(owner, fn if value is fn else None)
        try:
            pickler.dump(value)
            return pickler
        except Exception as error:
            why = ": its objects are nested too deeply"
            if not isinstance(error.__cause__ or error, RecursionError):
                if pickler.path and (slot := pickler.path[-1]).soft:
                    slot.module.left_out[slot.name] = slot.value
                    continue
                path = "".join(f", global {slot.name!r}" for slot in pickler.path)
                why = f"{path}: it is or holds an object of {type(pickler.last)} ({error})"
            raise pickle.PicklingError(f"cannot pickle {what} {name_of(fn)}{why}") from error


class Functions:
    """The pickles of one session, made and kept by the client; every method may be called by any thread."""

    def __init__(self, session: bytes, next_number: Callable[[], int]) -> None:
        self.session = session
        self.gone: list[int] = []  # numbers of entries that nobody will ask for again
        self._next_number = next_number
        # Reentrant: a finalizer that submits may run inside. It guards all below; hot reads go without.
        self.lock = threading.RLock()
        self.sentinels: dict[int, object] = {}  # what was sent that is an object(), by id: `x is MISSING` stays true
        self._modules: dict[int, _Module] = {}
        self._known: weakref.WeakKeyDictionary[Any, tuple[Entry, list[Any], list[Any]]] = weakref.WeakKeyDictionary()
        self._entries: weakref.WeakValueDictionary[bytes, Entry] = weakref.WeakValueDictionary()  # by their bytes
        self._room = KEPT_BYTES  # until all that is known is forgotten, which costs another pickle

    def function(self, fn: Any) -> Entry:
        """Return the entry of `fn`, pickled at most once while all that it names stays the same.

        Equal pickles share one entry. Raises `pickle.PicklingError`, which names what cannot travel.
        """
        # Methods of instances, partials and callables may change unseen, so they are pickled every time.
        keep = type(fn) in (types.FunctionType, type) or isinstance(getattr(fn, "__self__", None), types.ModuleType)
        known = self._known.get(fn) if keep else None
        if known and all(map(operator.is_, map(operator.call, known[1]), known[2])):  # a program names hundreds
            return known[0]
        pickler = _dump("function", fn, fn, self)
        blob, seen = pickler.file.getvalue(), pickler.seen.values()
        with self.lock:
            entry = self._entries.get(blob) or Entry(self._next_number(), blob, self.gone)
            self._entries[blob] = entry
            if keep:
                self._room -= len(blob) + KEPT_BYTES // KEPT
                if self._room < 0:  # what was seen may hold its own function, so not all end by themselves
                    self._known.clear()
                    self._room = KEPT_BYTES
                self._known[fn] = entry, [call for call, _ in seen], [value for _, value in seen]
        return entry

    def dumps_call(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
                   *more: Any) -> tuple[bytes, list[Any], list[Any]]:
        """Return the pickle of (args, kwargs, *more), what rides beside it, the futures in that; `fn` is for errors."""
        if not more and all(type(a) in ATOMS for a in args) and all(type(a) in ATOMS for a in kwargs.values()):
            return pickle.dumps((args, kwargs), 5), [], []  # a seventh of the price
        try:
            pickler = _dump("a call of", fn, (args, kwargs, *more), self)
        except pickle.PicklingError:
            for name, part in [*enumerate(args), *kwargs.items()]:
                _dump(f"argument {name!r} of", fn, part, self)  # one of them fails again, and says where
            raise
        inputs = [part for part in pickler.buffers if isinstance(part, concurrent.futures.Future)]
        return pickler.file.getvalue(), pickler.buffers, inputs

    def module(self, space: dict[str, Any]) -> _Module:
        """Return the record of a globals dictionary; kept for good, since its names' versions must never fall."""
        return self._modules.get(id(space)) or self._modules.setdefault(id(space), _Module(self.session, space))


# ---- worker half: what the pickles call ----

# By session, and by their ids at the client, which keeps them; the worker drops those of a session that is over.
_shared_objects: dict[bytes, dict[int, Any]] = {}
_names_lock = threading.RLock()  # reentrant: the value that a name loses may have a finalizer


def _shared(session: bytes, key: int, name: str = "") -> Any:
    """Return this process's object for an object() of the client; with a name, for a module of that name."""
    made: Any = types.ModuleType(name) if name else object()
    if name:        # __minipool__: the version of each name in it that was set
        vars(made).update(__builtins__=__builtins__, __minipool__={})
    return _shared_objects.setdefault(session, {}).setdefault(key, made)  # atomic: jobs may load in several threads


def _make_function(module: types.ModuleType, code: types.CodeType, *rest: Any) -> types.FunctionType:
    return types.FunctionType(code, vars(module), *rest)


def _set_name(module: types.ModuleType, name: str, version: int, value: Any, end: int) -> None:
    space = vars(module)
    with _names_lock:
        if version > space["__minipool__"].get(name, 0):
            space["__minipool__"][name] = version
            space[name] = value


# ---- both halves: values ----
# A value as it travels is a pickle, or, when it has large buffers (arrays), a table and the pickle and the buffers,
# each where it can be read without being copied: b"\0", the number of segments, their lengths, then the segments.

_ALIGN = 64         # so that arrays lie as well in the received buffer as where they came from


def pack(data: bytes, buffers: Sequence[Any] = (), share: bool = True) -> bytes | Blob:
    """Return a pickle with its buffers as bytes if it may ride inside a message, else as a Blob to be pulled."""
    if not buffers:
        return data if len(data) <= INLINE else Blob([data])
    segments = [memoryview(data), *(memoryview(buffer).cast("B") for buffer in buffers)]
    table = struct.pack(f"!cI{len(segments)}Q", b"\0", len(segments), *(len(s) for s in segments))
    parts: list[Any] = []
    for segment in (table, *segments):
        parts += [segment, bytes(-len(segment) % _ALIGN)]
    return Blob(parts, share) if sum(map(len, parts)) > INLINE else b"".join(parts)


def check_size(value: bytes | Blob, limit: int, what: str, fn: Any) -> None:
    """Raise TooLarge, before anything is sent, if a packed value of `fn` is larger than the server allows."""
    size = value.size if isinstance(value, Blob) else len(value)
    if size > limit:
        raise TooLarge(f"the {what} of {name_of(fn)}(): {size} bytes; the server allows {limit} (serve --max-value)")


def decode_value(data: Any) -> Any:
    """Return the value that pack()ed bytes stand for. The one place where bytes of users are opened."""
    if data[:1] != b"\0":
        return pickle.loads(data)
    view = memoryview(data)
    count = struct.unpack_from("!I", view, 1)[0]
    lengths = (5 + 8 * count, *struct.unpack_from(f"!{count}Q", view, 5))
    starts = itertools.accumulate((length + -length % _ALIGN for length in lengths), initial=0)
    _, pickled, *buffers = [view[start:start + length] for start, length in zip(starts, lengths, strict=False)]
    return pickle.loads(pickled, buffers=buffers)


def encode_value(value: Any) -> bytes | Blob:
    """Return a job's result as it travels. Raises pickle.PicklingError."""
    if type(value) in ATOMS:
        return pack(pickle.dumps(value, 5))
    pickler = _dump("the result, a", type(value), value)
    return pack(pickler.file.getvalue(), pickler.buffers)


def decode_failure(status: str, value: Any) -> BaseException:
    """Return the exception that a job's failure is at the client."""
    if callable(value):                     # made here: the server was lost, or the initializer raised
        return value()                      # type: ignore[no-any-return]
    if status != RAISED:                    # it ended without its worker's word
        job, deaths, tail = value.get("job") or "the job", value.get("deaths"), value.get("stderr")
        if status in (KILLED, TIMED_OUT):
            return (JobKilled if status == KILLED else JobTimeout)(f"{job} was ended: {value.get('reason')}")
        toll = f"took down {deaths} worker{'s' * (deaths != 1)} in {value.get('attempts')} attempts; the last"
        who = f"{value['worker']} on {value.get('device')}," if "worker" in value else "its worker"
        return WorkerDied(f"{job} {toll if deaths else 'is lost'}, {who} {value.get('what')}"
                          + (f"; it printed last:\n{tail}" if tail else ""), **value)
    from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]  # late: few fail
    pickled, type_name, words, text, where = decode_value(value)
    error: BaseException = RemoteError(type_name, words, text)
    with contextlib.suppress(BaseException):        # its class may not be here
        error = decode_value(pickled) if pickled else error
    error.__cause__ = RemoteTraceback(f'\n"""\n{text}"""')
    error.add_note(f"raised by {where}")
    return error


# ==================================================================================================================
# 7 client
#
# Future and Executor: real subclasses of concurrent.futures'. A Client is one connection with all that waits on it;
# executors are views of it that carry options. Threads: the peer's I/O thread and writer, and one for callbacks.
# No user code and no user bytes on the I/O thread: an outcome stays bytes until somebody asks for it, and is decoded
# in the thread that asks.
# ==================================================================================================================

CREDIT_BYTES = 32 << 20     # of inline payloads that a client may have at the server
KEPT_COPIES = 16            # of large arguments; then read-only buffers stay where they lie: all may be the same array
ACKNOWLEDGE = 16            # outcomes that wait for a frame to ride on; a worker that dies with more has them run again

_base: Any = concurrent.futures._base
_PENDING, _RUNNING, _FINISHED = _base.PENDING, _base.RUNNING, _base.FINISHED


def gather(futures: Any, errors: str = "raise", timeout: float | None = None) -> Any:
    """Return the values of futures, in the nesting of lists, tuples, sets and dicts that they come in.

    errors="skip" leaves out those that failed or were cancelled. Raises TimeoutError after `timeout` seconds.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is 'raise' or 'skip', not {errors!r}")
    give_up = None if timeout is None else time.monotonic() + timeout

    def gathered(item: Any) -> list[Any]:
        if isinstance(item, concurrent.futures.Future):
            left = None if give_up is None else max(0.0, give_up - time.monotonic())
            if errors == "raise":
                return [item.result(left)]
            with contextlib.suppress(concurrent.futures.CancelledError):
                return [] if item.exception(left) is not None else [item.result(0)]
            return []
        if isinstance(item, dict):
            return [{key: part for key, value in item.items() for part in gathered(value)}]
        if isinstance(item, list | tuple | set | frozenset):
            return [type(item)(itertools.chain.from_iterable(map(gathered, item)))]
        return [item]
    return next(iter(gathered(list(futures) if isinstance(futures, Iterator) else futures)), None)


_here: Any = None                   # in a worker process, its minipool_worker.Worker
_running = threading.local()        # .attempt: in a thread that runs a job, what the worker knows of that


def current_job() -> minipool_worker.JobInfo | None:
    """Return id, name, attempt, worker and device of the job that this thread runs; None outside a job."""
    attempt = getattr(_running, "attempt", None)
    return _here.describe(attempt) if attempt else None


def _slot(held: bool) -> None:
    if current_job() is None:
        raise RuntimeError("secede() and rejoin() are for use inside a job")
    _here.slot(held)


def secede() -> None:
    """Leave the slot of the job that this thread runs to other jobs; it goes on beside them. See rejoin()."""
    _slot(False)


def rejoin() -> None:
    """Take a slot again: wait until the job that has it ends, and go before those that have not begun."""
    _slot(True)


def job_id(name: Name) -> str:
    """Return a job's name as text."""
    return f"{name[0][:4].hex()}-{name[1]}"


# To send a job, and again: function (entry, name, options), arguments (b"" while they wait for futures), log's length
_Call = tuple[tuple[Entry, Name, dict[str, Any]], bytes | Blob, int]
_publishing = threading.Lock()      # held for a moment where a future's state and its being watched must agree


class Future(concurrent.futures.Future[Any]):
    """A job's outcome: a concurrent.futures.Future that also knows `id`, `name`, `worker` and `attempts`."""

    worker: str | None = None       # who runs or ran it; None before it begins
    attempts = 0
    # Instead of the attributes that the superclass makes: those that change are changed under the client's lock.
    _state, _result, _exception = _PENDING, None, None
    _raw: tuple[str, Any] | None = None             # an outcome that nobody has looked at yet
    _doom = ""                      # why it was killed, as long as the server may not have heard it
    _watched = False                # it has a condition, and perhaps waiters and callbacks

    def __init__(self, client: Client, number: int, view: Executor, call: _Call) -> None:
        self._client, self._number, self._view = client, number, view
        self._call: _Call | None = call         # dropped with the outcome
        self.name: str = call[0][2]["name"]

    def __getattr__(self, name: str) -> Any:
        """Make what a future needs only if it is waited for or has callbacks; most are read when they have ended."""
        if name not in ("_condition", "_waiters", "_done_callbacks"):
            raise AttributeError(f"a Future has no {name!r}", name=name, obj=self)
        with _publishing:           # of two threads that ask, both get the first
            if not self._watched:
                self._condition, self._waiters = threading.Condition(), []
                self._done_callbacks: list[Callable[[Future], object]] = []
                self._watched = True
        return self.__dict__[name]

    @property
    def id(self) -> str:
        """The job's name as text, as in logs and in the job's MINIPOOL_JOB."""
        return job_id((self._client.session, self._number))

    def cancel(self) -> bool:
        """Cancel the job unless it began; what arrives later for it is dropped. Never blocks on the network.

        With `options(cancel_running=True)` a job that runs is cancelled too, and its worker's process ended.
        """
        with self._client.lock:
            if (call := self._call) and not self.cancelled() and (
                    self._state != _RUNNING or self._doom or call[0][2].get("cancel_running")):
                self._state = _PENDING                      # what runs, super() would not cancel
                super().cancel()
                self.set_running_or_notify_cancel()         # wait() and as_completed() hear of it
                if not self._doom and self._client.retire(self):    # that decides it, and the server is told
                    self._client.peer.send(("cancel", [self._number]))
            return self.cancelled()

    def result(self, timeout: float | None = None) -> Any:
        """Return the job's value or raise its exception; TimeoutError after `timeout` seconds, which stops nothing."""
        try:
            error = self.exception(timeout)
            if error is not None:       # a falsy one too
                raise error
            return self._result
        finally:
            self = error = None     # type: ignore[assignment]  # an exception's frames must not keep the future

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the job's exception, None if it has a value; TimeoutError after `timeout` seconds."""
        if self._state != _FINISHED:
            give_up = FOREVER if timeout is None else time.monotonic() + timeout
            with self._client.lend():       # to the jobs of the pool, the slot of the one that waits here
                self._client.peer.lead(lambda: self._state not in (_PENDING, _RUNNING), give_up)
                super().exception(timeout and max(0.0, give_up - time.monotonic()))
        # wait(FIRST_EXCEPTION) asks, which holds the conditions of all its futures: no user code under them
        if self._raw and not (self._watched and self._condition._is_owned()):       # type: ignore[attr-defined]
            self._decode()
        return self._exception

    def _get_snapshot(self) -> Any:         # asyncio reads this from Python 3.14 on
        if self.done():
            self._decode()
        return super()._get_snapshot()      # type: ignore[misc]

    def __await__(self) -> Any:
        import asyncio
        return asyncio.wrap_future(self).__await__()

    def _decode(self) -> None:
        """Turn the outcome's bytes into its value or exception, once, in the thread that asks."""
        raw = self._raw
        if raw is None:
            return
        value = error = None
        try:
            if raw[0] == OK:
                value = decode_value(raw[1])
            else:
                error = decode_failure(*raw)
        except BaseException as problem:    # a value that does not unpickle costs this future only
            error = problem
        with _publishing:
            if self._raw is not None:
                self._result, self._exception, self._raw = value, error, None

    def _settle(self, status: str, value: Any) -> None:
        """End the future with an outcome to be decoded; waiters wake, callbacks go to their thread. For the client."""
        self._raw = status, value
        error = None if status == OK else RemoteError("not decoded yet")
        with _publishing:           # who watches from now on sees that it has ended
            if not self._watched:
                self._exception, self._state = error, _FINISHED
                return
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)

    def _invoke_callbacks(self) -> None:
        if self._done_callbacks:
            self._client.later(super()._invoke_callbacks)   # type: ignore[misc]  # no user code under the lock


class Client:
    """One connection to a server, and everything that waits on it. Executors are its views."""

    def __init__(self, address: tuple[str, int], key: KeySource, *, name: str, max_workers: int | None,
                 connect_timeout: float, reconnect_timeout: float, tls: bool, child: minipool_worker.Node | None,
                 initializer: Callable[..., object] | None, initargs: Iterable[Any]) -> None:
        self.child = child                              # the embedded pool; it ends with this client
        self.lend: Callable[[], Any] = contextlib.nullcontext
        self.session = (_here.id if _here else b"") + secrets.token_bytes(16)   # which ends with a worker it is made in
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)               # of jobs and objects alike
        self.functions = Functions(self.session, lambda: next(self.numbers))
        self.workers: list[dict[str, Any]] = []
        self._info: Any = {"session": self.session, "name": name, "max_workers": max_workers, "workers_seen": 0}
        self._patience = FOREVER                        # seconds of an outage that are ridden out
        # all below is guarded by lock
        self._changed = threading.Condition(self.lock)  # a worker came or went, an answer came
        self.unfinished: dict[int, Future] = {}         # every future without an outcome
        self._sent: dict[int, Future] = {}              # those the server has
        self._sent_bytes = 0
        self._backlog: list[tuple[float, int]] = []     # a heap of those it has not: (-priority, number)
        self._known_objects: set[int] = set()           # what the server has of ours, on this connection
        self._log: list[tuple[Name, bytes | Blob]] = [] # what every worker must have run before our jobs
        self._delivered: list[int] = []                 # outcomes to be acknowledged; they ride on the next frame
        self._answers: dict[int, Any] = {}
        self._on_answer = self._answers.__setitem__     # number and value are all that such a message says
        self._credit = 0                                # jobs that it may have; 0 until it has settled what we hold
        self._complain_at = time.monotonic() + 3        # if no worker has joined by then, and jobs wait for one
        self.broken: Callable[[], BaseException] | None = None  # makes what every call and future then raises
        self.closing = False                            # it takes no more jobs, and ends with the last
        self._callbacks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.later = self._callbacks.put    # run it on the callback thread; no lock is taken: a collector may call this
        self._callback_thread = threading.Thread(target=self._run_callbacks, name="minipool-callbacks", daemon=True)
        self.peer = Peer("client", address, key, lock=self.lock, announce=self._announce,
                         on_batch=self._on_batch, on_lost=self._on_lost, on_idle=self._flush_delivered, tls=tls)
        self._callback_thread.start()
        self.peer.thread.start()
        final = Refused, VersionMismatch                # trying again does not help
        try:
            with self._changed:         # until the first welcome
                self._changed.wait_for(lambda: self._credit or isinstance(self.peer.trouble, final), connect_timeout)
                trouble = self.peer.trouble
                if not self._credit:
                    raise trouble if isinstance(trouble, final) else ServerLost(
                        f"no minipool server at {format_address(*address)} within {connect_timeout:g} s ({trouble}): "
                        "start one there with `minipool serve`, or check the address")
            if initializer is not None:
                self.add_to_log(initializer, tuple(initargs), {})
        except BaseException:
            self.close()
            raise
        self._patience = reconnect_timeout

    def submit(self, view: Executor, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        """Take a snapshot of the call, and send it or queue it here."""
        if not callable(fn):
            raise TypeError(f"submit() needs something callable, not {type(fn).__name__}")
        entry, options = self.functions.function(fn), view._options
        retry_on = (options.get("retry_on") or (Exception,)) if options.get("retries") else ()
        call, buffers, inputs = self.functions.dumps_call(fn, args, kwargs, *((retry_on,) if retry_on else ()))
        if any(getattr(given, "_client", None) is not self for given in inputs):
            raise ValueError(f"{name_of(fn)}() is given a future of another executor: give it the result")
        packed: bytes | Blob = b""
        if inputs:          # it is packed when they are done
            buffers = [part if isinstance(part, Future) or part.readonly else bytes(part) for part in buffers]
        else:
            packed = pack(call, buffers, len(self.peer.values) < KEPT_COPIES or not any(b.readonly for b in buffers))
        check_size(entry.blob, self.max_value, "pickle", fn)
        check_size(packed, self.max_value, "arguments", fn)
        wired = view._wired
        if wired[0] is not entry:           # the same objects for the next call: then a batch holds them once
            wire = {name: value for name, value in options.items() if name in _OPTIONS_READ and value is not None}
            wire["name"] = options.get("name") or name_of(fn)
            if where := options.get("on") or options.get("prefer"):
                wire.update(on=list(where), soft=not options.get("on"))
            view._wired = wired = entry, (self.session, entry.number), wire
        with self.lock:
            if self.broken is not None:
                raise self.broken()
            if self.closing or view._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            number, log = next(self.numbers), 0 if options.get("beside") else len(self._log)
            self.unfinished[number] = future = Future(self, number, view, (wired, packed, log))
            if not inputs:
                heapq.heappush(self._backlog, (-wired[2].get("priority", 0), number))
                self._send_backlog()
            connection, busy = self.peer.connection, len(self._sent) > min(32, 2 * len(self.workers))
        if connection:      # few jobs out: go now; many: go on submitting while the writer makes batches
            if self._delivered and not busy:
                self._flush_delivered()     # in the same frame: alone they would cost the next answer time
            connection.flush(0 if busy else BORROWED_FRAMES)
        if inputs:
            self._link(future, call, buffers, iter(inputs))
        return future

    def _link(self, future: Future, call: bytes, buffers: list[Any], inputs: Iterator[Future]) -> None:
        """Send a job once the futures in its arguments are done; one that has no value ends it in the same way."""
        for given in inputs:
            if not given.done():
                return given.add_done_callback(lambda _: self._link(future, call, buffers, inputs))
        try:
            for place, part in enumerate(buffers):
                if isinstance(part, Future):
                    raw = part._raw         # the value's bytes, as they came if nobody has looked at it yet
                    value = raw[1] if raw and raw[0] == OK else encode_value(part.result(0))
                    buffers[place] = value.read(0, value.size) if isinstance(value, Blob) else value
            packed = pack(call, buffers)
            check_size(packed, self.max_value, "arguments", future)
        except concurrent.futures.CancelledError:
            future.cancel()
        except BaseException as error:      # that of a future, or its value cannot be pickled again
            with self.lock:
                self._finish(future, DIED, lambda error=error: error)
        with self.lock:
            if future._call:                # else it has ended
                wired, _, log = future._call
                future._call = wired, packed, log
                heapq.heappush(self._backlog, (-wired[2].get("priority", 0), future._number))
                self._send_backlog()
        self.peer.send()

    def _send_backlog(self) -> None:
        """Send what the credit allows, most urgent first. Holds the lock; somebody flushes."""
        while self._backlog and len(self._sent) < self._credit and self._sent_bytes < CREDIT_BYTES:
            if future := self.unfinished.get(heapq.heappop(self._backlog)[1]):      # else it was cancelled here
                self._post_job(future)

    def _post_job(self, future: Future) -> None:
        """Leave a job for the next flush, and its function if this server has not got it. Under the lock."""
        (entry, name, options), packed, log = future._call      # type: ignore[misc]
        if future._number in self._sent:
            options = {**options, "attempts": future.attempts}      # that it says so tells that it is sent again
        else:
            self._sent[future._number] = future
            self._sent_bytes += len(packed) if isinstance(packed, bytes) else 0
        value = self.peer.share((self.session, future._number), packed)
        messages: list[Message] = [("submit", future._number, name, value, log, options)]
        if entry.number not in self._known_objects:
            self._known_objects.add(entry.number)
            messages.insert(0, ("put", name, self.peer.share(name, pack(entry.blob))))
        if self.peer.connection:        # else the next announcement says it
            self.peer.connection.post(messages)

    def add_to_log(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Append a call that every worker must have made before it begins a job submitted from now on."""
        call, buffers, inputs = self.functions.dumps_call(fn, args, kwargs, fn)
        if inputs:
            raise ValueError(f"{name_of(fn)}() is for every worker: give it the result of a future")
        data = pack(call, buffers)
        check_size(data, self.max_value, "arguments", fn)
        with self.lock:
            self._log.append(((self.session, next(self.numbers)), data))
            self._send_log(len(self._log) - 1)      # a server that lacks earlier ones takes all from its welcome on

    def _send_log(self, known: int) -> None:
        for position, (name, data) in enumerate(self._log[known:], known):
            self.peer.send(("log", position, name, self.peer.share(name, data)))

    def kill(self, futures: Sequence[Future], reason: str) -> None:
        """End running jobs by force; those that have not begun fail with JobKilled too."""
        with self.lock:
            for future in futures:
                if future._number in self._sent:
                    future._doom = reason
                    self.peer.send(("kill", [future._number], reason))
                else:
                    self._finish(future, KILLED, {"reason": reason})

    # ---- the thread that reads ----

    def _announce(self) -> list[Message]:
        self._known_objects.clear()     # a put may have been lost with the old connection: each is sent again at need
        return [("client", self._info, list(self._sent))]

    def _on_lost(self) -> None:
        with self._changed:
            self._credit = 0
            self._changed.notify_all()
            lost_for = time.monotonic() - (self.peer.lost_at or time.monotonic())
            if lost_for > self._patience:
                self._break(functools.partial(ServerLost, f"the server at {format_address(*self.peer.address)} was "
                                              f"gone for {lost_for:.0f} s ({self.peer.trouble})"))

    def _on_batch(self, messages: list[Message]) -> None:
        with self.lock:
            for message in messages:
                if message[0] == "done":        # the hot one
                    self._on_done(*message[1:])
                else:
                    getattr(self, f"_on_{message[0]}")(*message[1:])
                    self._changed.notify_all()
            self._send_backlog()
            connection = self.peer.connection
        if connection and (connection.waiting or len(self._delivered) >= ACKNOWLEDGE):
            self._flush_delivered()
            connection.flush()

    def _flush_delivered(self) -> bool:
        """Post the acknowledgements that wait; True if there were some."""
        if not (self._info["workers_seen"] or _here) and self.unfinished and time.monotonic() >= self._complain_at:
            self._complain_at = FOREVER
            print(f"minipool: no worker has joined {self.peer.address[0]} yet: jobs wait", file=sys.stderr, flush=True)
        with self.lock:
            connection, numbers = self.peer.connection, self._delivered
            if connection is None:
                return False
            if numbers:
                self._delivered = []
                connection.post([("delivered", numbers)])
            # after that, for a job whose result is not known to be here may run again; so many as fit in a frame
            gone = [(self.session, self.functions.gone.pop()) for _ in self.functions.gone[:1000]]
            for name in gone:
                self.peer.values.pop(name, None)
                self._known_objects.discard(name[1])
            if gone:
                connection.post([("drop", gone)])
            return bool(connection.waiting)

    def _on_welcome(self, info: dict[str, Any]) -> None:
        self.max_value = info["max_value"]
        self._send_log(info["log"])
        self.peer.send(*(("kill", [n], future._doom) for n, future in self._sent.items() if future._doom))

    def _on_missing(self, numbers: list[int]) -> None:
        """The server does not know these (it is a new one, or they were lost on the way): send them again."""
        for number in numbers:
            if future := self._sent.get(number):
                self._post_job(future)

    def _on_began(self, number: int, worker: str, attempts: int) -> None:
        if (future := self._sent.get(number)) and future._state in (_PENDING, _RUNNING):
            future.worker, future.attempts, future._state = worker, attempts, _RUNNING

    def _on_done(self, number: int, status: str, value: Any, worker: str, attempts: int) -> None:
        future = self._sent.get(number)
        if future is None:
            self._delivered.append(number)      # told twice: the first acknowledgement was lost
            return
        future.worker, future.attempts = worker, attempts
        if type(value) is not tuple:
            return self._finish(future, status, value)

        def fetched(data: Any) -> None:
            if data is not None:        # else its holder is lost, and the job runs again by itself
                self._on_batch([("done", number, status, data, worker, attempts)])      # now as if it were small
        self.peer.pull(value, fetched)

    def _finish(self, future: Future, status: str, value: Any) -> None:
        """End a future, unless it has, with an outcome to be decoded; waiters wake, callbacks go to their thread."""
        if future._call:
            if future._state in (_PENDING, _RUNNING):   # else it was cancelled, or Ctrl-C came between these two
                future._settle(status, value)
            if self.retire(future):
                self._delivered.append(future._number)

    def retire(self, future: Future) -> bool:
        """Forget a job that has ended: nothing is kept that it alone needed. True if the server has it."""
        number, (_, packed, _), future._call = future._number, future._call, None       # type: ignore[misc]
        self.unfinished.pop(number, None)
        sent = self._sent.pop(number, None) is not None
        if isinstance(packed, Blob):
            self.peer.values.pop((self.session, number), None)
        elif sent:
            self._sent_bytes -= len(packed)
        if self.closing and not self.unfinished:
            self.later(None)                    # after the callbacks of the last one
        return sent

    def _on_broken(self, value: Value) -> None:
        def error() -> BaseException:
            broken = concurrent.futures.BrokenExecutor(
                "an initializer, on_start() or update raised on every worker, so no job of this executor can run")
            broken.__cause__ = decode_failure(RAISED, value)
            return broken
        self._break(error)

    def _break(self, error: Callable[[], BaseException]) -> None:
        """Fail everything that waits, each future with an exception of its own, made where it is asked for."""
        self.broken = error
        for future in list(self.unfinished.values()):
            self._finish(future, DIED, error)

    def _on_workers(self, workers: list[dict[str, Any]], credit: int) -> None:
        self.workers, self._credit = workers, credit
        self._info["workers_seen"] = max(self._info["workers_seen"], len(workers))      # for so many a new server waits

    def _run_callbacks(self) -> None:
        """Run callbacks, and after the last one end all that this client started: nobody waits for it in vain."""
        for callback in iter(self._callbacks.get, None):
            try:
                callback()
            except BaseException:       # SystemExit too: the end below must come
                log.exception("a callback raised")
            del callback                # it may hold the last reference to a future and its value
        self._flush_delivered()
        self._log.clear()
        self.peer.stop(("bye", "the client has finished"))
        if self.child:
            self.child.stop()
        _clients.pop(self, None)

    def close(self, wait: bool = True) -> None:
        """Take no more jobs; once all have ended, end the connection, the threads and the child."""
        with self.lock:
            self.closing = True
            if not self.unfinished:
                self.later(None)
        if wait and self._callback_thread is not threading.current_thread():
            self._callback_thread.join()


_clients: dict[Client, Callable[[], Executor | None]] = {}      # those that are open, and whose they are


def _forget_all() -> None:
    """In the child of a fork: the connections belong to the parent, and no thread of theirs is here."""
    _publishing._at_fork_reinit()       # type: ignore[attr-defined]  # another thread may have held it
    for client in list(_clients):
        client.lock = threading.RLock()
        client._changed = threading.Condition(client.lock)
        client.unfinished.clear()
        client.broken = lambda: RuntimeError("this executor belongs to the parent process: a fork must open its own")
        connection, client.peer.connection = client.peer.connection, None
        if connection:
            connection.closed = True
            connection._seam.sock.close()       # without a word to the other end: the socket is the parent's
    _clients.clear()
    if _here:
        _here.slot = lambda held: False         # the slot is the parent's too


# at interpreter exit pending work is waited for, as in the standard library
getattr(threading, "_register_atexit", atexit.register)(lambda: [*map(Client.close, list(_clients))])
os.register_at_fork(after_in_child=_forget_all)


# what options() takes, and what is good there: of what the server reads that which is the user's, then the client's own
_OPTIONS: dict[str, Check] = {
    **{name: _OPTIONS_READ[name] for name in ("name", "priority", "retries", "max_deaths", "on", "cancel_running")},
    "job_timeout": lambda seconds: _CHECKS[float](seconds) and seconds > 0,
    "prefer": _CHECKS["tags"], "timeout": _CHECKS[float],
    "retry_on": lambda kinds: all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)}
_said: list[bool] = []          # not empty once this process has been told of its embedded pool


def _check_counts(**values: int | None) -> None:
    """Check arguments that count something; None is the same as not given."""
    for name, value in values.items():
        if type(value) not in (int, type(None)):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be greater than 0, not {value}")


def _in_worker(method: str, *arguments: Any) -> Any:
    """Be the job that calls a method of the worker's process: there are the instances."""
    return getattr(_here, method)(*arguments)


class Executor(concurrent.futures.Executor):
    """A concurrent.futures.Executor over a pool of workers: `submit`, `map`, `shutdown`, `with`.

    `address`: "host", "host:port", "[::1]:port"; "local" is an embedded pool of this machine, closed with the
    executor; None is MINIPOOL_ADDRESS, and "local" where that is not set. An int in its place is `max_workers`, which
    bounds how many workers are used (embedded: how many are started). `initializer(*initargs)` runs once per worker
    before its first job there, on late and respawned workers too. Seconds: `connect_timeout` for the first connection,
    `reconnect_timeout` for outages. Raises ServerLost, Refused, VersionMismatch; ValueError, TypeError for arguments.
    """

    def __init__(self, address: str | int | None = None, *, secret: str | KeySource | None = None,
                 max_workers: int | None = None, initializer: Callable[..., object] | None = None,
                 initargs: tuple[Any, ...] = (), max_tasks_per_child: int | None = None, name: str | None = None,
                 tls: bool = False, connect_timeout: float = 10.0, reconnect_timeout: float = 600.0) -> None:
        if isinstance(address, int) and not isinstance(address, bool):
            address, max_workers = None, address
        if address is not None and not isinstance(address, str):
            raise TypeError(f"address is text such as 'host:port', not {type(address).__name__}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        _check_counts(max_workers=max_workers, max_tasks_per_child=max_tasks_per_child)
        self._options: dict[str, Any] = {"max_tasks": max_tasks_per_child}
        self._parent: Executor | None = None
        self._closed = False            # this view
        self._wired: tuple[Any, Any, Any] = (None, None, None)      # the last function, and how messages say it
        child, limit, patience = None, max_workers, reconnect_timeout
        where = address or os.environ.get("MINIPOOL_ADDRESS") or "local"
        if where == "local":            # a private child serves this machine, with a throw-away secret
            secret = Secret.new().text
            from minipool_worker import Node  # late: who dials a server needs none of it
            child = Node("local", secret=secret, connect_timeout=60, name="local", workers=max_workers,
                         sys_path=[*map(os.path.abspath, sys.path)]).start()        # it works in another folder
            where, limit, patience = child.answer["address"], None, 3.0     # it is never restarted
        key = secret if callable(secret) else find_secret(secret).role_key     # a worker has only its own key
        self._client = Client(parse_address(where), key, name=name or os.path.basename(sys.argv[0] or "python"),
                              max_workers=limit, connect_timeout=connect_timeout, reconnect_timeout=patience,
                              tls=tls and child is None, child=child, initializer=initializer, initargs=initargs)
        # an executor that is dropped without shutdown() lets its jobs end, as in the standard library
        later, close = self._client.later, self._client.close       # a collector, which calls this, takes no lock
        _clients[self._client] = weakref.ref(self, lambda _: later(close))
        if address is None and child and not _said:
            _said.append(True)          # so that nobody believes to be on a cluster
            devices = collections.Counter(child.answer["devices"])
            text = ", ".join(f"{n} worker{'s' * (n > 1)} on {device}" for device, n in devices.items())
            line = (f"minipool: embedded pool, {text}, {os.cpu_count()} cores (max_workers= for more, "
                    "MINIPOOL_ADDRESS= for a server)")
            if is_server_running():
                warnings.warn(f"{line}; a server runs on this machine's port {DEFAULT_PORT}: "
                              "Executor('127.0.0.1') would use it", RuntimeWarning, stacklevel=2)
            else:
                print(line, file=sys.stderr, flush=True)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Return a Future of fn(*args, **kwargs), which runs on one worker. Every keyword reaches `fn`.

        Arguments are copied now; changing them later changes nothing. Raises pickle.PicklingError naming what cannot
        be pickled, TooLarge, RuntimeError after shutdown, BrokenExecutor after a failed initializer.
        """
        if "timeout" in self._options:
            raise TypeError("options(timeout=) is for calls that wait; a limit on a job's run time is job_timeout")
        return self._client.submit(self, fn, args, kwargs)

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None,
            chunksize: int = 1, buffersize: int | None = None) -> Iterator[Any]:
        """Return an iterator of fn's results in the order of the input, as in the newest standard library.

        `timeout` seconds count from this call; `chunksize` inputs are one job; `buffersize` bounds what waits unread.
        """
        _check_counts(chunksize=chunksize, buffersize=buffersize)
        deadline = None if timeout is None else time.monotonic() + timeout
        calls: Iterator[Any] = (inputs := zip(*iterables, strict=False))
        if chunksize > 1:
            calls = iter(lambda: tuple(itertools.islice(inputs, chunksize)), ())
            fn = functools.partial(_in_worker, "call_each", fn)
        jobs = (self.submit(fn, *args) for args in calls)       # lazily; all that may wait unread are submitted now
        futures = collections.deque(itertools.islice(jobs, buffersize))

        def results() -> Iterator[Any]:
            try:
                while futures:
                    futures.extend(itertools.islice(jobs, 1))
                    left = None if deadline is None else deadline - time.monotonic()
                    # it cancels a future that is late, and keeps no value in this frame
                    yield _base._result_or_cancel(futures.popleft(), left)
            finally:
                for future in futures:
                    future.cancel()
        return results() if chunksize == 1 else itertools.chain.from_iterable(results())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs; wait for those there are, or cancel what has not begun. Of a view: this view only."""
        self._closed = True
        if cancel_futures:
            for future in self._mine():
                future.cancel()
        if self._parent is None:
            self._client.close(wait)
        elif wait:
            with self._client.lend():       # a view that was had in a job
                concurrent.futures.wait(self._mine())

    def _mine(self) -> list[Future]:
        return [f for f in list(self._client.unfinished.values()) if self._parent is None or f._view is self]

    def kill_workers(self) -> None:
        """End this executor's running jobs by force (they raise JobKilled), cancel the rest, shut down."""
        self.shutdown(wait=False, cancel_futures=True)
        self._client.kill(self._mine(), "kill_workers() was called")
        self.shutdown(wait=True)

    terminate_workers = kill_workers        # a worker's process has nothing to save: there is one way to end it

    def options(self, **options: Any) -> Executor:
        """Return a light view of this executor whose jobs carry these options; views nest.

        `retries` runs a job again that many times on exceptions (of the types in `retry_on`); `priority`: larger
        first; `on`: only on these workers, nodes or tags, `prefer`: there if there is one; `name` for logs;
        `job_timeout`: seconds that it may run, then its worker is ended and the future raises JobTimeout;
        `cancel_running`: so does `Future.cancel`; `max_deaths`: workers it may take down. Raises TypeError.
        """
        for name, value in options.items():
            if name not in _OPTIONS:
                raise TypeError(f"options() got unknown {name}; known are {', '.join(sorted(_OPTIONS))}")
            if name in ("on", "prefer", "retry_on") and value is not None:      # one, or several
                options[name] = value = (value,) if isinstance(value, str | type) else tuple(value)
            if value is not None and not _OPTIONS[name](value):     # as the server will look
                raise TypeError(f"{name}= cannot be {value!r:.100}")
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._options = {**self._options, **options}
        view._parent, view._closed, view._wired = self, False, (None, None, None)
        if (on := options.get("on")) and not view._admitted():
            known = ", ".join(sorted({tag for worker in self._client.workers for tag in worker["tags"]}))
            text = f"on={list(on)} names no worker, node or tag; there are {known or 'none yet'}"
            if self._client.child:
                raise ValueError(text)          # for an embedded pool cannot grow
            warnings.warn(f"{text}: such jobs wait until one joins", RuntimeWarning, stacklevel=2)
        return view

    def _admitted(self) -> list[dict[str, Any]]:
        """Return the workers there are that `on` admits; of an embedded pool when all have come, or cannot."""
        if self._client.child:
            with contextlib.suppress(TimeoutError):     # one that does not come is in nobody's way here
                self.wait_for_workers(self.size, 10)
        on = self._options.get("on")
        return [worker for worker in self._client.workers if not (on and set(on).isdisjoint(worker["tags"]))]

    def on_start(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Run fn(*args, **kwargs) once on every worker, late ones too, before later jobs; like an initializer."""
        self._client.add_to_log(fn, args, kwargs)

    def actor(self, cls: type, /, *args: Any, **kwargs: Any) -> Actor:
        """Return a handle on an instance cls(*args, **kwargs) in one worker (`options(on=)`: one of those).

        That with the fewest actors of this program. If there is none yet it waits, `options(timeout=)` seconds at most.
        """
        if not isinstance(cls, type):
            raise TypeError(f"actor() needs a class, not {cls!r}")
        client = self._client
        with client._changed:
            if not (there := client._changed.wait_for(self._admitted, self._options.get("timeout"))):
                raise TimeoutError(f"no worker has come for the actor {cls.__qualname__}")
        taken = collections.Counter(actor._on for actor in _actors)
        worker = min((worker["name"] for worker in there), key=taken.__getitem__)
        name = client.session, next(client.numbers)
        view = self.options(on=worker, max_deaths=0, name=f"{cls.__qualname__}()")      # there, and at most once
        made = client.submit(view, _in_worker, ("make_instance", name, cls, args, kwargs), {})
        if (call := made._call) and not call[1]:
            made.exception()        # it waits for futures, and no call of a method may overtake it
        return Actor(cls, name, worker, view, made)

    def wait_for_workers(self, n: int, timeout: float | None = None) -> None:
        """Block until there are `n` workers; raise TimeoutError after `timeout` seconds."""
        client = self._client
        with client._changed:
            if not client._changed.wait_for(lambda: len(client.workers) >= n, timeout):
                raise TimeoutError(f"{len(client.workers)} of {n} workers are there after {timeout:g} s")

    def drain(self, on: str | Iterable[str]) -> None:
        """Have these workers, nodes or tags end what they run, take no more and leave.

        A node goes with its last worker. Returns once they have been told. Raises ValueError if there is none.
        """
        view = self.options()
        view._options["on"] = (on,) if isinstance(on, str) else tuple(on)       # those there are, not those to come
        if self._client.child or not view._admitted():
            raise ValueError(f"no worker, node or tag that could be drained is called {on!r}")
        with contextlib.suppress(WorkerDied):       # it has ended, and another comes: that is not drained
            view.run(_in_worker, "leave", "it was drained", True)

    def restart(self, timeout: float = 10.0) -> None:
        """Have all worker processes begin anew: this executor's futures are cancelled, jobs of others end first.

        Returns when there are as many workers as before, or after `timeout` seconds.
        """
        mine, number = self._mine(), len(self._admitted())
        self._client.kill([future for future in mine if future._number in self._client._sent], "restart() was called")
        for future in mine:
            future.cancel()
        with contextlib.suppress(TimeoutError, WorkerDied):     # one that ends meanwhile begins anew by itself
            self.options(timeout=timeout).run(_in_worker, "leave", "restart() was called")
        with contextlib.suppress(TimeoutError):
            self.wait_for_workers(number, timeout)

    def kill(self, target: Future) -> None:
        """End the running job of a future by ending its worker's process; the future raises JobKilled."""
        if not isinstance(target, Future) or target._client is not self._client:
            raise TypeError(f"kill() takes a future of this executor, not {target!r}")
        self._client.kill([target], "kill() was called")

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call fn(*args, **kwargs) now on every worker, on busy ones beside their job; return {worker name: value}.

        With `options(on=)` only there. Each call has a thread of its own, and does not wait for initializers. Raises
        the first exception once all have answered, and TimeoutError after `options(timeout=)` seconds.
        """
        futures = dict[str, Future]()
        for worker in self._admitted():
            view = self.options()
            view._options.update(on=(worker["name"],), beside=True)
            futures[worker["name"]] = self._client.submit(view, fn, args, kwargs)
        late = concurrent.futures.wait(futures.values(), self._options.get("timeout")).not_done
        if late:
            raise TimeoutError(f"{len(late)} of {len(futures)} workers have not answered in time")
        return {name: future.result() for name, future in futures.items()}

    def info(self) -> dict[str, Any]:
        """Return what `minipool status --json` prints; TimeoutError after `options(timeout=)` seconds, or 30."""
        client, timeout = self._client, self._options.get("timeout")
        number, give_up = next(client.numbers), time.monotonic() + (30 if timeout is None else timeout)
        with client._changed:
            while (left := give_up - time.monotonic()) > 0 and client._callback_thread.is_alive():
                client.peer.send(("ask", number, "info"))       # again after a second: it may have been lost
                if client._changed.wait_for(lambda: number in client._answers, min(1.0, left)):
                    return dict(client._answers.pop(number))
        raise TimeoutError("the server did not answer in time, or this executor is shut down")

    @property
    def size(self) -> int:
        """How many workers there are now, at least 1; third-party libraries size their batches by it."""
        child = self._client.child
        return len(child.answer["devices"]) if child else max(1, len(self._client.workers))

    _max_workers = size

    def __repr__(self) -> str:
        devices = ", ".join(sorted({worker["device"] for worker in self._client.workers})) or "no device yet"
        where = "embedded" if self._client.child else format_address(*self._client.peer.address)
        return f"<minipool.Executor {where}, {len(self._client.workers)} workers on {devices}>"


def get_executor() -> Executor:
    """Return the executor that was opened last and is still open; inside a job, one on the same pool.

    A job that waits for a result of that one lends its slot to others meanwhile. Raises RuntimeError if there is none.
    """
    if _here:
        return _here.executor()     # type: ignore[no-any-return]
    for client, executor in reversed(list(_clients.items())):
        if not client.closing and (found := executor()):
            return found
    raise RuntimeError("no executor is open: make one first, for example Executor()")


# ==================================================================================================================
# 8 instances
#
# Objects that live in worker processes from one job to the next: an Actor is one, a Pool has one in every worker. All
# of it is jobs: an actor's calls are for one worker, begin in the order in which they were made, and but once; a pool's
# constructor and updates are entries of the session's log, which every worker has run, in order, before its next job.
# ==================================================================================================================

_actors: weakref.WeakSet[Actor] = weakref.WeakSet()     # the handles of this process


class Actor:
    """A handle on an instance that lives in one worker, had from `Executor.actor`: its methods return Futures.

    Calls of a handle begin in the order in which they were made, one that is given futures when those are done; between
    them the worker takes other jobs. A plain attribute is read by value. What the constructor raised, every use raises.
    A call whose process dies raises WorkerDied, and so does every later one. A handle may be given to jobs and to other
    actors. The instance ends with the last handle in the process that made it.
    """

    def __init__(self, cls: type, name: Name, on: str, at: Executor | None = None, made: Future | None = None) -> None:
        self._cls, self._name, self._on = cls, name, on
        there = at or get_executor().options(on=on, max_deaths=0)     # of a handle that another process sent
        self._view_of = functools.cache(lambda method: there.options(name=f"{cls.__qualname__}.{method}"))
        self._made = made       # its constructor's call, in the process whose handles keep the instance
        _actors.add(self)
        if made:                # a collector, which may call this, takes no lock
            weakref.finalize(self, there._client.later, functools.partial(_end_actor, there, name))

    def _use(self, attribute: str, *call: Any) -> Future:
        view = self._view_of(attribute)
        return view._client.submit(view, _in_worker, ("use_instance", self._name, attribute, *call), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):            # what copy, pickle and inspect look for is not the instance's
            raise AttributeError(name)
        if callable(getattr(self._cls, name, None)):
            return lambda *args, **kwargs: self._use(name, (args, kwargs))
        return self._use(name).result()

    def __reduce__(self) -> Any:
        if self._made:          # a call from elsewhere must not overtake it
            self._made.exception()
        return Actor, (self._cls, self._name, self._on)

    def __repr__(self) -> str:
        return f"<minipool.Actor {self._cls.__qualname__} on {self._on}>"


def _end_actor(view: Executor, name: Name) -> None:
    with contextlib.suppress(RuntimeError, concurrent.futures.BrokenExecutor):      # closed, it has no instances
        view._client.submit(view, _in_worker, ("drop", [name]), {})


class WorkerInterface:
    """What the worker class of a Pool looks like; any class with `run` will do."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do one job; return its result."""
        raise NotImplementedError("a worker class defines run()")

    def handle_update(self, *args: Any, **kwargs: Any) -> None:
        """Take in what `Pool.update_workers` was given, between two jobs."""
        raise NotImplementedError("a worker class that is updated defines handle_update()")


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(call, dict) or not call.keys() <= {"args", "kwargs"}:
        raise TypeError(f'a job, an update or init_data is {{"args": [...], "kwargs": {{...}}}}, not {call!r:.100}')
    return tuple(call.get("args", ())), dict(call.get("kwargs", {}))


class Pool(contextlib.AbstractContextManager["Pool"]):
    """One instance of `worker_class` in every worker, late workers too; its jobs go to whichever is free.

    `init_data` holds the constructor's arguments, as {"args": [...], "kwargs": {...}}; so do jobs those of `run` and
    updates those of `handle_update`. `address` and `secret` as in Executor; with `executor` it works through that one
    and leaves it open. An exception in `run` is raised where its result would come, one in the constructor everywhere.
    """

    def __init__(self, worker_class: type, init_data: dict[str, Any] | None = None, secret: str | None = None,
                 address: str | None = None, *, executor: Executor | None = None) -> None:
        args, kwargs = _arguments(init_data or {})
        self._owned = None if executor else Executor(address, secret=secret)
        self.executor = cast(Executor, executor or self._owned).options(name=f"{worker_class.__qualname__}.run")
        self._client = self.executor._client
        self._name = self._client.session, next(self._client.numbers)
        self.executor.on_start(_in_worker, "make_instance", self._name, worker_class, args, kwargs)

    def map(self, data: Iterable[dict[str, Any]]) -> list[Any]:
        """Return the results in the order of `data`, or raise the first exception and cancel what has not begun."""
        what = map(itertools.repeat, ("use_instance", self._name, "run"))
        return list(self.executor.map(_in_worker, *what, map(_arguments, data)))

    def _jobs(self, data: Iterable[dict[str, Any]], in_order: bool) -> Iterator[Any]:
        """Submit jobs as their results are asked for, no more than keep all workers busy."""
        submit = functools.partial(self.executor.submit, _in_worker, "use_instance", self._name, "run")
        jobs, pending = map(submit, map(_arguments, data)), list[Any]()
        try:
            while pending := [*pending, *itertools.islice(jobs, 2 * self.executor.size + 16 - len(pending))]:
                future = pending[0] if in_order else next(iter(wait(pending, None, "FIRST_COMPLETED").done))
                pending.remove(future)
                yield future
        finally:                # whoever stops asking wants no more
            for future in pending:
                future.cancel()

    def imap(self, data: Iterable[dict[str, Any]]) -> Iterator[Any]:
        """Return an iterator of the results in the order of `data`, read as it goes on, also after an exception."""
        return map(Future.result, self._jobs(data, in_order=True))

    def imap_unordered(self, data: Iterable[dict[str, Any]]) -> Iterator[Any]:
        """Do as `imap`, with the results in the order in which they come."""
        return map(Future.result, self._jobs(data, in_order=False))

    def update_workers(self, data: dict[str, Any]) -> None:
        """Have every worker take in an update before any job submitted from now on; late workers get all, in order."""
        self.executor.on_start(_in_worker, "use_instance", self._name, "handle_update", _arguments(data))

    def get_workers_count(self) -> int:
        """Return how many workers there are now."""
        return len(self._client.workers)

    def get_nodes_count(self) -> int:
        """Return on how many nodes they are."""
        return len({worker["node"] for worker in self._client.workers})

    def close(self) -> None:
        """End this pool's jobs, those that run by force, and its instances; or its executor, if that is its own."""
        self._client.kill(self.executor._mine(), "its pool was closed")
        self.executor.on_start(_in_worker, "drop", [self._name])
        if self._owned:
            self._owned.shutdown()

    def __exit__(self, *exception: object) -> None:
        self.close()


# ==================================================================================================================
# 9 CLI
#
# serve, status, drain, versions, secret. What a person asked for goes to stdout, everything else to stderr. A mistake
# of the user's is one sentence, never a traceback; the exit code says what kind it was.
# ==================================================================================================================

# else 1; argparse ends with 2 for a misused command
_EXIT = ((ServerLost, 3), (TimeoutError, 3), (Refused, 4), (VersionMismatch, 5), (KeyboardInterrupt, 130))


def run_command(options: argparse.Namespace, log_to: Any = None) -> int:
    """Run a command, with the log that MINIPOOL_LOG or -v asks for; a mistake is one sentence and an exit code."""
    level = (os.environ.get("MINIPOOL_LOG") or ("debug" if options.verbose else "info")).upper()
    logging.basicConfig(stream=log_to, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S",
                        level=level if level in logging.getLevelNamesMapping() else "INFO")
    try:
        return int(options.run(options) or 0)
    except (MinipoolError, OSError, OverflowError, ValueError, KeyboardInterrupt) as error:
        print(f"minipool: {error if str(error) else 'interrupted'}", file=sys.stderr)
        return next((code for kind, code in _EXIT if isinstance(error, kind)), 1)


def _print_lines(server: Server, options: argparse.Namespace, source: str) -> None:
    """Print the exact lines to paste for workers and clients."""
    address = server.address
    on_terminal = sys.stdout is not None and sys.stdout.isatty()        # None: it was closed
    prefix = f"MINIPOOL_SECRET={server.secret if on_terminal else '...'} "
    if server.is_local:
        prefix = f"MINIPOOL_SECRET_FILE={options.secret_file} " if options.secret_file else ""
    tls = " --tls" * server.tls
    command = "minipool" if "site-packages" in os.path.abspath(__file__) else "python minipool.py"
    worker = "minipool-worker" if command == "minipool" else "python minipool_worker.py"
    lines = [f"minipool {__version__} server on {address} (Python {PYTHON}); the secret is from {source}",
             f"  workers:  {prefix}{worker} connect {address}{tls}",
             f"  clients:  export {prefix}MINIPOOL_ADDRESS={address}" + "   and Executor(tls=True)" * server.tls,
             f"  status:   {prefix}{command} status --address {address}{tls}        stop: Ctrl-C"]
    if not server.is_local and not server.tls:
        lines.append("  traffic is authenticated but not encrypted: use --tls, or a network you trust"
                     + ("" if on_terminal else "; `minipool secret` prints the secret"))
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:            # a full disk, a reader that has gone: a pool needs neither
        log.warning("the lines to paste could not be printed: %s", error)
        sys.stdout = None               # else what it still holds fails again at the end


def _serve(options: argparse.Namespace) -> int:
    gc.set_threshold(100_000)       # it makes many records, nearly all of which end without a collector
    secret = find_secret(path=options.secret_file, make=True)
    server = Server(options.host, options.port, secret=secret.text, max_value=int(options.max_value), tls=options.tls,
                    dead_after=options.dead_after)
    stop, hurry = threading.Event(), threading.Event()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)     # a descriptor per peer: take what we may have
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with server, contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: (hurry if stop.is_set() else stop).set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)        # a pool outlives the terminal it was started in
        _print_lines(server, options, secret.source)
        if options.with_node:
            from minipool_worker import Node
            stack.enter_context(Node(server.address, secret=server.secret, tls=server.tls))
        while not stop.wait(0.5) and not server.wait(0):
            pass
        if stop.is_set():
            log.info("draining: running jobs have %g s to end; a second signal ends the server at once", DRAIN_SECONDS)
            server.drain(DRAIN_SECONDS, hurry)
    return 70 if server.failure else 0      # an invariant of the scheduler is broken: the server stopped itself


def _look(options: argparse.Namespace) -> Executor:
    return Executor(format_address(*parse_address(options.address)), tls=options.tls, connect_timeout=5,
                    reconnect_timeout=5, secret=find_secret(path=options.secret_file).text).options(timeout=10)


def _status(options: argparse.Namespace) -> None:
    executor = _look(options)
    while True:
        info = executor.info()
        print("\033[H\033[J" * (options.watch and not options.json), end="")       # home, and clear below
        print(json.dumps(info, indent=2) if options.json else _status_text(info), flush=True)
        if not options.watch:
            return
        time.sleep(1)


def _status_text(info: dict[str, Any]) -> str:
    workers, jobs = info["workers"], info["jobs"]
    counts = ", ".join(f"{jobs[s]} {s}" for s in (State.WAITING, State.READY, State.RUNNING, "delivered"))
    head = f"server {info['address']} (Python {info['python']}), nodes: {len(info['nodes'])}, workers: {len(workers)}"
    return "\n".join([head, f"jobs   {counts}", *(
        f"  {w['name']:16}  {w['device']:7} {w['state'] if w['connected'] else 'away':9} "
        f"{w['finished']} finished  {', '.join(w['jobs'])}" for w in workers)])


def _versions(options: argparse.Namespace) -> None:
    from importlib import metadata  # late: slow to import, and nothing else needs it
    print(f"minipool      {__version__}\nprotocol      {PROTOCOL}\npython        {sys.version.split()[0]}")
    for package in ("cloudpickle", "nvidia-ml-py"):
        found = next(iter(metadata.distributions(name=package)), None)
        print(f"{package:13} {found.version if found else 'not installed'}")


def quantity(units: dict[str, float], example: str, text: str) -> float:
    """Read a number with one of these units, for argparse."""
    unit = units.get(text[-1:].upper())
    with contextlib.suppress(ValueError):
        number = float(text[:-1] if unit else text) * (unit or 1)
        if 0 < number < BIGGEST:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")


SIZE = functools.partial(quantity, {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}, "512M or 64G")
TIME = functools.partial(quantity, {"S": 1, "M": 60, "H": 3600, "D": 86400}, "90, 55m or 2h")


def subcommands(program: str, description: str) -> tuple[argparse.ArgumentParser, Callable[..., Any]]:
    """Return a parser, and the function that adds a command to it: name, what runs it, one line of help."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--secret-file", metavar="F", help="file that holds the pool's secret")
        command.add_argument("--tls", action="store_true", help="encrypt: all members of a pool do, or none")
        command.add_argument("-v", "--verbose", action="store_true", help="log every message")
        return command
    return parser, add


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser, add = subcommands("minipool", "A pool of GPU workers across machines.")
    serve = add("serve", _serve, "run the server")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: loopback only)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s; 0: a free one")
    serve.add_argument("--max-value", type=SIZE, default=64 << 30, metavar="SIZE", help="largest value, e.g. 64G")
    serve.add_argument("--dead-after", type=TIME, default=T_DEAD, metavar="S",
                       help="seconds of silence after which a host is lost (default: %(default)g)")
    serve.add_argument("--with-node", action="store_true", help="use this machine's devices too")
    status = add("status", _status, "show nodes, workers and jobs")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--watch", action="store_true", help="anew each second")
    drain = add("drain", lambda options: _look(options).drain(options.on), "let a node end what runs, and leave")
    drain.add_argument("on", metavar="NODE", help="the name of a node or worker, or a tag")
    for looking in (status, drain):
        looking.add_argument("--address", metavar="HOST[:PORT]", help="default: MINIPOOL_ADDRESS, then this machine")
    add("versions", _versions, "show what must agree between machines")
    add("secret", lambda options: print(find_secret(path=options.secret_file).text),
        "print the secret that clients and nodes of this user would use")
    return run_command(parser.parse_args(arguments))


if __name__ == "__main__":
    from minipool import main as _main  # one copy of every class, not two
    raise SystemExit(_main())
