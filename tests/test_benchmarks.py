"""The benchmark suite runs, and says truly what it found. What it measures is not judged here, for a machine under test
is no place to measure."""

import argparse
import contextlib
import importlib.util
import re
import socket
import subprocess
import sys

import pytest
from processes import ROOT

import minipool

sys.path.append(str(ROOT / "benchmarks"))       # at the end: nothing there may hide a module of the tests
import machine
import models
import report
import suite
from peers import OURS, PEERS, Bare
from workloads import WORKLOADS

SUITE = str(ROOT / "benchmarks/suite.py")


def about(**changes):
    return report.About(**{"machine": "2 cores", "date": "2026-01-02", "command": "python suite.py", "rounds": 3,
                           "quick": False, "versions": {"ray": "9.9"}, **changes})


def part(figures, of=None, **failures):
    """A part with three rounds of each peer's figures, or with the rounds given as a list."""
    rounds = {peer: one if isinstance(one, list) else [one] * 3 for peer, one in figures.items()}
    return report.Part(of or about(), 7.0, [0.1, 0.2], {"start": [14.9, 15.1]}, rounds, failures)


def outcomes(workload, figures, **failures):
    """What is said of minipool's gates, by the peer or the figure that they name."""
    results = report.Results({workload: part(figures, **failures)})
    return {verdict.gate.than or verdict.gate.figure: report.outcome(verdict, results.quick)
            for verdict in report.verdicts(results, [WORKLOADS[workload]])}


class TestTheTable:
    @pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
    def test_every_gate_is_of_a_figure_and_a_peer_that_its_workload_measures(self, workload):
        assert {gate.figure for gate in workload.gates} <= {figure.key for figure in workload.figures}
        assert {gate.than for gate in workload.gates} - {""} <= {*workload.peers} <= {*PEERS}
        assert all(gate.gate is not None or gate.aim is not None for gate in workload.gates)

    @pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
    def test_quick_is_the_same_with_less_of_it(self, workload):
        assert workload.quick.keys() == workload.sizes.keys()


class TestVerdicts:
    def test_a_median_above_the_gate_and_below_the_aim(self):
        rounds = [{"rate": rate} for rate in (100, 500, 9000)]
        said = outcomes("W1", {"minipool": rounds, "processpool": {"rate": 100}})
        assert said["processpool"] == "5.00 ×, met, aim missed"

    def test_a_gate_that_is_missed_says_so_once_and_counts(self):
        results = report.Results({"W2": part({"minipool": {"p50": 2, "p99": 2}, "processpool": {"p50": 1, "p99": 2}})})
        assert [verdict.gate.figure for verdict in report.missed(results)] == ["p50"]
        assert report.outcome(report.missed(results)[0], quick=False) == "2.00 ×, MISSED"
        assert "minipool, TCP: 1 of 2 gates and 0 of 1 aims" in report.summary_text(results)

    def test_an_aim_without_a_gate(self):
        assert outcomes("W7b", {"minipool": {"on_128": 0.81}})["on_128"] == "0.81, aim met"

    def test_less_is_better_where_the_bound_is_from_above(self):
        said = outcomes("W5", {"minipool": {"seconds": 1, "starts": 20}, "dask": {"seconds": 5}})
        assert said == {"dask": "0.20 ×, met", "starts": "20.0, aim missed"}

    def test_a_peer_that_failed_or_was_not_asked_leaves_nothing_to_compare(self):
        said = outcomes("W6", {"minipool": {"seconds": 1}, "ray": {"seconds": 1}}, ray="it broke")
        assert said == {"dask": "nothing to compare", "ray": "nothing to compare"}

    def test_quick_figures_are_judged_by_nobody(self):
        results = report.Results({"W7b": part({"minipool": {"on_128": 0.1}}, about(quick=True))})
        assert not report.missed(results)
        assert [report.outcome(v, results.quick) for v in report.verdicts(results, report.done(results))] == ["0.10"]


