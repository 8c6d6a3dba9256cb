"""examples/worker_group.py: gangs of instances with ranks. A test for each row of docs/capabilities.md part 1."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
import weakref

import pytest
from processes import ROOT, wait_until

from minipool import Executor, JobTimeout, WorkerDied
from minipool_worker import Node

sys.path.append(str(ROOT / "examples"))
import worker_group
from group_layout import NamedSharding, choose, describe, environment
from worker_group import GroupOptions, MultiWorkerFuture, group

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

SOON = 60
SLACK = 3       # the machines that run tests are busy: a promise of two seconds is held to six there
VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SQUARE = NamedSharding([[0, 1], [2, 3]], ["dp", "tp"])


class Rank:
    """What the tests make groups of."""

    def __init__(self, *args, gate=None, fail_on=None, nap_on=None, **kwargs):
        self.rank = int(os.environ["RANK"])
        self.built_with = args, kwargs
        self.variables = {name: value for name, value in os.environ.items()
                          if name in VARIABLES or name.startswith("TEST_")}
        self.calls = []
        if nap_on == self.rank:
            time.sleep(0.5)
        if fail_on == self.rank:
            raise KeyError(f"rank {self.rank} will not")

    def get(self, name):
        return getattr(self, name)

    def note(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.rank

    def note_pid(self):
        return os.getpid()

    def variable(self, name):
        return os.environ.get(name)

    def pause(self, seconds):
        time.sleep(seconds)
        return self.rank

    def raise_on(self, rank, pause=0):
        if self.rank == rank:
            raise ValueError(f"bad on {self.rank}")
        time.sleep(pause)
        return self.rank

    def die_on(self, rank, pause):
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)

    def count(self, n, path=None):
        for i in range(n):
            yield 10 * self.rank + i
        if path:
            open(f"{path}-{self.rank}", "w").close()
        return "over"

    def meet(self, folder, number, size):
        """A collective: return when all ranks are in this call."""
        open(os.path.join(folder, f"{number}-{self.rank}"), "w").close()
        give_up = time.monotonic() + 30
        while sum(name.startswith(f"{number}-") for name in os.listdir(folder)) < size:
            assert time.monotonic() < give_up, "the others are in another call"
            time.sleep(0.001)


class Configured(Rank):
    @staticmethod
    def configure_worker(num_gpus, bundle_indices):
        return {}, {"TEST_HOOK": f"{num_gpus} {bundle_indices}", "TEST_OWN": "hook"}, {"by_hook": True}


class Meeting(Rank):
    def __init__(self, folder):
        super().__init__()
        self.meet(folder, 0, 4)


class Hanging(Rank):
    def clean(self):
        time.sleep(60)


class Leaving(Rank):
    def __init__(self, path):
        super().__init__()
        weakref.finalize(self, touch, path)


def touch(path):
    open(path, "w").close()


@pytest.fixture(scope="module")
def pool():
    with Executor("local", max_workers=4) as ex:
        ex.submit(abs, 1).result(SOON)
        yield ex


def seats():
    """How many instances live in this process."""
    return len(worker_group._seats)


def generators():
    """How many generators wait in this process."""
    return sum(len(seat.generators) for seat in worker_group._seats.values())


def pids(pool):
    return {worker["name"]: worker["pid"] for worker in pool.info()["workers"]}


# ---- layouts ----

class TestSharding:
    def test_shape_names_layout_and_equality_row_1_10(self):
        assert (SQUARE.shape, SQUARE.names, SQUARE.ndim, SQUARE.size) == ({"dp": 2, "tp": 2}, ["dp", "tp"], 2, 4)
        assert SQUARE == NamedSharding(((0, 1.0), (2, 3)), ("dp", "tp")) != NamedSharding([[0, 1], [2, 3]], ["a", "b"])
        SQUARE.layout[0][0] = 7         # of a copy
        assert SQUARE.layout == [[0, 1], [2, 3]]

    @pytest.mark.parametrize("layout, names", [
        ([[0, 1], [2]], ["dp", "tp"]), ([[0, 1.5]], ["dp", "tp"]), ([0, 1], ["dp", "tp"]),
        ([[0, 1], [1, 2]], ["a", "b"]), ([[0, 1]], ["dp", "dp"]), ([], ["dp"])])
    def test_a_bad_layout_is_a_value_error_row_1_10(self, layout, names):
        with pytest.raises(ValueError):
            NamedSharding(layout, names)

    def test_queries_row_1_11(self):
        assert SQUARE.get_worker_coords(3) == {"dp": 1, "tp": 1}
        assert SQUARE.get_ranks_by_coord(tp=0) == [0, 2] and SQUARE.get_ranks_by_coord(tp=5) == []
        assert SQUARE.get_ranks(dp=1) == NamedSharding([2, 3], ["tp"]) and SQUARE.get_ranks(dp=1, tp=0) == 2
        assert (SQUARE.get_axis_index("tp"), SQUARE.get_axis_size("tp")) == (1, 2)
        with pytest.raises(IndexError):
            SQUARE.get_ranks(dp=2)
        for ask in (lambda: SQUARE.get_worker_coords(4), lambda: SQUARE.get_ranks_by_coord(pp=0),
                    lambda: SQUARE.get_axis_index("pp"), lambda: SQUARE.get_axis_size("pp")):
            with pytest.raises(ValueError):
                ask()


def nodes(**sizes):
    return {node: [{"name": f"{node}-{i}", "node": node, "device": "cuda:0" if node == "gpu" else "cpu"}
                   for i in range(size)] for node, size in sizes.items()}


class TestPlaces:
    def test_so_many_on_each_node_row_1_1(self):
        assert [w["name"] for w in choose(nodes(a=2, b=2), 1, None)] == ["a-0", "b-0"]
        assert [w["name"] for w in choose(nodes(a=2, b=2), [2, 1], 3)] == ["a-0", "a-1", "b-0"]
        assert [w["name"] for w in choose(nodes(a=2, b=2), None, 3)] == ["a-0", "a-1", "b-0"]

    @pytest.mark.parametrize("per_node, size", [(3, None), ([1], None), ("2", None), ([1, 1], 3)])
    def test_more_than_there_are_or_nonsense_raises_row_1_1(self, per_node, size):
        with pytest.raises(ValueError):
            choose(nodes(a=2, b=2), per_node, size)

    def test_names_are_unique_and_predictable_row_1_3(self):
        places = choose(nodes(a=2, b=2), None, None)
        assert [m["name"] for m in describe("P", places, None)] == ["P-0-0", "P-0-1", "P-1-0", "P-1-1"]
        tied = describe("P", places, [[0, 1], [2, 3]])
        assert [m["name"] for m in tied] == ["P-grp0-0", "P-grp0-1", "P-grp1-0", "P-grp1-1"]

    def test_local_ranks_count_on_cpu_workers_only_row_1_4(self):
        places = choose(nodes(cpu=2, gpu=2), None, None)
        got = [environment(describe("P", places, None), rank, None, "h", "1") for rank in range(4)]
        assert [(e["RANK"], e["NODE_RANK"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"]) for e in got] == [
            ("0", "0", "0", "2"), ("1", "0", "1", "2"), ("2", "1", "0", "1"), ("3", "1", "0", "1")]


# ---- making a group ----

class TestMaking:
    def test_distinct_workers_all_of_them_unless_a_size_is_given_row_1_1(self, pool):
        with group(pool, Rank) as four, group(pool, Rank, 2) as two:
            assert sorted(four.call("note_pid").get_results()) == sorted(pids(pool).values())
            assert two.call("note_pid").get_results() == four.call("note_pid").get_results()[:2]

    @pytest.mark.parametrize("size, error", [(5, ValueError), (0, ValueError), ("2", TypeError), (True, TypeError)])
    def test_a_size_that_cannot_be_is_refused_at_once_row_1_1(self, pool, size, error):
        with pytest.raises(error):
            group(pool, Rank, size)

    def test_too_few_workers_are_waited_for_and_it_says_so_row_1_1(self, server, capsys):
        with Executor(server.address, secret=server.secret) as ex, pytest.raises(TimeoutError, match="0 workers"):
            GroupOptions(ex, timeout=3.2).group(Rank, 1)
        assert "a group of 1 Rank finds 0 workers, and waits" in capsys.readouterr().err

    def test_on_says_which_workers(self, pool):
        with GroupOptions(pool, on=["local-1", "local-3"]).group(Rank) as two:
            assert [here["worker"] for here in two.worker_metadata] == ["local-1", "local-3"]

    def test_tied_ranks_are_replicas_with_leaders_row_1_2_row_1_9(self, pool):
        with GroupOptions(pool, tied=[[0, 1], [2, 3]]).group(Rank) as four:
            assert (four.dp_size, four.get_dp_leader_worker_idx(0), four.get_dp_leader_worker_idx(1)) == (2, 0, 2)
            assert [here["bundle_indices"] for here in four.worker_metadata] == [(0, [0, 1]), None, (0, [2, 3]), None]
            with pytest.raises(IndexError, match="0 to 1"):
                four.get_dp_leader_worker_idx(2)
        with pytest.raises(ValueError, match="once"):
            GroupOptions(pool, tied=[[0, 1], [1, 2]]).group(Rank)

    def test_variables_are_set_before_user_code_row_1_4_row_1_33(self, pool):
        with group(pool, Rank, 2) as one, group(pool, Rank, 2) as other:
            first, second = one.call("get", "variables").get_results()
            assert [first[name] for name in VARIABLES[:5]] == ["0", "0", "0", "2", "2"]
            assert [second[name] for name in VARIABLES[:5]] == ["1", "1", "0", "2", "2"]
            assert first["MASTER_ADDR"] == "127.0.0.1" and first["MASTER_PORT"] == second["MASTER_PORT"]
            assert other.call("get", "variables").get_results()[0]["MASTER_PORT"] != first["MASTER_PORT"]

    def test_which_variables_win_row_1_5_row_1_28(self, pool):
        env = {"TEST_OWN": "caller", "RANK": "7", "TEST_OTHER": "caller"}
        with GroupOptions(pool, env=env).group(Configured, 2) as two:
            first, second = two.call("get", "variables").get_results()
            assert (first["RANK"], first["TEST_OWN"], first["TEST_OTHER"]) == ("0", "hook", "caller")
            assert (first["TEST_HOOK"], second["TEST_HOOK"]) == ("0 (0, [0])", "0 (0, [1])")
            assert two.call("get", "built_with").get_results() == [((), {"by_hook": True})] * 2
        assert env == {"TEST_OWN": "caller", "RANK": "7", "TEST_OTHER": "caller"}

    def test_groups_share_workers_each_with_its_variables_and_jobs_see_none_row_1_6(self, pool):
        with group(pool, Rank, 4) as four, GroupOptions(pool, on="local-1").group(Rank) as one:
            assert four.call("variable", "RANK").get_results() == ["0", "1", "2", "3"]
            assert one.call("variable", "WORLD_SIZE").get_results() == ["1"]
            assert four.call("variable", "WORLD_SIZE").get_results() == ["4"] * 4
            assert pool.options(on="local-1").submit(os.environ.get, "RANK").result(SOON) is None

    def test_metadata_in_the_order_of_ranks_row_1_7(self, pool):
        with group(pool, Rank) as four:
            assert [here["global_rank"] for here in four.worker_metadata] == [0, 1, 2, 3]
            assert {"node_idx", "local_rank", "global_rank", "name", "bundle_indices", "dp_shard_idx", "worker",
                    "device"} <= four.worker_metadata[0].keys()

    def test_a_handle_for_each_rank_row_1_8(self, pool):
        with group(pool, Rank) as four:
            assert len(four) == len(four.workers) == four.world_size == 4
            assert four.workers[2].note(1, x=2).result(SOON) == 2

    def test_a_class_by_its_name_row_1_27(self, pool):
        with group(pool, "collections:Counter", 2, "abca") as two:
            assert two.call("most_common", 1).get_results() == [[("a", 2)]] * 2

    def test_constructors_run_at_the_same_time_row_1_29(self, pool, tmp_path):
        with group(pool, Meeting, 4, str(tmp_path)) as four:        # each waits for all
            assert len(four) == len(os.listdir(tmp_path)) == 4

    def test_construction_is_a_barrier_row_1_31(self, pool):
        began = time.monotonic()
        with group(pool, Rank, 2, nap_on=1):
            assert time.monotonic() - began >= 0.5

    def test_the_first_failure_of_a_constructor_is_raised_and_nothing_stays_row_1_31(self, pool):
        with pytest.raises(KeyError, match="rank 1 will not"):
            group(pool, Rank, 2, fail_on=1)
        with group(pool, Rank, 2) as two:       # the workers take the next one
            assert two.call("note").get_results() == [0, 1]
            assert pool.run(seats) == {"local-0": 1, "local-1": 1, "local-2": 0, "local-3": 0}

    def test_futures_are_arguments_of_constructors_and_calls(self, pool):
        with group(pool, Rank, 2, pool.submit(abs, -3)) as two:
            assert two.call("get", "built_with").get_results() == [((3,), {})] * 2
            assert two.call("pause", pool.submit(abs, 0)).get_results() == [0, 1]


# ---- calls ----

@pytest.fixture
def four(pool):
    """Four ranks laid out as dp 2 by tp 2."""
    with GroupOptions(pool, sharding=SQUARE).group(Rank) as four:
        yield four


def called(four):
    """Return what each rank was called with."""
    return four.call("get", "calls").get_results()


class TestCalls:
    def test_one_rank_row_1_12(self, four):
        assert four.call_rank(1, "note", 1, x=2).result(SOON) == 1
        assert called(four) == [[], [((1,), {"x": 2})], [], []]
        with pytest.raises(AttributeError, match="nothing_like_it"):
            four.call_rank(1, "nothing_like_it").result(SOON)
        with pytest.raises(IndexError, match="0 to 3"):
            four.call_rank(4, "note")

    def test_all_or_coordinate_0_of_some_axes_row_1_13(self, four):
        assert four.call("note", 1).get_results() == [0, 1, 2, 3]
        assert four.call("note", run_rank_0_only_axes=["tp"]).get_results() == [0, 2]
        assert [len(calls) for calls in called(four)] == [2, 1, 2, 1]

    def test_an_element_for_each_row_1_14(self, four):
        future = four.call_each("note", "abcd", x=[1, 2, 3, 4], common_kwargs={"y": 5})
        assert future.get_results() == [0, 1, 2, 3]
        assert called(four)[2] == [(("c",), {"x": 3, "y": 5})]
        assert four.call_each("note", [7, 8], run_rank_0_only_axes=["tp"]).called_workers == [0, 2]

    @pytest.mark.parametrize("lists, named", [([[1, 2]], {}), ([], {}), ([[1] * 4], {"x": [1] * 5})])
    def test_lists_of_a_wrong_length_raise_row_1_14(self, four, lists, named):
        with pytest.raises(ValueError, match="lists of 4"):
            four.call_each("note", *lists, **named)

    def test_data_by_coordinates_row_1_15_row_1_16(self, four):
        four.call_sharded("note", in_sharded_axes=["dp"], replicate_on_axes=["tp"], x=["a", "b"]).get_results()
        assert [calls[0][1]["x"] for calls in called(four)] == ["a", "a", "b", "b"]

    def test_the_nesting_is_in_the_order_of_the_axes_trap_10(self, four):
        four.call_sharded("note", in_sharded_axes=["tp", "dp"], x=[["00", "01"], ["10", "11"]]).get_results()
        assert [calls[0][1]["x"] for calls in called(four)] == ["00", "10", "01", "11"]

    def test_free_axes_are_called_at_coordinate_0_only_row_1_17(self, four):
        assert four.call_sharded("note", in_sharded_axes=["tp"], x=["a", "b"]).get_results() == [0, 1]
        assert [len(calls) for calls in called(four)] == [1, 1, 0, 0]

    def test_dummy_calls_for_collectives_row_1_18(self, four):
        future = four.call_sharded("note", in_sharded_axes=["tp"], make_dummy_calls_to_free_axes=True, x=["a", "b"],
                                   common_kwargs={"y": 1})
        assert future.get_results() == [0, 1] and future.called_workers == [0, 1, 2, 3]
        assert called(four)[3] == [((), {"x": None, "y": 1})]

    def test_a_dummy_that_raises_counts_row_1_23_trap_9(self, four):
        future = four.call_sharded("raise_on", in_sharded_axes=["tp"], make_dummy_calls_to_free_axes=True,
                                   common_kwargs={"rank": 3})
        with pytest.raises(ValueError, match="bad on 3"):
            future.get_results()

    def test_one_result_for_each_replica_row_1_19(self, four):
        future = four.call_sharded("note", in_sharded_axes=["dp"], replicate_on_axes=["tp"],
                                   output_is_replicated=["tp"], x=["a", "b"])
        assert future.get_results() == [0, 2] and [len(calls) for calls in called(four)] == [1, 1, 1, 1]

    def test_arguments_for_all_clash_with_sharded_ones_row_1_20(self, four):
        with pytest.raises(TypeError, match="x twice"):
            four.call_sharded("note", in_sharded_axes=["dp"], x=["a", "b"], common_kwargs={"x": 1})
        with pytest.raises(TypeError, match="x twice"):
            four.call_each("note", x=[1] * 4, common_kwargs={"x": 1})

    @pytest.mark.parametrize("axes", [
        {"in_sharded_axes": ["pp"]}, {"in_sharded_axes": ["dp"], "replicate_on_axes": ["pp"]},
        {"in_sharded_axes": ["dp"], "output_is_replicated": ["pp"]},
        {"in_sharded_axes": ["dp"], "replicate_on_axes": ["dp"]}])
    def test_unknown_axes_are_errors_row_1_21_trap_11(self, four, axes):
        with pytest.raises(ValueError):
            four.call_sharded("note", x=["a", "b"], **axes)
        with pytest.raises(ValueError):
            four.call("note", run_rank_0_only_axes=["pp"])
        with pytest.raises(ValueError, match="2 places, its argument 3"):
            four.call_sharded("note", in_sharded_axes=["dp"], x=["a", "b", "c"])
        assert called(four) == [[]] * 4

    def test_without_a_sharding_there_are_no_axes_row_1_21(self, pool):
        with group(pool, Rank, 2) as two:
            with pytest.raises(ValueError, match="no sharding"):
                two.call_sharded("note", in_sharded_axes=["dp"])
            assert two.call("note").get_results() == [0, 1]


class TestFutures:
    def test_many_as_one_row_1_22(self, four):
        future = four.call("note")
        assert isinstance(future, MultiWorkerFuture) and list(future) == future.futures
        assert (future.called_workers, future.return_from_workers) == ([0, 1, 2, 3], [0, 1, 2, 3])
        assert [part.worker for part in future if part.result(SOON) >= 0] == [f"local-{i}" for i in range(4)]

    def test_a_time_limit_stops_nothing_row_1_23(self, four):
        future = four.call("pause", 0.3)
        with pytest.raises(TimeoutError, match="have not answered"):
            future.get_results(timeout=0.05)
        assert future.get_results(timeout=SOON) == [0, 1, 2, 3]

    def test_it_can_be_awaited_and_who_stops_waiting_cancels_no_rank(self, four):
        async def main():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(four.call("pause", 0.2), 0.02)
            return await four.call("note")
        assert asyncio.run(main()) == [0, 1, 2, 3]

    def test_generators_are_read_into_one_list_row_1_24(self, four):
        future = four.call("count", 2)
        assert four.get_all_worker_results(future, timeout=SOON) == [0, 1, 10, 11, 20, 21, 30, 31]      # row 1.25
        with pytest.raises(LookupError, match="is over"):
            future.get_results()

    def test_generators_are_handed_back_row_1_24(self, four, tmp_path):
        done = str(tmp_path / "done")
        parts = four.call("count", 2, done).get_results(return_generators_as_proxies=True)
        assert next(parts[1]) == 10 and not os.path.exists(f"{done}-1")     # the rest is made when it is asked for
        assert [list(part) for part in parts] == [[0, 1], [11], [20, 21], [30, 31]] and os.path.exists(f"{done}-1")

    def test_a_stream_is_rank_0_s_and_all_go_forward_together(self, pool, four, tmp_path):
        done = str(tmp_path / "done")
        assert list(four.stream("count", 3, done)) == [0, 1, 2]
        assert sorted(os.listdir(tmp_path)) == [f"done-{rank}" for rank in range(4)]
        items = four.stream("count", 3)
        assert next(items) == 0
        items.close()
        four.call("note").get_results()
        assert four.call("get", "calls").get_results() and set(pool.run(generators).values()) == {0}
        with pytest.raises(TypeError, match="not a generator"):
            four.stream("note")


class TestOrder:
    def test_all_ranks_see_the_calls_of_many_threads_in_one_order_row_0_31(self, pool, tmp_path):
        with group(pool, Rank, 2) as one, group(pool, Rank, 2) as other:
            def run(target, first):
                futures.extend(target.call("meet", str(tmp_path), number, 2) for number in range(first, first + 25))
            futures = []
            threads = [threading.Thread(target=run, args=(target, 100 * number))
                       for number, target in enumerate([one, other] * 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for future in futures:
                future.get_results(timeout=SOON)
        assert len(futures) == 100

    def test_a_call_that_waits_for_a_future_holds_no_other_up(self, pool, tmp_path):
        with group(pool, Rank, 2) as two:
            gate = pool.options(on="local-3").submit(time.sleep, 0.3)
            late = threading.Thread(target=lambda: two.call("note", gate).get_results())
            late.start()
            assert two.call("note", "early").get_results(timeout=SOON) == [0, 1]
            late.join()
            assert [calls[0] for calls in called(two)] == [(("early",), {})] * 2

    def test_what_cannot_travel_is_called_nowhere(self, four):
        with pytest.raises(Exception, match="cannot pickle"):
            four.call("note", threading.Lock())
        assert called(four) == [[]] * 4 and four.is_alive()


# ---- death and end ----

class TestDeath:
    def test_an_exception_is_raised_though_other_ranks_go_on_row_1_30_row_0_5(self, four):
        with pytest.raises(ValueError, match="bad on 1"):
            four.call("raise_on", 1, pause=0.5).get_results(timeout=SOON)
        assert four.call("note").get_results() == [0, 1, 2, 3]

    def test_of_a_rank_in_a_call_names_rank_worker_and_cause_row_1_30_row_0_6(self, pool):
        with group(pool, Rank, 2) as two:
            future, began = two.call("die_on", 1, 30), time.monotonic()
            with pytest.raises(WorkerDied, match="lost rank 1 on local-1: .*SIGKILL"):
                future.get_results()
            with pytest.raises(WorkerDied, match="lost rank 1 on local-1: .*SIGKILL"):
                future.futures[0].result()          # which waits on the other rank
            assert time.monotonic() - began < 2 * SLACK
            with pytest.raises(WorkerDied, match="lost rank 1"):
                two.call("note")
            assert not two.is_alive()
        assert pool.submit(abs, -1).result(SOON) == 1

    def test_of_a_rank_that_has_no_call_ends_the_calls_of_the_others_row_1_30(self, pool):
        with group(pool, Rank, 2) as two:
            future = two.call_rank(0, "pause", 30)
            wait_until(future.running)
            began = time.monotonic()
            os.kill(two.call_rank(1, "note_pid").result(SOON), signal.SIGKILL)
            with pytest.raises(WorkerDied, match="lost rank 1 on local-1: its process is gone"):
                future.result(SOON)
            assert time.monotonic() - began < 2 * SLACK

    def test_while_nobody_calls_is_noticed_by_the_next_call(self, pool):
        with group(pool, Rank, 2) as two:
            pid = two.call_rank(1, "note_pid").result(SOON)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: pids(pool).get("local-1") not in (pid, None))        # of the same name, another process
            with pytest.raises(WorkerDied, match="lost rank 1 on local-1: .*(new process|process is gone)"):
                two.call("note").get_results()

    def test_in_a_constructor_is_raised(self, pool):
        with pytest.raises(WorkerDied, match="lost rank 0 on local-0: .*exit"):
            group(pool, "os:_exit", 1, 3)
        wait_until(lambda: len(pids(pool)) == 4)

    def test_by_a_time_limit_is_that(self, pool):
        with group(pool.options(job_timeout=3), Rank, 2) as two:        # it is a limit for the constructors too
            with pytest.raises(JobTimeout):
                two.call_rank(0, "pause", 30).result(SOON)
            with pytest.raises(WorkerDied, match="lost rank 0 on local-0: .*job_timeout"):
                two.call("note")

    def test_of_the_server_harms_no_call_that_runs(self, cluster):
        cluster.node("n", cpu_workers=2)
        with cluster.executor() as ex:
            ex.wait_for_workers(2, SOON)
            with group(ex, Rank, 2) as two:
                future = two.call("pause", 2)
                wait_until(lambda: all(part.running() for part in future))
                cluster.server.process.kill()
                cluster.server.process.wait()
                cluster.server = cluster.serve()
                assert future.get_results(timeout=SOON) == [0, 1]
                assert two.call("note").get_results(timeout=SOON) == [0, 1] and two.is_alive()

    def test_of_a_rank_on_another_node_is_noticed(self, server):
        with Node(server.address, secret=server.secret, cpu_workers=1, name="a"), \
             Node(server.address, secret=server.secret, cpu_workers=1, name="b"), \
             Executor(server.address, secret=server.secret) as ex:
            ex.wait_for_workers(2, SOON)
            with GroupOptions(ex, per_node=1).group(Rank) as two:
                first, second = two.call("get", "variables").get_results()
                assert (first["NODE_RANK"], second["NODE_RANK"], second["LOCAL_RANK"]) == ("0", "1", "0")
                assert first["MASTER_ADDR"] == second["MASTER_ADDR"]
                with pytest.raises(WorkerDied, match="lost rank 1 on b-0: .*SIGKILL"):
                    two.call("die_on", 1, 30).futures[0].result(SOON)

    def test_of_the_client_frees_the_instances(self, server, tmp_path):
        with Node(server.address, secret=server.secret, cpu_workers=1, name="n"):
            with Executor(server.address, secret=server.secret) as ex:
                ex.wait_for_workers(1, SOON)
                group(ex, Leaving, 1, str(tmp_path / "gone"))
                ex.submit(gc.collect).result(SOON)
                assert not os.path.exists(tmp_path / "gone")
            with Executor(server.address, secret=server.secret) as ex:
                wait_until(lambda: ex.submit(gc.collect).result(SOON) >= 0 and os.path.exists(tmp_path / "gone"))


class TestShutdown:
    def test_calls_a_method_on_all_and_a_second_one_does_nothing_row_1_26(self, pool, tmp_path):
        two = group(pool, Rank, 2)
        assert two.shutdown("note") is True and two.shutdown("note") is True
        assert not any(pool.run(seats).values()) and not two.is_alive()
        with pytest.raises(RuntimeError, match="was shut down"):
            two.call("note")

    def test_a_clean_up_that_hangs_is_ended_and_said_row_1_26(self, pool, capsys):
        two = GroupOptions(pool, on=["local-2", "local-3"]).group(Hanging)
        before, began = pids(pool), time.monotonic()
        assert two.shutdown("clean", timeout=0.3) is False and time.monotonic() - began < 10 * SLACK
        assert "clean() of Hanging" in capsys.readouterr().err
        wait_until(lambda: len(pids(pool)) == 4 and pids(pool)["local-2"] != before["local-2"])

    def test_a_clean_up_that_raises_is_said_and_the_rest_is_done_row_1_26(self, pool, capsys):
        two = group(pool, Rank, 2)
        assert two.shutdown("raise_on", timeout=SOON) is False
        assert "raise_on() of Rank" in capsys.readouterr().err
        assert not any(pool.run(seats).values())

    def test_by_force_ends_what_runs_row_1_26(self, pool):
        two = group(pool, Rank, 2)
        future = two.call("pause", 60)
        wait_until(lambda: all(part.running() for part in future))
        assert two.shutdown("note", force=True) is True
        assert all(part.done() for part in future)
        wait_until(lambda: len(pids(pool)) == 4)

    def test_of_the_executor_first_is_no_error(self):
        with Executor("local", max_workers=1) as ex:
            one = group(ex, Rank)
        assert one.shutdown() is True
