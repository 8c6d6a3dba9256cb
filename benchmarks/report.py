"""What suite.py found, as text, as a page and as a plot. Here is no figure: all come from its JSON."""
from __future__ import annotations

import dataclasses
import json
import re
import statistics
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import CALIBRATION
from peers import OURS, PEERS
from workloads import WORKLOADS, Figure, Gate, Workload

NONE = "–"
NOTES = Path(__file__).with_name("notes.md")


@dataclasses.dataclass
class About:
    """Where, when and how one run was made."""
    machine: str
    date: str
    command: str
    rounds: int
    quick: bool
    versions: dict[str, str] = dataclasses.field(default_factory=dict)     # of each peer
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)      # peer -> why


@dataclasses.dataclass
class Part:
    """What one run found of one workload; what is compared is always of one part."""
    about: About
    seconds: float = 0                                                              # that it took
    load: list[float] = dataclasses.field(default_factory=list)                     # before and after, as is
    calibration: dict[str, list[float]] = dataclasses.field(default_factory=dict)   # what the machine could do
    figures: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)    # peer -> of each round
    failures: dict[str, str] = dataclasses.field(default_factory=dict)              # peer -> why

    def look(self, calibration: dict[str, float], load: float) -> None:
        """Note how the machine is now."""
        self.load.append(load)
        for name, value in calibration.items():
            self.calibration.setdefault(name, []).append(value)


@dataclasses.dataclass
class Results:
    """The parts by workload, of one run or of several."""
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)

    def values(self, workload: str, peer: str, key: str) -> list[float]:
        """One figure of all rounds; nothing if one failed or has no such figure."""
        part = self.parts[workload]
        rounds = part.figures.get(peer, [])
        if peer in part.failures or not all(key in figures for figures in rounds):
            return []
        return [figures[key] for figures in rounds]

    def median(self, workload: str, peer: str, key: str) -> float | None:
        values = self.values(workload, peer, key)
        return statistics.median(values) if values else None

    @property
    def quick(self) -> bool:
        return any(part.about.quick for part in self.parts.values())

    def runs(self) -> list[tuple[About, list[str]]]:
        """The runs that these are of, and which workloads each made."""
        found: list[tuple[About, list[str]]] = []
        for workload in done(self):
            about = self.parts[workload.name].about
            if about not in [other for other, _ in found]:
                found.append((about, []))
            next(names for other, names in found if other == about).append(workload.name)
        return found

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, paths: Sequence[Path], workloads: Collection[str] = WORKLOADS) -> Results:
        """Put several files together: of a workload that is in several, the last counts, and it alone."""
        results = cls()
        for path in paths:
            for name, part in json.loads(path.read_text())["parts"].items():
                if name in workloads:
                    results.parts[name] = Part(About(**part.pop("about")), **part)
        return results


# ---- ratios and gates ----

class Verdict(NamedTuple):
    workload: Workload
    gate: Gate
    ours: str               # which minipool
    value: float | None     # what the gate bounds; None: there is nothing to compare

    def reaches(self, bar: float | None) -> bool | None:
        """Whether it reaches the gate, or the aim; None where there is no such, or no figure."""
        return None if self.value is None or bar is None else self.gate.holds(self.value, bar)


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
                yield Verdict(workload, gate, ours, value)


def measured(results: Results, workload: Workload) -> list[str]:
    """The peers that were asked, whether they managed or not."""
    part = results.parts.get(workload.name)
    return [name for name in PEERS if part and name in {*part.figures, *part.failures}]


def done(results: Results) -> list[Workload]:
    return [workload for workload in WORKLOADS.values() if measured(results, workload)]


def missed(results: Results) -> list[Verdict]:
    """The gates that were judged and do not hold; a run with --quick judges none."""
    return [] if results.quick else [verdict for verdict in verdicts(results, done(results))
                                     if verdict.reaches(verdict.gate.gate) is False]


