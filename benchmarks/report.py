"""What suite.py found, as text, as a page and as a plot. Here is no figure: all come from a run's JSON."""
from __future__ import annotations

import dataclasses
import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import CALIBRATION
from peers import OURS, PEERS
from workloads import WORKLOADS, Figure, Gate, Workload

NONE = "–"


@dataclasses.dataclass
class About:
    """Where, when and how one run was made."""
    machine: str
    date: str
    command: str
    rounds: int
    quick: bool
    load: list[float]                                                       # at the begin and at the end
    versions: dict[str, str] = dataclasses.field(default_factory=dict)     # of each peer
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)      # peer -> why
    calibration: dict[str, list[float]] = dataclasses.field(default_factory=dict)   # begin and end


@dataclasses.dataclass
class Results:
    """The figures of one run, or of several that each made some of the workloads."""
    abouts: list[About]
    figures: dict[str, dict[str, list[dict[str, float]]]] = dataclasses.field(default_factory=dict)     # of each round
    failures: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)       # workload -> peer -> why

    def add(self, workload: str, peer: str, figures: dict[str, float]) -> None:
        self.figures.setdefault(workload, {}).setdefault(peer, []).append(figures)

    def fail(self, workload: str, peer: str, why: str) -> None:
        self.failures.setdefault(workload, {})[peer] = why

    def values(self, workload: str, peer: str, key: str) -> list[float]:
        """One figure of all rounds; nothing if one failed or has no such figure."""
        rounds = self.figures.get(workload, {}).get(peer, [])
        if peer in self.failures.get(workload, {}) or not all(key in figures for figures in rounds):
            return []
        return [figures[key] for figures in rounds]

    def median(self, workload: str, peer: str, key: str) -> float | None:
        values = self.values(workload, peer, key)
        return statistics.median(values) if values else None

    @property
    def quick(self) -> bool:
        return any(about.quick for about in self.abouts)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, paths: Sequence[Path], workloads: Sequence[str]) -> Results:
        """Put several files together; a workload comes whole from one of them, so that its ratios are of one run."""
        results = cls([])
        for path in paths:
            data = json.loads(path.read_text())
            results.abouts += [About(**about) for about in data["abouts"]]
            for name in {*data["figures"], *data["failures"]} & {*workloads}:
                results.figures[name] = data["figures"].get(name, {})
                results.failures[name] = data["failures"].get(name, {})
        return results


# ---- ratios and gates ----

class Verdict(NamedTuple):
    workload: Workload
    gate: Gate
    ours: str               # which minipool
    value: float | None     # what the gate bounds; None: there is nothing to compare
    holds: bool | None


def share(results: Results, workload: str, key: str, ours: str, than: str) -> float | None:
    """minipool's figure over another's, of the medians."""
    mine, theirs = (results.median(workload, peer, key) for peer in (ours, than))
    return mine / theirs if mine is not None and theirs is not None and theirs > 0 and mine > 0 else None


def advantage(results: Results, workload: Workload, figure: Figure, ours: str, than: str) -> float | None:
    """How many times as good minipool is: above 1 it is better, whether more is better or less."""
    ratio = share(results, workload.name, figure.key, ours, than)
    return ratio if ratio is None or figure.more else 1 / ratio


def verdicts(results: Results, workloads: Sequence[Workload]) -> Iterator[Verdict]:
    for workload in workloads:
        for gate in workload.gates:
            for ours in (name for name in OURS if name in measured(results, workload)):
                value = (share(results, workload.name, gate.figure, ours, gate.than) if gate.than
                         else results.median(workload.name, ours, gate.figure))
                yield Verdict(workload, gate, ours, value, None if value is None else gate.holds(value))


def measured(results: Results, workload: Workload) -> list[str]:
    """The peers that were asked, whether they managed or not."""
    asked = {*results.figures.get(workload.name, {}), *results.failures.get(workload.name, {})}
    return [name for name in PEERS if name in asked]


def done(results: Results) -> list[Workload]:
    return [workload for workload in WORKLOADS.values() if measured(results, workload)]


def missed(results: Results) -> list[Verdict]:
    """The gates that were judged and do not hold; a run with --quick judges none."""
    return [] if results.quick else [verdict for verdict in verdicts(results, done(results)) if verdict.holds is False]


