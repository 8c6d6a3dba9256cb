"""What examples/deploy holds works: scripts run with stand-ins for ssh and Slurm, units and manifests say what exists.

The stand-ins run locally what they are asked to run; server, nodes and jobs are real.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib

import pytest
from processes import ROOT, marked, read, wait_for_workers, wait_until

import minipool

DEPLOY = ROOT / "examples/deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

SSH = """#!/bin/sh
cd "$HOSTS/$1" && exec sh -c "$2"           # no terminal, and a pipe for input, as with the real one
"""
# each task has its host's mask; srun itself takes a SIGTERM as an order to kill
SRUN = """#!/bin/bash
for mask in 0,1 2,3; do CUDA_VISIBLE_DEVICES=$mask "$@" --name "host-${mask%,*}" & echo $! >>"$STEPS"; done
trap 'kill -KILL $(<"$STEPS")' TERM
wait
"""
SCANCEL = """#!/bin/bash
[[ $* == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(<"$STEPS")
"""


def flags_of(*command):
    """Return the flags that a command knows."""
    script = {"minipool": "minipool.py", "minipool-worker": "minipool_worker.py"}.get(command[0], command[0])
    done = subprocess.run([sys.executable, ROOT / script, *command[1:], "--help"], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def is_a_command(words):
    """Whether this is a command of ours with flags that it has."""
    assert words[0] in COMMANDS or words[0].endswith(".py"), words
    assert {word for word in words if word.startswith("--")} <= flags_of(*words[:2]), words


@pytest.fixture
def stand_ins(tmp_path):
    """stand_ins(ssh=text): programs of these names; returns the PATH that begins with them."""
    def make(**texts):
        (tmp_path / "bin").mkdir()
        for name, text in texts.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        return os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    return make


@pytest.fixture
def busy(cluster, gate):
    """busy(workers): an executor with so many workers, and a job that one of them runs until the gate is open."""
    def hold(path):
        while not os.path.exists(path):
            threading.Event().wait(0.005)
        return "held"
    executors = []

    def start(workers):
        executors.append(cluster.executor())
        wait_for_workers(executors[0], workers)
        future = executors[0].submit(hold, gate.path)
        wait_until(future.running)
        return executors[0], future
    yield start
    for executor in executors:
        executor.shutdown(wait=False, cancel_futures=True)


class TestShellScripts:
    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
    def test_are_sound(self, script):
        assert subprocess.run(["bash", "-n", script], timeout=60).returncode == 0
        assert os.access(script, os.X_OK)
        if shutil.which("shellcheck"):
            done = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
    def test_call_us_with_flags_that_there_are(self, script):
        calls = re.findall(r"(minipool\w*\.py) (\w+)(.*)", re.sub(r"^#.*", "", script.read_text(), flags=re.MULTILINE))
        assert calls
        for file, command, rest in calls:
            is_a_command([file, command, *re.findall(r"--[a-z-]+", rest)])


@pytest.mark.slow
class TestSsh:
    @pytest.fixture
    def started(self, cluster, program, stand_ins, tmp_path):
        """The script with two hosts."""
        for host in ("alpha", "beta"):
            (tmp_path / host).mkdir()
            (tmp_path / host / "minipool").symlink_to(ROOT)
        (tmp_path / "hosts.txt").write_text("alpha\nbeta\n")
        return program(DEPLOY / "ssh.sh", cluster.address, tmp_path / "hosts.txt", python="/bin/bash",
                       PATH=stand_ins(ssh=SSH), HOSTS=str(tmp_path), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="",
                       MINIPOOL_SECRET=cluster.secret)

    def test_starts_a_node_on_each_host_and_shows_no_secret(self, cluster, started, own_mark):
        with cluster.executor() as ex:
            wait_for_workers(ex, 2 * len(os.sched_getaffinity(0)))
            assert len(ex.info()["nodes"]) == 2
            assert all(cluster.secret.encode() not in read(pid, "cmdline") for pid in marked(own_mark))
        started.signal(signal.SIGINT)
        assert started.code() == 0

    def test_ctrl_c_lets_the_running_job_end_and_all_nodes_leave(self, started, busy, gate):
        _, future = busy(2 * len(os.sched_getaffinity(0)))
        started.signal(signal.SIGINT)
        started.says("draining")
        gate.open()
        assert (future.result(60), future.attempts) == ("held", 1)
        assert started.code() == 0

    def test_a_script_that_is_killed_leaves_no_node_behind(self, started, own_mark, cluster):
        started.says("(?s)connected to.*connected to")
        started.signal(signal.SIGKILL)
        assert started.code() == -signal.SIGKILL
        wait_until(lambda: marked(own_mark) == [cluster.server.pid])


@pytest.mark.slow
class TestSlurm:
    @pytest.fixture
    def batch(self, program, stand_ins, tmp_path):
        """batch(**environ): the script as sbatch would start it, on two hosts with two GPUs each."""
        path = stand_ins(srun=SRUN, scancel=SCANCEL, hostname="#!/bin/sh\necho 127.0.0.1\n",
                         python='#!/bin/bash\nexec "$REAL" "${@/0.0.0.0/127.0.0.1}"\n')      # for this machine only
        return lambda **environ: program(DEPLOY / "slurm.sh", python="/bin/bash", cwd=ROOT, PATH=path, PYTHON="python",
                                         REAL=sys.executable, STEPS=str(tmp_path / "steps"), SLURM_JOB_ID="7",
                                         **environ)

    def test_one_node_on_each_host_has_the_gpus_that_slurm_gave(self, batch, cluster):
        script = batch(MINIPOOL_ADDRESS=cluster.address, MINIPOOL_SECRET_FILE=str(cluster.secret_file))
        with cluster.executor() as ex:
            wait_for_workers(ex, 4)
            masks = ex.options(on="slurm").run(os.getenv, "CUDA_VISIBLE_DEVICES")
            assert sorted(masks.values()) == ["0", "1", "2", "3"] and len(ex.info()["nodes"]) == 2
        script.signal(signal.SIGTERM)
        assert script.code() == 0

    def test_at_the_warning_running_jobs_end_and_nothing_runs_twice(self, batch, cluster, busy, gate):
        script = batch(MINIPOOL_ADDRESS=cluster.address, MINIPOOL_SECRET_FILE=str(cluster.secret_file))
        _, future = busy(4)
        script.signal(signal.SIGTERM)
        script.says("draining")
        gate.open()
        assert (future.result(60), future.attempts) == ("held", 1)
        assert script.code() == 0

    def test_the_lifetime_ends_it_where_nobody_warns(self, batch, cluster):
        script = batch(MINIPOOL_ADDRESS=cluster.address, MINIPOOL_SECRET_FILE=str(cluster.secret_file), LIFETIME="1s")
        assert script.code() == 0 and "draining" in script.err

    def test_without_an_address_the_allocation_has_a_server_of_its_own(self, batch, own_mark, tmp_path, cluster):
        cluster.server.signal(signal.SIGTERM)
        assert cluster.server.code() == 0
        script = batch(MINIPOOL_PORT=str(cluster.port))
        script.says("(?s)connected to.*connected to")
        with minipool.Executor(cluster.address, secret=minipool.find_secret().text) as ex:
            assert ex.submit(pow, 2, 10).result(60) == 1024
        script.signal(signal.SIGTERM)
        assert script.code() == 0

    def test_the_drain_fits_between_warning_and_end(self):
        text = (DEPLOY / "slurm.sh").read_text()
        assert int(re.search(r"--signal=B:TERM@(\d+)", text)[1]) >= minipool.DRAIN_SECONDS + 10
        lifetime = minipool.TIME(re.search(r"LIFETIME:-(\w+)", text)[1])
        hours, minutes, seconds = map(int, re.search(r"--time=(\d+):(\d+):(\d+)", text).groups())
        assert 60 <= 3600 * hours + 60 * minutes + seconds - lifetime - minipool.DRAIN_SECONDS <= 300


def settings(unit):
    """Return {key: values} of a unit."""
    found = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


class TestUnits:
    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
    def test_systemd_finds_nothing_to_complain_about(self, unit, tmp_path):
        there = tmp_path / unit.name
        there.write_text(unit.read_text().replace("/opt/minipool/.venv/bin/python", f'"{sys.executable}"'))
        done = subprocess.run(["systemd-analyze", "verify", there], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
    def test_stopping_it_leaves_time_to_drain(self, unit):
        assert int(settings(unit)["TimeoutStopSec"][0]) > minipool.DRAIN_SECONDS
        python, *words = settings(unit)["ExecStart"][0].split()
        is_a_command(words)

    def test_only_the_node_is_told_to_stop_not_its_workers(self):
        assert settings(DEPLOY / "minipool-node.service")["KillMode"] == ["mixed"]

    def test_what_they_start_is_a_pool(self, program, cluster):
        started = settings(DEPLOY / "minipool-node.service")
        assert started["Environment"] == ["MINIPOOL_SECRET_FILE=/etc/minipool/secret"]
        node = program(*started["ExecStart"][0].split()[1:], cwd=ROOT, MINIPOOL_ADDRESS=cluster.address,
                       MINIPOOL_SECRET_FILE=str(cluster.secret_file), CUDA_VISIBLE_DEVICES="")
        with cluster.executor() as ex:
            assert ex.submit(pow, 2, 10).result(60) == 1024
        node.signal(signal.SIGTERM)
        assert node.code() == 0

    def test_a_file_that_its_group_can_read_is_refused_so_they_use_none(self, tmp_path):
        (tmp_path / "credential").write_text(minipool.Secret.new().text)
        (tmp_path / "credential").chmod(0o440)          # what LoadCredential= makes for a User=
        with pytest.raises(minipool.Refused, match="others can read"):
            minipool.find_secret(path=str(tmp_path / "credential"))
        assert not any("LoadCredential" in settings(unit) for unit in UNITS)


@pytest.fixture(scope="module")
def parts():
    """The manifest: {(kind, name): what it asks for}."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return {(part["kind"], part["metadata"]["name"]): part["spec"] for part in parts}


class TestKubernetes:
    def deployments(self, parts):
        return {name: spec for (kind, name), spec in parts.items() if kind == "Deployment"}

    def test_there_are_a_server_its_port_and_nodes(self, parts):
        assert parts.keys() == {("Service", "minipool"), ("Deployment", "minipool-server"),
                                ("Deployment", "minipool-node")}

    def test_fields_are_those_of_kubernetes(self, parts):
        pod = {"containers", "volumes", "terminationGracePeriodSeconds", "enableServiceLinks"}
        container = {"name", "image", "args", "env", "ports", "readinessProbe", "resources", "volumeMounts"}
        for spec in self.deployments(parts).values():
            assert spec.keys() <= {"replicas", "strategy", "selector", "template"}
            assert spec["template"].keys() == {"metadata", "spec"} and spec["template"]["spec"].keys() <= pod
            for one in spec["template"]["spec"]["containers"]:
                assert one.keys() <= container

    def test_selectors_find_their_pods_and_pods_have_time_to_drain(self, parts):
        for spec in self.deployments(parts).values():
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
            assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > minipool.DRAIN_SECONDS
        server = parts["Deployment", "minipool-server"]
        assert parts["Service", "minipool"]["selector"] == server["template"]["metadata"]["labels"]
        assert server["replicas"] == 1 and server["strategy"] == {"type": "Recreate"}

    def test_the_port_is_ours_and_asked_for_by_tcp(self, parts):
        [container] = parts["Deployment", "minipool-server"]["template"]["spec"]["containers"]
        [port], [outside] = container["ports"], parts["Service", "minipool"]["ports"]
        assert port["containerPort"] == outside["port"] == minipool.DEFAULT_PORT
        assert outside["targetPort"] == container["readinessProbe"]["tcpSocket"]["port"] == port["name"]

    def test_commands_are_ours_and_the_secret_is_a_variable(self, parts):
        for spec in self.deployments(parts).values():
            [container] = spec["template"]["spec"]["containers"]
            is_a_command(container["args"])
            [variable] = container["env"]
            assert variable["name"] == "MINIPOOL_SECRET"
            assert variable["valueFrom"]["secretKeyRef"] == {"name": "minipool", "key": "secret"}
        [container] = parts["Deployment", "minipool-node"]["template"]["spec"]["containers"]
        assert container["args"][2] == f"minipool:{minipool.DEFAULT_PORT}"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1

    def test_a_file_of_a_secret_is_a_link_which_is_refused(self, tmp_path):
        (tmp_path / "data").touch(mode=0o600)
        (tmp_path / "secret").symlink_to("data")
        with pytest.raises(minipool.Refused, match="cannot be read"):
            minipool.find_secret(path=str(tmp_path / "secret"))


class TestDockerfile:
    STEPS = re.findall(r"^([A-Z]+) (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)

    def test_it_copies_what_there_is_and_what_an_installation_needs(self):
        [copied] = [set(rest.split()[:-1]) for step, rest in self.STEPS if step == "COPY"]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        modules = {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
        texts = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
        assert copied == texts | modules
        assert all((ROOT / name).is_file() for name in copied)

    def test_it_starts_our_server_on_our_port_as_nobody_special(self):
        steps = dict(self.STEPS)
        is_a_command(re.findall(r'"([^"]+)"', steps["CMD"]))
        assert int(steps["EXPOSE"]) == minipool.DEFAULT_PORT
        assert steps["USER"] == "minipool"

    def test_its_python_is_one_of_ours(self):
        version = re.search(r"python:(\d\.\d+)", dict(self.STEPS)["ARG"])[1]
        assert f"Python :: {version}\"" in (ROOT / "pyproject.toml").read_text()


class TestPage:
    def test_every_file_is_explained(self):
        page = (ROOT / "docs/deploy.md").read_text()
        for path in DEPLOY.iterdir():
            assert f"(../examples/deploy/{path.name})" in page, path.name

    def test_the_secret_that_it_makes_is_one(self):
        code = re.search(r"^python3 -c '(.*)' >secret.txt$", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE)[1]
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
        assert made.startswith("mp1_") and minipool.Secret(made).role_key("client", b"")
