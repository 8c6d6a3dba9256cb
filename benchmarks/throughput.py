"""Small jobs per second, minipool beside the standard library, in one run on one machine.

    python benchmarks/throughput.py [--jobs 10000] [--rounds 3]

Four pools of two processes, all warm before the first measurement:

    minipool, TCP         a server and a node, started here as programs of their own, as on two machines
    minipool, embedded    Executor(2)
    ProcessPoolExecutor   of the standard library
    multiprocessing.Pool  of the standard library, by apply_async

Throughput: submit all the jobs, then take all the results; the median of the rounds. The rounds alternate between the
pools, so that whatever else the machine does falls on all of them alike. Round trip: one job at a time, submitted and
waited for. The job returns its argument: what is measured is the pool and nothing else, which is the worst case for it.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, whatever else is installed
from minipool import Executor

WORKERS = 2
WARM_UP = 500  # jobs per pool before the first round: processes up, code imported, estimates of the job's length made
START_LIMIT = 60.0  # seconds for two workers to join; a cold machine needs about two


def same(value):
    return value


class StandardPool:
    """multiprocessing.Pool with the two calls that are measured under the names of an executor."""

    def __init__(self, processes, context):
        self.pool = context.Pool(processes)

    def submit(self, fn, *args):
        return self.pool.apply_async(fn, args)

    @staticmethod
    def result(handle):
        return handle.get()


def result(future):
    return future.result()


def throughput(pool, jobs):
    """Jobs per second from the first submit to the last result."""
    take = getattr(pool, "result", result)
    begin = time.perf_counter()
    handles = [pool.submit(same, i) for i in range(jobs)]
    values = [take(handle) for handle in handles]
    elapsed = time.perf_counter() - begin
    assert values == list(range(jobs)), "a pool returned wrong results"
    return jobs / elapsed


def round_trips(pool, count):
    """Sorted seconds of `count` jobs, each submitted after the result of the one before."""
    take = getattr(pool, "result", result)
    seconds = []
    for i in range(count):
        begin = time.perf_counter()
        take(pool.submit(same, i))
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def program(stack, log, *command):
    """Start a program of this checkout that ends with the benchmark; its output goes to the file `log`."""
    # No GPU is shown to it: a node would start one worker for each, beside the two that are asked for.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=log, stderr=log)

    def end():
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    stack.callback(end)
    return child


def tcp_pool(stack):
    """An Executor on a server with two workers, both started here and ended with `stack`."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    secret, log_file = secrets.token_hex(16), folder / "log"
    secret_file = folder / "secret"
    secret_file.touch(mode=0o600)
    secret_file.write_text(secret)
    log = stack.enter_context(log_file.open("w"))
    address = f"127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    server = program(stack, log, ROOT / "minipool.py", "serve", "--port", port, "--secret-file", secret_file)
    deadline = time.monotonic() + START_LIMIT
    while not answers(address):
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not start:\n{log_file.read_text()}")
        time.sleep(0.05)
    node = program(stack, log, ROOT / "minipool_worker.py", "connect", address, "--secret-file", secret_file,
                   "--cpu-workers", WORKERS)
    pool = stack.enter_context(Executor(address, secret=secret))
    while len(pool.info()["workers"]) < WORKERS:
        if node.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the workers did not join:\n{log_file.read_text()}")
        time.sleep(0.05)
    return pool


def answers(address):
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def open_pools(stack):
    """All four pools by name, the standard library's first: their processes are of this program alone then."""
    # Spawned, as minipool's workers are. How a process began makes no difference to its throughput, and a fork of a
    # program with threads can hang.
    context = multiprocessing.get_context("spawn")
    executor = stack.enter_context(ProcessPoolExecutor(WORKERS, mp_context=context))
    standard = StandardPool(WORKERS, context)
    stack.enter_context(standard.pool)
    return {
        "minipool, TCP": tcp_pool(stack),
        "minipool, embedded": stack.enter_context(Executor(WORKERS)),
        "ProcessPoolExecutor": executor,
        "multiprocessing.Pool": standard,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs per round and pool (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="their median counts (default: %(default)s)")
    parser.add_argument("--round-trips", type=int, default=500, help="jobs one at a time (default: %(default)s)")
    args = parser.parse_args()

    with contextlib.ExitStack() as stack:
        pools = open_pools(stack)
        for pool in pools.values():
            throughput(pool, WARM_UP)
        rates = {name: [] for name in pools}
        for _ in range(args.rounds):
            for name, pool in pools.items():
                rates[name].append(throughput(pool, args.jobs))
        trips = {name: round_trips(pool, args.round_trips) for name, pool in pools.items()}

    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {WORKERS} workers per pool, "
          f"{args.jobs:,} jobs, median of {args.rounds} rounds")
    print(f"\n{'pool':<20}  {'jobs/s':>8}  {'lowest':>8}  {'highest':>8}  {'p50 ms':>7}  {'p99 ms':>7}")
    for name in pools:
        p50, p99 = (trips[name][int(len(trips[name]) * share)] * 1000 for share in (0.50, 0.99))
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:<20}  {rate[name]:8,.0f}  {low:8,.0f}  {high:8,.0f}  {p50:7.3f}  {p99:7.3f}")
    print()
    for ours in list(pools)[:2]:
        for theirs in list(pools)[2:]:
            print(f"{ours + ' / ' + theirs:<42}  {rate[ours] / rate[theirs]:5.2f}")


if __name__ == "__main__":
    main()
