"""Kept values: what a job returns stays in its worker, and the jobs that need it go there.

Copy this file beside your program; it needs nothing but minipool, and the workers need no copy.

    from minipool import Executor, gather
    from kept_values import Keeper

    with Executor() as pool, Keeper(pool) as keeper:
        table = keeper.submit(load, "table.csv")        # a future; the table stays, as it is, where it was loaded
        model = keeper.submit(train, table, 0.1)        # runs there: nothing but the two names crosses the wire
        print(keeper.submit(score, model, table).result())      # result() fetches a value
        parts = keeper.scatter([1, 2, 3])               # values into the pool; broadcast=True: to every worker

`examples/pipeline.py` is a program with it. How it works: a job's value goes into a dictionary of the worker's process,
and the job's outcome says which worker that is and how large it is. A kept future may stand anywhere in the lists,
tuples, sets and dicts among later arguments. A job begins when its inputs are there, on the worker that holds most of
their bytes; what it lacks is copied to that worker first, through this client, which does not unpickle it. A value
is dropped when the last reference to its future has gone and no job waits for it; a job that would make it and has
not begun is cancelled. A value that died with its worker is made again from its call, and so are inputs that it lacks.

What to know. Give pure functions: a job that changes an input in place changes it for others, and arguments reach the
job as they are when it begins. Bytes beat load: jobs on one value queue at its worker while others idle; deal the
data out, or say where by keeper.options(on=...). A worker copies a value to another between its jobs, while result()
has it at once. The calls of a chain are kept here as long as its last value. `await` a kept future, as asyncio's
wrap_future would fetch the value in the event loop.
"""
from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import itertools
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, Future, MinipoolError, WorkerDied, current_job

FIRST = 1 << 30         # priority of what a worker is asked to do between two jobs
ANYWHERE = ""           # in the place of a worker's name

# ---- in the workers ----

_values: dict[str, tuple[Any, int]] = {}        # what this process keeps, by token: the value and its size


class _Ref(NamedTuple):
    """In the place of a value in the arguments of a job."""
    token: str


class _Absent(NamedTuple):
    """In the place of a value that should be here and is not."""
    tokens: list[str]


