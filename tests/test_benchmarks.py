"""The benchmark suite runs: what it measures is not judged here, for a machine under test is no place to measure."""

import re
import subprocess
import sys

import pytest
from processes import ROOT

SUITE = str(ROOT / "benchmarks/suite.py")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_suite_prints_ratios_between_minipool_and_a_peer(tmp_path):
    command = [sys.executable, SUITE, "--quick", "--only", "W1,W2", "--peers", "minipool,processpool"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" not in done.stdout
    assert len(re.findall(r"^  ProcessPoolExecutor .* [\d.,]+ ×$", done.stdout, re.MULTILINE)) == 2
    assert "no gate is judged" in done.stdout
