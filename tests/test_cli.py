"""The two commands as a person meets them: what they print, how they end, and one sentence for every mistake."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import ROOT, free_port, is_alive, marked, wait_for_workers, wait_until

import minipool

pytestmark = pytest.mark.usefixtures("own_mark")
MINIPOOL, WORKER = ROOT / "minipool.py", ROOT / "minipool_worker.py"
CPU = ("--gpus", "none", "--cpu-workers", "1")


@pytest.fixture
def run(program):
    """run(*arguments): run a command to its end; return (exit code, stdout, stderr)."""
    def run(*arguments, **options):
        started = program(*arguments, **options)
        return started.code(), started.out, started.err
    return run


def is_one_sentence(text):
    """Whether this is one line for a person, and no traceback."""
    lines = [line for line in text.splitlines() if line.startswith("minipool: ")]
    return len(lines) == 1 and "Traceback" not in text and "File \"" not in text


def wait_for(folder, name):
    (folder / f"{name} began").touch()
    while not (folder / "gate").exists():
        threading.Event().wait(0.005)
    (folder / f"{name} ended").touch()
    return name


class TestServe:
    def test_prints_lines_that_can_be_pasted(self, program, run, monkeypatch):
        server = program(MINIPOOL, "serve", "--port", free_port())
        lines = dict(re.findall(r"(workers|clients|status): +(.*?)(?:  |\n|$)", server.says(r"(?s).*Ctrl-C").group()))
        paths = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])      # where `python` is this one
        node = program("-c", f"exec {lines['workers']} {' '.join(CPU)}", python="/bin/sh", cwd=ROOT, PATH=paths)
        node.says("connected to")
        name, address = lines["clients"].removeprefix("export ").split("=")
        code, out, _ = run("-c", "import minipool; print(minipool.Executor().submit(abs, -5).result(60))", cwd=ROOT,
                           **{name: address})
        assert (code, out) == (0, "5\n")
        status = subprocess.run(lines["status"], shell=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                                env={**os.environ, "PATH": paths})
        assert status.returncode == 0

    def test_makes_a_secret_that_only_this_user_can_read(self, program, run):
        server = program(MINIPOOL, "serve", "--port", 0)
        path = Path(server.says(r"the secret is from (.*)")[1])
        assert path.stat().st_mode & 0o777 == 0o600
        code, out, _ = run(MINIPOOL, "secret")
        assert code == 0 and out == path.read_text() and out.startswith("mp1_")

    def test_never_prints_the_secret_into_a_pipe(self, program, tmp_path):
        server = program(MINIPOOL, "serve", "--port", 0, "--host", "0.0.0.0")
        server.says("authenticated but not encrypted")
        secret = Path(re.search(r"the secret is from (.*)", server.out)[1]).read_text().strip()
        assert secret not in server.out + server.err

    def test_with_a_node_of_its_own_is_a_pool(self, program, monkeypatch):
        server = program(MINIPOOL, "serve", "--port", 0, "--with-node", CUDA_VISIBLE_DEVICES="")
        address = server.says(r"server on (\S+)")[1]
        with minipool.Executor(address) as ex:
            assert ex.submit(abs, -5).result(60) == 5

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ends_at_a_signal(self, program, own_mark, number):
        server = program(MINIPOOL, "serve", "--port", 0, "--with-node", CUDA_VISIBLE_DEVICES="")
        server.says("server on")
        wait_until(lambda: len(marked(own_mark)) > 2)
        server.signal(number)
        assert server.code() == 0

    def test_on_a_port_in_use_says_so(self, cluster, run):
        code, _, err = run(MINIPOOL, "serve", "--port", cluster.port, "--secret-file", cluster.secret_file)
        assert code == 1 and is_one_sentence(err) and str(cluster.port) in err and "in use" in err


class TestStatus:
    def test_shows_nodes_and_workers(self, cluster, run):
        cluster.node("mynode", cpu_workers=2)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
        code, out, err = run(MINIPOOL, "status", "--address", cluster.address, "--secret-file", cluster.secret_file)
        assert code == 0 and err == "" and "nodes: 1, workers: 2" in out
        assert "mynode-0" in out and "mynode-1" in out and "cpu" in out

    def test_as_json_is_one_object_with_a_schema(self, cluster, run):
        code, out, err = run(MINIPOOL, "status", "--json", MINIPOOL_ADDRESS=cluster.address,
                             MINIPOOL_SECRET=cluster.secret)
        info = json.loads(out)
        assert code == 0 and err == "" and type(info["schema"]) is int
        assert {"address", "embedded", "nodes", "workers", "jobs", "objects"} <= set(info)

    def test_watched_is_shown_anew_until_ctrl_c(self, cluster, program):
        watch = program(MINIPOOL, "status", "--watch", "--address", cluster.address,
                        "--secret-file", cluster.secret_file)
        wait_until(lambda: watch.out.count("nodes: 0") > 1)
        cluster.node()
        watch.says("nodes: 1")
        watch.signal(signal.SIGINT)
        assert watch.code() == 130

    def test_drain_has_a_node_leave_and_says_if_there_is_none(self, cluster, run):
        node, secret = cluster.node("gpu7"), ("--address", cluster.address, "--secret-file", cluster.secret_file)
        with cluster.executor() as ex:
            wait_for_workers(ex, 1)
            assert run(MINIPOOL, "drain", "gpu7", *secret)[0] == 0
            assert node.code() == 0
        code, _, err = run(MINIPOOL, "drain", "gpu7", *secret)
        assert code == 1 and is_one_sentence(err) and "could be drained is called 'gpu7'" in err

    def test_versions_tells_what_must_agree(self, run):
        code, out, err = run(MINIPOOL, "versions")
        assert code == 0 and err == "" and sys.version.split()[0] in out and "protocol" in out


class TestLogs:
    def test_go_to_stderr(self, cluster):
        node = cluster.node()
        assert "connected to" in node.err and node.out == ""
        assert "connected to" not in node.out

    def test_of_a_job_carry_its_worker_s_name(self, cluster):
        node = cluster.node("mynode")
        with cluster.executor() as ex:
            ex.submit(print, "hello").result(60)
        node.says(r"\[mynode-0\] hello")


class TestMistakes:
    """Each ends in one sentence and its exit code."""

    def commands(self, address, *flags):
        """The same mistake made with both commands."""
        return [(MINIPOOL, "status", "--address", address, *flags), (WORKER, "connect", address, *CPU, *flags)]

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_wrong_secret(self, cluster, run, which):
        command = self.commands(cluster.address)[which]
        code, _, err = run(*command, MINIPOOL_SECRET=minipool.Secret.new().text)
        assert code == 3 + 1 and is_one_sentence(err) and "secret" in err

    @pytest.mark.parametrize("which", [0, 1])
    def test_no_secret_lists_where_it_was_looked_for(self, run, which):
        code, _, err = run(*self.commands("127.0.0.1")[which])
        assert code == 4 and is_one_sentence(err)
        for source in ("--secret-file", "MINIPOOL_SECRET_FILE", "MINIPOOL_SECRET", "config/minipool/secret"):
            assert source in err

    def test_nobody_at_the_port(self, cluster, run):
        code, _, err = run(*self.commands(f"127.0.0.1:{free_port()}")[0], MINIPOOL_SECRET=cluster.secret)
        assert code == 3 and is_one_sentence(err) and "no minipool server at 127.0.0.1" in err

    def test_a_node_waits_for_its_server_and_says_so(self, cluster, program):
        port = free_port()
        node = program(WORKER, "connect", f"127.0.0.1:{port}", *CPU, MINIPOOL_SECRET=cluster.secret)
        node.says(f"waiting for a server at 127.0.0.1:{port}")
        program(MINIPOOL, "serve", "--port", port, MINIPOOL_SECRET=cluster.secret)
        node.says("connected to")

    def test_an_http_server_at_the_port(self, cluster, run):
        class Quiet(http.server.BaseHTTPRequestHandler):
            log_message = lambda *_: None       # noqa: E731
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"127.0.0.1:{server.server_port}"
            code, _, err = run(*self.commands(address)[0], MINIPOOL_SECRET=cluster.secret)
            server.shutdown()
        assert code == 3 and is_one_sentence(err) and address in err and "minipool" in err

    def test_a_tls_server_at_the_port(self, cluster, run):
        alert = bytes.fromhex("15030300020228")     # what OpenSSL answers to bytes that are no handshake
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def answer():
                with contextlib.suppress(OSError):
                    while True:
                        with listener.accept()[0] as sock:
                            sock.recv(64)
                            sock.sendall(alert)
            threading.Thread(target=answer, daemon=True).start()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            code, _, err = run(*self.commands(address)[0], MINIPOOL_SECRET=cluster.secret)
            listener.shutdown(socket.SHUT_RDWR)
        assert code == 3 and is_one_sentence(err) and address in err

    def test_another_minor_version_of_python(self, cluster, run, tmp_path):
        import cloudpickle
        other = other_python()
        if not other:
            pytest.skip("no other Python of 3.11 to 3.13 is here")
        shutil.copytree(Path(cloudpickle.__file__).parent, tmp_path / "path" / "cloudpickle")
        for command in self.commands(cluster.address):
            code, _, err = run(*command, python=other, MINIPOOL_SECRET=cluster.secret,
                               PYTHONPATH=str(tmp_path / "path"))
            assert code == 5 and is_one_sentence(err) and minipool.PYTHON in err

    def test_gpus_are_asked_for_where_none_is(self, cluster, run):
        code, _, err = run(WORKER, "connect", cluster.address, "--gpus", "all", MINIPOOL_SECRET=cluster.secret,
                           CUDA_VISIBLE_DEVICES="")
        assert code == 1 and is_one_sentence(err) and "no GPU at all" in err

    @pytest.mark.parametrize(("mode", "words"), [(0o644, "chmod 600"), (None, "cannot be read")])
    @pytest.mark.parametrize("which", [0, 1])
    def test_a_secret_file_that_will_not_do(self, run, tmp_path, which, mode, words):
        path = tmp_path / "file"
        if mode is not None:
            path.write_text(minipool.Secret.new().text)
            path.chmod(mode)
        code, _, err = run(*self.commands("127.0.0.1", "--secret-file", path)[which])
        assert code == 4 and is_one_sentence(err) and words in err and str(path) in err

    @pytest.mark.parametrize("address", ["host:port", "host:99999", "", "[::1"])
    @pytest.mark.parametrize("which", [0, 1])
    def test_a_bad_address(self, run, which, address):
        code, _, err = run(*self.commands(address or ":")[which], MINIPOOL_SECRET=minipool.Secret.new().text)
        assert code in (1, 2) and is_one_sentence(err)

    @pytest.mark.parametrize("command", [
        (MINIPOOL,), (WORKER,), (MINIPOOL, "serve", "--port", "x"), (WORKER, "connect", "--cpu-workers", "-1"),
        (MINIPOOL, "nonsense"), (MINIPOOL, "serve", "--max-value", "lots")])
    def test_a_misused_command_shows_its_usage(self, run, command):
        code, out, err = run(*command)
        assert code == 2 and out == "" and err.startswith("usage: ") and "Traceback" not in err


def other_python():
    """Return a Python of another minor version that minipool runs on, or None."""
    for minor in {11, 12, 13} - {sys.version_info.minor}:
        found = shutil.which(f"python3.{minor}")
        check = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        candidates = [*([found] if found else []), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")]
        for path in candidates:
            if subprocess.run([path, "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
                return str(path)
    return None


class TestLeaving:
    @pytest.fixture
    def busy(self, cluster, tmp_path):
        """A node with a running job and a queued one: (node, executor, futures)."""
        node = cluster.node("leaving", "--tag", "here")
        ex = cluster.executor()
        wait_for_workers(ex, 1)
        futures = [ex.submit(wait_for, tmp_path, f"job{i}") for i in range(3)]
        wait_until((tmp_path / "job0 began").exists)
        yield node, ex, futures
        (tmp_path / "gate").touch()
        ex.kill_workers()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_at_the_first_signal_the_running_job_ends_and_nothing_runs_twice(self, cluster, busy, tmp_path, number):
        node, _, futures = busy
        node.signal(number)
        node.says("draining")
        cluster.node("staying")
        wait_until((tmp_path / "job1 began").exists)        # elsewhere, meanwhile
        (tmp_path / "gate").touch()
        assert [future.result(60) for future in futures] == ["job0", "job1", "job2"]
        assert [future.attempts for future in futures] == [1, 1, 1] or futures[0].attempts == 1
        assert futures[0].worker.startswith("leaving") and futures[1].worker.startswith("staying")
        assert node.code() == 0

    def test_at_the_second_signal_it_ends_at_once(self, cluster, busy, tmp_path):
        node, ex, futures = busy
        worker = wait_for_workers(ex, 1)[0]
        node.signal(signal.SIGINT)
        node.says("draining")
        node.signal(signal.SIGINT)
        assert node.code(20) in (0, 130) and not is_alive(worker)
        assert not (tmp_path / "job0 ended").exists()

    def test_an_idle_node_leaves_at_the_first_signal(self, cluster):
        node = cluster.node(cpu_workers=2)
        with cluster.executor() as ex:
            wait_for_workers(ex, 2)
            node.signal(signal.SIGTERM)
            assert node.code(25) == 0       # sooner than the patience with running jobs
            wait_until(lambda: not ex.info()["workers"])


class TestAPlainCheckout:
    def test_works_from_any_folder(self, cluster, run, tmp_path):
        shutil.copy(MINIPOOL, tmp_path), shutil.copy(WORKER, tmp_path)
        code, out, _ = run(tmp_path / "minipool.py", "status", "--address", cluster.address, cwd="/",
                           MINIPOOL_SECRET=cluster.secret)
        assert code == 0 and cluster.address in out

    @pytest.mark.parametrize("module", ["minipool", "minipool_worker"])
    def test_has_one_copy_of_every_class(self, run, module):
        """Run as a script, a module re-enters by its name: what it raises is what others import."""
        code, out, err = run("-c", f"""if True:
            import runpy, sys
            sys.argv = [{str(ROOT / module)!r} + '.py', 'nonsense']
            import minipool, minipool_worker
            seen = []
            import {module} as m
            m.main = lambda *a: seen.append(m.minipool.Refused if m is minipool_worker else m.Refused) or 0
            try:
                runpy.run_path({str(ROOT / (module + '.py'))!r}, run_name='__main__')
            except SystemExit as end:
                print(end.code, seen == [minipool.Refused])""", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
        assert (code, out) == (0, "0 True\n"), err
