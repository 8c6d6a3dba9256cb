"""Pool: one instance of a class in every worker, and jobs and updates for them."""
import itertools
import os
import random
import signal
import threading
import time

import pytest

import minipool
from minipool import Executor, JobKilled, Pool, Server, WorkerDied, WorkerInterface
from minipool_worker import Node

SOON = 30
SECRET = "a secret of the tests"


class Adder(WorkerInterface):
    def __init__(self, base, folder=None):
        self.base, self.updates, self.overlaps, self.busy = base, [], 0, False
        if folder:
            (folder / f"made-{os.getpid()}").touch()

    def run(self, value=0, *, wait=0.0, fail=False, die=False):
        self.overlaps += self.busy
        self.busy = True
        time.sleep(wait)
        self.busy = False
        if fail:
            raise ValueError(f"no {value}")
        if die and not os.path.exists(die):
            open(die, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.base + value

    def handle_update(self, update):
        self.overlaps += self.busy
        self.updates.append(update)
        self.base = update


class Noter:
    def run(self, path):
        time.sleep(0.05)
        path.touch()


class Teller(Adder):
    def run(self, value=0, **_):
        return os.getpid(), list(self.updates), self.overlaps


class Plain:
    """Any class with run() will do."""

    def run(self, value):
        return value


def jobs(*values, **kwargs):
    return [{"args": [value], "kwargs": kwargs} for value in values]


@pytest.fixture(scope="module")
def executor():
    with Executor("local", max_workers=2) as ex:
        ex.wait_for_workers(2, SOON)
        yield ex


class TestJobs:
    def test_one_instance_per_worker_not_per_job_row_4_1(self, executor, tmp_path):
        with Pool(Adder, {"args": [10], "kwargs": {"folder": tmp_path}}, executor=executor) as pool:
            assert pool.map(jobs(*range(40), wait=0.005)) == [10 + n for n in range(40)]
            assert len(list(tmp_path.iterdir())) == pool.get_workers_count() == 2 and pool.get_nodes_count() == 1

    def test_map_keeps_the_order_and_takes_a_generator_row_4_5(self, executor):
        rng = random.Random(5)
        with Pool(Adder, {"args": [0]}, executor=executor) as pool:
            items = ({"args": [n], "kwargs": {"wait": rng.random() / 50}} for n in range(30))
            assert pool.map(items) == list(range(30))

    def test_imap_unordered_gives_the_first_before_the_slowest_row_4_4(self, executor):
        with Pool(Adder, {"args": [0]}, executor=executor) as pool:
            assert list(pool.imap_unordered(jobs(1, wait=0.4) + jobs(2))) == [2, 1]
            assert list(pool.imap(jobs(1, wait=0.4) + jobs(2))) == [1, 2]

    def test_the_input_is_read_as_it_is_needed(self, executor):
        read = itertools.count()
        endless = ({"args": [next(read)]} for _ in itertools.count())
        with Pool(Adder, {"args": [0]}, executor=executor) as pool:
            results = pool.imap(endless)
            assert [next(results) for _ in range(100)] == list(range(100))
            assert next(read) < 200

    def test_whoever_stops_asking_wants_no_more_of_it(self, executor, tmp_path):
        with Pool(Noter, executor=executor) as pool:
            results = pool.imap({"args": [tmp_path / str(n)]} for n in range(100))
            next(results)
            del results
            pool.map(jobs(tmp_path / "the last"))
            assert len(list(tmp_path.iterdir())) < 30, "what had not begun was not cancelled"

    def test_none_is_a_result_like_any_other_row_4_6(self, executor):
        with Pool(Plain, executor=executor) as pool:
            assert pool.map(jobs(*[None] * 10)) == [None] * 10

    def test_an_exception_is_raised_in_its_place_and_the_rest_can_be_had_row_4_7(self, executor):
        with Pool(Adder, {"args": [0]}, executor=executor) as pool:
            results, got = pool.imap(jobs(1) + jobs(2, fail=True) + jobs(3)), []
            while True:
                try:
                    got.append(next(results))
                except ValueError as error:
                    got.append(str(error))
                except StopIteration:
                    break
            assert got == [1, "no 2", 3]
            with pytest.raises(ValueError, match="no 2"):
                pool.map(jobs(1) + jobs(2, fail=True) + jobs(3))
            assert pool.map(jobs(4)) == [4]

    def test_a_worker_that_dies_is_replaced_with_a_new_instance_and_the_job_runs_again(self, executor, tmp_path):
        with Pool(Adder, {"args": [5]}, executor=executor) as pool:
            assert pool.map(jobs(1, die=str(tmp_path / "once"))) == [6]

    @pytest.mark.parametrize("bad", [7, {"arg": [1]}, [1]], ids=repr)
    def test_what_is_no_job_is_refused_in_one_sentence(self, executor, bad):
        with Pool(Plain, executor=executor) as pool:
            with pytest.raises(TypeError, match="a job, an update or init_data is"):
                pool.map([bad])
            with pytest.raises(TypeError, match="a job, an update or init_data is"):
                pool.update_workers(bad)


class TestUpdates:
    def test_later_jobs_see_an_update_on_every_worker_row_4_10(self, executor):
        with Pool(Adder, {"args": [0]}, executor=executor) as pool:
            for base in range(1, 20):
                pool.update_workers({"args": [base * 100]})
                assert pool.map(jobs(*range(6), wait=0.001)) == [base * 100 + n for n in range(6)]

    def test_jobs_and_updates_never_overlap_row_4_11(self, executor):
        with Pool(Teller, {"args": [0]}, executor=executor) as pool:
            for update in range(10):
                pool.update_workers({"args": [update]})
                pool.map(jobs(*range(4)))
            assert {overlaps for _, _, overlaps in pool.map(jobs(*range(8)))} == {0}

    def test_a_late_and_a_respawned_worker_have_all_updates_in_order_before_their_first_job(self):
        with Server(port=0, secret=SECRET) as server, Node(server.address, secret=SECRET, cpu_workers=1, name="first"):
            with Pool(Teller, {"args": [0]}, SECRET, server.address) as pool:
                for update in range(100):
                    pool.update_workers({"args": [update]})
                pid, updates, _ = pool.map(jobs(1))[0]
                assert updates == list(range(100))
                with Node(server.address, secret=SECRET, cpu_workers=1, name="second"):
                    pool.executor.wait_for_workers(2, SOON)
                    assert pool.get_nodes_count() == 2
                    late = pool.executor.options(on="second")
                    assert late.submit(sum, [1, 2]).result(SOON) == 3
                    answers = [pool.executor.options(on=name).submit(_answer, pool._name).result(SOON)
                               for name in ("first", "second")]
                    assert answers[0] == answers[1] == list(range(100))
                os.kill(pid, signal.SIGKILL)
                again, updates, _ = pool.map(jobs(1))[0]
                assert again != pid and updates == list(range(100))


def _answer(key):
    return minipool._here.objects[key][0].updates


class TestSeveral:
    def test_pools_at_once_are_separate_row_4_12(self, executor):
        with Pool(Adder, {"args": [100]}, executor=executor) as one, \
                Pool(Adder, {"args": [200]}, executor=executor) as two:
            one.update_workers({"args": [1000]})
            assert one.map(jobs(1, 2)) == [1001, 1002] and two.map(jobs(1, 2)) == [201, 202]

    def test_two_owners_share_the_workers(self):
        with Server(port=0, secret=SECRET) as server, Node(server.address, secret=SECRET, cpu_workers=2):
            with Pool(Adder, {"args": [1]}, SECRET, server.address) as one, \
                    Pool(Adder, {"args": [2]}, SECRET, server.address) as two:
                assert one.map(jobs(*range(9))) == [1 + n for n in range(9)]
                assert two.map(jobs(*range(9))) == [2 + n for n in range(9)]


class TestTheEnd:
    def test_close_ends_what_runs_row_4_13(self, executor):
        pool = Pool(Adder, {"args": [0]}, executor=executor)
        raised = []

        def ask():
            try:
                pool.map(jobs(1, wait=60))
            except JobKilled as error:
                raised.append(error)
        asking = threading.Thread(target=ask)
        asking.start()
        while not any("run" in job for worker in executor.info()["workers"] for job in worker["jobs"]):
            time.sleep(0.02)
        began = time.monotonic()
        pool.close()
        asking.join(SOON)
        assert raised and time.monotonic() - began < 10
        assert executor.submit(sum, [1, 2]).result(SOON) == 3

    def test_the_only_outstanding_job_survives_the_death_of_its_node_row_4_8(self, tmp_path):
        with Server(port=0, secret=SECRET) as server, Node(server.address, secret=SECRET, cpu_workers=1, name="a") as a:
            with Pool(Adder, {"args": [5]}, SECRET, server.address) as pool:
                results = pool.imap_unordered(jobs(1, wait=1.0))
                asked = []
                asking = threading.Thread(target=lambda: asked.extend(results))
                asking.start()
                while not any(worker["jobs"] for worker in pool.executor.info()["workers"]):
                    time.sleep(0.02)
                with Node(server.address, secret=SECRET, cpu_workers=1, name="b"):
                    a.stop()
                    asking.join(SOON)
                    assert asked == [6]

    def test_a_job_that_takes_down_every_worker_ends_in_worker_died(self, executor):
        class Killer:
            def run(self):
                os.kill(os.getpid(), signal.SIGKILL)
        with Pool(Killer, executor=executor) as pool, pytest.raises(WorkerDied):
            pool.map([{}])
