"""What minipool's security costs, and what strangers can do to a pool; as ratios within one run.

    python benchmarks/security_cost.py [--quick] [--part NAME]...

    handshake   connect and prove the secret, beside a bare TCP connect with an echo of one byte
    frame       a small frame, made by its sender and opened by its receiver, beside the same without HMAC
    bulk        a large value in ranges through two connections over loopback, beside plain sendall and recv_into
    hostile     an honest client's jobs per second and new honest handshakes, with and without 1,000 hostile sockets
    idle        an honest client's jobs per second and the server's memory, with and without 2,000 idle clients
    tls         the handshake, a large value in ranges, and a large value to a job and back, with TLS beside without

Beside each figure stands its gate; exit status 1 if any was missed. Whoever else uses the machine falls on both sides
of every ratio alike: the two sides alternate, and medians count. The attacker is a process of its own with the lowest
priority, so that what it computes to attack does not count against the server; what it achieved is printed, because
one that gets no processor at all is no attacker. For that to work all processes are of one session (Linux shares the
processor between sessions first, whatever their priorities).
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import heapq
import hmac
import json
import os
import platform
import random
import resource
import select
import selectors
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chaos  # which finds minipool.py one folder up
from chaos import wait_for_workers

import minipool

MIB = 1 << 20
KEY = bytes(32)                 # of the connections that are made here without a handshake
SMALL = ("finished", 12345, "ok", bytes(120), 0.001, False)     # what a worker says most often
IN_FLIGHT = 200                 # jobs that the honest client has out
CHURN = 450                     # sockets a second that the attacker opens only to close them


# ---- processes of this benchmark's own ----

class Helper:
    """This file started again to play one part. It is told a line and answers with one; it ends with its stdin."""

    def __init__(self, part: str, *arguments: Any) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--helper", part, *map(str, arguments)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)

    def tell(self, *words: Any) -> None:
        assert self.process.stdin
        print(*words, file=self.process.stdin, flush=True)

    def hear(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a helper ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, *words: Any) -> Any:
        self.tell(*words)
        return self.hear()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


class Pool(chaos.Pool):
    """Server and nodes in the session of this program (see above), but not in its group: Ctrl-C is for us to handle."""

    def __init__(self, folder: Path, nodes: int, workers: int, tls: bool) -> None:
        self.tls = tls
        super().__init__(folder, nodes, workers)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *command, *["--tls"] * self.tls], stdout=self.output,
                                stderr=self.output, process_group=0)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        with uninterrupted():
            for _ in range(2):                      # the second time: drain no longer
                for process in [*self.nodes, self.server]:
                    process.terminate()
                time.sleep(0.1)
            self.stop()

    def executor(self) -> minipool.Executor:
        return minipool.Executor(f"127.0.0.1:{self.port}", secret=self.secret.read_text(), tls=self.tls,
                                 connect_timeout=30)

    def wait_for_server(self) -> None:
        give_up = time.monotonic() + 30
        while not minipool.is_server_running(f"127.0.0.1:{self.port}"):
            if time.monotonic() > give_up:
                raise SystemExit("the server did not come up")
            time.sleep(0.05)

    def memory(self) -> float:
        """What the server has in memory now, in MiB."""
        lines = Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def settle(self) -> None:
        """Wait until the server has done with who came or left: else it would do so in the next window."""
        give_up, used = time.monotonic() + 20, self.cpu()
        while time.monotonic() < give_up:
            time.sleep(0.5)
            before, used = used, self.cpu()
            if used - before < 0.05:
                return

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def cpu(self) -> float:
        """Seconds of processor that the server has used."""
        fields = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C while things are being ended would leave processes behind."""
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def new_pool(workers: int, tls: bool = False) -> Iterator[Pool]:
    with tempfile.TemporaryDirectory() as folder, Pool(Path(folder), min(workers, 1), workers, tls) as pool:
        pool.wait_for_server()
        yield pool


# ---- figures and gates ----

