"""Kept values (examples/kept_values.py): what jobs return stays in the workers, and jobs go where their inputs are."""
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import gc
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from processes import end as end_process
from processes import is_alive, pids, wait_until

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from kept_values import Keeper, size_of

from minipool import Executor, WorkerDied, as_completed, gather, wait

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

SOON = 60
LARGE = 64_000_000


# ---- what the jobs do ----

class Thing:
    """Something whose identity can be seen, and that counts how often it was unpickled in a process."""
    unpickled = collections.Counter()

    def __init__(self, name, data=b""):
        self.name, self.data = name, data

    def __reduce__(self):
        return revive, (self.name, self.data)


def revive(name, data):
    Thing.unpickled[name] += 1
    return Thing(name, data)


def times_unpickled(name):
    return Thing.unpickled[name]


def unpicklable():
    return threading.Lock()


def identity(thing):
    return os.getpid(), id(thing)


def bytes_of(size, fill=1):
    return numpy.full(size, fill, numpy.uint8)


def plus_one(array):
    return array + numpy.uint8(1)


def plus_one_gated(array, gate):
    Path(gate + ".reached").touch()
    wait_for(gate)
    return plus_one(array)


def wait_for(path, value=None):
    while not os.path.exists(path):
        time.sleep(0.002)
    return value


def nth(things, place):
    return things[place]


def total(nested):
    """Add up all numbers in a nest."""
    if isinstance(nested, dict):
        return sum(map(total, [*nested.keys(), *nested.values()]))
    return sum(map(total, nested)) if isinstance(nested, list | tuple | set) else nested


def fail(*_):
    raise KeyError("no such table")


def touch(path):
    Path(path).touch()


def place(*_):
    return os.environ["MINIPOOL_WORKER"]


@pytest.fixture
def keeper(pool):
    with Keeper(pool) as keeper:
        yield keeper


@pytest.fixture
def own(own_pool):
    """own(2): a keeper of a pool that the test may break."""
    keepers = []

    def start(workers):
        pool = own_pool(workers)
        pool.wait_for_workers(workers, SOON)
        keepers.append(Keeper(pool))
        return keepers[-1], pool
    yield start
    for keeper in keepers:
        keeper.close()


class CountingProxy(FaultProxy):
    """Counts the bytes that pass, both ways."""
    passed = 0

    def _spoil(self, pair, data):
        with self._lock:
            self.passed += len(data)
        return data


@pytest.fixture
def lines(cluster, between_hosts):
    """A cluster without shared memory whose nodes and clients dial counted lines: lines.nodes, lines.clients."""
    with CountingProxy("127.0.0.1", cluster.port) as nodes, CountingProxy("127.0.0.1", cluster.port) as clients:
        dialling = copy.copy(cluster)
        dialling.address, dialling.nodes, dialling.clients = f"127.0.0.1:{nodes.port}", nodes, clients
        dialling.executor = lambda: Executor(f"127.0.0.1:{clients.port}", secret=cluster.secret)
        yield dialling


def keys(keeper):
    return set(keeper.who_has())


class TestStaying:
    def test_the_very_object_stays_in_its_worker(self, keeper):
        thing = keeper.submit(Thing, "stays")
        places = {keeper.submit(identity, thing).result(SOON) for _ in range(5)}
        assert len(places) == 1 and keeper.submit(times_unpickled, "stays").result(SOON) == 0

    def test_even_what_cannot_be_pickled(self, keeper):
        lock = keeper.submit(unpicklable)
        assert keeper.submit(nth, [lock], 0).exception(SOON) is None
        with pytest.raises(Exception, match="cannot pickle the result"):
            lock.result(SOON)

    def test_a_kept_future_knows_where_its_value_is_and_how_large(self, pool, keeper):
        array = keeper.submit(bytes_of, 1_000_000)
        assert array.exception(SOON) is None and array.nbytes == 1_000_000
        assert keeper.who_has() == {array.key: {array.worker: 1_000_000}} and array.worker in pids(pool)
        assert array.key.startswith("bytes_of-") and "1000000 bytes" in repr(array)

    def test_result_fetches_it_each_time_row_3_2(self, keeper):
        array = keeper.submit(bytes_of, 1000)
        first, second = array.result(SOON), array.result(SOON)
        assert first is not second and (first == second).all()

    def test_none_is_a_value(self, keeper):
        assert keeper.submit(touch, os.devnull).result(SOON) is None

    def test_ten_results_of_10_mb_move_nothing_until_they_are_asked_for_row_3_2(self, lines):
        lines.node(cpu_workers=2, MINIPOOL_SHARED_MEMORY="0")
        with lines.executor() as pool, Keeper(pool) as keeper:
            arrays = [keeper.submit(bytes_of, 10_000_000) for _ in range(10)]
            wait(arrays, SOON)
            assert lines.clients.passed < 1_000_000 and lines.nodes.passed < 1_000_000
            assert len(arrays[0].result(SOON)) == 10_000_000
            assert 10_000_000 < lines.clients.passed < 12_000_000

    def test_a_chain_of_100_steps_over_64_mb_moves_no_byte_of_it_row_3_2_row_3_21(self, lines):
        lines.node(cpu_workers=1, MINIPOOL_SHARED_MEMORY="0")
        with lines.executor() as pool, Keeper(pool) as keeper:
            array = keeper.submit(bytes_of, LARGE)
            for _ in range(100):
                array = keeper.submit(plus_one, array)
            ends = keeper.submit(nth, array, slice(0, LARGE, LARGE - 1)).result(120)
            assert ends.tolist() == [101, 101]
            assert lines.clients.passed < 1_000_000 and lines.nodes.passed < 1_000_000


