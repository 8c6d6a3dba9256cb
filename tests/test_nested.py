"""Jobs that submit jobs: get_executor() in a job, waiting that lends the slot, secede() and rejoin()."""
import os
import signal
import threading
import time

import pytest
from processes import wait_until

import minipool
from minipool import Executor, JobKilled, JobTimeout, WorkerDied, current_job, gather, get_executor, rejoin, secede

SOON = 60
running, most = 0, 0        # jobs at work at this moment in this worker process, and the most there ever were


def down(n):
    return 0 if n == 0 else 1 + get_executor().submit(down, n - 1).result()


def fibonacci(n):
    """Count those of us who are at work, between their waits."""
    global running, most
    running += 1
    most = max(most, running)
    if n > 1:
        futures = [get_executor().submit(fibonacci, n - k) for k in (1, 2)]
        running -= 1
        n = sum(gather(futures))
        running += 1
    running -= 1
    return n


def square_elsewhere(n):
    secede()
    square = get_executor().submit(pow, n, 2).result()
    rejoin()
    return square


def where():
    return current_job().worker, os.environ["MINIPOOL_JOB"] == current_job().id


def where_before_and_after():
    return [where(), get_executor().submit(where).result(), where()]


def nested(fn, *args):
    return get_executor().submit(fn, *args).result()


def raise_key_error():
    raise KeyError("nested")


def end_process():
    os.kill(os.getpid(), signal.SIGKILL)


def close_twice():
    values = []
    for n in range(2):
        with get_executor() as ex:
            values += ex.map(abs, [-n, -n])
    return values


def submit_and_leave(file):
    get_executor().submit(touch, file)


def touch(file):
    open(file, "w").close()


def fails_and_skips(n):
    futures = [get_executor().submit(divmod, n, k) for k in (0, 1)]
    return gather(futures, errors="skip")


def leaves_it_open():
    with get_executor() as ex:
        future = ex.submit(abs, -7)
    return future.result(0)


def in_a_fork():
    """Wait for a job in a child of this process, whose slot it has not; the child ends with what that raises."""
    pid = os.fork()
    if pid == 0:
        try:
            get_executor().submit(abs, -1).result(5)
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, get_executor().submit(abs, -2).result()


def sleep_at(file):
    touch(file)
    time.sleep(600)


def wait_for_one_that_sleeps(file):
    get_executor().submit(sleep_at, file).result()


def secede_until(file):
    """Leave the slot, and take it again only when `file` is there: by then another job has it."""
    secede()
    wait_for(file)
    rejoin()
    return "back"


def let_it_return(file):
    touch(file)
    time.sleep(0.2)         # so that it waits for this slot
    secede()
    return "left"


def wait_for(file):
    deadline = time.monotonic() + SOON
    while not os.path.exists(file) and time.monotonic() < deadline:
        time.sleep(0.01)


def thread_names():
    return [thread.name for thread in threading.enumerate()]


def how_many_workers(_):
    return len({worker["name"] for worker in get_executor().info()["workers"]})


@pytest.fixture(scope="module")
def one():
    with Executor("local", max_workers=1) as ex:
        yield ex


jobs_seen = []


def note_the_job():
    jobs_seen.append(current_job())


class TestOneWorker:
    def test_is_enough_for_a_recursion_of_depth_50_row_2_27(self, one):
        assert one.submit(down, 50).result(SOON) == 50

    def test_runs_one_job_at_a_time_however_they_wait_for_each_other(self, one):
        assert one.submit(fibonacci, 9).result(SOON) == 34
        assert one.submit(lambda: most).result(SOON) == 1

    def test_runs_the_inner_job_while_the_outer_one_has_seceded_row_2_28(self, one):
        assert [one.submit(square_elsewhere, n).result(SOON) for n in range(4)] == [0, 1, 4, 9]

    def test_needs_no_more_threads_for_it_afterwards(self, one):
        one.submit(down, 20).result(SOON)
        wait_until(lambda: "minipool-jobs" not in one.run(thread_names)["local-0"], SOON)

    def test_that_renews_itself_after_each_job_is_enough_too(self, embedded):
        ex = embedded(1, max_tasks_per_child=1)
        assert ex.submit(down, 5).result(SOON) == 5

    def test_that_dies_costs_the_inner_job_and_the_outer_one_has_the_error(self, embedded):
        ex = embedded(1)
        outer = ex.submit(nested, end_process)
        with pytest.raises(WorkerDied):
            outer.result(SOON)
        assert ex.submit(abs, -1).result(SOON) == 1


