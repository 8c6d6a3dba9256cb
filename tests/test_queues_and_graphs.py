"""Chains of stages (examples/queues.py) and graphs of tasks (examples/graph.py), both upon futures as arguments."""
import collections
import gc
import itertools
import pathlib
import queue
import sys
import threading

import pytest
from processes import wait_until

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
import graph
import queues
from coordination import Queue

import minipool
from minipool import Executor, Future

pytestmark = pytest.mark.slow     # recipes: what passes on one Python holds for the others

SOON = 60
Pair = collections.namedtuple("Pair", "x y")


def increment(x):
    return x + 1


def double(x):
    return 2 * x


def add(x, y):
    return x + y


def invert(x):
    return 1 / x


def wait_for(path):
    while not pathlib.Path(path).exists():
        threading.Event().wait(0.002)


def stages():
    return [thread for thread in threading.enumerate() if thread.name == "queues-stage"]


@pytest.fixture(autouse=True)
def no_stage_is_left(request):
    """A stage ends when nobody holds the queue that it fills: after a test there is none."""
    yield
    gc.collect()
    wait_until(lambda: not stages())


@pytest.fixture
def numbers():
    return queue.Queue(maxsize=10)


class TestQueues:
    def test_ten_becomes_twenty_two_at_the_end_of_a_chain_row_3_3_row_3_4(self, pool, numbers):
        chain = queues.map(pool, double, queues.map(pool, increment, queues.scatter(pool, numbers)))
        results = queues.gather(chain)
        numbers.put(10)
        assert results.get(timeout=SOON) == 22
        for n in range(100):
            numbers.put(n)
            assert n < 50 or results.get(timeout=SOON) == 2 * (n - 50) + 2

    def test_a_map_gives_futures_in_the_order_of_its_input(self, pool, numbers):
        futures = queues.map(pool, increment, numbers)
        for n in range(10):
            numbers.put(n)
        found = [futures.get(timeout=SOON) for _ in range(10)]
        assert all(isinstance(future, Future) for future in found)
        assert [future.result(SOON) for future in found] == list(range(1, 11))

    def test_two_sources_give_one_item_each(self, pool, numbers):
        others = queue.Queue()
        sums = queues.gather(queues.map(pool, add, numbers, others))
        for n in range(5):
            numbers.put(n), others.put(10 * n)
        assert [sums.get(timeout=SOON) for _ in range(5)] == [0, 11, 22, 33, 44]

    def test_who_reads_slowly_holds_up_who_writes_row_3_4(self, pool):
        numbers = queue.Queue(maxsize=3)
        results = queues.gather(queues.map(pool, increment, numbers, buffersize=2), buffersize=2)
        for n in range(9):          # of which 3 stay here, and 2 and one more in each of two stages
            numbers.put(n, timeout=SOON)
        wait_until(results.full)
        with pytest.raises(queue.Full):
            numbers.put(9, timeout=2 * queues.POLL)
        assert [results.get(timeout=SOON) for _ in range(9)] == list(range(1, 10))

    def test_a_failed_item_costs_its_own_place_only(self, pool, numbers):
        inverted = queues.gather(queues.map(pool, double, queues.map(pool, invert, numbers)))
        for n in (1, 0, 2):
            numbers.put(n)
        found = [inverted.get(timeout=SOON) for _ in range(3)]
        assert found[::2] == [2, 1] and isinstance(found[1], ZeroDivisionError)

    def test_failed_items_can_be_left_out(self, pool, numbers):
        inverted = queues.gather(queues.map(pool, invert, numbers), errors="skip")
        for n in (1, 0, 2):
            numbers.put(n)
        assert [inverted.get(timeout=SOON) for _ in range(2)] == [1, 0.5]
        with pytest.raises(ValueError, match="errors is 'raise' or 'skip'"):
            queues.gather(inverted, errors="ignore")

    def test_a_shut_executor_is_said_in_the_place_of_a_value(self, own_pool, numbers):
        ex = own_pool(1)
        results = queues.gather(queues.map(ex, increment, numbers))
        ex.shutdown()
        numbers.put(1)
        assert "after shutdown" in str(results.get(timeout=SOON))

    def test_several_queues_become_one_and_one_several_row_3_5(self, numbers):
        others = queue.Queue()
        both = queues.multiplex(queues.merge(numbers, others), 2)
        for n in range(5):
            numbers.put(n), others.put(10 + n)
        found = [[copy.get(timeout=SOON) for _ in range(10)] for copy in both]
        assert found[0] == found[1] and sorted(found[0]) == [*range(5), *range(10, 15)]

    def test_jobs_feed_a_chain_through_a_shared_queue(self, own_pool):
        ex = own_pool(2)
        shared = Queue(executor=ex)
        results = queues.gather(queues.map(ex, double, shared))
        ex.submit(lambda: [shared.put(n) for n in range(10)]).result(SOON)
        assert [results.get(timeout=SOON) for _ in range(10)] == [2 * n for n in range(10)]
        del results
        gc.collect()
        wait_until(lambda: not stages())        # it reads from the pool: before that ends


