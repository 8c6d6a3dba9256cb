"""joblib on a pool (examples/joblib_backend.py): what it gives serially, it gives here."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT, wait_until

from minipool import current_job

sys.path.append(str(ROOT / "examples"))
pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others
joblib, joblib_backend = pytest.importorskip("joblib"), pytest.importorskip("joblib_backend")
Parallel, delayed = joblib.Parallel, joblib.delayed
joblib_backend.register_joblib()


@pytest.fixture
def on(pool):
    """parallel_config for the module's pool."""
    with joblib.parallel_config(backend="minipool", executor=pool):
        yield pool


def root(n):
    return n ** 0.5


def who():
    return os.getpid()


def fail_at(n, place):
    if n == place:
        raise KeyError(place)
    return n


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


def nested(n):
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__name__, Parallel(n_jobs=4)(delayed(who)() for _ in range(n)), os.getpid()


class TestParallel:
    def test_the_result_is_the_serial_one_row_3_34(self, on):
        serial = Parallel(n_jobs=1)(delayed(root)(n) for n in range(500))
        assert Parallel()(delayed(root)(n) for n in range(500)) == serial == [n ** 0.5 for n in range(500)]

    def test_it_runs_in_the_workers_and_uses_all(self, on):
        found = {pid for _ in range(20) for pid in Parallel(batch_size=1)(delayed(who)() for _ in range(20))}
        assert os.getpid() not in found and len(found) == on.size == 2

    def test_of_a_pool_of_one_worker_too(self, own_pool):
        with joblib.parallel_config(backend="minipool", executor=own_pool(1)):
            assert os.getpid() not in Parallel()(delayed(who)() for _ in range(3))
            assert Parallel(n_jobs=1)(delayed(who)() for _ in range(3)) == [os.getpid()] * 3

    def test_an_error_arrives_as_itself_and_the_pool_goes_on(self, on):
        with pytest.raises(KeyError, match="7") as caught:
            Parallel()(delayed(fail_at)(n, 7) for n in range(1000))
        assert "fail_at" in str(caught.value.__cause__)
        assert Parallel()(delayed(abs)(-n) for n in range(5)) == [0, 1, 2, 3, 4]

    def test_short_calls_share_jobs(self, on):
        before = on.info()["jobs"]["accepted"]
        assert Parallel()(delayed(abs)(-n) for n in range(3000)) == list(range(3000))
        assert on.info()["jobs"]["accepted"] - before < 1500

    def test_a_generator_gives_results_while_others_run(self, on, gate):
        calls = [delayed(root)(4), delayed(wait_for)(gate.path)]
        found = Parallel(return_as="generator", batch_size=1)(calls)
        assert next(found) == 2
        gate.open()
        assert list(found) == [None]

    def test_unordered_the_first_comes_first(self, on, gate):
        calls = [delayed(wait_for)(gate.path), delayed(root)(9)]
        found = Parallel(return_as="generator_unordered", batch_size=1)(calls)
        assert next(found) == 3
        gate.open()
        assert list(found) == [None]

    def test_a_time_out_is_raised_and_the_rest_does_not_begin(self, own_pool, gate, tmp_path):
        ex, mark = own_pool(1), tmp_path / "mark"
        with joblib.parallel_config(backend="minipool", executor=ex.options(cancel_running=True)):
            with pytest.raises(multiprocessing.TimeoutError):       # which is what joblib raises
                Parallel(timeout=0.5, batch_size=1)([delayed(wait_for)(gate.path), delayed(mark.touch)()])
        assert ex.submit(abs, -1).result(60) == 1       # its worker was ended and is back, the gate is still shut
        assert not mark.exists()

    def test_calls_inside_a_job_run_one_after_the_other_there(self, on):
        for backend, inner, outer in Parallel()(delayed(nested)(5) for _ in range(3)):
            assert backend == "SequentialBackend" and set(inner) == {outer}

    def test_jobs_are_named_by_their_function(self, on):
        names = Parallel(batch_size=1)(delayed(lambda: current_job().name)() for _ in range(3))
        assert all("lambda" in name for name in names)

    def test_options_of_a_view_hold(self, pool):
        def second_time():
            if current_job().attempt < 2:
                raise OSError("not yet")
            return "well"
        with joblib.parallel_config(backend="minipool", executor=pool.options(retries=1)):
            assert Parallel()(delayed(second_time)() for _ in range(4)) == ["well"] * 4

    def test_no_jobs_and_zero_jobs(self, on):
        assert Parallel()([]) == []
        with pytest.raises(ValueError, match="n_jobs == 0"):
            Parallel(n_jobs=0)([delayed(abs)(1)])

    @pytest.mark.filterwarnings("ignore:.*tasks which were still being processed")
    def test_what_waited_is_dropped_when_a_generator_is_closed(self, on, gate):
        found = Parallel(return_as="generator", batch_size=1, pre_dispatch="all")(
            delayed(wait_for)(gate.path) for _ in range(20))
        found.close()
        gate.open()
        wait_until(lambda: on.info()["jobs"]["running"] == on.info()["jobs"]["ready"] == 0)


class TestWithoutAnExecutor:
    def test_one_is_opened_once_and_closed_at_exit(self, run_script):
        done = run_script(f"""
import sys
sys.path.append({str(ROOT / 'examples')!r})
import os, joblib, joblib_backend
joblib_backend.register_joblib()
found = []
with joblib.parallel_config(backend="minipool"):
    for _ in range(2):
        found += joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(8))
print(os.getpid() in found, len(set(found)) <= joblib_backend._opened.size)
""")
        assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
        assert done.stderr.count("embedded pool") == 1

    def test_registering_opens_nothing(self):
        joblib_backend.register_joblib()
        assert joblib_backend._opened is None


class TestScikitLearn:
    @pytest.fixture(autouse=True)
    def data(self):
        datasets = pytest.importorskip("sklearn.datasets")
        return datasets.make_classification(200, random_state=1)

    def test_a_grid_search_finds_the_same_scores(self, on, data):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        grid = {"C": [0.01, 0.1, 1, 10]}
        there = GridSearchCV(LogisticRegression(), grid).fit(*data)
        here = GridSearchCV(LogisticRegression(), grid, n_jobs=1).fit(*data)
        assert (there.cv_results_["mean_test_score"] == here.cv_results_["mean_test_score"]).all()
        assert there.best_params_ == here.best_params_

    def test_a_randomised_search_and_a_forest_too(self, on, data):
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import RandomizedSearchCV, cross_val_score
        forest = RandomForestClassifier(10, random_state=1)
        search = RandomizedSearchCV(forest, {"max_depth": [1, 2, 3, 4]}, n_iter=2, random_state=1).fit(*data)
        assert search.best_score_ > 0.7
        assert (cross_val_score(forest, *data) == cross_val_score(forest, *data, n_jobs=1)).all()


def test_the_example_compares_a_search_here_and_there(tmp_path):
    pytest.importorskip("sklearn")
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "joblib_backend.py"), "--quick"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "on the pool, the same scores" in done.stdout
