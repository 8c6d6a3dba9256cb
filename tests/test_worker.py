"""Workers, their node, and the ways to die: nobody else's job notices, and no process is left."""

import collections
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FAKES, ROOT, end, is_alive, marked, pids, read, wait_for_workers, wait_until

import minipool
from minipool import JobKilled, ServerLost, WorkerDied

pytestmark = [pytest.mark.usefixtures("own_mark"),
              pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and kills as Linux does")]


# ---- what the jobs do; each attempt leaves a file, so that attempts can be counted from outside ----

def note(folder, name):
    (Path(folder) / f"{name}.{os.getpid()}.{time.monotonic_ns()}").touch()


def attempts(folder):
    """Return how often each job was begun, by its name."""
    return collections.Counter(path.name.split(".")[0] for path in Path(folder).glob("*.*.*"))


def note_and_wait(folder, name, gate):
    note(folder, name)
    while not Path(gate).exists():
        time.sleep(0.005)
    return name


def hold_the_gil(seconds):
    ctypes.PyDLL(None).sleep(seconds)       # PyDLL, unlike CDLL, does not let go of it


WAYS_TO_DIE = {
    "os._exit(3)": (lambda: os._exit(3), 3),
    "a segmentation fault": (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    "abort()": (os.abort, -signal.SIGABRT),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
    "a signal without a name": (lambda: os.kill(os.getpid(), 40), -40),
}


def die(way, folder):
    note(folder, "bad")
    print("last words", file=sys.stderr, flush=True)
    way()


def spawn_and_wait(folder, gate="never"):
    child = subprocess.Popen(["sleep", "300"])
    (Path(folder) / "grandchild").write_text(str(child.pid))
    note_and_wait(folder, "parent", Path(folder) / gate)


def grandchild_in(folder):
    path = Path(folder) / "grandchild"
    return wait_until(lambda: path.exists() and path.read_text().isdecimal() and int(path.read_text()))


class TestAWorkerThatIsKilled:
    def test_costs_another_attempt_of_its_running_job_only(self, embedded, tmp_path):
        ex = embedded(1)
        jobs = [ex.submit(note_and_wait, tmp_path, f"job{i}", tmp_path / "gate") for i in range(6)]
        wait_until(lambda: attempts(tmp_path)["job0"] == 1)
        os.kill(*pids(ex).values(), signal.SIGKILL)
        wait_until(lambda: attempts(tmp_path)["job0"] == 2)
        (tmp_path / "gate").touch()
        assert [job.result(60) for job in jobs] == [f"job{i}" for i in range(6)]
        assert attempts(tmp_path) == {"job0": 2, "job1": 1, "job2": 1, "job3": 1, "job4": 1, "job5": 1}

    def test_again_and_again_charges_no_job_that_only_waited(self, embedded, tmp_path):
        ex = embedded(1)
        first = ex.options(max_deaths=9).submit(note_and_wait, tmp_path, "first", tmp_path / "gate")
        rest = [ex.options(max_deaths=1).submit(abs, -i) for i in range(20)]
        for life in range(1, 6):
            wait_until(lambda life=life: attempts(tmp_path)["first"] == life)
            os.kill(*wait_for_workers(ex, 1), signal.SIGKILL)
        (tmp_path / "gate").touch()
        assert first.result(60) == "first" and first.attempts == 6
        assert [job.result(60) for job in rest] == list(range(20))

    def test_while_idle_is_replaced_by_another(self, embedded):
        ex = embedded(2)
        before = wait_for_workers(ex, 2)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(pids(ex)) == 2 and before[0] not in pids(ex).values())
        assert set(ex.map(abs, range(-20, 0), timeout=60)) == set(range(1, 21))

    def test_takes_its_grandchildren_along(self, embedded, tmp_path):
        ex = embedded(1)
        job = ex.options(max_deaths=0).submit(spawn_and_wait, tmp_path)
        grandchild = grandchild_in(tmp_path)
        os.kill(*pids(ex).values(), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            job.result(60)
        wait_until(lambda: not is_alive(grandchild))


class TestAJobThatKillsItsWorker:
    @pytest.mark.parametrize("way", WAYS_TO_DIE)
    def test_fails_alone_after_max_deaths_and_one_attempts(self, embedded, tmp_path, way):
        ex, (deed, code) = embedded(2), WAYS_TO_DIE[way]
        bad = ex.options(max_deaths=2, name="bad").submit(die, deed, tmp_path)
        good = [ex.submit(abs, -i) for i in range(100)]
        with pytest.raises(WorkerDied) as caught:
            bad.result(100)
        error = caught.value
        assert attempts(tmp_path)["bad"] == error.attempts == bad.attempts == 3
        assert (error.job, error.exitcode, error.node, error.device) == ("bad", code, "local", "cpu")
        assert error.worker.startswith("local") and "last words" in error.stderr
        for words in ("bad", "3 attempts", error.worker, "cpu", "last words"):
            assert words in str(error)
        assert [job.result(60) for job in good] == list(range(100))
        assert ex.submit(abs, -7).result(60) == 7

    def test_runs_once_at_most_if_no_death_is_allowed(self, embedded, tmp_path):
        bad = embedded(1).options(max_deaths=0).submit(die, WAYS_TO_DIE["os._exit(3)"][0], tmp_path)
        with pytest.raises(WorkerDied):
            bad.result(60)
        assert attempts(tmp_path)["bad"] == 1

    def test_shows_the_signal_s_name(self, embedded, tmp_path):
        bad = embedded(1).options(max_deaths=0).submit(die, WAYS_TO_DIE["a segmentation fault"][0], tmp_path)
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            bad.result(60)

    def test_is_noticed_though_a_fork_of_it_lives(self, embedded, tmp_path):
        def fork_and_die():
            if os.fork() == 0:
                os.setsid()         # out of reach for the group's kill, and it holds copies of every pipe
                (tmp_path / "grandchild").write_text(str(os.getpid()))
                time.sleep(300)
            while not (tmp_path / "grandchild").exists():
                time.sleep(0.005)
            os._exit(3)
        bad = embedded(1).options(max_deaths=0).submit(fork_and_die)
        try:
            with pytest.raises(WorkerDied):
                bad.result(100)
            assert is_alive(grandchild_in(tmp_path))
        finally:
            end(grandchild_in(tmp_path))


class TestASlowWorkerIsNotDead:
    @pytest.mark.slow
    def test_while_a_job_holds_the_gil(self, embedded, tmp_path):
        ex = embedded(2)
        before = set(wait_for_workers(ex, 2))
        slow = ex.submit(lambda: (note(tmp_path, "slow"), hold_the_gil(8)))
        wait_until(lambda: attempts(tmp_path)["slow"])
        assert [ex.submit(abs, -1).result(60) for _ in range(10)] == [1] * 10
        slow.result(60)
        assert attempts(tmp_path)["slow"] == 1 and set(pids(ex).values()) == before

    def test_and_can_be_killed_all_the_same(self, embedded, tmp_path):
        ex = embedded(1)
        slow = ex.submit(lambda: (note(tmp_path, "slow"), hold_the_gil(300)))
        wait_until(lambda: attempts(tmp_path)["slow"])
        ex.kill(slow)
        with pytest.raises(JobKilled):
            slow.result(60)
        assert ex.submit(abs, -1).result(60) == 1

    def test_while_it_prints_more_than_anybody_reads(self, embedded):
        ex = embedded(1)
        assert ex.submit(lambda: [print("x" * 1000) for _ in range(20_000)] and 5).result(60) == 5
        assert len(pids(ex)) == 1


class TestKill:
    def test_ends_the_running_job_and_the_worker_is_back(self, embedded, tmp_path):
        ex = embedded(1)
        job = ex.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
        wait_until(lambda: attempts(tmp_path)["job"])
        before = wait_for_workers(ex, 1)
        ex.kill(job)
        with pytest.raises(JobKilled, match="kill"):
            job.result(60)
        assert ex.submit(os.getpid).result(60) not in before
        assert attempts(tmp_path)["job"] == 1

    def test_of_a_job_that_has_not_begun_costs_no_worker(self, embedded, tmp_path):
        ex = embedded(1)
        first = ex.submit(note_and_wait, tmp_path, "first", tmp_path / "gate")
        second = ex.submit(note, tmp_path, "second")
        wait_until(lambda: attempts(tmp_path)["first"])
        before = wait_for_workers(ex, 1)
        ex.kill(second)
        with pytest.raises(JobKilled):
            second.result(60)
        (tmp_path / "gate").touch()
        assert first.result(60) == "first" and wait_for_workers(ex, 1) == before
        assert attempts(tmp_path) == {"first": 1}

    @pytest.mark.slow
    def test_that_races_the_end_of_the_job_hits_it_or_nothing(self, embedded, tmp_path):
        ex, seed = embedded(2), random.randrange(1 << 32)
        print("seed", seed)
        chance, survived = random.Random(seed), 0
        for turn in range(200):
            victim = ex.submit(lambda turn: (note(tmp_path, f"victim{turn}"), time.sleep(0.002)), turn)
            others = [ex.options(max_deaths=0).submit(note, tmp_path, f"other{turn}x{i}") for i in range(2)]
            time.sleep(chance.uniform(0, 0.004))        # the race itself, not a wait for anything
            ex.kill(victim)
            assert [other.result(60) for other in others] == [None, None]
            survived += victim.exception(60) is None
            assert victim.exception() is None or isinstance(victim.exception(), JobKilled)
        assert set(attempts(tmp_path).values()) == {1}, "a job was hit that nobody aimed at"
        assert 0 < survived < 200


class TestParentDeath:
    def processes(self, ex, folder, workers=2):
        """Return the node's process id and those of everything below it, a grandchild among them."""
        started = ex.submit(spawn_and_wait, folder)
        grandchild = grandchild_in(folder)
        node, = [node["pid"] for node in ex.info()["nodes"]]
        assert not started.done()
        return node, [*wait_for_workers(ex, workers), grandchild]

    def test_the_node_s_takes_workers_and_grandchildren_along(self, cluster, tmp_path):
        cluster.node(cpu_workers=2)
        with cluster.executor() as ex:
            node, below = self.processes(ex, tmp_path)
            os.kill(node, signal.SIGKILL)
            wait_until(lambda: not any(map(is_alive, below)))
            ex.kill_workers()       # nobody is left to run the job again

    def test_an_embedded_pool_s_child_takes_all_along_and_futures_say_so(self, embedded, tmp_path):
        ex = embedded(2)
        node, below = self.processes(ex, tmp_path)
        waiting = ex.submit(note_and_wait, tmp_path, "waiting", tmp_path / "gate")
        os.kill(node, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, below)))
        with pytest.raises(ServerLost):
            waiting.result(60)

    def test_the_client_s_takes_its_embedded_pool_along(self, program, own_mark, tmp_path):
        script = ("import sys, time, minipool, test_worker\n"
                  "ex = minipool.Executor('local', max_workers=2)\n"
                  "ex.submit(test_worker.spawn_and_wait, sys.argv[1])\n"
                  "print('started', flush=True)\ntime.sleep(300)")
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])
        client = program("-c", script, tmp_path, PYTHONPATH=path)
        client.says("started")
        grandchild = grandchild_in(tmp_path)
        client.signal(signal.SIGKILL)
        client.code()
        wait_until(lambda: not marked(own_mark))
        assert not is_alive(grandchild)

    def test_reaches_a_worker_whose_threads_cannot_run(self, embedded, tmp_path):
        ex = embedded(1)
        ex.submit(lambda: (note(tmp_path, "slow"), hold_the_gil(300)))
        wait_until(lambda: attempts(tmp_path)["slow"])
        worker, = pids(ex).values()
        os.kill(ex.info()["nodes"][0]["pid"], signal.SIGKILL)
        wait_until(lambda: not is_alive(worker))


