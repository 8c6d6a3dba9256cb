"""The catalogue of failures: each costs the one job that caused it, is told in words, and leaves the pool as it was."""

import collections
import ctypes
import importlib
import json
import os
import pickle
import re
import secrets
import signal
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from processes import FAKES, ROOT, is_alive, pids, wait_for_workers, wait_until
from test_worker import attempts, grandchild_in, note, note_and_wait, spawn_and_wait

import minipool
import minipool_worker
from minipool import JobKilled, JobTimeout, RemoteError, TooLarge, WorkerDied

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and kills as Linux does")

WORKER = ROOT / "minipool_worker.py"
# Looks at its GPUs more often, so that a test of a lost one need not wait.
WATCHFUL = "import sys, minipool_worker as worker; worker.DEVICE_SECONDS = 0.1; sys.exit(worker.main())"
FOR_EVER = range(10**13)        # sum() of it holds the GIL for a day, without a look at signals


# ---- what the jobs do ----

class LoadsAs:
    """Calls a function where it is unpickled."""

    def __init__(self, fn, *args):
        self.call = fn, args

    def __reduce__(self):
        return self.call


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail(error, **attributes):
    vars(error).update(attributes)
    raise error


def end_by(how):
    raise how("of the job's own")


MISBEHAVING = {         # job, its arguments, and what its future raises
    "an unpicklable result": (threading.Lock, (), pickle.PicklingError),
    "an unpicklable exception": (lambda: fail(ValueError("has a lock"), lock=threading.Lock()), (), RemoteError),
    "an exception that fails to load": (lambda: fail(TwoArguments(1, 2)), (), RemoteError),
    "a result that fails to load": (lambda: LoadsAs(fail, OSError("boom")), (), OSError),
    "an argument that ends the process": (id, (LoadsAs(os._exit, 3),), WorkerDied),
    "os._exit(3)": (os._exit, (3,), WorkerDied),
    "a segmentation fault": (ctypes.string_at, (0,), WorkerDied),
    "SystemExit": (end_by, (SystemExit,), SystemExit),
    "KeyboardInterrupt": (end_by, (KeyboardInterrupt,), KeyboardInterrupt),
}


def write_much(megabytes, end):
    """Write to stdout, for a start."""
    piece = (b"x" * 999 + end) * 1000
    for _ in range(megabytes):
        view = memoryview(piece)
        while view:
            view = view[os.write(1, view):]
    return megabytes


