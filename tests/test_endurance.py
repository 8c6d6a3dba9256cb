"""The pool outlasts what a machine does to it: signals, stalls, restarts, and too few descriptors, threads or bytes."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, pids, read, wait_for_workers, wait_until

import minipool

SERVE = "import minipool; raise SystemExit(minipool.main())"    # what a test of a bent server appends to


# ---- jobs ----


def double(value):
    return value * 2


def wait_at(gate, log):
    """Note each beginning, then wait for the gate of this attempt or of all; return which attempt it is."""
    attempt = minipool.current_job().attempt
    with open(log, "a") as file:
        file.write(f"{attempt}\n")
    while not (os.path.exists(gate) or os.path.exists(f"{gate}{attempt}")):
        time.sleep(0.005)
    return attempt


def hold_the_gil(seconds):
    """Stay in one C call that never lets another thread run, for about so long; return for how long it did."""
    def count(rounds):
        begin = time.monotonic()
        sum(itertools.repeat(1, rounds))
        return time.monotonic() - begin
    return count(int(10**6 * seconds / min(count(10**6) for _ in range(50))))


# ---- what is asked of the processes ----


@pytest.fixture
def client(cluster):
    """An executor on the cluster; what it still has at the test's end is given up."""
    executor = cluster.executor()
    yield executor
    executor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def serve_anew(cluster, program):
    """serve_anew(*flags, before=(), code=SERVE): kill the cluster's server and start a bent one in its place."""
    def start(*flags, before=(), code=SERVE, **environ):
        cluster.server.process.kill()
        cluster.server.code()
        cluster.server = program("-c", code, "serve", "--port", cluster.port, "--secret-file", cluster.secret_file,
                                 *flags, before=before, cwd=ROOT, **environ)
        wait_until(lambda: cluster.server.process.poll() is not None or minipool.is_server_running(cluster.address))
        assert cluster.server.process.poll() is None, f"it ended: {cluster.server.err}"
        return cluster.server
    return start


@pytest.fixture
def stop():
    """stop(*pids): SIGSTOP processes; they are woken when the test has ended, so that they can be ended."""
    stopped = []

    def stop(*numbers):
        for pid in numbers:
            stopped.append(pid)
            os.kill(pid, signal.SIGSTOP)
    yield stop
    wake(*stopped)


def wake(*numbers):
    for pid in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def family(pid):
    """A process and all its descendants, parents first."""
    children = [int(n) for task in Path(f"/proc/{pid}/task").glob("*/children") for n in task.read_text().split()]
    return [pid, *itertools.chain.from_iterable(map(family, children))]


def memory(pid, kind="VmRSS"):
    """What a process has of memory, or ("VmHWM") had at most, in MB."""
    line = next(line for line in read(pid, "status").splitlines() if line.startswith(kind.encode()))
    return int(line.split()[1]) * 1024 / 1e6


def lines(path):
    return Path(path).read_text().split() if Path(path).exists() else []


def begin(client, gate, tmp_path, jobs, began):
    """Submit jobs that wait at the gate, wait until `began` of them run; return the futures and their logs."""
    logs = [tmp_path / f"job{n}" for n in range(jobs)]
    futures = [client.submit(wait_at, gate.path, log) for log in logs]
    wait_until(lambda: [lines(log) for log in logs].count(["1"]) == began)
    return futures, logs


# ---- signals ----