class TestWhatAWorkerSees:
    def environ(self):
        names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
        return {name: os.environ.get(name) for name in names}, minipool.current_job().device

    def fake_gpus(self, monkeypatch, *gpus):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *sys.path]))
        monkeypatch.setenv("FAKE_GPUS", json.dumps(gpus))

    def seen(self, ex, workers):
        """Return, by worker, the mask it has, and the device that its jobs are told of."""
        wait_for_workers(ex, workers)
        names = sorted(pids(ex))
        views = [ex.options(on=name).submit(self.environ).result(60) for name in names]
        assert {device for _, device in views} <= {"cuda:0", "cpu"}     # in its process there is one only
        return [environ["CUDA_VISIBLE_DEVICES"] for environ, _ in views]

    def test_no_gpu_for_cpu_workers(self, embedded):
        ex = embedded(2)
        assert self.seen(ex, 2) == ["", ""]

    def test_its_own_gpu_only(self, monkeypatch, own_mark):
        self.fake_gpus(monkeypatch, {"uuid": "GPU-a"}, {"uuid": "GPU-b"}, {"uuid": "GPU-c"})
        with minipool.Executor("local") as ex:
            assert self.seen(ex, 3) == ["0", "1", "2"]
            assert ex.submit(self.environ).result(60)[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            assert sorted(w["device"] for w in ex.info()["workers"]) == ["cuda:0", "cuda:1", "cuda:2"]
            assert "cuda:0, cuda:1, cuda:2" in repr(ex)

    def test_its_mig_instance_and_several_share_one(self, monkeypatch, cluster):
        self.fake_gpus(monkeypatch, {"uuid": "GPU-a", "mig": [{"uuid": "MIG-1"}, {"uuid": "MIG-2"}]})
        node = cluster.node("node", "--workers-per-gpu", 2, cpu_workers=None)
        assert "4 workers: cuda:0" in node.err
        with cluster.executor() as ex:
            assert self.seen(ex, 4) == ["MIG-1", "MIG-1", "MIG-2", "MIG-2"]

    def test_its_name_and_the_job_s_but_never_the_secret(self, cluster, own_mark):
        cluster.node(MINIPOOL_SECRET=cluster.secret, cpu_workers=2)
        with cluster.executor() as ex:
            workers = wait_for_workers(ex, 2)
            assert ex.submit(os.getenv, "MINIPOOL_WORKER").result(60) in pids(ex)
            assert ex.submit(os.getenv, "MINIPOOL_SECRET").result(60) is None
            secret = cluster.secret.encode()
            assert not [pid for pid in workers if secret in read(pid, "environ")]
            assert not [pid for pid in marked(own_mark) if secret in read(pid, "cmdline")]


class TestARestartOfTheServer:
    def test_leaves_a_running_job_at_it_and_loses_none(self, cluster, tmp_path):
        cluster.node(cpu_workers=2)
        with cluster.executor() as ex:
            before = set(wait_for_workers(ex, 2))
            jobs = [ex.submit(note_and_wait, tmp_path, f"job{i}", tmp_path / "gate") for i in range(8)]
            wait_until(lambda: len(attempts(tmp_path)) == 2)
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            assert set(wait_for_workers(ex, 2)) == before
            (tmp_path / "gate").touch()
            assert [job.result(60) for job in jobs] == [f"job{i}" for i in range(8)]
            assert set(attempts(tmp_path).values()) == {1}

    def test_delivers_what_ended_meanwhile(self, cluster, tmp_path):
        cluster.node()
        with cluster.executor() as ex:
            job = ex.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            wait_until(lambda: attempts(tmp_path)["job"])
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            (tmp_path / "gate").touch()
            cluster.serve()
            assert job.result(60) == "job"
            assert ex.submit(abs, -1).result(60) == 1
        assert attempts(tmp_path)["job"] == 1

    def test_takes_new_workers_after_a_kill_in_the_new_life(self, cluster, tmp_path):
        cluster.node()
        with cluster.executor() as ex:
            before = wait_for_workers(ex, 1)
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            job = ex.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            wait_until(lambda: attempts(tmp_path)["job"] == 1)
            os.kill(*before, signal.SIGKILL)
            wait_until(lambda: attempts(tmp_path)["job"] == 2)
            (tmp_path / "gate").touch()
            assert job.result(60) == "job"
