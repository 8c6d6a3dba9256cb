"""One adapter per pool, each in the way its own documentation recommends and otherwise with its defaults.

All have the same few calls, so that workloads.py says each workload once. A class is opened by `with`: it then has
`workers` processes that take one job at a time. Nothing of a pool is imported before that, so that a process which
measures one pool carries no other.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
_held: Any = None       # what hold() left in a worker process


def hold(value: Any) -> None:
    """Initialize a worker with a value that its jobs use."""
    global _held
    _held = value


def use_held(fn: Callable[..., Any], item: Any) -> Any:
    return fn(_held, item)


def call_each(fn: Callable[..., Any], chunk: Sequence[Any]) -> list[Any]:
    """Several calls as one job, for pools whose map has no chunks."""
    return [fn(item) for item in chunk]


def chunks(items: Iterable[Any], size: int) -> Iterable[tuple[Any, ...]]:
    items = iter(items)
    return iter(lambda: tuple(itertools.islice(items, size)), ())


class Peer:
    """A pool of worker processes; here for all that has submit() and whose handles have result(timeout)."""

    name = title = ""
    package = ""        # the distribution to install; empty: nothing is missing
    first = ""          # a whole program that prints a result of a new pool of two; first_arguments() are its arguments

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool: Any = None

    @classmethod
    def version(cls) -> str:
        from importlib import metadata
        return metadata.version(cls.package) if cls.package else f"of Python {sys.version.split()[0]}"

    @staticmethod
    def first_arguments(folder: Path) -> list[str]:
        return []

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.pool.shutdown()

    def __enter__(self) -> Peer:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def servers(self) -> list[int]:
        """The processes between client and workers, where there are any."""
        return []

    def at_server(self) -> int:
        """How many jobs the servers hold: what else is submitted waits at the client."""
        return 0

    # ---- jobs ----

    @staticmethod
    def answer(value: Any) -> Any:
        """What comes of a job that returns `value`."""
        return value

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(fn, *args)

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        return handle.result(timeout)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.result() for handle in handles]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int) -> list[Any]:
        return list(self.pool.map(fn, items, chunksize=chunk))

    def echo(self, fn: Callable[..., Any], value: Any) -> Any:
        """Send a large value to a job and get it back."""
        return self.result(self.submit(fn, value))

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        """Return fn(value, item) of each item, a job each; the value is to travel to each worker once."""
        raise NotImplementedError


# ---- what no pool can beat by much ----

class Bare(Peer):
    """No pool, and no job: client, server and worker as bare sockets on loopback, and only the worker answers.

    A round trip is 100 bytes through four hops. A value goes in ranges with their SHA-256, made by who sends it and
    checked by who receives it; the server passes them on as they come.
    """

    name, title = "bare", "bare relay"

    def __init__(self, workers: int) -> None:
        super().__init__(0)                 # none that takes a job

    @classmethod
    def version(cls) -> str:
        return ""

    def open(self) -> None:
        self._stack = contextlib.ExitStack()
        for part, attribute in (("answer", "_trips"), ("echo_values", "_values")):
            worker = self._stack.enter_context(machine.helper(part))
            server = self._stack.enter_context(machine.helper("answer", worker))
            setattr(self, attribute, self._stack.enter_context(machine.dial(server)))

    def close(self) -> None:
        self._stack.close()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        self._trips.sendall(b"%100d" % args[0])

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        return int(self._trips.recv(100, socket.MSG_WAITALL))

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [self.result(handle) for handle in handles]

    def echo(self, fn: Callable[..., Any], value: Any) -> Any:
        machine.send_value(self._values, memoryview(value))
        return machine.receive_value(self._values)


# ---- the standard library, and loky ----

class ProcessPool(Peer):
    name, title = "processpool", "ProcessPoolExecutor"
    first = """
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2) as pool:
    print(pool.submit(pow, 2, 10).result(), flush=True)
"""

    def new_pool(self, **options: Any) -> Any:
        from concurrent.futures import ProcessPoolExecutor
        return ProcessPoolExecutor(self.workers, **options)

    def open(self) -> None:
        self.pool = self.new_pool()

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        """In a pool of its own: an initializer is the only way, and a pool has it from its start."""
        with self.new_pool(initializer=hold, initargs=(value,)) as pool:
            return [future.result() for future in [pool.submit(use_held, fn, item) for item in items]]


class Loky(ProcessPool):
    name, title, package = "loky", "loky", "loky"
    first = """
