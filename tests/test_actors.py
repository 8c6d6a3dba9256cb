"""Actors: an instance that lives in one worker, and the handle on it."""
import asyncio
import gc
import os
import signal
import time

import pytest

from minipool import Executor, Future, WorkerDied

SOON = 30


class Counter:
    kind = "counter"

    def __init__(self, n=0):
        self.n = n

    def add(self, k=1):
        self.n += k
        return self.n

    def fail(self):
        raise KeyError("gone")

    def place(self):
        return os.getpid()

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    async def later(self, value):
        await asyncio.sleep(0.01)
        return value + self.n


class Unwilling:
    def __init__(self):
        raise KeyError("no such model")

    def work(self):
        """Never reached."""


def after(seconds, value):
    time.sleep(seconds)
    return value


@pytest.fixture(scope="module")
def pool():
    with Executor("local", max_workers=2) as ex:
        ex.wait_for_workers(2, SOON)
        yield ex


class TestCalls:
    def test_a_hundred_increments_give_a_hundred_row_2_35(self, pool):
        counter = pool.actor(Counter)
        futures = [counter.add() for _ in range(100)]
        assert [future.result(SOON) for future in futures] == list(range(1, 101))
        assert counter.n == 100

    def test_a_call_is_a_future_with_the_methods_name(self, pool):
        future = pool.actor(Counter, 5).add(k=2)
        assert isinstance(future, Future) and future.name == "Counter.add" and future.result(SOON) == 7

    def test_plain_attributes_are_read_by_value(self, pool):
        counter = pool.actor(Counter, n=3)
        assert counter.n == 3 and counter.kind == "counter"
        with pytest.raises(AttributeError, match="nothing"):
            _ = counter.nothing

    def test_calls_before_the_constructor_has_ended_wait_for_it(self, pool):
        class Slow(Counter):
            def __init__(self):
                time.sleep(0.3)
                self.n = 1
        slow = pool.actor(Slow)
        assert [future.result(SOON) for future in [slow.add(), slow.add()]] == [2, 3]

    def test_a_call_may_be_given_futures(self, pool):
        counter = pool.actor(Counter)
        assert counter.add(pool.submit(after, 0.2, 100)).result(SOON) == 100

    def test_a_call_with_a_failed_future_fails_alike_and_the_next_runs(self, pool):
        counter = pool.actor(Counter)
        broken = pool.actor(Unwilling).work()
        calls = [counter.add(broken), counter.add()]
        with pytest.raises(KeyError, match="no such model"):
            calls[0].result(SOON)
        assert calls[1].result(SOON) == 1

    def test_an_exception_is_the_callers_and_the_instance_lives_on(self, pool):
        counter = pool.actor(Counter)
        with pytest.raises(KeyError, match="gone"):
            counter.fail().result(SOON)
        assert counter.add().result(SOON) == 1

    def test_coroutine_methods_are_awaited_row_2_54(self, pool):
        assert pool.actor(Counter, 1).later(2).result(SOON) == 3

    def test_all_calls_run_in_one_process_which_takes_other_jobs_between_them(self, pool):
        handles = [pool.actor(Counter) for _ in range(2)]
        assert len({a.place().result(SOON) for a in handles}) == 2, "two actors share a worker while another has none"
        assert sum(pool.map(after, [0.0] * 50, [1] * 50)) == 50
        assert len({handles[0].place().result(SOON) for _ in range(5)}) == 1


class TestTheConstructor:
    def test_its_error_is_raised_by_each_use(self, pool):
        handle = pool.actor(Unwilling)
        for _ in range(2):
            with pytest.raises(KeyError, match="no such model"):
                handle.work().result(SOON)

    def test_it_may_be_given_futures_and_no_call_overtakes_it(self, pool):
        counter = pool.actor(Counter, pool.submit(after, 0.3, 10))
        assert [call.result(SOON) for call in (counter.add(), counter.add())] == [11, 12]

    def test_it_needs_a_class(self, pool):
        with pytest.raises(TypeError, match="needs a class"):
            pool.actor(after)

    def test_on_says_where(self, pool):
        name = sorted(worker["name"] for worker in pool.info()["workers"])[1]
        handle = pool.options(on=name).actor(Counter)
        assert handle.add().result(SOON) == 1 and name in repr(handle)


