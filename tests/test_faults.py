"""A bad network between a client and its server costs time and nothing else; and a short run of chaos loses nothing."""

import subprocess
import sys
import time

import pytest
from fault_proxy import FaultProxy
from processes import ROOT, wait_until

import minipool

BIG = 3_000_000         # bytes: a dozen ranges


def double(value):
    return value * 2


def slowly(number):
    time.sleep(0.05)
    return number + 1


@pytest.fixture
def faulty(cluster, between_hosts):
    """An executor that reaches its pool of two workers through a proxy that misbehaves: (executor, proxy)."""
    cluster.node(cpu_workers=2)
    with FaultProxy("127.0.0.1", cluster.port) as proxy:
        with minipool.Executor(f"127.0.0.1:{proxy.port}", secret=cluster.secret) as executor:
            executor.submit(abs, 1).result(60)
            yield executor, proxy
            proxy.frozen = proxy.freeze_up = proxy.freeze_down = False


def test_a_connection_that_is_cut_again_and_again_loses_nothing(faulty):
    executor, proxy = faulty
    futures = [executor.submit(slowly, n) for n in range(60)]
    while not all(future.done() for future in futures):
        proxy.cut()
        time.sleep(0.1)
    assert [future.result(0) for future in futures] == list(range(1, 61)) and proxy.cuts > 2


@pytest.mark.parametrize("place", [0, 1, 39, 40, 500, 100_000, 300_000, 3_000_000, 6_000_000])
def test_a_cut_at_any_byte_of_a_large_value_is_resumed(faulty, place):
    executor, proxy = faulty
    value = b"x" * BIG
    proxy.cut_after = place
    assert executor.submit(double, value).result(60) == value * 2
    assert proxy.cuts == 1


@pytest.mark.parametrize("place", [0, 7, 20, 60, 5_000, 400_000, 4_000_000])
def test_a_flipped_bit_is_noticed_and_the_value_arrives_intact(faulty, place):
    executor, proxy = faulty
    value = bytes(range(256)) * (BIG // 256)
    proxy.flip_after = place
    assert executor.submit(double, value).result(60) == value * 2
    assert proxy.flip_after is None


def test_pieces_of_seven_bytes_make_no_difference(faulty):
    executor, proxy = faulty
    proxy.chop = 7
    assert executor.submit(double, b"y" * 100_000).result(60) == b"y" * 200_000


def test_a_slow_line_only_takes_longer(faulty):
    executor, proxy = faulty
    proxy.delay = 0.1
    assert list(executor.map(double, range(20))) == [2 * n for n in range(20)]


@pytest.mark.parametrize("direction", ["frozen", "freeze_up", "freeze_down"])
def test_a_line_that_freezes_for_a_while_goes_on_where_it_was(faulty, direction):
    executor, proxy = faulty
    setattr(proxy, direction, True)
    futures = [executor.submit(double, n) for n in range(20)]
    time.sleep(1)
    assert not any(future.done() for future in futures)
    setattr(proxy, direction, False)
    assert [future.result(60) for future in futures] == [2 * n for n in range(20)]


def test_a_server_that_is_killed_and_started_again_is_ridden_out(cluster):
    cluster.node(cpu_workers=2)
    with cluster.executor() as executor:
        futures = [executor.submit(slowly, n) for n in range(60)]
        wait_until(lambda: futures[3].done())
        cluster.server.process.kill()
        cluster.serve()
        assert [future.result(60) for future in futures] == list(range(1, 61))
        assert all(future.attempts == 1 for future in futures)      # what ran was adopted, not run again


@pytest.mark.slow
def test_a_short_run_of_chaos_loses_nothing(own_mark):
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--jobs", "300", "--kill-worker-every", "0.3",
               "--kill-node-every", "1.5", "--restart-server-every", "2.5", "--cut-client-every", "0.5",
               "--patience", "90"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110)
    print(run.stdout, run.stderr)
    assert run.returncode == 0 and "lost 0, duplicate 0, wrong 0" in run.stdout
