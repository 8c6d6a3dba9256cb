"""Kill things under a running pool and count what is lost: nothing should be.

    python benchmarks/chaos.py --jobs 10000 --kill-worker-every 0.2
    python benchmarks/chaos.py --jobs 10000 --kill-worker-every 0.2 --kill-node-every 3 --restart-server-every 15 \
        --cut-client-every 0.5 --seed 7

The same work runs twice on fresh pools of real processes over loopback: once undisturbed, once with faults. Printed:
lost (no outcome), duplicate (an outcome twice), wrong (another value), reruns (beginnings beyond one a job), faults
done, and the wall time beside the undisturbed one. Exit status 1 if anything was lost, duplicate or wrong.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from fault_proxy import FaultProxy

import minipool


def job(number: int, seconds: float, log: str) -> int:
    """Note that it began, take its time, return what the caller can check."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    time.sleep(seconds)
    return number * number + 7


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def children(pid: int) -> list[int]:
    """The children of a process that we started, by /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def is_worker(pid: int) -> bool:
    """A worker, not multiprocessing's resource tracker."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class Pool:
    """A server and some nodes, as processes of their own."""

    def __init__(self, folder: Path, nodes: int, workers: int) -> None:
        self.folder, self.port, self.workers = folder, free_port(), workers
        self.secret = folder / "secret"
        self.secret.write_text(minipool.Secret.new().text)
        self.secret.chmod(0o600)
        self.output = open(folder / "output", "ab")  # noqa: SIM115 - closed by stop()
        self.server = self.start_server()
        self.nodes = [self.start_node() for _ in range(nodes)]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *command], stdout=self.output, stderr=self.output,
                                start_new_session=True)

    def start_server(self) -> subprocess.Popen[bytes]:
        return self.start(str(ROOT / "minipool.py"), "serve", "--port", str(self.port),
                          "--secret-file", str(self.secret))

    def start_node(self) -> subprocess.Popen[bytes]:
        return self.start(str(ROOT / "minipool_worker.py"), "connect", f"127.0.0.1:{self.port}", "--secret-file",
                          str(self.secret), "--gpus", "", "--cpu-workers", str(self.workers))

    def stop(self) -> None:
        for processes in (self.nodes, [self.server]):      # a node leaves at once if the server is there to let it go
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self.output.close()


class Chaos:
    """Faults on a clock of their own, drawn from one seed."""

    def __init__(self, pool: Pool, proxy: FaultProxy, options: argparse.Namespace) -> None:
        self.pool, self.proxy = pool, proxy
        self.random = random.Random(options.seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.stopping = threading.Event()
        every = {self.kill_worker: options.kill_worker_every, self.kill_node: options.kill_node_every,
                 self.restart_server: options.restart_server_every, self.cut_client: options.cut_client_every}
        self.every = {fault: seconds for fault, seconds in every.items() if seconds}
        self.thread = threading.Thread(target=self.run, name="chaos")

    def run(self) -> None:
        due = {fault: time.monotonic() + seconds for fault, seconds in self.every.items()}
        while due and not self.stopping.wait(max(0.0, min(due.values()) - time.monotonic())):
            fault = min(due, key=due.__getitem__)
            fault()
            self.done[fault.__name__] += 1
            due[fault] = time.monotonic() + self.every[fault]

    def kill_worker(self) -> None:
        workers = [pid for node in self.pool.nodes for pid in children(node.pid) if is_worker(pid)]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)

    def kill_node(self) -> None:
        place = self.random.randrange(len(self.pool.nodes))
        self.pool.nodes[place].kill()
        self.pool.nodes[place].wait()
        self.pool.nodes[place] = self.pool.start_node()

    def restart_server(self) -> None:
        self.pool.server.kill()
        self.pool.server.wait()
        self.pool.server = self.pool.start_server()

    def cut_client(self) -> None:
        self.proxy.cut()


def run(options: argparse.Namespace, faults: bool) -> dict[str, float]:
    """Run the work once on a fresh pool; return the counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = Pool(folder, options.nodes, options.workers // options.nodes)
        proxy = FaultProxy("127.0.0.1", pool.port)
        chaos = Chaos(pool, proxy, options)
        try:
            executor = minipool.Executor(f"127.0.0.1:{proxy.port}", secret=pool.secret.read_text(), connect_timeout=30)
            wait_for_workers(executor, options.workers)
            list(executor.map(abs, range(50)))
            if faults:
                chaos.thread.start()
            counts = work(executor, options, str(folder / "log"))
            chaos.stopping.set()
            executor.shutdown()
        finally:
            chaos.stopping.set()
            if chaos.thread.ident:
                chaos.thread.join()
            pool.stop()
            proxy.close()
            if options.verbose:
                sys.stderr.write((folder / "output").read_text(errors="replace"))
        return counts | {f"did {fault.replace('_', ' ')}": n for fault, n in sorted(chaos.done.items())}


def wait_for_workers(executor: minipool.Executor, workers: int) -> None:
    give_up = time.monotonic() + 60
    while len(executor.info()["workers"]) < workers:
        if time.monotonic() > give_up:
            raise SystemExit("the workers did not come up")
        time.sleep(0.1)


def work(executor: minipool.Executor, options: argparse.Namespace, log: str) -> dict[str, float]:
    outcomes: collections.Counter[int] = collections.Counter()
    wrong, errors = [], []
    view = executor.options(max_deaths=1000)        # with a kill every 0.2 s a job may well meet several

    def check(number: int, future: minipool.Future) -> None:
        outcomes[number] += 1
        try:
            if future.result() != number * number + 7:
                wrong.append(number)
        except Exception as error:
            errors.append(error)

    begin = time.monotonic()
    futures = [view.submit(job, number, options.seconds, log) for number in range(options.jobs)]
    for number, future in enumerate(futures):
        future.add_done_callback(lambda future, number=number: check(number, future))
    _, waiting = minipool.wait(futures, timeout=options.patience)
    wall = time.monotonic() - begin
    time.sleep(0.2)                                 # the last callbacks
    for error in errors[:3]:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr)
    begun = len(Path(log).read_text().split())
    return {"lost": len(waiting) + len(errors), "duplicate": sum(n - 1 for n in outcomes.values()),
            "wrong": len(wrong), "reruns": begun - options.jobs, "seconds": wall}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each job")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=600, help="seconds until what is missing counts as lost")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what server and nodes logged")
    for fault in ("kill-worker", "kill-node", "restart-server", "cut-client"):
        parser.add_argument(f"--{fault}-every", type=float, metavar="S", help="seconds")
    options = parser.parse_args()
    calm = run(options, faults=False)
    print("undisturbed:", ", ".join(f"{name} {value:g}" for name, value in calm.items()), flush=True)
    wild = run(options, faults=True)
    print("with faults:", ", ".join(f"{name} {value:g}" for name, value in wild.items()))
    print(f"wall time: {wild['seconds'] / calm['seconds']:.2f} times the undisturbed run (seed {options.seed})")
    return int(any(wild[name] or calm[name] for name in ("lost", "duplicate", "wrong")))


if __name__ == "__main__":
    raise SystemExit(main())
