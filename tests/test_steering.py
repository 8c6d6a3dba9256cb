"""What its users can have a pool do: drain workers, begin all processes anew, or run a job later."""
import os
import threading
import time
from concurrent.futures import CancelledError

import pytest
from processes import pids, wait_for_workers, wait_until
from test_worker import hold_the_gil, note_and_wait

from minipool import JobTimeout, Reschedule, WorkerDied, current_job, get_executor


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
            ours.restart(timeout=1)
            (tmp_path / "gate").touch()
            assert job.result(60) == "job" and job.attempts == 1
            wait_until(lambda: wait_for_workers(ours, 1) != before)

    def test_is_not_held_up_by_a_job_that_holds_the_gil_or_a_worker_that_ends(self, cluster):
        cluster.node(cpu_workers=2)
        with cluster.executor() as ex:
            before = wait_for_workers(ex, 2)
            stuck, killed = [ex.submit(hold_the_gil, 60) for _ in range(2)]
            wait_until(lambda: stuck.running() and killed.running())
            ex.kill(killed)
            ex.restart()
            assert stuck.cancelled() and ex.submit(abs, -1).result(30) == 1
            assert not set(before) & set(wait_for_workers(ex, 2))

    def test_ends_jobs_that_were_killed_during_a_cut(self, cluster):
        cluster.node()
        with cluster.executor() as ex:
            wait_for_workers(ex, 1)
            job = ex.submit(time.sleep, 60)
            wait_until(job.running)
            ex._client.peer.connection.close()
            ex.kill(job)
            assert job.cancel() and job.cancelled()
            assert ex.submit(abs, -1).result(30) == 1

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

    def test_outlasts_a_death_and_no_exit_code_is_taken_for_it(self, cluster):
        node, other = cluster.node("first"), cluster.node("second")
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            limited = ex.options(on="first", job_timeout=1).submit(time.sleep, 60)
            wait_until(limited.running)
            ex.drain("first")
            assert isinstance(limited.exception(30), JobTimeout) and node.code() == 0
            with pytest.raises(WorkerDied):
                ex.options(max_deaths=0).submit(os._exit, 75).result(30)
            assert ex.submit(abs, -1).result(30) == 1 and other.process.poll() is None

    def test_of_a_name_that_nobody_has_or_of_an_embedded_pool_is_a_clear_error(self, embedded, cluster):
        with pytest.raises(ValueError, match="that could be drained is called 'nowhere'"), cluster.executor() as ex:
            ex.drain("nowhere")
        with pytest.raises(ValueError, match="that could be drained is called 'local'"):
            embedded(1).drain("local")


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


class TestAPoolWithoutWorkers:
    def test_says_once_what_jobs_wait_for(self, cluster, capfd):
        with cluster.executor() as ex:
            job = ex.submit(abs, -1)
            wait_until(lambda: not job.done() and "no worker has joined" in (said := capfd.readouterr().err) and said)
            cluster.node()
            assert job.result(30) == 1
        assert "no worker" not in capfd.readouterr().err
