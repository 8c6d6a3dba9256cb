"""Two machines and a third: nodes and a server in network namespaces of their own, joined by a bridge."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from processes import ROOT, Program, marked, wait_until

import minipool

WORKER = ROOT / "minipool_worker.py"
HOSTS = {"server": "10.87.0.1", "left": "10.87.0.2", "right": "10.87.0.3"}
PROBE = f"minipool-probe-{os.getpid()}"      # several test processes may look at once


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def namespaces_work():
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        return False
    made = ip("netns", "add", PROBE, check=False).returncode == 0
    return made and ip("netns", "del", PROBE, check=False).returncode == 0


pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mark"),
              pytest.mark.skipif(not namespaces_work(), reason="needs root, `ip` and the right to make namespaces")]


class Network:
    """Three hosts on one bridge; the bridge is in the server's namespace, so nothing is left when they are gone."""

    def __init__(self, stack, folder):
        self._folder, self._prefix = folder, f"mp{os.getpid() % 10000}"
        for host in HOSTS:
            ip("netns", "add", self.name(host))
            stack.callback(ip, "netns", "del", self.name(host), check=False)
        self.on("server", "link", "add", "bridge", "type", "bridge")
        for host in ("left", "right"):
            self.on("server", "link", "add", host, "type", "veth", "peer", "name", "eth", "netns", self.name(host))
            self.on("server", "link", "set", host, "master", "bridge", "up")
        for host, device in (("server", "bridge"), ("left", "eth"), ("right", "eth")):
            self.on(host, "link", "set", "lo", "up")
            self.on(host, "addr", "add", f"{HOSTS[host]}/24", "dev", device)
            self.on(host, "link", "set", device, "up")

    def name(self, host):
        return f"{self._prefix}-{host}"

    def on(self, host, *arguments):
        ip("-n", self.name(host), *arguments)

    def run(self, host, *arguments, **environ):
        """Start a Python program on a host."""
        return Program(self._folder, arguments, before=("ip", "netns", "exec", self.name(host)), **environ)


@pytest.fixture
def network(own_mark, tmp_path):
    with ExitStack() as stack:
        yield Network(stack, tmp_path)


@pytest.fixture
def pool(network, monkeypatch):
    """A server and two nodes of one worker each, on three hosts."""
    monkeypatch.setenv("MINIPOOL_SECRET", minipool.Secret.new().text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    programs = [network.run("server", ROOT / "minipool.py", "serve", "--host", HOSTS["server"], "--dead-after", "1.5")]
    programs[0].says("server on")
    for host in ("left", "right"):
        programs.append(network.run(host, WORKER, "connect", HOSTS["server"], "--name", "host", "--tag", host,
                                    "--gpus", "none", "--cpu-workers", "1"))
        programs[-1].says("connected to")
    yield Pool(network, programs)
    for program in reversed(programs):
        program.signal(signal.SIGKILL)
        program.code()


class Pool:
    def __init__(self, network, programs):
        self.network, self.programs = network, programs

    def client(self, text, **environ):
        """Start a client on the server's host: `ex` is its executor, `say` prints at once."""
        text = f"import minipool, os, socket\nsay = lambda *a: print(*a, flush=True)\n" \
               f"ex = minipool.Executor('{HOSTS['server']}')\n{text}\nex.kill_workers()"
        return self.network.run("server", "-c", text, **environ)


def test_a_job_runs_on_each_host_and_status_shows_both(pool, network):
    client = pool.client("""
for host in ("left", "right"):
    say(host, ex.options(on=host).submit(os.readlink, "/proc/self/ns/net").result(60))""")
    assert client.code() == 0, client.err
    places = dict(line.split() for line in client.out.splitlines())
    here = os.readlink("/proc/self/ns/net")
    assert set(places) == {"left", "right"} and len({here, *places.values()}) == 3
    status = network.run("server", ROOT / "minipool.py", "status", "--address", HOSTS["server"])
    assert status.code() == 0, status.err
    assert "nodes: 2, workers: 2" in status.out


def test_the_second_node_of_one_name_gets_a_suffix(pool):
    client = pool.client("say(*sorted({node['name'] for node in ex.info()['nodes']}))")
    assert client.code() == 0, client.err
    first, second = client.out.split()
    assert first == "host" and second.startswith("host") and second != first


def test_a_host_that_is_cut_off_is_given_up_and_its_job_runs_elsewhere(pool, network, tmp_path):
    client = pool.client("""
def job():
    import pathlib, time
    place = os.readlink("/proc/self/ns/net")
    folder = pathlib.Path(FOLDER)
    (folder / f"began {len(list(folder.glob('began *')))}").write_text(place)
    while not (folder / "gate").exists():
        time.sleep(0.01)
    return place
FOLDER = os.environ["FOLDER"]
ex.wait_for_workers(2, 60)      # else the one that is there first is as good
future = ex.options(prefer="left").submit(job)
say("result", future.result(100), future.attempts)""", FOLDER=str(tmp_path))
    wait_until((tmp_path / "began 0").exists)
    network.on("server", "link", "set", "left", "down")
    wait_until((tmp_path / "began 1").exists)
    (tmp_path / "gate").touch()
    assert client.code() == 0, client.err
    _, place, attempts = client.out.split()
    assert place == (tmp_path / "began 1").read_text() != (tmp_path / "began 0").read_text() and attempts == "2"


def test_nothing_is_left(own_mark):
    assert not marked(own_mark)
    assert PROBE not in ip("netns", "list").stdout
