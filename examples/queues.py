"""Chains of stages over queues and iterators: what goes in at one end comes out at the other, in order, bounded.

Copy this file beside your program; it needs nothing but minipool, and the workers need no copy.

    import queue
    import queues
    from minipool import Executor

    with Executor() as ex:
        numbers = queue.Queue(maxsize=10)
        results = queues.gather(queues.map(ex, double, queues.map(ex, increment, numbers)))
        numbers.put(10)
        print(results.get())                                            # prints: 22

        for result in queues.gather(queues.map(ex, double, lines)):     # the same with an iterator, endless or not
            ...

`python examples/queues.py` shows it. Queues in, a queue out; iterators in, an iterator out; anything else is a sequence
and gives a list. What has `get` and `put` as a queue.Queue is one: the Queue of coordination.py too, so that jobs may
feed a chain. Between stages go futures, which are given to the next stage's jobs as they are.

A stage runs at most `buffersize` items ahead of who reads it; then it reads no more, and a queue before it that has a
maxsize fills up. Iterators begin when they are first asked for something. A stage over queues is a thread, which ends
within a second when nobody holds the queue any more that it fills: no mark for the end is needed, and there is none.
After the executor's shutdown what comes is futures that say so.
"""
from __future__ import annotations

import builtins
import collections
import concurrent.futures
import itertools
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor

POLL = 0.5      # seconds between looks whether a queue is still wanted
AHEAD = 64      # items: the usual buffersize; enough to keep many workers busy


def map(executor: Executor, fn: Callable[..., Any], *sources: Any, buffersize: int = AHEAD) -> Any:
    """Return futures of fn's results for the items of the sources, in order: a queue, an iterator or a list of them."""
    if not sources:
        raise TypeError("map() needs a queue, an iterator or a sequence to read from")
    if buffersize < 1:
        raise ValueError(f"buffersize must be 1 or more, not {buffersize}")
    if all(builtins.map(_is_queue, sources)):
        return _stage(sources, lambda *items: _submit(executor, fn, *items), buffersize)
    futures = (executor.submit(fn, *items) for items in zip(*sources, strict=False))
    if all(isinstance(source, Iterator) for source in sources):
        return _ahead(futures, buffersize)
    return list(futures)


def scatter(executor: Executor, source: Any, *, buffersize: int = AHEAD) -> Any:
    """Return the items of a source as futures, so that a chain may begin with values or with futures alike.

    Each goes to a worker and comes back once, as values do not stay in workers; a chain needs no scatter to begin with.
    """
    return map(executor, _same, source, buffersize=buffersize)


def gather(source: Any, *, errors: str = "raise", buffersize: int = AHEAD) -> Any:
    """Return the values of futures, in order: as a queue, an iterator or a list.

    What failed is raised, which ends an iterator; in a queue its exception is the item. errors="skip" leaves it out.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors is 'raise' or 'skip', not {errors!r}")
    if _is_queue(source):
        return _stage([source], lambda future: _value(future, errors), buffersize)
    values = (future.result() for future in source if errors == "raise" or future.exception() is None)
    return values if isinstance(source, Iterator) else list(values)


def merge(*sources: Any, maxsize: int = AHEAD) -> queue.Queue[Any]:
    """Return a queue of the items of several queues, as they come."""
    merged: queue.Queue[Any] = queue.Queue(maxsize)
    for source in sources:
        _start([source], [merged], lambda item: [item])
    return merged


def multiplex(source: Any, n: int, *, maxsize: int = AHEAD) -> list[queue.Queue[Any]]:
    """Return `n` queues, each of which has all items of a queue; the slowest reader sets the pace."""
    copies: list[queue.Queue[Any]] = [queue.Queue(maxsize) for _ in range(n)]
    _start([source], copies, lambda item: [item])
    return copies


# ---- how ----


class _Unwanted(Exception):
    """Nobody holds the queue any more that a stage fills."""


def _is_queue(source: Any) -> bool:
    return callable(getattr(source, "get", None)) and callable(getattr(source, "put", None))


def _same(item: Any) -> Any:
    return item


def _ahead(futures: Iterator[Any], buffersize: int) -> Iterator[Any]:
    """Yield what comes, `buffersize` of it after having read it."""
    read: collections.deque[Any] = collections.deque()
    for future in itertools.chain(futures, [None] * buffersize):
        if future is not None:
            read.append(future)
        if read and (future is None or len(read) >= buffersize):
            yield read.popleft()


def _submit(executor: Executor, fn: Callable[..., Any], *items: Any) -> list[Any]:
    try:
        return [executor.submit(fn, *items)]
    except Exception as error:          # shut down, or it cannot be pickled
        failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
        failed.set_exception(error.with_traceback(None))
        return [failed]


def _value(future: Any, errors: str) -> list[Any]:
    try:
        error = future.exception()      # asked for, not raised: its traceback would hold this thread's queues
    except concurrent.futures.CancelledError as cancelled:
        error = cancelled
    if error is None:
        return [future.result()]
    return [error] if errors == "raise" else []


def _stage(sources: Iterable[Any], step: Callable[..., list[Any]], buffersize: int) -> queue.Queue[Any]:
    """Return a queue that a thread fills with what `step` makes of one item of each source."""
    filled: queue.Queue[Any] = queue.Queue(buffersize)
    _start(sources, [filled], step)
    return filled


def _start(sources: Iterable[Any], filled: Iterable[queue.Queue[Any]], step: Callable[..., list[Any]]) -> None:
    wanted = [weakref.ref(out) for out in filled]
    threading.Thread(target=_pump, args=(list(sources), wanted, step), name="queues-stage", daemon=True).start()


def _pump(sources: list[Any], filled: list[Any], step: Callable[..., list[Any]]) -> None:
    try:
        while True:
            _pass_on(sources, filled, step)
    except _Unwanted:
        pass


def _pass_on(sources: list[Any], filled: list[Any], step: Callable[..., list[Any]]) -> None:
    for item in step(*[_get(source, filled) for source in sources]):
        for out in filled:
            _put(out, item)


def _get(source: Any, filled: list[Any]) -> Any:
    while any(out() is not None for out in filled):
        try:
            return source.get(timeout=POLL)
        except queue.Empty:
            pass
    raise _Unwanted


def _put(out: Any, item: Any) -> None:
    """Wait for room, without being the last that holds the queue."""
    while (wanted := out()) is not None:
        try:
            return wanted.put(item, timeout=POLL)
        except queue.Full:
            wanted = None


# ---- a small program ----


def increment(x: float) -> float:
    """Add one."""
    return x + 1


def double(x: float) -> float:
    """Add it to itself."""
    return 2 * x


def main() -> None:
    number = 5 if "--quick" in sys.argv else 1000
    with Executor() as ex:
        numbers: queue.Queue[int] = queue.Queue(maxsize=10)
        results = gather(map(ex, double, map(ex, increment, scatter(ex, numbers))))
        numbers.put(10)
        print(results.get())
        endless = itertools.count()
        doubled = gather(map(ex, double, endless, buffersize=16))
        print(sum(itertools.islice(doubled, number)), "is twice the sum of the numbers below", number)


if __name__ == "__main__":
    main()
