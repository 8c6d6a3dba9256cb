"""What an initializer stores in globals is read by jobs, wherever the functions live, also on a respawned worker."""

import concurrent.futures
import os
import pathlib
import signal
import time

import pytest

import minipool

SOON = 60

model = None        # bound at the client first: what a worker stores must outlive the arrival of this None


# ---- jobs ----

def load(value, path=None):
    global model
    model = [value]
    if path:
        note(path, os.getpid())


def use(value=0):
    return model[0] + value


def note(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def refuse(*args):
    raise LookupError("no model here")


def pid_after(seconds):
    time.sleep(seconds)
    return os.getpid(), model


def wait_until(true, seconds=SOON):
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.005)


PROGRAM = """
import minipool
{definitions}
if __name__ == "__main__":
    with minipool.Executor("local", max_workers=2, initializer={module}load, initargs=(40,)) as ex:
        print(*ex.map({module}work, range(6)))
"""
DEFINITIONS = """
model = None
def load(value):
    global model
    model = value
def work(n):
    return model + helper(n)
def helper(n):
    return n
"""
ANSWER = "40 41 42 43 44 45\n"


class TestWhereTheFunctionsLive:
    def test_in_the_program_itself(self, run_script):
        done = run_script(PROGRAM.format(definitions=DEFINITIONS, module=""))
        assert (done.stdout, done.stderr) == (ANSWER, "")

    def test_in_a_module_beside_it(self, run_script, tmp_path):
        (tmp_path / "beside.py").write_text(DEFINITIONS)
        done = run_script(PROGRAM.format(definitions="import beside", module="beside."))
        assert (done.stdout, done.stderr) == (ANSWER, "")

    def test_in_a_module_whose_functions_were_imported_by_name(self, run_script, tmp_path):
        (tmp_path / "beside.py").write_text(DEFINITIONS)
        done = run_script(PROGRAM.format(definitions="from beside import load, work", module=""))
        assert (done.stdout, done.stderr) == (ANSWER, "")

    def test_in_an_installed_module(self, run_script, tmp_path_factory):
        site = tmp_path_factory.mktemp("environment") / "site-packages"
        site.mkdir()
        (site / "installed_model.py").write_text(DEFINITIONS)
        done = run_script(PROGRAM.format(definitions="import installed_model", module="installed_model."),
                          PYTHONPATH=str(site))
        assert (done.stdout, done.stderr) == (ANSWER, "")

    def test_in_the_program_with_a_helper_from_an_installed_module(self, run_script, tmp_path_factory):
        site = tmp_path_factory.mktemp("environment") / "site-packages"
        site.mkdir()
        (site / "installed_helper.py").write_text("import threading\nlock = threading.Lock()\ndef helper(n):\n"
                                                  "    with lock: return n\n")
        text = DEFINITIONS.replace("def helper(n):\n    return n\n", "from installed_helper import helper\n")
        done = run_script(PROGRAM.format(definitions=text, module=""), PYTHONPATH=str(site))
        assert (done.stdout, done.stderr) == (ANSWER, "")

    def test_in_cells_of_a_notebook(self, tmp_path, monkeypatch):
        nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
        pytest.importorskip("ipykernel")
        monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent))
        cells = ["import minipool\n" + DEFINITIONS, "ex = minipool.Executor('local', max_workers=2, initializer=load,"
                 " initargs=(40,))\nprint(*ex.map(work, range(6)))", "def helper(n):\n    return -n",
                 "print(*ex.map(work, range(3)))\nex.shutdown()"]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbclient.NotebookClient(book, timeout=SOON, kernel_name="python3",
                                resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert [output.text for cell in book.cells for output in cell.outputs] == [ANSWER, "40 39 38\n"]

    def test_in_this_module_where_the_name_was_bound_before(self, own_pool):
        pool = own_pool(2, initializer=load, initargs=(40,))
        assert list(pool.map(use, range(4))) == [40, 41, 42, 43] and model is None

    def test_in_a_closure(self, own_pool):
        kept = {}

        def fill(value):
            global model
            model = [value]
            kept["x"] = value
        assert own_pool(1, initializer=fill, initargs=(3,)).submit(use).result(SOON) == 3


class TestRedefinition:
    def test_a_helper_defined_anew_between_two_submits_is_seen(self, own_pool):
        space = {"__name__": "__main__"}
        exec(DEFINITIONS, space)
        pool = own_pool(1, initializer=space["load"], initargs=(40,))
        first = pool.submit(space["work"], 2).result(SOON)
        exec("def helper(n): return -n", space)
        assert (first, pool.submit(space["work"], 2).result(SOON)) == (42, 38)

    def test_a_name_bound_anew_at_the_client_replaces_the_worker_s(self, own_pool):
        space = {"__name__": "__main__"}
        exec(DEFINITIONS, space)
        pool = own_pool(1, initializer=space["load"], initargs=(40,))
        first = pool.submit(space["work"], 0).result(SOON)
        space["model"] = 7
        assert (first, pool.submit(space["work"], 0).result(SOON)) == (40, 7)

    def test_what_one_job_stores_the_next_one_on_that_worker_reads(self, own_pool):
        pool = own_pool(1)
        pool.submit(load, 5).result(SOON)
        assert pool.submit(use, 1).result(SOON) == 6


class TestSeveralExecutors:
    @pytest.fixture
    def cluster(self):
        import minipool_worker
        secret = minipool.Secret.new().text
        with minipool.Server(port=0, secret=secret) as server:
            with minipool_worker.Node(server.address, secret=secret, cpu_workers=2, gpus="none") as node:
                node.connect = lambda **options: minipool.Executor(server.address, secret=secret, **options)
                yield node

    def test_they_do_not_see_each_other_s_globals(self, cluster):
        options = [{"initializer": load, "initargs": (number,)} for number in (1, 2)]
        with cluster.connect(**options[0]) as one, cluster.connect(**options[1]) as two:
            for _ in range(3):
                assert set(one.map(use, [0] * 8)) == {1} and set(two.map(use, [0] * 8)) == {2}
            with cluster.connect() as three:
                assert isinstance(three.submit(use).exception(SOON), TypeError)

    def test_a_broken_one_harms_no_other(self, cluster):
        with cluster.connect(initializer=refuse) as bad, cluster.connect(initializer=load, initargs=(2,)) as good:
            futures = [bad.submit(use) for _ in range(5)]
            assert set(good.map(use, [0] * 8)) == {2}
            for future in futures:
                assert isinstance(future.exception(SOON), concurrent.futures.BrokenExecutor)
            assert set(good.map(use, [0] * 8)) == {2}

    def test_a_late_worker_runs_it_before_its_first_job(self, cluster, tmp_path):
        import minipool_worker
        path = str(tmp_path / "notes")
        with cluster.connect(initializer=load, initargs=(5, path)) as pool:
            assert set(pool.map(use, [0] * 8)) == {5}
            before = {w["name"] for w in pool.info()["workers"]}
            with minipool_worker.Node(pool.info()["address"], secret=cluster._job["secret"], cpu_workers=1, gpus="none",
                                      name="late"):
                wait_until(lambda: len(pool.info()["workers"]) > len(before))
                late, = {w["name"] for w in pool.info()["workers"]} - before
                assert pool.options(on=late).submit(use, 1).result(SOON) == 6


class TestOncePerWorker:
    def test_it_runs_exactly_once_in_each(self, own_pool, tmp_path):
        path = str(tmp_path / "notes")
        pool = own_pool(2, initializer=load, initargs=(5, path))
        assert set(pool.map(use, range(200))) == set(range(5, 205))
        lines = pathlib.Path(path).read_text().split()
        assert len(lines) == len(set(lines)) <= 2

    def test_a_killed_worker_runs_it_again_when_it_is_back(self, own_pool, tmp_path):
        path = str(tmp_path / "notes")
        pool = own_pool(1, initializer=load, initargs=(5, path))
        first, _ = pool.submit(pid_after, 0).result(SOON)
        os.kill(first, signal.SIGKILL)
        second, value = pool.submit(pid_after, 0).result(SOON)
        assert second != first and value == [5]
        assert pathlib.Path(path).read_text().split() == [str(first), str(second)]

    def test_a_worker_renewed_after_its_last_job_runs_it_again(self, own_pool, tmp_path):
        path = str(tmp_path / "notes")
        pool = own_pool(1, max_tasks_per_child=2, initializer=load, initargs=(5, path))
        pids = [pid for pid, value in pool.map(pid_after, [0] * 6) if value == [5]]
        assert len(pids) == 6 and max(map(pids.count, pids)) == 2
        assert pathlib.Path(path).read_text().split() == [str(pid) for pid in dict.fromkeys(pids)]


class TestFailure:
    def test_it_breaks_the_executor_and_is_the_cause(self, own_pool):
        pool = own_pool(2, initializer=refuse)
        futures = [pool.submit(use) for _ in range(5)]
        errors = [future.exception(SOON) for future in futures]
        assert all(isinstance(error, concurrent.futures.BrokenExecutor) for error in errors)
        assert all(isinstance(error.__cause__, LookupError) for error in errors) and len(set(map(id, errors))) == 5
        assert "in refuse" in str(errors[0].__cause__.__cause__)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            pool.submit(use)

    def test_a_very_long_text_breaks_it_too(self, own_pool):
        def boast():
            raise ValueError("x" * 1_000_000)
        pool = own_pool(1, initializer=boast)
        assert isinstance(pool.submit(use).exception(SOON), concurrent.futures.BrokenExecutor)

    def test_one_that_exits_breaks_it_as_well(self, own_pool):
        def leave():
            raise SystemExit(3)
        pool = own_pool(1, initializer=leave)
        assert isinstance(pool.submit(use).exception(SOON), concurrent.futures.BrokenExecutor)

    def test_one_that_cannot_be_pickled_is_refused_and_leaves_nothing(self, no_leaks):
        lock = __import__("threading").Lock()
        with pytest.raises(Exception, match=r"a call of .*lambda.*_thread.lock"):
            minipool.Executor("local", max_workers=1, initializer=lambda: lock)


# ---- on_start: more of the same, at any time ----

def shift(by):
    global model
    model = [model[0] + by]


class TestOnStart:
    def test_every_job_submitted_later_sees_it_and_in_order(self, own_pool):
        ex = own_pool(2, initializer=load, initargs=(1,))
        assert set(ex.map(use, [0] * 20)) == {1}
        ex.on_start(shift, 10)
        ex.on_start(shift, by=100)
        assert set(ex.map(use, [0] * 20)) == {111}

    def test_it_runs_once_in_each_worker(self, own_pool, tmp_path):
        ex = own_pool(2)
        ex.on_start(load, 5, tmp_path / "ran")
        assert list(ex.map(use, range(50))) == list(range(5, 55))
        pids = (tmp_path / "ran").read_text().split()
        assert len(pids) == len(set(pids)) <= 2

    def test_a_worker_that_comes_later_catches_up_in_order_before_its_first_job(self, own_pool):
        ex = own_pool(1)
        ex.on_start(load, 1)
        for step in range(20):
            ex.on_start(shift, step)
        assert ex.submit(use).result(SOON) == 191
        os.kill(ex.submit(os.getpid).result(SOON), signal.SIGKILL)
        assert ex.submit(use).result(SOON) == 191

    def test_a_job_that_was_submitted_before_does_not_wait_for_it(self, own_pool, tmp_path):
        ex = own_pool(1)
        first, waiting = ex.submit(pid_after, 0.2), ex.submit(pid_after, 0)
        ex.on_start(load, 7)
        last = ex.submit(use)
        assert (first.result(SOON)[1], waiting.result(SOON)[1], last.result(SOON)) == (None, None, 7)

    def test_one_that_raises_breaks_the_executor(self, own_pool):
        ex = own_pool(1)
        assert ex.submit(abs, -1).result(SOON) == 1
        ex.on_start(refuse)
        with pytest.raises(concurrent.futures.BrokenExecutor) as caught:
            ex.submit(abs, -1).result(SOON)
        assert type(caught.value.__cause__) is LookupError


class TestWaitForWorkers:
    def test_returns_once_they_are_there(self, own_pool):
        ex = own_pool(2)
        ex.wait_for_workers(2, timeout=SOON)
        assert len(ex.info()["workers"]) == 2

    def test_says_how_many_there_are_if_they_do_not_come_in_time(self, own_pool):
        ex = own_pool(1)
        ex.wait_for_workers(1, timeout=SOON)
        with pytest.raises(TimeoutError, match="1 of 3 workers"):
            ex.wait_for_workers(3, timeout=0.1)
