"""Executor.run: a function now, on every worker, whatever else runs there."""
import os
import signal
import threading
import time

import pytest

from minipool import Executor, Server, WorkerDied, current_job
from minipool_worker import Node

SOON = 30
SECRET = "a secret of the tests"


def where():
    return os.getpid()


def raise_its_worker():
    raise KeyError(current_job().worker)


def sleep(seconds):
    time.sleep(seconds)
    return "slept"


def thread_and_environment():
    return threading.current_thread() is threading.main_thread(), os.environ.get("MINIPOOL_JOB")


@pytest.fixture(scope="module")
def pool():
    with Executor("local", max_workers=2) as ex:
        yield ex


def busy(pool, seconds):
    """Keep both workers at a job."""
    futures = [pool.submit(sleep, seconds) for _ in range(2)]
    while not all(future.running() for future in futures):
        time.sleep(0.01)
    return futures


def test_it_gives_one_value_per_worker_row_2_37(pool):
    pids = pool.run(where)
    assert sorted(pids) == ["local-0", "local-1"] and len(set(pids.values())) == 2


def test_busy_workers_answer_beside_their_job_trap_15(pool):
    futures = busy(pool, 1.0)
    assert len(pool.run(where)) == 2 and not any(future.done() for future in futures)
    assert [future.result(SOON) for future in futures] == ["slept", "slept"]


def test_it_runs_in_a_thread_of_its_own_and_leaves_the_jobs_environment_alone(pool):
    futures = busy(pool, 0.5)
    assert set(pool.run(thread_and_environment).values()) == {(False, future.id) for future in futures}


def test_on_says_where_row_3_26(pool):
    assert list(pool.options(on="local-1").run(where)) == ["local-1"]
    assert len(pool.options(on=["local-0", "local-1"]).run(where)) == 2


def test_the_first_exception_is_raised_when_all_have_answered(pool):
    with pytest.raises(KeyError, match="local-"):
        pool.run(raise_its_worker)


def test_the_wait_has_a_limit_and_the_workers_go_on(pool):
    with pytest.raises(TimeoutError, match="2 of 2 workers"):
        pool.options(timeout=0.1).run(sleep, 0.4)
    assert pool.submit(sleep, 0).result(SOON) == "slept"


def test_large_arguments_and_results_arrive(pool):
    assert [len(value) for value in pool.run(bytes.upper, b"x" * 500_000).values()] == [500_000] * 2


def test_what_does_not_travel_is_said_in_one_sentence(pool):
    with pytest.raises(TypeError, match="needs something callable"):
        pool.run(7)
    with pytest.raises(Exception, match="cannot pickle"):
        pool.run(sleep, threading.Lock())


def test_it_does_not_wait_for_an_initializer_and_is_not_stopped_by_one_that_raised():
    def bad():
        raise RuntimeError("no")
    with Executor("local", max_workers=1, initializer=bad) as ex:
        assert len(ex.run(where)) == 1
        assert ex.submit(where).exception(SOON) is not None


def test_a_worker_that_dies_meanwhile_is_an_error_that_names_it_and_the_job_beside_runs_again(pool):
    job, _ = busy(pool, 1.0)
    pid = pool.options(on=job.worker).run(where)[job.worker]
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerDied, match=r"sleep is lost, local-\d on cpu, died of SIGKILL"):
        pool.options(on=job.worker).run(sleep, 20)
    assert job.result(SOON) == "slept" and job.attempts == 2


def test_a_pool_without_workers_gives_nothing():
    with Server(port=0, secret=SECRET) as server, Executor(server.address, secret=SECRET) as ex:
        assert ex.run(where) == {}
        with Node(server.address, secret=SECRET, cpu_workers=1, name="n"):
            ex.wait_for_workers(1, SOON)
            assert list(ex.run(where)) == ["n-0"]
