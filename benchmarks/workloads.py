"""What is measured, one function per workload, and what each figure is held to. suite.py runs it, a process each:

    python benchmarks/workloads.py WORKLOAD PEER SIZES ANSWER       # SIZES is JSON; figures go to the file ANSWER

The jobs are functions of that process's main program, as a user's are. Every result is checked; a pool that returns a
wrong one has no figures. What is compared is the pool and nothing else, so the jobs do as little as they can, which is
the worst case for all of them.
"""
from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import machine
from machine import MB, MIB
from peers import OURS, PEERS, Models, Peer

START_LIMIT = 120.0     # seconds for all workers to answer; 32 of a pool of heavy ones need most of a minute on 2 cores
WARM_UP = 500           # jobs: code imported, estimates of the job's length made, buffers grown
QUEUED = 10, 100, 1000, 10_000
IDLE = 2, 20, 200, 1000     # workers
PATIENCE = 8.0          # seconds beyond the undisturbed time after which a job counts as lost
BARE_START = 0.015      # seconds in which a bare interpreter starts, on the machine that the aim of W5 was set on

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


def grown(pids: Sequence[int], field: str, before: float) -> float:
    """MB that processes have more than `before`, which is MB as well."""
    return sum(machine.status(pid, field) for pid in pids) - before


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


def echoes_apart(peer: Peer, sizes: Sizes) -> Figures:
    """The same, and what the server needs meanwhile: for one reader at a time, and for several clients at once."""
    servers = peer.servers()
    if not servers:
        return echoes(peer, sizes)
    warm_up(peer)
    with contextlib.ExitStack() as stack:
        clients = [peer.pool, *(stack.enter_context(peer.another_client()) for _ in range(sizes["readers"]))]
        for client in clients:
            check([client.submit(same, 0).result()], [0])
        idle = grown(servers, "VmRSS", 0)
        machine.forget_peaks(servers)
        figures = echoes(peer, sizes)
        figures["server"] = grown(servers, "VmHWM", idle)
        machine.forget_peaks(servers)
        threads = stack.enter_context(ThreadPoolExecutor(len(clients)))
        values = threads.map(lambda client: client.submit(bytes, sizes["read"]).result(), clients)
        check(list(map(len, values)), [sizes["read"]] * len(clients))
        several = grown(servers, "VmHWM", idle)
        figures["further"] = max(0.0, several - figures["server"]) * MB / MIB / sizes["readers"]
    return figures


def outstanding(peer: Peer, sizes: Sizes) -> Figures:
    """Hold all workers back until everything is submitted, so that all of it is out at once."""
    warm_up(peer)
    jobs, me, servers = range(sizes["jobs"]), [os.getpid()], peer.servers()
    with held_back(peer) as let_go:
        gc.collect()
        before, server_before = grown(me, "VmRSS", 0), grown(servers, "VmRSS", 0)
        machine.forget_peaks([*me, *servers])
        begin = time.perf_counter()
        handles = [peer.submit(same, number) for number in jobs]
        submitted = time.perf_counter()
        there = peer.at_server()
        figures = {"client_job": grown(me, "VmRSS", before) * MB / len(jobs)}
        if there:
            figures["server_job"] = grown(servers, "VmRSS", server_before) * MB / there
        looked = time.perf_counter()
        let_go()
        results = peer.gather(handles)
        figures["seconds"] = time.perf_counter() - looked + submitted - begin
        figures["client"] = grown(me, "VmHWM", before)
        if servers:
            figures["server"] = grown(servers, "VmHWM", server_before)
    check(results, jobs)
    return figures


@contextlib.contextmanager
def held_back(peer: Peer) -> Iterator[Callable[[], None]]:
    """Occupy every worker until the function that this gives is called."""
    with tempfile.TemporaryDirectory() as folder:
        gate, began = Path(folder, "gate"), [Path(folder, f"began-{number}") for number in range(peer.workers)]
        held = [peer.submit(wait_for_gate, str(gate), str(path)) for path in began]
        give_up = time.monotonic() + START_LIMIT
        while not all(path.exists() for path in began):
            if time.monotonic() > give_up:
                raise TimeoutError("a job that was submitted to a free worker did not begin")
            time.sleep(0.01)
        yield gate.touch
        peer.gather(held)