def brief(value: float | None) -> str:
    """A ratio with the digits that say something."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure_of(workload: Workload, key: str) -> Figure:
    return next(figure for figure in workload.figures if figure.key == key)


def sentence(verdict: Verdict) -> str:
    """What is bounded, by what: `jobs/s ≥ 4 × ProcessPoolExecutor`."""
    than = f" {PEERS[verdict.gate.than].title}" if verdict.gate.than else ""
    return f"{figure_of(verdict.workload, verdict.gate.figure).title} {verdict.gate.limit()}{than}"


def outcome(verdict: Verdict, quick: bool) -> str:
    if verdict.value is None:
        return "nothing to compare"
    return brief(verdict.value) + (" ×" if verdict.gate.than else "") + (
        "" if quick else " met" if verdict.holds else " MISSED")


def cell(results: Results, workload: str, peer: str, figure: Figure) -> str:
    """The median, and the lowest and highest of the rounds."""
    values = results.values(workload, peer, figure.key)
    if not values:
        return NONE
    text = figure.form.format(statistics.median(values))
    low, high = figure.form.format(min(values)), figure.form.format(max(values))
    return text if low == high else f"{text} ({low} to {high})"


def table(results: Results, workload: Workload) -> list[list[str]]:
    """The rows of a workload, the head first: a peer's figures, and how many times as good minipool is."""
    peers = measured(results, workload)
    shown = [figure for figure in workload.figures
             if any(results.values(workload.name, peer, figure.key) for peer in peers)]
    ours = [name for name in OURS if name in peers] if set(peers) - set(OURS) else []
    rows = [["", *(figure.title for figure in shown), *(f"ratio: {PEERS[name].title}" for name in ours)]]
    for peer in peers:
        why = results.failures.get(workload.name, {}).get(peer)
        figures = [cell(results, workload.name, peer, figure) for figure in shown]
        ratios = [brief(advantage(results, workload, workload.figures[0], name, peer)) for name in ours]
        rows.append([PEERS[peer].title + (f" (failed: {why})" if why else ""), *figures,
                     *(NONE if peer in OURS else f"{ratio} ×" if ratio != NONE else NONE for ratio in ratios)])
    return rows


# ---- for the terminal ----

def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(text.rjust(width) if place else text.ljust(width)
                             for place, (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def workload_text(results: Results, workload: Workload) -> str:
    quick = " (quick: much less of it)" if results.quick else ""
    lines = [f"\n{workload.name}  {workload.title}{quick}", *aligned(table(results, workload))]
    gates = [(f"gate: {PEERS[verdict.ours].title}: {sentence(verdict)}", outcome(verdict, results.quick))
             for verdict in verdicts(results, [workload])]
    return "\n".join(lines + aligned(gates))


def about_text(about: About) -> str:
    lines = ["", *(f"  {PEERS[name].title:<24} {version}" for name, version in about.versions.items()), ""]
    for name, values in about.calibration.items():
        title, unit, digits = CALIBRATION[name]
        lines.append(f"  {title:<68} {statistics.median(values):10,.{digits}f} {unit}")
    return "\n".join(lines)


def summary_text(results: Results) -> str:
    if results.quick:
        return "\nratios: how many times as good minipool is; below 1 it is worse. Quick: no gate is judged"
    judged = [verdict for verdict in verdicts(results, done(results)) if verdict.holds is not None]
    lost = [f"  {verdict.workload.name} {PEERS[verdict.ours].title}: {sentence(verdict)}, is {brief(verdict.value)}"
            for verdict in missed(results)]
    return "\n".join([f"\nratios: how many times as good minipool is; below 1 it is worse. "
                      f"{len(judged) - len(lost)} of {len(judged)} gates are met{'; missed:' * bool(lost)}", *lost])


# ---- the page ----

def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1),
            *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in body)]


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def gates_section(results: Results) -> list[str]:
    """Every gate in one table, a row for both minipools."""
    found = list(verdicts(results, done(results)))
    ours = [name for name in OURS if any(verdict.ours == name for verdict in found)]
    rows = [["", "gate", *(PEERS[name].title for name in ours)]]
    for workload in done(results):
        for gate in workload.gates:
            mine = [verdict for verdict in found if verdict.workload is workload and verdict.gate is gate]
            cells = {verdict.ours: outcome(verdict, results.quick).replace("MISSED", "**missed**") for verdict in mine}
            if mine:
                rows.append([workload.name, sentence(mine[0]), *(cells.get(name, NONE) for name in ours)])
    judged = [verdict for verdict in found if verdict.holds is not None]
    held = sum(bool(verdict.holds) for verdict in judged)
    text = ("Made with `--quick`, so no gate is judged, and no figure is worth quoting." if results.quick else
            f"What minipool is held to: {held} of {len(judged)} are met, {len(judged) - held} missed. A figure with × "
            "is minipool's over the other's.")
    table = markdown_table(rows)
    table[1] = "| --- | --- |" + " ---: |" * len(ours)
    return ["## Gates", "", paragraph(text), "", *table, ""]