class TestSeveralRuns:
    def test_a_workload_comes_whole_from_the_last_that_measured_it(self, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        report.Results({"W1": part({"minipool": {"rate": 1}, "ray": {"rate": 1}}),
                        "W9": part({"minipool": {"pss": 1}})}).write(first)
        report.Results({"W1": part({"minipool": {"rate": 2}}, about(command="again"))}).write(second)
        results = report.Results.read([first, second])
        assert results.values("W1", "minipool", "rate") == [2, 2, 2] and not results.values("W1", "ray", "rate")
        assert [(run.command, names) for run, names in results.runs()] == [("again", ["W1"]),
                                                                          ("python suite.py", ["W9"])]

    def test_a_file_is_added_to_but_never_with_quick_figures(self, tmp_path):
        report.Results({"W9": part({"minipool": {"pss": 1}})}).write(tmp_path / "f")
        assert "W9" in suite.earlier(argparse.Namespace(json=tmp_path / "f", quick=False)).parts
        with pytest.raises(SystemExit, match="--quick"):
            suite.earlier(argparse.Namespace(json=tmp_path / "f", quick=True))


class TestThePage:
    RESULTS = report.Results({
        "W1": part({"minipool": {"rate": 300}, "processpool": {"rate": 100}, "dask": {"rate": 1}}, dask="it broke"),
        "W2": part({"minipool": {"p50": 0.5, "p99": 1}, "bare": {"p50": 0.1, "p99": 0.2}},
                   about(command="another", skipped={"ray": "ray is not installed"}))})

    @pytest.fixture
    def page(self, tmp_path, monkeypatch):
        (tmp_path / "notes.md").write_text("For people.\n\n## W2\n\nThe profile shows *why*.\n")
        monkeypatch.setattr(report, "NOTES", tmp_path / "notes.md")
        report.write_page(self.RESULTS, tmp_path / "page.md")
        return (tmp_path / "page.md").read_text()

    def test_it_shows_gates_losses_and_what_failed(self, page):
        assert "| W1 | jobs/s: minipool / ProcessPoolExecutor | ≥ 4 × | ≥ 8 × | 3.00 ×, **missed** |" in page
        assert "| W2 | median, ms: minipool / bare relay |  | ≤ 1.5 × | 5.00 ×, aim missed |" in page
        assert "| Dask (failed: it broke) | – | – |" in page

    def test_it_says_how_it_was_made_on_which_machine(self, page):
        assert "python suite.py\n```\n\nW1: on 2026-01-02, 3 rounds; 2 cores. Ray 9.9." in page
        assert "another\n```\n\nW2: on" in page and "Left out: Ray (ray is not installed)." in page
        assert page.count("start and end of a bare interpreter 14.9, 15.1 ms; load 0.1, 0.2. It took 7 s.") == 2

    def test_a_note_stands_in_the_section_of_its_workload(self, page):
        assert "The profile shows *why*." in page.partition("\n## W2")[2] and "For people" not in page

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
    def test_its_plot_is_there(self, page, tmp_path):
        assert "](page.svg)" in page
        assert "W1: 10,000 trivial jobs" in (tmp_path / "page.svg").read_text()

    def test_notes_are_of_workloads_that_there_are(self):
        assert report.NOTES.exists() and {*report.read_notes()} <= {*WORKLOADS}


class TestWhatItComparesWith:
    def test_a_value_is_carried_in_ranges_and_checked(self):
        near, far = socket.socketpair()
        value = memoryview(bytes(range(256)) * 100)
        with near, far:
            machine.send_value(near, value)
            assert machine.receive_value(far) == value
            near.sendall(machine.SIZE.pack(3) + bytes(machine.DIGEST) + b"abc")
            with pytest.raises(ValueError, match="spoiled"):
                machine.receive_value(far)

    def test_the_bare_relay_answers_as_a_pool_does(self):
        with contextlib.ExitStack() as stack:
            bare = stack.enter_context(Bare(2))
            assert bare.gather([bare.submit(None, number) for number in range(3)]) == [0, 1, 2]
            assert bare.echo(None, b"x" * 300_000) == b"x" * 300_000

    def test_a_model_worker_says_what_a_worker_may_say(self):
        job, value = (b"session", 1), minipool.encode_value(models.ANSWER)
        said = models.answers([("welcome", {}), ("run", 7, job, job, b"", 0, {"say": True}),
                               ("run", 8, job, job, b"", 0, None), ("recall", [7])], value)
        assert [message[:2] for message in said] == [("started", 7), ("finished", 7), ("finished", 8),
                                                     ("recalled", [7])]
        for message in said:
            minipool.check_message(message, "worker")


def run_suite(folder, *arguments):
    done = subprocess.run([sys.executable, SUITE, "--quick", *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" not in done.stdout and "failed" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestTheSuite:
    def test_it_prints_ratios_between_minipool_and_a_peer(self, tmp_path):
        text = run_suite(tmp_path, "--only", "W1,W2", "--peers", "minipool,processpool")
        assert len(re.findall(r"^  ProcessPoolExecutor .* [\d.,]+ ×$", text, re.MULTILINE)) == 2
        assert "no gate is judged" in text

    @pytest.mark.long
    def test_every_figure_of_minipool_comes_out_of_short_runs_that_add_up(self, tmp_path):
        pytest.importorskip("numpy")
        common = "--json", "figures", "--markdown", "page.md", "--peers", ",".join((*OURS, "bare"))
        run_suite(tmp_path, "--only", "W3,W3b,W4,W5,W6", *common)
        run_suite(tmp_path, "--only", "W1b,W7,W8,W9,W10,W10b", *common)
        results = report.Results.read([tmp_path / "figures"])
        assert [len(names) for _, names in results.runs()] == [6, 5]
        large = {"on_8", "on_32", "queued_1000", "queued_10000", "alone_1000", "alone_10000", "slower_many"}
        large |= {f"{key}_{n}" for key in ("beside", "alone", "spread") for n in (200, 1000)}       # not with --quick
        for workload in report.done(results):
            for figure in workload.figures:
                assert results.values(workload.name, "minipool", figure.key) or figure.key in large, figure
        page = (tmp_path / "page.md").read_text()
        assert all(f"\n## {workload.name}: " in page for workload in report.done(results))
