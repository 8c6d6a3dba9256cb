"""joblib on a pool: scikit-learn's searches, and whatever else uses joblib, run on its workers.

Copy this file beside your program; the workers need joblib and the libraries of the jobs, but no copy.

    import joblib
    from joblib_backend import register_joblib
    from minipool import Executor

    register_joblib()
    with Executor() as ex, joblib.parallel_config(backend="minipool", executor=ex):
        search = GridSearchCV(model, grid).fit(X, y)

Without `executor=`, one is opened at first use by `Executor()`, and closed at exit. `n_jobs` is -1 unless it is given,
that is all workers of the pool; 1 means this process, as always in joblib; other numbers bound how far joblib runs
ahead, not on how many workers. Jobs have the options of the view that is handed over, as `ex.options(retries=2)`. With
`cancel_running=True` a time-out or an error also ends what runs; else that runs to its end, and what has not begun is
dropped. Parallel calls inside a job run one after the other there.

`python examples/joblib_backend.py` compares a search here and on the pool. A large array that many calls share travels
with each of their batches. joblib's `mmap_mode`, `temp_folder` and `inner_max_num_threads` have no effect.
"""
from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, SequentialBackend

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, Future

_opening = threading.Lock()
_opened: Executor | None = None     # for those who name none


def _default() -> Executor:
    """Return the executor for those who name none; open it the first time."""
    global _opened
    with _opening:
        if _opened is None:
            _opened = Executor()
            atexit.register(_opened.shutdown, wait=True, cancel_futures=True)
        return _opened


class MinipoolBackend(AutoBatchingMixin, ParallelBackendBase):
    """A backend of joblib: each batch of calls is one job; very short calls share one."""

    supports_retrieve_callback = True       # it has time-outs and generators, too
    default_n_jobs = -1

    def __init__(self, executor: Executor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._executor = executor
        self._futures: set[Future] = set()      # of batches that have not ended

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many jobs joblib is to think of as running at once."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        # never 1, or joblib would not ask the pool at all: one worker may have the GPU that this process has not
        return max(2, n_jobs if n_jobs > 0 else self._pool().size + 1 + n_jobs)

    def _pool(self) -> Executor:
        if self._executor is None:
            self._executor = _default()
        return self._executor

    def submit(self, func: Callable[[], Any], callback: Callable[[Future], Any] | None = None) -> Future:
        """Submit a batch; `callback` hears of its end."""
        future = self._pool().options(name=_name(func)).submit(func)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop what has not begun; what runs as well, if the executor's options say so."""
        for future in list(self._futures):
            future.cancel()

    def terminate(self) -> None:
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """Inside a job there is one device and one thread: calls there run one after the other."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None


def _name(batch: Any) -> str:
    """Name a batch by its first call, for logs and status; scikit-learn wraps its functions once more."""
    function = batch.items[0][0] if getattr(batch, "items", None) else batch
    function = getattr(function, "function", function)
    return getattr(function, "__qualname__", type(function).__name__)


def register_joblib() -> None:
    """Make `joblib.parallel_config(backend="minipool", executor=ex)` known; may be called again."""
    joblib.register_parallel_backend("minipool", MinipoolBackend)


# ---- a small program ----


def main() -> None:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import GridSearchCV
        from sklearn.svm import SVC
    except ImportError:
        raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    grid = {"C": [1, 10], "gamma": [0.0003, 0.001] if "--quick" in sys.argv else [0.0001, 0.0003, 0.001, 0.003]}
    register_joblib()
    begin = time.perf_counter()
    here = GridSearchCV(SVC(), grid).fit(images, labels)
    between = time.perf_counter()
    with Executor() as ex, joblib.parallel_config(backend="minipool", executor=ex):
        there = GridSearchCV(SVC(), grid).fit(images, labels)
    end = time.perf_counter()
    assert (there.cv_results_["mean_test_score"] == here.cv_results_["mean_test_score"]).all()
    print(f"best of {len(here.cv_results_['params'])}: {there.best_params_}, accuracy {there.best_score_:.4f}")
    print(f"{between - begin:.1f} s here, {end - between:.1f} s on the pool, the same scores")


if __name__ == "__main__":
    main()