def how_section(results: Results) -> list[str]:
    text = ("Each figure comes from a process of its own, which opens a fresh pool of two workers (unless said), warms "
            "it up, measures once and ends; nothing else of the suite runs meanwhile. The rounds go from peer to peer "
            "and back. A cell is the median of the rounds, and in brackets the lowest and the highest. All pools have "
            "their defaults, but for what a table says; every result is checked. *Ratio* is how many times as good "
            "minipool is by the first column: above 1 it is better, below 1 worse.")
    lines = ["## How it was measured", "", paragraph(text), ""]
    for about in results.abouts:
        versions = ", ".join(f"{PEERS[name].title} {version}" for name, version in about.versions.items())
        left_out = "".join(f" Left out: {PEERS[name].title} ({why})." for name, why in about.skipped.items())
        loads = " at the begin, ".join(f"{load:.1f}" for load in about.load)
        made = f"On {about.date}, {about.rounds} round{'s' * (about.rounds > 1)}; {about.machine}"
        lines += ["```sh", about.command, "```", "",
                  paragraph(f"{made}; load {loads} at the end. {versions}.{left_out}"), ""]
        lines += [*calibration_table(about), ""]
    return lines


def calibration_table(about: About) -> list[str]:
    """What the machine could do at best, at the begin of the run and at its end."""
    rows = [["the machine by itself", "", "at the begin", "at the end"]]
    for name, values in about.calibration.items():
        title, unit, digits = CALIBRATION[name]
        rows.append([title, unit, f"{values[0]:,.{digits}f}", f"{values[-1]:,.{digits}f}"])
    return markdown_table(rows)


def workload_section(results: Results, workload: Workload) -> list[str]:
    lines = [f"## {workload.name}: {workload.title}", "", paragraph(workload.about), "",
             *markdown_table(table(results, workload)), ""]
    gates = [f"- {PEERS[verdict.ours].title}: {sentence(verdict)}: "
             f"{outcome(verdict, results.quick).replace('MISSED', '**missed**')}"
             for verdict in verdicts(results, [workload])]
    return lines + gates + [""] * bool(gates)


def write_page(results: Results, path: Path) -> None:
    """Write the page, and its plot beside it if there is matplotlib."""
    plot = path.with_suffix(".svg")
    drawn = draw(results, plot)
    lines = ["# Performance", "", paragraph(
        "minipool beside other pools of processes, losses as plainly as wins. `benchmarks/suite.py` wrote this page; "
        "whoever doubts a figure can make it again."), "", *gates_section(results)]
    if drawn:
        lines += [f"![How many times as good minipool is as each of the others, per workload]({plot.name})", ""]
    lines += how_section(results)
    for workload in done(results):
        lines += workload_section(results, workload)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


# ---- the plot ----

def points(results: Results) -> list[tuple[int, str, str, float]]:
    """Row, which minipool, peer, how many times as good: what the plot shows."""
    found: list[tuple[int, str, str, Any]] = []
    for row, workload in enumerate(drawable(results)):
        for ours in OURS:
            found += [(row, ours, peer, advantage(results, workload, workload.figures[0], ours, peer))
                      for peer in measured(results, workload) if peer not in OURS]
    return [point for point in found if point[3]]


def drawable(results: Results) -> list[Workload]:
    return [workload for workload in done(results) if set(measured(results, workload)) - set(OURS)]


def draw(results: Results, path: Path) -> bool:
    """Draw one row per workload and one colour per peer on a logarithmic scale; return whether it could be done."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "minipool", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter
    shown, rows = points(results), drawable(results)
    if not shown:
        return False
    peers = [name for name in PEERS if any(point[2] == name for point in shown)]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    for place, peer in enumerate(peers):
        for ours, marker, fill in ((OURS[0], "o", "full"), (OURS[1], "D", "none")):
            mine = [(ratio, row) for row, which, name, ratio in shown if (which, name) == (ours, peer)]
            if mine:
                axes.plot(*zip(*mine), marker, color=f"C{place}", fillstyle=fill, markersize=6,
                          label=PEERS[peer].title if ours == OURS[0] else None)
    labels = [textwrap.fill(f"{row.name}: {row.title.replace('`', '')}; {row.figures[0].title}", 36) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g} ×"))
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times as good minipool is: right of 1 better, left of it worse\n"
                    "filled: over TCP, hollow: embedded")
    figure.legend(loc="outside upper center", ncols=len(peers), frameon=False, columnspacing=1, handletextpad=0)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