class TestInputs:
    def test_are_found_wherever_they_are_in_plain_containers_row_2_4(self, keeper):
        one, two, three = (keeper.submit(abs, n) for n in (1, 2, 3))
        assert keeper.submit(total, [one, (two, {one: [three]}), {two}, 4]).result(SOON) == 1 + 2 + 1 + 3 + 2 + 4
        assert keeper.submit(total, nested=[one, [[[two]]]]).result(SOON) == 3

    def test_plain_futures_of_the_pool_may_stand_between_them(self, pool, keeper):
        assert keeper.submit(total, [keeper.submit(abs, 1), pool.submit(abs, 2)]).result(SOON) == 3

    def test_in_an_object_of_ones_own_they_are_not_found_and_that_is_said_row_2_4(self, keeper):
        with pytest.raises(ValueError, match="future of another executor"):
            keeper.submit(identity, Thing(keeper.submit(abs, 1))).result(SOON)

    def test_of_another_keeper_are_refused_row_2_20(self, pool, keeper):
        with Keeper(pool) as other, pytest.raises(ValueError, match="kept by another keeper"):
            keeper.submit(abs, other.submit(abs, 1))

    def test_that_failed_fail_what_needs_them_which_never_runs(self, keeper, tmp_path):
        failed = keeper.submit(touch, keeper.submit(nth, [keeper.submit(fail)], 0))
        with pytest.raises(KeyError, match="no such table"):
            failed.result(SOON)
        assert keeper.recomputed == 0

    def test_are_waited_for(self, keeper, gate):
        late = keeper.submit(wait_for, gate.path, 5)
        doubled = keeper.submit(total, [late, late])
        assert not doubled.done()
        gate.open()
        assert doubled.result(SOON) == 10

    def test_a_chain_longer_than_the_recursion_limit(self, keeper):
        number = keeper.submit(int)
        for _ in range(1100):
            number = keeper.submit(total, [number, 1])
        assert number.result(SOON) == 1100


