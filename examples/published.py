"""Published values: they outlive the client that made them, and other clients get them by name.

Copy this file beside your program; workers need no copy. Only minipool's public calls are used.

    publish(ex, "weights", weights)             # one client, which may leave
    weights = get_published(ex, "weights")      # another, later
    published(ex)                               # ["weights"]
    unpublish(ex, "weights")

A value is kept by two workers, on two nodes if there are, so that it outlives either; whoever gets it finds the second
copy missing and makes one anew. It is gone when both end at once, or the pool is restarted. Two clients that publish
one name at the same moment may both succeed. `python examples/published.py` shows it.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor

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


def _holders(executor: Executor) -> dict[str, list[str]]:
    """Return by name which workers keep a value."""
    holders: dict[str, list[str]] = {}
    for worker, names in executor.run(_names).items():
        for name in names:
            holders.setdefault(name, []).append(worker)
    return holders


def _spread(executor: Executor, name: str, value: Any, there: list[str]) -> None:
    """Have as many workers keep a value as should, those of other nodes first."""
    node_of = {worker["name"]: worker["node"] for worker in executor.info()["workers"] if worker["connected"]}
    there = list(there)
    while len(there) < COPIES and (others := sorted(set(node_of) - set(there))):
        taken = {node_of.get(worker) for worker in there}
        there.append(min(others, key=lambda worker: node_of[worker] in taken))
        executor.options(on=there[-1]).run(_keep, name, value)


def publish(executor: Executor, name: str, value: Any) -> None:
    """Keep a value in the pool under a name; KeyError if that is taken."""
    if name in _holders(executor):
        raise KeyError(f"{name!r} is published already: unpublish it first")
    _spread(executor, name, value, [])


def get_published(executor: Executor, name: str) -> Any:
    """Return a published value; KeyError if there is none of that name."""
    there = _holders(executor).get(name)
    if not there:
        raise KeyError(f"nothing is published as {name!r}")
    value = executor.options(on=there[0]).run(_get, name)[there[0]]
    _spread(executor, name, value, there)
    return value


def unpublish(executor: Executor, name: str) -> None:
    """Forget a published value; KeyError if there is none of that name."""
    if name not in _holders(executor):
        raise KeyError(f"nothing is published as {name!r}")
    executor.run(_drop, name)


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
