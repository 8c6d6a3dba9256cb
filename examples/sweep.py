# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "scikit-learn", "tqdm"]
# ///
"""Sweep the hyper-parameters of a classifier of handwritten digits, one job per setting.

    pip install scikit-learn tqdm         # tqdm draws the progress bar; without it a plain line counts
    python examples/sweep.py              # on this machine, one worker per device
    python examples/sweep.py --quick      # four settings, a few seconds

On a cluster, nothing in this file changes: set MINIPOOL_ADDRESS=head:8899 and run it again. The workers there need
scikit-learn, but no copy of this file: its functions travel with the jobs.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, as_completed

GRID = {"kernel": ["rbf", "poly"], "C": [0.3, 1, 3, 10], "gamma": [0.003, 0.01, 0.03, 0.1]}
QUICK = {"kernel": ["rbf"], "C": [1, 10], "gamma": [0.01, 0.1]}


def load():
    """Run once in every worker, so that 1,797 images are read per worker and not sent with each of the jobs."""
    global images, labels
    images, labels = load_digits(return_X_y=True)


def evaluate(setting):
    """Cross-validate one setting; return the mean accuracy, its spread over the five folds, and the seconds it took."""
    begin = time.perf_counter()
    scores = cross_val_score(make_pipeline(StandardScaler(), SVC(**setting)), images, labels, cv=5)
    return scores.mean(), scores.std(), time.perf_counter() - begin


def with_progress(futures):
    """Yield the futures as they complete, under tqdm's bar where there is one, else beside a line that counts."""
    done = as_completed(futures)
    try:
        from tqdm import tqdm
    except ImportError:
        for count, future in enumerate(done, 1):
            print(f"\r{count} of {len(futures)} settings", end="", file=sys.stderr, flush=True)
            yield future
        print(file=sys.stderr)
    else:
        yield from tqdm(done, total=len(futures), unit="setting")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 settings instead of 32")
    grid = QUICK if parser.parse_args().quick else GRID
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]

    begin = time.perf_counter()
    with Executor(initializer=load) as pool:
        jobs = {pool.submit(evaluate, setting): setting for setting in settings}
        try:
            results = [(*future.result(), jobs[future]) for future in with_progress(jobs)]
        except BaseException:  # Ctrl-C, or a setting that fails: do not wait for those that have not begun
            pool.shutdown(cancel_futures=True)
            raise
    elapsed = time.perf_counter() - begin

    results.sort(key=lambda result: -result[0])
    print(f"\n{'accuracy':>8}  {'±':>6}  {'kernel':<6}  {'C':>4}  {'gamma':>5}  {'seconds':>7}")
    for mean, spread, seconds, s in results:
        print(f"{mean:8.4f}  {spread:6.4f}  {s['kernel']:<6}  {s['C']:>4}  {s['gamma']:>5}  {seconds:7.2f}")
    work = sum(seconds for _, _, seconds, _ in results)
    print(f"\n{len(results)} settings: {work:.1f} s of work done in {elapsed:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell expects it
