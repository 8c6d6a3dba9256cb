"""DistributedRunner: one program on several ranks, called and streamed from asyncio. A recipe on worker_group.py.

    from distributed_runner import DistributedRunner, DistributedWorker

    class Painter(DistributedWorker):
        def setup(self, steps=4):                       # once per rank; it may be a coroutine, and so may the others
            self.steps = steps
        def __call__(self, prompt, streaming=False):    # on all ranks together: collectives are safe
            for step in range(self.steps):
                self.add_streaming_result({"step": step})
            return prompt.upper()

    async with DistributedRunner(Painter, world_size=2) as runner:
        print(await runner.invoke({"prompt": "a fox"}))
        async for item in runner.stream({"prompt": "a fox"}):   # the last one is the return value
            print(item)

Copy this file, distributed_worker.py, worker_group.py and group_layout.py beside your program. Where PyTorch is
installed the ranks share a process group before `setup`. A process has one, so of two runners on the same workers one
needs `backend=None`.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import importlib.util
import itertools
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from distributed_worker import DistributedWorker, on_cpu, text_event
from worker_group import GroupOptions, MultiWorkerFuture, WorkerGroup

from minipool import Executor, WorkerDied

POLL = 0.5          # seconds that a reader waits in rank 0's process for items; it ends late by so much at most
BATCH = 64          # items that travel at once
KEPT = 16           # streams that ended, of which what nobody has read is kept: the client of a failed one asks again


# ---- in the workers ----

class _Items:
    """The items of one stream that the client has not confirmed; positions count from the stream's first."""

    def __init__(self, changed: threading.Condition) -> None:
        self.waiting, self.first, self.is_over, self.changed = collections.deque[Any](), 0, False, changed

    def put(self, item: Any) -> None:
        with self.changed:
            if not self.is_over:            # a thread that outlived its call
                self.waiting.append(item)
                self.changed.notify_all()


def _leave_process_group() -> None:
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


class _Rank:
    """What the group is made of: a DistributedWorker with its process group and its streams."""

    def __init__(self, worker_cls: type[DistributedWorker], backend: str | None, timeout: float, cwd: str | None,
                 setup: dict[str, Any]) -> None:
        self.rank, self.cwd = int(os.environ["RANK"]), cwd or "."
        self.changed = threading.Condition()
        self.streams: dict[int, _Items] = {}        # guarded by `changed`
        if backend is not None and (backend != "auto" or importlib.util.find_spec("torch")):
            import torch
            backend = backend if backend != "auto" else "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
            weakref.finalize(self, _leave_process_group).atexit = False     # however this rank leaves its group
        with contextlib.chdir(self.cwd):
            self.worker = worker_cls(self.rank, int(os.environ["WORLD_SIZE"]))
            self.worker.initialize(**setup)

    def call(self, stream: int | None, payload: dict[str, Any]) -> Any:
        """Return rank 0's value, the position of the first item that nobody confirmed, and the items from there."""
        worker, items = self.worker, _Items(self.changed)
        with self.changed:
            if stream is not None and self.rank == 0:
                self.streams[stream] = items
                for old in list(self.streams)[:-KEPT]:
                    del self.streams[old]
                self.changed.notify_all()
        token, worker._latest = worker._emit.set(items.put), items.put
        try:
            with contextlib.chdir(self.cwd):
                value = worker.wait_for(worker(**payload, streaming=stream is not None))
        finally:
            worker._emit.reset(token)
            worker._latest = None
            with self.changed:
                items.is_over = True
                self.changed.notify_all()
        with self.changed:      # what raised is still to be read; this goes with the value
            self.streams.pop(stream, None)
            return (on_cpu(value, lambda leaf: leaf), items.first, list(items.waiting)) if self.rank == 0 else None

    def stop(self) -> None:
        with contextlib.chdir(self.cwd):
            self.worker.shutdown()


def _read(rank: _Rank, stream: int, position: int, seconds: float) -> list[Any]:
    """Confirm the items before `position`; return some of those from there on, or none after a while."""
    with rank.changed:
        def is_news() -> bool:
            items = rank.streams.get(stream)
            return items is not None and (items.is_over or items.first + len(items.waiting) > position)
        rank.changed.wait_for(is_news, seconds)
        items = rank.streams.get(stream)
        while items and items.first < position:
            items.waiting.popleft()
            items.first += 1
        return list(itertools.islice(items.waiting, BATCH)) if items else []


# ---- the client's side ----

