"""as_completed() that can be added to: futures in the order in which they end, while more are submitted.

Copy this file beside your program; it needs nothing but the standard library, and takes any concurrent.futures.Future.

    done = as_completed([pool.submit(trial, start)])
    for future in done:                                 # or `async for`, or done.batches()
        if future.result() > 0.1:
            done.add(pool.submit(trial, better(future.result())))       # the loop goes on until nothing is left

`python examples/as_completed.py` shows it.
"""
from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any


class as_completed:     # noqa: N801  named as the standard library's, whose place it takes
    """An iterator over futures as they end; each comes once, cancelled ones too. Every method may be called anywhere.

    It ends when there are none left, and can be gone on with after `add`. `timeout` seconds after it was made it
    raises TimeoutError, which loses nothing. `with_results` gives (future, result) pairs, and raises what a future
    raises; the next step goes on behind that. With errors="skip" those that failed or were cancelled are left out.
    """

    def __init__(self, futures: Iterable[Future] = (), timeout: float | None = None, *, with_results: bool = False,
                 errors: str = "raise") -> None:
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors is 'raise' or 'skip', not {errors!r}")
        self._timeout, self._with_results, self._skips = timeout, with_results, errors == "skip"
        self._give_up = None if timeout is None else time.monotonic() + timeout
        self._changed = threading.Condition(threading.RLock())      # a finalizer may end a future: reentrant
        # guarded by it
        self._waiting: dict[Future, None] = {}                  # not ended
        self._ended: collections.deque[Future] = collections.deque()    # that nobody has had yet
        self._sleepers: list[Callable[[], object]] = []         # wake those who wait in event loops
        self.update(futures)

    # ---- what is in it ----

    def add(self, future: Future) -> None:
        """Add a future, from any thread, also while others iterate; one that is in it already stays there once."""
        if not isinstance(future, Future):
            raise TypeError(f"as_completed() takes futures, not {type(future).__name__}")
        with self._changed:
            if future in self._waiting or future in self._ended:
                return
            self._waiting[future] = None
        note = weakref.WeakMethod(self._note)       # a future must not keep this alive, nor itself through this
        future.add_done_callback(lambda future: (call := note()) and call(future))

    def update(self, futures: Iterable[Future]) -> None:
        """Add several futures."""
        for future in futures:
            self.add(future)

    def count(self) -> int:
        """Return how many are still to come."""
        with self._changed:
            return len(self._waiting) + len(self._ended)

    def is_empty(self) -> bool:
        """Tell whether none is left."""
        return not self.count()

    def has_ready(self) -> bool:
        """Tell whether one has ended that nobody has had yet."""
        with self._changed:
            return bool(self._ended)

    def clear(self) -> None:
        """Forget all futures; they run on."""
        with self._changed:
            self._waiting.clear()
            self._ended.clear()
            self._wake()

    def _note(self, future: Future) -> None:
        is_skipped = self._skips and (future.cancelled() or future.exception() is not None)
        with self._changed:
            if future in self._waiting:             # else it was cleared
                del self._waiting[future]
                if not is_skipped:
                    self._ended.append(future)
                self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        for wake in sleepers:
            wake()

    # ---- taking it out ----

    def _left(self) -> float | None:
        """Return the seconds that may still be waited, or raise TimeoutError."""
        left = None if self._give_up is None else self._give_up - time.monotonic()
        if left is not None and left <= 0:
            raise concurrent.futures.TimeoutError(f"{self.count()} futures have not ended within {self._timeout:g} s")
        return left

    def _wait(self) -> bool:
        """Wait for one that has ended; False: none is left. Holds the lock."""
        while self._waiting and not self._ended:
            self._changed.wait(self._left())
        return bool(self._ended)

    def _item(self, future: Future) -> Any:
        return (future, future.result()) if self._with_results else future

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            if not self._wait():
                raise StopIteration
            future = self._ended.popleft()
        return self._item(future)                   # without the lock: it may be unpickled, or fetched

    def next_batch(self, block: bool = True) -> list[Any]:
        """Return all that have ended since last time: at least one, but for block=False, or if none is left.

        A result that raises ends the batch before it, and is raised as the first of the next.
        """
        with self._changed:
            if block:
                self._wait()
            futures = list(self._ended)
            self._ended.clear()
        items = list[Any]()
        for place, future in enumerate(futures):
            try:
                items.append(self._item(future))
            except BaseException:
                with self._changed:
                    self._ended.extendleft(reversed(futures[place + (not items):]))
                    self._wake()
                if items:
                    break
                raise
        return items

    def batches(self) -> Iterator[list[Any]]:
        """Yield batches until none is left."""
        while batch := self.next_batch():
            yield batch

    def __aiter__(self) -> as_completed:
        return self

    async def __anext__(self) -> Any:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._ended:
                    future = self._ended.popleft()
                    break
                if not self._waiting:
                    raise StopAsyncIteration
                left, woken = self._left(), asyncio.Event()
                self._sleepers.append(lambda woken=woken: self._wake_in(loop, woken))
            try:
                await asyncio.wait_for(woken.wait(), left)
            except TimeoutError:
                continue                            # _left() says it in words
        # off the loop: a result may have to be unpickled, or fetched
        return await asyncio.to_thread(self._item, future) if self._with_results else future

    @staticmethod
    def _wake_in(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
        try:
            loop.call_soon_threadsafe(woken.set)
        except RuntimeError:
            pass                                    # the loop is closed: nobody waits there


# ---- a small program ----


def step(place: float) -> float:
    """Go one step down the slope of (x - 3) ** 2."""
    return place - 0.2 * (place - 3)


def main() -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done, steps = as_completed([pool.submit(step, start) for start in (-50.0, 10.0)], with_results=True), 0
        for _, place in done:
            steps += 1
            if abs(place - 3) > 0.01:
                done.add(pool.submit(step, place))
        print(f"both are there after {steps} steps")


if __name__ == "__main__":
    main()
