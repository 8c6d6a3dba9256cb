"""Actors and pools: objects that live in worker processes from one job to the next.

Copy this file beside your program; it needs nothing but minipool, and the workers need no copy.

    from minipool import Executor
    from actors import Pool, actor

    with Executor() as ex:
        model = actor(ex, Model, "weights.bin")         # constructed once, in one worker
        answer = model.predict(x).result()              # each call is a job of that worker

        with Pool(Trainer, {"args": [data]}, executor=ex) as pool:      # one Trainer in every worker
            for result in pool.imap_unordered({"args": [rate]} for rate in rates):
                pool.update_workers({"args": [result]})                 # between jobs, late workers too

`python examples/actors.py` shows both. An actor's calls are jobs for one worker by `options(on=)`, and jobs of one
client for one worker begin in the order in which they were submitted. A Pool's instances and updates are `on_start`
calls, which every worker has made, in order, before its next job.
"""
from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import inspect
import itertools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, Future, JobKilled, WorkerDied

# ---- in the workers ----

_instances: dict[str, Any] = {}     # what lives in this process, by key


class _Unmade:
    """In place of an instance whose constructor raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _make(key: str, cls: Any, args: tuple, kwargs: dict) -> None:
    try:
        _instances[key] = cls(*args, **kwargs)
    except Exception as error:
        _instances[key] = _Unmade(error)
        raise


def _read(key: str, name: str) -> Any:
    instance = _instances.get(key)
    if instance is None:
        raise WorkerDied(f"{name}: the process that the instance lived in is no more")
    if isinstance(instance, _Unmade):
        raise instance.error
    return getattr(instance, name)


def _use(key: str, method: str, args: tuple, kwargs: dict) -> Any:
    result = _read(key, method)(*args, **kwargs)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def _drop(key: str) -> None:
    _instances.pop(key, None)


# ---- actors ----

_actors: weakref.WeakSet[Actor] = weakref.WeakSet()


class Actor:
    """A handle on an instance that lives in one worker: `handle.method(...)` returns a Future.

    Calls begin in the order in which they were made; one that is given futures begins when those are done. Between
    calls the worker takes other jobs. A plain attribute is read by value. What the constructor raised, every use
    raises. A call whose process dies raises WorkerDied and is never made twice; so does every later one, but with
    `max_restarts=n` those have a new instance, n times. The instance ends with the last reference to its handle.
    """

    def __init__(self, executor: Executor, cls: type, args: tuple, kwargs: dict, max_restarts: int = 0) -> None:
        self._executor, self._cls, self._made, self._restarts = executor, cls, (args, kwargs), max_restarts
        # the worker that has the fewest, of those that the executor's `on` admits
        taken = collections.Counter(other._worker for other in _actors)
        executor.wait_for_workers(executor.size)
        self._worker = min(executor.run(os.getpid), key=taken.__getitem__)
        self._pinned = executor.options(on=self._worker, max_deaths=0)      # at most once, and there
        self._views: dict[str, Executor] = {}
        self._calls: list[Future] = []          # that may not have ended
        self._is_killed = False
        _actors.add(self)
        self._start()

    def _start(self) -> None:
        self._key = os.urandom(8).hex()
        self._home = self._pinned.options(name=f"{self._cls.__qualname__}()").submit(_make, self._key, self._cls,
                                                                                   *self._made)
        self._end = weakref.finalize(self, _end, self._pinned, self._key)
        self._end.atexit = False

    def _call(self, fn: Any, name: str, *rest: Any) -> Future:
        if self._is_killed:
            raise JobKilled(f"the actor {self._cls.__qualname__} was ended by kill()")
        self._calls = [call for call in self._calls if not call.done() or isinstance(call.exception(), WorkerDied)]
        if self._restarts and any(call.done() for call in self._calls):
            self._restarts, self._calls = self._restarts - 1, []
            self._end.detach()
            self._start()
        if name not in self._views:
            self._views[name] = self._pinned.options(name=f"{self._cls.__qualname__}.{name}")
        self._calls.append(self._views[name].submit(fn, self._key, name, *rest))
        return self._calls[-1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):            # what copy, pickle and inspect look for is not the instance's
            raise AttributeError(name)
        if callable(getattr(self._cls, name, None)):
            return lambda *args, **kwargs: self._call(_use, name, args, kwargs)
        return self._call(_read, name).result()

    def __reduce__(self) -> Any:
        raise TypeError("an actor's handle cannot travel: call it where it was made, and send what it returns")

    def __repr__(self) -> str:
        return f"<Actor {self._cls.__qualname__} on {self._worker}>"


def _end(pinned: Executor, key: str) -> None:
    try:
        pinned.submit(_drop, key)
    except (RuntimeError, concurrent.futures.BrokenExecutor):
        pass            # the executor is closed, and its instances are gone with it


def actor(executor: Executor, cls: type, /, *args: Any, **kwargs: Any) -> Actor:
    """Return a handle on an instance cls(*args, **kwargs) in one worker (`executor.options(on=)`: one of those)."""
    if not isinstance(cls, type):
        raise TypeError(f"actor() needs a class, not {cls!r}")
    return Actor(executor, cls, args, kwargs)


def kill(handle: Actor) -> None:
    """End an actor: its calls that have not ended, by force the one that runs, and every later one raise JobKilled."""
    handle._is_killed = True
    for call in [handle._home, *handle._calls]:
        if not call.done():
            handle._executor.kill(call)
    handle._end()


# ---- pools ----


class WorkerInterface:
    """What a Pool's worker class looks like; any class with `run` will do."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do one job; return its result."""
        raise NotImplementedError("a worker class defines run()")

    def handle_update(self, *args: Any, **kwargs: Any) -> None:
        """Take in what `Pool.update_workers` was given, between two jobs."""
        raise NotImplementedError("a worker class that is updated defines handle_update()")