class TestIterators:
    def test_endless_ones_are_read_only_so_far_row_3_3(self, pool):
        read = []
        source = (read.append(n) or n for n in itertools.count())
        more = queues.map(pool, increment, source, buffersize=4)
        results = queues.gather(queues.map(pool, double, more, buffersize=4))
        assert list(itertools.islice(results, 20)) == [2 * n + 2 for n in range(20)] and len(read) <= 20 + 2 * 4

    def test_short_ones_come_whole(self, pool):
        assert list(queues.gather(queues.map(pool, increment, iter(range(3))))) == [1, 2, 3]
        assert list(queues.map(pool, increment, iter(()))) == []

    def test_an_exception_is_raised_in_its_place(self, pool):
        results = queues.gather(queues.map(pool, invert, iter([1, 0, 2])))
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert list(queues.gather(queues.map(pool, invert, iter([1, 0, 2])), errors="skip")) == [1, 0.5]

    def test_anything_else_gives_lists(self, pool):
        futures = queues.map(pool, add, range(3), iter([10, 20, 30]))
        assert isinstance(futures, list) and queues.gather(futures) == [10, 21, 32]
        assert queues.gather(queues.scatter(pool, "abc")) == ["a", "b", "c"]

    def test_nonsense_is_refused(self, pool):
        with pytest.raises(TypeError, match="needs a queue, an iterator or a sequence"):
            queues.map(pool, increment)
        with pytest.raises(ValueError, match="buffersize must be 1 or more"):
            queues.map(pool, increment, iter([]), buffersize=0)