class Report:
    """Prints figures, and remembers which gates were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def part(self, title: str) -> None:
        self.title = title
        print(f"\n{title}   (load {os.getloadavg()[0]:.1f})", flush=True)

    def line(self, name: str, *figures: str) -> None:
        print(f"  {name:<44}", *(f"{figure:>12}" for figure in figures), flush=True)

    def gate(self, name: str, value: float, unit: str, *, most: float | None = None, least: float | None = None,
             note: str = "") -> None:
        ok = value <= most if most is not None else value >= (least or 0)
        limit = f"at most {most:g}" if most is not None else f"at least {least:g}"
        print(f"  {name:<44} {value:9.3g} {unit:<4} gate: {limit}{'' if ok else '   MISSED'}{note}", flush=True)
        if not ok:
            self.missed.append(f"{self.title}: {name}")


def median(values: Any) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def without_tags(really: bool = True) -> Iterator[None]:
    """In this process all frames have one and the same tag."""
    real = minipool._tag
    if really:
        minipool._tag = lambda key, number, header, control: KEY
    try:
        yield
    finally:
        minipool._tag = real


# ---- handshake ----

def help_echo() -> None:
    """Echo one byte to whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def serve() -> None:
        while True:
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.sendall(sock.recv(1))

    threading.Thread(target=serve, daemon=True).start()
    say(listener.getsockname()[1])
    sys.stdin.read()


def timed(port: int, talk: Callable[[socket.socket], object]) -> float:
    """Milliseconds to connect and talk."""
    begin = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        talk(sock)
        return (time.perf_counter() - begin) * 1000


def echoed(sock: socket.socket) -> None:
    """Talk to the helper that echoes."""
    sock.sendall(b"x")
    sock.recv(1)


def measure_handshake(report: Report, quick: bool) -> None:
    report.part("handshake")
    taken: dict[str, list[float]] = {"bare": [], "mp1": []}
    with new_pool(0) as pool, Helper("echo") as helper:
        key = minipool.Secret(pool.secret.read_text()).role_key
        port = helper.hear()
        for _ in range(100 if quick else 1000):
            taken["bare"].append(timed(port, echoed))
            taken["mp1"].append(timed(pool.port, lambda sock: minipool.handshake(sock, "client", key)))
    middle = {kind: median(values) for kind, values in taken.items()}
    report.line("connecting, medians", "ms", "/ bare")
    for kind, name in (("bare", "TCP connect, echo of one byte"), ("mp1", "MP1")):
        report.line(name, f"{middle[kind]:.3f}", f"{middle[kind] / middle['bare']:.1f}")
    report.gate("MP1", middle["mp1"], "ms", most=1)


# ---- frame ----

class MemorySeam(minipool.Plain):
    """A seam to itself: what is measured is the frame, not the kernel."""

    def __init__(self) -> None:
        self.sock = socket.socket()                 # never connected
        self.data, self.place = bytearray(), 0

    def send(self, buffers: Any) -> int:
        for buffer in buffers:
            self.data += buffer
        return sum(map(len, buffers))

    def receive_into(self, view: memoryview) -> int:
        count = min(len(view), len(self.data) - self.place)
        view[:count] = memoryview(self.data)[self.place:self.place + count]
        self.place += count
        return count


def frames(count: int) -> tuple[float, float]:
    """Microseconds to send a small frame, and to receive it."""
    there = MemorySeam()
    sender = minipool.Connection(there, KEY, KEY, "server")
    receiver = minipool.Connection(there, KEY, KEY, "worker")
    begin = time.perf_counter()
    for _ in range(count):
        sender.post([SMALL])
        sender.flush()
    sent = time.perf_counter()
    for _ in range(count):
        receiver.receive()
    there.sock.close()
    return (sent - begin) / count * 1e6, (time.perf_counter() - sent) / count * 1e6


def tags(count: int) -> float:
    """Microseconds that making and comparing a tag takes by itself: an upper bound of what it adds to a frame."""
    header = minipool._FRAME.pack(180, 0)
    control, key = bytes(180), hmac.new(KEY, digestmod="sha256")
    tag = minipool._tag(key, 0, header, control)
    begin = time.perf_counter()
    for number in range(count):
        expected = minipool._tag(key, number, header, control)
        hmac.compare_digest(tag, expected)
    return (time.perf_counter() - begin) / count * 1e6


