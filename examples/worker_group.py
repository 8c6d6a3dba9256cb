"""Worker groups: a gang of instances with ranks, one on each worker, called together. A recipe on top of minipool.

Copy this file and group_layout.py beside your program; workers need no copy. Only minipool's public calls are used.

    from worker_group import GroupOptions, NamedSharding, group

    layout = NamedSharding([[0, 1], [2, 3]], ["dp", "tp"])
    with GroupOptions(pool, sharding=layout, timeout=60).group(Trainer, None, lr=0.1) as trainers:
        losses = trainers.call_sharded("step", in_sharded_axes=["dp"], replicate_on_axes=["tp"],
                                       output_is_replicated=["tp"], batch=[left, right]).get_results()

`group(pool, Trainer, 4, lr=0.1)` is the same without options. An instance lives in its worker's process, which takes
other jobs between the calls. A call is one job per rank, bound to the rank's worker, that begins at most once. What
all groups of one program call begins in one order on all ranks, however many threads call, so collectives inside
methods are safe. Futures among the arguments are waited for before a call takes its place in that order; they are
found in lists, tuples, sets and dicts. A rank whose process ends takes the group with it: every call, also those that
wait on other ranks, then raises WorkerDied, which names the rank, the worker and the cause.

What a recipe cannot promise. Two programs whose groups share workers have two orders: collectives of theirs can cross
and wait for each other, so give each program workers of its own (`on=`). Placing is not atomic either, and arguments
travel once per rank, not once per host. A call that cannot be sent to one rank, when others have begun it, ends the
group. Instances of a program that ends without shutdown() are freed at their worker's next garbage collection.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import operator
import os
import secrets
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from group_layout import NamedSharding, choose, describe, environment, workers_by_node

from minipool import Executor, Future, JobKilled, JobTimeout, WorkerDied, current_job

PATIENCE = 3.0      # seconds of waiting after which group() says what for
LOOK = 0.5          # seconds between looks at the ranks' processes, while calls are out
GRACE = 1.0         # seconds that other ranks have to end their calls by themselves when one is lost
ABSENT = 10.0       # seconds without a rank's worker in the pool until it is lost: a new server hears of all by then


# ---- in the workers ----

_seats: dict[str, _Seat] = {}       # in a worker's process: what lives there, by the token of its group


class _Seat:
    """A rank's place in its worker's process. Jobs of a worker run one at a time, so it needs no lock."""

    def __init__(self, what: str, environ: dict[str, str]) -> None:
        self.what, self.environ = what, environ
        self.instance: Any = None
        self.generators: dict[int, Iterator[Any]] = {}
        self.generators_made = 0
        self._before: dict[str, str | None] | None = None

    def put_on(self) -> None:
        """Set the rank's variables. Only for its calls: other groups and jobs share the process."""
        if self._before is None:
            self._before = {name: os.environ.get(name) for name in self.environ}
        os.environ.update(self.environ)

    def take_off(self) -> None:
        for name, value in (self._before or {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._before = None


class _Generator(NamedTuple):
    """Stands for a generator that stays in its worker."""
    number: int


def _seat(token: str) -> _Seat:
    seat = _seats.get(token)
    if seat is None:
        raise WorkerDied(f"worker {os.environ.get('MINIPOOL_WORKER')} has a new process, the instance is gone")
    return seat


def _rendezvous(one_host: bool) -> tuple[str, str]:
    """Return an address of this host, and a port that is free, for ranks to meet at."""
    address = "127.0.0.1"
    if not one_host:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.connect(("192.0.2.1", 9))      # sends nothing: it only asks which way leads out
            address = sock.getsockname()[0]
    with socket.socket() as sock:
        sock.bind(("", 0))
        return address, str(sock.getsockname()[1])


def _sit(token: str, what: str, environ: dict[str, str]) -> int:
    """Take the seat. A job before the class is opened, because that may import what reads the variables."""
    _seats[token] = _Seat(what, environ)
    _seats[token].put_on()
    return os.getpid()


def _build(token: str, cls: Any, slots: Any, /, *args: Any, **kwargs: Any) -> None:
    seat = _seat(token)
    try:
        if isinstance(cls, str):
            module, _, name = cls.partition(":")
            cls = operator.attrgetter(name)(importlib.import_module(module))
        if hook := getattr(cls, "configure_worker", None):
            device = getattr(current_job(), "device", "cpu")
            _, environ, more = hook(num_gpus=int(device.startswith("cuda")), bundle_indices=slots)[:3]
            seat.take_off()
            seat.environ, kwargs = {**seat.environ, **(environ or {})}, {**kwargs, **(more or {})}
            seat.put_on()
        seat.instance = cls(*args, **kwargs)
    finally:
        seat.take_off()


def _call(token: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
    seat = _seat(token)
    seat.put_on()
    try:
        value = getattr(seat.instance, method)(*args, **kwargs)
    finally:
        seat.take_off()
    if isinstance(value, types.GeneratorType):
        seat.generators_made += 1
        seat.generators[seat.generators_made] = value
        return _Generator(seat.generators_made)
    return value


def _advance(token: str, number: int, most: int | None) -> tuple[list[Any], bool, Any]:
    """Return a generator's next items (None: all), whether it is over, and its return value if it is."""
    seat, items = _seat(token), []
    if number not in seat.generators:
        raise LookupError(f"this generator of {seat.what} is over: its items were read, or it was closed")
    seat.put_on()
    try:
        while most is None or len(items) < most:
            items.append(next(seat.generators[number]))
        return items, False, None
    except StopIteration as end:
        del seat.generators[number]
        return items, True, end.value
    except BaseException:
        del seat.generators[number]
        raise
    finally:
        seat.take_off()


def _close(token: str, number: int) -> None:
    if generator := _seat(token).generators.pop(number, None):
        generator.close()       # type: ignore[attr-defined]


def _beside(token: str, fn: Callable[..., Any], /, *args: Any) -> Any:
    return fn(_seat(token).instance, *args)


def _leave(token: str) -> None:
    if seat := _seats.pop(token, None):
        seat.take_off()


@dataclass(frozen=True)
class GroupOptions:
    """How and where a group is made; minipool's own `options()` of the executor hold for its calls, but for `on=`.

    `on`: only these workers, nodes or tags. `per_node`: how many on each node, or one number per node. `env`: variables
    for the ranks. `sharding`: their layout. `tied`: lists of ranks, each one replica. `timeout`: seconds that group()
    waits. `master_addr`, `master_port`: where ranks meet; otherwise a free port on rank 0's host. `name`: the class's.
    """
    executor: Executor
    on: str | Iterable[str] | None = None
    per_node: int | Sequence[int] | None = None
    env: dict[str, str] | None = None
    sharding: NamedSharding | None = None
    tied: Sequence[Sequence[int]] | None = None
    timeout: float | None = None
    master_addr: str | None = None
    master_port: int | None = None
    name: str | None = None

    def group(self, cls: Any, size: int | None = None, /, *args: Any, **kwargs: Any) -> WorkerGroup:
        """Return `size` instances of a class (None: as many as the sharding has ranks, else one on every worker).

        `cls` may be text, "package.module:Class", imported by the workers only. All are built before it returns, or
        none: it raises what the first constructor raised. It waits for workers that are missing, and says so.
        """
        if isinstance(size, bool) or not isinstance(size, int | None):
            raise TypeError(f"the size of a group is an int or None, not {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"a group has at least one rank, not {size}")
        if self.sharding and (size or self.sharding.size) != self.sharding.size:
            raise ValueError(f"a group of {size} does not fit a sharding of {self.sharding.size} ranks")
        what = self.name or (cls.rpartition(":")[2] if isinstance(cls, str) else cls.__name__)
        give_up = time.monotonic() + (self.timeout if self.timeout is not None else float("inf"))
        places = self._place(what, size or (self.sharding and self.sharding.size), give_up)
        made = WorkerGroup(self, what, places)
        try:
            made._build(self, cls, args, kwargs, give_up)
        except BaseException:
            made.shutdown(force=True)
            raise
        return made

    def _place(self, what: str, size: int | None, give_up: float) -> list[dict[str, Any]]:
        """Wait until there are enough workers; return those of ranks 0, 1, ..."""
        on = {self.on} if isinstance(self.on, str) else set(self.on or ())
        say_at = time.monotonic() + PATIENCE
        while True:
            info = self.executor.info()
            nodes = workers_by_node(info["workers"], on)
            # of an embedded pool one that is missing is on its way back
            all_there = not info["embedded"] or len(info["workers"]) >= self.executor.size
            if all_there and nodes:
                places = choose(nodes, self.per_node, size)
                if len(places) == (size or len(places)):
                    return places
            text = f"a group of {size or 'any'} {what} finds {sum(map(len, nodes.values()))} workers"
            if all_there and info["embedded"]:
                raise ValueError(f"{text}, and an embedded pool does not grow")
            if time.monotonic() > give_up:
                raise TimeoutError(text)
            if time.monotonic() > say_at:
                print(f"minipool: {text}, and waits", file=sys.stderr)
                say_at = float("inf")
            time.sleep(0.1)


def group(executor: Executor, cls: Any, size: int | None = None, /, *args: Any, **kwargs: Any) -> WorkerGroup:
    """Return a group without options of its own: GroupOptions(executor).group(...)."""
    return GroupOptions(executor).group(cls, size, *args, **kwargs)


# ---- the client's side ----

_order = threading.RLock()      # held while a call is submitted to all its ranks: one order for all groups of a program
_ENDS = WorkerDied, JobKilled, JobTimeout       # a rank that raises one of these has lost its process


def _inputs(value: Any) -> Iterator[concurrent.futures.Future[Any]]:
    """Return the futures among arguments."""
    if isinstance(value, concurrent.futures.Future):
        yield value
    elif isinstance(value, list | tuple | set | frozenset | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _inputs(part)


class RankFuture(Future):
    """A rank's part of a call: a Future whose exception, however the group was lost, names the lost rank."""
    group: WorkerGroup
    rank: int

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if not isinstance(error, _ENDS):
            return error
        lost, cause = self.group._lose(self.rank, error)
        # one that its caller killed, or that ran for its job_timeout, says just that; all others say who was lost
        return error if error is cause and not isinstance(error, WorkerDied) else self.group._died(lost, cause)


@dataclass
class MultiWorkerFuture:
    """A call of several ranks: iterate over it for the futures, await it or call get_results() for the values."""
    futures: list[RankFuture]
    called_workers: list[int]
    return_from_workers: list[int]
    group: WorkerGroup

    def __iter__(self) -> Iterator[RankFuture]:
        return iter(self.futures)

    def __await__(self) -> Any:
        async def results() -> list[Any]:
            # shielded: to cancel who waits must not cancel the call on some ranks and leave it to others
            waiting = [asyncio.shield(asyncio.wrap_future(future)) for future in self.futures]
            for future in waiting:
                future.add_done_callback(lambda done: done.cancelled() or done.exception())     # one error is enough
            await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            return await asyncio.to_thread(self.get_results)
        return results().__await__()

    def get_results(self, *, timeout: float | None = None, return_generators_as_proxies: bool = False) -> list[Any]:
        """Wait for all that were called, return what those of `return_from_workers` returned, in rank order.

        The first exception is raised at once, as other ranks may wait in vain for the one that raised. If a rank
        returned a generator, those of all ranks are read to their ends into one flat list, or are handed back as
        iterators over what stays in the workers. Raises TimeoutError after `timeout` seconds, which stops nothing.
        """
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
            for future in self.futures:     # most are done soon, and who asks a future reads the socket itself
                future.exception(0.05 if timeout is None else min(timeout, 0.05))
        done, late = set(self.futures), set[Any]()
        if not all(future.done() for future in self.futures):
            done, late = concurrent.futures.wait(self.futures, timeout, concurrent.futures.FIRST_EXCEPTION)
        values = {future.rank: future.result() for future in self.futures if future in done}
        if late:
            raise TimeoutError(f"{len(late)} of {len(self.futures)} ranks have not answered in time")
        generators = {rank: value.number for rank, value in values.items() if isinstance(value, _Generator)}
        if generators and not return_generators_as_proxies:
            rest = self.group._begin(_advance, {rank: ((n, None), {}) for rank, n in generators.items()})
            values |= zip(generators, (items for items, _, _ in rest.get_results(timeout=timeout)))
            return [item for rank, value in values.items() for item in (value if rank in generators else [value])]
        values |= {rank: _items(self.group, {rank: number}) for rank, number in generators.items()}
        return [values[rank] for rank in self.called_workers if rank in self.return_from_workers]


def _items(group: WorkerGroup, generators: dict[int, int]) -> Iterator[Any]:
    """Yield the items of generators that stay in their workers, each when it is asked for; return their return value.

    Those of several ranks go forward together, and the items are the first one's.
    """
    first = next(iter(generators))
    try:
        while True:
            asked = group._begin(_advance, {rank: ((number, 1), {}) for rank, number in generators.items()})
            answers = dict(zip(asked.called_workers, asked.get_results(), strict=True))
            generators = {rank: number for rank, number in generators.items() if not answers[rank][1]}
            items, is_over, value = answers[first]
            if is_over:
                return value
            yield items[0]
    finally:
        group._dropped.extend(generators.items())       # at the next call: a collector may run this


class RankHandle:
    """One rank of a group: handle.method(...) is group.call_rank(rank, "method", ...)."""

    def __init__(self, group: WorkerGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def __getattr__(self, method: str) -> Callable[..., RankFuture]:
        if method.startswith("__"):
            raise AttributeError(method)
        return functools.partial(self._group.call_rank, self._rank, method)


class WorkerGroup:
    """Instances with ranks 0, 1, ... on distinct workers. Made by group(); a context manager; len() is its size."""

    def __init__(self, options: GroupOptions, what: str, places: list[dict[str, Any]]) -> None:
        self.sharding, self.world_size = options.sharding, len(places)
        self._tied = [list(ranks) for ranks in options.tied or ([rank] for rank in range(len(places)))]
        if sorted(itertools.chain(*self._tied)) != list(range(len(places))):
            raise ValueError(f"tied= names each of the ranks 0 to {len(places) - 1} once, not {self._tied}")
        if self.sharding and sorted(self.sharding.get_ranks_by_coord()) != list(range(len(places))):
            raise ValueError(f"the sharding of a group of {len(places)} has the ranks 0 to {len(places) - 1}")
        self.worker_metadata = describe(what, places, options.tied)
        self.workers = [RankHandle(self, rank) for rank in range(len(places))]
        self._what, self._executor, self._token = what, options.executor, secrets.token_hex(8)
        self._views = [self._executor.options(on=place["name"], max_deaths=0, retries=0, name=f"rank {rank} of {what}")
                       for rank, place in enumerate(places)]
        self._pids: list[int] = []                              # of the ranks, once they sit
        self._dropped: list[tuple[int, int]] = []               # generators that nobody reads: rank and number
        self._absent: dict[int, float] = {}                     # since when a rank's worker is not in the pool
        self._lock = threading.Lock()
        # all below is guarded by it
        self._futures: set[RankFuture] = set()                  # those that are out, and that ended since the last look
        self._lost: tuple[int, BaseException] | None = None     # the first rank that was lost, and how
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()                          # it is lost or shut down
        self._is_shut = False

    def __len__(self) -> int:
        return self.world_size

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.shutdown(force=kind is not None)

    def _build(self, options: GroupOptions, cls: Any, args: Any, kwargs: Any, give_up: float) -> None:
        """Construct all instances and wait for them."""
        def left() -> float | None:
            return None if give_up == float("inf") else max(0.0, give_up - time.monotonic())
        concurrent.futures.wait(list(_inputs((args, kwargs))), left())
        one_host = len({here["node_idx"] for here in self.worker_metadata}) == 1
        address, port = self._views[0].submit(_rendezvous, one_host).result(left())
        address, port = options.master_addr or address, str(options.master_port or port)
        ranks = range(self.world_size)
        variables = [environment(self.worker_metadata, rank, options.env, address, port) for rank in ranks]
        with _order:
            sat = self._begin(_sit, {rank: ((self._what, variables[rank]), {}) for rank in ranks})
            built = self._begin(_build, {rank: ((cls, self.worker_metadata[rank]["bundle_indices"], *args), kwargs)
                                         for rank in ranks})
        limit = min(PATIENCE, give_up - time.monotonic())
        done, late = concurrent.futures.wait(built, max(0.0, limit), concurrent.futures.FIRST_EXCEPTION)
        if late and all(future.exception() is None for future in done):
            print(f"minipool: {len(done)} of {self.world_size} ranks of {self._what} are built", file=sys.stderr)
        built.get_results(timeout=left())
        self._pids = sat.get_results()

    def _begin(self, fn: Any, calls: dict[int, tuple[Any, Any]],
               returned: list[int] | None = None) -> MultiWorkerFuture:
        """Submit fn(token, *args, **kwargs) for each rank, all in one step."""
        if inputs := list(_inputs(list(calls.values()))):
            concurrent.futures.wait(inputs)
        futures: list[RankFuture] = []
        with _order:
            self.ensure_open()
            try:
                while self._dropped:
                    rank, number = self._dropped.pop()
                    self._views[rank].submit(_close, self._token, number)
                for rank, (args, kwargs) in calls.items():
                    future = self._views[rank].submit(fn, self._token, *args, **kwargs)
                    future.__class__ = RankFuture       # what submit() makes is a Future; it differs by a method only
                    future.group, future.rank = self, rank
                    futures.append(future)
            except BaseException as error:
                if not all([future.cancel() for future in futures]):    # some have begun what `rank` will never get
                    self._lose(rank, error)
                raise
        with self._lock:
            self._futures.update(futures)
            self._start_watcher()
        if self._lost:
            self._end_calls()       # lost meanwhile, and the watcher may have ended the others already
        return MultiWorkerFuture(futures, list(calls), list(calls) if returned is None else returned, self)

    # ---- calls ----

    def _called(self, run_rank_0_only_axes: Sequence[str]) -> list[int]:
        """Return the ranks with coordinate 0 on the given axes."""
        if not run_rank_0_only_axes:
            return list(range(self.world_size))
        return self._layout().get_ranks_by_coord(**dict.fromkeys(run_rank_0_only_axes, 0))

    def _layout(self) -> NamedSharding:
        if self.sharding is None:
            raise ValueError(f"this group of {self._what} has no sharding, so it has no axes")
        return self.sharding

    def call(self, method: str, /, *args: Any, run_rank_0_only_axes: Sequence[str] = (),
             **kwargs: Any) -> MultiWorkerFuture:
        """Call a method of all ranks, or of those with coordinate 0 on the given axes, with the same arguments."""
        return self._begin(_call, dict.fromkeys(self._called(run_rank_0_only_axes), ((method, *args), kwargs)))

    def call_each(self, method: str, /, *lists: Sequence[Any], common_kwargs: dict[str, Any] | None = None,
                  run_rank_0_only_axes: Sequence[str] = (), **named: Sequence[Any]) -> MultiWorkerFuture:
        """Call a method with the i-th element of each list for the i-th called rank, common_kwargs for all."""
        called, common = self._called(run_rank_0_only_axes), common_kwargs or {}
        if not (lists or named) or any(len(part) != len(called) for part in (*lists, *named.values())):
            raise ValueError(f"call_each() takes lists of {len(called)} elements, one for each rank that is called")
        if both := common.keys() & named.keys():
            raise TypeError(f"{method}() got {', '.join(both)} twice: in a list and in common_kwargs")
        return self._begin(_call, {
            rank: ((method, *(part[i] for part in lists)), {**common, **{k: part[i] for k, part in named.items()}})
            for i, rank in enumerate(called)})

    def call_rank(self, rank: int, method: str, /, *args: Any, **kwargs: Any) -> RankFuture:
        """Call a method of one rank."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"ranks are 0 to {self.world_size - 1}, not {rank}")
        return self._begin(_call, {rank: ((method, *args), kwargs)}).futures[0]

    def call_sharded(self, method: str, /, *, in_sharded_axes: Sequence[str], replicate_on_axes: Sequence[str] = (),
                     output_is_replicated: Sequence[str] = (), make_dummy_calls_to_free_axes: bool = False,
                     common_kwargs: dict[str, Any] | None = None, **sharded: Any) -> MultiWorkerFuture:
        """Call a method with the part of each argument that lies at a rank's coordinates.

        Arguments are nested lists, nested in the order of `in_sharded_axes`; along `replicate_on_axes` ranks get the
        same part. On all other axes only coordinate 0 is called; the rest not at all, or with None in place of each
        part (`make_dummy_calls_to_free_axes`), and they return nothing. Along `output_is_replicated` only coordinate 0
        returns its value.
        """
        layout, common = self._layout(), common_kwargs or {}
        for axis in (*in_sharded_axes, *replicate_on_axes, *output_is_replicated):
            layout.get_axis_index(axis)
        if both := set(in_sharded_axes) & set(replicate_on_axes):
            raise ValueError(f"{', '.join(both)}: an axis is sharded or replicated, not both")
        if both := common.keys() & sharded.keys():
            raise TypeError(f"{method}() got {', '.join(both)} twice: sharded and in common_kwargs")

        def part(value: Any, coords: dict[str, int]) -> Any:
            for axis in in_sharded_axes:
                if len(value) != layout.shape[axis]:
                    raise ValueError(f"axis {axis} has {layout.shape[axis]} places, its argument {len(value)} parts")
                value = value[coords[axis]]
            return value

        calls, returned = {}, []
        for rank in range(self.world_size):
            coords = layout.get_worker_coords(rank)
            is_free = any(coords[axis] for axis in layout.names if axis not in (*in_sharded_axes, *replicate_on_axes))
            if not is_free or make_dummy_calls_to_free_axes:
                parts = {name: None if is_free else part(value, coords) for name, value in sharded.items()}
                calls[rank] = (method,), {**common, **parts}
            if not is_free and not any(coords[axis] for axis in output_is_replicated):
                returned.append(rank)
        return self._begin(_call, calls, returned)

    def stream(self, method: str, /, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Call a generator method of all ranks; return the items of rank 0, as all go forward together."""
        values = [future.result() for future in self.call(method, *args, **kwargs)]
        if not isinstance(values[0], _Generator):
            raise TypeError(f"{method}() of {self._what} returned {values[0]!r}, not a generator")
        return _items(self, {rank: value.number for rank, value in enumerate(values) if isinstance(value, _Generator)})

    def get_all_worker_results(self, future: MultiWorkerFuture, **options: Any) -> list[Any]:
        """Return future.get_results(**options)."""
        return future.get_results(**options)

    def run_beside(self, rank: int, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Return fn(instance, *args) of one rank, now and beside its calls; None while its worker is not there."""
        try:
            answers = self._views[rank].run(_beside, self._token, fn, *args)
        except WorkerDied as error:
            raise self._died(*self._lose(rank, error)) from None
        return next(iter(answers.values()), None)

    @property
    def dp_size(self) -> int:
        """How many replicas there are; without tied= each rank is one."""
        return len(self._tied)

    def get_dp_leader_worker_idx(self, index: int) -> int:
        """Return the first rank of a replica."""
        if not 0 <= index < len(self._tied):
            raise IndexError(f"replicas are 0 to {len(self._tied) - 1}, not {index}")
        return self._tied[index][0]

    # ---- death and end ----

    def is_alive(self) -> bool:
        """Whether every rank's process is the one in which it was built."""
        if not self._over.is_set():
            self._look()
        return not self._over.is_set()

    def ensure_open(self) -> None:
        """Raise what ended the group, if something did."""
        if self._lost:
            raise self._died(*self._lost)
        if self._over.is_set():
            raise RuntimeError(f"this group of {self._what} was shut down")

    def _died(self, rank: int, cause: BaseException) -> WorkerDied:
        """Return what all calls raise after the loss of a rank."""
        died = WorkerDied(f"{self._what} has lost rank {rank} on {self.worker_metadata[rank]['worker']}: {cause}")
        died.__cause__ = cause
        return died

    def _lose(self, rank: int, error: BaseException) -> tuple[int, BaseException]:
        """The first loss of a rank ends the group: the watcher soon ends what waits for it. Return that first one."""
        with self._lock:
            if self._lost is None:
                self._lost = rank, error
                self._over.set()
                self._start_watcher()
            return self._lost

    def _start_watcher(self) -> None:
        if self._watcher is None and not self._is_shut:
            self._watcher = threading.Thread(target=self._watch, name=f"minipool-group {self._what}", daemon=True)
            self._watcher.start()

    def _pending(self) -> list[RankFuture]:
        return [future for future in self._futures if not future.done()]

    def _watch(self) -> None:
        """As long as calls are out, look whether the ranks live; end what waits for one that does not."""
        idle = 0
        while not self._over.wait(LOOK):
            with self._lock:
                ended = self._futures.difference(self._pending())
            self._look()
            with self._lock:
                if not self._absent:        # else one of them may know of what that rank died
                    self._futures -= ended
                idle = 0 if self._futures else idle + 1
                if idle * LOOK > PATIENCE:
                    self._watcher = None
                    return
        if self._lost:
            time.sleep(GRACE)
            self._end_calls()

    def _end_calls(self) -> None:
        with self._lock:
            pending = self._pending()
        for future in pending:
            self._executor.kill(future)

    def _look(self) -> None:
        """Compare the ranks' processes with those that the pool has now."""
        try:
            info = self._executor.info()
        except Exception:
            return          # the server is away, which says nothing of the ranks; their calls raise if it stays away
        pids, now = {worker["name"]: worker["pid"] for worker in info["workers"]}, time.monotonic()
        for rank, pid in enumerate(self._pids):
            found = pids.get(self.worker_metadata[rank]["worker"])
            if found == pid:
                self._absent.pop(rank, None)
            elif found or info["embedded"] or now - self._absent.setdefault(rank, now) > ABSENT:
                with self._lock:
                    ended = [future for future in self._futures if future.rank == rank and future.done()]
                for future in ended:
                    future.exception()      # one that was running there knows the cause, and tells it
                self._lose(rank, WorkerDied("its process is gone"))

    def shutdown(self, cleanup_method: str | None = None, timeout: float | None = 30, force: bool = False) -> bool:
        """End the instances; True if `cleanup_method`, called on all ranks before, was done within `timeout` seconds.

        What runs may end within that time, too, then it is ended by force; with `force` at once, and nothing is
        called. A second call does nothing and returns True.
        """
        give_up, clean = time.monotonic() + (float("inf") if timeout is None else timeout), True
        if cleanup_method and not force and not self._over.is_set():
            try:
                self.call(cleanup_method).get_results(timeout=timeout)
            except Exception as error:
                print(f"minipool: {cleanup_method}() of {self._what}: {error!r}", file=sys.stderr)
                clean, force = False, isinstance(error, TimeoutError)
        with self._lock:
            if self._is_shut:
                return True
            self._is_shut = True
            self._over.set()
        if force or self._lost:
            self._end_calls()
        with contextlib.suppress(RuntimeError, WorkerDied):     # the executor was shut down before: all have ended
            leaving = [view.submit(_leave, self._token) for view in self._views]
            left = 0.0 if self._lost else min(give_up - time.monotonic(), 1e6)
            for future in concurrent.futures.wait(leaving, max(5.0, left))[1]:
                self._end_calls()
                self._executor.kill(future)
        return clean
