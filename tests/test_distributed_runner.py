"""examples/distributed_runner.py: one program on several ranks, from asyncio. A test for each row of part 0."""

import asyncio
import base64
import io
import json
import os
import signal
import sys
import threading
import time

import numpy
import pytest
from processes import ROOT, wait_until

from minipool import Executor, WorkerDied

sys.path.append(str(ROOT / "examples"))
from distributed_runner import DistributedRunner, DistributedWorker
from distributed_worker import text_event

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

SOON = 60
SLACK = 3       # the machines that run tests are busy: a promise of two seconds is held to six there


class Worker(DistributedWorker):
    """What the tests run: does what its payload says."""

    def setup(self, fail_on=None, nap=0, **given):
        self.given, self.calls, self.events = given, [], ["setup"]
        time.sleep(nap)
        if fail_on == self.rank:
            raise KeyError(f"rank {self.rank} will not")

    def __call__(self, streaming=False, items=(), value=None, gap=0, number=None, raise_on=None, die_on=None, pause=0):
        self.calls.append(number)
        for item in items:
            self.add_streaming_result(item)
            time.sleep(gap)
        if raise_on == self.rank:
            raise ValueError(f"bad on {self.rank}")
        if die_on == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        return {"rank": self.rank, "calls": self.calls, "env": environment(), "pid": os.getpid(), "given": self.given,
                "streaming": streaming, "cwd": os.getcwd(), "device": self.device}[value] if value else number

    def teardown(self):
        if folder := self.given.get("folder"):
            open(f"{folder}/down-{self.rank}", "x").close()


class Threaded(Worker):
    def __call__(self, streaming=False, n=3):
        thread = threading.Thread(target=lambda: [self.add_streaming_result(i) for i in range(n)])
        thread.start()
        thread.join()
        return "raw"


class Straggler(Worker):
    """A thread of the first call goes on emitting in the next one."""

    def __call__(self, streaming=False, first=False):
        if first:
            self.go = threading.Event()
            self.late = self.run_in_worker(self.emit_late)
            return "first"
        self.go.set()
        self.late.result(SOON)
        self.add_streaming_result("own")
        return "second"

    def emit_late(self):
        self.go.wait(SOON)
        self.add_streaming_result("of another call")


class Async(DistributedWorker):
    async def setup(self, **given):
        self.events = ["setup"]

    async def __call__(self, streaming=False):
        await asyncio.sleep(0.01)
        self.add_streaming_result("item")
        self.add_streaming_error("oh")
        array = numpy.zeros(3)
        self.add_streaming_result(array)
        array += 1                      # the item was what it was
        self.add_streaming_result({"a": 1}, as_text_event=True)
        return await asyncio.wrap_future(self.run_in_worker(sum, [1, 2]))


class Failing(DistributedWorker):
    def __call__(self, streaming=False):
        return None

    def teardown(self):
        raise ValueError("no teardown")


