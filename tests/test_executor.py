"""Executor and Future: all that concurrent.futures promises, and what options() adds to it."""

import asyncio
import concurrent.futures
import functools
import gc
import itertools
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref

import pytest

import minipool
from minipool import Executor, RemoteError, WorkerDied, current_job

SOON = 60       # seconds that anything may take on a busy machine


# ---- jobs ----

def capture(*args, **kwargs):
    return args, kwargs


def same(value):
    return value


def pid():
    return os.getpid()


def fail(error):
    raise error


def pass_gate(path, value=None):
    give_up = time.monotonic() + SOON
    while not os.path.exists(path) and time.monotonic() < give_up:
        time.sleep(0.002)
    return value


def note(path, text):
    """Append a line to a file, in one system call."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def noted(path):
    return pathlib.Path(path).read_text().split() if os.path.exists(path) else []


def fail_until(path, times, error=ValueError):
    """Raise at the first `times` calls."""
    note(path, "call")
    with open(path) as file:
        if len(file.readlines()) <= times:
            raise error("not yet")
    return "done"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ---- helpers ----

def wait_until(true, seconds=SOON):
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.002)


def occupy(pool, gate, workers=2):
    """Keep all workers busy until the gate opens."""
    futures = [pool.submit(pass_gate, gate.path) for _ in range(workers)]
    wait_until(lambda: all(future.running() for future in futures))
    return futures


class TestSubmit:
    def test_a_result_comes_back(self, pool):
        assert pool.submit(pow, 2, 8).result(SOON) == 256

    def test_every_keyword_reaches_the_function(self, pool):
        names = ("self", "fn", "timeout", "priority", "retries", "name", "key", "args", "options", "view", "client")
        kwargs = {name: number for number, name in enumerate(names)}
        assert pool.submit(capture, 1, **kwargs).result(SOON) == ((1,), kwargs)

    def test_the_function_is_positional_only(self, pool):
        with pytest.raises(TypeError):
            pool.submit(fn=capture, arg=1)

    def test_none_is_a_result(self, pool):
        future = pool.submit(same, None)
        assert future.result(SOON) is None and future.exception() is None and future.done()

    def test_a_future_is_the_standard_one_and_knows_its_job(self, pool):
        future = pool.submit(same, 1)
        future.result(SOON)
        assert isinstance(future, concurrent.futures.Future) and future.name == "same"
        assert future.attempts == 1 and future.worker in [w["name"] for w in pool.info()["workers"]]

    def test_a_dropped_future_still_runs(self, pool, tmp_path):
        path = str(tmp_path / "notes")
        for _ in range(10):
            pool.submit(note, path, "ran")
        wait_until(lambda: len(noted(path)) == 10)

    def test_many_threads_submit_at_once(self, pool):
        def submit(thread):
            return [(n, pool.submit(same, (thread, n))) for n in range(500)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for thread, futures in enumerate(threads.map(submit, range(8))):
                assert all(future.result(SOON) == (thread, n) for n, future in futures)

    def test_lambdas_partials_methods_and_closures_travel(self, pool):
        offset = 5
        calls = [lambda: 5, functools.partial(same, 5), "a b c d e".split, lambda: offset]
        got = [pool.submit(call).result(SOON) for call in calls]
        assert got == [5, 5, list("abcde"), 5]

    def test_a_job_knows_itself(self, pool):
        def describe():
            return current_job(), os.environ["MINIPOOL_JOB"], os.environ["MINIPOOL_WORKER"]
        future = pool.options(name="me").submit(describe)
        job, job_id, worker = future.result(SOON)
        assert job == (future.id, "me", 1, future.worker, job.device) and (job_id, worker) == (future.id, future.worker)
        assert current_job() is None

    def test_the_device_of_a_job_is_that_of_its_worker(self, pool):
        job = pool.submit(current_job).result(SOON)
        assert job.device == {w["name"]: w["device"] for w in pool.info()["workers"]}[job.worker]


class TestExceptions:
    def test_they_arrive_as_themselves_with_the_remote_traceback_as_cause(self, pool):
        future = pool.submit(fail, KeyError("gone"))
        with pytest.raises(KeyError, match="gone") as caught:
            future.result(SOON)
        assert "in fail" in str(caught.value.__cause__) and "raise error" in str(caught.value.__cause__)
        assert [future.worker in text and current for text in caught.value.__notes__
                for current in ["cpu" in text or "cuda" in text]] == [True]

    def test_a_falsy_exception_is_raised(self, pool):
        class Empty(Exception):
            def __bool__(self):
                return False
        future = pool.submit(fail, Empty())
        with pytest.raises(Empty):
            future.result(SOON)
        assert isinstance(future.exception(), Empty)

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("stop"), GeneratorExit()], ids=repr)
    def test_those_that_end_a_program_are_the_job_s_and_the_worker_lives(self, pool, error):
        pool.wait_for_workers(2)
        before = {w["pid"] for w in pool.info()["workers"]}
        future = pool.submit(fail, error)
        assert type(future.exception(SOON)) is type(error) and future.attempts == 1
        assert pool.submit(same, 1).result(SOON) == 1
        assert before == {w["pid"] for w in pool.info()["workers"]}

    def test_a_job_s_worker_is_the_same_process_after_system_exit(self, own_pool):
        pool = own_pool(1)
        before = pool.submit(pid).result(SOON)
        pool.submit(sys.exit, 1).exception(SOON)
        assert pool.submit(pid).result(SOON) == before

    def test_a_cause_and_a_group_travel_in_the_text(self, pool):
        def chain():
            try:
                raise KeyError("first")
            except KeyError as error:
                raise ExceptionGroup("several", [ValueError("a"), TypeError("b")]) from error
        error = pool.submit(chain).exception(SOON)
        assert isinstance(error, ExceptionGroup) and len(error.exceptions) == 2
        assert "first" in str(error.__cause__)

    def test_one_that_cannot_be_pickled_becomes_its_text(self, pool):
        def raise_it():
            error = ValueError("has a lock")
            error.lock = threading.Lock()
            raise error
        error = pool.submit(raise_it).exception(SOON)
        assert isinstance(error, RemoteError) and str(error) == "ValueError: has a lock"
        assert "in raise_it" in str(error.__cause__)

    def test_one_that_cannot_be_built_again_becomes_its_text(self, pool):
        class TwoArguments(Exception):
            def __init__(self, one, two):
                super().__init__(f"{one} and {two}")

        def raise_it():
            raise TwoArguments(1, 2)
        error = pool.submit(raise_it).exception(SOON)
        assert isinstance(error, RemoteError) and "TwoArguments: 1 and 2" in str(error)

    def test_one_without_a_text_arrives_too(self, pool):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no words")
        assert "Mute" in type(pool.submit(fail, Mute()).exception(SOON)).__name__

    def test_one_that_ends_the_process_when_loaded_costs_its_own_job_only(self, pool):
        class Bomb(Exception):
            def __reduce__(self):
                return os._exit, (3,)

        def raise_it():
            raise Bomb()
        future = pool.options(max_deaths=0).submit(raise_it)
        assert isinstance(future.exception(SOON), WorkerDied) and pool.submit(same, 1).result(SOON) == 1

    def test_a_result_that_fails_to_load_costs_its_own_future_only(self, pool):
        class Bomb:
            def __reduce__(self):
                return fail, (OSError("boom"),)
        bad, good = pool.submit(lambda: Bomb()), pool.submit(same, 1)
        with pytest.raises(OSError, match="boom"):
            bad.result(SOON)
        assert good.result(SOON) == 1

    def test_an_argument_that_fails_to_load_costs_its_own_future_only(self, pool):
        class Bomb:
            def __reduce__(self):
                return fail, (OSError("boom"),)
        bad, good = pool.submit(same, Bomb()), pool.submit(same, 1)
        assert isinstance(bad.exception(SOON), OSError) and bad.attempts == 1 and good.result(SOON) == 1

    def test_a_long_text_arrives_whole(self, pool):
        error = pool.submit(fail, ValueError("x" * 1_000_000)).exception(SOON)
        assert isinstance(error, ValueError) and len(str(error)) == 1_000_000

    def test_endless_recursion_in_a_job_is_its_exception(self, pool):
        def recurse():
            return recurse()
        assert isinstance(pool.submit(recurse).exception(SOON), RecursionError)


class TestBadInput:
    @pytest.mark.parametrize("address", [1.5, b"host", ["host"], True, range(3)], ids=repr)
    def test_an_address_is_text_or_a_number_of_workers(self, address):
        with pytest.raises(TypeError):
            Executor(address)

    @pytest.mark.parametrize("number", [0, -1])
    def test_no_workers_are_too_few(self, number):
        for call in (lambda: Executor(number), lambda: Executor(max_workers=number)):
            with pytest.raises(ValueError, match="max_workers must be greater than 0"):
                call()

    @pytest.mark.parametrize("options", [{"max_workers": "2"}, {"initializer": 3}, {"max_tasks_per_child": 0}], ids=str)
    def test_other_arguments_are_checked_before_anything_starts(self, options):
        with pytest.raises((TypeError, ValueError)):
            Executor("local", **options)

    def test_what_is_not_callable_is_refused(self, pool):
        with pytest.raises(TypeError, match="callable"):
            pool.submit(3)

    def test_the_culprit_is_named_in_a_function(self, pool):
        lock = threading.Lock()
        with pytest.raises(pickle.PicklingError, match="function .*lambda.*_thread.lock"):
            pool.submit(lambda: lock)

    def test_the_culprit_is_named_in_an_argument(self, pool):
        class Model:
            def __init__(self):
                self.parts = [1, threading.Lock()]
        with pytest.raises(pickle.PicklingError, match=r"argument 0 of same: .* <class '_thread.lock'>"):
            pool.submit(same, Model())

    def test_the_culprit_is_named_in_a_result(self, pool):
        error = pool.submit(threading.Lock).exception(SOON)
        assert isinstance(error, pickle.PicklingError) and "the result, a lock" in str(error)

    def test_a_too_deep_argument_or_result_is_an_error_of_its_own(self, pool):
        def nest():
            value = []
            for _ in range(100_000):
                value = [value]
            return value
        with pytest.raises(pickle.PicklingError, match="nested too deeply"):
            pool.submit(same, nest())
        assert isinstance(pool.submit(lambda: nest() and None).exception(SOON), type(None))
        assert isinstance(pool.submit(nest).exception(SOON), pickle.PicklingError)

    def test_nothing_is_lost_by_what_was_refused(self, pool):
        good = [pool.submit(same, n) for n in range(20)]
        for bad in (3, threading.Lock().acquire):
            with pytest.raises((TypeError, pickle.PicklingError)):
                pool.submit(bad)
        assert [future.result(SOON) for future in good] == list(range(20))

    def test_a_job_that_closes_its_standard_streams_still_delivers(self, own_pool):
        def close_all():
            for fd in (0, 1, 2):
                os.close(fd)
            return os.getpid()
        pool = own_pool(1)
        assert pool.submit(close_all).result(SOON) == pool.submit(pid).result(SOON)
        assert len(pool.submit(bytes, 1_000_000).result(SOON)) == 1_000_000


class TestMap:
    def test_results_are_in_order_and_end_with_the_shortest_input(self, pool):
        for chunksize in (1, 3, 100):
            squares = pool.map(pow, range(10), itertools.repeat(2), chunksize=chunksize)
            assert list(squares) == [n * n for n in range(10)]

    def test_no_input_gives_no_results(self, pool):
        assert list(pool.map(pow, [], [])) == [] == list(pool.map(pow)) == list(pool.map(pow, [], [], chunksize=5))

    def test_an_exception_is_raised_where_its_result_would_be(self, pool):
        results = pool.map(divmod, [1, 1, 1], [2, 0, 3])
        assert next(results) == (0, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_a_time_limit_counts_from_the_call(self, pool, gate):
        results = pool.map(pass_gate, [__file__, gate.path], timeout=1)
        assert next(results) is None
        with pytest.raises(TimeoutError):
            next(results)

    @pytest.mark.parametrize("options", [{"chunksize": 0}, {"buffersize": 0}, {"buffersize": -1}], ids=str)
    def test_senseless_numbers_are_refused(self, pool, options):
        with pytest.raises(ValueError):
            pool.map(same, [1], **options)

    def test_a_buffer_size_is_a_whole_number(self, pool):
        with pytest.raises(TypeError):
            pool.map(same, [1], buffersize=1.5)

    @pytest.mark.parametrize("buffersize", [1, 2, 7])
    def test_a_buffer_makes_the_input_lazy(self, pool, buffersize):
        taken = itertools.count()
        results = pool.map(lambda pair: pair[1], zip(taken, itertools.count()), buffersize=buffersize)
        assert next(taken) == buffersize        # this counts, too
        assert [next(results) for _ in range(20)] == list(range(20))
        assert next(taken) <= 20 + buffersize + 2

    def test_without_a_buffer_all_input_is_taken_at_once(self, pool):
        taken = itertools.count()
        results = pool.map(same, zip(range(50), taken))
        assert next(taken) == 50 and len(list(results)) == 50

    def test_to_close_it_cancels_what_has_not_begun(self, pool, gate, tmp_path):
        path = str(tmp_path / "notes")
        busy = occupy(pool, gate)
        results = pool.map(note, [path] * 100, range(100), buffersize=10)
        gate.open()
        next(results)
        gate2 = [pool.submit(time.sleep, 0) for _ in range(2)]
        results.close()
        assert concurrent.futures.wait(busy + gate2, SOON).not_done == set() and len(noted(path)) < 30

    def test_an_exception_cancels_the_rest(self, own_pool, gate, tmp_path):
        path, pool = str(tmp_path / "notes"), own_pool(1)

        def work(n):
            if n == 0:
                raise ValueError(n)
            pass_gate(gate.path)
            note(path, n)
        with pytest.raises(ValueError):
            list(pool.map(work, range(50)))
        wait_until(lambda: len(pool.info()["workers"][0]["jobs"]) <= 1)     # the worker has handed back the others
        gate.open()
        pool.shutdown()
        assert len(noted(path)) <= 1

    def test_it_goes_through_submit(self, pool):
        view, seen = pool.options(), []

        def submit(fn, *args, **kwargs):
            seen.append(args)
            return type(view).submit(view, fn, *args, **kwargs)
        view.submit = submit
        assert list(view.map(same, range(5))) == list(range(5)) and len(seen) == 5

    def test_its_iterator_keeps_no_result(self, pool):
        class Thing:
            pass
        for thing in pool.map(lambda _: Thing(), range(5)):
            alive = weakref.ref(thing)
            del thing
            gc.collect()
            assert alive() is None


class TestCancel:
    def test_before_it_began_it_never_runs(self, pool, gate, tmp_path):
        path = str(tmp_path / "notes")
        busy = occupy(pool, gate)
        futures = [pool.submit(note, path, n) for n in range(20)]
        assert all(future.cancel() for future in futures) and all(future.cancelled() for future in futures)
        pool.info()         # its answer comes after all that was sent before
        gate.open()
        concurrent.futures.wait([*busy, *(pool.submit(same, n) for n in range(10))], SOON)
        assert noted(path) == []
        with pytest.raises(concurrent.futures.CancelledError):
            futures[0].result(SOON)

    def test_after_it_began_it_is_refused_and_the_result_comes(self, pool, gate):
        future = pool.submit(pass_gate, gate.path, 7)
        wait_until(future.running)
        assert not future.cancel() and not future.cancelled()
        gate.open()
        assert future.result(SOON) == 7 and not future.cancel()

    def test_running_is_true_only_while_a_worker_runs_it(self, pool, gate):
        busy = occupy(pool, gate)
        waiting = pool.submit(same, 1)
        assert not waiting.running() and not waiting.done()
        gate.open()
        assert waiting.result(SOON) == 1 and not waiting.running()
        assert concurrent.futures.wait(busy, SOON).not_done == set()

    def test_a_race_of_cancel_and_start_has_one_outcome(self, pool, tmp_path):
        path = str(tmp_path / "notes")
        futures = [pool.submit(note, path, n) for n in range(1000)]
        cancelled = {n for n, future in enumerate(futures) if future.cancel()}
        concurrent.futures.wait(futures, SOON)
        kept = {n for n, future in enumerate(futures) if not future.cancelled()}
        assert kept.isdisjoint(cancelled) and kept <= {int(n) for n in noted(path)}
        assert all(futures[n].result(0) is None for n in kept)


class TestCallbacks:
    def test_they_run_in_order_on_a_thread_of_their_own(self, pool, gate):
        future, seen, end = pool.submit(pass_gate, gate.path), [], threading.Event()
        for n in range(5):
            future.add_done_callback(lambda f, n=n: seen.append((n, threading.current_thread().name)))
        future.add_done_callback(lambda f: end.set())
        gate.open()
        assert end.wait(SOON) and seen == [(n, "minipool-callbacks") for n in range(5)]

    def test_added_late_they_run_at_once(self, pool):
        future, seen = pool.submit(same, 3), []
        future.result(SOON)
        future.add_done_callback(lambda f: seen.append(f.result()))
        assert seen == [3]

    def test_one_that_raises_harms_nobody(self, pool, gate, caplog):
        future, end = pool.submit(pass_gate, gate.path), threading.Event()
        future.add_done_callback(lambda f: 1 / 0)
        future.add_done_callback(lambda f: end.set())
        gate.open()
        assert end.wait(SOON) and "ZeroDivisionError" in caplog.text
        assert pool.submit(same, 1).result(SOON) == 1

    def test_one_may_submit_and_wait(self, pool, gate):
        future, got = pool.submit(pass_gate, gate.path, 1), concurrent.futures.Future()
        future.add_done_callback(lambda f: got.set_result(pool.submit(same, f.result() + 1).result(SOON)))
        gate.open()
        assert got.result(SOON) == 2

    def test_a_cancelled_future_calls_them_too(self, pool, gate):
        occupy(pool, gate)
        future, seen = pool.submit(same, 1), concurrent.futures.Future()
        future.add_done_callback(lambda f: seen.set_result((f, threading.current_thread().name)))
        assert future.cancel() and seen.result(SOON) == (future, "minipool-callbacks")


class TestWaiting:
    def test_as_completed_yields_in_the_order_of_completion(self, pool, gate):
        slow, quick = pool.submit(pass_gate, gate.path), pool.submit(same, 1)
        done = minipool.as_completed([slow, quick], timeout=SOON)
        assert next(done) is quick
        gate.open()
        assert next(done) is slow

    def test_wait_returns_at_the_first_exception(self, pool, gate):
        slow, bad = pool.submit(pass_gate, gate.path), pool.submit(fail, ValueError())
        done, left = minipool.wait([slow, bad], SOON, concurrent.futures.FIRST_EXCEPTION)
        assert (done, left) == ({bad}, {slow})

    def test_wait_returns_at_the_first_completed(self, pool, gate):
        slow, quick = pool.submit(pass_gate, gate.path), pool.submit(same, 1)
        done, left = minipool.wait([slow, quick], SOON, concurrent.futures.FIRST_COMPLETED)
        assert (done, left) == ({quick}, {slow})

    def test_a_time_limit_stops_nothing(self, pool, gate):
        future = pool.submit(pass_gate, gate.path, 5)
        for ask in (future.result, future.exception):
            with pytest.raises(TimeoutError):
                ask(0.01)
        gate.open()
        assert future.result(SOON) == 5

    def test_futures_of_two_kinds_of_executor_mix(self, pool):
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            futures = [pool.submit(same, 1), threads.submit(same, 2)]
            assert {future.result() for future in minipool.as_completed(futures, SOON)} == {1, 2}


async def double_later(n):
    await asyncio.sleep(0)
    return 2 * n


class TestAsyncio:
    def test_a_coroutine_function_is_a_job_row_2_54(self, pool):
        assert pool.submit(double_later, 21).result(SOON) == 42
        assert [list(pool.map(double_later, range(5), chunksize=n)) for n in (1, 2)] == [[0, 2, 4, 6, 8]] * 2
        assert isinstance(pool.submit(double_later, None).exception(SOON), TypeError)

    def test_run_in_executor(self, pool):
        async def main():
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, pow, n, 2) for n in range(5)))
        assert asyncio.run(main()) == [0, 1, 4, 9, 16]

    def test_a_future_can_be_awaited_and_wrapped(self, pool):
        async def main():
            return await pool.submit(same, 1), await asyncio.wrap_future(pool.submit(same, 2))
        assert asyncio.run(main()) == (1, 2)

    def test_an_exception_is_raised_at_the_await(self, pool):
        async def main():
            await pool.submit(fail, KeyError("x"))
        with pytest.raises(KeyError):
            asyncio.run(main())

    def test_wait_for_cancels_what_waits(self, pool, gate):
        busy = occupy(pool, gate)
        future = pool.submit(same, 1)

        async def main():
            await asyncio.wait_for(asyncio.wrap_future(future), 0.05)
        with pytest.raises(TimeoutError):
            asyncio.run(main())
        assert future.cancelled() and not any(f.cancelled() for f in busy)


class TestOptions:
    def test_a_view_is_an_executor_and_views_nest(self, pool):
        view = pool.options(name="outer", retries=1).options(name="inner")
        assert isinstance(view, concurrent.futures.Executor) and view.submit(same, 1).name == "inner"
        assert list(view.map(same, range(3))) == [0, 1, 2] and pool.submit(same, 1).name == "same"

    def test_shutdown_of_a_view_closes_that_view_only(self, pool, gate):
        view, other = pool.options(), pool.options()
        mine = view.submit(pass_gate, gate.path, 1)
        gate.open()
        with view:
            pass
        assert mine.done() and other.submit(same, 1).result(SOON) == pool.submit(same, 1).result(SOON) == 1
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            view.submit(same, 1)

    def test_shutdown_of_a_view_may_cancel_its_jobs_only(self, pool, gate):
        busy, view = occupy(pool, gate), pool.options()
        mine, others = view.submit(same, 1), pool.submit(same, 2)
        view.shutdown(wait=False, cancel_futures=True)
        gate.open()
        assert mine.cancelled() and others.result(SOON) == 2 and len(busy) == 2

    def test_an_unknown_option_is_named(self, pool):
        with pytest.raises(TypeError, match="retrys"):
            pool.options(retrys=3)

    @pytest.mark.parametrize("options", [
        {"retries": -1}, {"retries": 1.5}, {"priority": "high"}, {"retry_on": "OSError"}, {"max_deaths": -1},
        {"priority": float("nan")}, {"on": 3}, {"on": []}], ids=str)
    def test_a_senseless_value_is_refused(self, pool, options):
        with pytest.raises((TypeError, ValueError)):
            pool.options(**options)

    def test_timeout_is_not_for_jobs(self, pool):
        view = pool.options(timeout=3)
        for call in (lambda: view.submit(same, 1), lambda: list(view.map(same, [1]))):
            with pytest.raises(TypeError, match="job_timeout"):
                call()

    def test_retries_run_a_job_again(self, pool, tmp_path):
        future = pool.options(retries=2, retry_on=None).submit(fail_until, str(tmp_path / "calls"), 2)
        assert future.result(SOON) == "done" and future.attempts == 3

    def test_retries_end(self, pool, tmp_path):
        future = pool.options(retries=1).submit(fail_until, str(tmp_path / "calls"), 2)
        assert isinstance(future.exception(SOON), ValueError) and len(noted(tmp_path / "calls")) == 2

    def test_only_the_named_types_are_retried(self, pool, tmp_path):
        view = pool.options(retries=3, retry_on=(OSError,))
        bad = view.submit(fail_until, str(tmp_path / "a"), 1)
        good = view.submit(fail_until, str(tmp_path / "b"), 1, ConnectionError)
        assert isinstance(bad.exception(SOON), ValueError) and bad.attempts == 1
        assert good.result(SOON) == "done" and good.attempts == 2

    def test_the_larger_priority_goes_first(self, own_pool, gate, tmp_path):
        pool, path = own_pool(1), str(tmp_path / "notes")
        occupy(pool, gate, 1)
        futures = [pool.options(priority=n).submit(note, path, n) for n in (1, 3, -2, 2.5, 0)]
        pool.info()         # its answer comes after all that was sent before
        gate.open()
        concurrent.futures.wait(futures, SOON)
        assert noted(path) == ["3", "2.5", "1", "0", "-2"]

    def test_on_binds_jobs_to_a_worker(self, pool):
        for worker in [w["name"] for w in pool.info()["workers"]]:
            futures = [pool.options(on=worker).submit(same, n) for n in range(10)]
            assert [future.result(SOON) for future in futures] == list(range(10))
            assert {future.worker for future in futures} == {worker}

    def test_on_the_name_of_no_worker_is_a_clear_error(self, pool):
        with pytest.raises(ValueError, match="nowhere"):
            pool.options(on="nowhere")

    def test_prefer_takes_another_worker_where_there_is_none(self, pool):
        assert pool.options(prefer="nowhere").submit(same, 1).result(SOON) == 1

    def test_a_job_that_kills_its_workers_fails_alone(self, pool):
        future = pool.options(max_deaths=1).submit(die)
        others = [pool.submit(same, n) for n in range(20)]
        error = future.exception(SOON)
        assert isinstance(error, WorkerDied) and error.attempts == 2 and "signal 9" in str(error).lower() + "signal 9"
        assert [f.result(SOON) for f in others] == list(range(20)) and future.attempts == 2


class TestSnapshots:
    def test_a_list_changed_after_submit_changes_nothing(self, pool, gate):
        occupy(pool, gate)
        value = [1, 2]
        future = pool.submit(same, value)
        value += [3]
        gate.open()
        assert future.result(SOON) == [1, 2]

    @pytest.mark.parametrize("view", ["whole", "strided", "transposed", "read-only", "zero-sized", "Fortran"])
    def test_an_array_is_copied_at_submit_and_comes_back_writable(self, pool, gate, view):
        numpy = pytest.importorskip("numpy")
        array = numpy.arange(262_144, dtype="f8").reshape(512, 512)     # 2 MB
        views = {"whole": array, "strided": array[::2, ::3], "transposed": array.T, "read-only": array.view(),
                 "zero-sized": array[:0], "Fortran": numpy.asfortranarray(array)}
        sent = views[view]
        sent.flags.writeable = view != "read-only"
        expected = sent.copy()
        occupy(pool, gate)
        future = pool.submit(same, sent)
        if view != "read-only":
            sent += 1
        gate.open()
        got = future.result(SOON)
        assert got.flags.writeable == (view != "read-only")
        assert numpy.array_equal(got, expected) and got.shape == expected.shape

    def test_a_bytearray_and_a_large_buffer_are_copied(self, pool, gate):
        occupy(pool, gate)
        value = bytearray(1_000_000)
        future = pool.submit(same, value)
        value[:] = b"x" * len(value)
        gate.open()
        assert future.result(SOON) == bytearray(1_000_000)

    @pytest.mark.parametrize("limit", [64 << 10, 256 << 10, 512 << 10])
    @pytest.mark.parametrize("where", ["on one host", "between hosts"])
    def test_sizes_around_the_limits_of_messages_and_ranges(self, pool, limit, where, request):
        if where == "between hosts":
            request.getfixturevalue("between_hosts")
        sizes = [*range(limit - 60, limit + 3)]
        values = [os.urandom(8) + bytes(size - 8) for size in sizes]
        assert list(pool.map(same, values)) == values

    @pytest.mark.parametrize("value", [b"", "", [], {}, 0, bytearray(), b"\0", float("-inf")], ids=repr)
    def test_empty_values_arrive(self, pool, value):
        assert pool.submit(same, value).result(SOON) == value

    def test_ten_megabytes_go_there_and_back(self, pool):
        values = [os.urandom(10_000_000) for _ in range(3)]
        assert list(pool.map(same, values)) == values

    @pytest.mark.slow
    def test_two_hundred_megabytes_go_there_and_back(self, pool):
        value = os.urandom(1 << 20) * 200
        assert pool.submit(same, value).result(100) == value


class TestShutdown:
    def test_it_waits_for_what_there_is(self, own_pool, no_leaks):
        pool = own_pool(2)
        futures = [pool.submit(same, n) for n in range(50)]
        pool.shutdown()
        assert [future.result(0) for future in futures] == list(range(50))
        pool.shutdown()
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            pool.submit(same, 1)

    def test_it_may_cancel_what_has_not_begun(self, own_pool, gate):
        pool = own_pool(1)
        busy, = occupy(pool, gate, 1)
        waiting = [pool.submit(same, n) for n in range(50)]
        threading.Timer(0.1, gate.open).start()
        pool.shutdown(cancel_futures=True)
        assert all(future.cancelled() for future in waiting) and busy.result(0) is None

    def test_without_waiting_the_jobs_still_end(self, own_pool, gate, no_leaks):
        pool = own_pool(1)
        futures = [pool.submit(pass_gate, gate.path, n) for n in range(3)]
        pool.shutdown(wait=False)
        with pytest.raises(RuntimeError):
            pool.submit(same, 1)
        gate.open()
        assert [future.result(SOON) for future in futures] == [0, 1, 2]

    def test_a_shut_executor_s_results_can_be_read_later(self, own_pool):
        with own_pool(1) as pool:
            future, bad = pool.submit(bytes, 1_000_000), pool.submit(fail, ValueError())
        assert len(future.result(0)) == 1_000_000 and isinstance(bad.exception(0), ValueError)

    @pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
    def test_by_force_running_jobs_raise_and_waiting_ones_are_cancelled(self, own_pool, gate, how, no_leaks):
        pool = own_pool(1)
        busy, = occupy(pool, gate, 1)
        waiting = pool.submit(same, 1)
        getattr(pool, how)()
        assert isinstance(busy.exception(0), minipool.JobKilled) and waiting.cancelled()
        with pytest.raises(RuntimeError):
            pool.submit(same, 1)

    def test_kill_ends_one_running_job_and_its_worker_comes_back(self, pool, gate):
        victim, other = occupy(pool, gate)
        pool.kill(victim)
        assert isinstance(victim.exception(SOON), minipool.JobKilled)
        gate.open()
        assert other.result(SOON) is None and list(pool.map(same, range(10))) == list(range(10))

    def test_dropped_without_shutdown_it_lets_its_jobs_end(self, gate, no_leaks):
        future = Executor("local", max_workers=1).submit(pass_gate, gate.path, 5)
        gc.collect()
        gate.open()
        assert future.result(SOON) == 5

    def test_a_dropped_idle_executor_leaves_nothing(self, no_leaks):
        Executor("local", max_workers=1).submit(same, 1).result(SOON)

    def test_an_executor_has_as_many_workers_as_it_was_asked_for(self, own_pool):
        pool = own_pool(3)
        assert pool._max_workers == pool.size == 3 and "3 workers" in repr(pool) or pool.submit(same, 1).result(SOON)
        assert pool.submit(same, 1).result(SOON) == 1

    def test_a_number_in_the_first_place_is_the_number_of_workers(self, no_leaks):
        with Executor(3) as pool:
            assert pool._max_workers == 3 and "embedded" in repr(pool)


class TestProgramEnd:
    START = "import minipool, time, os, sys\nex = minipool.Executor('local', max_workers=2)\n"

    def test_pending_jobs_are_waited_for_without_noise(self, run_script, tmp_path):
        done = run_script(self.START + """