def measure_frame(report: Report, quick: bool) -> None:
    report.part("frame")
    count, rounds = (500, 7) if quick else (2000, 31)
    with_tags, without = [], []
    for turn in range(rounds + 1):
        for bare in (False, True) if turn % 2 else (True, False):
            with without_tags(bare):
                (without if bare else with_tags).append(frames(count))
    alone = median(tags(count) for _ in range(rounds))
    report.line("microseconds per small frame", "with HMAC", "without", "ratio", "HMAC's part")
    for side, name in enumerate(("sender: encode, tag", "receiver: verify, open")):
        ours, bare_us = (median(pair[side] for pair in pairs[1:]) for pairs in (with_tags, without))
        part = median(one[side] - other[side] for one, other in zip(with_tags[1:], without[1:]))
        report.line(name, f"{ours:.2f}", f"{bare_us:.2f}", f"{ours / bare_us:.2f}", f"{part:.2f}")
        report.gate(f"HMAC's part, {name.partition(':')[0]}", max(part, alone), "us", most=5,
                    note=f"   (by itself {alone:.2f})")


# ---- bulk ----

@functools.cache
def server_context() -> ssl.SSLContext:
    return minipool.server_tls()[0]


def seam_of(kind: str) -> Callable[[Any], minipool.Plain]:
    return minipool.Tls if kind == "tls" else minipool.Plain


def help_bulk() -> None:
    """Receive a value as a worker pulls it: two ranges asked for at a time; or all that comes, for comparison."""
    for line in sys.stdin:
        kind, port, size = line.split()[0], *map(int, line.split()[1:])
        buffer = memoryview(bytearray(size))
        dialled = socket.create_connection(("127.0.0.1", port))
        with minipool.dial_tls(dialled, minipool.tls_context())[0] if kind == "tls" else dialled as sock:
            say("connected")
            if kind == "socket":
                minipool.Plain(sock)                # the same options
                have = 0
                while have < size:
                    have += sock.recv_into(buffer[have:])
                sock.sendall(b"x")
            else:
                with without_tags(kind.startswith("bare")):
                    pull(kind, minipool.Connection(seam_of(kind)(sock), KEY, KEY, "server"), buffer)


def pull(kind: str, connection: minipool.Connection, buffer: memoryview) -> None:
    name, size = (b"creator", 1), len(buffer)
    wanted = collections.deque(range(0, size, minipool.RANGE))
    places = {(name, offset): buffer[offset:offset + minipool.RANGE] for offset in wanted}

    def ask() -> None:
        if wanted:
            connection.post([("pull", name, wanted.popleft(), minipool.RANGE)])
            connection.flush()

    missing = len(wanted)
    for _ in range(minipool.PULLS_IN_FLIGHT):
        ask()
    while missing:
        for _, _, _offset, digest, body in connection.receive(places):
            if not kind.startswith("bare") and hashlib.sha256(body).digest() != digest:
                raise SystemExit("a range was spoiled")
            missing -= 1
            ask()
    connection.post([("gone", name)])               # all is here
    connection.flush()


def serve_value(kind: str, connection: minipool.Connection, value: memoryview) -> None:
    """Answer pulls until the other end has everything."""
    while True:
        for message in connection.receive():
            if message[0] == "gone":
                return
            body = value[message[2]:message[2] + message[3]]
            digest = KEY if kind.startswith("bare") else hashlib.sha256(body).digest()
            connection.post([("range", message[1], message[2], digest, body)])
            connection.flush()