class TestLocality:
    def test_a_job_goes_where_most_of_its_bytes_are_row_3_21(self, pool, keeper):
        here, there = sorted(pids(pool))
        for large, small in ((here, there), (there, here)):
            inputs = [keeper.scatter(bytes_of(1_000_000), on=large), *keeper.scatter([bytes_of(9)] * 3, on=small)]
            assert keeper.submit(place, *inputs).result(SOON) == large
            assert len(keeper.who_has()[inputs[1].key]) == 2, "it was copied to where it was needed"

    def test_bytes_beat_load_row_3_21(self, pool, keeper, gate):
        array = keeper.scatter(bytes_of(1000), on="local-0")
        busy = keeper.options(on="local-0").submit(wait_for, gate.path)
        job = keeper.submit(place, array)
        assert pool.options(on="local-1").submit(place).result(SOON) == "local-1" and not job.done()
        gate.open()
        assert job.result(SOON) == "local-0" and busy.result(SOON) is None

    def test_on_says_where_and_inputs_are_copied_there_once(self, keeper):
        thing = keeper.scatter(Thing("here"), on="local-0")
        there = keeper.options(on="local-1", name="there")
        assert {there.submit(place, thing).result(SOON) for _ in range(20)} == {"local-1"}
        assert len({job.result(SOON) for job in [there.submit(identity, thing) for _ in range(20)]}) == 1
        assert keeper.copied == 1

    def test_a_copy_is_as_good_as_the_first(self, pool, keeper):
        array = keeper.scatter(bytes_of(1000), on="local-0")
        assert keeper.options(on="local-1").submit(total, [keeper.submit(len, array)]).result(SOON) == 1000
        assert keeper.options(on="local-1").submit(len, array).result(SOON) == 1000
        assert set(keeper.who_has()[array.key]) == {"local-0", "local-1"}

    def test_what_cannot_be_copied_fails_the_job_that_needs_it_elsewhere(self, keeper):
        lock = keeper.options(on="local-0").submit(unpicklable)
        with pytest.raises(Exception, match="cannot pickle the result"):
            keeper.options(on="local-1").submit(identity, lock).result(SOON)
        assert keeper.submit(place, lock).result(SOON) == "local-0"

    def test_a_busy_worker_gives_its_value_to_result_at_once(self, keeper, gate):
        array = keeper.scatter(bytes_of(1000), on="local-0")
        busy = keeper.options(on="local-0").submit(wait_for, gate.path)
        wait_until(busy.running)
        assert len(array.result(SOON)) == 1000 and not busy.done()

    def test_the_sizes_of_containers_are_those_of_their_parts(self):
        assert size_of(bytes_of(1000)) == 1000 < size_of({"a": [bytes_of(1000)] * 500})
        assert 500_000 < size_of([bytes_of(1000)] * 500) < 600_000 and size_of(b"x" * 1000) > 1000


class TestScatter:
    @pytest.mark.parametrize("data", [[1, 2], (1, 2), {1, 2}, {"a": 1, "b": 2}])
    def test_gives_the_shape_it_is_given_row_2_26(self, keeper, data):
        futures = keeper.scatter(data)
        assert type(futures) is type(data) and gather(futures) == data
        assert all(future.done() for future in (futures.values() if isinstance(data, dict) else futures))

    def test_one_value_is_one_future(self, keeper):
        assert keeper.scatter("text").result(SOON) == "text"

    def test_deals_in_turn_over_calls_too_row_3_22(self, keeper):
        workers = [future.worker for call in ([1, 2, 3], [4, 5], [6]) for future in keeper.scatter(call)]
        assert sorted(workers[:2]) == ["local-0", "local-1"] and workers == workers[:2] * 3

    def test_on_the_name_of_nobody_is_an_error(self, keeper):
        with pytest.raises(ValueError, match="names no worker"):
            keeper.scatter([1], on="moon")

    def test_a_broadcast_of_64_mb_comes_once_to_each_of_4_workers_and_serves_100_jobs_row_2_26_row_3_25(self, lines):
        lines.node(cpu_workers=4, MINIPOOL_SHARED_MEMORY="0")
        with lines.executor() as pool, Keeper(pool) as keeper:
            pool.wait_for_workers(4, SOON)
            thing = keeper.scatter(Thing("broadcast", bytes_of(LARGE)), broadcast=True)
            jobs = [keeper.submit(identity, thing) for _ in range(100)]
            jobs += [keeper.options(on=worker).submit(identity, thing) for worker in pids(pool)]
            assert len({job.result(120) for job in jobs}) == 4
            assert set(pool.run(times_unpickled, "broadcast").values()) == {1} and keeper.copied == 0
            assert 4 * LARGE < lines.nodes.passed < 4.2 * LARGE and lines.clients.passed < 4.2 * LARGE

    def test_a_broadcast_reaches_a_worker_that_joins_later_row_3_25(self, cluster):
        cluster.node("early")
        with cluster.executor() as pool, Keeper(pool) as keeper:
            number = keeper.scatter(41, broadcast=True)
            assert number.result(SOON) == 41 and number.worker is None
            cluster.node("late")
            pool.wait_for_workers(2, SOON)
            assert keeper.options(on="late").submit(total, [number, 1]).result(SOON) == 42
            assert len(keeper.who_has()[number.key]) == 2