def environment():
    return {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


@pytest.fixture(scope="module")
def pool():
    with Executor("local", max_workers=2) as ex:
        ex.submit(abs, 1).result(SOON)
        yield ex


def run(pool, use, worker_cls=Worker, setup=None, **options):
    """Return `await use(runner)` of a runner of two ranks, which is stopped after it."""
    async def main():
        runner = DistributedRunner(worker_cls, 2, executor=pool, backend=None, **options)
        await runner.start(SOON, **(setup or {}))
        try:
            return await asyncio.wait_for(use(runner), SOON)
        finally:
            if runner.is_alive():
                await runner.stop()
            else:
                runner.terminate()
    return asyncio.run(main())


async def items_of(stream, into=None):
    into = [] if into is None else into
    async for item in stream:
        into.append(item)
    return into


class TestBeginAndEnd:
    def test_constructing_starts_nothing_and_terminate_is_harmless_row_0_1_row_0_16(self):
        runner = DistributedRunner(Worker, 2)
        assert not runner.is_alive()
        runner.terminate()
        with pytest.raises(RuntimeError, match="not alive"):
            asyncio.run(runner.invoke())

    def test_all_ranks_start_with_what_setup_is_given_row_0_2_row_0_26(self, pool):
        async def use(runner):
            with pytest.raises(RuntimeError, match="was started"):
                await runner.start()
            return await runner.invoke({"value": "given"})
        assert run(pool, use, setup={"a": 1}) == {"a": 1}

    def test_a_setup_that_raises_fails_the_start_with_the_real_error_row_0_2_row_0_18(self, pool):
        async def main():
            runner = DistributedRunner(Worker, 2, executor=pool, backend=None)
            with pytest.raises(RuntimeError, match="could not start") as caught:
                await runner.start(SOON, fail_on=1)
            assert isinstance(caught.value.__cause__, KeyError) and not runner.is_alive()
            assert [type(error) for error in runner.gather_errors()] == [KeyError] and runner.gather_errors() == []
            await runner.start(SOON)            # nothing of it is in the way
            assert await runner.invoke({"number": 1}) == 1
            await runner.stop()
        asyncio.run(main())

    def test_ranks_have_their_variables_and_folder_row_0_3(self, pool, tmp_path):
        async def use(runner):
            return await runner.invoke({"value": "env"}), await runner.invoke({"value": "cwd"})
        env, cwd = run(pool, use, cwd=str(tmp_path), master_addr="127.0.0.2", master_port=4321)
        assert env == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2",
                       "MASTER_PORT": "4321"}
        assert cwd == str(tmp_path) != pool.options(on="local-0").submit(os.getcwd).result(SOON)

    def test_stop_runs_teardown_on_each_rank_once_row_0_15_row_0_26(self, pool, tmp_path):
        async def use(runner):
            await runner.stop()
            assert not runner.is_alive()
            with pytest.raises(RuntimeError, match="not alive"):
                await runner.stop()
        run(pool, use, setup={"folder": str(tmp_path)})
        assert sorted(os.listdir(tmp_path)) == ["down-0", "down-1"]

    def test_a_teardown_that_raises_is_printed_row_0_26(self, own_mark, capfd):
        async def main():
            async with DistributedRunner(Failing, 1, backend=None):
                pass
        asyncio.run(main())
        assert "[rank 0] teardown raised" in (said := capfd.readouterr().err) and "ValueError: no teardown" in said

    def test_terminate_ends_what_runs_without_teardown_row_0_16(self, pool, tmp_path):
        async def use(runner):
            call = asyncio.ensure_future(runner.invoke({"pause": 60}))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(runner.terminate)
            with pytest.raises(Exception, match=r"kill\(\) was called|shut"):
                await call
        run(pool, use, setup={"folder": str(tmp_path)})
        assert os.listdir(tmp_path) == []
        wait_until(lambda: len(pool.info()["workers"]) == 2)

    def test_an_embedded_pool_of_its_own_leaves_nothing_row_0_22(self, own_mark):
        async def main():
            with pytest.raises(ZeroDivisionError):
                async with DistributedRunner(Worker, 2, backend=None) as runner:
                    assert await runner.invoke({"number": 1}) == 1
                    raise ZeroDivisionError
        asyncio.run(main())         # own_mark: no process is left


class TestCalls:
    def test_the_value_of_rank_0_row_0_4_row_0_27(self, pool):
        async def use(runner):
            return await runner.invoke({"value": "rank"}), await runner.invoke({"value": "streaming"})
        assert run(pool, use) == (0, False)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_an_exception_on_any_rank_is_raised_row_0_5_trap_7(self, pool, rank):
        async def use(runner):
            with pytest.raises(ValueError, match=f"bad on {rank}"):
                await runner.invoke({"raise_on": rank})
            return await runner.invoke({"number": 5})
        assert run(pool, use) == 5

    def test_a_time_limit_stops_nothing_and_its_reply_is_never_seen_row_0_4_row_0_7_trap_8(self, pool):
        async def use(runner):
            with pytest.raises(TimeoutError):
                await runner.invoke({"number": 1, "pause": 0.4}, timeout=0.1)
            assert await runner.invoke({"number": 2}) == 2
            return await runner.invoke({"value": "calls"})
        assert run(pool, use) == [1, 2, None]

    def test_concurrent_calls_each_have_their_own_reply_row_0_7(self, pool):
        async def use(runner):
            return await asyncio.gather(*(runner.invoke({"number": number}) for number in range(20)))
        assert run(pool, use) == list(range(20))

    def test_a_dead_rank_is_noticed_row_0_6_row_0_17(self, pool):
        async def use(runner):
            began = time.monotonic()
            with pytest.raises(WorkerDied, match="lost rank 1 on local-1: .*SIGKILL"):
                await runner.invoke({"die_on": 1, "pause": 60})
            assert time.monotonic() - began < 2 * SLACK and not runner.is_alive()
            with pytest.raises(RuntimeError, match="lost rank 1"):
                runner.ensure_alive()
            assert len(runner.gather_errors()) == 1 and runner.gather_errors() == []        # row 0.18
        run(pool, use)
        assert pool.submit(abs, -1).result(SOON) == 1

    def test_arrays_arrive_as_themselves_row_0_14(self, pool):
        async def use(runner):
            return await runner.invoke({"number": [numpy.arange(5)]})
        assert run(pool, use)[0].tolist() == [0, 1, 2, 3, 4]

    def test_it_is_called_again_after_idle_seconds_but_not_while_it_is_busy_row_0_19(self, pool):
        async def use(runner):
            idle = []
            while idle.count("again") < 3:
                await asyncio.sleep(1)
                idle = await runner.invoke({"value": "calls", "number": "mine"})
            await runner.invoke({"pause": 1.5, "number": "busy"})
            busy = await runner.invoke({"value": "calls", "number": "mine"})
            with pytest.raises(RuntimeError, match="keep-alive"):
                await runner.keepalive(timeout=0)
            return idle, busy
        idle, busy = run(pool, use, keepalive_payload={"number": "again"}, keepalive_interval=0.5)
        assert busy[len(idle):] == ["busy", "mine"]