def transfer(kind: str, helper: Helper, value: memoryview) -> float:
    """MB/s of one value to the helper."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)                     # the helper may have ended
        helper.tell(kind, listener.getsockname()[1], len(value))
        accepted = listener.accept()[0]
        with server_context().wrap_socket(accepted, server_side=True) if kind == "tls" else accepted as sock:
            helper.hear()
            begin = time.perf_counter()
            if kind == "socket":
                minipool.Plain(sock)
                sock.sendall(value)
                sock.recv(1)
            else:
                with without_tags(kind.startswith("bare")):
                    connection = minipool.Connection(seam_of(kind)(sock), KEY, KEY, "worker")
                    serve_value(kind, connection, value)
                    seconds = time.perf_counter() - begin
                    connection.close()              # its writer thread ends
                    return len(value) / seconds / 1e6
            return len(value) / (time.perf_counter() - begin) / 1e6


def timed_digest(value: memoryview) -> float:
    """MB/s of the digests alone: no end of a connection can be faster than that."""
    part = value[:16 * MIB]
    begin = time.perf_counter()
    for offset in range(0, len(part), minipool.RANGE):
        hashlib.sha256(part[offset:offset + minipool.RANGE]).digest()
    return len(part) / (time.perf_counter() - begin) / 1e6


def measure_bulk(report: Report, quick: bool) -> None:
    report.part("bulk")
    value = memoryview(random.Random(1).randbytes((16 if quick else 128) * MIB))
    kinds = ["socket", "bare", "ours"]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Helper("bulk") as helper:
        for turn in range((3 if quick else 9) + 1):
            for kind in kinds if turn % 2 else reversed(kinds):
                rates[kind].append(transfer(kind, helper, value))
    rate = {kind: median(values[1:]) for kind, values in rates.items()}
    digest = median(timed_digest(value) for _ in range(9))
    report.line(f"{len(value) // MIB} MiB over loopback, two processes", "MB/s", "/ plain", "/ untagged")
    for kind, name in (("socket", "plain sendall, recv_into"), ("bare", "ranges without digests and tags"),
                       ("ours", "ranges with digests and tags")):
        report.line(name, f"{rate[kind]:.0f}", f"{rate[kind] / rate['socket']:.2f}", f"{rate[kind] / rate['bare']:.2f}")
    report.line("SHA-256 of ranges by itself, at one end", f"{digest:.0f}", f"{digest / rate['socket']:.2f}")
    report.gate("with digests and tags / plain", rate["ours"] / rate["socket"], "", least=0.5)


# ---- the honest client, for both parts below ----

def same(value: Any) -> Any:
    return value


def honest_jobs(executor: minipool.Executor, seconds: float) -> float:
    """Jobs per second over a window of time."""
    out: collections.deque[minipool.Future] = collections.deque()
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        while len(out) < IN_FLIGHT:
            out.append(executor.submit(same, done))
        for _ in range(IN_FLIGHT // 2):
            out.popleft().result()
            done += 1
    rate = done / (time.perf_counter() - begin)
    for future in out:
        future.result()
    return rate


def help_probe(port: str, secret_file: str) -> None:
    """Dial in as a new honest client every 50 ms, for as long as was said; tell the milliseconds each took."""
    key = minipool.Secret(Path(secret_file).read_text()).role_key
    for line in sys.stdin:
        taken, refused = [], []
        give_up = time.monotonic() + float(line)
        while time.monotonic() < give_up:
            try:
                taken.append(timed(int(port), lambda sock: minipool.handshake(sock, "client", key)))
            except (OSError, minipool.MinipoolError) as error:
                refused.append(f"{type(error).__name__}: {error}")
            time.sleep(0.05)
        say([taken, refused])


class Window:
    """What was seen in one window of time."""

    def __init__(self, pool: Pool, executor: minipool.Executor, probe: Helper, seconds: float) -> None:
        before, begin = pool.cpu(), time.monotonic()
        probe.tell(seconds)
        self.rate = honest_jobs(executor, seconds)
        self.cpu = (pool.cpu() - before) / (time.monotonic() - begin)
        self.handshakes, self.refused = probe.hear()
        self.memory, self.descriptors = pool.memory(), pool.descriptors()


# ---- hostile ----

class Hostile:
    """One of the attacker's sockets: opened again and again."""

    def __init__(self, attack: Attack, kind: str) -> None:
        self.attack, self.kind = attack, kind
        self.sock: socket.socket | None = None
        self.life = 0           # counts the sockets, so that what was planned for an earlier one is forgotten
        self.sent = 0

    def open(self) -> None:
        self.close()
        self.life += 1
        self.sent = 0
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.attack.opened[self.kind] += 1
        try:
            if self.sock.connect_ex(("127.0.0.1", self.attack.port)) not in (0, 115):       # EINPROGRESS
                raise OSError
            self.attack.selector.register(self.sock, selectors.EVENT_READ, self)
        except OSError:
            self.attack.failed += 1
        self.attack.plan(self, {"slow": 0.5, "garbage": random.uniform(0.1, 4.5),
                                "churn": self.attack.each / CHURN}[self.kind])

    def close(self) -> None:
        if self.sock:
            with contextlib.suppress(KeyError, ValueError):
                self.attack.selector.unregister(self.sock)
            if self.kind == "churn" and random.random() < 0.5:         # half of them by a reset
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.sock.close()
            self.sock = None

    def act(self) -> None:
        """What it does when its time has come."""
        try:
            assert self.sock
            if self.kind == "slow":
                hello = minipool.first_hello("client")
                self.sock.send(hello[self.sent:self.sent + 1])
                self.sent += 1
                self.attack.plan(self, 0.5)
            elif self.kind == "garbage":
                self.sock.send(random.choice(self.attack.garbage))
                self.attack.plan(self, 6)       # it should have been shown the door by then
                if self.sent:
                    self.open()
                self.sent += 1
            else:
                self.open()
        except OSError:
            self.open()

    def hear(self) -> None:
        """The server closed, or answered a hello: nothing here is worth an answer."""
        try:
            assert self.sock
            if self.sock.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.attack.closed += 1
        self.open()