def _swapped(item: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """Return `item` with new(part) in the place of each part of that kind, in plain containers however deep."""
    if isinstance(item, kind):
        return new(item)
    if type(item) is dict:
        return {_swapped(key, kind, new): _swapped(value, kind, new) for key, value in item.items()}
    if type(item) in (list, tuple, set, frozenset):
        return type(item)(_swapped(part, kind, new) for part in item)
    return item


def size_of(value: Any) -> int:
    """Return about how many bytes a value has: arrays and tensors say it, of containers a hundred parts are asked."""
    try:
        if isinstance(size := getattr(value, "nbytes", None), int):
            return size
        size = sys.getsizeof(value, 64)
        if type(value) in (list, tuple, set, frozenset, dict) and value:
            parts = itertools.chain(*value.items()) if type(value) is dict else value
            sizes = [size_of(part) for part in itertools.islice(parts, 100)]
            size += sum(sizes) * len(value) // min(len(value), 100)
        return size
    except Exception:       # an object that does not know its size, or contains itself
        return 64


def _keep(token: str, value: Any) -> int:
    _values[token] = value, size_of(value)
    return _values[token][1]


def _put(token: str, value: Any) -> tuple[str, Any]:
    """Keep a copy; return where, and how large it is."""
    return current_job().worker, value if type(value) is _Absent else _keep(token, value)


def _work(token: str, inputs: list[str], fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[str, Any]:
    """Run a job whose inputs are here and keep its value, or say which of them are not."""
    absent = [given for given in inputs if given not in _values]
    if absent:
        return current_job().worker, _Absent(absent)
    args, kwargs = _swapped((args, kwargs), _Ref, lambda ref: _values[ref.token][0])
    return current_job().worker, _keep(token, fn(*args, **kwargs))


def _same(value: Any) -> Any:
    return value


def _read(token: str) -> Any:
    return _values[token][0] if token in _values else _Absent([token])


def _drop(tokens: list[str]) -> None:
    for token in tokens:
        _values.pop(token, None)


def _drop_all(prefix: str) -> None:
    _drop([token for token in list(_values) if token.startswith(prefix)])


def _inventory(prefix: str) -> dict[str, int]:
    return {token: size for token, (_, size) in list(_values.items()) if token.startswith(prefix)}


# ---- in the client: the futures ----


class Kept(concurrent.futures.Future):
    """The future of a value that stays in the pool: `worker` holds it, it has `nbytes`; result() fetches it.

    It is done when the value has been made. `timeout` is about that, and about the value being made again after a
    loss; the way here takes what it takes. `release()` lets the value go before the last reference does.
    """

    def __init__(self, keeper: Keeper, value: _Value) -> None:
        super().__init__()
        self._keeper, self._value, self._is_released = keeper, value, False
        value.handle = weakref.ref(self)
        self._end = weakref.finalize(self, keeper._book.post, keeper._book.forget, value)    # takes no lock
        self._end.atexit = False

    key = property(lambda self: self._value.key, doc="Its name in `who_has()`.")
    nbytes = property(lambda self: self._value.nbytes, doc="Its size; 0 before it is there.")
    worker = property(lambda self: min(self._value.holders, default=None), doc="Who holds it, or the first who does.")

    def result(self, timeout: float | None = None) -> Any:
        """Return the value, or raise the job's exception; CancelledError after release()."""
        give_up = None if timeout is None else time.monotonic() + timeout
        error = None if self._is_released else self.exception(timeout)
        if self._is_released or error:
            raise error or CancelledError(f"the value of {self.key} was released")
        book, worker, token = self._keeper._book, None, ""
        while True:
            left = None if give_up is None else max(1.0, give_up - time.monotonic())    # to hear where it is
            worker, token = book.ask(self._value, worker, token).result(left)
            value = book.fetch(worker, token)
            if type(value) is not _Absent:
                return value

    def cancel(self) -> bool:
        """Cancel the job unless it began."""
        job = self._value.job
        if not self.done() and job is not None and not job.cancel():
            return False
        is_cancelled = super().cancel()
        if is_cancelled:
            self._keeper._book.post(self._keeper._book.end, self._value, CancelledError())
        return is_cancelled

    def running(self) -> bool:
        """Whether a worker runs the job."""
        job = self._value.job
        return not self.done() and job is not None and job.running()

    def release(self) -> None:
        """Let the value go, unless a job still waits for it; result() then raises CancelledError."""
        self._is_released = True
        self._end()

    def __await__(self) -> Any:
        made: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.add_done_callback(lambda _: made.set_result(None))
        yield from asyncio.wrap_future(made).__await__()
        return (yield from asyncio.to_thread(self.result).__await__())

    def __repr__(self) -> str:
        return f"<Kept {self.key} {'on ' + self.worker if self.worker else 'nowhere'}, {self.nbytes} bytes>"


def _tell(ended: queue.SimpleQueue) -> None:
    """End futures, which runs what was added to them: in a thread of its own, where it may wait for the book."""
    while pair := ended.get():
        handle, error = pair
        if isinstance(error, CancelledError):
            concurrent.futures.Future.cancel(handle)
        if handle.set_running_or_notify_cancel():
            handle.set_exception(error) if error else handle.set_result(None)
        del handle, pair        # they may be the last references


# ---- in the client: the book ----


class _Value:
    """What the book says of a value: the call it comes from, where it is, and who needs it. For the book's thread."""

    def __init__(self, pool: Executor, key: str, fn: Any, args: tuple, kwargs: dict) -> None:
        self.pool, self.key, self.fn = pool, key, fn    # fn is None: it was scattered, and cannot be made again
        self.inputs: dict[_Value, None] = {}
        self.args, self.kwargs = args, kwargs           # with other _Values in them
        self.token, self.made = "", 0                   # how the workers know it, and when: anew each time it is made
        self.holders: frozenset[str] = frozenset()      # workers
        self.is_everywhere = False                      # broadcast
        self.nbytes = 0
        self.is_due = True                              # it is to be made
        self.job: Future | None = None                  # that makes it
        self.at = ""                                    # where it must be made
        self.is_bound = False                           # the user said where
        self.copies: dict[str, Future] = {}             # on their way, by worker
        self.error: BaseException | None = None         # why there is no value
        self.unmovable: BaseException | None = None     # why there is no copy
        self.handle: Any = lambda: None
        self.is_wanted = True                           # by who has the handle
        self.users: dict[_Value, None] = {}             # due values that need it
        self.asked: list[concurrent.futures.Future] = []        # those who wait to hear where it is


class _Book:
    """Where every value is. One thread keeps it, a step at a time; the others post what it is to do next."""

    def __init__(self, pool: Executor) -> None:
        self.pool = pool.options(on=None, prefer=None, retries=0, job_timeout=None)     # for what the book itself does
        self.prefix = os.urandom(6).hex() + ":"         # of its tokens, among those of other keepers
        self.numbers, self.turns, self._times = itertools.count(1), itertools.count(), itertools.count(1)
        self.recomputed = self.copied = 0
        self.is_closed = False
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._due: set[_Value] = set()
        self._load: collections.Counter[str] = collections.Counter()    # jobs out, by the one worker they are for
        self._drops: dict[str, list[str]] = {}          # tokens to let go of, by worker
        self._drop_bytes = 0
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()       # futures and errors, for _tell
        self.thread = threading.Thread(target=self._serve, name="kept-values", daemon=True)
        self.thread.start()
        threading.Thread(target=_tell, args=(self._ended,), name="kept-callbacks", daemon=True).start()

    def post(self, *step: Any) -> None:
        """Have the thread take a step. May be called by a finalizer: SimpleQueue's put takes no lock of ours."""
        self._steps.put(step)

    def _serve(self) -> None:
        while not self.is_closed:
            try:
                step, *rest = self._steps.get(timeout=0.05 if self._drops else None)
                step(*rest)
            except queue.Empty:
                self._send_drops()
            except Exception:       # a mistake of this file: who waits must hear of it
                logging.getLogger("minipool").exception("the book of kept values is closed")
                self.close()
        self._ended.put(None)

    def close(self) -> None:
        self.is_closed = True
        for value in list(self._due):
            if value.job:
                value.job.cancel()
            self.end(value, CancelledError())
        while not self._steps.empty():                  # those who ask too late
            step, *rest = self._steps.get()
            if step == self._locate:
                rest[0].set_exception(CancelledError())
        self._try(self.pool.on_start, _drop_all, self.prefix)

    @staticmethod
    def _try(send: Callable[..., Any], *call: Any) -> None:
        try:
            send(*call)
        except (RuntimeError, concurrent.futures.BrokenExecutor):
            pass                    # the pool is closed, and its values are gone with it

    # ---- making values ----

    def begin(self, value: _Value) -> None:
        """Make a value: at first, and again when it is lost."""
        self._due.add(value)
        value.is_due = True
        for given in value.inputs:
            given.users[value] = None
        self.post(self._advance, value)         # posted: a long chain must not be a deep recursion

    def _again(self, value: _Value) -> None:
        if value.is_due or value.error:
            return
        if value.fn is None:
            return self.end(value, WorkerDied(f"{value.key} was scattered, and the last worker that held it is gone: "
                                              "it cannot be made again; scatter it anew"))
        self.recomputed += 1
        self.begin(value)

    def _advance(self, value: _Value) -> None:
        """Submit a value's job if its inputs are where it should run; else bring about that they are."""
        if not value.is_due or value.job:
            return
        absent = [given for given in value.inputs if not given.holders and not given.is_everywhere]
        for given in absent:
            self._again(given)
        where = set() if absent else self._choose(value)
        needed = [given for given in value.inputs if where and not given.is_everywhere]
        missing = [given for given in needed if not where & given.holders]
        errors = [e for e in [*(g.error for g in value.inputs), *(g.unmovable for g in missing)] if e]
        if errors:
            return self.end(value, errors[0])
        for given in missing:
            self._copy(given, min(where))
        if not missing and not absent:
            self._submit(value, sorted(where))

    def _choose(self, value: _Value) -> set[str]:
        """Return the workers that hold all inputs, or the one that holds most of their bytes; none: it is all one."""
        inputs = [given for given in value.inputs if not given.is_everywhere]
        if value.at or value.is_bound or not inputs:
            return {value.at} - {""}
        held: collections.Counter[str] = collections.Counter()
        for given in inputs:
            held.update(dict.fromkeys(given.holders, max(1, given.nbytes)))
        best = {worker for worker in held if held[worker] == max(held.values())}
        full = {worker for worker in best if all(worker in given.holders for given in inputs)}
        return full or {min(best, key=lambda worker: (self._load[worker], worker))}

    def _submit(self, value: _Value, where: list[str]) -> None:
        value.made = next(self._times)
        value.token = f"{self.prefix}{value.key}:{value.made}"
        args, kwargs = _swapped((value.args, value.kwargs), _Value, lambda given: _Ref(given.token))
        needed = [given.token for given in value.inputs]
        place = {"on" if value.is_bound else "prefer": where} if where else {}
        try:
            job = value.pool.options(name=value.key, **place).submit(_work, value.token, needed, value.fn, args, kwargs)
        except Exception as error:          # it cannot be pickled, the pool is closed, ...
            return self.end(value, error)
        value.job = job
        self._load.update(where[:1])
        job.add_done_callback(lambda job: self.post(self._made, value, job, where))

    def _made(self, value: _Value, job: Future, where: list[str]) -> None:
        self._load.subtract(where[:1])
        if job is not value.job:
            return
        value.job = None
        try:
            worker, size = job.result()
        except BaseException as error:
            if job.cancelled():
                self._drop(ANYWHERE, value.token, 0)
            return self.end(value, error)
        if type(size) is _Absent:           # it came to another worker, or its worker lost what it had
            value.at = worker if value.is_bound else ""
            for given in value.inputs:
                if given.token in size.tokens:
                    self._discard(given, worker)
            if worker not in where:
                self._gone([value], where, value.made)
            return self._advance(value)
        value.holders, value.nbytes, value.at = frozenset([worker]), size, ""
        if value.fn is _same:               # scattered: it is there now, and no more here
            value.fn, value.args = None, ()
        self.end(value)

    def end(self, value: _Value, error: BaseException | None = None) -> None:
        """A value is there, or will never be: tell everybody, and let go of what was needed for it."""
        if value.error:
            return
        if value.job:           # cancelled, but it may have begun where nobody told of it yet
            self._drop(ANYWHERE, value.token, 0)
        self._due.discard(value)
        value.job, value.is_due, value.error = None, False, error
        handle, value.handle = value.handle(), lambda: None     # it is told once
        if handle is not None:
            self._ended.put((handle, error))
        for given in value.inputs:
            given.users.pop(value, None)
            self.post(self._let_go, given)  # posted, as in begin()
        self._advance_users(value)
        asked, value.asked = value.asked, []
        for answer in asked:
            self._locate(answer, value)
        self._let_go(value)

    # ---- copies ----

    def _copy(self, value: _Value, worker: str) -> None:
        if worker in value.copies:
            return
        self.copied += 1
        first = self.pool.options(priority=FIRST, name=f"copy {value.key}")
        try:                        # what is read goes on as the bytes that come
            source = min(value.holders, key=lambda holder: (self._load[holder], holder))
            found = first.options(prefer=source).submit(_read, value.token)
            job = first.options(prefer=worker).submit(_put, value.token, found)
        except Exception as error:
            value.unmovable = error
            return self._advance_users(value)
        value.copies[worker], sent = job, (value.token, next(self._times), source, worker)
        job.add_done_callback(lambda job: self.post(self._moved, value, job, *sent))

    def _moved(self, value: _Value, job: Future, token: str, since: int, source: str, target: str) -> None:
        del value.copies[target]
        try:
            worker, size = job.result()
        except BaseException as error:
            value.unmovable = error
        else:
            if worker != target:
                self._gone(value.users, [target], since)
            if token != value.token:        # it was made again meanwhile
                self._drop(worker, token, 0)
            elif type(size) is _Absent:
                self._discard(value, source)
            else:
                value.holders |= {worker}
        self._advance_users(value)
        self._let_go(value)

    def _gone(self, values: Iterable[_Value], workers: list[str], since: int) -> None:
        """What was for these workers came to another: they are gone, with what they had then that these values need.

        Processes of the same names may have taken their places meanwhile, and hold what was made later.
        """
        for value in values:
            value.at = "" if value.at in workers else value.at
            for given, worker in itertools.product(value.inputs, workers):
                if given.made < since:
                    self._discard(given, worker)

    def _advance_users(self, value: _Value) -> None:
        for user in value.users:
            self.post(self._advance, user)

    # ---- finding values, letting go of them ----

    def ask(self, value: _Value, absent_at: str | None, token: str) -> concurrent.futures.Future:
        """Return a future of (worker, token), for any thread; `absent_at` did not have it under this token."""
        answer: concurrent.futures.Future = concurrent.futures.Future()
        self.post(self._locate, answer, value, absent_at, token)
        if self.is_closed:
            raise CancelledError("the keeper is closed, and its values are gone")
        return answer

    def _locate(self, answer: Any, value: _Value, absent_at: str | None = None, token: str = "") -> None:
        if absent_at and token == value.token:
            self._discard(value, absent_at)
        if value.error:
            answer.set_exception(value.error)
        elif value.holders or value.is_everywhere:
            answer.set_result((min(value.holders, default=None), value.token))
        else:
            value.asked.append(answer)
            self._again(value)

    def fetch(self, worker: str | None, token: str) -> Any:
        """Return a value, from a busy worker as well; _Absent if the worker has it no more. For any thread."""
        try:
            answers = self.pool.options(on=worker).run(_read, token) if worker else {}
        except (MinipoolError, ValueError):
            answers = {}                    # it is not connected: as a job, the question waits for it, or for its end
        for answer in answers.values():
            return answer
        return (self.pool.options(prefer=worker) if worker else self.pool).submit(_read, token).result()

    def forget(self, value: _Value) -> None:
        """Nobody has the handle any more."""
        value.is_wanted = False
        self._let_go(value)

    def _let_go(self, value: _Value) -> None:
        """Drop a value, or cancel its job, if nobody needs it."""
        if value.is_wanted or value.users:
            return
        if value.is_everywhere:
            value.is_everywhere = False
            self._try(self.pool.on_start, _drop, [value.token])
        for worker in list(value.holders):
            self._discard(value, worker)
        if value.is_due and (value.job is None or value.job.cancel()):
            self.end(value, CancelledError())

    def _discard(self, value: _Value, worker: str) -> None:
        if worker in value.holders:
            value.holders -= {worker}
            self._drop(worker, value.token, value.nbytes)

    def _drop(self, worker: str, token: str, size: int) -> None:
        self._drops.setdefault(worker, []).append(token)
        self._drop_bytes += size + 10_000
        if self._drop_bytes > 10_000_000:       # few small ones wait for company
            self._send_drops()

    def _send_drops(self) -> None:
        drops, self._drops, self._drop_bytes = self._drops, {}, 0
        if tokens := drops.pop(ANYWHERE, None):
            with contextlib.suppress(TimeoutError):
                for worker in self.pool.info()["workers"]:
                    drops.setdefault(worker["name"], []).extend(tokens)
        for worker, tokens in drops.items():
            self._try(self.pool.options(prefer=worker, priority=FIRST).submit, _drop, tokens)


# ---- in the client: the keeper ----


class _Life:
    """Ends with the last keeper and the last future that know it."""


class Keeper:
    """Submits jobs to a pool whose values stay there: `submit` and `scatter` return Kept futures.

    `options()` as of an Executor: say there, not in `pool`, where jobs may run. `recomputed` counts values that were
    made again, `copied` those that went from one worker to another.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool, self._book, self._options, self._life = pool, _Book(pool), dict[str, Any](), _Life()
        weakref.finalize(self._life, self._book.post, self._book.close).atexit = False

    recomputed = property(lambda self: self._book.recomputed)
    copied = property(lambda self: self._book.copied)

    def options(self, **options: Any) -> Keeper:
        """Return a view of this keeper whose jobs carry these options."""
        view = copy.copy(self)
        view._pool, view._options = self._pool.options(**options), {**self._options, **options}
        return view

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Kept:
        """Return the future of fn(*args, **kwargs), whose value stays in the worker that makes it.

        What cannot be pickled fails the future.
        """
        if not callable(fn):
            raise TypeError(f"submit() needs something callable, not {type(fn).__name__}")
        inputs: dict[_Value, None] = {}
        call = _swapped((args, kwargs), Kept, lambda kept: self._take(kept, inputs))    # args live on: see Kept's end
        name = self._options.get("name") or getattr(fn, "__qualname__", type(fn).__name__)
        return self._begin(name, fn, *call, inputs, self._options.get("on") is not None)

    def _take(self, kept: Kept, inputs: dict[_Value, None]) -> _Value:
        if kept._keeper._book is not self._book:
            raise ValueError(f"{kept.key} is kept by another keeper: give its result()")
        if kept._is_released:
            raise CancelledError(f"the value of {kept.key} was released")
        inputs[kept._value] = None
        return kept._value

    def _begin(self, name: str, fn: Any, args: tuple, kwargs: dict, inputs: Iterable[_Value] = (),
               is_bound: bool = False, at: str = "") -> Kept:
        if self._book.is_closed:
            raise RuntimeError("cannot schedule new futures after the keeper was closed")
        value = _Value(self._pool, f"{name}-{next(self._book.numbers)}", fn, args, kwargs)
        value.inputs, value.is_bound, value.at = dict.fromkeys(inputs), is_bound, at
        kept = Kept(self, value)
        self._book.post(self._book.begin, value)
        return kept

    def scatter(self, data: Any, broadcast: bool = False, on: str | Iterable[str] | None = None) -> Any:
        """Put values into the pool, one worker after the other: a list, tuple, set or dict of futures, or one future.

        `on`: only on these workers, nodes or tags. With `broadcast` every worker has them before its next job, late
        ones too. A scattered value is not kept here: one that died with its last worker raises WorkerDied.
        """
        if type(data) is dict:
            return dict(zip(data, self.scatter(list(data.values()), broadcast, on), strict=True))
        parts = data if type(data) in (list, tuple, set, frozenset) else [data]
        futures = [self._broadcast(part) for part in parts] if broadcast else self._deal(parts, on)
        for future in futures:
            if error := future.exception():
                raise error
        return futures[0] if parts is not data else type(data)(futures)

    def _broadcast(self, data: Any) -> Kept:
        value = _Value(self._pool, f"broadcast-{next(self._book.numbers)}", None, (), {})
        value.token, value.nbytes, value.is_everywhere = f"{self._book.prefix}{value.key}:0", size_of(data), True
        self._pool.on_start(_keep, value.token, data)
        kept = Kept(self, value)
        self._book.post(self._book.end, value)
        return kept

    def _deal(self, parts: Iterable[Any], on: str | Iterable[str] | None) -> list[Kept]:
        self._pool.wait_for_workers(self._pool.size)
        names = {on} if isinstance(on, str) else on and set(on)
        workers = sorted(worker["name"] for worker in self._pool.info()["workers"]
                         if worker["connected"] and (not names or names & set(worker["tags"])))
        if not workers:
            raise ValueError(f"on={on} names no worker, node or tag that is there")
        return [self._begin("scattered", _same, (part,), {}, is_bound=bool(names),
                            at=workers[next(self._book.turns) % len(workers)]) for part in parts]

    def who_has(self) -> dict[str, dict[str, int]]:
        """Return what the workers say that they keep: {key: {worker: bytes}}."""
        found: dict[str, dict[str, int]] = {}
        for worker, sizes in self._book.pool.run(_inventory, self._book.prefix).items():
            for token, size in sizes.items():
                found.setdefault(token.split(":")[1], {})[worker] = size
        return found

    def close(self) -> None:
        """Drop all values; what has not begun is cancelled."""
        self._book.post(self._book.close)
        self._book.thread.join()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