class DistributedRunner:
    """A group of ranks that one program is called on together, from asyncio. Nothing starts before start().

    `executor`, or `address` and `secret` of a pool; with none of them, an embedded pool of `world_size` workers.
    `timeout` is the process group's. `keepalive_interval`: the group is called with `keepalive_payload` after so many
    idle seconds. Errors on any rank are raised, a lost rank as WorkerDied, which is a RuntimeError.
    """

    def __init__(self, worker_cls: type[DistributedWorker] = DistributedWorker, world_size: int = 1, *,
                 address: str | None = None, secret: str | None = None, executor: Executor | None = None,
                 backend: str | None = "auto", master_addr: str | None = None, master_port: int | None = None,
                 timeout: float = 86400, keepalive_payload: dict[str, Any] | None = None,
                 keepalive_interval: float | None = None, cwd: str | None = None) -> None:
        self.world_size, self.keepalive_payload, self.keepalive_interval = (
            world_size, keepalive_payload or {}, keepalive_interval)
        self._executor, self._own, self._group = executor, None, None
        self._where, self._meet = (address, secret), {"master_addr": master_addr, "master_port": master_port}
        self._worker = worker_cls, backend, timeout, cwd
        self._errors: list[BaseException] = []      # those that nobody has gathered
        self._streams = itertools.count(1)
        self._lock = threading.Lock()               # it guards the next two
        self._calls, self._used = 0, time.monotonic()       # how many are out, and when the last one ended
        self._stopped = threading.Event()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None      # from start() to the end

    # ---- begin and end ----

    async def start(self, timeout: float | None = 1800, **setup: Any) -> None:
        """Start all ranks, or none: RuntimeError with the first error as its cause. `setup` is for the workers'."""
        if self.is_alive():
            raise RuntimeError("this runner was started")
        # threads of its own: readers that wait would be too many for the event loop's
        self._threads = concurrent.futures.ThreadPoolExecutor(64, thread_name_prefix="minipool-runner")
        starting = self._threads.submit(self._start, timeout, setup)
        try:
            await asyncio.wrap_future(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda _: self.terminate())      # nobody will stop what is on its way
            raise
        except Exception as error:
            self._errors.append(error)
            await self._in_thread(self.terminate)
            raise RuntimeError(f"the {self.world_size} ranks could not start: {error}") from error

    def _start(self, timeout: float | None, setup: dict[str, Any]) -> None:
        if self._executor is None:
            address, secret = self._where
            if address or os.environ.get("MINIPOOL_ADDRESS"):
                self._own = Executor(address, secret=secret)
            else:
                self._own = Executor("local", max_workers=self.world_size)
        name = self._worker[0].__name__
        options = GroupOptions(self._executor or self._own, timeout=timeout, name=name, **self._meet)
        self._group = options.group(_Rank, self.world_size, *self._worker, setup)
        self._stopped = threading.Event()
        if self.keepalive_interval is not None:
            threading.Thread(target=self._keep_alive, args=(self._stopped,), name="minipool-keepalive",
                             daemon=True).start()

    async def stop(self, timeout: float | None = 10) -> None:
        """Run every rank's teardown and end them; those that are not done after `timeout` seconds by force."""
        self.ensure_alive()
        await self._in_thread(self._end, "stop", timeout, False)

    def terminate(self, timeout: float | None = 10) -> None:
        """End all ranks by force, without teardown; harmless where nothing was started."""
        self._end(None, timeout, True)

    def _end(self, cleanup: str | None, timeout: float | None, force: bool) -> None:
        self._stopped.set()
        group, own, threads, self._group, self._own = self._group, self._own, self._threads, None, None
        if group is not None:
            group.shutdown(cleanup, timeout, force)
        if own is not None:
            own.kill_workers()
        if threads is not None:
            threads.shutdown(wait=False)

    async def __aenter__(self) -> DistributedRunner:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            await self.stop()
        except Exception as error:      # the body's own exception says more
            print(f"minipool: {error}")
            await self._in_thread(self.terminate)

    def is_alive(self) -> bool:
        """Whether it was started and every rank lives."""
        group = self._group
        return group is not None and group.is_alive()

    def ensure_alive(self) -> None:
        """Raise RuntimeError, with the errors that are known, unless every rank lives."""
        if not self.is_alive():
            with self._call() as group:
                group.ensure_open()

    def gather_errors(self) -> list[BaseException]:
        """Return what ranks failed of since the last time this was asked."""
        errors, self._errors = self._errors, []
        return errors

    def _note(self, error: BaseException) -> None:
        if str(error) not in map(str, self._errors):
            self._errors.append(error)

    def _running(self) -> WorkerGroup:
        if self._group is None:
            raise RuntimeError(f"this runner is not alive: {self._errors or 'it was not started'}")
        return self._group

    def _in_thread(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args))

    # ---- calls ----

    @contextlib.contextmanager
    def _call(self) -> Iterator[WorkerGroup]:
        """Count a call, for as long as it is out, and keep what the ranks died of."""
        with self._lock:
            self._calls += 1
        try:
            yield self._running()
        except WorkerDied as error:
            self._note(error)
            raise
        finally:
            with self._lock:
                self._calls, self._used = self._calls - 1, time.monotonic()

    async def invoke(self, payload: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Call all ranks with the payload as keywords; return rank 0's value when all are done.

        An exception on any rank is raised. TimeoutError after `timeout` seconds stops nothing: the next call queues
        behind this one, and never sees its reply.
        """
        async def answer(group: WorkerGroup) -> Any:
            return (await (await self._in_thread(group.call, "call", None, payload or {})))[0][0]
        with self._call() as group:
            return await asyncio.wait_for(answer(group), timeout)

    async def keepalive(self, timeout: float | None = 60) -> None:
        """Call the ranks with the keep-alive payload; RuntimeError if that fails."""
        try:
            await self.invoke(self.keepalive_payload, timeout)
        except Exception as error:
            raise RuntimeError(f"the keep-alive call failed: {error}") from error

    def _keep_alive(self, stopped: threading.Event) -> None:
        interval = self.keepalive_interval or 0
        while not stopped.wait(max(0.01, interval - (time.monotonic() - self._used))):
            if not self._calls and time.monotonic() - self._used >= interval:
                try:
                    with self._call() as group:
                        group.call("call", None, self.keepalive_payload).get_results(timeout=60)
                except Exception as error:
                    if stopped.is_set() or not self.is_alive():
                        return
                    print(f"minipool: the keep-alive call failed: {error!r}")

    async def stream(self, payload: dict[str, Any] | None = None, timeout: float | None = None,
                     streaming_timeout: float | None = None, as_text_events: bool = False) -> AsyncIterator[Any]:
        """Yield rank 0's items as they come, then its return value; an exception is raised after the items before it.

        TimeoutError after `timeout` seconds in all, or `streaming_timeout` without an item; as in invoke() that stops
        nothing, nor does leaving the loop. `as_text_events`: all as bytes of server-sent events, images in the
        payload's `image_format`.
        """
        payload = payload or {}
        end = float("inf") if timeout is None else time.monotonic() + timeout
        gap = float("inf") if streaming_timeout is None else streaming_timeout

        def shown(item: Any) -> Any:
            as_it_is = not as_text_events or isinstance(item, bytes)    # bytes: the worker has made an event of it
            return item if as_it_is else text_event(item, payload.get("image_format", "jpeg"))

        with self._call() as group:
            number, position, heard = next(self._streams), 0, time.monotonic()
            call = await self._in_thread(group.call, "call", number, payload)
            answer = asyncio.ensure_future(self._answer(call))
            try:
                while not answer.done():
                    reading = self._in_thread(group.run_beside, 0, _read, number, position, POLL)
                    reading.add_done_callback(lambda done: done.cancelled() or done.exception())    # it is looked at
                    while not (answer.done() or reading.done()):
                        left = min(end, heard + gap) - time.monotonic()
                        if left <= 0:
                            raise TimeoutError(f"no item of the stream in time, after {position} of them")
                        await asyncio.wait([reading, answer], timeout=min(left, 1e6),
                                           return_when=asyncio.FIRST_COMPLETED)
                    items = None if not reading.done() or reading.exception() else reading.result()
                    if items is None and not answer.done():
                        await asyncio.sleep(0.05)       # rank 0 is not to be reached: the answer will tell
                    for item in items or ():
                        position, heard = position + 1, time.monotonic()
                        yield shown(item)
                if answer.exception() and call.futures[0].done() and not call.futures[0].exception():
                    _, first, tail = call.futures[0].result()       # it was another rank
                    for item in tail[position - first:]:
                        yield shown(item)
                elif answer.exception():
                    # a reader that ends with the ranks knows no more; the error below says what happened
                    with contextlib.suppress(Exception):
                        while items := await self._in_thread(group.run_beside, 0, _read, number, position, 0):
                            for item in items:
                                position += 1
                                yield shown(item)
                value, first, tail = answer.result()
                for item in tail[position - first:]:
                    yield shown(item)
                yield shown(value)
            finally:
                answer.cancel()         # the wait, not the work

    async def _answer(self, call: MultiWorkerFuture) -> Any:
        return (await call)[0]