class TestGraphs:
    def test_keys_are_what_their_tasks_make_row_2_57(self, pool):
        tasks = {"x": (increment, 1), "y": (add, "x", 2), "z": (sum, ["x", "y", (abs, -5)]), "w": "y", "v": [1, "x"]}
        assert graph.get({"x": (increment, 1)}, "x", pool) == 2
        assert graph.get(tasks, "y", pool) == 4
        assert graph.get(tasks, ["z", ["w", "x"], "v"], pool) == [11, [4, 2], [1, 2]]

    def test_values_that_are_no_tasks_stay_as_they_are(self, pool):
        values = {"pair": Pair(1, 2), "text": "free", "both": (Pair, "pair", "text"), ("a", 1): {"x": "pair"}}
        assert graph.get(values, ["both", "pair", ("a", 1)], pool) == [Pair(Pair(1, 2), "free"), Pair(1, 2),
                                                                       {"x": "pair"}]

    def test_each_task_runs_once_and_only_if_it_is_needed(self, pool, tmp_path):
        def note(name, *_):
            with open(tmp_path / "ran", "a") as file:
                file.write(name)
        tasks = {"a": (note, "A"), "b": (note, "B", "a"), "c": (note, "C", "a"), "d": (note, "D", "b", "c"),
                 "e": (note, "E", "d")}
        graph.get(tasks, ["d", "a", "d"], pool)
        assert sorted((tmp_path / "ran").read_text()) == ["A", "B", "C", "D"]

    def test_ten_thousand_nodes_end(self, pool):
        chain = {0: (increment, -1), **{n: (increment, n - 1) for n in range(1, 1000)}}
        leaves = {("leaf", n): (add, float(n), 0.5) for n in range(8999)}
        assert graph.get({**chain, **leaves, "end": (sum, [999, *leaves])}, "end", pool) == 999 + 8999 ** 2 / 2

    def test_a_cycle_is_one_clear_error(self, pool):
        tasks = {"x": (add, "y", 1), "y": (add, 1, [(increment, "z")]), "z": (increment, "x"), "w": 1}
        with pytest.raises(ValueError, match="^the graph has a cycle: '[xyz]'( needs '[xyz]'){3}$"):
            graph.get(tasks, ["w", "x"], pool)
        with pytest.raises(ValueError, match="^the graph has a cycle: 'x' needs 'x'$"):
            graph.get({"x": "x"}, "x", pool)

    def test_unknown_keys_are_one_clear_error(self, pool):
        with pytest.raises(KeyError, match=r"the graph has no 'y', \('z', 1\)"):
            graph.get({"x": (increment, 1)}, ["x", ["y"], ("z", 1)], pool)

    def test_what_a_task_raised_is_raised_and_nothing_after_it_runs(self, pool, tmp_path):
        tasks = {"x": (invert, 0), "y": ((tmp_path / "ran").write_text, "x")}
        with pytest.raises(ZeroDivisionError):
            graph.get(tasks, "y", pool)
        assert not (tmp_path / "ran").exists()

    def test_a_value_of_an_odd_type_reaches_a_task_within_a_task(self, pool):
        class Numbers(list):
            """A list of its own type."""
        tasks = {"x": (Numbers, [1, 2]), "y": ((lambda x, kind: kind), "x", (type, "x"))}
        assert graph.get(tasks, "y", pool).__name__ == "Numbers"


@pytest.mark.thirdparty
class TestDask:
    def test_its_collections_compute_on_the_executor_row_2_57(self, pool):
        dask, bag = pytest.importorskip("dask"), pytest.importorskip("dask.bag")
        with dask.config.set(scheduler=pool):
            numbers = bag.from_sequence(range(100), npartitions=5)
            assert numbers.map(double).filter(lambda n: n % 3 == 0).sum().compute() == sum(range(0, 200, 6))
            kept = numbers.map(increment).persist()
            assert kept.max().compute() == 100

    def test_its_arrays_too(self, pool):
        dask, array = pytest.importorskip("dask"), pytest.importorskip("dask.array")
        with dask.config.set(scheduler=pool):
            assert (array.ones((400, 400), chunks=100) * 2).sum().compute() == 320_000

    def test_its_jobs_run_in_the_workers(self, pool):
        dask = pytest.importorskip("dask")
        with dask.config.set(scheduler=pool):
            where = dask.delayed(lambda: minipool.current_job().worker)()
            assert where.compute().startswith("local-")


@pytest.mark.parametrize("name, says", [("queues", "22\n20 is twice the sum"), ("graph", "31 tasks: 1240")])
def test_the_examples_run_as_programs(program, name, says):
    example = program(pathlib.Path(queues.__file__).parent / f"{name}.py", "--quick")
    assert example.code() == 0 and says in example.out


def test_without_an_executor_it_takes_the_one_opened_last(monkeypatch):
    with Executor("local", max_workers=1) as ex:
        if not hasattr(minipool, "get_executor"):
            monkeypatch.setattr(minipool, "get_executor", lambda: ex, raising=False)
        assert graph.get({"x": (increment, 1)}, "x") == 2
