"""minipool beside its peers, one workload after the other, in one run on one machine.

    python benchmarks/suite.py --quick --only W1,W2 --peers minipool,processpool            # half a minute
    python benchmarks/suite.py --json suite.json --markdown docs/performance.md             # 25 minutes
    python benchmarks/suite.py --only W2,W4m --json suite.json --markdown docs/performance.md   # some of it anew
    python benchmarks/suite.py --from suite.json --markdown docs/performance.md             # the page again, from that

Peers: minipool over TCP and embedded, ProcessPoolExecutor, multiprocessing.Pool, loky, Dask with and without its
queuing, Ray. One that is not installed is left out, with the reason. `pip install loky 'dask[distributed]' ray numpy
matplotlib` gets all of it.

A JSON that is there is added to: the workloads that are measured replace what it has of them, whole, and the page is
made of all. So it can come from several short runs; it says which figures are of which. What is to be said beside
figures (why a gate is missed, say) stands in notes.md. Workloads marked optional are measured only if --only names
them: W4m, a million jobs, takes minutes.

Each figure comes from a process of its own, which opens a fresh pool, warms it up, measures once and ends; nothing
else of ours runs meanwhile. The rounds go from peer to peer and back, so that whatever else the machine does falls on
all of them alike, and medians count. Exit status 1 if minipool failed at a workload, or a gate was missed (--quick
judges no gate: so little of everything says nothing).
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import datetime
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import report
from peers import OURS, PEERS, ROOT
from workloads import NO_SHARED_MEMORY, WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
PR_SET_CHILD_SUBREAPER = 36
GRACE = 3.0         # seconds for what a pool leaves behind to end by itself, before it is ended here
CLOSING = 20.0      # seconds for a pool to close; a broken one may well hang there


class Failed(Exception):
    """A measurement gave no figures; the text says why."""


# ---- processes ----

def adopt_orphans() -> None:
    """Become the parent of whatever a pool leaves behind: so it is found, and nobody else's is ever touched."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace: float) -> int:
    """Wait a while for all our descendants to end, then kill them; return how many that took."""
    give_up, killed = time.monotonic() + grace, set()
    while left := living():
        if time.monotonic() > give_up:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(0.05)
    return len(killed)


def living() -> list[int]:
    """Our descendants, after those of them that are dead were buried."""
    for pid in machine.children(os.getpid()):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return machine.descendants(os.getpid())


def environment(folder: str, workload: Workload) -> dict[str, str]:
    """No GPU, for a pool would start a worker for each; no address or secret of a real pool; temporary files here.

    Bytecode is kept for the whole run, whatever the user's setting: a checkout that every process compiles anew would
    be compared with packages that pip compiled, in time (0.1 s a process) as in memory (13 MiB a process).
    """
    left_out = ("MINIPOOL_ADDRESS", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE", "RAY_ADDRESS", "DASK_CONFIG",
                "PYTHONDONTWRITEBYTECODE", *NO_SHARED_MEMORY)
    ours = {name: value for name, value in os.environ.items() if name not in left_out}
    return ours | {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": folder, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0",
                   "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPYCACHEPREFIX": bytecode()} | workload.environment