from loky import ProcessPoolExecutor
with ProcessPoolExecutor(2) as pool:
    print(pool.submit(pow, 2, 10).result(), flush=True)
"""

    def new_pool(self, **options: Any) -> Any:
        from loky import ProcessPoolExecutor
        return ProcessPoolExecutor(self.workers, **options)


class MultiprocessingPool(Peer):
    name, title = "mppool", "multiprocessing.Pool"
    first = """
from multiprocessing import Pool
with Pool(2) as pool:
    print(pool.apply_async(pow, (2, 10)).get(), flush=True)
"""

    def open(self) -> None:
        from multiprocessing import Pool
        self.pool = Pool(self.workers)

    def close(self) -> None:
        self.pool.terminate()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        return handle.get(timeout)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.get() for handle in handles]

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int) -> list[Any]:
        return self.pool.map(fn, items, chunk)

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        from multiprocessing import Pool
        with Pool(self.workers, hold, (value,)) as pool:
            return [handle.get() for handle in [pool.apply_async(use_held, (fn, item)) for item in items]]


# ---- clusters ----

class Dask(Peer):
    """LocalCluster: one process of one thread per worker, as for code that holds the GIL, and no dashboard."""

    name, title, package = "dask", "Dask", "distributed"
    saturation: float | None = None     # of the setting of that name; None: as it is
    first = """
from dask.distributed import Client, LocalCluster
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
    print(client.submit(pow, 2, 10).result(), flush=True)
"""

    def open(self) -> None:
        import dask
        from dask.distributed import Client, LocalCluster
        if self.saturation is not None:
            dask.config.set({"distributed.scheduler.worker-saturation": self.saturation})
        self.cluster = LocalCluster(n_workers=self.workers, threads_per_worker=1, dashboard_address=None)
        self.pool = Client(self.cluster)

    def close(self) -> None:
        self.pool.close()
        self.cluster.close()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(fn, *args, pure=False)      # pure ones are hashed, and equal ones run once

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return self.pool.gather(list(handles))

    def map(self, fn: Callable[..., Any], items: Sequence[Any], chunk: int) -> list[Any]:
        handles = [self.submit(call_each, fn, part) for part in chunks(items, chunk)]
        return list(itertools.chain.from_iterable(self.gather(handles)))

    def echo(self, fn: Callable[..., Any], value: Any) -> Any:
        """Past the scheduler: an argument would be a part of the task graph, which Dask itself advises against."""
        there = self.pool.scatter(value, direct=True, hash=False)
        return self.pool.gather(self.submit(fn, there), direct=True)

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        there = self.pool.scatter(value, broadcast=True, hash=False)
        return self.gather([self.submit(fn, there, item) for item in items])


class DaskUnqueued(Dask):
    """The scheduler hands all jobs to workers at once: what costs Dask least per job, if not most memory there."""

    name, title = "dask-inf", "Dask, queuing off"
    saturation = float("inf")
    first = "import dask\ndask.config.set({'distributed.scheduler.worker-saturation': float('inf')})\n" + Dask.first


class Ray(Peer):
    name, title, package = "ray", "Ray", "ray"
    first = """
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(lambda: pow(2, 10)).remote()), flush=True)
ray.shutdown()
"""

    def open(self) -> None:
        import ray
        self.pool = ray
        ray.init(num_cpus=self.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._remote: dict[Any, Any] = {}

    def servers(self) -> list[int]:
        programs = "gcs_server", "raylet/raylet"
        return [pid for pid in machine.descendants(os.getpid())
                if machine.command_line(pid).split(" ")[0].endswith(programs)]

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        remote = self._remote.get(fn)
        if remote is None:
            remote = self._remote[fn] = self.pool.remote(fn)
        return remote.remote(*args)

    def result(self, handle: Any, timeout: float | None = None) -> Any:
        return self.pool.get(handle, timeout=timeout)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return self.pool.get(list(handles))

    map = Dask.map      # by hand as well

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        there = self.pool.put(value)
        return self.gather([self.submit(fn, there, item) for item in items])


# ---- minipool ----

class Minipool(Peer):
    """Over TCP: a server and a node, started here as programs of their own, as on two machines."""

    name, title = "minipool", "minipool, TCP"
    first = """