class TestAServerThatIsToEnd:
    def test_lets_running_jobs_end_begins_nothing_and_leaves_the_rest_to_the_next_server(self, cluster, client, gate,
                                                                                         tmp_path):
        cluster.node(cpu_workers=2)
        wait_for_workers(client, 2)
        futures, logs = begin(client, gate, tmp_path, 5, 2)
        cluster.server.signal(signal.SIGTERM)
        cluster.server.says("draining")
        late = client.submit(double, 21)
        gate.open()
        assert [future.result(60) for future in futures[:2]] == [1, 1]
        assert cluster.server.code(10) == 0
        assert sum(map(len, map(lines, logs))) == 2 and not late.done()
        cluster.serve()
        assert [future.result(60) for future in (*futures, late)] == [1] * 5 + [42]
        assert all(lines(log) == ["1"] for log in logs)

    def test_ends_at_once_at_a_second_signal_and_nothing_runs_twice(self, cluster, client, gate, tmp_path):
        cluster.node(cpu_workers=2)
        wait_for_workers(client, 2)
        futures, logs = begin(client, gate, tmp_path, 5, 2)
        cluster.server.signal(signal.SIGTERM)
        cluster.server.says("draining")
        assert cluster.server.process.poll() is None
        began = time.monotonic()
        cluster.server.signal(signal.SIGTERM)
        assert cluster.server.code(10) == 0 and time.monotonic() - began < 2
        print(f"second signal to exit: {time.monotonic() - began:.2f} s")
        gate.open()
        cluster.serve()
        assert [future.result(60) for future in futures] == [1] * 5
        assert all(lines(log) == ["1"] for log in logs)

    def test_delivers_large_results_of_running_jobs_at_its_end(self, cluster, client, gate, tmp_path, between_hosts):
        def large(path):
            Path(f"{path}-begun").touch()
            while not os.path.exists(path):
                time.sleep(0.005)
            return b"x" * 30_000_000
        cluster.node()
        future = client.submit(large, gate.path)
        wait_until(Path(f"{gate.path}-begun").exists)
        cluster.server.signal(signal.SIGTERM)
        cluster.server.says("draining")
        gate.open()
        assert cluster.server.code(20) == 0
        assert future.result(0.5) == b"x" * 30_000_000 and future.attempts == 1


# ---- too few of something ----


def a_new_client_is_soon_served(cluster):
    began = time.monotonic()
    with cluster.executor() as other:
        assert other.submit(double, 2).result(60) == 4
    print(f"a new client's first result after relief: {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 4


class TestWithoutDescriptors:
    LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); {SERVE}"

    def test_who_comes_is_turned_away_who_is_in_works_on_and_soon_there_is_room(self, cluster, client, serve_anew):
        server = serve_anew(code=self.LIMITED)
        cluster.node()
        assert client.submit(double, 1).result(60) == 2
        crowd = [socket.create_connection(("127.0.0.1", cluster.port), timeout=10) for _ in range(70)]
        server.says("turned away: .*Too many open files.*ulimit -n")
        with pytest.raises(minipool.ServerLost):
            cluster.executor(connect_timeout=0.2)
        crowd[-1].settimeout(4)         # sooner than the first of the crowd has been silent for too long
        assert crowd[-1].recv(1) == b""
        assert list(client.map(double, range(200))) == [2 * n for n in range(200)]
        for sock in crowd:
            sock.close()
        a_new_client_is_soon_served(cluster)
        assert list(client.map(double, range(200))) == [2 * n for n in range(200)]

    def test_members_that_fill_it_keep_their_places_and_give_them_back(self, cluster, serve_anew):
        server = serve_anew(code=self.LIMITED)
        cluster.node()
        with contextlib.ExitStack() as stack:
            members = [cluster.executor()]
            wait_for_workers(members[0], 1)
            stack.callback(lambda: [member.shutdown(wait=False, cancel_futures=True) for member in members])
            with contextlib.suppress(minipool.ServerLost):
                while len(members) < 100:
                    members.append(cluster.executor(connect_timeout=1))
            server.says("Too many open files")
            assert 30 < len(members) < 64
            futures = [member.submit(double, n) for n, member in enumerate(members)]
            assert [future.result(60) for future in futures] == [2 * n for n in range(len(members))]
            members.pop().shutdown()
            members.append(cluster.executor())
            assert members[-1].submit(double, 2).result(60) == 4


class TestWithoutThreads:
    REFUSING = f"""if True:
        import os, threading
        start = threading.Thread.start
        def refuse(thread):
            if os.path.exists(os.environ["NO_THREADS"]):
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = refuse
        {SERVE}"""

    @pytest.fixture
    def starved(self, cluster, serve_anew, tmp_path):
        """A file; while it exists, the cluster's server can start no thread."""
        serve_anew(code=self.REFUSING, NO_THREADS=str(tmp_path / "no threads"))
        cluster.node()
        return tmp_path / "no threads"

    def test_who_comes_is_turned_away_who_is_in_works_on_and_later_there_is_room(self, cluster, client, starved):
        assert client.submit(double, 1).result(60) == 2
        starved.touch()
        with pytest.raises(minipool.ServerLost):
            cluster.executor(connect_timeout=1)
        assert list(client.map(double, range(500))) == [2 * n for n in range(500)]
        starved.unlink()
        a_new_client_is_soon_served(cluster)

    def test_a_value_too_large_for_one_write_arrives_at_the_latest_when_there_are_some_again(self, client, starved,
                                                                                             between_hosts):
        assert client.submit(double, 1).result(60) == 2
        starved.touch()
        value = b"x" * 20_000_000
        future = client.submit(double, value)
        with contextlib.suppress(TimeoutError):
            future.result(0.5)
        starved.unlink()
        assert future.result(60) == value * 2


