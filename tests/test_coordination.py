"""Coordination (examples/coordination.py): what programs and jobs share, and what a death leaves of it."""
import os
import pathlib
import pickle
import queue
import signal
import sys
import threading

import pytest
from processes import pids, wait_until

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
import mailboxes
from coordination import Event, Lock, Queue, Semaphore, Topic, Variable

import minipool
from minipool import JobKilled, WorkerDied

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

SOON = 60


@pytest.fixture(scope="module")
def pool():
    """An embedded pool of two workers to which the program listens already."""
    with minipool.Executor("local", max_workers=2) as ex:
        event = Event(executor=ex)
        event.set()
        ex.wait_for_workers(2, SOON)
        for name in pids(ex):
            assert ex.options(on=name).submit(event.wait).result(SOON)
        yield ex


def box(face):
    """Return the mailbox behind an object of this program."""
    return mailboxes.desk().boxes[type(face).__name__, face.name]


def waiting(face, number):
    wait_until(lambda: len(box(face).waiting) == number)


def note(path, text):
    with open(path, "a") as file:
        file.write(text + "\n")


def inside(held, path, seconds=0.005):
    """Note when this holds it and when no more."""
    with held:
        note(path, "in")
        threading.Event().wait(seconds)
        note(path, "out")


def most_at_once(path):
    now = most = 0
    for line in pathlib.Path(path).read_text().split():
        now += 1 if line == "in" else -1
        most = max(most, now)
    return most


def take(held, **limits):
    return held.acquire(**limits)


def take_and(what, held, ready=None):
    """Take it, say so, and end in some way without giving it back."""
    held.acquire()
    if ready:
        ready.set()
    if what == "raise":
        raise KeyError("forgot it")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        threading.Event().wait()


def hold(lock, ready, done, leave=False):
    """Hold it from `ready` until `done`, in the worker's slot or (leave) beside other jobs."""
    with lock:
        if leave:
            minipool.secede()
        ready.set()
        return done.wait(SOON)


def put_all(where, items):
    for item in items:
        where.put(item)


def get_all(where, number):
    return [where.get() for _ in range(number)]


class Point:
    def __init__(self, x):
        self.x = x


def only_in_a_job(x):
    if "MINIPOOL_WORKER" not in os.environ:
        raise ModuleNotFoundError("no module named torch")
    return x


def only_in_the_program(x):
    if "MINIPOOL_WORKER" in os.environ:
        raise ModuleNotFoundError("no module named pandas")
    return x


class Elsewhere:
    """Can be pickled everywhere, and loaded where `load` can."""

    def __init__(self, load):
        self.load = load

    def __reduce__(self):
        return self.load, (1,)


class TestLock:
    def test_two_jobs_never_overlap_row_2_31(self, pool, tmp_path):
        lock, path = Lock(executor=pool), str(tmp_path / "notes")
        for future in [pool.submit(inside, lock, path) for _ in range(30)]:
            future.result(SOON)
        assert most_at_once(path) == 1 and not lock.locked()

    def test_the_program_and_its_jobs_share_it(self, pool):
        with Lock("shared", executor=pool) as held:
            assert held and Lock("shared").locked()
            assert pool.submit(take, Lock("shared"), blocking=False).result(SOON) is False
            assert pool.submit(take, Lock("shared"), timeout=0.05).result(SOON) is False
        assert pool.submit(take, Lock("shared"), timeout=SOON).result(SOON) is True

    def test_it_is_served_in_the_order_of_arrival(self, pool):
        lock, order = Lock(executor=pool), Queue(executor=pool)
        lock.acquire()

        def wait_for_turn(n):
            with lock:
                order.put(n)
        threads = [threading.Thread(target=wait_for_turn, args=(n,)) for n in range(8)]
        for n, thread in enumerate(threads):
            thread.start()
            waiting(lock, n + 1)
        lock.release()
        assert get_all(order, 8) == list(range(8))
        for thread in threads:
            thread.join()

    def test_only_who_holds_it_releases_it(self, pool):
        lock = Lock(executor=pool)
        for release in (lock.release, lambda: pool.submit(lock.release).result(SOON)):
            with pytest.raises(RuntimeError, match="is released by who does not hold it"):
                release()
        with lock, pytest.raises(RuntimeError, match="is released by who does not hold it"):
            pool.submit(lock.release).result(SOON)

    def test_a_helper_thread_of_a_job_may_release_it(self, pool):
        def helped(lock):
            lock.acquire()
            helper = threading.Thread(target=lock.release)
            helper.start()
            helper.join()
            return lock.locked()
        assert pool.submit(helped, Lock(executor=pool)).result(SOON) is False

    def test_its_arguments_are_the_standard_library_s(self):
        lock = Lock()
        for arguments in [{"blocking": False, "timeout": 1}, {"timeout": -2}]:
            with pytest.raises(ValueError):
                lock.acquire(**arguments)
        assert lock.acquire(True, 0.01) and not lock.acquire(False) and not lock.acquire(timeout=0.01)

    def test_it_is_pickled_by_name(self, pool):
        lock = Lock("by name", executor=pool)
        same = pickle.loads(pickle.dumps(lock))
        assert same.acquire() and lock.locked() and repr(same) == "<Lock 'by name'>"
        same.release()

    def test_jobs_may_make_it_by_its_name(self, pool):
        with Lock("made there", executor=pool):
            assert pool.submit(lambda: Lock("made there").acquire(blocking=False)).result(SOON) is False


