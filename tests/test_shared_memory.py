"""Large values between processes of one host lie in memory files: none of their bytes are sent, and nothing is left."""

import contextlib
import fcntl
import gc
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, end, is_alive, wait_for_workers, wait_until

import minipool
from minipool import INLINE, MAPPED, Blob, open_place

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")

LARGE = 64_000_000
kept = []           # in a worker: what its jobs leave there


# ---- what the jobs do ----

def double_in_place(array):
    array *= 2
    return array


def keep(array):
    kept.append(array)
    return array


def sums_of_kept():
    sums = [int(array.sum()) for array in kept]
    kept.clear()
    return sums


def ones_from(folder):
    """Leave a file that says which process this is."""
    (Path(folder) / str(os.getpid())).touch()
    return numpy.ones(LARGE // 8)


def without_descriptors():
    """Return a large value from a process that can open nothing more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return b"x" * LARGE


def memory_files(pid="self"):
    """Return the inodes of the memory files that a process has descriptors of, one for each, and how many it maps."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):          # it was closed meanwhile
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:minipool"):
                found.append(os.stat(path).st_ino)
    return sorted(found), Path(f"/proc/{pid}/maps").read_text().count("/memfd:minipool")


def resident(pid="self"):
    """Return how many bytes of a process are in memory, its share of what it shares with others."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) << 10


# ---- the file ----

@pytest.fixture(autouse=True)
def nothing_idle():
    yield
    gc.collect()
    minipool._idle.clear()


def blob_of(data, **options):
    blob = Blob([data], **options)
    assert bool(blob.place) == options.get("share", True)
    return blob


class TestPlace:
    @pytest.mark.parametrize("size", [1, INLINE + 1, MAPPED - 1, MAPPED, 3 * MAPPED + 17])
    def test_what_lies_there_is_what_was_put_there(self, size):
        parts = [os.urandom(size // 3), bytearray(os.urandom(size - size // 3))]
        blob = Blob(parts)
        assert blob.size == size and blob.read(0, size) == b"".join(parts) == bytes(open_place(blob.place, size))
        assert blob.read(size // 2, size // 4) == b"".join(parts)[size // 2:size // 2 + size // 4]

    @pytest.mark.parametrize("size", [INLINE + 1, MAPPED])
    def test_what_a_reader_writes_reaches_nobody(self, size):
        blob = blob_of(bytes(size))
        one, other = open_place(blob.place, size), open_place(blob.place, size)
        one[:5] = b"mine!"
        assert (bytes(one[:5]), bytes(other[:5]), blob.read(0, 5)) == (b"mine!", bytes(5), bytes(5))

    def test_another_process_has_it_there_and_not_from_a_process_that_has_ended(self):
        script = "import minipool, sys; blob = minipool.Blob([b'x' * 2_000_000])\n" \
                 "print(blob.place, flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=-1, stdout=-1, text=True) as maker:
            place = maker.stdout.readline().strip()
            value = open_place(place, 2_000_000)
            assert value == b"x" * 2_000_000
            maker.kill()
        assert value == b"x" * 2_000_000 and open_place(place, 2_000_000) is None

    def test_a_place_that_does_not_fit_holds_nothing(self):
        blob, (reading, writing) = blob_of(bytes(MAPPED)), os.pipe()
        pid, descriptor, token = blob.place.split()
        other = os.memfd_create("minipool-not")
        os.write(other, bytes(2 * MAPPED))
        try:
            for place in ["", "text", f"{pid} {descriptor}", f"{pid} {descriptor} {'0' * 32}", f"{pid} x {token}",
                          *(f"{process} {descriptor} {token}" for process in (1, -1, 1 << 40)),
                          *(f"{pid} {number} {token}" for number in (reading, writing, other, 99_999, 1 << 40, -1))]:
                assert open_place(place, MAPPED) is None, place
            assert open_place(blob.place, 2 * MAPPED) is None
            assert open_place(blob.place, MAPPED) == bytes(MAPPED)
        finally:
            for number in (reading, writing, other):
                os.close(number)

    def test_without_one_the_buffers_that_can_be_written_to_are_copied_and_no_others(self):
        fixed, changing = b"fixed" * 1000, bytearray(b"first" * 1000)
        blob = Blob([fixed, changing], share=False)
        changing[:5] = b"later"
        assert not blob.place and blob.parts[0].obj is fixed and blob.read(5000, 5) == b"first"


class TestUsedAgain:
    def test_a_value_that_is_read_never_changes_though_its_maker_has_forgotten_it(self):
        blob = blob_of(b"1" * MAPPED)
        value = open_place(blob.place, MAPPED)
        del blob
        others = [blob_of(b"2" * MAPPED) for _ in range(3)]
        del others
        assert value == b"1" * MAPPED

    def test_nor_does_that_of_a_reader_that_closes_all_its_descriptors(self):
        script = "import minipool, os, sys; value = minipool.open_place(sys.argv[1], minipool.MAPPED)\n" \
                 "os.closerange(3, 100); print(flush=True); sys.stdin.read(1); print(bytes(value[:3]))"
        blob = blob_of(b"1" * MAPPED)
        command = [sys.executable, "-c", script, blob.place]
        with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as reader:
            reader.stdout.readline()
            del blob
            assert len(minipool._idle) == 1
            blob_of(b"2" * MAPPED)
            assert reader.communicate("x")[0] == "b'111'\n"

    def test_once_nobody_reads_it_the_next_value_lies_in_the_same_memory(self):
        blob = blob_of(b"1" * MAPPED)
        first, value = memory_files()[0], open_place(blob.place, MAPPED)
        del blob, value
        blob = blob_of(b"2" * MAPPED)
        assert memory_files()[0] == first and open_place(blob.place, MAPPED) == b"2" * MAPPED

    def test_who_comes_late_gets_nothing_from_a_file_that_was_written_again(self):
        blob = blob_of(b"1" * MAPPED)
        late = blob.place
        del blob
        blob = blob_of(b"2" * MAPPED)
        assert late.split()[:2] == blob.place.split()[:2]
        assert open_place(late, MAPPED) is None and open_place(blob.place, MAPPED) is not None

    def test_who_comes_while_it_is_written_gets_nothing(self, monkeypatch):
        blob = blob_of(b"1" * MAPPED)
        place, seen, unlock = blob.place, [], fcntl.flock
        del blob

        def look(file, how):
            if how == fcntl.LOCK_UN:
                seen.append(open_place(place, MAPPED))
            unlock(file, how)
        monkeypatch.setattr(minipool.fcntl, "flock", look)
        assert blob_of(b"2" * MAPPED) and seen == [None]

    def test_a_fork_of_its_maker_does_not_write_it_again(self, monkeypatch):
        blob = blob_of(b"1" * MAPPED)
        late = blob.place
        del blob
        monkeypatch.setattr(os, "getpid", lambda: 1)
        other = Blob([b"2" * MAPPED])
        assert bytes(open_place(late, MAPPED)) == b"1" * MAPPED and other.place.split()[1] != late.split()[1]

    def test_two_idle_ones_are_kept_and_none_that_is_very_large(self, monkeypatch):
        monkeypatch.setattr(minipool, "REUSED", 2 * MAPPED)
        blobs = [blob_of(bytes(size)) for size in (3 * MAPPED, MAPPED, MAPPED, MAPPED, MAPPED - 1)]
        assert len(memory_files()[0]) == 5
        blobs.clear()
        assert len(minipool._idle) == 2 and len(memory_files()[0]) == 2


class TestTooFewDescriptors:
    def test_the_last_three_quarters_of_them_are_left_to_the_program(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        blob = blob_of(bytes(MAPPED))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            held = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
            before = memory_files()
            data = bytearray(MAPPED)
            plain, value = Blob([data]), open_place(blob.place, MAPPED)
            data[0] = 1
            assert not plain.place and plain.read(0, MAPPED) == bytes(MAPPED)
            assert type(value) is bytearray and value == bytes(MAPPED) and memory_files() == before
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held:
                os.close(descriptor)

    def test_without_any_there_is_a_plain_value(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        blob = blob_of(bytes(MAPPED))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            plain, value = Blob([bytearray(MAPPED)]), open_place(blob.place, MAPPED)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not plain.place and plain.read(0, MAPPED) == bytes(MAPPED) and value is None


# ---- jobs ----

@pytest.fixture
def ranges(pool, monkeypatch):
    """The messages about ranges at the client's connection, as they come."""
    return count_ranges(pool, monkeypatch)


def count_ranges(pool, monkeypatch):
    seen, peer = [], pool._client.peer
    handle = peer._handle_range

    def handle_range(connection, message):
        if message[0] in ("pull", "range", "gone"):
            seen.append(message[0])
        return handle(connection, message)
    monkeypatch.setattr(peer, "_handle_range", handle_range)
    return seen


def random_array(seed=0, size=LARGE):
    return numpy.random.default_rng(seed).random(size // 8)


class TestJobs:
    def test_an_array_goes_to_a_job_and_back_without_a_range(self, pool, ranges):
        array = random_array()
        before = array.copy()
        result = pool.submit(double_in_place, array).result(60)
        assert (result == before * 2).all() and (array == before).all() and result.flags.writeable
        assert not ranges

    @pytest.mark.parametrize("value", [bytes(LARGE), "x" * LARGE, [b"1" * MAPPED, bytearray(b"2" * MAPPED)],
                                       numpy.frombuffer(bytes(LARGE)), numpy.ones((1000, 1000)).T], ids=type)
    def test_so_does_every_large_value(self, pool, ranges, value):
        result = pool.submit(lambda value: value, value).result(60)
        assert type(result) is type(value) and numpy.all(result == value) and not ranges

    def test_a_function_that_holds_an_array_goes_without_a_range_too(self, pool, ranges):
        array = random_array(1)
        job = lambda: float(array[-1])      # noqa: E731
        assert pool.submit(job).result(60) == array[-1] and not ranges
        del job
        pool.submit(int).result(60)         # with which the worker and the server are told to forget the other

    def test_what_either_side_writes_does_not_reach_the_other(self, pool):
        array = numpy.ones(LARGE // 8, int)
        job = pool.options(on=pool.info()["workers"][0]["name"])
        result = job.submit(keep, array).result(60)
        result += 1
        array += 5
        again = job.submit(keep, array).result(60)
        array += 1
        again += 1
        assert job.submit(sums_of_kept).result(60) == [LARGE // 8, 6 * LARGE // 8]
        assert (int(result.sum()), int(again.sum())) == (2 * LARGE // 8, 7 * LARGE // 8)

    def test_an_argument_is_as_it_was_when_it_was_submitted(self, own_pool, gate):
        pool = own_pool(1)
        pool.submit(wait_for, gate.path)
        array, futures = numpy.zeros(MAPPED, int), []
        for number in range(5):
            array[:] = number
            futures.append(pool.submit(lambda array: int(array[0] + array[-1]), array))
        gate.open()
        assert [future.result(60) for future in futures] == [0, 2, 4, 6, 8]

    def test_a_value_is_passed_on_from_job_to_job_without_a_range(self, pool, ranges):
        first = pool.submit(random_array, 3)
        second = pool.submit(double_in_place, first)
        unseen = pool.submit(double_in_place, second)
        minipool.wait([second], 60)
        value = first.result(60)
        third = pool.submit(lambda a, b: a + b, first, second)
        value[:] = 0
        assert (unseen.result(60) == 4 * random_array(3)).all() and (third.result(60) == 3 * random_array(3)).all()
        assert not ranges

    def test_of_many_waiting_jobs_a_read_only_array_is_not_copied_for_each(self, own_pool, gate):
        pool, array = own_pool(1), numpy.frombuffer(bytes(MAPPED), numpy.uint8)
        before = set(memory_files()[0])
        pool.submit(wait_for, gate.path)
        futures = [pool.submit(int, 0)] + [pool.submit(len, array) for _ in range(100)]
        assert len(set(memory_files()[0]) - before) == minipool.KEPT_COPIES
        gate.open()
        assert {future.result(60) for future in futures} == {0, MAPPED}


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)


class TestElsewhere:
    """Where the memory cannot be reached values come in ranges, as from another host."""

    def test_an_argument_and_a_result_come_in_ranges(self, pool, ranges, monkeypatch):
        make = Blob.__init__

        def hide(blob, *arguments):
            make(blob, *arguments)
            blob.place = f"1 {blob.place.partition(' ')[2]}"    # another process has that number there
        monkeypatch.setattr(Blob, "__init__", hide)
        monkeypatch.setattr(minipool, "open_place", lambda place, size: open_place(f"1{place}", size))
        array = random_array(4)
        assert (pool.submit(double_in_place, array).result(60) == 2 * array).all()
        pulled, came = ranges.count("pull"), ranges.count("range")
        assert pulled == came == -(-(LARGE + 192) // minipool.RANGE)

    def test_a_value_of_a_worker_without_descriptors_comes_in_ranges(self, own_pool, monkeypatch):
        pool = own_pool(1)
        ranges = count_ranges(pool, monkeypatch)
        assert pool.submit(without_descriptors).result(60) == b"x" * LARGE
        assert set(ranges) == {"range"}

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="makes a pid namespace")
    def test_in_another_pid_namespace_too(self, cluster, monkeypatch):
        cluster.node(before=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))
        with cluster.executor() as pool:
            assert pool.submit(os.readlink, "/proc/self/ns/pid").result(60) != os.readlink("/proc/self/ns/pid")
            ranges, array = count_ranges(pool, monkeypatch), random_array(5)
            assert (pool.submit(double_in_place, array).result(60) == 2 * array).all()
            assert {"pull", "range"} == set(ranges)


class TestNothingIsLeft:
    @pytest.mark.slow
    def test_of_two_hundred_values(self, own_pool):
        pool, shared = own_pool(1), set(os.listdir("/dev/shm"))
        (worker,) = wait_for_workers(pool, 1)

        def echoes(times):
            for number in range(times):
                assert pool.submit(double_in_place, numpy.full(MAPPED, number)).result(60)[-1] == 2 * number
            gc.collect()
            return [len(found) for found, _ in (memory_files(), memory_files(worker))], [
                memory_files()[1], memory_files(worker)[1]], resident() + resident(worker)
        files, maps, size = echoes(20)
        files_later, maps_later, size_later = echoes(200)
        assert max(*files, *files_later) <= 2 * 4 and max(*maps, *maps_later) <= 4
        assert size_later < size + 2 * 8 * MAPPED
        assert set(os.listdir("/dev/shm")) == shared

    def test_in_the_client_when_its_executor_has_ended(self, own_mark):
        before = memory_files()
        with minipool.Executor("local", max_workers=1, initializer=keep, initargs=(random_array(),)) as pool:
            futures = [pool.submit(len, random_array(number)) for number in range(5)]
        assert [future.result() for future in futures] == [LARGE // 8] * 5
        assert memory_files() == before

    def test_in_the_client_when_a_job_is_done_cancelled_or_failed(self, own_pool, gate):
        pool, array, before = own_pool(1), numpy.ones(2 * minipool.REUSED // 8), memory_files()[0]
        pool.submit(wait_for, gate.path)
        futures = [pool.submit(fn, array) for fn in (len, len, str.lower)]
        assert len(memory_files()[0]) == len(before) + 3
        futures[0].cancel()
        gate.open()
        assert futures[1].result(60) == len(array) and futures[2].exception(60)
        wait_until(lambda: memory_files()[0] == before, 10)

    def test_of_a_worker_that_is_killed(self, own_pool, tmp_path):
        pool, before = own_pool(1), memory_files()
        value = pool.submit(ones_from, tmp_path).result(60)
        (worker,) = wait_for_workers(pool, 1)
        end(worker)
        wait_until(lambda: not is_alive(worker))
        assert (value == 1).all()
        assert pool.submit(ones_from, tmp_path).result(60).sum() == LARGE // 8
        assert len(list(tmp_path.iterdir())) == 2
        del value
        assert memory_files() == before

    def test_the_job_of_a_worker_that_dies_with_its_result_runs_again(self, own_pool, tmp_path, monkeypatch):
        pool = own_pool(1)
        (worker,) = wait_for_workers(pool, 1)

        def dies(place, size):
            if place.startswith(f"{worker} ") and is_alive(worker):
                end(worker)
                wait_until(lambda: not is_alive(worker))
            return open_place(place, size)
        monkeypatch.setattr(minipool, "open_place", dies)
        future = pool.submit(ones_from, tmp_path)
        assert future.result(60).sum() == LARGE // 8
        assert len(list(tmp_path.iterdir())) == 2 and future.attempts == 2