class TestLettingGo:
    def test_the_last_reference_drops_the_value_row_2_18_row_3_18(self, keeper):
        arrays = [keeper.submit(bytes_of, 1000) for _ in range(100)]
        wait(arrays, SOON)
        kept = arrays[7]
        assert len(keys(keeper)) == 100
        del arrays
        wait_until(lambda: keys(keeper) == {kept.key})
        assert len(kept.result(SOON)) == 1000

    def test_what_jobs_wait_for_lives_until_they_have_run(self, keeper, gate):
        ready = keeper.submit(wait_for, gate.path)
        length = keeper.submit(nth, [keeper.submit(bytes_of, 1000), ready], 0)
        del ready
        gc.collect()
        gate.open()
        assert len(length.result(SOON)) == 1000
        wait_until(lambda: keys(keeper) == {length.key})

    def test_a_job_that_nobody_wants_and_that_has_not_begun_never_runs_row_2_18(self, own, gate, tmp_path):
        keeper, _ = own(1)
        running = keeper.submit(wait_for, gate.path)
        unwanted = keeper.submit(touch, tmp_path / "unwanted")
        needs_it = keeper.submit(touch, [unwanted])
        wait_until(lambda value=unwanted._value: value.job)
        del unwanted, needs_it
        last = keeper.submit(touch, tmp_path / "last")
        gate.open()
        assert last.result(SOON) is None and running.done() and not (tmp_path / "unwanted").exists()

    def test_release_drops_it_before_the_last_reference_does(self, keeper):
        array = keeper.submit(bytes_of, 1000)
        assert len(array.result(SOON)) == 1000
        array.release()
        with pytest.raises(CancelledError):
            array.result(SOON)
        with pytest.raises(CancelledError):
            keeper.submit(len, array)
        wait_until(lambda: not keys(keeper))

    def test_release_leaves_it_to_jobs_that_wait_for_it(self, keeper, gate):
        late = keeper.submit(wait_for, gate.path, 5)
        doubled = keeper.submit(total, [late, late])
        late.release()
        gate.open()
        assert doubled.result(SOON) == 10

    def test_a_released_broadcast_is_dropped_by_every_worker_before_its_next_job(self, pool, keeper):
        number = keeper.scatter(1, broadcast=True)
        assert number.result(SOON) == 1
        number.release()
        wait_until(lambda: keeper._book.post() is None and not number._value.is_everywhere)
        wait(pool.options(on=worker).submit(place) for worker in pids(pool))
        assert not keys(keeper)

    def test_large_values_go_while_work_goes_on(self, keeper):
        array = keeper.submit(bytes_of, 20_000_000)
        for _ in range(50):
            array = keeper.submit(plus_one, array)
            array.exception(SOON)
            assert len(keys(keeper)) <= 4

    def test_copies_go_as_well(self, keeper):
        array = keeper.scatter(bytes_of(1000), on="local-0")
        assert keeper.options(on="local-1").submit(len, array).result(SOON) == 1000
        del array
        wait_until(lambda: not keys(keeper))

    def test_closing_drops_all_and_cancels_what_has_not_begun(self, pool, gate):
        with Keeper(pool) as keeper:
            array = keeper.submit(bytes_of, 1000)
            array.exception(SOON)
            later = keeper.submit(total, [keeper.submit(wait_for, gate.path, 1)])
        assert wait([later], SOON).done and later.cancelled()
        for call in (array.result, later.result):
            with pytest.raises(CancelledError):
                call(SOON)
        with pytest.raises(RuntimeError, match="after the keeper was closed"):
            keeper.submit(abs, 1)
        gate.open()
        wait(pool.options(on=worker).submit(place) for worker in pids(pool))
        assert not keys(keeper)

    def test_may_come_after_the_pool_was_shut_down(self, own):
        keeper, pool = own(1)
        array = keeper.submit(bytes_of, 1000)
        array.exception(SOON)
        pool.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            keeper.submit(len, array).result(SOON)
        with pytest.raises(RuntimeError, match="after shutdown"):
            array.result(SOON)

    def test_a_keeper_that_is_dropped_ends_with_its_last_future(self, pool):
        keeper = Keeper(pool)
        array, thread = keeper.submit(bytes_of, 1000), keeper._book.thread
        del keeper
        assert len(array.result(SOON)) == 1000 and thread.is_alive()
        del array
        gc.collect()
        thread.join(SOON)
        assert not thread.is_alive()