@functools.cache
def bytecode() -> str:
    """A folder for this run's bytecode, removed at exit."""
    folder = tempfile.mkdtemp(prefix="bench-bytecode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def measure(workload: Workload, peer: str, sizes: dict[str, Any], limit: float) -> dict[str, float]:
    """Run workloads.py once; return its figures. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        answer, log = Path(folder, "answer"), Path(folder, "log")
        command = [sys.executable, str(HERE / "workloads.py"), workload.name, peer, json.dumps(sizes), str(answer)]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment(folder, workload), stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output)
        try:
            ended = wait_for(process, answer, limit)
        finally:
            process.kill()
            process.wait()
            left = end_descendants(GRACE)
        if left:
            print(f"{workload.name}: {PEERS[peer].title} left {left} processes behind", file=sys.stderr, flush=True)
        if answer.exists():
            return json.loads(answer.read_text())
        raise Failed(last_line(log) or f"ended with status {process.returncode}" if ended else
                     f"took longer than {limit:g} s")


def wait_for(process: subprocess.Popen[bytes], answer: Path, limit: float) -> bool:
    """Wait for the end of a measurement, not as long for what it does after its answer; return whether it ended."""
    give_up, answered = time.monotonic() + limit, False
    while process.poll() is None and time.monotonic() < give_up:
        if not answered and answer.exists():
            give_up, answered = time.monotonic() + CLOSING, True
        time.sleep(0.02)
    return process.poll() is not None


def last_line(log: Path) -> str:
    """What a failed measurement said last, without colours and without the folders of this machine."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]) if lines else ""
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", plain)[:200]


# ---- the run ----

class Run:
    """One run of the suite: what is asked for, and what came out so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.about = report.About(machine.describe(), datetime.date.today().isoformat(), command(), options.rounds,
                                  options.quick)
        self.results = earlier(options)
        self.peers: list[str] = []      # those that are installed

    def find_peers(self) -> None:
        wanted = {name for workload in self.options.only for name in WORKLOADS[workload].peers}
        for name in self.options.peers:
            try:
                version = PEERS[name].version() if name in wanted else ""
                self.about.versions |= {name: version} if version else {}
                self.peers.append(name)
            except ImportError as error:        # as is PackageNotFoundError
                self.about.skipped[name] = f"{error.name} is not installed"
                print(f"{PEERS[name].title} is left out: {self.about.skipped[name]}", flush=True)

    def workload(self, workload: Workload, calibration: dict[str, float]) -> dict[str, float]:
        """All rounds of one workload; a peer that failed is not asked again, for it may have taken minutes.

        `calibration` is of before; returns that of after, which is the next one's.
        """
        begin, part = time.monotonic(), report.Part(self.about)
        part.look(calibration, os.getloadavg()[0])
        peers = [name for name in self.peers if name in workload.peers]
        sizes = workload.quick if self.options.quick else workload.sizes
        for turn in range(self.options.rounds):
            for name in peers[::-1 if turn % 2 else 1]:
                if name not in part.failures:
                    self.once(part, workload, name, sizes, turn)
        part.seconds = time.monotonic() - begin
        calibration = machine.calibrate(self.options.quick)
        part.look(calibration, os.getloadavg()[0])
        self.results.parts[workload.name] = part
        return calibration

    def once(self, part: report.Part, workload: Workload, peer: str, sizes: dict[str, Any], turn: int) -> None:
        place = f"{workload.name}, round {turn + 1} of {self.options.rounds}: {PEERS[peer].title}"
        if sys.stderr.isatty():
            print(f"\r\033[K{place} ...", end="", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            part.figures.setdefault(peer, []).append(measure(workload, peer, sizes, self.options.limit))
        except Failed as error:
            part.failures[peer] = str(error)
            print(f"{place} failed: {error}", file=sys.stderr, flush=True)
        finally:
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            if self.options.verbose:
                print(f"{place}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def earlier(options: argparse.Namespace) -> report.Results:
    """What the JSON has already, which this run adds to."""
    if not (options.json and options.json.exists()):
        return report.Results()
    results = report.Results.read([options.json])
    if results.parts and results.quick != options.quick:
        raise SystemExit(f"{options.json.name}: was made {'with' if results.quick else 'without'} --quick")
    return results


def command() -> str:
    """What was typed, but for where on this machine things are."""
    arguments = [os.path.basename(text) if os.path.isabs(text) else text for text in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/suite.py", *arguments])


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what was started as well."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):      # a second one would leave processes behind
            signal.signal(number, signal.SIG_IGN)
        end_descendants(0)


def run(options: argparse.Namespace) -> report.Results:
    with tidy():
        one, begin = Run(options), time.monotonic()
        print(f"{machine.describe()}, load {os.getloadavg()[0]:.1f}{', quick' if options.quick else ''}", flush=True)
        one.find_peers()
        print(report.about_text(one.about), flush=True)
        calibration = machine.calibrate(options.quick)
        for name in options.only:
            calibration = one.workload(WORKLOADS[name], calibration)
            print(report.workload_text(one.results, WORKLOADS[name]), flush=True)
            if options.json:
                one.results.write(options.json)     # after each: the run is long
        print(f"\nit took {(time.monotonic() - begin) / 60:.1f} minutes")
        return one.results


# ---- the command ----

def names(known: Any) -> Any:
    """A type for argparse: names separated by commas, in the known order."""
    def read(text: str) -> list[str]:
        unknown = sorted(set(text.split(",")) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
        return [name for name in known if name in text.split(",")]

    return read


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name, workload in WORKLOADS.items() if not workload.optional]
    parser.add_argument("--only", type=names(WORKLOADS), metavar="W1,W2",
                        help=f"workloads: {', '.join(WORKLOADS)} (default: {', '.join(usual)})")
    parser.add_argument("--peers", type=names(PEERS), default=list(PEERS), metavar="P,P", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, help="their median counts (default: 3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="everything much smaller, only to see that it works")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one measurement (default: %(default)g)")
    parser.add_argument("--json", type=Path, metavar="F", help="add every round's figures to this file")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the page here, and its plot beside it")
    parser.add_argument("--from", type=Path, nargs="+", metavar="F", dest="sources",
                        help="measure nothing: take what --json wrote; of a workload in several files the last counts")
    parser.add_argument("-v", "--verbose", action="store_true", help="say how long each measurement took")
    options = parser.parse_args()
    options.only = options.only or list(WORKLOADS if options.sources else usual)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> int:
    options = parse()
    if options.sources:
        results = report.Results.read(options.sources, options.only)
        for workload in report.done(results):
            print(report.workload_text(results, workload))
    else:
        results = run(options)
    print(report.summary_text(results))
    if options.markdown:
        report.write_page(results, options.markdown)
        print(f"written: {os.path.relpath(options.markdown, ROOT)}")
    failures = [names for part in results.parts.values() for names in (part.failures, part.about.skipped)]
    failed = any(name in OURS for names in failures for name in names)
    return int(failed or bool(report.missed(results)))


if __name__ == "__main__":
    raise SystemExit(main())