class TestAHolderThatIsNoMore:
    @pytest.mark.parametrize("kind", [Lock, Semaphore])
    def test_killed_frees_it_row_2_31_row_2_33(self, own_pool, kind):
        ex = own_pool(2)
        held = kind(executor=ex)
        with pytest.raises(WorkerDied):
            ex.options(max_deaths=0).submit(take_and, "die", held).result(SOON)
        assert held.acquire(timeout=SOON)

    def test_ended_by_the_program_frees_it_for_another_job(self, own_pool):
        ex = own_pool(2)
        lock, ready = Lock(executor=ex), Event(executor=ex)
        holder = ex.submit(take_and, "wait", lock, ready)
        assert ready.wait(SOON)
        waiter = ex.submit(take, lock)
        waiting(lock, 1)
        ex.kill(holder)
        assert waiter.result(SOON) and isinstance(holder.exception(SOON), JobKilled)

    def test_that_raised_or_forgot_frees_it_and_its_process_lives(self, pool):
        before = pids(pool)
        for what in ("raise", "forget"):
            lock = Lock(executor=pool)
            pool.submit(take_and, what, lock).exception(SOON)
            assert lock.acquire(timeout=SOON)
        assert pids(pool) == before

    def test_that_raised_can_be_tried_again(self, pool):
        def once(lock):
            assert lock.acquire(timeout=SOON)
            if minipool.current_job().attempt == 1:
                raise OSError("not yet")
            lock.release()
            return "done"
        assert pool.options(retries=1).submit(once, Lock(executor=pool)).result(SOON) == "done"

    def test_on_a_host_that_is_no_more_frees_it(self, cluster, monkeypatch):
        monkeypatch.setattr(mailboxes, "GONE", 1.0)
        node = cluster.node()
        with cluster.executor() as ex:
            lock, ready = Lock(executor=ex), Event(executor=ex)
            holder = ex.options(max_deaths=0).submit(take_and, "wait", lock, ready)
            assert ready.wait(SOON)
            node.process.kill()
            assert lock.acquire(timeout=SOON) and isinstance(holder.exception(SOON), WorkerDied)

    def test_keeps_it_while_it_works(self, pool):
        lock, ready, done = Lock(executor=pool), Event(executor=pool), Event(executor=pool)
        holder = pool.submit(hold, lock, ready, done)
        assert ready.wait(SOON) and not lock.acquire(timeout=3 * mailboxes.POLL)
        done.set()
        assert holder.result(SOON) and lock.acquire(timeout=SOON)

    @pytest.mark.skipif(not hasattr(minipool, "secede"), reason="in this minipool jobs keep their slot")
    def test_keeps_it_though_others_run_in_its_process(self, own_pool):
        ex = own_pool(1)
        lock, ready, done = Lock(executor=ex), Event(executor=ex), Event(executor=ex)
        holder = ex.submit(hold, lock, ready, done, leave=True)
        assert ready.wait(SOON) and ex.submit(take, lock, timeout=3 * mailboxes.POLL).result(SOON) is False
        done.set()
        assert holder.result(SOON) and ex.submit(take, lock).result(SOON)


class TestSemaphore:
    def test_at_most_two_of_ten_jobs_are_inside_row_2_33(self, own_pool, tmp_path):
        ex, path = own_pool(4), str(tmp_path / "notes")
        two = Semaphore(value=2, executor=ex)
        for future in [ex.submit(inside, two, path, 0.05) for _ in range(10)]:
            future.result(SOON)
        assert most_at_once(path) == 2

    def test_made_again_with_another_value_is_an_error(self, pool):
        Semaphore("three", 3, executor=pool)
        with pytest.raises(ValueError, match="was made with the value 3, not 2"):
            Semaphore("three", 2)
        with pytest.raises(ValueError, match="was made with the value 3, not 1"):
            pool.submit(lambda: Semaphore("three")).result(SOON)
        with pytest.raises(ValueError, match="must be >= 0"):
            Semaphore(value=-1)

    def test_several_are_released_at_once_but_not_more_than_are_held(self):
        three = Semaphore(value=3)
        assert all(three.acquire(False) for _ in range(3)) and not three.acquire(False)
        three.release(2)
        with pytest.raises(RuntimeError, match="does not hold it"):
            three.release(2)
        with pytest.raises(ValueError):
            three.release(0)