class TestStreams:
    def test_items_as_they_come_then_the_value_row_0_8(self, pool):
        async def use(runner):
            stream = runner.stream({"items": [0, 1], "gap": 0.3, "number": 9})
            began = time.monotonic()
            assert await anext(stream) == 0 and time.monotonic() - began < 0.6 * SLACK
            return await items_of(stream)
        assert run(pool, use) == [1, 9]

    def test_a_hundred_of_them_two_at_a_time_never_mix_row_0_8_trap_5(self, pool):
        async def use(runner):
            async def many(first):
                for number in range(first, first + 50):
                    assert await items_of(runner.stream({"items": [0, 1, 2], "number": number})) == [0, 1, 2, number]
                    assert await runner.invoke({"items": ["lost"], "number": 1}) == 1
            await asyncio.gather(many(100), many(200))
        run(pool, use)

    def test_many_items_and_large_ones_come_in_order_row_0_8(self, pool):
        async def use(runner):
            small = await items_of(runner.stream({"items": list(range(1000))}))
            large = await items_of(runner.stream({"items": [bytes([i]) * 300_000 for i in range(10)]}))
            return small, [item[:1] for item in large[:-1]]
        assert run(pool, use) == ([*range(1000), None], [bytes([i]) for i in range(10)])

    def test_a_thread_that_outlives_its_call_does_not_emit_into_the_next_row_0_8_trap_5(self, pool):
        async def use(runner):
            first = await items_of(runner.stream({"first": True}))
            return first, await items_of(runner.stream())
        assert run(pool, use, Straggler) == (["first"], ["own", "second"])

    def test_limits_on_the_whole_and_between_items_row_0_9(self, pool):
        async def use(runner):
            for limits in ({"streaming_timeout": 0.2}, {"timeout": 0.2}):
                got = []
                with pytest.raises(TimeoutError):
                    await items_of(runner.stream({"items": [0, 1], "gap": 0.6}, **limits), got)
                assert got in ([], [0])
            return await items_of(runner.stream({"items": [0, 1, 2], "gap": 0.05, "number": 9},
                                                timeout=SOON, streaming_timeout=SOON))
        assert run(pool, use) == [0, 1, 2, 9]

    def test_a_stream_left_early_is_in_nobody_s_way(self, pool):
        async def use(runner):
            stream = runner.stream({"items": [0, 1, 2], "gap": 0.1})
            assert await anext(stream) == 0
            await stream.aclose()
            return await items_of(runner.stream({"items": ["a"], "number": "b"}))
        assert run(pool, use) == ["a", "b"]

    @pytest.mark.parametrize("rank", [0, 1])
    def test_an_exception_comes_after_the_items_before_it_row_0_5(self, pool, rank):
        async def use(runner):
            got = []
            with pytest.raises(ValueError, match=f"bad on {rank}"):
                await items_of(runner.stream({"items": [0, 1], "raise_on": rank}), got)
            assert got == [0, 1][:len(got)] and (rank or len(got) == 2)
            return await items_of(runner.stream({"number": 5}))
        assert run(pool, use) == [5]

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_that_dies_in_the_middle_is_noticed_row_0_6_trap_6(self, pool, rank):
        async def use(runner):
            began, got = time.monotonic(), []
            with pytest.raises(WorkerDied, match=f"lost rank {rank} on local-{rank}: .*SIGKILL"):
                await items_of(runner.stream({"items": [0, 1], "gap": 0.1, "die_on": rank, "pause": 60}), got)
            assert time.monotonic() - began < 2 * SLACK and got == [0, 1][:len(got)]
        run(pool, use)

    def test_text_events_row_0_10(self, pool):
        async def use(runner):
            return await items_of(runner.stream({"items": [{"a": 1}], "number": [numpy.int64(2)]}, as_text_events=True))
        assert run(pool, use) == [b'data: {"a": 1}\n\n', b"data: [2]\n\n"]

    def test_images_in_text_events_are_data_urls_row_0_10(self):
        image = pytest.importorskip("PIL.Image")
        pixels = numpy.arange(48, dtype="uint8").reshape(4, 4, 3)
        kind, _, data = json.loads(text_event({"image": pixels}, "png")[6:])["image"].partition(",")
        assert kind == "data:image/png;base64"
        assert numpy.array_equal(numpy.asarray(image.open(io.BytesIO(base64.b64decode(data)))), pixels)
        assert json.loads(text_event(image.fromarray(pixels))[6:]).startswith("data:image/jpeg;base64,")
        assert json.loads(text_event(numpy.zeros((2, 2)))[6:]) == [[0, 0], [0, 0]]

    def test_emitting_from_a_thread_of_the_worker_row_0_11(self, pool):
        async def use(runner):
            return await items_of(runner.stream({"n": 3}))
        assert run(pool, use, Threaded) == [0, 1, 2, "raw"]

    def test_coroutines_an_error_as_an_item_and_snapshots_row_0_11_row_0_12_row_0_28(self, pool):
        async def use(runner):
            return await items_of(runner.stream())
        item, error, array, event, value = run(pool, use, Async)
        assert (item, error, array.tolist(), event, value) == (
            "item", {"error": "oh"}, [0, 0, 0], b'data: {"a": 1}\n\n', 3)