class TestMemory:
    CLIENT = """if True:
        import sys, minipool
        def answer(number):
            return bytes([number % 251]) * 60_000
        executor = minipool.Executor(sys.argv[1])
        futures = [executor.submit(answer, number) for number in range(3000)]
        print("submitted", flush=True)
        assert all(future.result() == bytes([n % 251]) * 60_000 for n, future in enumerate(futures))
        print("all right", flush=True)"""

    def test_a_client_that_is_stopped_costs_little_and_others_go_on(self, cluster, client, program, stop):
        cluster.node(cpu_workers=2)
        wait_for_workers(client, 2)
        before = memory(cluster.server.pid)
        deaf = program("-c", self.CLIENT, cluster.address, cwd=ROOT, MINIPOOL_SECRET=cluster.secret)
        deaf.says("submitted")
        stop(deaf.pid)
        wait_until(lambda: not client.info()["jobs"]["running"])    # nothing more is done for it
        assert list(client.map(double, range(500))) == [2 * n for n in range(500)]
        wake(deaf.pid)
        deaf.says("all right")
        grown = memory(cluster.server.pid, "VmHWM") - before
        print(f"server grew by {grown:.0f} MB at most")
        assert grown < 100 and deaf.code() == 0

    @pytest.mark.parametrize("flags", ["--offer 300M --jobs 150 --window 0", "--offer 100M --jobs 1700 --seconds 0",
                                       "--value 40M"])
    def test_of_the_server_does_not_grow_with_what_is_offered(self, own_mark, flags):
        command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), *flags.split(), "--limit", "150M"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100)
        print(run.stdout, run.stderr)
        assert run.returncode == 0 and "wrong results: 0" in run.stdout


# ---- stalls ----


class TestASilentHost:
    def test_is_noticed_its_job_runs_elsewhere_and_its_late_result_is_fenced(self, cluster, serve_anew, client, gate,
                                                                             tmp_path, stop):
        serve_anew("--dead-after", "1.5")
        first = cluster.node("first")
        (future,), (log,) = begin(client, gate, tmp_path, 1, 1)
        cluster.node("second")
        wait_for_workers(client, 2)
        silenced = family(first.pid)
        stop(*silenced)
        began = time.monotonic()
        wait_until(lambda: lines(log) == ["1", "2"], 10)
        print(f"SIGSTOP of the host to the second beginning: {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 4
        wake(*silenced)
        wait_for_workers(client, 2)
        Path(f"{gate.path}1").touch()                               # the late result
        assert client.options(on="first").submit(double, 21).result(60) == 42
        assert not future.done()
        Path(f"{gate.path}2").touch()
        assert future.result(60) == 2 and future.attempts == 2 and future.worker.startswith("second")

    @pytest.mark.parametrize(("seconds", "flags"), [
        (3, ["--dead-after", "1.5"]), pytest.param(20, [], marks=pytest.mark.long)])
    def test_is_not_what_a_server_takes_its_own_pause_for(self, cluster, serve_anew, client, gate, tmp_path, stop,
                                                          seconds, flags):
        server = serve_anew(*flags)
        cluster.node("one", cpu_workers=2), cluster.node("two")
        workers = wait_for_workers(client, 3)
        futures, logs = begin(client, gate, tmp_path, 5, 3)
        stop(server.pid)
        time.sleep(seconds)             # the fault itself
        wake(server.pid)
        assert list(pids(client).values()) == workers
        gate.open()
        assert [future.result(60) for future in futures] == [1] * 5
        assert all(future.attempts == 1 for future in futures) and all(lines(log) == ["1"] for log in logs)
        assert list(pids(client).values()) == workers

    @pytest.mark.parametrize(("seconds", "flags"), [
        pytest.param(4, ["--dead-after", "1.5"], marks=pytest.mark.slow),
        pytest.param(60, [], marks=[pytest.mark.long, pytest.mark.timeout(300)])])
    def test_is_not_one_whose_workers_all_hold_the_gil(self, cluster, serve_anew, client, seconds, flags):
        serve_anew(*flags)
        cluster.node(cpu_workers=2)
        workers = wait_for_workers(client, 2)
        futures = [client.submit(hold_the_gil, seconds) for _ in workers]
        assert all(future.result(250) > seconds * 0.5 for future in futures)      # longer than it takes to be dead
        assert all(future.attempts == 1 for future in futures)
        assert wait_for_workers(client, 2) == workers


# ---- restarts ----


class TestAServerThatComesBack:
    def test_finds_running_jobs_still_running_and_is_soon_of_use(self, cluster, client, gate, tmp_path):
        cluster.node("one", cpu_workers=2), cluster.node("two", cpu_workers=2)
        wait_for_workers(client, 4)
        futures, logs = begin(client, gate, tmp_path, 3, 3)
        killed = time.monotonic()
        cluster.server.process.kill()
        cluster.serve()
        assert client.submit(double, 21).result(20) == 42
        print(f"kill of the server to the first new result: {time.monotonic() - killed:.2f} s")
        assert len(wait_for_workers(client, 4)) == 4 and time.monotonic() - killed < 20
        print(f"kill of the server until all workers are back: {time.monotonic() - killed:.2f} s")
        gate.open()
        assert [future.result(60) for future in futures] == [1] * 3
        assert all(future.attempts == 1 for future in futures) and all(lines(log) == ["1"] for log in logs)

    def test_is_not_overrun_by_a_hundred_clients_that_return_together(self, cluster):
        cluster.node(cpu_workers=2)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(cluster.executor()) for _ in range(100)]
            assert clients[0].submit(double, 1).result(60) == 2
            killed = time.monotonic()
            cluster.server.process.kill()
            futures = [client.submit(double, n) for n, client in enumerate(clients)]
            cluster.serve()
            assert [future.result(30) for future in futures] == [2 * n for n in range(100)]
            print(f"kill of the server until 100 clients have a result: {time.monotonic() - killed:.2f} s")
            assert time.monotonic() - killed < 20


