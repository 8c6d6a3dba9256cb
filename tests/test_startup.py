"""benchmarks/startup.py runs whole programs and says how long they take beside minipool's; it judges nothing."""

import subprocess
import sys

import pytest
from processes import ROOT

sys.path.append(str(ROOT / "benchmarks"))       # at the end: nothing there may hide a module of the tests
import startup


def test_the_table_gives_medians_and_ratios():
    text = startup.table({"minipool": [2.0, 1.0, 9.0], "Dask LocalCluster": [5.0, 4.0, 6.0]})
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["1.00", "2.50"]
    assert "4.00 s" in text and "6.00 s" in text


def test_fewer_rounds_than_a_median_needs_are_refused():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/startup.py"), "--rounds", "2"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and "a median takes at least 3" in done.stderr


@pytest.mark.parametrize("name", [name for name in startup.PROGRAMS if "Dask" not in name])
def test_each_program_prints_its_result(name):
    assert startup.seconds(startup.PROGRAMS[name][1]) > 0


def test_a_program_that_fails_is_not_a_measurement():
    with pytest.raises(RuntimeError, match="(?s)the program printed '', not 1: .*ZeroDivisionError"):
        startup.seconds("1 / 0")
