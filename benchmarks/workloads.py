"""What is measured, one function per workload, and the gate of each figure. suite.py runs it, in a process per pool:

    python benchmarks/workloads.py WORKLOAD PEER SIZES ANSWER       # SIZES is JSON; figures go to the file ANSWER

The jobs are functions of that process's main program, as a user's are. Every result is checked; a pool that returns a
wrong one has no figures. What is compared is the pool and nothing else, so the jobs do as little as they can, which is
the worst case for all of them.
"""
from __future__ import annotations

import collections
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
from peers import OURS, PEERS, Peer

MB = 1_000_000
START_LIMIT = 120.0     # seconds for all workers to answer; 32 of a pool of heavy ones need most of a minute on 2 cores
WARM_UP = 500           # jobs: code imported, estimates of the job's length made, buffers grown
QUEUED = 10, 100, 1000, 10_000
PATIENCE = 15.0         # seconds beyond the undisturbed time after which a job counts as lost

Sizes = dict[str, Any]
Figures = dict[str, float]


class Wrong(Exception):
    """A pool returned something else than the job did."""


# ---- jobs ----

def same(value: Any) -> Any:
    return value


def sleep(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def item_of(array: Any, index: int) -> int:
    return int(array[index])


def wait_for_gate(gate: str, began: str) -> str:
    """Occupy a worker until a file exists."""
    Path(began).touch()
    while not os.path.exists(gate):
        time.sleep(0.005)
    return began


# ---- what several workloads do ----

def workers_of(peer: Peer) -> list[int]:
    """Wait until every worker has run a job; return their process ids."""
    pids: set[int] = set()
    give_up = time.monotonic() + START_LIMIT
    while len(pids) < peer.workers:
        if time.monotonic() > give_up:
            raise TimeoutError(f"{len(pids)} of {peer.workers} workers came up in {START_LIMIT:g} s")
        pids.update(peer.gather([peer.submit(pid_after, 0.05) for _ in range(2 * peer.workers)]))
    return sorted(pids)


def warm_up(peer: Peer) -> list[int]:
    pids = workers_of(peer)
    check(peer.gather([peer.submit(same, number) for number in range(WARM_UP)]), range(WARM_UP))
    return pids


def check(results: Sequence[Any], expected: Sequence[Any]) -> None:
    if list(results) != list(expected):
        raise Wrong(f"{sum(a != b for a, b in zip(results, expected))} of {len(expected)} results are wrong")


def random_array(size: int, seed: int) -> Any:
    """Bytes that no compression makes smaller."""
    import numpy
    return numpy.frombuffer(numpy.random.default_rng(seed).bytes(size), numpy.uint8)


# ---- the workloads ----

def one_by_one(peer: Peer, sizes: Sizes) -> Figures:
    warm_up(peer)
    jobs = range(sizes["jobs"])
    begin = time.perf_counter()
    results = peer.gather([peer.submit(same, number) for number in jobs])
    seconds = time.perf_counter() - begin
    check(results, jobs)
    return {"rate": len(jobs) / seconds}


def mapped(peer: Peer, sizes: Sizes) -> Figures:
    warm_up(peer)
    jobs = range(sizes["jobs"])
    begin = time.perf_counter()
    results = peer.map(same, jobs, sizes["chunk"])
    seconds = time.perf_counter() - begin
    check(results, jobs)
    return {"rate": len(jobs) / seconds}


def round_trips(peer: Peer, sizes: Sizes) -> Figures:
    warm_up(peer)
    taken = []
    for number in range(sizes["trips"]):
        begin = time.perf_counter()
        result = peer.result(peer.submit(same, number))
        taken.append(time.perf_counter() - begin)
        check([result], [number])
    taken.sort()
    return {"p50": statistics.median(taken) * 1000, "p99": taken[len(taken) * 99 // 100] * 1000}


def echoes(peer: Peer, sizes: Sizes) -> Figures:
    """Another array each time: a pool may keep what it has seen."""
    warm_up(peer)
    taken = []
    for turn in range(sizes["times"] + 1):
        array = random_array(sizes["bytes"], seed=turn)
        begin = time.perf_counter()
        result = peer.echo(same, array)
        taken.append(time.perf_counter() - begin)
        if result.tobytes() != array.tobytes():
            raise Wrong("an array was spoiled")
        del result
    seconds = statistics.median(taken[1:])      # the first one finds cold buffers
    return {"seconds": seconds, "rate": 2 * sizes["bytes"] / seconds / MB}


def outstanding(peer: Peer, sizes: Sizes) -> Figures:
    """Hold all workers back until everything is submitted, so that all of it is out at once."""
    warm_up(peer)
    jobs, me, servers = range(sizes["jobs"]), os.getpid(), peer.servers()
    with tempfile.TemporaryDirectory() as folder:
        gate, began = Path(folder, "gate"), [Path(folder, f"began-{number}") for number in range(peer.workers)]
        held = [peer.submit(wait_for_gate, str(gate), str(path)) for path in began]
        wait_for(began)
        gc.collect()
        before, server_before = machine.status(me, "VmRSS"), sum(machine.status(pid, "VmRSS") for pid in servers)
        for pid in (me, *servers):
            machine.forget_peak(pid)
        begin = time.perf_counter()
        handles = [peer.submit(same, number) for number in jobs]
        gate.touch()
        results = peer.gather(handles)
        seconds = time.perf_counter() - begin
        figures = {"client": machine.status(me, "VmHWM") - before, "seconds": seconds}
        if servers:
            figures["server"] = sum(machine.status(pid, "VmHWM") for pid in servers) - server_before
        peer.gather(held)
    check(results, jobs)
    return figures


def wait_for(paths: Sequence[Path]) -> None:
    give_up = time.monotonic() + START_LIMIT
    while not all(path.exists() for path in paths):
        if time.monotonic() > give_up:
            raise TimeoutError("a job that was submitted to a free worker did not begin")
        time.sleep(0.01)


def first_result(kind: type[Peer], sizes: Sizes) -> Figures:
    """Time a program of its own, from its start to its line: interpreter, imports, pool, and one job."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = kind.first_arguments(Path(folder))
        begin = time.perf_counter()
        program = subprocess.Popen([sys.executable, "-c", kind.first, *arguments], stdout=subprocess.PIPE, text=True)
        assert program.stdout
        with program.stdout:
            line = program.stdout.readline()
            seconds = time.perf_counter() - begin
        if program.wait() or line != "1024\n":
            raise Wrong(f"the program ended with status {program.returncode}, after {line!r}")
    return {"seconds": seconds}


def shared_value(peer: Peer, sizes: Sizes) -> Figures:
    warm_up(peer)
    array, items = random_array(sizes["bytes"], seed=1), range(sizes["jobs"])
    begin = time.perf_counter()
    results = peer.with_shared(item_of, array, items)
    seconds = time.perf_counter() - begin
    check(results, [int(array[item]) for item in items])
    return {"seconds": seconds}


def efficiency(kind: type[Peer], sizes: Sizes) -> Figures:
    """The share of the workers' time that is spent in jobs; 1 would be a pool that costs nothing."""
    figures = {}
    for workers in sizes["workers"]:
        with kind(workers) as peer:
            warm_up(peer)
            jobs = range(sizes["jobs"])
            begin = time.perf_counter()
            results = peer.gather([peer.submit(sleep, sizes["seconds"], number) for number in jobs])
            seconds = time.perf_counter() - begin
        check(results, jobs)
        figures[f"on_{workers}"] = len(jobs) * sizes["seconds"] / seconds / workers
    return figures


def worker_killed(peer: Peer, sizes: Sizes) -> Figures:
    """The same jobs undisturbed, and with one worker killed after a quarter of that time."""
    pids = warm_up(peer)
    jobs, seconds = sizes["jobs"], sizes["seconds"]
    calm, right = timed_jobs(peer, jobs, seconds, START_LIMIT)
    if right != jobs:
        raise Wrong(f"{jobs - right} of {jobs} undisturbed jobs failed")
    killer = threading.Timer(calm / 4, os.kill, (pids[0], signal.SIGKILL))
    killer.start()
    wild, right = timed_jobs(peer, jobs, seconds, calm + PATIENCE)
    killer.join()
    return {"right": right} | ({"overhead": wild - calm} if right == jobs else {})


def timed_jobs(peer: Peer, jobs: int, seconds: float, patience: float) -> tuple[float, int]:
    """Return how long some jobs took, and how many gave the right result."""
    begin = time.perf_counter()
    right, handles = 0, []
    try:
        handles = [peer.submit(sleep, seconds, number) for number in range(jobs)]
    except Exception as error:      # a broken pool takes no more
        print(f"submit: {type(error).__name__}: {error}", file=sys.stderr)
    for number, handle in enumerate(handles):
        try:
            right += peer.result(handle, max(0.01, begin + patience - time.perf_counter())) == number
        except Exception as error:
            print(f"job {number}: {type(error).__name__}: {error}", file=sys.stderr)
    return time.perf_counter() - begin, right


def idle_memory(peer: Peer, sizes: Sizes) -> Figures:
    """Everything that suite.py started for this pool, this process as its client included."""
    workers_of(peer)
    gc.collect()
    time.sleep(sizes["seconds"])
    pids = [pid for pid in machine.descendants(os.getppid())]
    return {"pss": machine.pss(pids), "processes": len(pids)}


def growth(peer: Peer, sizes: Sizes) -> Figures:
    """Jobs per second with more and more jobs out, each that ends replaced by the next.

    Queued: beside those that the workers have before them, so that only the queue's length differs. Alone: nothing
    beside them; few of them leave the workers waiting for messages, whatever the queue costs.
    """
    warm_up(peer)
    rates: dict[str, list[float]] = collections.defaultdict(list)
    for turn in range(sizes["turns"]):      # up and down, so that a machine that changes favours no end
        for queued in sizes["queued"][::-1 if turn % 2 else 1]:
            rates[f"queued_{queued}"].append(steady_rate(peer, sizes["beside"] + queued, sizes["jobs"]))
            rates[f"alone_{queued}"].append(steady_rate(peer, queued, sizes["jobs"]))
    figures = {key: statistics.median(values) for key, values in rates.items()}
    shortest, *longer = (figures[f"queued_{queued}"] for queued in sizes["queued"])
    return figures | {"slower": 1 - min(longer) / shortest}


def steady_rate(peer: Peer, window: int, jobs: int) -> float:
    """Jobs per second while `window` of them are out at any time, after the first so many have been replaced."""
    out = collections.deque(peer.submit(same, number) for number in range(window))
    begin = 0.0
    for number in range(window + jobs):
        if number == window:
            begin = time.perf_counter()
        check([peer.result(out.popleft())], [number])
        out.append(peer.submit(same, number + window))
    rate = jobs / (time.perf_counter() - begin)
    check(peer.gather(list(out)), range(window + jobs, window + jobs + window))
    return rate


# ---- the table of them ----

class Figure(NamedTuple):
    """One number of a workload."""
    key: str
    title: str
    form: str = "{:,.0f}"
    more: bool = False      # more of it is better


class Gate(NamedTuple):
    """A bound on minipool's figure, or on its share of another pool's."""
    figure: str
    than: str = ""          # a peer; empty: the figure itself is bounded
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return value <= self.most if self.most is not None else value >= (self.least or 0)

    def limit(self) -> str:
        times = " ×" if self.than else ""
        return f"≤ {self.most:g}{times}" if self.most is not None else f"≥ {self.least:g}{times}"


class Workload(NamedTuple):
    name: str
    title: str
    about: str                              # what the page says of it
    measure: Callable[..., Figures]
    figures: tuple[Figure, ...]             # the first is the one that is drawn
    gates: tuple[Gate, ...]
    sizes: Sizes
    quick: Sizes
    peers: tuple[str, ...] = tuple(PEERS)
    opens: bool = True                      # it is given an open pool of two, and else the class


WORKLOADS = {workload.name: workload for workload in (
    Workload(
        "W1", "10,000 trivial jobs, submitted one by one",
        "From the first `submit` to the last result, on a warm pool.",
        one_by_one, (Figure("rate", "jobs/s", more=True),),
        (Gate("rate", "processpool", least=4), Gate("rate", "mppool", least=1.5), Gate("rate", "ray", least=30),
         Gate("rate", "dask-inf", least=25), Gate("rate", "dask", least=80)),
        {"jobs": 10_000}, {"jobs": 500}),
    Workload(
        "W1b", "`map` of 100,000 items, 100 to a job",
        "Dask and Ray have no such argument: there the chunks are made by hand, as their documentation says.",
        mapped, (Figure("rate", "items/s", more=True),),
        (Gate("rate", "processpool", least=1),),
        {"jobs": 100_000, "chunk": 100}, {"jobs": 5000, "chunk": 100}),
    Workload(
        "W2", "1,000 round trips, one at a time",
        "Submit a trivial job and wait for its result; compare the four hops through bare sockets above.",
        round_trips, (Figure("p50", "median, ms", "{:.3f}"), Figure("p99", "99th percentile, ms", "{:.3f}")),
        (Gate("p50", "processpool", most=1), Gate("p99", "processpool", most=1.5)),
        {"trips": 1000}, {"trips": 100}),
    Workload(
        "W3", "A numpy array of 64 MB to a job and back",
        "One at a time, another array each time. MB/s count both directions. Dask by `scatter(direct=True)` and "
        "`gather(direct=True)`, which is faster than an argument; Ray's workers map the memory that the client wrote.",
        echoes, (Figure("rate", "MB/s", more=True), Figure("seconds", "seconds", "{:.3f}")),
        (Gate("rate", "ray", least=1), Gate("rate", "dask", least=2), Gate("rate", "processpool", least=5)),
        {"bytes": 64 * MB, "times": 5}, {"bytes": 4 * MB, "times": 2}),
    Workload(
        "W4", "100,000 futures outstanding",
        "The workers are held back until all jobs are submitted. Memory is the peak above what was there before; of "
        "Dask the client's includes the scheduler, which LocalCluster runs there; of Ray the server is gcs and raylet.",
        outstanding, (Figure("seconds", "seconds", "{:.1f}"), Figure("client", "client grows, MiB"),
                      Figure("server", "server grows, MiB")),
        (Gate("client", "processpool", most=1), Gate("server", most=60), Gate("seconds", "processpool", most=0.4)),
        {"jobs": 100_000}, {"jobs": 2000}),
    Workload(
        "W5", "From nothing to the first result",
        "A program of its own with a pool of two, from its start to its first line: interpreter, imports, pool, one "
        "job. minipool over TCP starts server and node as programs in that time.",
        first_result, (Figure("seconds", "seconds", "{:.2f}"),), (Gate("seconds", "dask", most=0.4),),
        {}, {}, opens=False),
    Workload(
        "W6", "One value of 64 MB to all workers, then 100 jobs that use it",
        "minipool: a closure; Dask: `scatter(broadcast=True)`; Ray: `put`; the others: an initializer, for which they "
        "need a new pool, and to which a forked worker has the value without sending.",
        shared_value, (Figure("seconds", "seconds", "{:.2f}"),),
        (Gate("seconds", "dask", most=0.5), Gate("seconds", "ray", most=1)),
        {"bytes": 64 * MB, "jobs": 100}, {"bytes": 4 * MB, "jobs": 20}),
    Workload(
        "W7", "2,000 jobs of 10 ms on 1, 2, 8 and 32 workers",
        "The share of the workers' time that is spent in jobs; they sleep, so that 32 of them fit on any machine.",
        efficiency, tuple(Figure(f"on_{n}", f"on {n}", "{:.3f}", more=True) for n in (1, 2, 8, 32)),
        tuple(Gate(f"on_{n}", least=least) for n, least in ((1, 0.95), (2, 0.95), (8, 0.93), (32, 0.85))),
        {"jobs": 2000, "seconds": 0.01, "workers": [1, 2, 8, 32]},
        {"jobs": 100, "seconds": 0.01, "workers": [1, 2]},
        peers=(*OURS, "processpool", "mppool", "dask", "ray"), opens=False),
    Workload(
        "W8", "A worker killed under 200 jobs of 20 ms",
        "By SIGKILL after a quarter of the undisturbed time. Overhead is what that adds; where results are missing "
        "there is none to compare.",
        worker_killed, (Figure("overhead", "overhead, s", "{:.2f}"), Figure("right", "right of 200", more=True)),
        (Gate("right", least=200), Gate("overhead", "ray", most=0.5)),
        {"jobs": 200, "seconds": 0.02}, {"jobs": 50, "seconds": 0.02}),
    Workload(
        "W9", "Memory of an idle pool of two",
        "All processes of the pool and its client; a page that several share counts once (PSS).",
        idle_memory, (Figure("pss", "MiB"), Figure("processes", "processes")), (Gate("pss", "dask", most=0.4),),
        {"seconds": 3}, {"seconds": 0.5}),
    Workload(
        "W10", "Jobs per second and the length of the queue",
        "Trivial jobs, each that ends replaced by the next. *Queued*: so many beside 1,000 that keep the workers busy; "
        "*slower* is the share that the slowest of the longer queues loses on the shortest (below 0: none does). "
        "*Alone*: so many and no others; few of them leave the workers waiting for messages.",
        growth, (Figure("slower", "slower", "{:.2f}"),
                 *(Figure(f"queued_{n}", f"{n:,} queued", more=True) for n in QUEUED),
                 *(Figure(f"alone_{n}", f"{n:,} alone", more=True) for n in QUEUED)),
        (Gate("slower", most=0.2),),
        {"queued": QUEUED, "beside": 1000, "jobs": 10_000, "turns": 5},
        {"queued": QUEUED[:2], "beside": 1000, "jobs": 1000, "turns": 1}, peers=OURS),
)}


def main() -> int:
    """Measure once and leave: what a pool prints, or does at exit, is its own affair."""
    name, peer_name, sizes, answer = sys.argv[1:]
    workload, kind = WORKLOADS[name], PEERS[peer_name]
    if workload.opens:
        with kind(2) as peer:
            write(answer, workload.measure(peer, json.loads(sizes)))    # before it closes: that may go wrong by itself
    else:
        write(answer, workload.measure(kind, json.loads(sizes)))
    return 0


def write(answer: str, figures: Figures) -> None:
    """At once or not at all: suite.py waits for it."""
    Path(answer + ".new").write_text(json.dumps(figures))
    os.replace(answer + ".new", answer)


if __name__ == "__main__":
    raise SystemExit(main())