# ---- nowhere to write ----


@pytest.mark.parametrize("outputs", [">&- 2>&-", ">/dev/full 2>/dev/full", ">/dev/null 2>/dev/full",
                                     "> >(exit) 2>&1"], ids=["closed", "full", "log full", "reader gone"])
def test_a_server_that_can_print_nothing_serves(cluster, client, serve_anew, outputs):
    server = serve_anew("--host", "0.0.0.0", before=("/bin/bash", "-c", f'exec "$0" "$@" {outputs}'))
    cluster.node()
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=10) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")                 # something to write of in the log
        assert stranger.recv(1) == b""
    assert list(client.map(double, range(100))) == [2 * n for n in range(100)]
    server.signal(signal.SIGTERM)
    assert server.code(20) == 0


# ---- bugs of its own ----


class TestABugInTheServer:
    STUMBLING = f"""if True:
        import minipool
        def ask(self, session, now, number, what):
            %s
            raise LookupError("a bug")
        minipool.Scheduler._ask = ask
        {SERVE}"""

    def test_that_breaks_no_invariant_costs_one_connection(self, cluster, client, serve_anew, gate, tmp_path):
        server = serve_anew(code=self.STUMBLING % "pass")
        cluster.node()
        (future,), _ = begin(client, gate, tmp_path, 1, 1)
        with cluster.executor() as other, pytest.raises(TimeoutError):
            other.options(timeout=0.5).info()
        server.says("(?s)stumbled.*LookupError: a bug")
        gate.open()
        assert future.result(60) == 1 and future.attempts == 1 and server.process.poll() is None

    def test_that_breaks_an_invariant_ends_it_loudly_and_the_next_server_goes_on(self, cluster, client, serve_anew,
                                                                                gate, tmp_path):
        server = serve_anew(code=self.STUMBLING % "session.load += 1")
        cluster.node()
        (future,), _ = begin(client, gate, tmp_path, 1, 1)
        with pytest.raises(TimeoutError):
            client.options(timeout=0.5).info()
        assert server.code(10) == 70
        assert "an invariant of the scheduler is broken (a session's load is miscounted)" in server.err
        cluster.serve()
        gate.open()
        assert future.result(60) == 1 and future.attempts == 1
