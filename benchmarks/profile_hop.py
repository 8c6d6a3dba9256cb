"""Where the microseconds of one small job go, hop by hop.

    python benchmarks/profile_hop.py [--jobs 10000] [--trips 1000]

A server and a node with two workers, started here as programs of their own and reached over TCP, as in throughput.py.
Three tables, each of another kind of evidence:

    processor   what the kernel charged each thread of each process, per job: for a stream of jobs, and for one job at
                a time. No code is touched for it, so this is what a change has to make smaller.
    round trip  when a lone job passes each point on its way; the clock is that of the machine, so the points of
                different processes compare. Wrappers round the points cost about 1 us each.
    steps       each step alone, on real messages, warm and undisturbed: the least that it can cost.

The difference between a step alone and the same step on the way is what waking a thread or a core, a cold cache and
the lock of the interpreter cost. The product has no hooks: this file is put where Python looks for `sitecustomize`
and patches the programs that it starts.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import mmap
import os
import platform
import shutil
import statistics
import struct
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

HOPS = os.environ.get("MINIPOOL_HOPS", "")  # the folder of the records, where this is a sitecustomize
ROOT = Path(HOPS, "root").read_text() if HOPS else str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)
import minipool

RECORD = struct.Struct("dI")  # when, which point
RECORDS = 1 << 20  # bytes that a process may write of them
WORKERS = 2


def same(value):
    return value


# ---- in every process: the points, and the names of the threads ----


class Recorder:
    """The records of one process: a file in shared memory, so that nothing has to be told when the process ends."""

    def __init__(self, path):
        path.write_bytes(bytes(RECORDS))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.labels_path = path.with_suffix(".labels")
        self.labels, self.offset = {}, 0

    def point(self, label):
        """Note that this moment is `label`."""
        number = self.labels.get(label)
        if number is None:
            number = self.labels[label] = len(self.labels) + 1
            self.labels_path.write_text("\n".join(self.labels))
        offset = self.offset
        if offset <= RECORDS - RECORD.size:
            self.offset = offset + RECORD.size
            RECORD.pack_into(self.map, offset, time.perf_counter(), number)

    def around(self, owner, name, before=None, after=None, of=lambda self: ""):
        """Replace a method by one that notes when it begins and when it returns."""
        inner = getattr(owner, name, None)
        if inner is None:  # another version of the product has no such step
            return

        def outer(*args, **kwargs):
            if before:
                self.point(before.format(of(args[0])))
            result = inner(*args, **kwargs)
            if after:
                self.point(after.format(of(args[0])))
            return result
        setattr(owner, name, outer)

    def install(self):
        """Set the points, in all roles: which of them a process passes tells what it is."""
        import minipool_worker

        peer = {"server": "{}", "client": "server < client", "worker": "server < worker"}
        begin = minipool.Connection.__init__

        def init(connection, seam, *args, **kwargs):
            begin(connection, seam, *args, **kwargs)
            mine = minipool.Connection.role if hasattr(minipool.Connection, "role") else "?"
            seam.hop = peer.get(connection.remote, connection.remote).format(mine)
        minipool.Connection.__init__ = init
        for cls, role in ((minipool.Client, "client"), (minipool_worker.Worker, "worker")):
            self.tell(cls, role)
        hop = hop_of
        self.around(minipool.Plain, "receive_into", None, "{}: received", hop)
        self.around(minipool.Plain, "send", "{}: sending", "{}: sent", hop)
        self.around(minipool.Connection, "receive", None, "{}: decoded", lambda c: hop(c._seam))
        self.around(minipool.Scheduler, "receive", "server: scheduler begins", "server: scheduler done")
        self.around(minipool.Client, "submit", "client: submit called", "client: submit returns")
        self.around(minipool.Client, "_on_batch", None, "client: batch handled")
        self.around(minipool_worker.Worker, "_on_batch", None, "worker: batch handled")
        self.around(minipool_worker.Worker, "_next", None, "worker: main thread has the job")
        self.around(minipool_worker.Worker, "_finish", "worker: function has returned", None)
        self.around(minipool.Future, "result", None, "client: result returns")

    @staticmethod
    def tell(cls, role):
        """Make connections know in whose process they are."""
        begin = cls.__init__

        def init(*args, **kwargs):
            minipool.Connection.role = role
            begin(*args, **kwargs)
        cls.__init__ = init


def hop_of(seam):
    return getattr(seam, "hop", "?")


def name_threads():
    """Let the kernel know the threads by their Python names, for the first table."""
    inner = threading.Thread.run

    def run(thread):
        name = thread.name.removeprefix("minipool-")
        ctypes.CDLL(None).prctl(15, name.encode()[:15], 0, 0, 0)  # PR_SET_NAME
        inner(thread)
    threading.Thread.run = run


# ---- here: the pool, and what the kernel says of it ----


def start_pool(stack, record):
    """Return an executor and the process ids by what they are; `record`: with points."""
    import throughput

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "root").write_text(ROOT)
    shutil.copy(__file__, folder / "sitecustomize.py")
    before = dict(os.environ)
    stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
    os.environ |= {"PYTHONPATH": str(folder), "MINIPOOL_HOPS": str(folder), "MINIPOOL_HOPS_RECORD": record * "1"}
    programs = []
    inner = throughput.program

    def program(*args):
        programs.append(inner(*args))
        return programs[-1]
    throughput.program = program
    try:
        pool = throughput.tcp_pool(stack)
    finally:
        throughput.program = inner
    processes = {"client": os.getpid(), "server": programs[0].pid}
    processes |= {f"worker {i}": worker["pid"] for i, worker in enumerate(pool.info()["workers"])}
    return pool, processes, folder


def charged(pid):
    """Return (name, ns on a processor, times it was switched to) of each thread of a process, by id."""
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            running, _, switches = map(int, (task / "schedstat").read_text().split())
            name = (task / "comm").read_text().strip()
            threads[task.name] = ("main" if task.name == str(pid) else name, running, switches)
    return threads


def measure(processes, count, action):
    """Run `action`; return, per job, us by the clock, and by (process, thread) us charged and switches."""
    before = {what: charged(pid) for what, pid in processes.items()}
    begin = time.perf_counter()
    action()
    seconds = time.perf_counter() - begin
    shares = collections.Counter(), collections.Counter()
    for what, pid in processes.items():
        for task, (name, running, switches) in charged(pid).items():
            _, was_running, was_switches = before[what].get(task, ("", 0, 0))
            key = what.split()[0], name
            shares[0][key] += (running - was_running) / count / 1000
            shares[1][key] += (switches - was_switches) / count
    return seconds / count * 1e6, *shares


def stream(pool, count):
    futures = [pool.submit(same, i) for i in range(count)]
    assert [future.result() for future in futures] == list(range(count))


def one_by_one(pool, count):
    for i in range(count):
        assert pool.submit(same, i).result() == i


def show_processor(jobs, trips):
    with contextlib.ExitStack() as stack:
        pool, processes, _ = start_pool(stack, record=False)
        stream(pool, 2000)
        found = [measure(processes, jobs, lambda: stream(pool, jobs)),
                 measure(processes, trips, lambda: one_by_one(pool, trips))]
    print("processor, us per job           a stream   switches    one at a time   switches")
    keys = sorted({key for _, us, _ in found for key in us if us[key] >= 0.05})
    for what in ("client", "server", "worker"):
        own = [key for key in keys if key[0] == what]
        for key in own:
            print(f"  {what + ', ' + key[1]:<28}" + "      ".join(
                f"{us[key]:10.1f} {switches[key]:10.2f}" for _, us, switches in found))
        print(f"  {what + ' in all':<28}" + "      ".join(
            f"{sum(us[k] for k in own):10.1f} {sum(s[k] for k in own):10.2f}" for _, us, s in found))
    print(f"  {'all':<28}" + "      ".join(f"{sum(us.values()):10.1f} {sum(s.values()):10.2f}" for _, us, s in found))
    print(f"  {'by the clock':<28}" + "      ".join(f"{wall:10.1f} {'':10}" for wall, _, _ in found), end="\n\n")


def read_records(folder):
    """Return the (when, label) of all processes in order."""
    found = []
    for path in folder.glob("*.hops"):
        labels = ["", *path.with_suffix(".labels").read_text().split("\n")] if path.with_suffix(".labels").exists() \
            else []
        found += [(when, labels[number]) for when, number in RECORD.iter_unpack(
            path.read_bytes()[:RECORDS // RECORD.size * RECORD.size]) if number]
    return sorted(found)


def show_round_trip(recorder, trips):
    with contextlib.ExitStack() as stack:
        pool, _, folder = start_pool(stack, record=True)
        one_by_one(pool, 200)
        begin = time.perf_counter()
        recorder.offset = 0
        one_by_one(pool, trips)
        (folder / "client.hops").write_bytes(recorder.map[:])
        (folder / "client.labels").write_text("\n".join(recorder.labels))
        records = [record for record in read_records(folder) if record[0] >= begin]
    at = collections.defaultdict(list)
    start, seen = 0.0, collections.Counter()
    for when, label in records:
        if label == "client: submit called":
            start, seen = when, collections.Counter()
        seen[label] += 1
        at[label, seen[label]].append((when - start) * 1e6)
    print(f"round trip, us: median of {trips}          at      +")
    last = 0.0
    for (label, nth), times in sorted(at.items(), key=lambda item: statistics.median(item[1])):
        if len(times) > trips / 2:  # else it is not of every trip
            when = statistics.median(times)
            print(f"  {label + f' ({nth})' * (nth > 1):<36}{when:7.0f}{when - last:7.0f}")
            last = when
    print()


# ---- each step alone ----


def microseconds(step, count=2000):
    """Return the least average time of a call in a few runs."""
    def once():
        begin = time.perf_counter()
        for _ in itertools.repeat(None, count):
            step()
        return (time.perf_counter() - begin) / count * 1e6
    return min(once() for _ in range(5))


def show_steps(size):
    import socket

    session, worker_id, key = os.urandom(16), os.urandom(20), minipool.hmac.new(os.urandom(32), digestmod="sha256")
    functions = minipool.Functions(session, itertools.count(1).__next__)
    functions.function(same)
    call = functions.dumps_call(same, (7,), {})[0]
    name = {"name": "same"}
    value = minipool.encode_value(7)
    kinds = {
        "client": [("submit", i, (session, 1), call, 0, name) for i in range(1, size + 1)],
        "server, to the worker": [("run", i, (session, i), (session, 1), call, 0, name) for i in range(1, size + 1)],
        "worker": [("finished", i, "ok", value, 1e-5, False) for i in range(1, size + 1)],
        "server": [("done", i, "ok", value, "node-0", 1) for i in range(1, size + 1)],
    }
    print(f"steps alone, us per job                in batches of {size:<4}   alone")

    def row(what, batched, alone=None):
        print(f"  {what:<44}{batched:9.2f}   " + (f"{alone:8.2f}" if alone is not None else ""))

    lock = threading.Lock()

    def locked():
        with lock:
            pass
    row("the client: pickle of the arguments", microseconds(lambda: functions.dumps_call(same, (7,), {})))
    row("the client: look the function up", microseconds(lambda: functions.function(same)))
    row("a concurrent.futures.Future", microseconds(minipool.concurrent.futures.Future))
    row("a lock, taken and given back", microseconds(locked))
    total = [0.0, 0.0]
    for sender, batch in kinds.items():
        role = sender.split(",")[0]
        for what, step in {
            "pickle": lambda b: minipool.pickle.dumps(b, 5),
            "unpickle, builtins only": lambda b, p={}: minipool._BuiltinsOnly(minipool.io.BytesIO(
                p.setdefault(len(b), minipool.pickle.dumps(b, 5)))).load(),
            "check": lambda b, role=role: [minipool.check_message(m, role) for m in b],
            "HMAC, twice": lambda b, p={}: [
                minipool._tag(key, 0, b"", p.setdefault(len(b), minipool.pickle.dumps(b, 5))) for _ in "12"],
        }.items():
            times = [microseconds(partial(step, batch), 50) / size, microseconds(partial(step, batch[:1]))]
            total = [t + more for t, more in zip(total, times)]
            row(f"{batch[0][0]}: {what}", *times)
    row("all four messages", *total)

    def scheduler_run(count):
        """Return a step: a batch of jobs from submission to acknowledgement, as the scheduler sees it."""
        scheduler = minipool.Scheduler(0.0, 1)
        id, node = worker_id, worker_id[:8].ljust(16, b"\0")
        common = {"python": minipool.PYTHON, "name": "n", "host": "h", "pid": 1}
        scheduler.receive(1, [("node", {**common, "id": node})], 0.0)
        scheduler.receive(2, [("worker", {**common, "id": id, "node": node, "node_name": "n", "slot": 0, "tags": [],
                                          "device": "cpu", "has": [], "positions": {}, "returns": False}, [])], 0.0)
        scheduler.receive(3, [("client", {**common, "session": session, "max_workers": None, "workers_seen": 0}, []),
                              ("put", (session, 1), bytes(10))], 0.0)
        numbers = itertools.count(1)
        now = itertools.count(1)

        def step():
            mine = [next(numbers) for _ in range(count)]
            sends = scheduler.receive(3, [("submit", n, (session, 1), call, 0, name) for n in mine], 1e-3 * next(now))
            left = count
            while left:
                runs = [m for m in sends.sends.get(2, ()) if m[0] == "run"]
                left -= len(runs)
                sends = scheduler.receive(2, [("finished", m[1], "ok", value, 1e-5, False) for m in runs],
                                          1e-3 * next(now))
            scheduler.receive(3, [("delivered", mine)], 1e-3 * next(now))
        return step
    row("scheduler: submit to delivered", microseconds(scheduler_run(size), 50) / size, microseconds(scheduler_run(1)))

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        far = stack.enter_context(listener.accept()[0])
        seam, room = minipool.Plain(near), memoryview(bytearray(1 << 16))

        def across():
            seam.send([b"x" * 250])
            far.recv_into(room)
        row("a frame through the kernel: send, receive", microseconds(across) / size, microseconds(across))
        thread = threading.Thread(target=lambda: collections.deque(
            iter(lambda: far.send(far.recv(999)), 0), 0), daemon=True)
        thread.start()

        def there_and_back():
            near.send(b"x" * 250)
            near.recv_into(room)
        alone = microseconds(there_and_back, 300)
        row("  to a thread that waits for it, and back", alone / size, alone)
        near.shutdown(socket.SHUT_RDWR)
        thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="of the stream (default: %(default)s)")
    parser.add_argument("--trips", type=int, default=1000, help="jobs one at a time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="messages in a frame, for the steps")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {WORKERS} workers\n")
    name_threads()
    show_processor(args.jobs, args.trips)
    with tempfile.TemporaryDirectory() as folder:
        show_steps(args.batch)
        print()
        recorder = Recorder(Path(folder, "client.hops"))
        recorder.install()
        show_round_trip(recorder, args.trips)


if __name__ == "__main__":
    main()
elif HOPS:
    name_threads()
    if os.environ["MINIPOOL_HOPS_RECORD"]:
        Recorder(Path(HOPS, f"{os.getpid()}.hops")).install()
