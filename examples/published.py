"""Published values: they outlive the client that made them, and other clients get them by name.

Copy this file beside your program; workers need no copy. Only minipool's public calls are used.

    publish(ex, "weights", weights)             # one client, which may leave
    weights = get_published(ex, "weights")      # another, later
    published(ex)                               # ["weights"]
    unpublish(ex, "weights")

A value is kept by two workers, on two nodes if there are, so that it outlives either; whoever gets it, and finds a copy
missing, makes one anew. It is gone when both processes have ended before that: a worker ends for its crash, for
`job_timeout`, `kill`, `--max-tasks` or a restart. Two clients that publish one name at the same moment may both
succeed, with two values. `python examples/published.py` shows it.
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, WorkerDied

COPIES = 2      # workers that keep a value

# ---- in the workers ----


def _kept() -> dict[str, Any]:
    import minipool
    return vars(minipool).setdefault("_published", {})      # one for the process, whoever asks


def _names() -> list[str]:
    return list(_kept())


def _keep(name: str, value: Any) -> None:
    _kept()[name] = value


def _get(name: str) -> Any:
    return _kept()[name]


def _drop(name: str) -> None:
    _kept().pop(name, None)


# ---- in the client ----


def _nodes(executor: Executor) -> dict[str, str]:
    """Return the workers there are, with their nodes; wait for the first."""
    executor.wait_for_workers(1)
    return {worker["name"]: worker["node"] for worker in executor.info()["workers"] if worker["connected"]}


def _ask(executor: Executor, worker: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Have one worker answer now; LookupError if it ends meanwhile."""
    try:
        return executor.options(on=worker).run(fn, *args)[worker]
    except (WorkerDied, KeyError, ValueError):
        raise LookupError(worker) from None


def _holders(executor: Executor) -> dict[str, list[str]]:
    """Return by name which workers keep a value."""
    holders: dict[str, list[str]] = {}
    for worker in _nodes(executor):
        with contextlib.suppress(LookupError):
            for name in _ask(executor, worker, _names):
                holders.setdefault(name, []).append(worker)
    return holders


def _spread(executor: Executor, name: str, value: Any, there: list[str]) -> None:
    """Have as many workers keep a value as should, those of other nodes first."""
    node_of, there = _nodes(executor), list(there)
    others = sorted(set(node_of) - set(there))
    while len(there) < COPIES and others:
        taken = {node_of.get(worker) for worker in there}
        worker = min(others, key=lambda worker: node_of[worker] in taken)
        others.remove(worker)
        with contextlib.suppress(LookupError):
            _ask(executor, worker, _keep, name, value)
            there.append(worker)
    if not there:
        raise WorkerDied(f"every worker ended that was to keep {name!r}: publish it again")


def publish(executor: Executor, name: str, value: Any) -> None:
    """Keep a value in the pool under a name, as soon as there is a worker; KeyError if that is taken."""
    if not isinstance(name, str):
        raise TypeError(f"a name is text, not {name!r}")
    if name in _holders(executor):
        raise KeyError(f"{name!r} is published already: unpublish it first")
    _spread(executor, name, value, [])


def get_published(executor: Executor, name: str) -> Any:
    """Return a published value; KeyError if there is none of that name."""
    there = _holders(executor).get(name, [])
    for worker in list(there):
        try:
            value = _ask(executor, worker, _get, name)
        except LookupError:     # it has ended meanwhile
            there.remove(worker)
        else:
            _spread(executor, name, value, there)
            return value
    raise KeyError(f"nothing is published as {name!r}")


def unpublish(executor: Executor, name: str) -> None:
    """Forget a published value; KeyError if there is none of that name."""
    there = _holders(executor).get(name, [])
    if not there:
        raise KeyError(f"nothing is published as {name!r}")
    for worker in there:
        with contextlib.suppress(LookupError):
            _ask(executor, worker, _drop, name)


def published(executor: Executor) -> list[str]:
    """Return the names of all published values."""
    return sorted(_holders(executor))


# ---- a small program ----


def main() -> None:
    with Executor() as ex:
        publish(ex, "weights", [0.1, 0.2])
        print(published(ex), get_published(ex, "weights"))
        unpublish(ex, "weights")
        print(published(ex))


if __name__ == "__main__":
    main()
