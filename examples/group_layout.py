"""Who sits where in a worker group: ranks on named axes, on workers, in replicas; what worker_group.py computes first.

Nothing here talks to the pool.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any


class NamedSharding:
    """Ranks laid out on named axes: NamedSharding([[0, 1], [2, 3]], ["dp", "tp"])."""

    def __init__(self, layout: Any, names: Sequence[str]) -> None:
        def as_lists(part: Any) -> Any:
            if isinstance(part, list | tuple):
                return [as_lists(inner) for inner in part]
            if part != int(part):
                raise ValueError(f"a rank is an integer, not {part!r}")
            return int(part)

        def measure(part: Any) -> tuple[int, ...]:
            shapes = {measure(inner) for inner in part} if isinstance(part, list) else {()}
            if len(shapes) != 1:
                raise ValueError("the layout is ragged or empty")
            return (len(part), *shapes.pop()) if isinstance(part, list) else ()

        self._layout = as_lists(layout.tolist() if hasattr(layout, "tolist") else layout)
        self.names, sizes = list(names), measure(self._layout)
        if len(sizes) != len(self.names) or len(set(self.names)) != len(self.names):
            raise ValueError(f"a layout of {len(sizes)} dimensions needs as many different names, not {self.names}")
        self.shape = dict(zip(self.names, sizes, strict=True))
        places = itertools.product(*map(range, sizes))
        self._coords = {functools.reduce(operator.getitem, place, self._layout): place for place in places}
        self.ndim, self.size = len(sizes), len(self._coords)
        if self.size != functools.reduce(operator.mul, sizes, 1):
            raise ValueError("a rank is in the layout twice")

    @property
    def layout(self) -> Any:
        """A copy of the layout, as nested lists."""
        return self.get_ranks()._layout

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedSharding) and (self._layout, self.names) == (other._layout, other.names)

    __hash__ = None     # type: ignore[assignment]  # its lists may be changed

    def __repr__(self) -> str:
        return f"NamedSharding({self._layout}, {self.names})"

    def get_axis_index(self, axis: str) -> int:
        """Return the place of an axis; ValueError if there is none of that name."""
        if axis not in self.shape:
            raise ValueError(f"there is no axis {axis!r}; there are {', '.join(self.names)}")
        return self.names.index(axis)

    def get_axis_size(self, axis: str) -> int:
        """Return how many ranks lie along an axis."""
        return self.shape[self.names[self.get_axis_index(axis)]]

    def get_worker_coords(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinates by axis; ValueError if it is not in the layout."""
        if rank not in self._coords:
            raise ValueError(f"rank {rank} is not in the layout")
        return dict(zip(self.names, self._coords[rank], strict=True))

    def get_ranks_by_coord(self, **coords: int) -> list[int]:
        """Return the ranks at these coordinates, sorted; none if one is out of range."""
        wanted = {self.get_axis_index(axis): at for axis, at in coords.items()}
        return sorted(rank for rank, place in self._coords.items() if all(place[i] == at for i, at in wanted.items()))

    def get_ranks(self, **coords: int) -> Any:
        """Return the sharding of the ranks at these coordinates, or the rank if all are given; IndexError if none."""
        for axis, at in coords.items():
            if not 0 <= at < self.get_axis_size(axis):
                raise IndexError(f"{axis} is 0 to {self.shape[axis] - 1}, not {at}")

        def part(layout: Any, axes: list[str]) -> Any:
            if not axes:
                return layout
            inner = [part(below, axes[1:]) for below in layout]
            return inner[coords[axes[0]]] if axes[0] in coords else inner
        ranks, left = part(self._layout, self.names), [axis for axis in self.names if axis not in coords]
        return NamedSharding(ranks, left) if left else ranks


def workers_by_node(workers: list[dict[str, Any]], on: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the workers that can be given jobs (`on`: only these workers, nodes or tags) by node, in natural order."""
    able = [w for w in workers if w["connected"] and w["state"] in ("idle", "busy")
            and (not on or on & {w["name"], *w["tags"]})]
    able.sort(key=lambda w: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", w["name"])])
    nodes: dict[str, list[dict[str, Any]]] = {}
    for worker in able:
        nodes.setdefault(worker["node"], []).append(worker)
    return nodes


def choose(nodes: dict[str, list[dict[str, Any]]], per_node: int | Sequence[int] | None,
           size: int | None) -> list[dict[str, Any]]:
    """Return the workers of ranks 0, 1, ..., node after node; fewer than `size` if there are not enough."""
    if per_node is None:
        return list(itertools.chain(*nodes.values()))[:size]
    each = [per_node] * len(nodes) if isinstance(per_node, int) else list(per_node)
    if len(each) != len(nodes):
        raise ValueError(f"per_node has {len(each)} numbers for {len(nodes)} nodes")
    for number, (node, workers) in zip(each, nodes.items(), strict=True):
        if not isinstance(number, int) or not 0 <= number <= len(workers):
            raise ValueError(f"per_node wants {number} ranks on {node}, which has {len(workers)} workers")
    if size not in (None, sum(each)):
        raise ValueError(f"per_node={per_node} makes {sum(each)} ranks, not {size}")
    return [worker for number, workers in zip(each, nodes.values(), strict=True) for worker in workers[:number]]


def describe(what: str, places: list[dict[str, Any]], tied: Sequence[Sequence[int]] | None) -> list[dict[str, Any]]:
    """Return what is known of each rank: its name, worker, device, node, slot there, replica and place in that.

    `bundle_indices`, the node and the slots of a whole replica, is for its first rank, the leader, only.
    """
    nodes, slots = list(dict.fromkeys(place["node"] for place in places)), list[int]()
    for rank, place in enumerate(places):
        slots.append(sum(other["node"] == place["node"] for other in places[:rank]))
    metadata: list[dict[str, Any]] = [{}] * len(places)
    for replica, ranks in enumerate(tied or [[rank] for rank in range(len(places))]):
        for position, rank in enumerate(ranks):
            place, node = places[rank], nodes.index(places[rank]["node"])
            name = f"grp{replica}-{position}" if tied else f"{node}-{slots[rank]}"
            metadata[rank] = {
                "name": f"{what}-{name}", "global_rank": rank, "local_rank": position, "dp_shard_idx": replica,
                "node_idx": node, "slot": slots[rank], "worker": place["name"], "device": place["device"],
                "bundle_indices": (node, [slots[other] for other in ranks]) if position == 0 else None}
    return metadata


def environment(metadata: list[dict[str, Any]], rank: int, env: dict[str, str] | None, address: str,
                port: str) -> dict[str, str]:
    """Return a rank's variables; the caller's give way to those of the rank."""
    here = metadata[rank]
    alone = here["device"].startswith("cuda")       # it sees one device, and libraries index it by LOCAL_RANK
    on_node = sum(other["node_idx"] == here["node_idx"] for other in metadata)
    own = {"RANK": rank, "WORLD_SIZE": len(metadata), "NODE_RANK": here["node_idx"], "MASTER_ADDR": address,
           "MASTER_PORT": port, "LOCAL_RANK": 0 if alone else here["slot"], "LOCAL_WORLD_SIZE": 1 if alone else on_node}
    return {name: str(value) for name, value in {**(env or {}), **own}.items()}