import subprocess, sys
root, port, file = sys.argv[1:]
sys.path.insert(0, root)
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
programs = [subprocess.Popen([sys.executable, *command, "--secret-file", file], **quiet) for command in (
    [root + "/minipool.py", "serve", "--port", port],
    [root + "/minipool_worker.py", "connect", "127.0.0.1:" + port, "--gpus", "", "--cpu-workers", "2"])]
from minipool import Executor
with Executor("127.0.0.1:" + port, secret=open(file).read()) as pool:
    print(pool.submit(pow, 2, 10).result(), flush=True)
for program in reversed(programs):
    program.terminate()
    program.wait()
"""

    @classmethod
    def version(cls) -> str:
        sys.path.insert(0, str(ROOT))
        import minipool
        return minipool.__version__

    @staticmethod
    def first_arguments(folder: Path) -> list[str]:
        import chaos  # which finds minipool.py one folder up

        import minipool
        file = folder / "secret"
        file.touch(mode=0o600)
        file.write_text(minipool.Secret.new().text)
        return [str(ROOT), str(chaos.free_port()), str(file)]

    def open(self) -> None:
        import chaos
        self._folder = tempfile.TemporaryDirectory()
        self._programs = chaos.Pool(Path(self._folder.name), 1, self.workers)
        self.pool = self.another_client()
        chaos.wait_for_workers(self.pool, self.workers)

    def another_client(self) -> Any:
        import minipool
        return minipool.Executor(f"127.0.0.1:{self._programs.port}", secret=self._programs.secret.read_text(),
                                 connect_timeout=30)

    def close(self) -> None:
        self.pool.shutdown()
        self._programs.stop()
        self._folder.cleanup()

    def servers(self) -> list[int]:
        return [self._programs.server.pid]

    def at_server(self) -> int:
        jobs = self.pool.info()["jobs"]
        return sum(jobs[state] for state in ("waiting", "ready", "running"))

    def with_shared(self, fn: Callable[..., Any], value: Any, items: Sequence[Any]) -> list[Any]:
        """In a closure: a function travels once, and with it what it holds."""
        def use(item: Any) -> Any:
            return fn(value, item)

        return self.gather([self.submit(use, item) for item in items])


class Embedded(Minipool):
    """Executor(workers): server, node and workers are children of this process."""

    name, title = "embedded", "minipool, embedded"
    first = """
import sys
sys.path.insert(0, sys.argv[1])
from minipool import Executor
with Executor(2) as pool:
    print(pool.submit(pow, 2, 10).result(), flush=True)
"""

    @staticmethod
    def first_arguments(folder: Path) -> list[str]:
        return [str(ROOT)]

    def open(self) -> None:
        sys.path.insert(0, str(ROOT))
        import minipool
        self.pool = minipool.Executor("local", max_workers=self.workers)

    def close(self) -> None:
        self.pool.shutdown()

    def servers(self) -> list[int]:
        return [pid for pid in machine.children(os.getpid()) if "worker.py _child" in machine.command_line(pid)]


class Models(Minipool):
    """Over TCP, with workers that are models: they answer without running anything. In no table of peers."""

    def open(self) -> None:
        import chaos
        self._folder = tempfile.TemporaryDirectory()
        self._programs = chaos.Pool(Path(self._folder.name), 0, 0)
        command = [Path(__file__).with_name("models.py"), self._programs.port, self._programs.secret, self.workers]
        self._models = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE)
        assert self._models.stdout
        self._models.stdout.readline()          # all have joined; a client there meanwhile would be told of each
        self.pool = self.another_client()
        chaos.wait_for_workers(self.pool, self.workers)

    def close(self) -> None:
        self._models.kill()
        self._models.communicate()
        super().close()

    @staticmethod
    def answer(value: Any) -> Any:
        from models import ANSWER
        return ANSWER


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (
    Minipool, Embedded, Bare, ProcessPool, MultiprocessingPool, Loky, Dask, DaskUnqueued, Ray)}
OURS = Minipool.name, Embedded.name