class Caller:
    def __init__(self, other):
        self.other = other

    def add(self, k):
        return self.other.add(k).result(SOON)


class TestAHandleThatTravels:
    def test_is_used_by_jobs_on_any_worker(self, pool):
        counter = pool.actor(Counter)
        names = sorted(worker["name"] for worker in pool.info()["workers"])
        for name in names:
            assert pool.options(on=name).submit(lambda c: c.add(10).result(SOON), counter).result(SOON) > 0
        assert counter.n == 10 * len(names)

    def test_is_used_by_another_actor(self, pool):
        counter = pool.actor(Counter, 1)
        assert pool.actor(Caller, counter).add(2).result(SOON) == 3 and counter.n == 3

    def test_waits_for_the_constructor(self, pool):
        class Slow(Counter):
            def __init__(self):
                time.sleep(0.3)
                self.n = 1
        assert pool.submit(lambda c: c.add().result(SOON), pool.actor(Slow)).result(SOON) == 2

    def test_does_not_keep_the_instance_nor_end_it(self, pool):
        counter = pool.actor(Counter)
        pool.submit(lambda c: c.add().result(SOON), counter).result(SOON)
        gc.collect()
        assert counter.add().result(SOON) == 2

    def test_comes_back_as_a_result(self, pool):
        counter = pool.actor(Counter)
        assert pool.submit(lambda c: c, counter).result(SOON).add(4).result(SOON) == 4


class TestTheEnd:
    def test_a_death_in_a_call_names_actor_worker_device_and_signal_row_2_36(self, pool):
        handle = pool.actor(Counter)
        with pytest.raises(WorkerDied, match=r"Counter\.die took down.*local-\d on cpu.*SIGKILL") as caught:
            handle.die().result(SOON)
        assert caught.value.worker.startswith("local-") and caught.value.exitcode == -signal.SIGKILL
        with pytest.raises(WorkerDied, match="no more"):
            handle.add().result(SOON)
        assert pool.submit(after, 0, "the pool works").result(SOON) == "the pool works"

    def test_calls_that_wait_behind_a_death_are_lost_too_and_none_runs_elsewhere(self, pool):
        handle = pool.actor(Counter)
        handle.add().result(SOON)
        calls = [handle.die(), *(handle.add() for _ in range(20))]
        assert all(isinstance(call.exception(SOON), WorkerDied) for call in calls)

    def test_it_ends_with_the_last_reference_once_its_calls_have_run(self, pool, tmp_path):
        class Leaving(Counter):
            def __del__(self):
                (tmp_path / "ended").touch()
        handle = pool.actor(Leaving)
        calls = [handle.add() for _ in range(3)]
        del handle
        gc.collect()
        assert calls[-1].result(SOON) == 3
        give_up = time.monotonic() + SOON
        while not (tmp_path / "ended").exists():
            assert time.monotonic() < give_up, "the instance outlives its handle"
            time.sleep(0.01)

    def test_an_instance_ends_with_the_client_that_made_it(self, tmp_path):
        from minipool import Server
        from minipool_worker import Node

        class Leaving(Counter):
            def __del__(self):
                (tmp_path / "ended").touch()
        with Server(port=0, secret="secret of a test") as server, \
                Node(server.address, secret="secret of a test", cpu_workers=1):
            with Executor(server.address, secret="secret of a test") as ex:
                handle = ex.actor(Leaving)
                assert handle.add().result(SOON) == 1
            give_up = time.monotonic() + SOON
            while not (tmp_path / "ended").exists():
                assert time.monotonic() < give_up, "the instance outlives its client"
                time.sleep(0.01)
            del handle

    def test_a_closed_executor_takes_no_calls(self):
        with Executor("local", max_workers=1) as ex:
            handle = ex.actor(Counter)
            assert handle.add().result(SOON) == 1
        with pytest.raises(RuntimeError, match="after shutdown"):
            handle.add()
