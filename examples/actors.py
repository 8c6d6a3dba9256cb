"""An actor and a pool: objects that live in worker processes from one job to the next.

    python examples/actors.py

Looks for the minimum of a function by chance. A Pool has one Search in every worker; whenever a better place is found,
all of them are told between two of their jobs, late workers too. An actor, one object in one worker, keeps the scores.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, Pool, WorkerInterface


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
        scores = ex.actor(Scores)
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
