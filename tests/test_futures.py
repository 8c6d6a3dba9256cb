"""Futures as arguments: a job begins when its inputs are done, and sees their values in their place."""

import concurrent.futures
import functools
import os
import pickle
import threading
import time
from concurrent.futures import CancelledError

import pytest
from processes import wait_until
from test_executor import SOON, capture, fail, note, noted, occupy, pass_gate, same

import minipool
from minipool import Executor, TooLarge, gather

# ---- jobs ----

class Box:
    """A class of the user's that holds what it is given."""

    def __init__(self, content):
        self.content = content


class LoadsAsLock:
    """Arrives as a lock, which does not pickle again."""

    def __reduce__(self):
        return threading.Lock, ()


def add(*numbers):
    return sum(numbers)


def add_noted(path, *numbers):
    note(path, "ran")
    return sum(numbers)


def is_same(one, other):
    return one is other


def length(value):
    return len(value)


def kind(value):
    return type(value).__name__


class TestAnInput:
    @pytest.mark.parametrize("place", [
        lambda f: f, lambda f: [f], lambda f: (1, f), lambda f: {f}, lambda f: {"key": f}, lambda f: {f: "value"},
        lambda f: [[{"deep": (f, [f])}]], lambda f: frozenset([f])], ids=[
            "itself", "list", "tuple", "set", "dict", "key of a dict", "nested", "frozenset"])
    def test_is_replaced_by_its_value_wherever_it_is(self, pool, place):
        assert pool.submit(same, place(pool.submit(same, 7))).result(SOON) == place(7)

    def test_is_replaced_in_keywords_too(self, pool):
        one, two = pool.submit(same, 1), pool.submit(same, 2)
        assert pool.submit(capture, one, two=two, more=[one]).result(SOON) == ((1,), {"two": 2, "more": [1]})

    def test_is_replaced_inside_an_object_of_the_users_own(self, pool):
        def content(box):
            return box.content
        assert pool.submit(content, Box(pool.submit(same, 7))).result(SOON) == 7

    def test_is_replaced_inside_a_partial_that_is_an_argument(self, pool):
        def call(fn):
            return fn()
        assert pool.submit(call, functools.partial(add, pool.submit(same, 1), 2)).result(SOON) == 3

    def test_that_the_function_itself_holds_is_an_error_that_says_what_to_do(self, pool):
        future = pool.submit(same, 1)
        for fn in (functools.partial(add, future, 2), lambda: future):
            with pytest.raises(pickle.PicklingError, match="give it as an argument, for its value"):
                pool.submit(fn)

    def test_need_not_be_done_when_it_is_given(self, pool, gate):
        waits = pool.submit(pass_gate, gate.path, 7)
        sums = [pool.submit(add, waits, n) for n in range(10)]
        assert not any(future.done() or future.running() for future in sums)
        gate.open()
        assert [future.result(SOON) for future in sums] == list(range(7, 17))

    def test_keeps_no_worker_busy_while_it_is_waited_for(self, pool, gate):
        waits = pool.submit(pass_gate, gate.path, 1)
        dependants = [pool.submit(same, waits) for _ in range(10)]
        assert pool.submit(same, "past them").result(SOON) == "past them"
        gate.open()
        assert [future.result(SOON) for future in dependants] == [1] * 10

    def test_may_be_dropped_by_the_user_at_once(self, pool):
        assert pool.submit(add, pool.submit(add, pool.submit(same, 1), 1), 1).result(SOON) == 3

    def test_that_is_given_twice_is_one_object_there(self, pool):
        future = pool.submit(same, [1])
        assert pool.submit(is_same, future, future).result(SOON)

    def test_serves_many_jobs(self, pool):
        future = pool.submit(same, 5)
        assert [f.result(SOON) for f in [pool.submit(add, future, n) for n in range(50)]] == list(range(5, 55))

    def test_may_have_been_looked_at(self, pool):
        future = pool.submit(same, [1, 2])
        assert future.result(SOON) == [1, 2] and pool.submit(length, future).result(SOON) == 2

    @pytest.mark.parametrize("is_looked_at", [False, True])
    @pytest.mark.parametrize("size", [0, 1000, minipool.INLINE, 3_000_000])
    def test_may_have_any_size(self, pool, size, is_looked_at):
        future = pool.submit(bytes, size)
        assert not is_looked_at or len(future.result(SOON)) == size
        assert pool.submit(length, future).result(SOON) == size

    @pytest.mark.parametrize("is_looked_at", [False, True])
    def test_may_be_an_array(self, pool, is_looked_at):
        numpy = pytest.importorskip("numpy")

        def double(array):
            array *= 2          # it is writable, as any argument
            return float(array.sum())
        future = pool.submit(numpy.ones, 500_000)
        assert not is_looked_at or future.result(SOON).sum() == 500_000
        assert pool.submit(double, future).result(SOON) == 1_000_000
        assert pool.submit(double, future).result(SOON) == 1_000_000        # each job has a copy of its own

    def test_that_is_none_is_none(self, pool):
        assert pool.submit(kind, pool.submit(same, None)).result(SOON) == "NoneType"

    def test_takes_no_part_in_what_the_other_arguments_are_when_it_arrives(self, pool, gate):
        """Arguments are copied when they are given, not when the job is sent."""
        numpy = pytest.importorskip("numpy")
        small, large = [1, 2], numpy.ones(100_000)
        future = pool.submit(capture, pool.submit(pass_gate, gate.path), small, large)
        small.clear()
        large[:] = 0
        gate.open()
        (_, got_small, got_large), _ = future.result(SOON)
        assert got_small == [1, 2] and got_large.sum() == 100_000

    def test_goes_with_the_options_of_the_job_that_takes_it(self, pool, tmp_path):
        path = str(tmp_path / "notes")

        def fail_once(path, value):
            note(path, "call")
            if len(noted(path)) == 1:
                raise OSError("not yet")
            return value
        retrying = pool.options(retries=1, retry_on=OSError, name="again")
        future = retrying.submit(fail_once, path, pool.submit(same, 7))
        assert future.result(SOON) == 7 and future.name == "again" and len(noted(path)) == 2

    def test_of_a_view_of_the_same_executor_is_at_home(self, pool):
        assert pool.options(name="other").submit(add, pool.options(priority=1).submit(same, 1), 1).result(SOON) == 2