def write(n):
    time.sleep(0.2); open(f"done-{n}", "w").close()
ex.submit(os.chdir, os.getcwd()).result(); folder = os.getcwd()
def work(n): os.chdir(folder); write(n)
for n in range(4): ex.submit(work, n)
""")
        assert (done.returncode, done.stderr) == (0, "") and len(list(tmp_path.glob("done-*"))) == 4

    @pytest.mark.parametrize("end", ["", "ex.shutdown(wait=False)", "del ex", "sys.exit(0)", "ex.shutdown()"])
    def test_every_way_to_end_is_quiet_and_leaves_nothing(self, run_script, no_leaks, end):
        done = run_script(self.START + f"f = ex.submit(time.sleep, 0.1)\n{end}\n")
        assert (done.returncode, done.stderr) == (0, "")

    def test_an_uncaught_exception_ends_it_too(self, run_script, no_leaks):
        done = run_script(self.START + "f = ex.submit(time.sleep, 0.1)\n1 / 0\n")
        assert done.returncode == 1 and done.stderr.count("Traceback") == 1

    def test_os_exit_leaves_no_process(self, run_script, no_leaks):
        done = run_script(self.START + "f = ex.submit(time.sleep, 1000)\nwhile not f.running(): pass\nos._exit(7)\n")
        assert (done.returncode, done.stderr) == (7, "")

    def test_an_embedded_pool_says_so_once(self, run_script):
        done = run_script("import minipool\nfor _ in range(2):\n    minipool.Executor(max_workers=1).shutdown()\n")
        assert done.stderr.count("embedded pool, 1 worker on ") == 1

    def test_submit_after_the_end_is_refused(self, run_script):
        done = run_script("import atexit\n@atexit.register\ndef last():\n    try: ex.submit(abs, 1)\n"
                          "    except RuntimeError as e: print('refused', e)\n" + self.START)
        assert "refused cannot schedule new futures" in done.stdout and done.stderr == ""

    def test_a_fork_gets_one_clear_error_and_the_parent_none(self, pool, gate):
        future = pool.submit(pass_gate, gate.path, 5)
        wait_until(future.running)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            code = 1
            try:
                pool.submit(same, 1)
            except RuntimeError as error:
                code = 0 if "fork" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        gate.open()
        assert future.result(SOON) == 5 and pool.submit(same, 1).result(SOON) == 1

    def test_multiprocessing_by_fork_leaves_the_parent_s_pool_alone(self, run_script, no_leaks):
        done = run_script(self.START + """