def brief(value: float | None) -> str:
    """A ratio with the digits that say something."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure_of(workload: Workload, key: str) -> Figure:
    return next(figure for figure in workload.figures if figure.key == key)


def subject(gate: Gate, workload: Workload) -> str:
    """What is bounded: `jobs/s, over those of ProcessPoolExecutor`."""
    title = figure_of(workload, gate.figure).title
    return f"{title}: minipool / {PEERS[gate.than].title}" if gate.than else title


def outcome(verdict: Verdict, quick: bool) -> str:
    """The figure, and what it reaches: `5.21 ×, met, aim missed`."""
    if verdict.value is None:
        return "nothing to compare"
    gate, aim = (verdict.reaches(bar) for bar in (verdict.gate.gate, verdict.gate.aim))
    words = [brief(verdict.value) + " ×" * bool(verdict.gate.than)]
    if not quick and gate is not None:
        words.append("met" if gate else "MISSED")
    if not quick and aim is not None and gate is not False:
        words.append("aim met" if aim else "aim missed")
    return ", ".join(words)


def tally(results: Results, ours: str) -> str:
    """How many gates and aims one minipool reaches: `minipool, TCP: 20 of 26 gates and 3 of 14 aims`."""
    mine = [verdict for verdict in verdicts(results, done(results)) if verdict.ours == ours]

    def share_of(what: str, reached: list[bool | None]) -> str:
        judged = [one for one in reached if one is not None]
        return f"{sum(judged)} of {len(judged)} {what}"

    return (f"{PEERS[ours].title}: {share_of('gates', [v.reaches(v.gate.gate) for v in mine])} and "
            f"{share_of('aims', [v.reaches(v.gate.aim) for v in mine])}")


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
        why = results.parts[workload.name].failures.get(peer)
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
    part = results.parts[workload.name]
    head = f"\n{workload.name}  {workload.title}{' (quick: much less of it)' * part.about.quick}; {part.seconds:.0f} s"
    gates = [(f"{PEERS[verdict.ours].title}: {subject(verdict.gate, workload)}", bars_text(verdict.gate),
              outcome(verdict, results.quick)) for verdict in verdicts(results, [workload])]
    return "\n".join([head, *aligned(table(results, workload)), *aligned(gates)])


def bars_text(gate: Gate) -> str:
    return ", ".join(f"{what} {gate.limit(bar)}" for what, bar in (("gate", gate.gate), ("aim", gate.aim))
                     if bar is not None)


def about_text(about: About) -> str:
    return "\n".join(["", *(f"  {PEERS[name].title:<24} {version}" for name, version in about.versions.items())])


def summary_text(results: Results) -> str:
    ratios = "\nratios: how many times as good minipool is; below 1 it is worse"
    if results.quick:
        return f"{ratios}. Quick: no gate is judged"
    lost = [f"  {verdict.workload.name} {PEERS[verdict.ours].title}: {subject(verdict.gate, verdict.workload)} "
            f"{verdict.gate.limit(verdict.gate.gate)}, is {brief(verdict.value)}" for verdict in missed(results)]
    tallies = [tally(results, ours) for ours in shown_ours(results)]
    return "\n".join([ratios, *tallies, *["missed:"] * bool(lost), *lost])


def shown_ours(results: Results) -> list[str]:
    return [name for name in OURS if any(name in measured(results, workload) for workload in done(results))]


# ---- the page ----

def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1),
            *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in body)]


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def gates_section(results: Results) -> list[str]:
    """Every gate in one table, a column for each minipool."""
    ours = shown_ours(results)
    rows = [["", "", "gate", "aim", *(PEERS[name].title for name in ours)]]
    for workload in done(results):
        for gate in workload.gates:
            cells = {verdict.ours: outcome(verdict, results.quick).replace("MISSED", "**missed**")
                     for verdict in verdicts(results, [workload]) if verdict.gate is gate}
            if cells:
                rows.append([workload.name, subject(gate, workload), gate.limit(gate.gate), gate.limit(gate.aim),
                             *(cells.get(name, NONE) for name in ours)])
    tallies = "; ".join(tally(results, name) for name in ours)
    text = ("Made with `--quick`, so no gate is judged, and no figure is worth quoting." if results.quick else
            f"What minipool is held to, and what it aims at. Reached: {tallies}. A figure with × is minipool's over "
            "the other's.")
    table = markdown_table(rows)
    table[1] = "| --- | --- | ---: | ---: |" + " ---: |" * len(ours)
    return ["## Gates", "", paragraph(text), "", *table, ""]


def how_section(results: Results) -> list[str]:
    text = ("Each figure comes from a process of its own, which opens a fresh pool of two workers (unless said), warms "
            "it up, measures once and ends; nothing else of the suite runs meanwhile. The rounds go from peer to peer "
            "and back. A cell is the median of the rounds, and in brackets the lowest and the highest. All pools have "
            "their defaults, but for what a table says; every result is checked. *Ratio* is how many times as good "
            "minipool is by the first column: above 1 it is better, below 1 worse. Pools that take long to start or "
            "to finish are left out where no gate compares with them. MB are millions of bytes, MiB 2^20.")
    lines = ["## How it was measured", "", paragraph(text), ""]
    for about, names in results.runs():
        versions = ", ".join(f"{PEERS[name].title} {version}" for name, version in about.versions.items())
        left_out = "".join(f" Left out: {PEERS[name].title} ({why})." for name, why in about.skipped.items())
        made = f"{', '.join(names)}: on {about.date}, {about.rounds} round{'s' * (about.rounds > 1)}; {about.machine}"
        lines += ["```sh", about.command, "```", "", paragraph(f"{made}. {versions}.{left_out}"), ""]
    text = "What the machine could do by itself was measured before and after each workload, and stands there as well."
    return [*lines, paragraph(text), "", *calibration_table(results), ""]


def calibration_table(results: Results) -> list[str]:
    rows = [["the machine by itself", "", "median", "lowest", "highest"]]
    for name, (title, unit, digits) in CALIBRATION.items():
        values = [value for part in results.parts.values() for value in part.calibration.get(name, [])]
        if values:
            rows.append([title, unit, *(f"{value:,.{digits}f}" for value in (
                statistics.median(values), min(values), max(values)))])
    return markdown_table(rows)


def beside(part: Part) -> str:
    """The machine while a workload was measured, in a sentence."""
    texts = [f"{CALIBRATION[name][0]} {', '.join(f'{value:,.{CALIBRATION[name][2]}f}' for value in values)} "
             f"{CALIBRATION[name][1]}" for name, values in part.calibration.items()]
    loads = ", ".join(f"{load:.1f}" for load in part.load)
    return f"The machine before and after: {'; '.join([*texts, f'load {loads}'])}. It took {part.seconds:.0f} s."


def read_notes() -> dict[str, list[str]]:
    """What people wrote of the figures: the lines of notes.md by workload."""
    _, *sections = re.split(r"^## (\S+)\n", NOTES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip().splitlines() for name, text in zip(sections[::2], sections[1::2])}


def workload_section(results: Results, workload: Workload, note: list[str]) -> list[str]:
    return [f"## {workload.name}: {workload.title}", "", paragraph(workload.about), "",
            *markdown_table(table(results, workload)), "", *note, *[""] * bool(note),
            paragraph(beside(results.parts[workload.name])), ""]


def write_page(results: Results, path: Path) -> None:
    """Write the page, and its plot beside it if there is matplotlib."""
    plot, notes = path.with_suffix(".svg"), read_notes()
    drawn = draw(results, plot)
    lines = ["# Performance", "", paragraph(
        "minipool beside other pools of processes, losses as plainly as wins. `benchmarks/suite.py` wrote this page; "
        "whoever doubts a figure can make it again."), "", *gates_section(results)]
    if drawn:
        lines += [f"![How many times as good minipool is as each of the others, per workload]({plot.name})", ""]
    lines += how_section(results)
    for workload in done(results):
        lines += workload_section(results, workload, notes.get(workload.name, []))
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


def needed(workload: Workload, peer: str) -> list[float]:
    """How many times as good as a peer minipool must be by what is drawn, where a gate says so."""
    first = workload.figures[0]
    return [gate.gate if first.more else 1 / gate.gate for gate in workload.gates
            if (gate.figure, gate.than) == (first.key, peer) and gate.gate]


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
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.7 * len(rows)), layout="constrained")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    for place, peer in enumerate(peers):
        lower = (place - (len(peers) - 1) / 2) * 0.1            # so that they do not hide each other
        for ours, marker, fill in ((OURS[0], "o", "full"), (OURS[1], "D", "none")):
            mine = [(ratio, row + lower) for row, which, name, ratio in shown if (which, name) == (ours, peer)]
            if mine:
                axes.plot(*zip(*mine), marker, color=f"C{place}", fillstyle=fill, markersize=5,
                          label=PEERS[peer].title if ours == OURS[0] else None)
        bars = [(bar, row + lower) for row, workload in enumerate(rows) for bar in needed(workload, peer)]
        axes.plot([bar for bar, _ in bars], [row for _, row in bars], "|", color=f"C{place}", markersize=12)
    labels = [textwrap.fill(f"{row.name}: {row.title.replace('`', '')}; {row.figures[0].title}", 36) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g} ×"))
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times as good minipool is: right of 1 better, left of it worse\n"
                    "filled: over TCP, hollow: embedded; a bar is the gate that the point of its colour must reach")
    figure.legend(loc="outside upper center", ncols=len(peers), frameon=False, columnspacing=1, handletextpad=0)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