class Attack:
    """A third of the sockets dribble a hello, a third say what is none, a third come and go."""

    def __init__(self, port: int, sockets: int) -> None:
        self.port, self.each = port, sockets // 3
        self.selector = selectors.DefaultSelector()
        self.planned: list[tuple[float, int, int, Hostile]] = []
        self.order = 0
        self.opened: collections.Counter[str] = collections.Counter()
        self.failed = self.closed = 0
        hello = minipool.first_hello("client")
        self.garbage = [b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n",
                        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(50),
                        os.urandom(200), hello[:8] + os.urandom(56), hello + os.urandom(32), b"mini\n", bytes(64)]
        self.sockets = [Hostile(self, kind) for kind in ("slow", "garbage", "churn") for _ in range(self.each)]

    def plan(self, hostile: Hostile, seconds: float) -> None:
        self.order += 1
        heapq.heappush(self.planned, (time.monotonic() + seconds, self.order, hostile.life, hostile))

    def run(self, command: int) -> dict[str, Any]:
        """Attack until something can be read from `command`."""
        begin, cpu = time.monotonic(), time.process_time()
        for hostile in self.sockets:
            hostile.open()
        self.selector.register(command, selectors.EVENT_READ)
        say("up")
        ready, cpu_begin = False, time.monotonic()
        while not ready:
            while self.planned and self.planned[0][0] <= time.monotonic():
                _, _, life, hostile = heapq.heappop(self.planned)
                if life == hostile.life:
                    hostile.act()
            wait = max(0.0, self.planned[0][0] - time.monotonic()) if self.planned else 0.1
            for key, _ in self.selector.select(min(wait, 0.1)):
                if key.data is None:
                    ready = True
                elif key.data.sock is key.fileobj:
                    key.data.hear()
        seconds = time.monotonic() - begin
        held = sum(hostile.sock is not None for hostile in self.sockets)
        for hostile in self.sockets:
            hostile.close()
        return {"held": held, "seconds": seconds, "opened": dict(self.opened), "failed": self.failed,
                "closed": self.closed, "cpu": (time.process_time() - cpu) / (time.monotonic() - cpu_begin)}


def help_attack(port: str, sockets: str, nice: str) -> None:
    os.nice(int(nice))
    while sys.stdin.readline():             # "on"; then "off", or the end
        answer = Attack(int(port), int(sockets)).run(sys.stdin.fileno())
        if not sys.stdin.readline():
            return
        say(answer)


