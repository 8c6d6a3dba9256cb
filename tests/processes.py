"""Real processes for tests: the parts of a pool as programs of their own, and the proof that none is left behind."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minipool

ROOT = Path(minipool.__file__).parent
FAKES = Path(__file__).parent / "fakes"
MARK = "MINIPOOL_TEST_MARK"
SECRET = minipool.Secret.new().text


def wait_until(true, seconds=60):
    """Poll until `true()` and return what it returned; fail after `seconds`, which are generous."""
    give_up = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.01)
    return answer


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end(pid):
    """End a process by its id, if it still runs."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def read(pid, what):
    """Return a file of /proc/PID as bytes; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def marked(mark):
    """Return the processes that inherited a mark in their environment, but for this one."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if pid != os.getpid() and f"{MARK}={mark}\0".encode() in read(pid, "environ")]


@pytest.fixture
def own_mark(monkeypatch, tmp_path):
    """Mark this test's processes; none of them may be left when it has ended."""
    for name in ("MINIPOOL_ADDRESS", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE", "MINIPOOL_LOG", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))     # the user's own secret is not ours to read
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield mark
    try:
        wait_until(lambda: not marked(mark), 20)
    finally:
        for pid in marked(mark):
            print("left behind:", pid, read(pid, "cmdline"))
            end(pid)


class Program:
    """A Python program of ours: its output goes to files, so that nobody needs to read for it to go on."""

    def __init__(self, folder, arguments, python=sys.executable, cwd=None, before=(), **environ):
        name = secrets.token_hex(4)
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        environment = {k: v for k, v in {**os.environ, **environ}.items() if v is not None}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            command = [*before, python, *map(str, arguments)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                                            cwd=cwd, start_new_session=True)
        self.pid = self.process.pid

    @property
    def out(self):
        return self._out.read_text(errors="replace")

    @property
    def err(self):
        return self._err.read_text(errors="replace")

    def says(self, pattern, seconds=60):
        """Wait until it has said this; return the match."""
        def found():
            match = re.search(pattern, self.out + self.err)
            assert match or self.process.poll() is None, f"it ended: {self.out}{self.err}"
            return match
        return wait_until(found, seconds)

    def code(self, seconds=60):
        """Wait for its end; return its exit code."""
        return self.process.wait(seconds)

    def signal(self, number):
        self.process.send_signal(number)


@pytest.fixture
def program(own_mark, tmp_path):
    """program(*arguments, **environ): run `python *arguments`; ended, if need be, when the test has."""
    programs = []

    def start(*arguments, **options):
        programs.append(Program(tmp_path, arguments, **options))
        return programs[-1]
    yield start
    for started in programs:
        started.process.kill()
        started.process.wait()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Cluster:
    """A server and nodes as programs of their own, on this machine, with a secret in a file."""

    def __init__(self, program, folder):
        self._program = program
        self.secret = minipool.Secret.new().text
        self.secret_file = folder / "cluster-secret"
        self.secret_file.touch(mode=0o600)
        self.secret_file.write_text(self.secret)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.server = self.serve()

    def serve(self, *flags):
        """Start the server, or start it again on the same port."""
        server = self._program(ROOT / "minipool.py", "serve", "--port", self.port, "--secret-file", self.secret_file,
                               *flags)
        server.says("server on")
        return server

    def node(self, name="node", *flags, cpu_workers=1, **environ):
        """Start a node and wait until it is welcome."""
        flags = (*flags, *(() if cpu_workers is None else ("--cpu-workers", cpu_workers, "--gpus", "none")))
        node = self._program(ROOT / "minipool_worker.py", "connect", self.address, "--secret-file", self.secret_file,
                             "--name", name, *flags, **environ)
        node.says("connected to")
        return node

    def executor(self, **options):
        return minipool.Executor(self.address, secret=self.secret, **options)


@pytest.fixture
def cluster(program, tmp_path):
    """A server that runs; `cluster.node()` adds to it."""
    return Cluster(program, tmp_path)


@pytest.fixture
def server():
    """A server inside this process, without a node; its secret is SECRET."""
    with minipool.Server(port=0, secret=SECRET) as server:
        yield server
    assert server.failure is None


@pytest.fixture
def embedded(own_mark):
    """embedded(workers): an embedded pool of CPU workers."""
    pools = []

    def start(workers=1, **options):
        pools.append(minipool.Executor("local", max_workers=workers, **options))
        return pools[-1]
    yield start
    for ex in pools:
        ex.shutdown(wait=True, cancel_futures=True)


def pids(ex):
    """Return the process ids of a pool's workers that are connected, by name."""
    return {worker["name"]: worker["pid"] for worker in ex.info()["workers"] if worker["connected"]}


def wait_for_workers(ex, number):
    """Wait until that many workers are connected; return their process ids."""
    return list(wait_until(lambda: len(pids(ex)) == number and pids(ex)).values())
