"""Progress (examples/progress.py): a bar that tells how many futures are done, and ends when it should."""

import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from processes import ROOT

sys.path.append(str(ROOT / "examples"))
from progress import Tally, elapsed, line, markup, progress

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

FULL = "[########################################] | 100% Completed |"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


def shown(*futures, file=None, **options):
    """Return what the plain bar of these futures writes."""
    file = io.StringIO() if file is None else file
    progress(*futures, plain=True, file=file, **options)
    return file.getvalue()


class TestPlain:
    def test_of_three_jobs_it_ends_full_row_3_30(self, pool):
        futures = [pool.submit(abs, -n) for n in range(3)]
        assert re.fullmatch(re.escape(FULL) + r" +\d+\.\ds\n", shown(futures))
        assert all(future.done() for future in futures)

    def test_at_a_terminal_it_is_redrawn_on_its_line(self, pool, gate):
        class Opening(Terminal):
            def write(self, text):
                if "50%" in text:
                    gate.open()         # it was drawn half full: now the rest may end
                return super().write(text)
        text = shown([pool.submit(abs, 1), pool.submit(wait_for, gate.path)], file=Opening())
        assert "\r[####################                    ] | 50% Completed | " in text
        assert text.count("\n") == 1 and FULL in text.rpartition("\r")[2]

    def test_of_nothing_everything_is_done(self):
        assert FULL in shown([])

    def test_it_returns_at_the_first_error_and_leaves_it_to_the_future(self, pool, gate):
        waiting, wrong = pool.submit(wait_for, gate.path), pool.submit(divmod, 1, 0)
        assert "| 50% Completed |" in shown(waiting, wrong)
        assert not waiting.done() and type(wrong.exception()) is ZeroDivisionError

    def test_a_cancelled_future_is_done(self, own_pool, gate):
        ex = own_pool(1)
        ex.submit(wait_for, gate.path)
        future = ex.submit(abs, 1)
        assert future.cancel() and FULL in shown([future])

    def test_nests_and_generators_and_doubles_are_counted_once(self, pool):
        future = pool.submit(abs, 1)
        assert FULL in shown(future, [[future], (pool.submit(abs, n) for n in range(3))], {"a": future}.values())

    def test_futures_of_any_executor_mix(self, pool):
        with ThreadPoolExecutor(2) as threads:
            assert FULL in shown([pool.submit(abs, 1), threads.submit(abs, 1)])
        settled = Future()
        settled.set_result(None)
        assert FULL in shown(settled)

    def test_what_is_no_future_is_a_type_error(self, pool):
        with pytest.raises(TypeError, match="takes futures, or iterables of them, not int"):
            progress([pool.submit(abs, 1), 5])

    @pytest.mark.parametrize("seconds, text", [(1.74, " 1.7s"), (180.2, " 3min  0.2s"), (3605, " 1hr  0min  5.0s")])
    def test_durations_are_written_so(self, seconds, text):
        assert elapsed(seconds) == text

    def test_the_percentage_is_rounded_down(self):
        assert "| 99% Completed |" in line(999, 1000, 1) and "| 100% " in line(1000, 1000, 1)


class TestByTqdm:
    def test_where_it_is_installed_it_draws(self, pool):
        pytest.importorskip("tqdm")
        file = io.StringIO()
        progress([pool.submit(abs, -n) for n in range(3)], file=file)
        assert "3/3" in file.getvalue() and "100%" in file.getvalue()

    def test_where_it_is_not_the_plain_bar_does(self, run_script):
        done = run_script(f"""
import sys
sys.modules["tqdm"] = None
sys.path.append({str(ROOT / 'examples')!r})
from concurrent.futures import ThreadPoolExecutor
from progress import progress
with ThreadPoolExecutor() as ex:
    progress([ex.submit(abs, -n) for n in range(3)])
""")
        assert done.returncode == 0 and FULL in done.stderr and done.stdout == ""


def test_the_program_shows_it(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "progress.py"), "--quick"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "100%" in done.stderr


class TestInANotebook:
    def test_it_returns_at_once_and_each_function_has_its_bar(self, tmp_path):
        nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
        pytest.importorskip("ipykernel")
        cells = [f"""
import sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'examples')!r}]
import minipool
from progress import progress
ex, opened = minipool.Executor("local", max_workers=2), threading.Event()
local = minipool.Future.__mro__[1]()        # one that ends when we say so
local.name = "<held>"
progress([ex.submit(abs, -n) for n in range(3)], [local])
""", """
local.set_result(None)
[thread.join() for thread in threading.enumerate() if thread.name == "progress"]
ex.shutdown()
"""]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbclient.NotebookClient(book, timeout=100, kernel_name="python3",
                                resources={"metadata": {"path": str(tmp_path)}}).execute()
        bars, = [output["data"]["text/html"] for output in book.cells[0]["outputs"] if "data" in output]
        assert "abs: 3 of 3" in bars and "&lt;held&gt;: 1 of 1" in bars and bars.count("<progress") == 2

    def test_one_bar_for_all_if_asked_and_what_failed_is_marked(self, pool):
        tally = Tally([pool.submit(abs, 1), pool.submit(divmod, 1, 0)])
        *_, done = tally
        assert markup(tally, multi=False).count("<progress") == 1 and "<b> failed</b>" in markup(tally, multi=False)
        assert re.search(r"divmod: 1 of 1<b> failed", markup(tally, multi=True)) and done >= 1
