"""Graphs of tasks: a dict says what each key is made of, and `get` makes what is asked for.

Copy this file beside your program; it needs nothing but minipool, and the workers need no copy.

    from minipool import Executor
    from graph import get

    graph = {"x": 1,                                # a value
             "y": (increment, "x"),                 # a task: what is called, and its arguments
             "z": (sum, ["x", "y", (abs, -5)])}     # keys in lists count, and so do tasks in tasks

    with Executor() as ex:
        print(get(graph, ["y", "z"], ex))           # prints: [2, 8]

`python examples/graph.py` shows it. Each task is a job, which begins when those it needs have ended: futures as
arguments. A task within a task is a part of its job. Only what the keys need is made. Values go from job to job through
this program, and what a task raised is raised by `get`; what needs it is never run. A text that is a key is that key.

Dask's own collections need none of this, as Dask takes any executor: `with dask.config.set(scheduler=ex): x.compute()`.
"""
from __future__ import annotations

import graphlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
import minipool
from minipool import Executor


def get(graph: Mapping[Any, Any], keys: Any, executor: Executor | None = None) -> Any:
    """Return the value of a key, or those of a list of keys, nested as that is.

    Without an executor it is the one that was opened last. Raises KeyError for keys that the graph has not,
    ValueError if tasks need each other, and what a task raised.
    """
    executor = executor or minipool.get_executor()
    wanted = list(_flat(keys))
    unknown = [key for key in wanted if not _is_key(key, graph)]
    if unknown:
        raise KeyError(f"the graph has no {', '.join(map(repr, unknown))}")
    made: dict[Any, Any] = {}           # a future, or the value if nothing needs to run for it
    try:
        for key in _order(graph, wanted):
            made[key] = _begin(executor, graph[key], graph, made)
        return _values(keys, made)
    except BaseException:
        for future in made.values():
            if isinstance(future, minipool.Future):
                future.cancel()
        raise


# ---- how ----


class _Call:
    """A task within a task, as it travels."""

    def __init__(self, fn: Callable[..., Any], args: list[Any]) -> None:
        self.fn, self.args = fn, args


def _is_task(item: Any) -> bool:
    return type(item) is tuple and bool(item) and callable(item[0])


def _is_key(item: Any, graph: Mapping[Any, Any]) -> bool:
    try:
        return item in graph
    except TypeError:                   # it cannot be hashed
        return False


def _flat(keys: Any) -> Iterator[Any]:
    for key in keys if isinstance(keys, list) else [keys]:
        yield from _flat(key) if isinstance(key, list) else [key]


def _values(keys: Any, made: dict[Any, Any]) -> Any:
    if isinstance(keys, list):
        return [_values(key, made) for key in keys]
    return made[keys].result() if isinstance(made[keys], minipool.Future) else made[keys]


def _needs(item: Any, graph: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the keys in a task, a list or an argument."""
    if _is_task(item) or isinstance(item, list):
        for part in item[_is_task(item):]:
            yield from _needs(part, graph)
    elif _is_key(item, graph):
        yield item


def _order(graph: Mapping[Any, Any], wanted: list[Any]) -> list[Any]:
    """Return the keys that are needed, each after those it needs."""
    needs: dict[Any, list[Any]] = {}
    unseen = list(wanted)
    while unseen:
        if (key := unseen.pop()) not in needs:
            needs[key] = list(_needs(graph[key], graph))
            unseen.extend(needs[key])
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        cycle = " needs ".join(repr(key) for key in reversed(error.args[1]))
        raise ValueError(f"the graph has a cycle: {cycle}") from None


def _filled(item: Any, graph: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
    """Return an argument with its keys replaced by what is made for them."""
    if _is_task(item):
        return _Call(item[0], [_filled(part, graph, made) for part in item[1:]])
    if isinstance(item, list):
        parts = [_filled(part, graph, made) for part in item]
        return _Call(_listed, parts) if any(isinstance(part, _Call) for part in parts) else parts
    return made[item] if _is_key(item, graph) else item


def _begin(executor: Executor, item: Any, graph: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
    call = _filled((_listed, *item) if isinstance(item, list) else item, graph, made)
    if not isinstance(call, _Call):
        return call
    if any(isinstance(part, _Call) for part in call.args):
        name = getattr(call.fn, "__qualname__", type(call.fn).__name__)
        return executor.options(name=name).submit(_evaluate, call)
    return executor.submit(call.fn, *call.args)


def _listed(*parts: Any) -> list[Any]:
    return list(parts)


def _evaluate(call: _Call) -> Any:
    """Run a task with those within it, in one job."""
    return call.fn(*(_evaluate(part) if isinstance(part, _Call) else part for part in call.args))


# ---- a small program ----


def add(x: float, y: float) -> float:
    """Add two numbers."""
    return x + y


def main() -> None:
    number = 16 if "--quick" in sys.argv else 1024
    graph: dict[Any, Any] = {("sum", 0, n): (pow, n, 2) for n in range(number)}
    level = 0
    while number > 1:                   # a tree: pairs are added, until one is left
        level, number = level + 1, number // 2
        graph |= {("sum", level, n): (add, ("sum", level - 1, 2 * n), ("sum", level - 1, 2 * n + 1))
                  for n in range(number)}
    with Executor() as ex:
        print(len(graph), "tasks:", get(graph, ("sum", level, 0), ex))


if __name__ == "__main__":
    main()