def measure_hostile(report: Report, quick: bool, nice: int = 19) -> None:
    report.part("hostile")
    sockets, rounds, seconds = (300, 2, 0.7) if quick else (1000, 6, 5.0)
    calm: list[Window] = []
    wild: list[Window] = []
    attacks = []
    with new_pool(2) as pool, pool.executor() as executor, \
            Helper("attack", pool.port, sockets, nice) as attacker, Helper("probe", pool.port, pool.secret) as probe:
        wait_for_workers(executor, 2)
        Window(pool, executor, probe, min(seconds, 2))                  # all warm
        calm.append(Window(pool, executor, probe, seconds))
        for _ in range(rounds):
            attacker.ask("on")
            wild.append(Window(pool, executor, probe, seconds))
            attacks.append(attacker.ask("off"))
            pool.settle()
            calm.append(Window(pool, executor, probe, seconds))
    ratios = [window.rate / ((calm[n].rate + calm[n + 1].rate) / 2) for n, window in enumerate(wild)]
    report.line(f"{sockets:,} hostile sockets, {seconds:g} s windows, medians", "without", "with", "ratio")
    jobs, cpu, fine, worst = ([f(windows) for windows in (calm, wild)] for f in (
        lambda ws: median(w.rate for w in ws), lambda ws: median(w.cpu for w in ws),
        lambda ws: median(t for w in ws for t in w.handshakes), lambda ws: max(t for w in ws for t in w.handshakes)))
    report.line("honest jobs per second", *(f"{v:,.0f}" for v in jobs), f"{median(ratios):.2f}")
    report.line("server's processor seconds per second", *(f"{v:.2f}" for v in cpu))
    report.line("new honest handshake, median ms", *(f"{v:.2f}" for v in fine), f"{fine[1] / fine[0]:.1f}")
    report.line("new honest handshake, worst ms", *(f"{v:.2f}" for v in worst))
    report.line("server's descriptors", *(f"{ws[-1].descriptors}" for ws in (calm, wild)),
                f"({calm[0].descriptors} first)")
    report.line("server's memory, MiB", *(f"{ws[-1].memory:.1f}" for ws in (calm, wild)),
                f"({calm[0].memory:.1f} first)")
    per_second = {kind: median(a["opened"][kind] / a["seconds"] for a in attacks) for kind in attacks[0]["opened"]}
    total = {name: sum(a[name] for a in attacks) for name in ("failed", "closed")}
    report.line(f"attacker (nice {nice}): opened per second", *(f"{k} {v:.0f}" for k, v in per_second.items()))
    report.line("attacker: processor; held; closed by the server", f"{median(a['cpu'] for a in attacks):.2f}",
                f"{median(a['held'] for a in attacks):.0f}", f"{total['closed']}")
    if total["failed"]:
        report.line("attacker: connects that failed", f"{total['failed']}")
    refused = [why for window in wild for why in window.refused]
    for why in refused[:3]:
        print(f"    {why}")
    report.gate("honest jobs with / without, median", median(ratios), "", least=0.8,
                note="   (" + " ".join(f"{r:.2f}" for r in ratios) + ")")
    report.gate("new honest handshake in the attack, median", fine[1], "ms", most=50)
    report.gate("honest handshakes refused", len(refused), f"of {sum(len(w.handshakes) for w in wild) + len(refused)}",
                most=0)
    report.gate("the attack's strength, churn / planned", per_second["churn"] / CHURN, "", least=0.8)


# ---- idle ----

class IdleClient:
    """An authenticated client that has announced itself and then says nothing."""

    def __init__(self, port: int, key: minipool.KeySource) -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        keys, _ = minipool.handshake(sock, "client", key)
        self.sock = sock
        self.connection = minipool.Connection(minipool.Plain(sock), keys.up, keys.down, "server")
        self.connection._scratch = memoryview(b"")          # this process would need more than the server
        info = {"session": os.urandom(16), "name": "idle", "python": minipool.PYTHON, "max_workers": None,
                "workers_seen": 0}
        self.send(("client", info, []))

    def send(self, message: minipool.Message) -> None:
        self.connection.post([message])
        self.connection.flush()


