"""A thread that waits for a result reads the socket itself; nobody notices but the clock."""
import signal
import threading
import time
from concurrent.futures import CancelledError, TimeoutError, wait

import pytest

from minipool import Executor, Future


def same(value):
    return value


def slow(seconds):
    time.sleep(seconds)
    return seconds


@pytest.fixture(scope="module")
def pool():
    with Executor("local", max_workers=2) as ex:
        assert ex.submit(same, 1).result() == 1
        yield ex


@pytest.fixture
def readers(pool, monkeypatch):
    """The names of the threads that took in what arrived."""
    peer, names = pool._client.peer, []
    take_in = peer._on_batch

    def noted(messages):
        names.append(threading.current_thread().name)
        take_in(messages)
    monkeypatch.setattr(peer, "_on_batch", noted)
    return names


def in_thread(call):
    """Start `call` in a thread; return the list that its outcome will be in, and the thread."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)
    thread = threading.Thread(target=run, name="another")
    thread.start()
    return outcome, thread


def until_led(pool):
    """Wait until some thread reads in place of the I/O thread."""
    give_up = time.monotonic() + 30
    while not pool._client.peer._reading.locked():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def test_the_thread_that_waits_reads_its_answer_itself(pool, readers):
    for value in range(200):
        assert pool.submit(same, value).result() == value
    assert readers.count(threading.current_thread().name) > 150


def test_without_a_thread_that_waits_the_io_thread_reads(pool, readers):
    future = pool.submit(same, 7)
    wait([future])
    assert future.result() == 7 and set(readers) == {pool._client.peer.thread.name}


def test_another_thread_gets_its_answer_through_the_one_that_reads(pool):
    pool.submit(same, 0).result()
    long, short = pool.submit(slow, 1.0), pool.submit(slow, 0.2)
    outcome, thread = in_thread(long.result)
    until_led(pool)
    began = time.monotonic()
    assert short.result(30) == 0.2 and not long.done()
    assert time.monotonic() - began < 0.9
    thread.join()
    assert outcome == [1.0]


def test_who_stays_behind_is_answered_when_the_reading_thread_has_gone(pool):
    short, long = pool.submit(slow, 0.1), pool.submit(slow, 0.4)
    outcome, thread = in_thread(short.result)
    until_led(pool)
    wait([long])
    thread.join()
    assert outcome == [0.1] and long.result() == 0.4


def test_a_time_limit_is_kept_while_reading(pool):
    future = pool.submit(slow, 1.0)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        future.result(0.2)
    assert 0.19 < time.monotonic() - began < 0.8
    with pytest.raises(TimeoutError):
        future.exception(0)
    assert future.result() == 1.0


def test_a_future_that_another_thread_cancels_ends_the_wait(pool):
    running = [pool.submit(slow, 0.5) for _ in range(2)]
    queued = pool.submit(same, 1)
    outcome, thread = in_thread(queued.result)
    until_led(pool)
    assert queued.cancel()
    thread.join(0.4)
    assert not thread.is_alive() and isinstance(outcome[0], CancelledError)
    assert [future.result() for future in running] == [0.5, 0.5]


def test_a_signal_handler_that_raises_ends_the_wait_and_nothing_else(pool):
    def ring(*_):
        raise InterruptedError("ring")
    before = signal.signal(signal.SIGALRM, ring)
    future = pool.submit(slow, 0.5)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(InterruptedError, match="ring"):
            future.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert future.result() == 0.5 and pool.submit(same, 2).result() == 2


@pytest.mark.parametrize("step", ["receive", "_settle", "retire"])
def test_ctrl_c_in_the_middle_of_reading_loses_nothing(pool, monkeypatch, step):
    """The connection ends, and all that is not settled comes again over the next one."""
    futures = [pool.submit(slow, 0.05) for _ in range(6)]
    owner = {"receive": pool._client.peer.connection, "_settle": Future, "retire": pool._client}[step]
    real, pressed = getattr(owner, step), []

    def interrupted(*arguments):
        if threading.current_thread() is threading.main_thread() and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        while futures[-1].result():         # until it is this thread that reads, and not the one that always may
            futures.append(pool.submit(slow, 0.05))
    assert pressed and {future.result(30) for future in futures} == {0.05}
    assert pool.submit(same, 3).result(30) == 3


def test_what_a_thread_that_waited_has_read_is_acknowledged_soon_after_it_has_gone(pool):
    """The I/O thread may sleep on in its poll, since what came was read by another: it looks again by itself."""
    for _ in range(10):
        for value in range(20):
            assert pool.submit(same, value).result() == value
            time.sleep(0.004)       # so that the I/O thread is at its poll when the next answer comes
        give_up = time.monotonic() + 5
        while pool._client._delivered:
            assert time.monotonic() < give_up, "outcomes that were read are not acknowledged"
            time.sleep(0.01)
