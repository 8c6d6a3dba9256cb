# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "scikit-learn"]
# ///
"""A pipeline as a graph of futures: load, clean, train and score classifiers of tumours, with values that stay put.

    pip install scikit-learn
    python examples/pipeline.py              # on this machine; a cluster: set MINIPOOL_ADDRESS=head:8899
    python examples/pipeline.py --quick      # two models, a few seconds

Every step is a job, and what it is given are the futures of the steps before it: nothing here waits for any of them,
and what can run side by side does. The tables and models stay in the workers (examples/kept_values.py); only the
scores come to this program.
"""

import argparse
import sys
from pathlib import Path

try:
    import numpy as np
    from sklearn.base import clone
    from sklearn.datasets import load_breast_cancer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC
except ImportError as missing:
    raise SystemExit(f"this example needs scikit-learn ({missing}): pip install scikit-learn") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from kept_values import Keeper

from minipool import Executor, gather

MODELS = {"logistic regression": LogisticRegression(max_iter=1000), "nearest neighbours": KNeighborsClassifier(),
          "support vectors": SVC(), "random forest": RandomForestClassifier(200, random_state=0)}


def load(damage, seed=0):
    """Load 569 tumours of 30 measurements each; lose a part of the measurements, as a real table would."""
    table, labels = load_breast_cancer(return_X_y=True)
    table[np.random.default_rng(seed).random(table.shape) < damage] = np.nan
    return table, labels


def clean(data):
    """Put the median in place of what is missing, and every measurement to the same scale."""
    table, labels = data
    table = np.where(np.isnan(table), np.nanmedian(table, axis=0), table)
    return (table - table.mean(axis=0)) / table.std(axis=0), labels


def split(data, fold, folds=4):
    """Return what to train on, and what to score with."""
    table, labels = data
    held_out = np.arange(len(labels)) % folds == fold
    return (table[~held_out], labels[~held_out]), (table[held_out], labels[held_out])


def train(model, parts):
    """Fit a fresh copy of the model."""
    return clone(model).fit(*parts[0])


def score(model, parts):
    """Return the accuracy on what the model has not seen."""
    return float(model.score(*parts[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 models instead of 4")
    models = dict(list(MODELS.items())[:2]) if parser.parse_args().quick else MODELS
    with Executor() as pool, Keeper(pool) as keeper:
        scores = {}
        for damage in (0.0, 0.1, 0.3):
            cleaned = keeper.submit(clean, keeper.submit(load, damage))
            folds = [keeper.submit(split, cleaned, fold) for fold in range(4)]
            for name, model in models.items():
                scores[name, damage] = [keeper.submit(score, keeper.submit(train, model, parts), parts)
                                        for parts in folds]
        print(f"{'accuracy':<20} {'whole table':>12} {'10% lost':>12} {'30% lost':>12}")
        for name in models:
            row = gather([scores[name, damage] for damage in (0.0, 0.1, 0.3)])
            print(f"{name:<20}", *(f"{sum(accuracies) / len(accuracies):12.4f}" for accuracies in row))
        jobs = 3 * (2 + 4 + 8 * len(models))
        print(f"{jobs} jobs; {keeper.copied} values were copied to another worker, {keeper.recomputed} made twice")


if __name__ == "__main__":
    main()