def help_idle(port: str, clients: str, secret_file: str) -> None:
    key = minipool.Secret(Path(secret_file).read_text()).role_key
    while sys.stdin.readline():             # "on"; then "off", or the end
        poll, begin = select.epoll(), time.monotonic()
        poll.register(sys.stdin)
        held: dict[int, IdleClient] = {}
        welcomed: set[int] = set()
        lost, told = 0, False
        while True:
            if len(held) + lost < int(clients):
                try:
                    client = IdleClient(int(port), key)
                    held[client.sock.fileno()] = client
                    poll.register(client.sock, select.EPOLLIN)
                except OSError:
                    lost += 1
            elif len(welcomed) == len(held) and not told:
                told = True
                say({"held": len(held), "lost": lost, "seconds": time.monotonic() - begin})
            ready = [number for number, _ in poll.poll(0.1 if told else 0)]
            for number in ready:
                if number in held and held[number].sock.recv(65536):
                    welcomed.add(number)
                elif number in held:
                    poll.unregister(number)
                    welcomed.discard(number)
                    held.pop(number).sock.close()
                    lost += 1
            if sys.stdin.fileno() in ready:
                break
        if not sys.stdin.readline():
            return
        for client in held.values():
            client.send(("bye", "enough"))
            client.sock.close()
        poll.close()
        say({"lost": lost})


def measure_idle(report: Report, quick: bool) -> None:
    report.part("idle")
    clients, rounds, seconds = (300, 1, 0.8) if quick else (2000, 5, 4.0)
    clients = min(clients, minipool.PEERS - 100, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)
    calm: list[Window] = []
    crowded: list[Window] = []
    held, lost, dialling = [], 0, []
    with new_pool(2) as pool, pool.executor() as executor, Helper("idle", pool.port, clients, pool.secret) as idle, \
            Helper("probe", pool.port, pool.secret) as probe:
        wait_for_workers(executor, 2)
        Window(pool, executor, probe, min(seconds, 2))
        calm.append(Window(pool, executor, probe, seconds))
        for _ in range(rounds):
            answer = idle.ask("on")
            pool.settle()
            held.append(answer["held"])
            dialling.append(answer["seconds"])
            crowded.append(Window(pool, executor, probe, seconds))
            lost += idle.ask("off")["lost"]
            pool.settle()
            calm.append(Window(pool, executor, probe, seconds))
    ratios = [window.rate / ((calm[n].rate + calm[n + 1].rate) / 2) for n, window in enumerate(crowded)]
    growth = [window.memory - calm[0].memory for window in crowded]
    report.line(f"{clients:,} idle clients, {seconds:g} s windows, medians", "without", "with", "ratio")
    for name, form, figure in (
            ("busy client's jobs per second", "{:,.0f}", lambda ws: median(w.rate for w in ws)),
            ("server's processor seconds per second", "{:.2f}", lambda ws: median(w.cpu for w in ws)),
            ("new honest handshake, median ms", "{:.2f}", lambda ws: median(t for w in ws for t in w.handshakes))):
        one, other = figure(calm), figure(crowded)
        report.line(name, form.format(one), form.format(other), f"{other / one:.2f}")
    report.line("server's memory, MiB", f"{calm[0].memory:.1f}", f"{crowded[0].memory:.1f}",
                f"({calm[-1].memory:.1f} last)")
    report.line("held; lost; seconds to let all in", f"{min(held)}", f"{lost}", f"{median(dialling):.2f}")
    report.gate("server's memory growth" + (", for 2,000" if clients != 2000 else ""), growth[0] * 2000 / clients,
                "MiB", most=150, note=f"   (at most {max(growth):.0f} MiB in any round)")
    report.gate("busy client's jobs with / without, median", median(ratios), "", least=0.9,
                note="   (" + " ".join(f"{r:.2f}" for r in ratios) + ")")
    report.gate("idle clients that were lost", lost, "", most=0)


# ---- tls ----

def there_and_back(executor: minipool.Executor, value: bytes) -> float:
    """MB/s of a value that a job takes and gives back, counted once in each direction."""
    begin = time.perf_counter()
    answer = executor.submit(same, value).result()
    seconds = time.perf_counter() - begin
    if answer != value:
        raise SystemExit("a value was spoiled")
    return 2 * len(value) / seconds / 1e6


