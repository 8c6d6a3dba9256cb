"""One line to move: an executor for a URL, so that a program runs on this machine, on a pool, on Dask or on Ray.

Copy this file beside your program; a library is imported only if its URL is used.

    with from_url(os.environ.get("POOL", "local:")) as ex:
        print(list(ex.map(train, rates)))

| URL | what runs the jobs |
| --- | --- |
| `minipool://head:8899` | the pool with its server there |
| `local:4`, `local:` | an embedded pool of so many workers; one per device |
| `process:4`, `thread:4` | ProcessPoolExecutor, ThreadPoolExecutor of the standard library |
| `dask://head:8786`, `dask:` | a Dask cluster; a new one on this machine |
| `ray:auto`, `ray://head:10001`, `ray:` | a Ray cluster; through Ray's client; a new one on this machine |

Further arguments go to what runs the jobs: `from_url("local:2", initializer=load)`, `from_url("dask://head:8786",
resources={"GPU": 1})`, `from_url("ray:auto", num_gpus=1)`; what it does not know is a TypeError, never ignored.

All are standard executors: every argument of `submit` reaches the function, equal calls each run, `shutdown` takes
`cancel_futures`. What cannot be had on Dask and Ray: `running()` is always False there, and so `cancel()` also succeeds
for jobs that run, which are then stopped (Ray) or forgotten (Dask). On Ray, arrays come back read-only. Workers of Dask
and Ray must be able to import your own modules; minipool's need not.
"""
from __future__ import annotations

import concurrent.futures
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it


class _Adapter(concurrent.futures.Executor):
    """What Dask and Ray lack of the standard executor; subclasses start a call, and let go of the cluster."""

    def __init__(self) -> None:
        self._pending: set[concurrent.futures.Future] = set()       # kept, or Dask would drop their jobs
        self._lock, self._is_shut = threading.Lock(), False

    def _start(self, call: Callable[[], Any]) -> concurrent.futures.Future:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        """Submit fn(*args, **kwargs); return its future."""
        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future = self._start(functools.partial(fn, *args, **kwargs))
            self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; with `wait`, return when what there is has ended."""
        with self._lock:
            was_shut, self._is_shut, pending = self._is_shut, True, list(self._pending)
        for future in pending if cancel_futures else ():
            future.cancel()
        if not was_shut:
            self._closing = threading.Thread(target=self._wait_and_close, args=(pending,), name="from_url: shutdown")
            self._closing.start()       # not a daemon: at exit the interpreter waits, as for the standard executors
        if wait:
            self._closing.join()

    def _wait_and_close(self, pending: list[concurrent.futures.Future]) -> None:
        ended = threading.Semaphore(0)
        for future in pending:
            future.add_done_callback(lambda _: ended.release())     # wait() would overlook some that were cancelled
        for _ in pending:
            ended.acquire()
        self._close()


class DaskExecutor(_Adapter):
    """An executor on a Dask cluster; options are those of `Client.get_executor`."""

    def __init__(self, address: str | None, **options: Any) -> None:
        super().__init__()
        try:
            from distributed import Client
        except ImportError as missing:
            raise ImportError(f"a dask:// address needs Dask ({missing}): pip install distributed") from None
        self._client = Client(address)
        try:
            self._inner = self._client.get_executor(**{"pure": False, **options})   # else equal calls run once
        except TypeError:
            self._client.close()
            raise

    @property
    def _max_workers(self) -> int:
        return max(1, sum(self._client.nthreads().values()))

    def _start(self, call: Callable[[], Any]) -> concurrent.futures.Future:
        return self._inner.submit(call)         # bound beforehand, or Dask would take keywords as its own

    def _close(self) -> None:
        self._client.close()


class RayExecutor(_Adapter):
    """An executor on a Ray cluster; options are those of a remote function, as `num_gpus`."""

    def __init__(self, address: str | None, **options: Any) -> None:
        super().__init__()
        try:
            import ray
        except ImportError as missing:
            raise ImportError(f"a ray: address needs Ray ({missing}): pip install ray") from None
        self._ray, self._options, self._is_ours = ray, options, not ray.is_initialized()
        if self._is_ours:
            ray.init(address=address)
        try:
            remote = ray.remote(lambda call: call())        # a function of this module would have to be there too
            self._remote = remote.options(**options) if options else remote
        except ValueError as error:
            self._close()
            raise TypeError(str(error)) from None

    @property
    def _max_workers(self) -> int:
        kind, each = ("GPU", self._options["num_gpus"]) if self._options.get("num_gpus") else (
            "CPU", self._options.get("num_cpus") or 1)
        return max(1, int(self._ray.cluster_resources().get(kind, 0) / each))

    def _start(self, call: Callable[[], Any]) -> concurrent.futures.Future:
        reference, future = self._remote.remote(call), concurrent.futures.Future()
        reference.future().add_done_callback(functools.partial(self._settle, future))
        future.add_done_callback(lambda future: future.cancelled() and self._ray.cancel(reference))
        return future

    @staticmethod
    def _settle(future: concurrent.futures.Future, done: concurrent.futures.Future) -> None:
        """Hand on an outcome; a job's error as it was raised, with Ray's own, which tells where, as its cause."""
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        elif isinstance(cause := getattr(error, "cause", None), Exception):
            cause.__cause__ = error
            future.set_exception(cause)
        else:
            future.set_exception(error)

    def _close(self) -> None:
        if self._is_ours:
            self._ray.shutdown()


def from_url(url: str, **options: Any) -> concurrent.futures.Executor:
    """Return a standard executor for a URL, as in the table above. Raises ValueError for others."""
    scheme, colon, rest = url.partition(":")
    has_host = rest.startswith("//") and len(rest) > 2
    if scheme == "minipool" and has_host:
        from minipool import Executor
        return Executor(rest[2:].rstrip("/"), **options)
    if scheme == "local" and colon:
        from minipool import Executor
        return Executor("local", max_workers=_number(url, rest), **options)
    if scheme == "process" and colon:
        return concurrent.futures.ProcessPoolExecutor(_number(url, rest), **options)
    if scheme == "thread" and colon:
        return concurrent.futures.ThreadPoolExecutor(_number(url, rest), **options)
    if scheme == "dask" and (has_host or url == "dask:"):
        return DaskExecutor(f"tcp:{rest}" if rest else None, **options)
    if scheme == "ray" and colon:
        return RayExecutor((url if rest.startswith("//") else rest) or None, **options)
    raise ValueError(f"{url!r} is none of minipool://HOST:PORT, local:N, process:N, thread:N, dask://HOST:PORT, "
                     "ray:ADDRESS")


def _number(url: str, rest: str) -> int | None:
    if rest and not (rest.isdecimal() and int(rest) > 0):
        raise ValueError(f"{url!r}: behind the colon comes the number of workers, or nothing")
    return int(rest) if rest else None


def main() -> None:
    url = next((word for word in sys.argv[1:] if ":" in word), "local:2")
    with from_url(url) as ex:
        print(f"{url}: {type(ex).__name__}, {ex._max_workers} workers, {sum(ex.map(abs, range(-100, 0)))}")


if __name__ == "__main__":
    main()
