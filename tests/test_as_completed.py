"""as_completed (examples/as_completed.py): futures as they end, while more are added."""
import asyncio
import concurrent.futures
import gc
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from as_completed import as_completed

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others


def done(value):
    future = Future()
    future.set_result(value)
    return future


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def cancelled():
    future = Future()
    future.cancel()
    return future


def ended(*values):
    return [done(value) for value in values]


def in_thread(fn, *args):
    thread = threading.Thread(target=fn, args=args)
    thread.start()
    return thread


class TestOrder:
    def test_what_ends_first_comes_first_row_2_22(self):
        slow, fast = Future(), Future()
        found = as_completed([slow, fast])
        fast.set_result(1)
        assert next(found) is fast
        slow.set_result(2)
        assert list(found) == [slow]

    def test_jobs_of_a_pool_come_as_they_end(self, pool, gate):
        def wait_for(path):
            import pathlib
            import time
            while not pathlib.Path(path).exists():
                time.sleep(0.002)
        slow, fast = pool.submit(wait_for, gate.path), pool.submit(abs, -1)
        found = as_completed([slow, fast], 60)
        assert next(found) is fast
        gate.open()
        assert list(found) == [slow]

    def test_of_several_executors_come_together(self, pool):
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            futures = [pool.submit(abs, -1), threads.submit(abs, -2), pool.submit(abs, -3)]
            assert sorted(future.result() for future in as_completed(futures)) == [1, 2, 3]

    def test_cancelled_and_failed_ones_are_yielded_too(self):
        futures = [cancelled(), failed(KeyError("no")), *ended(3)]
        assert list(as_completed(futures)) == futures

    def test_one_that_is_added_twice_before_it_is_taken_is_yielded_once(self):
        future, other = Future(), done(1)
        found = as_completed([future, other, future, other])
        found.add(future)
        future.set_result(1)
        assert list(found) == [other, future] and found.is_empty()

    def test_without_futures_it_ends_at_once(self):
        assert list(as_completed()) == [] and as_completed().next_batch() == []


class TestResults:
    def test_come_beside_their_futures(self):
        futures = ended(1, 2)
        assert list(as_completed(futures, with_results=True)) == [(futures[0], 1), (futures[1], 2)]

    def test_an_error_is_raised_in_its_turn_and_what_comes_after_can_still_be_had(self):
        found = as_completed([*ended(1), failed(KeyError("no")), cancelled(), *ended(4)], with_results=True)
        assert next(found)[1] == 1
        with pytest.raises(KeyError, match="no"):
            next(found)
        with pytest.raises(CancelledError):
            next(found)
        assert [result for _, result in found] == [4]

    @pytest.mark.parametrize("with_results", [False, True])
    def test_errors_can_be_left_out(self, with_results):
        futures = [failed(KeyError("no")), *ended(2), cancelled()]
        found = as_completed(futures, with_results=with_results, errors="skip")
        assert list(found) == [(futures[1], 2) if with_results else futures[1]]

    def test_if_all_that_is_left_fails_a_loop_that_skips_errors_ends(self):
        future = Future()
        found, taken = as_completed([future], errors="skip"), []
        thread = in_thread(lambda: taken.extend(found))
        future.set_exception(KeyError("no"))
        thread.join(60)
        assert not thread.is_alive() and taken == []


class TestAdding:
    def test_while_iterating_extends_the_loop_row_2_23(self, pool):
        found, results = as_completed([pool.submit(abs, -1)]), []
        for future in found:
            results.append(future.result())
            if len(results) < 10:
                found.add(pool.submit(abs, -1 - len(results)))
        assert results == list(range(1, 11))

    def test_goes_on_after_the_end(self):
        found = as_completed(ended(1))
        assert [future.result() for future in found] == [1]
        found.update(ended(2, 3))
        assert [future.result() for future in found] == [2, 3]

    def test_counts_what_is_still_to_come(self):
        future = Future()
        found = as_completed([future, *ended(1)])
        assert (found.count(), found.has_ready(), found.is_empty()) == (2, True, False)
        next(found)
        assert (found.count(), found.has_ready(), found.is_empty()) == (1, False, False)
        future.set_result(None)
        assert next(found) is future and found.is_empty()

    def test_clear_forgets_all_also_those_that_end_later(self):
        future = Future()
        found = as_completed([future, *ended(1)])
        found.clear()
        future.set_result(2)
        assert list(found) == []

    def test_takes_futures_only(self):
        with pytest.raises(TypeError, match="futures, not int"):
            as_completed([5])
        with pytest.raises(ValueError, match="'raise' or 'skip'"):
            as_completed(errors="ignore")


