"""How much memory the server needs, whatever is offered to it: values pass through it in ranges, never whole.

    python benchmarks/memory.py --offer 10G --jobs 5000 --workers 2     # arguments of 2 MB, --window of them at a time
    python benchmarks/memory.py --offer 10G --jobs 175000               # arguments of 60 KB, which ride in messages
    python benchmarks/memory.py --offer 10G --jobs 5000 --window 0      # everything submitted at once
    python benchmarks/memory.py --value 3G                              # one value, there and back

A server and a node run as programs of their own; this one is the client. Printed: the peaks of memory (VmHWM) of server
and client, the wall time, and how many results were wrong. Exit status 1 if any was, or the server's peak was above
--limit. All arguments are one bytes object that is sent from where it lies. Below 64 KiB it is copied into a message of
each job, so everything submitted at once is then as much memory of the client.
"""
from __future__ import annotations

import argparse
import itertools
import os
import pickle
import random
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from chaos import Pool, wait_for_workers  # which finds minipool.py one folder up

import minipool

MIB = 1 << 20

# server and node are to be as on other hosts, with which no memory is shared
os.environ["MINIPOOL_SHARED_MEMORY"] = "0"
minipool.open_place = lambda place, size: None


class Shared:
    """Bytes that are sent from where they lie: nothing of them is copied into the pickle."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return memoryview, (pickle.PickleBuffer(self.data),)


def job(number: int, data: Any, seconds: float) -> tuple[int, int]:
    """Take time, and return what the caller can check."""
    time.sleep(seconds)
    return number, zlib.crc32(data)


def same(value: bytes) -> bytes:
    return value


def peak(pid: int) -> float:
    """The most memory that a process ever had, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def offer(executor: minipool.Executor, options: argparse.Namespace) -> tuple[int, int]:
    """Offer many arguments; return how many bytes passed, and how many results were wrong."""
    size = options.offer // options.jobs
    data = random.Random(1).randbytes(size)
    calls = range(options.jobs), itertools.repeat(Shared(data)), itertools.repeat(options.seconds)
    results, check = executor.map(job, *calls, buffersize=options.window or None), zlib.crc32(data)
    wrong = sum(result != (number, check) for number, result in enumerate(results))
    return size * options.jobs, wrong


def there_and_back(executor: minipool.Executor, size: int) -> tuple[int, int]:
    """Send one value and get it back; return the same as offer(). Nothing is held here that need not be."""
    piece = random.Random(1).randbytes(MIB)
    future = executor.submit(same, piece * (size // MIB))
    value = future.result()
    pieces = (memoryview(value)[start:start + MIB] for start in range(0, len(value), MIB))
    return 2 * size, int(len(value) != size // MIB * MIB or any(got != piece for got in pieces))


def size(text: str) -> int:
    return int(minipool.SIZE(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offer", type=size, default=1 << 30, metavar="SIZE", help="bytes of arguments")
    parser.add_argument("--value", type=size, metavar="SIZE", help="instead: one value, there and back")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=0.005, help="of each job: the pool is to be slow")
    parser.add_argument("--window", type=int, default=100, help="jobs submitted at a time; 0: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=size, default=300 * MIB, metavar="SIZE", help="of the server's peak")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder), 1, options.workers)
        try:
            with minipool.Executor(f"127.0.0.1:{pool.port}", secret=pool.secret.read_text(),
                                   connect_timeout=30) as executor:
                wait_for_workers(executor, options.workers)
                workers = [worker["pid"] for worker in executor.info()["workers"]]
                before, begin = peak(pool.server.pid), time.monotonic()
                passed, wrong = there_and_back(executor, options.value) if options.value else offer(executor, options)
                wall = time.monotonic() - begin
                server, client, worker = peak(pool.server.pid), peak(os.getpid()), max(map(peak, workers))
        finally:
            pool.stop()
    print(f"{passed / MIB:,.0f} MiB in {wall:.1f} s: {passed / MIB / wall:.0f} MiB/s; wrong results: {wrong}")
    print(f"peaks: server {server:.0f} MiB ({before:.0f} before), client {client:.0f} MiB, worker {worker:.0f} MiB")
    return int(wrong > 0 or server * MIB > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