class TestEvent:
    def test_ten_waiters_are_released_by_one_set_row_2_32(self, pool):
        def wait_in_threads(event, number):
            found = []
            threads = [threading.Thread(target=lambda: found.append(event.wait(SOON))) for _ in range(number)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found
        event = Event(executor=pool)
        jobs = [pool.submit(wait_in_threads, event, 5) for _ in range(2)]
        waiting(event, 10)
        event.set()
        assert [job.result(SOON) for job in jobs] == [[True] * 5] * 2

    def test_a_wait_ends_with_its_limit(self, pool):
        event = Event(executor=pool)
        assert not event.is_set() and event.wait(0.01) is False and pool.submit(event.wait, 0.01).result(SOON) is False
        event.set()
        assert event.is_set() and event.wait(0) and pool.submit(event.wait).result(SOON)
        event.clear()
        assert not event.is_set() and not event.wait(0.01)


class TestQueue:
    def test_items_of_a_job_come_in_order_row_2_29(self, pool):
        found = Queue(executor=pool)
        job = pool.submit(put_all, found, range(100))
        assert get_all(found, 100) == list(range(100)) and job.result(SOON) is None and found.empty()

    def test_a_job_gets_what_another_puts(self, pool):
        between = Queue(executor=pool, maxsize=3)
        reader, writer = pool.submit(get_all, between, 50), pool.submit(put_all, between, range(50))
        assert reader.result(SOON) == list(range(50)) and writer.result(SOON) is None

    def test_a_put_waits_while_it_is_full(self, pool):
        full = Queue(executor=pool, maxsize=2)
        job = pool.submit(put_all, full, range(5))
        waiting(full, 1)
        assert full.qsize() == 2 and not job.done()
        with pytest.raises(queue.Full):
            full.put_nowait("no room")
        with pytest.raises(queue.Full):
            full.put("no room", timeout=0.01)
        assert get_all(full, 5) == list(range(5)) and job.result(SOON) is None

    def test_a_get_waits_while_it_is_empty(self, pool):
        empty = Queue(executor=pool)
        for limits in ((False,), (True, 0.01)):
            with pytest.raises(queue.Empty):
                empty.get(*limits)
            with pytest.raises(queue.Empty):
                pool.submit(empty.get, *limits).result(SOON)
        with pytest.raises(ValueError, match="non-negative"):
            empty.get(timeout=-1)
        job = pool.submit(empty.get)
        waiting(empty, 1)
        empty.put("at last")
        assert job.result(SOON) == "at last"

    def test_items_are_what_they_were(self, pool):
        def twice(points, results):
            point = points.get()
            assert type(point) is Point
            results.put(Point(2 * point.x))
        points, results = Queue(executor=pool), Queue(executor=pool)
        job = pool.submit(twice, points, results)
        points.put(Point(21))
        found = results.get(timeout=SOON)
        assert type(found) is Point and found.x == 42 and job.result(SOON) is None

    def test_an_item_that_cannot_be_pickled_is_one_clear_error(self, pool):
        items = Queue("items", executor=pool)
        with pytest.raises(pickle.PicklingError, match="<Queue 'items'> cannot take a lock: cannot pickle"):
            items.put(threading.Lock())
        with pytest.raises(pickle.PicklingError, match="cannot take a lock"):
            pool.submit(lambda: items.put(threading.Lock())).result(SOON)
        assert items.empty()

    def test_an_item_that_cannot_be_opened_costs_its_own_call_only(self, pool):
        items = Queue(executor=pool)
        with pytest.raises(RuntimeError, match="cannot be opened there.*no module named torch"):
            pool.submit(lambda: items.put(Elsewhere(only_in_a_job))).result(SOON)
        job = pool.submit(items.get)
        items.put(Elsewhere(only_in_the_program))
        with pytest.raises(RuntimeError, match="cannot come to this job.*no module named pandas"):
            job.result(SOON)
        items.put("fine")
        assert pool.submit(items.get).result(SOON) == "fine"

    def test_nothing_goes_to_a_reader_that_died_waiting(self, own_pool):
        ex = own_pool(1)
        items = Queue(executor=ex)
        job = ex.submit(items.get)
        waiting(items, 1)
        ex.kill(job)
        assert isinstance(job.exception(SOON), JobKilled)
        items.put("still there")
        assert items.get(timeout=SOON) == "still there"


class TestVariable:
    def test_get_waits_until_it_is_set_row_2_30(self, pool):
        value = Variable(executor=pool)
        with pytest.raises(TimeoutError):
            value.get(timeout=0.1)
        with pytest.raises(TimeoutError):
            pool.submit(value.get, 0.1).result(SOON)
        job = pool.submit(value.get)
        waiting(value, 1)
        value.set({"rate": 0.1})
        assert job.result(SOON) == value.get() == {"rate": 0.1}

    def test_the_last_one_counts_and_delete_takes_it_away(self, pool):
        value = Variable(executor=pool)
        value.set(1)
        pool.submit(value.set, None).result(SOON)
        assert value.get() is None
        value.delete()
        with pytest.raises(TimeoutError):
            value.get(0.01)


class TestTopic:
    def test_a_subscriber_sees_what_came_after_it_joined_row_2_34(self, pool):
        topic = Topic(executor=pool)
        topic.publish("before")
        first = topic.subscribe()
        topic.publish(1)
        second = topic.subscribe()
        pool.submit(topic.publish, 2).result(SOON)
        assert [next(first), next(first), second.get(SOON)] == [1, 2, 2]
        with pytest.raises(TimeoutError):
            second.get(timeout=0.01)

    def test_a_job_subscribes(self, pool):
        def listen(topic, ready):
            news = topic.subscribe()
            ready.set()
            return [next(news) for _ in range(3)]
        topic, ready = Topic(executor=pool), Event(executor=pool)
        job = pool.submit(listen, topic, ready)
        assert ready.wait(SOON)
        put_all(type("Publisher", (), {"put": topic.publish}), range(3))
        assert job.result(SOON) == [0, 1, 2]

    def test_close_ends_it_and_so_does_the_end_of_its_job(self, pool):
        topic = Topic(executor=pool)
        mine = topic.subscribe()
        pool.submit(lambda: topic.subscribe() and None).result(SOON)
        mine.close()
        assert list(mine) == []
        with pytest.raises(ValueError, match="is closed"):
            mine.get()
        with pytest.raises(TypeError, match="a subscription cannot travel"):
            pickle.dumps(mine)
        wait_until(lambda: not box(topic).readers)


class TestTheProgramAndTheServer:
    def test_without_an_executor_it_is_for_this_program_only(self, monkeypatch):
        monkeypatch.setattr(minipool, "get_executor", lambda: None, raising=False)
        monkeypatch.setattr(mailboxes.desk(), "posts", {})
        items = Queue("mine")
        items.put(1)
        assert items.get() == 1
        with pytest.raises(RuntimeError, match="is known in this program only: give it executor="):
            pickle.dumps(items)

    def test_a_restart_of_the_server_costs_nothing(self, cluster):
        cluster.node()
        with cluster.executor() as ex, ex.options() as jobs:
            lock = Lock(executor=ex)
            lock.acquire()
            job = jobs.submit(take, lock)
            waiting(lock, 1)
            cluster.server.process.kill()
            cluster.server.process.wait()
            cluster.serve()
            lock.release()
            assert job.result(SOON) is True and lock.acquire(timeout=SOON)

    def test_jobs_that_wait_after_a_shutdown_give_up(self, own_pool):
        def hurry():
            mailboxes.FORGOTTEN = 3 * mailboxes.POLL
        ex = own_pool(1)
        items = Queue(executor=ex)
        ex.submit(hurry).result(SOON)
        job = ex.submit(items.get)
        waiting(items, 1)
        ex.shutdown()
        with pytest.raises(RuntimeError, match="nobody has asked for 3 s"):
            job.result(SOON)
        wait_until(lambda: not box(items).waiting and ex not in mailboxes.desk().posts)

    def test_a_late_worker_is_listened_to(self, cluster, tmp_path):
        with cluster.executor() as ex:
            lock = Lock(executor=ex)
            cluster.node()
            assert ex.submit(take, lock).result(SOON) and lock.acquire(timeout=SOON)

    def test_a_node_that_leaves_is_not_held_up(self, cluster):
        node = cluster.node()
        with cluster.executor() as ex:
            lock = Lock(executor=ex)
            assert ex.submit(take, lock).result(SOON)
            node.signal(signal.SIGINT)
            node.code(25)                       # it would wait for 30 s for what its workers have to do

    def test_the_example_runs_as_a_program(self, program):
        example = program(pathlib.Path(mailboxes.__file__).parent / "coordination.py", "--quick")
        assert example.code() == 0 and "6 jobs in" in example.out

    @pytest.mark.skipif(not hasattr(minipool, "get_executor"), reason="this minipool has no jobs of jobs")
    def test_jobs_of_jobs_share_it_too(self, pool):
        def ask_another(lock):
            return minipool.get_executor().submit(take, lock, blocking=False).result(SOON)
        lock = Lock(executor=pool)
        with lock:
            assert pool.submit(ask_another, lock).result(SOON) is False
        assert pool.submit(ask_another, lock).result(SOON) is True
