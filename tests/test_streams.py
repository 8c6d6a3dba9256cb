"""Streams (examples/streams.py): what a job yields or emits arrives as it comes, once and in order."""
import asyncio
import itertools
import os
import pathlib
import signal
import sys
import threading
import time

import pytest
from fault_proxy import FaultProxy
from processes import pids, wait_until

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
import streams
from streams import emit, stream

import minipool
from minipool import WorkerDied

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others


def count(number, end="end"):
    yield from range(number)
    return end


def count_for_ever():
    yield from itertools.count()


def emit_some(number, end=9):
    for n in range(number):
        emit(n)
    return end


def noted(folder, number, gate=None, after=None, size=None):
    """Yield numbers, each noted in a folder before; with a gate, only `after` of them before it is open."""
    for n in range(number):
        (pathlib.Path(folder) / f"item.{n}.{os.getpid()}").touch()
        if n == after:
            wait_for(gate)
        yield bytes([n]) * size if size else n
    return "end"


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


def notes(folder):
    """Return which items were made, once for each time."""
    return sorted(int(path.name.split(".")[1]) for path in pathlib.Path(folder).glob("item.*.*"))


def closes(folder):
    try:
        yield from itertools.count()
    finally:
        (pathlib.Path(folder) / "closed").touch()


def fails_after(number):
    yield from range(number)
    raise ValueError("enough")


def emit_marked(mark, i):
    for n in range(3):
        emit((mark, i, n))
    return mark, i, 9


class TestItems:
    @pytest.mark.parametrize("fn", [count, emit_some])
    def test_come_in_order_and_then_the_return_value_row_0_8(self, pool, fn):
        found = stream(pool, fn, 200, end=9)
        assert list(found) == list(range(200)) and found.result() == 9

    def test_come_while_the_job_runs(self, pool, gate, tmp_path):
        found = stream(pool, noted, tmp_path, 3, gate.path, after=1)
        assert next(found) == 0
        gate.open()
        assert list(found) == [1, 2]

    def test_are_none_if_the_job_emits_none(self, pool):
        found = stream(pool, abs, -5)
        assert list(found) == [] and found.result() == 5

    def test_end_like_those_of_a_generator(self, pool):
        found = stream(pool, count, 1)
        assert found.get() == 0
        for _ in range(2):
            with pytest.raises(StopIteration) as caught:
                found.get()
            assert caught.value.value == "end"

    def test_emitted_outside_a_stream_are_dropped(self, pool):
        emit("nowhere")
        assert pool.submit(emit_some, 50).result(60) == 9

    def test_of_a_helper_thread_belong_to_the_job_row_0_11(self, pool):
        def helped():
            helper = threading.Thread(target=emit_some, args=(20,))
            helper.start()
            helper.join()
            emit("last")
        assert list(stream(pool, helped)) == [*range(20), "last"]

    def test_of_a_thousand_streams_of_two_clients_are_never_mixed_trap_5(self, cluster):
        cluster.node(cpu_workers=2)
        found = []

        def read_all(mark):
            with cluster.executor() as ex:
                begun = [stream(ex, emit_marked, mark, i) for i in range(500)]
                found.extend((mark, i, [*each, each.result()]) for i, each in enumerate(begun))
        readers = [threading.Thread(target=read_all, args=(mark,)) for mark in ("a", "b")]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(120)
        assert len(found) == 1000
        for mark, i, items in found:
            assert items == [(mark, i, 0), (mark, i, 1), (mark, i, 2), (mark, i, 9)]

    def test_that_are_large_come_in_order_between_small_ones(self, pool):
        def mixed():
            for n in range(12):
                yield bytes([n]) * (1_000_000 if n % 3 == 0 else 10)
            return b"r" * 500_000
        found = stream(pool, mixed, buffersize=4)
        assert [(item[0], len(item)) for item in found] == [(n, 10 if n % 3 else 1_000_000) for n in range(12)]
        assert found.result() == b"r" * 500_000


class TestPausing:
    @pytest.mark.parametrize("size", [1, 5])
    def test_as_many_items_wait_unread_as_were_asked_for(self, pool, tmp_path, size):
        found = stream(pool, noted, tmp_path, 40, buffersize=size)
        wait_until(lambda: len(notes(tmp_path)) == size + 1)     # made are those that wait, and one that has no room
        assert list(found) == list(range(40))

    def test_a_reader_who_waits_for_the_result_holds_nothing_up(self, pool):
        found = stream(pool, count, 300, buffersize=2)
        assert next(found) == 0
        assert found.result(60) == "end"
        assert list(found) == list(range(1, 300))

    def test_a_stream_that_nobody_reads_ends_after_a_while(self, own_pool):
        def hurry():
            streams.FORGOTTEN = 0.5
        ex = own_pool(1)
        ex.submit(hurry).result(60)
        found = stream(ex, count_for_ever, buffersize=2)
        assert next(found) == 0
        assert ex.submit(abs, -1).result(60) == 1       # its worker is free again