class TestLosses:
    def test_the_holders_death_in_mid_chain_gives_the_right_result_row_2_52(self, own, gate):
        keeper, pool = own(2)
        array = keeper.submit(bytes_of, 1_000_000, 0)
        for _ in range(50):
            array = keeper.submit(plus_one, array)
        stopped = keeper.submit(plus_one_gated, array, gate.path)
        end = stopped
        for _ in range(49):
            end = keeper.submit(plus_one, end)
        wait_until(lambda: os.path.exists(gate.path + ".reached"))
        os.kill(pids(pool)[array.worker], signal.SIGKILL)
        gate.open()
        assert (end.result(SOON) == 100).all()
        assert keeper.recomputed == 51, "the first array and 50 steps"

    def test_a_lost_value_is_made_again_when_it_is_asked_for_row_2_20_row_3_10(self, own):
        keeper, pool = own(2)
        arrays = {n: keeper.submit(bytes_of, 1000, n) for n in range(6)}
        wait(arrays.values(), SOON)
        for pid in pids(pool).values():
            os.kill(pid, signal.SIGKILL)
        found = gather(arrays)
        assert {n: int(array[0]) for n, array in found.items()} == {n: n for n in range(6)}
        assert keeper.recomputed == 6

    def test_inputs_that_were_let_go_are_made_again_and_let_go_again(self, own):
        keeper, pool = own(1)
        array = keeper.submit(plus_one, keeper.submit(plus_one, keeper.submit(bytes_of, 1000)))
        assert array.result(SOON)[0] == 3
        wait_until(lambda: keys(keeper) == {array.key})
        os.kill(pids(pool)["local-0"], signal.SIGKILL)
        assert array.result(SOON)[0] == 3 and keeper.recomputed == 3
        wait_until(lambda: keys(keeper) == {array.key})

    def test_a_copy_saves_the_work(self, own):
        keeper, pool = own(2)
        array = keeper.options(on="local-0").submit(bytes_of, 1000)
        assert keeper.options(on="local-1").submit(len, array).result(SOON) == 1000
        os.kill(pids(pool)["local-0"], signal.SIGKILL)
        assert len(array.result(SOON)) == 1000 and keeper.recomputed == 0

    def test_a_scattered_value_cannot_be_made_again_and_says_so_row_2_26(self, own):
        keeper, pool = own(2)
        number = keeper.scatter(5, on="local-0")
        os.kill(pids(pool)["local-0"], signal.SIGKILL)
        for call in (number, keeper.submit(total, [number, 1])):
            with pytest.raises(WorkerDied, match="was scattered, and the last worker that held it is gone"):
                call.result(SOON)

    def test_what_fails_when_it_is_made_again_says_why(self, own, tmp_path):
        keeper, pool = own(1)
        (tmp_path / "table").touch()
        size = keeper.submit(os.path.getsize, tmp_path / "table")
        assert size.result(SOON) == 0
        (tmp_path / "table").unlink()
        os.kill(pids(pool)["local-0"], signal.SIGKILL)
        with pytest.raises(FileNotFoundError):
            size.result(SOON)

    def test_a_job_that_kills_its_workers_fails_alone_row_2_52(self, own):
        keeper, _ = own(2)
        number, fatal = keeper.submit(abs, -1), keeper.options(max_deaths=1).submit(os._exit, 3)
        with pytest.raises(WorkerDied, match="took down 2 workers"):
            fatal.result(SOON)
        assert keeper.submit(total, [number, 1]).result(SOON) == 2

    def test_many_jobs_on_a_lost_value_have_it_made_again_once(self, own):
        keeper, pool = own(2)
        array = keeper.submit(bytes_of, 1000)
        array.exception(SOON)
        os.kill(pids(pool)[array.worker], signal.SIGKILL)
        assert [job.result(SOON) for job in [keeper.submit(len, array) for _ in range(50)]] == [1000] * 50
        assert keeper.recomputed == 1

    @contextlib.contextmanager
    def large_value_on_a_node_that_goes(self, cluster):
        """Scatter a small value "here", make a large one "there", and kill that node."""
        cluster.node("here")
        node = cluster.node("there")
        with cluster.executor() as pool, Keeper(pool) as keeper:
            pool.wait_for_workers(2, SOON)
            small = keeper.scatter(bytes_of(1000), on="here")
            large = keeper.options(prefer="there").submit(bytes_of, 1_000_000)
            large.exception(SOON)
            worker = pids(pool)["there-0"]
            node.process.kill()
            wait_until(lambda: not is_alive(worker))    # till then it might make the value again, in vain
            yield pool, keeper, small, large

    def test_of_a_node_that_never_comes_back_costs_its_values_only(self, cluster):
        with self.large_value_on_a_node_that_goes(cluster) as (pool, keeper, small, large):
            assert keeper.submit(nth, [large, small], 0).result(SOON).sum() == 1_000_000
            assert keeper.recomputed == 1 and small.result(SOON).sum() == 1000

    def test_the_place_of_most_bytes_that_is_gone_is_not_waited_for(self, cluster):
        with self.large_value_on_a_node_that_goes(cluster) as (pool, keeper, small, large):
            wait_until(lambda: len(pids(pool)) == 1)
            assert keeper.submit(place, large, small).result(SOON).startswith("here") and keeper.recomputed == 1

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_a_random_graph_gives_what_it_should_whatever_is_killed_and_leaves_nothing(self, own, seed):
        (keeper, pool), rng = own(2), random.Random(seed)
        futures, values = [keeper.submit(int)], [0]
        for n in range(1, 120):
            inputs = rng.choices(range(max(0, n - 12), n), k=rng.randrange(4))
            there = keeper.options(on=rng.choice(["local-0", "local-1"])) if n % 5 == 0 else keeper
            futures.append(there.submit(total, [n, *(futures[i] for i in inputs)]))
            values.append(n + sum(values[i] for i in inputs))
            if n % 30 == 29:
                wait([futures[rng.randrange(n)]], SOON)
                end_process(rng.choice(wait_until(lambda: list(pids(pool).values()))))
        assert gather(futures[60:]) == values[60:], seed
        futures.clear()
        wait_until(lambda: not keys(keeper))

    def test_a_restart_of_the_server_loses_nothing(self, cluster):
        cluster.node(cpu_workers=1)
        with cluster.executor() as pool, Keeper(pool) as keeper:
            array = keeper.submit(bytes_of, 1000)
            array.exception(SOON)
            cluster.server.process.kill()
            cluster.server.process.wait()
            cluster.serve()
            assert keeper.submit(len, array).result(SOON) == 1000 and len(array.result(SOON)) == 1000
            assert keeper.recomputed == 0


