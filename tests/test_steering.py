"""What its users can have a pool do: drain workers, begin all processes anew, run a job later, or once per key."""
import os
import threading
import time
from concurrent.futures import CancelledError

import pytest
from processes import pids, wait_for_workers, wait_until
from test_worker import note_and_wait

from minipool import Reschedule, current_job, get_executor


def pid():
    return os.getpid()


def wait_for_another(folder):
    """Wait for jobs of the same pool, of which the second begins when restart() has been called."""
    pool = get_executor()
    return [pool.submit(note_and_wait, folder, "job", folder / "gate").result() for _ in range(2)]


class TestRestart:
    def test_begins_all_processes_anew_and_cancels_what_there_is_row_2_41_row_3_15(self, embedded):
        ex = embedded(2)
        before = set(pids(ex).values())
        jobs = [ex.submit(time.sleep, 60) for _ in range(5)]
        wait_until(lambda: sum(job.running() for job in jobs) == 2)
        ex.restart()
        for job in jobs:
            with pytest.raises(CancelledError):
                job.result(10)
        after = set(pids(ex).values())
        assert len(after) == 2 and not before & after
        assert ex.submit(abs, -1).result(30) == 1

    def test_lets_jobs_of_others_end_once(self, cluster, tmp_path):
        cluster.node()
        with cluster.executor() as ours, cluster.executor() as theirs:
            before = wait_for_workers(ours, 1)
            job = theirs.submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            wait_until(job.running)
            ours.options(timeout=1).restart()
            (tmp_path / "gate").touch()
            assert job.result(60) == "job" and job.attempts == 1
            wait_until(lambda: wait_for_workers(ours, 1) != before)

    def test_lets_jobs_that_wait_for_others_have_them_run(self, cluster, tmp_path):
        cluster.node()
        with cluster.executor() as ours, cluster.executor() as theirs:
            before = wait_for_workers(ours, 1)
            job = theirs.submit(wait_for_another, tmp_path)
            wait_until(job.running)
            threading.Timer(0.5, (tmp_path / "gate").touch).start()
            ours.restart()
            assert job.result(60) == ["job", "job"] and job.attempts == 1
            assert wait_for_workers(ours, 1) != before


class TestDrain:
    def test_lets_a_worker_end_its_job_and_gives_it_no_other_row_2_43(self, cluster, tmp_path):
        cluster.node("first")
        cluster.node("second")
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            job = ex.options(on="first").submit(note_and_wait, tmp_path, "job", tmp_path / "gate")
            wait_until(job.running)
            ex.drain("first")
            assert {ex.submit(pid).result(30) for _ in range(4)} == {pids(ex)["second-0"]}
            (tmp_path / "gate").touch()
            assert job.result(60) == "job"
            wait_until(lambda: [node["name"] for node in ex.info()["nodes"]] == ["second"])

    def test_of_a_name_that_nobody_has_is_a_clear_error(self, embedded):
        with pytest.raises(ValueError, match="nowhere"):
            embedded(1).drain("nowhere")


def wait_for(file):
    if not file.exists():
        raise Reschedule
    return current_job().attempt


class TestReschedule:
    def test_sends_a_job_back_behind_the_others_as_often_as_it_is_raised_row_2_53(self, embedded, tmp_path):
        ex = embedded(1)
        job = ex.submit(wait_for, tmp_path / "file")
        ex.submit((tmp_path / "file").touch).result(30)
        assert job.result(30) > 1


class TestKey:
    def test_makes_two_jobs_one_while_a_future_is_alive_row_2_6_row_2_7(self, embedded):
        ex = embedded(1)
        job = ex.options(key="k").submit(os.urandom, 8)
        assert job.key == "k" and ex.options(key="k").submit(os.urandom, 8) is job
        assert ex.options(key="other").submit(os.urandom, 8).result(30) != job.result(30)
        old = job.result()
        del job
        assert ex.options(key="k").submit(os.urandom, 8).result(30) != old

    def test_is_none_unless_it_is_given_row_2_7(self, embedded):
        assert embedded(1).submit(abs, -1).key is None

    def test_is_text(self, embedded):
        with pytest.raises(TypeError, match="key="):
            embedded(1).options(key=1)


class TestAPoolWithoutWorkers:
    def test_says_once_what_jobs_wait_for(self, cluster, capfd):
        with cluster.executor() as ex:
            job = ex.submit(abs, -1)
            wait_until(lambda: not job.done() and "no worker has joined" in (said := capfd.readouterr().err) and said)
            cluster.node()
            assert job.result(30) == 1
        assert "no worker" not in capfd.readouterr().err