class TestWaitingInAJob:
    @pytest.mark.parametrize("fn, value", [(fails_and_skips, [(5, 0)]), (leaves_it_open, 7)])
    def test_of_any_kind_lends_the_slot(self, one, fn, value):
        assert one.submit(fn, *([5] if fn is fails_and_skips else [])).result(SOON) == value

    def test_for_the_slot_ends_when_the_job_that_has_it_leaves_it(self, one, tmp_path):
        file = str(tmp_path / "file")
        jobs = one.submit(secede_until, file), one.submit(let_it_return, file)
        assert [job.result(SOON) for job in jobs] == ["back", "left"]

    def test_in_a_fork_is_refused_and_harms_nobody(self, one):
        assert one.submit(in_a_fork).result(SOON) == (1, 2)

    def test_can_be_ended_by_kill_and_the_job_that_runs_meanwhile_is_not_charged(self, embedded, tmp_path):
        ex, file = embedded(1), str(tmp_path / "file")
        outer = ex.submit(wait_for_one_that_sleeps, file)
        wait_for(file)
        ex.kill(outer)
        with pytest.raises(JobKilled):
            outer.result(SOON)
        assert ex.submit(abs, -1).result(SOON) == 1

    def test_can_be_ended_by_a_time_limit(self, embedded, tmp_path):
        outer = embedded(1).options(job_timeout=1).submit(wait_for_one_that_sleeps, str(tmp_path / "file"))
        with pytest.raises(JobTimeout):
            outer.result(SOON)


class TestTheExecutorInAJob:
    def test_is_on_the_same_pool_and_the_job_goes_on_where_it_was(self, pool):
        before, inner, after = pool.submit(where_before_and_after).result(SOON)
        assert before == after and inner[0] in ("local-0", "local-1") and before[1] and inner[1]

    def test_has_an_inner_job_s_exception_as_it_is(self, pool):
        with pytest.raises(KeyError, match="nested"):
            pool.submit(nested, raise_key_error).result(SOON)

    def test_can_be_closed_and_had_again(self, pool):
        assert pool.submit(close_twice).result(SOON) == [0, 0, 1, 1]

    def test_runs_what_its_job_does_not_wait_for(self, pool, tmp_path):
        pool.submit(submit_and_leave, str(tmp_path / "file")).result(SOON)
        wait_for(tmp_path / "file")
        assert (tmp_path / "file").exists()

    def test_dials_a_server_that_was_started_again_too(self, cluster):
        with cluster.executor() as ex:
            cluster.node("node", cpu_workers=2)
            assert ex.submit(down, 3).result(SOON) == 3
            cluster.server.signal(signal.SIGKILL)
            cluster.server.code()
            cluster.serve()
            assert ex.submit(down, 3).result(SOON) == 3

    def test_needs_no_secret_in_the_job(self, cluster):
        with cluster.executor() as ex:
            cluster.node("node", cpu_workers=1)
            assert ex.submit(nested, how_many_workers, 0).result(SOON) == 1
            environment = ex.submit(lambda: dict(os.environ)).result(SOON)
            assert not any(cluster.secret in value for value in environment.values())


class TestOutsideAJob:
    def test_an_initializer_is_no_job_nor_the_one_before_it(self, embedded):
        ex = embedded(1)
        ex.submit(abs, -1).result(SOON)
        ex.on_start(note_the_job)
        assert ex.submit(lambda: jobs_seen).result(SOON) == [None]

    def test_it_is_the_one_opened_last_and_still_open(self, one, own_pool):
        second = own_pool(1)
        assert get_executor() is second
        second.shutdown()
        assert get_executor() is not second

    def test_without_one_it_is_an_error_that_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr(minipool, "_clients", {})
        with pytest.raises(RuntimeError, match="make one first"):
            get_executor()

    @pytest.mark.parametrize("call", [secede, rejoin])
    def test_there_is_no_slot_to_leave_or_take(self, call):
        with pytest.raises(RuntimeError, match="inside a job"):
            call()
