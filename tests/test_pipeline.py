"""Programs over kept values and as_completed, examples/pipeline.py and examples/rollouts.py, do what they promise."""

import re
import sys
from pathlib import Path

import pytest
from test_examples import needs, run_example

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@needs("sklearn")
class TestPipeline:
    def test_a_graph_of_futures_scores_models_and_worse_tables_score_worse_row_2_4(self, tmp_path):
        done = run_example("pipeline.py", tmp_path)
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^([a-z]\S+ \S+) +(0\.\d{4}) +(0\.\d{4}) +(0\.\d{4})$", done.stdout, re.MULTILINE)
        assert len(rows) == 2 and "66 jobs" in done.stdout and ", 0 made twice" in done.stdout
        for _, *scores in rows:
            assert 0.9 < float(scores[2]) < float(scores[0]) < 1

    def test_gives_what_it_gives_without_a_pool(self, pool):
        import pipeline
        from kept_values import Keeper
        with Keeper(pool) as keeper:
            model = pipeline.MODELS["logistic regression"]
            parts = keeper.submit(pipeline.split, keeper.submit(pipeline.clean, keeper.submit(pipeline.load, 0.1)), 2)
            found = keeper.submit(pipeline.score, keeper.submit(pipeline.train, model, parts), parts)
            here = pipeline.split(pipeline.clean(pipeline.load(0.1)), 2)
            assert found.result(60) == pipeline.score(pipeline.train(model, here), here)

    def test_without_scikit_learn_one_sentence_says_what_to_install(self, tmp_path):
        done = run_example("pipeline.py", tmp_path, hidden=["sklearn"])
        assert done.returncode == 1
        assert "pip install scikit-learn" in done.stderr and "Traceback" not in done.stderr


class TestRollouts:
    @needs("numpy")
    def test_the_learner_learns_from_the_games_of_its_workers_row_2_23(self, tmp_path):
        done = run_example("rollouts.py", tmp_path)
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^ *([\d,]+) +([\d.]+)%  #+$", done.stdout, re.MULTILINE)
        assert len(rows) == 10 and rows[-1][0] == "12,800"
        caught = [float(row[1]) for row in rows]
        assert caught[0] < 50 < 75 < caught[-1] and max(caught[:5]) < min(caught[7:])

    def test_without_numpy_one_sentence_says_what_to_install(self, tmp_path):
        done = run_example("rollouts.py", tmp_path, hidden=["numpy"])
        assert done.returncode == 1
        assert "pip install numpy" in done.stderr and "Traceback" not in done.stderr
