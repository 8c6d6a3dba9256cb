"""The first result from nothing: a whole program that makes a pool of two, prints one result and ends.

    python benchmarks/startup.py [--rounds 5] [--json]

For each pool a fresh interpreter runs its program, in turn, so that what else the machine does hits all alike. Printed
are the median, lowest and highest wall time of each, from the start of the interpreter to its end, and how many times
as long as minipool's that is. What is not installed is left out. W6 of suite.py measures the same beside its other
workloads, and from the programs that the documentation of each pool recommends.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]

# per pool: the module it needs, and its program; all have two workers, but for the first, which has what it takes
PROGRAMS = {
    "minipool": ("cloudpickle", "import minipool; print(minipool.Executor().submit(abs, -1).result())"),
    "minipool, 2 workers": ("cloudpickle", "import minipool; print(minipool.Executor(2).submit(abs, -1).result())"),
    "ProcessPoolExecutor": ("concurrent", "from concurrent.futures import ProcessPoolExecutor\n"
                            "if __name__ == '__main__': print(ProcessPoolExecutor(2).submit(abs, -1).result())"),
    "ProcessPoolExecutor, spawn": (
        "concurrent", "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    print(ProcessPoolExecutor(2, mp_context=context).submit(abs, -1).result())"),
    "Dask LocalCluster": ("distributed", "from distributed import Client, LocalCluster\n"
                          "if __name__ == '__main__':\n"
                          "    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:\n"
                          "        with Client(cluster) as client:\n"
                          "            print(client.submit(abs, -1).result())"),
}
FLOOR = "bare interpreter"


def seconds(program: str) -> float:
    """Run a program in a fresh interpreter; return its wall time. Raises RuntimeError if it printed no 1."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MINIPOOL_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    taken = time.perf_counter() - begin
    if done.stdout != "1\n":
        raise RuntimeError(f"the program printed {done.stdout!r}, not 1: {done.stderr[-500:]}")
    return taken


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the wall times of each program that can run here."""
    programs = {FLOOR: "print(1)"} | {name: program for name, (module, program) in PROGRAMS.items()
                                      if importlib.util.find_spec(module)}
    for program in programs.values():
        seconds(program)                # once unmeasured: files come from memory afterwards
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            found[name].append(seconds(program))
    return found


def table(found: dict[str, list[float]]) -> str:
    first = statistics.median(found["minipool"])
    lines = [f"{'first result from nothing':28} {'median':>8} {'lowest':>8} {'highest':>8}   x minipool's"]
    for name, times in found.items():
        middle = statistics.median(times)
        lines.append(f"{name:28} {middle:6.2f} s {min(times):6.2f} s {max(times):6.2f} s   {middle / first:8.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, at least 3 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the times instead of the table")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds: a median takes at least 3")
    found = measure(options.rounds)
    print(json.dumps(found) if options.json else f"{machine.describe()}, {options.rounds} rounds\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
