"""Streams: what a job yields or emits arrives at the client as it comes, in order.

Copy this file beside your program; it needs nothing but minipool, and the workers need no copy.

    from minipool import Executor
    from streams import emit, stream

    def train(epochs):
        for epoch in range(epochs):
            yield epoch, loss                   # or emit((epoch, loss)), from any thread of the job
        return model

    with Executor() as ex:
        losses = stream(ex, train, 10)
        for epoch, loss in losses:              # or `async for`
            print(epoch, loss)
        model = losses.result()

`python examples/streams.py` shows it. How it works: the job keeps its items in its own process and pauses when
`buffersize` of them are unread. The reader fetches them by `Executor.run`, which a busy worker answers beside its job;
each fetch says which items it has, so that one that was lost on the way costs nothing. What is unread when the job
ends travels with its outcome, and is as safe as that. A job that has to begin anew goes on where the reader is.
"""
from __future__ import annotations

import asyncio
import collections
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import TimeoutError as Timeout
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, MinipoolError

POLL = 0.5          # seconds that a fetch waits in the worker for an item
FORGOTTEN = 60.0    # seconds without a fetch after which a paused job believes that nobody will ever read it

# ---- in the workers ----


class Closed(GeneratorExit):
    """Raised by emit() in a job that nobody reads any more."""