class TestAnInputWithoutAValue:
    def test_fails_its_dependants_with_the_same_exception_and_they_never_run(self, pool, tmp_path):
        path = str(tmp_path / "notes")
        bad = pool.submit(fail, KeyError("gone"))
        first = pool.submit(add_noted, path, bad)
        second = pool.submit(add_noted, path, first)
        for future in (first, second):
            with pytest.raises(KeyError, match="gone"):
                future.result(SOON)
        pool.submit(same, 1).result(SOON)
        assert noted(path) == []

    def test_that_was_looked_at_gives_them_the_very_exception(self, pool):
        bad = pool.submit(fail, KeyError("gone"))
        error = bad.exception(SOON)
        assert pool.submit(same, bad).exception(SOON) is error

    def test_tells_them_of_the_remote_traceback(self, pool):
        error = pool.submit(same, pool.submit(fail, KeyError("gone"))).exception(SOON)
        assert "in fail" in str(error.__cause__)

    def test_that_is_cancelled_cancels_them(self, pool, gate, tmp_path):
        path = str(tmp_path / "notes")
        busy = occupy(pool, gate)
        waits = pool.submit(same, 1)
        first = pool.submit(add_noted, path, waits)
        second = pool.submit(add_noted, path, first)
        assert waits.cancel()
        for future in (first, second):
            with pytest.raises(CancelledError):
                future.result(SOON)
        with pytest.raises(CancelledError):
            pool.submit(same, waits).result(SOON)       # and so it does later ones
        gate.open()
        assert all(future.result(SOON) is None for future in busy) and noted(path) == []

    def test_is_enough_if_it_is_one_of_many(self, pool):
        good, bad = pool.submit(same, 1), pool.submit(fail, ValueError("one"))
        with pytest.raises(ValueError, match="one"):
            pool.submit(add, good, bad, good).result(SOON)

    def test_costs_nobody_else_anything(self, pool):
        bad, good = pool.submit(fail, ValueError("one")), pool.submit(same, 1)
        failing, fine = pool.submit(same, bad), [pool.submit(add, good, n) for n in range(20)]
        assert [f.result(SOON) for f in fine] == list(range(1, 21)) and type(failing.exception(SOON)) is ValueError

    def test_may_have_lost_its_worker(self, own_pool):
        pool = own_pool(2)
        bad = pool.options(max_deaths=0).submit(os._exit, 3)
        with pytest.raises(minipool.WorkerDied, match="_exit took down 1 worker"):
            pool.submit(same, bad).result(SOON)

    def test_may_be_one_that_does_not_pickle_again(self, pool, gate):
        """It was looked at, so it has to be pickled anew: here or when the last input is done, nothing hangs."""
        lock, waits = pool.submit(LoadsAsLock), pool.submit(pass_gate, gate.path)
        lock.result(SOON)
        at_once, later = pool.submit(same, lock), pool.submit(capture, waits, lock)
        gate.open()
        for future in (at_once, later):
            with pytest.raises(pickle.PicklingError, match="lock"):
                future.result(SOON)

    def test_may_be_one_that_does_not_load(self, pool):
        future = pool.submit(same, pool.submit(LoadsAs, fail, OSError("boom")))
        with pytest.raises(OSError, match="boom"):
            future.result(SOON)

    def test_a_dependant_that_is_cancelled_leaves_its_input_alone(self, pool, gate):
        waits = pool.submit(pass_gate, gate.path, 7)
        dependant, other = pool.submit(same, waits), pool.submit(same, waits)
        assert dependant.cancel() and not waits.cancelled()
        gate.open()
        assert waits.result(SOON) == 7 == other.result(SOON)

    def test_a_dependant_that_waits_can_be_killed(self, own_pool, gate):
        pool = own_pool(1)
        waits = pool.submit(pass_gate, gate.path, 7)
        dependant = pool.submit(same, waits)
        pool.kill(dependant)
        assert type(dependant.exception(SOON)) is minipool.JobKilled
        gate.open()
        assert waits.result(SOON) == 7


