"""Code for every worker (examples/upload.py), and values that outlive their client (examples/published.py)."""
import os
import signal
import sys
import zipfile
from pathlib import Path

import pytest
from processes import pids, wait_for_workers, wait_until

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from published import get_published, publish, published, unpublish
from upload import upload

pytestmark = pytest.mark.slow     # recipes: what passes on one Python holds for the others


def answer(module):
    import importlib
    return importlib.import_module(module).answer()


def file(folder, name, value):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def answer(): return {value}\n")
    return path


class TestUpload:
    def test_a_module_is_there_and_again_is_another_row_2_50_row_3_27(self, embedded, tmp_path):
        ex = embedded(1)
        upload(ex, file(tmp_path, "uploaded.py", 1))
        assert ex.submit(answer, "uploaded").result(30) == 1
        upload(ex, file(tmp_path, "uploaded.py", 22))
        assert ex.submit(answer, "uploaded").result(30) == 22

    def test_a_late_worker_has_it_row_2_50(self, cluster, tmp_path):
        cluster.node("first")
        with cluster.executor() as ex:
            wait_for_workers(ex, 1)
            upload(ex, file(tmp_path, "uploaded.py", 1))
            cluster.node("second")
            wait_for_workers(ex, 2)
            assert ex.options(on="second").submit(answer, "uploaded").result(30) == 1

    def test_packages_and_zip_files_row_2_50(self, embedded, tmp_path):
        ex = embedded(1)
        file(tmp_path, "package/__init__.py", 0)
        file(tmp_path, "package/inner.py", 2)
        upload(ex, tmp_path / "package")
        with zipfile.ZipFile(tmp_path / "some.zip", "w") as packed:
            packed.writestr("zipped.py", "def answer(): return 3")
        upload(ex, tmp_path / "some.zip")
        assert [ex.submit(answer, name).result(30) for name in ("package.inner", "zipped")] == [2, 3]

    @pytest.mark.parametrize("name, why", [
        ("text.txt", "no .py file"), ("broken.zip", "no zip file"), ("folder/data", "no __init__.py"),
        ("native/__init__.py native/x.so", "compiled"), ("minipool.py", "stand on it"), ("json.py", "json")])
    def test_anything_else_is_a_clear_error_row_2_50(self, embedded, tmp_path, name, why):
        for part in name.split():
            (tmp_path / part).parent.mkdir(exist_ok=True)
            (tmp_path / part).touch()
        with pytest.raises(ValueError, match=why):
            upload(embedded(1), tmp_path / name.split("/")[0])

    def test_what_is_not_there_is_said_to_be_missing(self, embedded, tmp_path):
        for name in ("module.py", "package", "packed.zip"):
            with pytest.raises(FileNotFoundError, match=name):
                upload(embedded(1), tmp_path / name)


class TestPublished:
    def test_values_outlive_their_client_row_2_47(self, cluster):
        cluster.node(cpu_workers=2)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            publish(ex, "numbers", [1, 2])
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            assert published(ex) == ["numbers"] and get_published(ex, "numbers") == [1, 2]
            unpublish(ex, "numbers")
            assert published(ex) == []

    def test_values_outlive_a_worker_again_and_again_row_2_47(self, embedded):
        ex = embedded(2)
        publish(ex, "numbers", [1, 2])
        for name in list(pids(ex)):
            before = pids(ex)
            os.kill(before[name], signal.SIGKILL)
            wait_until(lambda name=name, before=before: pids(ex).get(name, before[name]) != before[name])
            assert get_published(ex, "numbers") == [1, 2]

    def test_a_name_taken_or_unknown_is_a_key_error_row_2_47(self, embedded):
        ex = embedded(1)
        publish(ex, "x", 1)
        with pytest.raises(TypeError, match="a name is text"):
            publish(ex, 3, 1)
        for call, name, why in ((lambda: publish(ex, "x", 2), "x", "published already"),
                                (lambda: get_published(ex, "y"), "y", "nothing is published"),
                                (lambda: unpublish(ex, "y"), "y", "nothing is published")):
            with pytest.raises(KeyError, match=f"{name}.*{why}|{why}.*{name}"):
                call()