def run_through(peer: Peer, sizes: Sizes) -> Figures:
    """Jobs a second of many, beside those of a tenth as many in the same pool just before."""
    warm_up(peer)
    me, servers, rates = [os.getpid()], peer.servers(), []
    gc.collect()
    before, server_before = grown(me, "VmRSS", 0), grown(servers, "VmRSS", 0)
    machine.forget_peaks([*me, *servers])
    for count in (sizes["jobs"] // 10, sizes["jobs"]):
        begin = time.perf_counter()
        results = peer.gather([peer.submit(same, number) for number in range(count)])
        rates.append(count / (time.perf_counter() - begin))
        check(results, range(count))
    return {"constant": rates[1] / rates[0], "rate": rates[1], "client": grown(me, "VmHWM", before),
            "server": grown(servers, "VmHWM", server_before)}


def first_result(kind: type[Peer], sizes: Sizes) -> Figures:
    """Time a program of its own, from its start to its line: interpreter, imports, pool, and one job."""
    bare = machine.interpreter_start(sizes["starts"]) / 1000
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
    return {"seconds": seconds, "starts": seconds / bare}


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
    for workers, count in sizes["jobs"]:
        with kind(workers) as peer:
            warm_up(peer)
            jobs = range(count)
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
    pids = machine.descendants(os.getppid())
    return {"pss": machine.pss(pids), "processes": len(pids)}


def queue_growth(peer: Peer, sizes: Sizes) -> Figures:
    """Jobs per second with more and more jobs out, each that ends replaced by the next.

    Queued: beside those that the workers have before them, so that only the queue's length differs. Alone: nothing
    beside them; few of them leave the workers waiting for messages, whatever the queue costs.
    """
    warm_up(peer)
    rates: dict[str, list[float]] = collections.defaultdict(list)
    for turn in range(sizes["turns"]):      # up and down, so that a machine that changes favours no end
        for queued in sizes["queued"][::-1 if turn % 2 else 1]:
            rates[f"queued_{queued}"].append(steady_rate(peer, sizes["beside"] + queued, sizes["jobs"]))
            rates[f"alone_{queued}"].append(steady_rate(peer, queued, sizes["alone"]))
    figures = {key: statistics.median(values) for key, values in rates.items()}
    return figures | {"slower": loss([figures[f"queued_{queued}"] for queued in sizes["queued"]])}


def worker_growth(kind: type[Peer], sizes: Sizes) -> Figures:
    """Jobs per second with more and more workers that are idle; all are models (models.py).

    Each number of them has a server of its own, and all servers are there at once, to be measured in turns.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))      # a server has a descriptor for each
    rates: dict[str, list[float]] = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Models(workers)) for workers in sizes["idle"]]
        for peer in peers:
            steady_rate(peer, WARM_UP, WARM_UP)
        for turn in range(sizes["turns"]):
            for peer in peers[::-1 if turn % 2 else 1]:
                pair = peer.pool.options(on=[f"models-{number}" for number in range(2)])
                for key, pool, window, jobs in (("beside", pair, sizes["window"], sizes["jobs"]),
                                                ("alone", peer.pool, 1, sizes["alone"]),
                                                ("spread", peer.pool, sizes["window"], sizes["jobs"])):
                    rates[f"{key}_{peer.workers}"].append(steady_rate(peer, window, jobs, pool))
    figures = {key: statistics.median(values) for key, values in rates.items()}
    few, many = [n for n in sizes["idle"] if n <= 200], [n for n in sizes["idle"] if n > 200]
    for name, counts in (("slower", few), ("slower_many", [few[0], *many])):
        if counts[1:]:
            figures[name] = max(loss([figures[f"{key}_{n}"] for n in counts]) for key in ("beside", "alone"))
    return figures


def loss(rates: Sequence[float]) -> float:
    """The share of the first rate that is lost at the slowest of the others; below 0 if none is slower."""
    return 1 - min(rates[1:]) / rates[0]


def steady_rate(peer: Peer, window: int, jobs: int, pool: Any = None) -> float:
    """Jobs per second while `window` of them are out at any time, after the first so many have been replaced."""
    submit = pool.submit if pool else peer.submit
    out = collections.deque(submit(same, number) for number in range(window))
    begin = 0.0
    for number in range(window + jobs):
        if number == window:
            begin = time.perf_counter()
        check([peer.result(out.popleft())], [peer.answer(number)])
        out.append(submit(same, number + window))
    rate = jobs / (time.perf_counter() - begin)
    check(peer.gather(list(out)), [peer.answer(number) for number in range(window + jobs, window + jobs + window)])
    return rate


# ---- the table of them ----

class Figure(NamedTuple):
    """One number of a workload."""
    key: str
    title: str
    form: str = "{:,.0f}"
    more: bool = False      # more of it is better


class Gate(NamedTuple):
    """What minipool's figure, or its share of another's, must reach, and what it is to reach one day."""
    figure: str
    than: str               # a peer; empty: the figure itself is bounded
    bound: str              # at least or at most
    gate: float | None
    aim: float | None = None

    def holds(self, value: float, bar: float) -> bool:
        return value <= bar if self.bound == MOST else value >= bar

    def limit(self, bar: float | None) -> str:
        return f"{self.bound} {bar:g}{' ×' if self.than else ''}" if bar is not None else ""


class Workload(NamedTuple):
    name: str
    title: str
    about: str                              # what the page says of it
    measure: Callable[..., Figures]
    figures: tuple[Figure, ...]             # the first is the one that is drawn
    gates: tuple[Gate, ...]
    sizes: Sizes
    quick: Sizes
    peers: tuple[str, ...]
    opens: bool = True                      # it is given an open pool of two, and else the class
    optional: bool = False                  # measured only if --only names it
    environment: dict[str, str] = {}        # of its measurements


LEAST, MOST = "≥", "≤"
NO_SHARED_MEMORY = {"MINIPOOL_SHARED_MEMORY": "0"}
LOCAL = *OURS, "processpool", "mppool"      # quick to start, so they are in nearly all
SERVER = Figure("server", "server grows, MB")

WORKLOADS = {workload.name: workload for workload in (
    Workload(
        "W1", "10,000 trivial jobs, submitted one by one",
        "From the first `submit` to the last result, on a warm pool.",
        one_by_one, (Figure("rate", "jobs/s", more=True),),
        (Gate("rate", "processpool", LEAST, 4, 8), Gate("rate", "mppool", LEAST, 1.5, 3),
         Gate("rate", "ray", LEAST, 30), Gate("rate", "dask-inf", LEAST, 25), Gate("rate", "dask", LEAST, 80)),
        {"jobs": 10_000}, {"jobs": 500}, (*LOCAL, "loky", "dask", "dask-inf", "ray")),
    Workload(
        "W1b", "`map` of 100,000 items, 100 to a job",
        "`chunksize=100`, on a warm pool.",
        mapped, (Figure("rate", "items/s", more=True),),
        (Gate("rate", "processpool", LEAST, 1, 1.5),),
        {"jobs": 100_000, "chunk": 100}, {"jobs": 5000, "chunk": 100}, (*LOCAL, "loky")),
    Workload(
        "W2", "1,000 round trips, one at a time",
        "Submit a trivial job and wait for its result. The bare relay is what is left without a pool and a job: 100 "
        "bytes through the same four hops (client, server, worker, server, client) over plain sockets.",
        round_trips, (Figure("p50", "median, ms", "{:.3f}"), Figure("p99", "99th percentile, ms", "{:.3f}")),
        (Gate("p50", "processpool", MOST, 1, 0.8), Gate("p99", "processpool", MOST, 1.5),
         Gate("p50", "bare", MOST, None, 1.5)),
        {"trips": 1000}, {"trips": 100}, (*LOCAL, "bare", "loky", "dask", "ray")),
    Workload(
        "W3", "A numpy array of 64 MB to a job and back, on one host",
        "One at a time, another array each time. MB/s count both directions. Dask by `scatter(direct=True)` and "
        "`gather(direct=True)`, which is faster than an argument; Ray's workers map the memory that the client wrote.",
        echoes, (Figure("rate", "MB/s", more=True), Figure("seconds", "seconds", "{:.3f}")),
        (Gate("rate", "ray", LEAST, 1, 2), Gate("rate", "dask", LEAST, 2), Gate("rate", "processpool", LEAST, 5)),
        {"bytes": 64 * MB, "times": 4}, {"bytes": 4 * MB, "times": 2}, (*LOCAL, "dask", "ray")),
    Workload(
        "W3b", "The same with shared memory off, as between hosts",
        "With `MINIPOOL_SHARED_MEMORY=0` all bytes go through the server. The bare relay sends the same ranges of "
        "256 KiB with their SHA-256 through the same hops over plain sockets, hashed by who sends and checked by who "
        "receives. Server: its peak above idle with one reader at a time, and then what each further one adds, of "
        "8 more clients that fetch a value of 16 MB at once.",
        echoes_apart, (Figure("rate", "MB/s", more=True), Figure("seconds", "seconds", "{:.3f}"), SERVER,
                       Figure("further", "each further reader, MiB", "{:.2f}")),
        (Gate("rate", "bare", LEAST, 0.9, 1), Gate("server", "", MOST, 40), Gate("further", "", MOST, 1)),
        {"bytes": 64 * MB, "times": 5, "readers": 8, "read": 16 * MB},
        {"bytes": 4 * MB, "times": 2, "readers": 2, "read": MB}, ("minipool", "bare"), environment=NO_SHARED_MEMORY),
    Workload(
        "W4", "100,000 futures outstanding",
        "The workers are held back until all jobs are submitted; the time is that of submitting and gathering. Growth "
        "is the peak above what was there before. Bytes a job are measured while all of them wait: at the client for "
        "each job submitted, at the server for each that it holds, since all beyond a session's credit wait at the "
        "client.",
        outstanding, (Figure("seconds", "seconds", "{:.1f}"), Figure("client", "client grows, MB"), SERVER,
                      Figure("client_job", "client, bytes a job"), Figure("server_job", "server, bytes a job held")),
        (Gate("client", "processpool", MOST, 1), Gate("server", "", MOST, 60),
         Gate("seconds", "processpool", MOST, 0.4)),
        {"jobs": 100_000}, {"jobs": 5000}, LOCAL),
    Workload(
        "W4m", "1,000,000 jobs, submitted one by one",
        "As W1, on one pool first a tenth as many; *constant* is the rate of all as a share of that of the tenth.",
        run_through, (Figure("constant", "constant", "{:.2f}", more=True), Figure("rate", "jobs/s", more=True),
                      Figure("client", "client grows, MB"), SERVER),
        (Gate("constant", "", LEAST, None, 0.9),),
        {"jobs": 1_000_000}, {"jobs": 10_000}, ("minipool",), optional=True),
    Workload(
        "W5", "From nothing to the first result",
        "A program of its own with a pool of two, from its start to its first line: interpreter, imports, pool, one "
        "job. minipool over TCP starts server and node as programs in that time. *Bare starts*: the same in starts "
        "of an interpreter that does nothing; the aim, 0.25 s where that takes 15 ms, is in those.",
        first_result, (Figure("seconds", "seconds", "{:.2f}"), Figure("starts", "bare starts", "{:.1f}")),
        (Gate("seconds", "dask", MOST, 0.4), Gate("starts", "", MOST, None, round(0.25 / BARE_START, 1))),
        {"starts": 10}, {"starts": 2}, (*LOCAL, "loky", "dask", "ray"), opens=False),
    Workload(
        "W6", "One value of 64 MB to all workers, then 100 jobs that use it",
        "minipool: a closure; Dask: `scatter(broadcast=True)`; Ray: `put`; the others: an initializer, for which they "
        "need a new pool, and to which a forked worker has the value without sending.",
        shared_value, (Figure("seconds", "seconds", "{:.2f}"),),
        (Gate("seconds", "dask", MOST, 0.5), Gate("seconds", "ray", MOST, 1, 0.7)),
        {"bytes": 64 * MB, "jobs": 100}, {"bytes": 4 * MB, "jobs": 20}, (*LOCAL, "dask", "ray")),
    Workload(
        "W7", "Jobs of 10 ms on 1, 2, 8 and 32 workers",
        "The share of the workers' time that is spent in jobs; they sleep, so that 32 of them fit on any machine. "
        "2,000 jobs on 8 and 32 of them; on 1 and 2, where the number does not matter, 500 a worker.",
        efficiency, tuple(Figure(f"on_{n}", f"on {n}", "{:.3f}", more=True) for n in (1, 2, 8, 32)),
        (Gate("on_1", "", LEAST, 0.95), Gate("on_2", "", LEAST, 0.95), Gate("on_8", "", LEAST, 0.93),
         Gate("on_32", "", LEAST, 0.85, 0.9)),
        {"jobs": [[1, 500], [2, 1000], [8, 2000], [32, 2000]], "seconds": 0.01},
        {"jobs": [[1, 100], [2, 100]], "seconds": 0.01}, ("minipool", "processpool", "mppool"), opens=False),
    Workload(
        "W7b", "2,560 jobs of 100 ms on 128 workers",
        "The same; it would be 2 seconds of a pool that costs nothing.",
        efficiency, (Figure("on_128", "on 128", "{:.3f}", more=True),),
        (Gate("on_128", "", LEAST, None, 0.8),),
        {"jobs": [[128, 2560]], "seconds": 0.1}, {"jobs": [[4, 40]], "seconds": 0.1}, ("minipool", "processpool"),
        opens=False),
    Workload(
        "W8", "A worker killed under 200 jobs of 20 ms",
        "By SIGKILL after a quarter of the undisturbed time. Overhead is what that adds; where results are missing "
        "there is none to compare.",
        worker_killed, (Figure("overhead", "overhead, s", "{:.2f}"), Figure("right", "right of 200", more=True)),
        (Gate("right", "", LEAST, 200), Gate("overhead", "ray", MOST, 0.5), Gate("overhead", "", MOST, None, 0.1)),
        {"jobs": 200, "seconds": 0.02}, {"jobs": 50, "seconds": 0.02}, (*LOCAL, "dask", "ray")),
    Workload(
        "W9", "Memory of an idle pool of two",
        "All processes of the pool and its client; a page that several share counts once (PSS).",
        idle_memory, (Figure("pss", "MB"), Figure("processes", "processes")),
        (Gate("pss", "dask", MOST, 0.4), Gate("pss", "", MOST, None, 45)),
        {"seconds": 2}, {"seconds": 0.5}, (*LOCAL, "loky", "dask", "ray")),
    Workload(
        "W10", "Jobs per second and the length of the queue",
        "Trivial jobs, each that ends replaced by the next. *Queued*: so many beside 1,000 that keep the workers busy; "
        "*slower* is the share that the slowest of the longer queues loses on the shortest (below 0: none does). "
        "*Alone*: so many and no others; few of them leave the workers waiting for messages.",
        queue_growth, (Figure("slower", "slower", "{:.2f}"),
                       *(Figure(f"queued_{n}", f"{n:,} queued", more=True) for n in QUEUED),
                       *(Figure(f"alone_{n}", f"{n:,} alone", more=True) for n in QUEUED)),
        (Gate("slower", "", MOST, 0.2),),
        {"queued": QUEUED, "beside": 1000, "jobs": 10_000, "alone": 3000, "turns": 3},
        {"queued": QUEUED[:2], "beside": 1000, "jobs": 1000, "alone": 500, "turns": 1}, ("minipool",)),
    Workload(
        "W10b", "Jobs per second and the number of idle workers",
        "The workers are models: real connections to a real server, and nothing behind them. *Beside*: two of them "
        "take a stream of trivial jobs, the others are idle. *Alone*: one job at a time, to whichever worker. *Slower* "
        "is the share that the slower of both loses with 20 or 200 workers on what it does with two, and with 1,000. "
        "*Spread*: the same stream to all of them, where more workers mean more and smaller messages.",
        worker_growth, (Figure("slower", "slower", "{:.2f}"), Figure("slower_many", "slower with 1,000", "{:.2f}"),
                        *(Figure(f"{key}_{n}", f"{n:,} {title}", more=True) for key, title in (
                            ("beside", "beside"), ("alone", "alone"), ("spread", "spread")) for n in IDLE)),
        (Gate("slower", "", MOST, 0.2), Gate("slower_many", "", MOST, None, 0.2)),
        {"idle": IDLE, "window": 500, "jobs": 3000, "alone": 500, "turns": 2},
        {"idle": IDLE[:2], "window": 500, "jobs": 1000, "alone": 100, "turns": 1}, ("minipool",), opens=False),
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