def _arguments(call: Any) -> tuple[tuple, dict]:
    if not isinstance(call, dict) or not call.keys() <= {"args", "kwargs"}:
        raise TypeError(f'a job, an update or init_data is {{"args": [...], "kwargs": {{...}}}}, not {call!r:.100}')
    return tuple(call.get("args", ())), dict(call.get("kwargs", {}))


class _Results:
    """Results as they are asked for; one that raises does not end it: what comes after can still be had."""

    def __init__(self, futures: Iterator[Future], ahead: int, in_order: bool) -> None:
        self._futures, self._ahead, self._in_order = futures, ahead, in_order
        self._pending: list[Future] = []

    def __iter__(self) -> _Results:
        return self

    def __next__(self) -> Any:
        self._pending.extend(itertools.islice(self._futures, self._ahead - len(self._pending)))
        if not self._pending:
            raise StopIteration
        future = self._pending[0]
        if not self._in_order:
            future = next(iter(concurrent.futures.wait(self._pending, None, concurrent.futures.FIRST_COMPLETED).done))
        self._pending.remove(future)
        return future.result()


class Pool:
    """One instance of `worker_class` in every worker, late workers too; jobs go to whichever is free.

    `init_data` holds the constructor's arguments, as {"args": [...], "kwargs": {...}}; so do jobs those of `run` and
    updates those of `handle_update`. `address` and `secret` as in Executor; with `executor` it works through that one
    and leaves it open.
    """

    def __init__(self, worker_class: type, init_data: dict | None = None, secret: str | None = None,
                 address: str | None = None, *, executor: Executor | None = None) -> None:
        args, kwargs = _arguments(init_data or {})
        self._owned = None if executor else Executor(address, secret=secret)
        self.executor = (executor or self._owned).options(name=f"{worker_class.__qualname__}.run")
        self._key = os.urandom(8).hex()
        self._jobs: weakref.WeakSet[Future] = weakref.WeakSet()
        self.executor.on_start(_make, self._key, worker_class, args, kwargs)

    def _submit(self, call: Any) -> Future:
        future = self.executor.submit(_use, self._key, "run", *_arguments(call))
        self._jobs.add(future)
        return future

    def map(self, data: Iterable[dict]) -> list[Any]:
        """Return the results in the order of `data`, or raise the first exception and cancel what has not begun."""
        futures = [self._submit(call) for call in data]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def imap(self, data: Iterable[dict]) -> Iterator[Any]:
        """Return an iterator of the results in the order of `data`, of which it reads only so much as keeps all busy.

        It can be continued after an exception.
        """
        return _Results(map(self._submit, data), 2 * self.executor.size + 16, in_order=True)

    def imap_unordered(self, data: Iterable[dict]) -> Iterator[Any]:
        """Do as `imap`, with the results in the order in which they come."""
        return _Results(map(self._submit, data), 2 * self.executor.size + 16, in_order=False)

    def update_workers(self, data: dict) -> None:
        """Have every worker take in an update before any job submitted from now on; late workers get all, in order."""
        self.executor.on_start(_use, self._key, "handle_update", *_arguments(data))

    def get_workers_count(self) -> int:
        """Return how many workers there are now."""
        return len(self.executor.info()["workers"])

    def get_nodes_count(self) -> int:
        """Return on how many nodes they are."""
        return len({worker["node"] for worker in self.executor.info()["workers"]})

    def close(self) -> None:
        """End this pool's jobs, those that run by force, and its executor if it is its own."""
        for future in list(self._jobs):
            if not future.done():
                self.executor.kill(future)
        if self._owned:
            self._owned.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- a small program with both ----


class Search(WorkerInterface):
    """Looks for the minimum of a function by chance, around the best place that anybody has found."""

    def __init__(self, width: float) -> None:
        self.best, self.width = (5.0, 5.0), width

    def run(self, seed: int) -> tuple[float, tuple[float, float]]:
        """Try a hundred places; return the best value and where it is."""
        import random
        rng = random.Random(seed)
        tries = [(self.best[0] + rng.gauss(0, self.width), self.best[1] + rng.gauss(0, self.width)) for _ in range(100)]
        return min(((x - 1) ** 2 + (y + 2) ** 2, (x, y)) for x, y in tries)

    def handle_update(self, best: tuple[float, float]) -> None:
        """Go on from there."""
        self.best = best


class Scores:
    """The best results so far."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def add(self, result: Any) -> float:
        """Keep a result; return the best value."""
        self.kept = sorted([*self.kept, result])[:3]
        return self.kept[0][0]


def main() -> None:
    jobs = 20 if "--quick" in sys.argv else 400
    with Executor() as ex:
        scores = actor(ex, Scores)
        best = float("inf")
        with Pool(Search, {"args": [1.0]}, executor=ex) as pool:
            for value, place in pool.imap_unordered({"args": [seed]} for seed in range(jobs)):
                scores.add((value, place))
                if value < best:
                    best = value
                    pool.update_workers({"args": [place]})
        for value, (x, y) in scores.kept:
            print(f"{value:9.6f} at ({x:.3f}, {y:.3f})")


if __name__ == "__main__":
    main()