class TestClosing:
    def test_ends_a_running_job_and_its_generator_is_closed(self, own_pool, tmp_path):
        ex = own_pool(1)
        found = stream(ex, closes, tmp_path)
        assert next(found) == 0
        before = pids(ex)
        found.close()
        assert ex.submit(abs, -1).result(60) == 1
        assert (tmp_path / "closed").exists() and pids(ex) == before

    def test_before_it_began_means_that_it_never_runs(self, own_pool, gate, tmp_path):
        ex = own_pool(1)
        first = ex.submit(wait_for, gate.path)
        found = stream(ex, noted, tmp_path, 3)
        found.close()
        gate.open()
        first.result(60)
        assert ex.submit(notes, tmp_path).result(60) == []


class TestWaiting:
    def test_gives_up_after_the_gap_and_loses_nothing_row_0_9(self, pool, gate, tmp_path):
        found = stream(pool, noted, tmp_path, 3, gate.path, after=1)
        assert found.get(60) == 0
        with pytest.raises(TimeoutError, match="noted"):
            found.get(timeout=0.2)
        gate.open()
        assert list(found) == [1, 2]

    def test_async_for_takes_the_items_of_several_streams_at_once(self, pool):
        async def read(number):
            return [item async for item in stream(pool, count, number)]

        async def main():
            return await asyncio.gather(*map(read, (30, 0, 50)))
        assert asyncio.run(main()) == [list(range(30)), [], list(range(50))]

    @pytest.mark.parametrize("items", [0, 3, 100])
    def test_an_exception_of_the_job_comes_after_the_items_before_it(self, pool, items):
        found = stream(pool, fails_after, items)
        assert [next(found) for _ in range(items)] == list(range(items))
        with pytest.raises(ValueError, match="enough") as caught:
            next(found)
        assert "fails_after" in "".join(caught.value.__notes__)

    def test_coroutines_and_asynchronous_generators_are_run(self, pool):
        async def add(a, b):
            emit(a)
            return a + b

        async def numbers():
            for n in range(5):
                await asyncio.sleep(0)
                yield n
        found = stream(pool, add, 2, 3)
        assert [*found, found.result()] == [2, 5] and list(stream(pool, numbers)) == list(range(5))


class TestLosses:
    def test_a_worker_that_is_killed_in_the_middle_costs_no_item_and_none_comes_twice(self, own_pool, gate, tmp_path):
        ex = own_pool(2)
        found = stream(ex, noted, tmp_path, 50, gate.path, after=20, buffersize=4)
        read = [next(found) for _ in range(18)]
        wait_until(lambda: 20 in notes(tmp_path))
        os.kill(pids(ex)[found._future.worker], signal.SIGKILL)
        gate.open()
        assert [*read, *found] == list(range(50)) and found.result() == "end"

    def test_the_death_that_is_one_too_many_is_raised_soon_trap_6(self, own_pool, gate, tmp_path):
        ex = own_pool(1)
        found = stream(ex.options(max_deaths=0), noted, tmp_path, 50, gate.path, after=3)
        assert [next(found) for _ in range(2)] == [0, 1]
        wait_until(lambda: 3 in notes(tmp_path))
        os.kill(pids(ex)[found._future.worker], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="SIGKILL"):
            list(found)
        assert time.monotonic() - began < 5

    def test_a_restart_of_the_server_costs_no_item_and_no_second_run(self, cluster, gate, tmp_path):
        cluster.node(cpu_workers=1)
        with cluster.executor() as ex:
            found = stream(ex, noted, tmp_path, 40, gate.path, after=20, size=5, buffersize=8)
            read = [next(found) for _ in range(15)]
            cluster.server.process.kill()
            gate.open()                                 # items are made while there is no server
            cluster.serve()
            assert [item[0] for item in (*read, *found)] == list(range(40))
            assert found.result() == "end" and notes(tmp_path) == list(range(40))

    def test_a_line_that_is_cut_again_and_again_costs_no_item(self, cluster, tmp_path):
        cluster.node(cpu_workers=1)
        with (FaultProxy("127.0.0.1", cluster.port) as proxy,
              minipool.Executor(f"127.0.0.1:{proxy.port}", secret=cluster.secret) as ex):
            items = []
            for item in stream(ex, noted, tmp_path, 60, size=5, buffersize=3):
                items.append(item)
                if len(items) % 12 == 5:
                    proxy.cut()
            assert [item[0] for item in items] == list(range(60))
            assert proxy.cuts >= 4 and notes(tmp_path) == list(range(60))


class TestBadInput:
    def test_something_that_cannot_be_called(self, pool):
        with pytest.raises(TypeError, match=r"stream\(\) needs something callable, not int"):
            stream(pool, 5)

    def test_a_buffersize_that_is_no_number_of_items(self, pool):
        with pytest.raises(ValueError, match="buffersize"):
            stream(pool, count, 1, buffersize=0)
