"""What a call of a worker group costs, beside the jobs that it is made of.

    python benchmarks/groups.py [--ranks 4] [--calls 300] [--rounds 5]

One embedded pool with a worker per rank. In turn, in each round: an empty job and its result, as many at once as there
are ranks, and an empty method of a group (examples/worker_group.py) on all ranks. Prints medians over the rounds and
their ratios; of a call on N ranks at least N jobs' worth of processor time is to be expected where cores are few.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from worker_group import group

from minipool import Executor


class Nothing:
    """A rank whose method does nothing."""

    def nothing(self):
        """Do nothing."""


def nothing():
    """Do nothing."""


def microseconds(call, times):
    """Return the mean time of a call."""
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    with Executor("local", max_workers=options.ranks) as ex, group(ex, Nothing, options.ranks) as ranks:
        calls = {
            "one job": lambda: ex.submit(nothing).result(),
            f"{options.ranks} jobs": lambda: [f.result() for f in [ex.submit(nothing) for _ in range(options.ranks)]],
            f"a call on {options.ranks} ranks": lambda: ranks.call("nothing").get_results(),
        }
        for call in calls.values():
            microseconds(call, options.calls)       # warm
        times = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                times[name].append(microseconds(call, options.calls))
    one = statistics.median(times["one job"])
    print(f"{os.cpu_count()} cores, {options.ranks} ranks, medians of {options.rounds} rounds of {options.calls}")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:20} {middle:8.0f} us   {middle / one:5.2f} x one job   ({min(found):.0f} to {max(found):.0f})")


if __name__ == "__main__":
    main()