class LoadsAs:
    def __init__(self, fn, *args):
        self.call = fn, args

    def __reduce__(self):
        return self.call


class TestAStranger:
    def test_a_future_of_another_executor_is_an_error_that_says_so(self, pool, own_pool):
        future = own_pool(1).submit(same, 1)
        with pytest.raises(ValueError, match="a future of another executor: give it the result"):
            pool.submit(same, future)
        with pytest.raises(ValueError, match="a future of another executor"):
            pool.submit(same, [future])

    def test_a_future_of_another_pool_of_the_standard_library_too(self, pool):
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            future = threads.submit(same, 1)
        with pytest.raises(ValueError, match="a future of another executor"):
            pool.submit(same, future)

    def test_it_costs_the_executor_nothing(self, pool):
        with pytest.raises(ValueError):
            pool.submit(same, concurrent.futures.Future())
        assert pool.submit(same, 1).result(SOON) == 1

    def test_what_runs_on_every_worker_takes_no_futures(self, pool):
        with pytest.raises(ValueError, match="is for every worker: give it the result"):
            pool.on_start(print, pool.submit(same, 1))
        assert pool.submit(same, 1).result(SOON) == 1


class TestGraphs:
    def test_a_chain(self, pool):
        future = pool.submit(same, 0)
        for _ in range(200):
            future = pool.submit(add, future, 1)
        assert future.result(SOON) == 200

    def test_a_diamond(self, pool):
        top = pool.submit(same, 3)
        left, right = pool.submit(add, top, 1), pool.submit(add, top, 2)
        assert pool.submit(capture, left, right, top).result(SOON) == ((4, 5, 3), {})

    def test_a_ladder_of_diamonds_that_all_wait_for_one_gate(self, pool, gate):
        future = pool.submit(pass_gate, gate.path, 1)
        for _ in range(50):         # 2**50 paths
            future = pool.submit(add, *[pool.submit(same, future) for _ in range(2)])
        gate.open()
        assert future.result(SOON) == 2**50

    def test_inputs_in_every_order(self, pool, gate):
        """Jobs that wait for the same two futures, given in either order, wait for nobody in a circle."""
        one, two = pool.submit(pass_gate, gate.path, 1), pool.submit(pass_gate, gate.path, 2)
        sums = [pool.submit(add, *pair) for pair in [(one, two), (two, one)] * 50]
        gate.open()
        assert [future.result(SOON) for future in sums] == [3] * 100

    @staticmethod
    def graph(pool, nodes, width=40):
        """Rows of nodes, each the sum of two of the row above, modulo a prime; return ours and what is right."""
        def combine(a, b):
            return (a + b + 1) % 1_000_003
        futures, right = [pool.submit(same, n) for n in range(width)], list(range(width))
        for _ in range(nodes // width - 1):
            pairs = [(n, (n * 7 + 3) % width) for n in range(width)]
            futures = [pool.submit(combine, futures[a], futures[b]) for a, b in pairs]
            right = [combine(right[a], right[b]) for a, b in pairs]
        return futures, right

    def test_of_2000_nodes(self, pool):
        futures, right = self.graph(pool, 2000)
        assert gather(futures, timeout=SOON) == right

    @pytest.mark.slow
    def test_of_10000_nodes(self, pool):
        futures, right = self.graph(pool, 10_000)
        assert gather(futures, timeout=100) == right

    def test_one_failure_at_the_top_fails_2000_below(self, pool, gate):
        def fail_at(path):
            pass_gate(path)
            raise KeyError("top")
        future = pool.submit(fail_at, gate.path)
        below = [future]
        for n in range(2000):
            below.append(pool.submit(same, below[n // 2]))
        gate.open()
        assert {type(f.exception(SOON)) for f in below} == {KeyError}

    def test_a_cancelled_chain_of_2000(self, pool, gate):
        busy = occupy(pool, gate)
        chain = [pool.submit(same, 1)]
        for _ in range(2000):
            chain.append(pool.submit(same, chain[-1]))
        assert chain[0].cancel()
        wait_until(lambda: all(future.cancelled() for future in chain))
        gate.open()
        assert all(future.result(SOON) is None for future in busy)

    def test_many_threads_build_on_one_future(self, pool, gate):
        source = pool.submit(pass_gate, gate.path, 1)

        def build(thread):
            return [pool.submit(add, source, thread, n) for n in range(100)]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            built = list(threads.map(build, range(4)))
        gate.open()
        assert [[f.result(SOON) for f in row] for row in built] == [[1 + t + n for n in range(100)] for t in range(4)]


class TestMap:
    def test_over_futures_gives_what_their_values_give(self, pool):
        assert list(pool.map(add, [pool.submit(same, n) for n in range(20)], range(20))) == list(range(0, 40, 2))

    def test_over_futures_in_chunks(self, pool):
        assert list(pool.map(add, [pool.submit(same, n) for n in range(20)], chunksize=6)) == list(range(20))

    def test_over_the_futures_of_another_stage(self, pool):
        stage = [pool.submit(add, n, 1) for n in range(30)]
        for _ in range(3):
            stage = [pool.submit(add, future, 1) for future in stage]
        assert list(pool.map(same, stage)) == list(range(4, 34))


class TestTheEnd:
    def test_shutdown_waits_for_jobs_that_wait_for_others(self, gate):
        with Executor("local", max_workers=1) as executor:
            waits = executor.submit(pass_gate, gate.path, 1)
            last = executor.submit(add, executor.submit(add, waits, 1), 1)
            gate.open()
        assert last.done() and last.result() == 3

    def test_cancel_futures_cancels_them(self, own_pool, gate):
        pool = own_pool(1)
        running, = occupy(pool, gate, 1)
        chain = [pool.submit(same, running)]
        chain.append(pool.submit(same, chain[0]))
        pool.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in chain)
        gate.open()
        assert running.result(SOON) is None

    def test_a_value_too_large_for_the_server_fails_its_dependant_only(self, cluster):
        cluster.server.process.kill()
        cluster.server.code()
        cluster.server = cluster.serve("--max-value", "100000")
        cluster.node()
        with cluster.executor() as ex:
            large = [ex.submit(bytes, 60_000) for _ in range(2)]
            both = ex.submit(capture, large)
            with pytest.raises(TooLarge, match="arguments"):
                both.result(SOON)
            assert ex.submit(length, large[0]).result(SOON) == 60_000


class TestGather:
    def test_returns_values_in_the_nesting_of_their_futures(self, pool):
        one, two = pool.submit(same, 1), pool.submit(same, 2)
        nested = {"list": [one, two], "tuple": (one, (two,)), "set": {one, two}, "plain": 5, "future": one}
        assert gather(nested) == {"list": [1, 2], "tuple": (1, (2,)), "set": {1, 2}, "plain": 5, "future": 1}

    def test_of_one_future_is_its_value(self, pool):
        assert gather(pool.submit(same, 1)) == 1

    def test_takes_any_iterable_as_a_list(self, pool):
        assert gather(pool.submit(same, n) for n in range(5)) == list(range(5))

    def test_of_nothing_is_nothing(self):
        assert (gather([]), gather({}), gather(())) == ([], {}, ())

    def test_raises_the_first_exception_in_order(self, pool):
        with pytest.raises(KeyError):
            gather([pool.submit(same, 1), pool.submit(fail, KeyError("a")), pool.submit(fail, ValueError("b"))])

    def test_can_skip_what_failed_or_was_cancelled(self, pool, gate):
        busy = occupy(pool, gate)
        cancelled, bad, good = pool.submit(same, 0), pool.submit(fail, KeyError("a")), pool.submit(same, 1)
        cancelled.cancel()
        gate.open()
        nested = [cancelled, good, (bad, good), {"bad": bad, "good": good}, {bad, good}]
        assert gather(nested, errors="skip") == [1, (1,), {"good": 1}, {1}]
        assert gather(busy) == [None, None]

    def test_raises_timeout_error_when_time_is_over_and_stops_nothing(self, pool, gate):
        waits = pool.submit(pass_gate, gate.path, 1)
        for errors in ("raise", "skip"):
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                gather([pool.submit(same, 0), waits, waits], errors=errors, timeout=0.3)
            assert 0.25 < time.monotonic() - began < 30
        gate.open()
        assert gather([waits, waits], timeout=SOON) == [1, 1]

    def test_another_word_for_errors_is_refused(self, pool):
        with pytest.raises(ValueError, match="errors"):
            gather([pool.submit(same, 1)], errors="ignore")

    def test_takes_futures_of_the_standard_library_too(self):
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            assert gather([threads.submit(same, 1)]) == [1]


def test_a_script_needs_no_more_than_this(run_script):
    done = run_script("""
from minipool import Executor, gather

class Mine:
    def __init__(self, n): self.n = n

def make(n): return Mine(n)
def double(mine): return Mine(2 * mine.n)

if __name__ == "__main__":
    with Executor("local", max_workers=2) as ex:
        made = [ex.submit(make, n) for n in range(4)]
        looked_at = made[0].result().n
        print([mine.n for mine in gather([ex.submit(double, mine) for mine in made])], looked_at)
""")
    assert done.stdout.strip() == "[0, 2, 4, 6] 0", done.stderr