def memory(pid, key="VmRSS"):
    """Return a process's memory in megabytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def begun(folder, name, times=1):
    wait_until(lambda: attempts(folder)[name] == times)


def pid_of(folder, name):
    """Return the process in which a job that left a note was begun."""
    begun(folder, name)
    path, = Path(folder).glob(f"{name}.*.*")
    return int(path.name.split(".")[1])


# ---- one job misbehaves ----

class TestAMisbehavingJob:
    """What breaks a ProcessPoolExecutor as a whole."""

    @pytest.mark.parametrize("kind", MISBEHAVING)
    def test_fails_alone_and_with_its_own_error(self, pool, kind):
        job, args, error = MISBEHAVING[kind]
        before = [pool.submit(abs, -i) for i in range(10)]
        bad = pool.options(max_deaths=0).submit(job, *args)
        after = [pool.submit(abs, -i) for i in range(10, 20)]
        assert type(bad.exception(60)) is error and bad.attempts == 1
        assert [good.result(60) for good in before + after] == list(range(20))
        wait_for_workers(pool, 2)
        assert list(pool.map(abs, range(-3, 0), timeout=60)) == [3, 2, 1]

    def test_in_a_crowd_of_all_kinds_disturbs_nobody(self, pool):
        bad = {kind: pool.options(max_deaths=0).submit(job, *args) for kind, (job, args, _) in MISBEHAVING.items()}
        good = [pool.submit(abs, -i) for i in range(200)]
        assert {kind: type(future.exception(60)) for kind, future in bad.items()} == {
            kind: error for kind, (_, _, error) in MISBEHAVING.items()}
        assert [future.result(60) for future in good] == list(range(200))

    def test_that_poisons_its_workers_fails_after_four_of_them(self, embedded):
        ex = embedded(2)
        good = [ex.submit(abs, -i) for i in range(500)]
        poison = ex.options(name="poison").submit(os._exit, 3)
        good += [ex.submit(abs, -i) for i in range(500, 1000)]
        with pytest.raises(WorkerDied, match="poison took down 4 workers in 4 attempts") as caught:
            poison.result(60)
        assert poison.attempts == caught.value.attempts == caught.value.deaths == 4 and caught.value.exitcode == 3
        assert [future.result(60) for future in good] == list(range(1000))

    def test_whose_module_is_missing_at_the_worker_says_so_and_kills_nobody(self, pool):
        before = wait_for_workers(pool, 2)
        bad = pool.submit(id, LoadsAs(importlib.import_module, "no_such_module_here"))
        with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
            bad.result(60)
        assert bad.attempts == 1 and wait_for_workers(pool, 2) == before

    def test_whose_exception_s_class_is_missing_at_the_client_arrives_as_text(self, pool, tmp_path):
        def raise_it(folder):
            (Path(folder) / "only_there.py").write_text("class Gone(ValueError): pass")
            sys.path.insert(0, folder)
            import only_there
            sys.path.remove(folder)
            raise only_there.Gone("with the wind")
        with pytest.raises(RemoteError, match="Gone: with the wind") as caught:
            pool.submit(raise_it, str(tmp_path)).result(60)
        assert "in raise_it" in str(caught.value.__cause__)


class TestAFlood:
    @pytest.mark.parametrize("end", [b"\n", b"x"], ids=["of lines", "without a line's end"])
    def test_of_output_blocks_nobody_and_is_not_kept(self, cluster, end):
        node = cluster.node()
        with cluster.executor() as ex:
            ex.submit(abs, -1).result(60)
            before = memory(node.pid), memory(cluster.server.pid)
            assert ex.submit(write_much, 200, end).result(60) == 200
            assert ex.submit(abs, -1).result(60) == 1
            assert memory(node.pid, "VmHWM") < before[0] + 100 and memory(cluster.server.pid, "VmHWM") < before[1] + 100
        node._err.write_text("")        # pytest keeps the folders of the last runs

    def test_to_closed_descriptors_never_reaches_the_server_s_connection(self, cluster):
        cluster.node()
        with cluster.executor() as ex:
            worker = ex.submit(os.getpid).result(60)
            ex.submit(os.closerange, 1, 3).result(60)       # what a job prints goes to whatever is opened next
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            opened = ex.submit(lambda: [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                                        if int(fd) < 3 and os.path.exists(f"/proc/self/fd/{fd}")]).result(60)
            assert not [name for name in opened if name.startswith("socket:")]
            assert ex.submit(os.getpid).result(60) == worker


# ---- limits ----

class TestJobTimeout:
    @pytest.mark.parametrize("job", [(sum, FOR_EVER), (re.match, "(a+)+$", "a" * 60 + "b")], ids=["sum", "re"])
    def test_ends_a_job_even_one_that_holds_the_gil(self, pool, job):
        before = wait_for_workers(pool, 2)
        slow = pool.options(job_timeout=0.3).submit(*job)
        with pytest.raises(JobTimeout, match=r"ran longer than its job_timeout of 0\.3 s") as caught:
            slow.result(60)
        assert not isinstance(caught.value, TimeoutError)
        after = wait_until(lambda: len(pids(pool)) == 2 and set(pids(pool).values()) != set(before) and pids(pool))
        assert len(set(after.values()) & set(before)) == 1 and not all(map(is_alive, before))
        assert {pool.options(on=name).submit(os.getpid).result(60) for name in after} == set(after.values())

    def test_ends_a_loop_that_waits_for_the_result(self, pool):
        slow = pool.options(job_timeout=0.5, name="slow").submit(sum, FOR_EVER)
        with pytest.raises(JobTimeout, match="slow was ended"):
            while True:
                try:
                    slow.result(timeout=0.05)
                except TimeoutError:
                    continue

    def test_touches_nobody_who_is_within_it_nor_who_comes_after(self, pool):
        limited = [pool.options(job_timeout=0.5).submit(os.getpid) for _ in range(20)]
        after = [pool.submit(lambda: (time.sleep(0.8), os.getpid())[1]) for _ in range(2)]
        assert {job.result(60) for job in limited + after} <= set(wait_for_workers(pool, 2))
        assert {job.exception() for job in limited + after} == {None}

    def test_does_not_count_the_time_in_the_queue(self, pool):
        first = [pool.submit(time.sleep, 1.5) for _ in range(2)]
        limited = [pool.options(job_timeout=1).submit(abs, -i) for i in range(20)]
        assert [job.result(60) for job in limited] == list(range(20)) and not any(job.exception(60) for job in first)

    def test_is_not_retried(self, pool, tmp_path):
        job = pool.options(job_timeout=0.3, retries=5).submit(note_and_wait, tmp_path, "job", tmp_path / "never")
        with pytest.raises(JobTimeout):
            job.result(60)
        assert attempts(tmp_path)["job"] == job.attempts == 1

    def test_is_of_each_attempt(self, pool, tmp_path):
        def fail_twice():
            note(tmp_path, "job")
            time.sleep(0.3)
            return attempts(tmp_path)["job"] > 2 or fail(ValueError())
        job = pool.options(job_timeout=0.8, retries=5).submit(fail_twice)
        assert job.result(60) is True and job.attempts == 3         # longer together than the limit

    def test_outlives_the_server(self, cluster, tmp_path):
        cluster.node()
        with cluster.executor() as ex:
            job = ex.options(job_timeout=0.7).submit(note_and_wait, tmp_path, "job", tmp_path / "never")
            begun(tmp_path, "job")
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            with pytest.raises(JobTimeout):
                job.result(60)
        assert attempts(tmp_path)["job"] == 1

    @pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "x", [1], 1j], ids=repr)
    def test_that_makes_no_sense_is_refused(self, pool, limit):
        with pytest.raises((TypeError, ValueError), match="job_timeout"):
            pool.options(job_timeout=limit)

    def test_none_is_none(self, pool):
        assert pool.options(job_timeout=0.001).options(job_timeout=None).submit(time.sleep, 0.1).result(60) is None


class TestCancelRunning:
    def test_ends_the_process_of_a_running_job(self, pool, tmp_path):
        job = pool.options(cancel_running=True).submit(note_and_wait, tmp_path, "job", tmp_path / "never")
        process = pid_of(tmp_path, "job")
        wait_until(job.running)
        assert job.cancel() and job.cancelled() and not job.running()
        with pytest.raises(CancelledError):
            job.result(60)
        wait_until(lambda: len(pids(pool)) == 2 and process not in pids(pool).values())
        assert not is_alive(process) and attempts(tmp_path)["job"] == 1
        assert list(pool.map(abs, range(-3, 0), timeout=60)) == [3, 2, 1]

    def test_ends_one_that_holds_the_gil(self, pool, tmp_path):
        job = pool.options(cancel_running=True).submit(lambda: (note(tmp_path, "job"), sum(FOR_EVER)))
        process = pid_of(tmp_path, "job")
        assert job.cancel()         # perhaps before anybody told that it runs
        wait_until(lambda: not is_alive(process))
        wait_until(lambda: len(pids(pool)) == 2 and process not in pids(pool).values())

    def test_costs_no_worker_if_the_job_has_not_begun(self, embedded, tmp_path):
        ex = embedded(1)
        first = ex.submit(note_and_wait, tmp_path, "first", tmp_path / "gate")
        begun(tmp_path, "first")
        waiting = [ex.options(cancel_running=True).submit(note, tmp_path, "waiting") for _ in range(10)]
        assert all(job.cancel() for job in waiting)
        ex.info()                               # the server has heard of it
        (tmp_path / "gate").touch()
        assert first.result(60) == "first" and ex.submit(os.getpid).result(60) == pid_of(tmp_path, "first")
        assert attempts(tmp_path) == {"first": 1}

    def test_of_a_finished_job_is_too_late(self, pool):
        job = pool.options(cancel_running=True).submit(os.getpid)
        assert job.result(60) in wait_for_workers(pool, 2)
        assert not job.cancel() and not job.cancelled() and job.result(0) in wait_for_workers(pool, 2)

    def test_can_be_taken_back(self, pool, gate, tmp_path):
        view = pool.options(cancel_running=True).options(cancel_running=False)
        job = view.submit(note_and_wait, tmp_path, "job", gate.path)
        wait_until(job.running)
        assert not job.cancel() and job.running()
        gate.open()
        assert job.result(60) == "job"


class TestKill:
    def test_of_a_finished_job_changes_nothing(self, pool):
        jobs = [pool.submit(os.getpid) for _ in range(20)]
        before = {job.result(60) for job in jobs}
        for job in jobs:
            pool.kill(job)
        assert {job.result(0) for job in jobs} == before
        assert list(pool.map(abs, range(-20, 0), timeout=60)) == list(range(20, 0, -1))
        assert before <= set(wait_for_workers(pool, 2))

    def test_takes_futures_of_this_pool_only(self, pool, embedded):
        stranger = embedded(1).submit(abs, -1)
        for target in (stranger, None, "job 1"):
            with pytest.raises(TypeError, match="future of this executor"):
                pool.kill(target)
        assert stranger.result(60) == 1

    @pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
    def test_workers_on_a_shared_server_spares_the_jobs_of_others(self, cluster, tmp_path, how):
        cluster.node(cpu_workers=2)
        mine, other = cluster.executor(), cluster.executor()
        with other:
            wait_for_workers(other, 2)
            theirs = other.submit(note_and_wait, tmp_path, "theirs", tmp_path / "gate")
            begun(tmp_path, "theirs")
            victims = [mine.submit(note_and_wait, tmp_path, f"mine{i}", tmp_path / "never") for i in range(5)]
            process = pid_of(tmp_path, "mine0")
            getattr(mine, how)()
            wait_until(lambda: not is_alive(process))
            (tmp_path / "gate").touch()
            assert theirs.result(60) == "theirs" and theirs.attempts == 1
            assert isinstance(victims[0].exception(0), JobKilled) and all(job.cancelled() for job in victims[1:])
            assert other.submit(abs, -1).result(60) == 1 and attempts(tmp_path) == {"theirs": 1, "mine0": 1}

    @pytest.mark.parametrize("how", ["job_timeout", "cancel", "kill"])
    def test_of_any_kind_takes_grandchildren_along(self, pool, tmp_path, how):
        view = pool.options(**{"job_timeout": {"job_timeout": 0.5}, "cancel": {"cancel_running": True}}.get(how, {}))
        job = view.submit(spawn_and_wait, tmp_path)
        grandchild = grandchild_in(tmp_path)
        if how != "job_timeout":
            {"cancel": job.cancel, "kill": lambda: pool.kill(job)}[how]()
        wait_until(lambda: not is_alive(grandchild))
        assert attempts(tmp_path) == {"parent": 1}


class TestMaxTasksPerChild:
    def test_renews_each_worker_of_an_embedded_pool_between_jobs(self, embedded, tmp_path):
        ex = embedded(2, max_tasks_per_child=5)
        jobs = [ex.submit(lambda i: (note(tmp_path, f"job{i}"), os.getpid())[1], i) for i in range(20)]
        lives = collections.Counter(job.result(60) for job in jobs)
        assert max(lives.values()) <= 5 and len(lives) >= 4
        assert list(attempts(tmp_path).values()) == [1] * 20

    def test_renews_a_worker_of_a_shared_server_for_who_asks_only(self, cluster):
        cluster.node()
        with cluster.executor(max_tasks_per_child=2) as mine, cluster.executor() as other:
            jobs = [mine.submit(os.getpid) for _ in range(6)]
            lives = collections.Counter(job.result(60) for job in jobs)
            assert max(lives.values()) <= 2
            theirs = {other.submit(os.getpid).result(60) for _ in range(20)}
            assert len(theirs - set(lives)) <= 1, "an executor without the limit wore a worker out"

    def test_of_the_node_holds_for_everybody(self, cluster):
        cluster.node("node", "--max-tasks", 3)
        with cluster.executor() as ex:
            lives = collections.Counter(ex.map(lambda _: os.getpid(), range(9), timeout=60))
            assert max(lives.values()) <= 3


class TestTooLarge:
    @pytest.fixture
    def small(self, own_mark):
        """An executor on a server that lets values of one megabyte pass, and one worker."""
        with minipool.Server(port=0, secret=minipool.Secret.new().text, max_value=1_000_000) as server:
            with minipool_worker.Node(server.address, secret=server.secret, cpu_workers=1, gpus=""):
                with minipool.Executor(server.address, secret=server.secret) as ex:
                    yield ex

    def test_an_argument_is_refused_before_it_is_sent(self, small):
        assert small.submit(len, bytes(900_000)).result(60) == 900_000
        with pytest.raises(TooLarge, match=r"arguments of len\(\): 2000\d\d\d bytes; the server allows 1000000"):
            small.submit(len, bytes(2_000_000))
        with pytest.raises(ValueError):
            small.map(len, [b"", bytes(2_000_000)])
        assert small.submit(abs, -1).result(60) == 1

    def test_a_result_is_refused_and_the_worker_lives(self, small):
        before = small.submit(os.getpid).result(60)
        bad, good = small.submit(bytes, 2_000_000), small.submit(bytes, 900_000)
        with pytest.raises(TooLarge, match=r"result of bytes\(\): 2000\d\d\d bytes; the server allows 1000000"):
            bad.result(60)
        assert bad.attempts == 1 and len(good.result(60)) == 900_000
        assert small.submit(os.getpid).result(60) == before

    def test_a_function_s_captured_value_is_refused_too(self, small):
        captured = bytes(2_000_000)
        with pytest.raises(TooLarge):
            small.submit(lambda: len(captured)).result(60)
        assert small.submit(abs, -1).result(60) == 1

    def test_an_exception_s_text_is_cut_or_refused(self, small):
        before = small.submit(os.getpid).result(60)
        bad = small.submit(lambda: fail(ValueError("x" * 2_000_000)))
        assert isinstance(bad.exception(60), TooLarge | RemoteError) and len(str(bad.exception())) < 1_000_000
        assert small.submit(os.getpid).result(60) == before


# ---- memory ----

class Cap:
    """A memory cgroup of our own: version 1 or 2, whichever this machine has."""

    def __init__(self, megabytes):
        one = Path("/sys/fs/cgroup/memory")
        root, limit = (one, "memory.limit_in_bytes") if one.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
        self.folder = root / f"minipool-test-{secrets.token_hex(4)}"
        self.folder.mkdir()
        (self.folder / limit).write_text(str(megabytes << 20))
        for no_swap in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            if (self.folder / no_swap).exists():
                (self.folder / no_swap).write_text(str(megabytes << 20 if "memsw" in no_swap else 0))

    def hold(self, pid):
        (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self):
        wait_until(lambda: not (self.folder / "cgroup.procs").read_text().split())
        self.folder.rmdir()


@pytest.fixture
def cap():
    """A cap of 200 MB; skips where we may not make one."""
    try:
        cap = Cap(200)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield cap
    cap.remove()


@pytest.mark.root
class TestTheKernelsOutOfMemoryKiller:
    def put(self, ex, cap, workers):
        """Cap the node and its workers, as Slurm and containers do."""
        for pid in (ex.info()["nodes"][0]["pid"], *wait_for_workers(ex, workers)):
            cap.hold(pid)

    def check(self, ex):
        greedy = ex.options(max_deaths=0).submit(lambda: len(b"x" * (500 << 20)))
        with pytest.raises(WorkerDied, match="out of memory, says its memory cgroup") as caught:
            greedy.result(60)
        assert caught.value.exitcode == -signal.SIGKILL
        assert list(ex.map(abs, range(-20, 0), timeout=60)) == list(range(20, 0, -1))

    def test_is_named_when_node_and_workers_are_capped(self, cap, embedded):
        ex = embedded(2)
        self.put(ex, cap, 2)
        self.check(ex)
        self.check(ex)

    def test_is_not_blamed_for_another_kill(self, cap, embedded):
        ex = embedded(1)
        self.put(ex, cap, 1)
        with pytest.raises(WorkerDied) as caught:
            ex.options(max_deaths=0).submit(lambda: os.kill(os.getpid(), signal.SIGKILL)).result(60)
        assert "memory cgroup" not in str(caught.value)


# ---- nodes ----

class TestANodeThatLeaves:
    def test_at_the_end_of_its_lifetime_lets_the_running_job_end(self, cluster, tmp_path):
        with cluster.executor() as ex:
            job = ex.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            node = cluster.node("node", "--lifetime", "3s")
            begun(tmp_path, "job")
            node.says("draining")
            late = ex.submit(note, tmp_path, "late")
            (tmp_path / "gate").touch()
            assert job.result(60) == "job" and job.attempts == 1
            assert node.code() == 0 and "Traceback" not in node.err
            assert not late.done() and late.cancel() and attempts(tmp_path) == {"job": 1}

    def test_at_the_end_of_its_lifetime_leaves_its_jobs_to_others(self, cluster, tmp_path):
        mortal = cluster.node("mortal", "--lifetime", "1.5s")
        with cluster.executor() as ex:
            cluster.node("heir")
            jobs = [ex.submit(lambda i: (note(tmp_path, f"job{i}"), time.sleep(0.02), i)[2], i) for i in range(150)]
            assert [job.result(60) for job in jobs] == list(range(150)) and mortal.code() == 0
            assert set(attempts(tmp_path).values()) == {1}

    def test_when_no_server_is_there_says_so_in_one_sentence(self, cluster):
        node = cluster.node("node", "--death-timeout", "0.5s")
        with cluster.executor(reconnect_timeout=0.1) as ex:
            worker, = wait_for_workers(ex, 1)
        cluster.server.signal(signal.SIGKILL)
        assert node.code() == 3
        assert re.search(r"no server for 0\.5 s .*$", node.err.splitlines()[-1]) and "Traceback" not in node.err
        wait_until(lambda: not is_alive(worker))

    def test_when_no_server_ever_came_says_so_too(self, cluster, program):
        cluster.server.signal(signal.SIGKILL)
        cluster.server.code()
        node = program(WORKER, "connect", cluster.address, "--secret-file", cluster.secret_file, "--cpu-workers", 1,
                       "--death-timeout", "0.5s")
        assert node.code() == 3 and "no server for 0.5 s" in node.err.splitlines()[-1] and "Traceback" not in node.err

    def test_rides_out_a_restart_that_is_shorter(self, cluster):
        node = cluster.node("node", "--death-timeout", "30s")
        with cluster.executor() as ex:
            worker = ex.submit(os.getpid).result(60)
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            assert ex.submit(os.getpid).result(60) == worker and node.process.poll() is None


class TestNames:
    def test_two_nodes_of_one_name_are_told_apart(self, cluster):
        cluster.node("twin")
        cluster.node("twin")
        with cluster.executor() as ex:
            workers = wait_for_workers(ex, 2)
            assert len(set(workers)) == 2 and len({node["name"] for node in ex.info()["nodes"]}) == 2
            for name, pid in pids(ex).items():
                assert ex.options(on=name).submit(os.getpid).result(60) == pid


class TestGpus:
    GPUS = [{"uuid": "GPU-aaaaaaaa-0000", "name": "NVIDIA A100"}, {"uuid": "GPU-bbbbbbbb-0000", "name": "NVIDIA H200"}]

    @pytest.fixture
    def gpus(self, monkeypatch, own_mark, tmp_path):
        """This machine has GPUs; those written into the file `lost` fall off the bus."""
        def have(number, **common):
            monkeypatch.setenv("FAKE_GPUS", json.dumps([gpu | common for gpu in self.GPUS[:number]]))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *sys.path]))
        monkeypatch.setenv("FAKE_GPU_LOST", str(tmp_path / "lost"))
        return have

    def test_have_one_node_at_a_time(self, gpus, cluster, program):
        gpus(1)
        first = cluster.node("first", cpu_workers=None)
        second = program(WORKER, "connect", cluster.address, "--secret-file", cluster.secret_file, "--name", "second")
        assert second.code() == 1 and "Traceback" not in second.err
        assert re.search(r"another node of this user has cuda:0 NVIDIA A100 GPU-aaaaaaaa", second.err.splitlines()[-1])
        with cluster.executor() as ex:
            assert ex.submit(abs, -1).result(60) == 1
            assert [node["name"] for node in ex.info()["nodes"]] == ["first"]
        first.signal(signal.SIGTERM)
        assert first.code() == 0
        cluster.node("third", cpu_workers=None)

    def test_are_free_again_after_a_node_that_was_killed(self, gpus, cluster):
        gpus(1)
        first = cluster.node("first", cpu_workers=None)
        first.signal(signal.SIGKILL)
        first.code()
        cluster.node("second", cpu_workers=None)

    def test_may_be_shared_out_between_nodes(self, gpus, cluster):
        gpus(2)
        for place in (0, 1):
            cluster.node(f"node{place}", "--gpus", place, cpu_workers=None)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)

    def test_are_lent_to_an_embedded_pool_with_a_warning(self, gpus, cluster, capfd):
        gpus(1)
        cluster.node("node", cpu_workers=None)
        with minipool.Executor("local") as ex:
            assert ex.submit(abs, -1).result(60) == 1
        warning, = [line for line in capfd.readouterr().err.splitlines() if "another node" in line]
        assert "cuda:0 NVIDIA A100 GPU-aaaaaaaa" in warning

    def watch(self, cluster, program):
        program("-c", WATCHFUL, "connect", cluster.address, "--secret-file", cluster.secret_file, cwd=ROOT)

    def test_that_fall_off_the_bus_take_no_more_jobs(self, gpus, cluster, program, tmp_path):
        gpus(2)
        self.watch(cluster, program)
        with cluster.executor() as ex:
            both = wait_for_workers(ex, 2)
            job = ex.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            victim = pid_of(tmp_path, "job")
            place, = [int(w["device"][-1]) for w in ex.info()["workers"] if w["pid"] == victim]
            (tmp_path / "lost").write_text(self.GPUS[place]["uuid"])
            begun(tmp_path, "job", 2)
            (tmp_path / "gate").touch()
            assert job.result(60) == "job" and job.attempts == 2
            assert list(pids(ex).values()) == [pid for pid in both if pid != victim]
            lost, = ex.info()["nodes"][0]["lost"]
            assert self.GPUS[place]["uuid"][:12] in lost and "lost" in lost


    def test_are_watched_where_nvml_cannot_tell_their_memory(self, gpus, cluster, program, tmp_path):
        gpus(2, memory=False)           # as on GPUs that share it with the CPU
        self.watch(cluster, program)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            (tmp_path / "lost").write_text(self.GPUS[1]["uuid"])
            wait_until(lambda: ex.info()["nodes"][0]["lost"], 10)
            assert [w["device"] for w in ex.info()["workers"]] == ["cuda:0"]

    def test_that_are_lost_are_told_to_the_next_server_too(self, gpus, cluster, program, tmp_path):
        gpus(2)
        self.watch(cluster, program)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            (tmp_path / "lost").write_text(self.GPUS[1]["uuid"])
            before = wait_until(lambda: ex.info()["nodes"][0]["lost"])
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            assert wait_until(lambda: [node["lost"] for node in ex.info()["nodes"] if node["lost"]]) == [before]


class TestHowFast:
    def test_a_killed_worker_is_noticed_and_replaced(self, embedded):
        ex, noticed, back = embedded(1), [], []
        for _ in range(12):
            worker = ex.submit(os.getpid).result(60)
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda worker=worker: worker not in pids(ex).values())
            noticed.append(time.monotonic() - began)
            wait_for_workers(ex, 1)
            back.append(time.monotonic() - began)
        for what, times in (("noticed", noticed), ("back", back)):
            print(f"{what}: median {1000 * statistics.median(times):.0f} ms, worst {1000 * max(times):.0f} ms")
        assert statistics.median(noticed) < 1 and statistics.median(back) < 3


class TestTheOddOnes:
    def test_a_job_without_memory_raises_and_its_worker_lives(self, pool):
        def gobble():
            import resource
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, before[1]))
            try:
                return len(bytes(8 << 30))
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        before = set(pids(pool).values())
        with pytest.raises(MemoryError):
            pool.submit(gobble).result(60)
        assert set(pids(pool).values()) == before

    def test_an_initializer_that_hangs_is_ended_by_the_job_s_time_limit(self, embedded):
        ex = embedded(1, initializer=time.sleep, initargs=(1000,))
        with pytest.raises(JobTimeout):
            ex.options(job_timeout=0.5).submit(abs, 1).result(60)
        ex.kill_workers()

    def test_a_slot_whose_workers_die_again_and_again_rests_ever_longer(self, embedded):
        ex, times = embedded(1), []
        for _ in range(7):
            began = time.monotonic()
            with pytest.raises(WorkerDied):
                ex.options(max_deaths=0).submit(os._exit, 3).result(60)
            times.append(time.monotonic() - began)
        print([f"{seconds:.2f}" for seconds in times])
        assert times[5] > 0.9 and times[6] > 1.9 and times[6] > 2 * min(times[1:5])

    def test_workers_are_never_forked(self, run_script):
        done = run_script("""