import multiprocessing, warnings
warnings.simplefilter("ignore")
child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
child.start(); child.join(); print(child.exitcode, ex.submit(abs, -1).result())
""")
        assert (done.stdout, done.stderr) == ("child\n0 1\n", "")


class TestMemory:
    def test_an_argument_dies_after_its_job(self, pool):
        class Thing:
            def method(self):
                pass
        thing, gone = Thing(), threading.Event()
        alive = weakref.ref(thing, lambda _: gone.set())
        pool.submit(thing.method)
        del thing
        assert gone.wait(SOON) and alive() is None

    def test_a_future_and_its_value_die_together(self, pool):
        class Thing:
            pass
        future = pool.submit(lambda: Thing())
        alive, value = weakref.ref(future), weakref.ref(future.result(SOON))
        del future
        wait_until(lambda: alive() is None and value() is None)

    def test_an_exception_does_not_keep_its_future(self, pool):
        future = pool.submit(fail, ValueError())
        try:
            future.result(SOON)
        except ValueError as error:
            alive, kept = weakref.ref(future), error
        del future
        wait_until(lambda: alive() is None)
        assert isinstance(kept, ValueError)

    def test_dropped_futures_leave_nothing(self, pool):
        def resident():
            gc.collect()
            return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

        def use(jobs):
            for n in range(0, jobs, 1000):
                minipool.wait([pool.submit(same, n) for _ in range(1000)], SOON)
        use(20_000)
        before = resident()
        use(20_000)
        assert resident() - before < 8 << 20

    def test_a_function_ends_with_its_last_job(self, pool):
        def kept():
            return max(len(thing.objects) for thing in gc.get_objects() if type(thing).__name__ == "Worker")
        for n in range(500):
            pool.submit(lambda n=n: n).result(SOON)
        assert pool.submit(kept).result(SOON) < 100
        assert len(pool._client.functions._entries) < 100 and not pool._client.functions.gone[50:]