class TestBatches:
    def test_cover_all_and_none_is_empty_row_2_24(self, pool):
        futures = [pool.submit(abs, -n) for n in range(200)]
        batches = list(as_completed(futures).batches())
        assert all(batches) and sorted(f.result() for batch in batches for f in batch) == list(range(200))

    def test_hold_all_that_has_ended_since_last_time(self):
        future = Future()
        found = as_completed([*ended(1, 2), future], with_results=True)
        assert [result for _, result in found.next_batch()] == [1, 2]
        assert found.next_batch(block=False) == []
        future.set_result(3)
        assert found.next_batch() == [(future, 3)]

    def test_a_result_that_raises_comes_in_its_turn_and_costs_no_other(self):
        found = as_completed([*ended(1, 2), failed(KeyError("no")), *ended(4)], with_results=True)
        assert [result for _, result in found.next_batch()] == [1, 2]
        with pytest.raises(KeyError, match="no"):
            found.next_batch()
        assert [result for _, result in found.next_batch()] == [4] and found.is_empty()


class TestTime:
    def test_a_limit_counts_from_the_beginning_and_loses_nothing_row_2_22(self):
        future = Future()
        found = as_completed([future, *ended(1)], timeout=0.05)
        assert next(found).result() == 1
        with pytest.raises(TimeoutError, match="1 futures have not ended within 0.05 s"):
            next(found)
        future.set_result(2)
        assert next(found) is future

    def test_in_an_event_loop_too(self):
        async def main():
            with pytest.raises(TimeoutError, match="have not ended"):
                async for _ in as_completed([Future()], 0.05):
                    pass
        asyncio.run(main())


class TestAsyncFor:
    def test_takes_them_as_they_end_and_leaves_the_loop_free(self, pool):
        async def main():
            found, results = as_completed([pool.submit(abs, -1)], with_results=True), []
            async for _, result in found:
                results.append(result)
                if result < 10:
                    found.add(pool.submit(sum, [result, 1]))
            return results
        assert asyncio.run(main()) == list(range(1, 11))

    def test_a_step_that_is_cancelled_takes_nothing_away(self):
        async def main():
            future = Future()
            found = as_completed([future])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(found), 0.05)
            future.set_result(1)
            return await anext(found) is future
        assert asyncio.run(main())

    def test_clear_ends_it(self):
        async def main():
            found = as_completed([Future()])
            asyncio.get_running_loop().call_later(0.05, found.clear)
            return [future async for future in found]
        assert asyncio.run(main()) == []


class TestThreads:
    def test_that_share_one_have_each_future_once(self):
        futures = [Future() for _ in range(2000)]
        found, parts = as_completed(futures), [[], [], []]
        readers = [in_thread(part.extend, found) for part in parts]
        for future in futures:
            future.set_result(None)
        for reader in readers:
            reader.join(60)
        assert sorted(map(id, sum(parts, []))) == sorted(map(id, futures))

    def test_who_wait_hear_of_what_another_adds(self):
        first, second, taken = Future(), done(2), []
        found = as_completed([first])
        reader = in_thread(taken.extend, found)
        found.add(second)
        first.set_result(1)
        reader.join(60)
        assert {first, second} == {*taken, *found}


def test_one_that_is_dropped_is_not_kept_by_its_futures():
    future = Future()
    there = weakref.ref(as_completed([future]))
    gc.collect()
    assert there() is None
    future.set_result(1)