import os, threading, time, minipool
threading.Thread(target=time.sleep, args=(1,)).start()
os.fork = os.forkpty = None
with minipool.Executor("local", max_workers=2) as ex:
    print(sorted(ex.map(abs, [-1, -2])))
""", PYTHONWARNINGS="error::DeprecationWarning")
        assert done.stdout == "[1, 2]\n" and "Warning" not in done.stderr, done.stderr

    def test_ctrl_c_interrupts_the_caller_and_not_the_pool(self, program, tmp_path):
        client = program("-c", """
import minipool, time
with minipool.Executor("local", max_workers=1) as ex:
    slow = ex.submit(time.sleep, 2)
    try:
        print("ready", flush=True)
        slow.result()
    except KeyboardInterrupt:
        print("interrupted", slow.cancelled(), flush=True)
    print(ex.submit(pow, 2, 5).result(60), slow.exception(), flush=True)
""", PYTHONPATH=str(ROOT))
        client.says("ready")
        client.signal(signal.SIGINT)
        assert client.code() == 0 and client.out.endswith("interrupted False\n32 None\n"), client.err

    def test_a_server_outlives_its_terminal(self, cluster):
        cluster.node()
        with cluster.executor() as ex:
            cluster.server.signal(signal.SIGHUP)
            assert ex.submit(abs, -1).result(60) == 1 and cluster.server.process.poll() is None

    def test_a_pool_may_live_on_ipv6(self, own_mark):
        with minipool.Server("::1", 0) as server:
            with minipool_worker.Node(server.address, secret=server.secret, gpus="", cpu_workers=1):
                with minipool.Executor(server.address, secret=server.secret) as ex:
                    assert server.address.startswith("[::1]:") and ex.submit(abs, -1).result(60) == 1

    def test_a_server_s_name_is_resolved_anew_at_each_dial_and_all_its_addresses_are_tried(self, own_mark, monkeypatch):
        real, asked = socket.getaddrinfo, []

        def resolve(host, port, *rest):
            if host != "pool.example":
                return real(host, port, *rest)
            asked.append(host)
            places = ["127.0.0.2"] if len(asked) < 3 else ["127.0.0.2", "127.0.0.1"]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with minipool.Server(port=0) as server:
            port = server.address.partition(":")[2]
            with minipool.Executor(f"pool.example:{port}", secret=server.secret) as ex:
                assert ex.info()["workers"] == [] and len(asked) == 3
