"""What this machine can do at best, and what its processes hold; Linux only, by plain sockets and /proc.

    python benchmarks/machine.py        # prints the calibration that suite.py prints beside its figures

A pool's round trip cannot be shorter than the same four hops through bare sockets, and its large values cannot travel
faster than loopback carries bytes. So each figure of a pool has its floor here, measured minutes before or after it.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MB, MIB = 1_000_000, 1 << 20
CHUNK = 256 << 10       # bytes of one write: about what a pipe or a socket takes at once; and of a range
DIGEST = hashlib.sha256().digest_size
SIZE = struct.Struct("!Q")

# what calibrate() returns: its title, its unit, and how many digits say something
CALIBRATION = {
    "start": ("start and end of a bare interpreter", "ms", 1),
    "echo": ("round trip of 100 bytes over loopback TCP", "ms", 3),
    "relay": ("the same through four hops: client, server, worker, server, client", "ms", 3),
    "sha256": ("SHA-256", "MB/s", 0),
    "loopback": ("loopback TCP, one connection", "MB/s", 0),
}


# ---- processes ----

def children(pid: int) -> list[int]:
    """The children of a process, by /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs, and so on."""
    found = children(pid)
    for child in found:
        found += children(child)        # the list grows while it is walked
    return found


def status(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB: VmRSS is what it has in memory now, VmHWM the most it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / MB


def forget_peaks(pids: Iterable[int]) -> None:
    """Let VmHWM begin anew, where the kernel allows that."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def pss(pids: Iterable[int]) -> float:
    """MB that these processes hold together, a shared page divided among those who share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):      # it may end at any moment
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total * 1024 / MB


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def describe() -> str:
    """This machine in words that name neither it nor its owner."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}")


# ---- calibration ----

def pipe(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until no more comes."""
    buffer = memoryview(bytearray(CHUNK))
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            target.sendall(buffer[:size])


def answer(port: int) -> None:
    """Serve one connection after the other: echo, through the process at `port` if there is one."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        with listener.accept()[0] as client:
            no_delay(client)
            if not port:
                pipe(client, client)
                continue
            with dial(port) as worker:
                threading.Thread(target=pipe, args=(worker, client), daemon=True).start()
                pipe(client, worker)


def drain(_port: int) -> None:
    """Read all that comes on one connection, then say so with one byte."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    buffer = bytearray(CHUNK)
    with listener.accept()[0] as client:
        while client.recv_into(buffer):
            pass
        client.sendall(b"!")


def echo_values(_port: int) -> None:
    """Receive values on one connection and send each back once it is whole, as a worker does with its job's."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    with listener.accept()[0] as client, contextlib.suppress(ConnectionError):
        no_delay(client)
        while True:
            send_value(client, receive_value(client))


HELPERS = {"answer": answer, "drain": drain, "echo_values": echo_values}


@contextlib.contextmanager
def helper(part: str, port: int = 0) -> Iterator[int]:
    """This file started again to play a part; gives the port where it listens."""
    process = subprocess.Popen([sys.executable, __file__, part, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def no_delay(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def dial(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    no_delay(sock)
    return sock


def send_value(sock: socket.socket, value: memoryview) -> None:
    """Send a value in ranges, before each its SHA-256; the kernel carries one while the next is hashed."""
    sock.sendall(SIZE.pack(len(value)), socket.MSG_MORE)
    for start in range(0, len(value), CHUNK):
        part = value[start:start + CHUNK]
        sock.sendall(hashlib.sha256(part).digest(), socket.MSG_MORE)
        sock.sendall(part)


def receive_value(sock: socket.socket) -> memoryview:
    """Receive such a value where it will stay, and check it. Raises ConnectionError at the end of the stream."""
    value = memoryview(bytearray(SIZE.unpack(receive_exactly(sock, SIZE.size))[0]))
    for start in range(0, len(value), CHUNK):
        expected, part = receive_exactly(sock, DIGEST), value[start:start + CHUNK]
        have = 0
        while have < len(part):
            have += sock.recv_into(part[have:])
        if hashlib.sha256(part).digest() != expected:
            raise ValueError("a range was spoiled")
    return value


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("the stream has ended")
    return data


def round_trip(port: int, times: int) -> float:
    """The median milliseconds of a round trip of 100 bytes."""
    taken = []
    with dial(port) as sock:
        for _ in range(times):
            begin = time.perf_counter()
            sock.sendall(bytes(100))
            sock.recv(100, socket.MSG_WAITALL)
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1000


def loopback(size: int) -> float:
    """MB/s of bytes that one process sends and another reads."""
    data = memoryview(bytes(CHUNK))
    with helper("drain") as port, dial(port) as sock:
        begin = time.perf_counter()
        for _ in range(size // CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return size / (time.perf_counter() - begin) / MB


def interpreter_start(times: int) -> float:
    """The median milliseconds from the start of an interpreter that does nothing to its end."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1000


def digest(size: int) -> float:
    data = bytes(size)
    begin = time.perf_counter()
    hashlib.sha256(data).digest()
    return size / (time.perf_counter() - begin) / MB


def calibrate(quick: bool = False) -> dict[str, float]:
    """Measure what CALIBRATION names; a few seconds."""
    less = 10 if quick else 1
    with helper("answer") as worker, helper("answer", worker) as server:
        echo, relay = round_trip(worker, 2000 // less), round_trip(server, 2000 // less)
    return {"start": interpreter_start(20 // less), "echo": echo, "relay": relay,
            "sha256": digest(256 * MIB // less), "loopback": loopback(1024 * MIB // less)}


def main() -> int:
    if sys.argv[1:2]:
        HELPERS[sys.argv[1]](int(sys.argv[2]))
        return 0
    print(describe())
    for name, value in calibrate().items():
        title, unit, digits = CALIBRATION[name]
        print(f"  {title:<68} {value:10,.{digits}f} {unit}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