class TestWorker:
    def test_works_without_a_pool_row_0_23_row_0_24(self):
        worker = Worker()
        worker.initialize(a=1)
        assert worker(number=3) == 3 and (worker.device, worker.rank, worker.world_size) == ("cpu", 0, 1)
        worker.add_streaming_result("nobody listens")
        worker.shutdown()

    def test_submit_and_run_in_worker_until_it_is_shut_down_row_0_28_row_0_29(self):
        worker = Async()
        worker.initialize()
        assert worker.wait_for(worker()) == 3 and worker.running
        assert worker.submit(asyncio.sleep(0, "slept")).result(SOON) == "slept"
        assert worker.run_in_worker(asyncio.sleep, 0, "slept").result(SOON) == "slept"
        assert worker.run_in_worker(threading.current_thread).result(SOON) is not threading.current_thread()
        worker.shutdown(SOON)
        assert not worker.running
        with pytest.raises(RuntimeError, match="has stopped"):
            worker.run_in_worker(sum, [1])

    def test_a_device_is_never_another_s_row_0_24(self, pool):
        async def use(runner):
            return await runner.invoke({"value": "device"})
        assert run(pool, use) == "cpu"

    def test_output_carries_the_rank_row_0_30(self, capsys):
        worker = Worker(3, 4)
        worker.rank_print("hello")
        worker.rank_print("inner", debug=True)
        assert capsys.readouterr().out == "[rank 3] hello\n[rank 3] [debug] inner\n"
        worker.initialize()
        worker.shutdown()


class Collective(DistributedWorker):
    def __call__(self, streaming=False):
        import torch
        total = torch.tensor([self.rank + 1.0])
        torch.distributed.all_reduce(total)
        return total, torch.distributed.get_backend()


def test_ranks_share_a_process_group_of_torch_row_0_3(pool):
    pytest.importorskip("torch")

    async def use():
        for _ in range(2):          # a second one on the same processes: the first left its group
            async with DistributedRunner(Collective, 2, executor=pool, timeout=SOON) as runner:
                total, backend = await runner.invoke(timeout=SOON)
                assert (total.tolist(), backend) == ([3.0], "gloo")
    asyncio.run(use())
