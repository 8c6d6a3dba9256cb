"""What the process tests share: a pool per module, gates for jobs to wait at, scripts, and a check for leaks."""

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from processes import cluster, embedded, own_mark, program, server  # noqa: F401 (fixtures)

import minipool

ROOT = pathlib.Path(__file__).parent.parent
MARK = "MINIPOOL_TEST_RUN"      # in the environment of every process that these tests start, however far removed
os.environ[MARK] = secrets.token_hex(8)
for _name in ("MINIPOOL_ADDRESS", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE"):
    os.environ.pop(_name, None)     # the tests bring their own pools

# Under a shell's `&` Ctrl-C is ignored, and would be in every program that is started from here.
with contextlib.suppress(ValueError):       # not in the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# What a server process of these tests resolves from a pickle is written there by tests/audit/sitecustomize.py: nothing.
AUDIT = str(ROOT / "tests" / "audit")
IS_FIRST = "MINIPOOL_TEST_AUDIT" not in os.environ          # pytest-xdist's processes inherit it from the first
if IS_FIRST:
    os.environ["MINIPOOL_TEST_AUDIT"] = os.path.join(tempfile.mkdtemp(prefix="minipool-audit-"), "resolved")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), AUDIT]))


def pytest_sessionfinish(session):
    """Fail the run if any server process resolved a global from a pickle."""
    file = pathlib.Path(os.environ["MINIPOOL_TEST_AUDIT"])
    resolved = file.read_text() if file.exists() else ""
    if resolved:
        print(f"\nserver processes resolved globals from pickles:\n{resolved}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if IS_FIRST:
        shutil.rmtree(file.parent, ignore_errors=True)


@pytest.fixture(scope="module")
def pool():
    """An embedded pool of two workers for all tests of a module that do it no harm."""
    with minipool.Executor("local", max_workers=2) as executor:
        executor.submit(abs, 1).result(60)
        yield executor


@pytest.fixture
def own_pool():
    """own_pool(2): embedded pools that a test may break; shut down after it."""
    pools = []

    def start(workers, **options):
        pools.append(minipool.Executor("local", max_workers=workers, **options))
        return pools[-1]
    yield start
    for executor in pools:
        executor.kill_workers()


@pytest.fixture
def between_hosts(monkeypatch):
    """Let this process's large values come and go in ranges, as if no pool were on this host."""
    monkeypatch.setenv("MINIPOOL_SHARED_MEMORY", "0")
    monkeypatch.setattr(minipool, "open_place", lambda place, size: None)


class Gate:
    """A file that opens: jobs wait for it with `wait(gate.path)`."""

    def __init__(self, path):
        self.path = str(path)

    def open(self):
        pathlib.Path(self.path).touch()


@pytest.fixture
def gate(tmp_path):
    """A gate that is shut until the test opens it, and in any case at the test's end."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def run_script(tmp_path):
    """run_script(text): run a program in a folder of its own; returns the finished process."""
    def run(text, name="program.py", **environment):
        script = tmp_path / name
        script.write_text(text)
        path = os.pathsep.join(filter(None, [str(ROOT), environment.pop("PYTHONPATH", ""), AUDIT]))
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        return subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=100)
    return run


def our_processes():
    """Return {pid: command line} of all live processes that this test run has started."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if mark in pathlib.Path(entry.path, "environ").read_bytes().split(b"\0"):
                    words = pathlib.Path(entry.path, "cmdline").read_bytes().decode().split("\0")
                    found[int(entry.name)] = " ".join(words)
            except OSError:         # it ended meanwhile, or is another user's
                pass
    return found


def lineage(pid):
    """Return a process, its parent, and so on."""
    found = []
    with contextlib.suppress(OSError):          # it ended meanwhile
        while pid > 1:
            found.append(pid)
            pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def our_descriptors():
    """Return {number: what it is} of this process's open descriptors, but for memory files.

    That of a large function lives as long as the function; test_shared_memory.py counts them.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:             # the one that listed the folder
            pass
    return {number: what for number, what in found.items() if not what.startswith("/memfd:minipool")}


def our_threads():
    return {thread.ident: thread.name for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


KINDS = {"threads": our_threads, "processes": our_processes, "descriptors": our_descriptors}


def wait_until_nothing_is_left(before, is_left, kinds=KINDS):
    """Fail if something of `before`'s kinds stays behind by what is_left(old, new) says; name what is new."""
    give_up = time.monotonic() + 20
    while any(is_left(old, kinds[kind]()) for kind, old in before.items()):
        if time.monotonic() > give_up:
            new = {kind: {k: v for k, v in kinds[kind]().items() if old.get(k) != v} for kind, old in before.items()}
            pytest.fail("\n".join(f"leaked {kind}: {found}" for kind, found in new.items() if found))
        time.sleep(0.02)


@pytest.fixture
def no_leaks():
    """Fail a test that leaves threads, processes or descriptors behind, and print which."""
    before = {kind: look() for kind, look in KINDS.items()}
    yield
    wait_until_nothing_is_left(before, lambda old, new: any(old.get(k) != v for k, v in new.items()))


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test with a pool there are no more threads, processes and descriptors than before.

    Counts, as a module's own pool may have renewed its connection. What a process that was there has started since is
    left out: a worker of the module's own pool may have been on its way back when the test began.
    """
    pools = {"cluster", "embedded", "own_pool", "own_mark", "pool", "program", "server"} & set(request.fixturenames)
    there = set(our_processes()) if pools else set()
    kinds = {**KINDS, "processes": lambda: {pid: words for pid, words in our_processes().items()
                                            if there.isdisjoint(lineage(pid))}} if pools else {}
    before = {kind: look() for kind, look in kinds.items()}
    yield
    wait_until_nothing_is_left(before, lambda old, new: len(new) > len(old), kinds)
