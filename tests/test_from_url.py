"""An executor for a URL (examples/from_url.py): the same program on this machine, on a pool, on Dask and on Ray."""

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT, wait_until

sys.path.append(str(ROOT / "examples"))
from from_url import DaskExecutor, RayExecutor, from_url

import minipool

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

NEEDS = {"dask": "distributed", "ray": "ray"}


def url_param(url):
    module = NEEDS.get(url.partition(":")[0])
    missing = module is not None and importlib.util.find_spec(module) is None
    return pytest.param(url, marks=pytest.mark.skipif(missing, reason=f"{module} is not installed"))


URLS = [url_param(url) for url in ("local:2", "process:2", "thread:2", "dask://", "ray:")]


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Let workers of Dask and Ray import this file; minipool's need not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def dask_cluster():
    """The scheduler's address of a Dask cluster of two processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module", params=URLS)
def ex(request):
    """An executor of each kind."""
    url = request.param
    if url == "dask://":
        url = request.getfixturevalue("dask_cluster").replace("tcp:", "dask:")
    with from_url(url) as ex:
        ex.submit(abs, 1).result(100)
        yield ex


def echo(*args, **kwargs):
    return args, kwargs


def note(folder):
    """Leave a new file behind: one per call."""
    import tempfile
    os.close(tempfile.mkstemp(dir=folder)[0])


def fail(text):
    raise KeyError(text)


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


class TestEveryOne:
    def test_is_a_standard_executor_with_workers(self, ex):
        assert isinstance(ex, concurrent.futures.Executor) and ex._max_workers >= 1

    def test_hands_all_arguments_to_the_function(self, ex):
        given = {"key": 1, "priority": 2, "retries": 3, "workers": 4, "timeout": 5, "pure": 6, "fn": 7}
        future = ex.submit(echo, 1, [2], **given)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(60) == ((1, [2]), given)

    def test_runs_equal_calls_each(self, ex, tmp_path):
        assert list(ex.map(note, [str(tmp_path)] * 4)) == [None] * 4
        assert len(list(tmp_path.iterdir())) == 4

    def test_maps_in_order(self, ex):
        assert list(ex.map(pow, range(30), [2] * 30, timeout=60)) == [n ** 2 for n in range(30)]

    def test_raises_the_job_s_own_exception(self, ex):
        error = ex.submit(fail, "here").exception(60)
        assert type(error) is KeyError and error.args == ("here",)

    def test_can_be_waited_for(self, ex):
        futures = [ex.submit(abs, -n) for n in range(5)]
        assert sorted(future.result() for future in concurrent.futures.as_completed(futures, 60)) == [0, 1, 2, 3, 4]
        assert not concurrent.futures.wait(futures, 60).not_done


class TestShutdown:
    @pytest.fixture(params=URLS)
    def own(self, request):
        if request.param != "dask://":
            return from_url(request.param)
        return from_url(request.getfixturevalue("dask_cluster").replace("tcp:", "dask:"))

    def test_waits_for_what_there_is_and_then_takes_no_more(self, own, tmp_path):
        futures = [own.submit(note, str(tmp_path)) for _ in range(3)]
        own.shutdown()
        own.shutdown()
        assert all(future.done() for future in futures) and len(list(tmp_path.iterdir())) == 3
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            own.submit(abs, 1)

    def test_cancels_what_has_not_begun_if_asked(self, own, gate):
        futures = [own.submit(wait_for, gate.path) for _ in range(12)]
        own.shutdown(wait=False, cancel_futures=True)
        wait_until(futures[-1].cancelled)
        gate.open()
        wait_until(lambda: all(future.done() for future in futures))
        own.shutdown()


class TestUrls:
    def test_of_a_server(self, cluster, monkeypatch):
        cluster.node(cpu_workers=1)
        monkeypatch.setenv("MINIPOOL_SECRET_FILE", str(cluster.secret_file))
        with from_url(f"minipool://{cluster.address}", name="moved") as ex:
            assert ex.submit(abs, -1).result(60) == 1
            assert ex.info()["clients"][0]["name"] == "moved"

    def test_without_a_number_all_devices_are_used(self, own_mark):
        with from_url("local:") as ex, minipool.Executor("local") as other:
            assert ex.size == other.size

    def test_options_go_to_what_runs_the_jobs(self):
        with from_url("thread:1", thread_name_prefix="ours") as ex:
            assert ex.submit(lambda: __import__("threading").current_thread().name).result() == "ours_0"
        with pytest.raises(TypeError):
            from_url("thread:1", retries=2)

    @pytest.mark.parametrize("url", ["", "local", "process", "head:8899", "minipool:", "minipool://", "dask", "http://x"])
    def test_others_are_a_value_error_that_lists_them(self, url):
        with pytest.raises(ValueError, match="is none of minipool://HOST:PORT, local:N"):
            from_url(url)

    @pytest.mark.parametrize("url", ["local:0", "process:-1", "thread:two"])
    def test_a_number_that_is_none_is_a_value_error(self, url):
        with pytest.raises(ValueError, match="the number of workers"):
            from_url(url)


def test_the_program_says_what_it_got(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "from_url.py"), "process:2"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "process:2: ProcessPoolExecutor, 2 workers, 5050\n", done.stderr


class TestDask:
    def test_options_are_those_of_get_executor_and_others_are_refused(self, dask_cluster):
        with DaskExecutor(dask_cluster, retries=1) as ex:
            assert ex.submit(abs, -1).result(60) == 1
        with pytest.raises(TypeError, match="job_timeout"):
            DaskExecutor(dask_cluster, job_timeout=1)

    def test_a_job_runs_though_nobody_kept_its_future(self, dask_cluster, tmp_path):
        with DaskExecutor(dask_cluster) as ex:
            for _ in range(5):
                ex.submit(note, str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
class TestRay:
    def test_options_are_those_of_remote_functions_and_others_are_refused(self):
        with RayExecutor(None, num_cpus=2, max_retries=0) as ex:
            assert ex.submit(abs, -1).result(60) == 1 and ex._max_workers >= 1
        with pytest.raises(TypeError, match="job_timeout"):
            RayExecutor(None, job_timeout=1)

    def test_a_cancelled_job_that_runs_is_stopped(self, tmp_path, gate):
        with RayExecutor(None) as ex:
            future = ex.submit(wait_for, gate.path)
            assert future.cancel()
            assert wait_until(lambda: ex.submit(abs, -1).result(60)) == 1