class _Buffer:
    """The unread items of the stream that this process makes."""

    def __init__(self, size: int) -> None:
        self.size, self.items = size, collections.deque[Any]()
        self.first = 0                      # position of the first that is kept
        self.wanted = 0                     # what was read before: by another attempt's reader, if it is ahead
        self.is_closed = False              # by the reader, or because the job has ended
        self.asked_at = time.monotonic()
        self.changed = threading.Condition()

    def put(self, item: Any) -> None:
        """Keep an item; wait while there is no room."""
        with self.changed:
            while len(self.items) >= self.size and not self.is_closed:
                if time.monotonic() > self.asked_at + FORGOTTEN:
                    self.is_closed = True
                self.changed.wait(1.0)
            if self.is_closed:
                raise Closed("nobody reads this stream any more")
            self.items.append(item)
            self._drop_read()
            self.changed.notify_all()

    def _drop_read(self) -> None:
        while self.items and self.first < self.wanted:
            self.items.popleft()
            self.first += 1

    def take(self, position: int, seconds: float) -> tuple[int, list[Any]]:
        """Let go of the items before `position`; return the position of the first and all that are kept."""
        with self.changed:
            self.asked_at, self.wanted = time.monotonic(), max(self.wanted, position)
            self._drop_read()
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.items or self.is_closed, seconds)
            return self.first, list(self.items)

    def close(self) -> tuple[int, list[Any]]:
        """Take no more items; return those that were not read."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            return self.first, list(self.items)


_buffer: _Buffer | None = None      # of the job that runs; one does at a time
_key = ""                           # which stream it is


def emit(item: Any) -> None:
    """Send an item to who reads the stream of this job; dropped if it is no stream, so one function serves both."""
    buffer = _buffer
    if buffer is not None:
        buffer.put(item)


async def _drain(items: AsyncIterator[Any]) -> None:
    async for item in items:
        emit(item)


def _produce(key: str, size: int, fn: Callable[..., Any], args: tuple, kwargs: dict) -> tuple:
    """Run a streamed job; return the unread items with their position, and its value or its exception."""
    global _buffer, _key
    _buffer, _key = buffer, _ = _Buffer(size), key
    value = error = None
    try:
        value = fn(*args, **kwargs)
        if inspect.isgenerator(value):
            running = value
            try:
                while True:
                    emit(next(running))
            except StopIteration as end:
                value = end.value
            finally:
                running.close()
        elif inspect.isasyncgen(value):
            value = asyncio.run(_drain(value))
        elif inspect.iscoroutine(value):
            value = asyncio.run(value)
    except Closed:
        value = None
    except Exception as problem:
        value, error = None, problem
        error.add_note("".join(traceback.format_exception(problem)))
    finally:
        _buffer, _key = None, ""
    return *buffer.close(), value, error


def _take(key: str, position: int, seconds: float) -> tuple[int, list[Any]] | None:
    buffer = _buffer if _key == key else None
    return buffer.take(position, seconds) if buffer else None


def _close(key: str) -> None:
    buffer = _buffer if _key == key else None
    if buffer:
        buffer.close()


# ---- in the client ----


class Stream:
    """The items of a job in order: iterate it, or `async for`; `result()` is the job's return value.

    `get(timeout)` is the next item; StopIteration, with the return value, ends it, and TimeoutError loses nothing. An
    exception of the job is raised after the items before it. `close()` ends the job. For one reader at a time.
    """

    def __init__(self, executor: Executor, size: int, fn: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        if not callable(fn):
            raise TypeError(f"stream() needs something callable, not {type(fn).__name__}")
        if size < 1:
            raise ValueError(f"buffersize must be 1 or more, not {size}")
        self._executor, self._key = executor, os.urandom(8).hex()
        name = getattr(fn, "__qualname__", type(fn).__name__)
        self._future = executor.options(name=name).submit(_produce, self._key, size, fn, args, kwargs)
        self._there: tuple[Any, Any] = None, None       # the worker at which it was last read, and the view of it
        self._position = 0                              # of the next item
        self._items = collections.deque[Any]()          # that are here, from there on

    def get(self, timeout: float | None = None) -> Any:
        """Return the next item, or raise StopIteration at the end, TimeoutError after `timeout` seconds."""
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._items:
            left = give_up - time.monotonic()
            if left <= 0:
                raise Timeout(f"{self._future.name} gave no item within {timeout:g} s")
            self._fetch(min(POLL, left))
        self._position += 1
        return self._items.popleft()

    def _fetch(self, seconds: float) -> None:
        """Get what there is, or wait for it."""
        if self._future.done():
            first, items, value, error = self._future.result()
            self._keep(first, items)
            if not self._items and error is not None:
                raise error
            if not self._items:
                raise StopIteration(value)
        elif self._future.worker and self._future.running():
            try:
                if self._there[0] != self._future.worker:
                    view = self._executor.options(on=self._future.worker, timeout=POLL + 30)
                    self._there = self._future.worker, view
                found = list(self._there[1].run(_take, self._key, self._position, seconds).values())
            except (MinipoolError, Timeout, ValueError):
                found = []          # its worker is gone: the job runs again elsewhere, or has ended
            if found and found[0]:
                self._keep(*found[0])
            else:
                self._wait(min(seconds, 0.05))
        else:
            self._wait(min(seconds, 0.05))

    def _keep(self, first: int, items: list[Any]) -> None:
        self._items.extend(items[self._position + len(self._items) - first:])

    def _wait(self, seconds: float) -> None:
        try:
            self._future.exception(seconds)
        except Timeout:
            pass

    def result(self, timeout: float | None = None) -> Any:
        """Return the job's return value, once it has ended; the items are kept here until they are read."""
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._future.done():
            left = give_up - time.monotonic()
            if left <= 0:
                raise Timeout(f"{self._future.name} has not ended within {timeout:g} s")
            kept, self._position = self._position, self._position + len(self._items)
            items, self._items = self._items, collections.deque()
            try:
                self._fetch(min(POLL, left))
            except Exception:       # it has ended meanwhile: the end comes below
                pass
            finally:
                self._position, self._items = kept, items + self._items
        _, _, value, error = self._future.result()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the job: it is cancelled, or its next emit() raises GeneratorExit; what is here can still be read."""
        if not self._future.cancel() and self._future.worker:
            try:
                self._executor.options(on=self._future.worker, timeout=30).run(_close, self._key)
            except (MinipoolError, Timeout, ValueError):
                pass                # its worker is gone, and the job with it

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.get()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        end = object()
        item = await asyncio.to_thread(lambda: next(self, end))     # StopIteration cannot leave a thread
        if item is end:
            raise StopAsyncIteration
        return item


def stream(executor: Executor, fn: Callable[..., Any], /, *args: Any, buffersize: int = 64, **kwargs: Any) -> Stream:
    """Return a Stream of what fn(*args, **kwargs) yields or emits; it pauses while `buffersize` items are unread."""
    return Stream(executor, buffersize, fn, args, kwargs)


# ---- a small program ----


def walk(steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Walk at random; yield where it is, return how far it came."""
    import random
    rng, place = random.Random(seed), 0.0
    for step in range(steps):
        time.sleep(0.01)
        place += rng.gauss(0, 1)
        yield step, place
    return abs(place)


def main() -> None:
    steps = 10 if "--quick" in sys.argv else 100
    with Executor() as ex:
        walks = [stream(ex, walk, steps, seed) for seed in (1, 2)]
        for (step, here), (_, there) in zip(*walks, strict=True):
            if step % 5 == 0:
                print(f"step {step:3}: {here:7.2f} {there:7.2f}")
        print("distances:", *(f"{found.result():.2f}" for found in walks))


if __name__ == "__main__":
    main()