def measure_tls(report: Report, quick: bool) -> None:
    report.part("tls")
    size, rounds = 64, 3 if quick else 9
    value = random.Random(1).randbytes(size * MIB)
    ranges: dict[str, list[float]] = {"ours": [], "tls": []}
    jobs: dict[str, list[float]] = {"ours": [], "tls": []}
    with new_pool(1) as plain, new_pool(1, tls=True) as tls:
        measure_tls_handshake(report, 100 if quick else 500, plain, tls)
        with Helper("bulk") as helper:
            for turn in range(rounds + 1):
                for kind in ranges if turn % 2 else reversed(ranges):
                    ranges[kind].append(transfer(kind, helper, memoryview(value)))
        os.environ["MINIPOOL_SHARED_MEMORY"] = "0"      # on the wire, as between hosts
        minipool.open_place = lambda place, size: None
        with plain.executor() as one, tls.executor() as other:
            executors = {"ours": one, "tls": other}
            for turn in range(rounds + 1):
                for kind in jobs if turn % 2 else reversed(jobs):
                    jobs[kind].append(there_and_back(executors[kind], value))
    report.line(f"{size} MiB over loopback, MB/s, medians", "without", "with TLS", "ratio")
    for name, rates in (("in ranges through one connection", ranges), ("to a job and back", jobs)):
        without, encrypted = (median(rates[kind][1:]) for kind in ("ours", "tls"))      # the first ones warm up
        report.line(name, f"{without:.0f}", f"{encrypted:.0f}", f"{encrypted / without:.2f}")
    ratios = [encrypted / without for without, encrypted in zip(jobs["ours"][1:], jobs["tls"][1:])]
    report.gate("to a job and back, with / without, median", median(ratios), "", least=0.5,
                note="   (" + " ".join(f"{r:.2f}" for r in ratios) + ")")


def measure_tls_handshake(report: Report, times: int, plain: Pool, tls: Pool) -> None:
    context = minipool.tls_context()
    taken: dict[str, list[float]] = {"bare": [], "mp1": [], "tls": []}
    plain_key, tls_key = (minipool.Secret(pool.secret.read_text()).role_key for pool in (plain, tls))

    def encrypted(sock: socket.socket) -> None:
        inner, binding = minipool.dial_tls(sock, context)
        with inner:
            minipool.handshake(inner, "client", tls_key, binding=binding)

    with Helper("echo") as helper:
        port = helper.hear()
        for _ in range(times):
            taken["bare"].append(timed(port, echoed))
            taken["mp1"].append(timed(plain.port, lambda sock: minipool.handshake(sock, "client", plain_key)))
            taken["tls"].append(timed(tls.port, encrypted))
    middle = {kind: median(values) for kind, values in taken.items()}
    report.line("connecting, medians", "ms", "/ bare")
    for kind, name in (("bare", "TCP connect, echo of one byte"), ("mp1", "MP1"), ("tls", "TLS, then MP1")):
        report.line(name, f"{middle[kind]:.3f}", f"{middle[kind] / middle['bare']:.1f}")


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "handshake": measure_handshake, "frame": measure_frame, "bulk": measure_bulk, "hostile": measure_hostile,
    "idle": measure_idle, "tls": measure_tls}
HELPERS: dict[str, Callable[..., None]] = {
    "echo": help_echo, "bulk": help_bulk, "probe": help_probe, "attack": help_attack, "idle": help_idle}


def main() -> int:
    if sys.argv[1:2] == ["--helper"]:
        with contextlib.suppress(BrokenPipeError):      # nobody waits for the answer any more
            HELPERS[sys.argv[2]](*sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller: half a minute, and less to be trusted")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one (may be repeated)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))             # then everything is ended as by Ctrl-C
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
          + (", quick" if options.quick else ""))
    report = Report()
    for name in options.part or PARTS:
        PARTS[name](report, options.quick)
    print(f"\nload at the end {os.getloadavg()[0]:.1f};",
          f"gates missed: {'; '.join(report.missed)}" if report.missed else "every gate holds")
    return int(bool(report.missed))


if __name__ == "__main__":
    raise SystemExit(main())