class TestTheFuture:
    def test_is_one_of_the_standard_library(self, keeper):
        futures = [keeper.submit(abs, n) for n in range(10)]
        assert {future.result(SOON) for future in as_completed(futures)} == set(range(10))
        assert gather({"a": futures[1], "b": [futures[2]]}) == {"a": 1, "b": [2]}
        assert gather([keeper.submit(fail), futures[3]], errors="skip") == [3]

    def test_raises_what_the_job_raised_and_its_time_limit_stops_nothing(self, keeper, gate):
        with pytest.raises(KeyError, match="no such table"):
            keeper.submit(fail).result(SOON)
        late = keeper.submit(wait_for, gate.path, 1)
        with pytest.raises(TimeoutError):
            late.result(0.05)
        gate.open()
        assert late.result(SOON) == 1

    def test_what_cannot_be_pickled_fails_it(self, keeper):
        with pytest.raises(TypeError, match="callable"):
            keeper.submit(5)
        with pytest.raises(Exception, match="cannot pickle"):
            keeper.submit(abs, threading.Lock()).result(SOON)

    def test_a_callback_may_ask_for_values(self, keeper):
        found = concurrent.futures.Future()
        keeper.submit(abs, -1).add_done_callback(lambda future: found.set_result(future.result(SOON)))
        other = keeper.submit(total, [keeper.submit(abs, -1)])
        other.add_done_callback(lambda future: found.set_result(future.result(SOON)))
        assert found.result(SOON) == 1

    def test_can_be_awaited(self, keeper):
        async def main():
            return await asyncio.gather(*(keeper.submit(abs, -n) for n in range(5)))
        assert asyncio.run(main()) == list(range(5))

    def test_can_be_cancelled_before_it_began_and_so_are_those_that_need_it(self, own, gate):
        keeper, _ = own(1)
        running, waiting = keeper.submit(wait_for, gate.path), keeper.submit(abs, 1)
        needs_it = keeper.submit(total, [waiting])
        wait_until(running.running)
        assert waiting.cancel() and not running.cancel()
        assert wait([needs_it], SOON).done and needs_it.cancelled() and waiting.cancelled()

    def test_options_are_those_of_the_pool(self, keeper, tmp_path):
        def fails_once(mark):
            if not os.path.exists(mark):
                touch(mark)
                raise OSError("not yet")
            return 1
        future = keeper.options(retries=1, retry_on=OSError, name="patient").submit(fails_once, str(tmp_path / "mark"))
        assert future.result(SOON) == 1 and future.key.startswith("patient-")

    def test_who_has_lists_every_worker_with_sizes_row_2_45(self, pool, keeper):
        arrays = keeper.scatter([bytes_of(1000), bytes_of(2000)])
        assert keeper.who_has() == {array.key: {array.worker: array.nbytes} for array in arrays}
        assert sorted(array.nbytes for array in arrays) == [1000, 2000]
