"""Mailboxes: named states of a program, which its jobs ask and change as well. What coordination.py is made of.

A mailbox answers questions in the order of their arrival: "when this holds, change, answer" is one atomic step, and who
asks for what does not hold yet waits, with a limit or without one.

All mailboxes are kept by the program that made them, behind one lock. A thread for each worker asks, by `Executor.run`,
which busy workers answer beside their jobs, what the jobs there want; answers go back in the same way. Questions have
numbers and are told until they are known to have come, so what is lost on the way costs nothing.

Other programs share nothing, and with this one all is lost. Jobs that wait then raise RuntimeError after FORGOTTEN
seconds; so they do if the server stays away for so long, or if the executor was shut down before they ended.
"""
from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
import minipool
from minipool import Executor, JobKilled, WorkerDied, current_job

POLL = 1.0          # seconds for which a worker is asked what its jobs want; a shutdown waits for that as well
FORGOTTEN = 60.0    # seconds without being asked after which a job gives up: servers too wait so long for a client
GONE = 15.0         # seconds for which the server must not know a worker: after ten, one that was restarted knows all

Who = tuple[str, str]       # who asks: worker process and job; ("", "") is the program itself


class Reply(concurrent.futures.Future):
    """An answer to come; `place` is where it is waited for: a mailbox, or its number in a worker."""

    place: Any = None


# ---- mailboxes ----


class _Mailbox:
    """A named state, and those who wait for it to change, in order."""

    def __init__(self, kind: str, name: str, limit: int) -> None:
        self.label, self.limit = f"{kind} {name!r}", limit
        self.holders: list[Who] = []                                # of leases: one entry for each
        self.items = collections.deque[Any]()                       # of a queue; or the value that is set, if one is
        self.readers: dict[str, tuple[Who, collections.deque[Any]]] = {}    # who subscribed, and what is unread
        self.waiting: dict[Reply, tuple[Who, str, tuple]] = {}      # whose step does not hold yet, and its arguments

    def set(self, who: Who, value: Any) -> None:
        self.items = collections.deque([value])

    def release(self, who: Who, n: int) -> None:
        # a helper thread does not know its job: what its process holds is its own
        own = [held for held in self.holders if held[0] == who[0] and (held[1] == who[1] or not held[1] or not who[1])]
        if len(own) < n:
            raise RuntimeError(f"{self.label} is released by who does not hold it, or does no more")
        for held in own[:n]:
            self.holders.remove(held)

    def publish(self, who: Who, item: Any) -> None:
        for _, unread in self.readers.values():
            unread.append(item)

    def read(self, who: Who, reader: str) -> Any:
        if reader not in self.readers:
            raise ValueError(f"this subscription of {self.label} is closed")
        return self.readers[reader][1].popleft()

    def advance(self) -> None:
        """Answer all whose step holds."""
        moved = True
        while moved:
            moved = False
            for reply, (who, step, args) in list(self.waiting.items()):
                holds, change = STEPS[step]
                if holds(self, *args):
                    moved = True
                    del self.waiting[reply]
                    try:
                        reply.set_result(change(self, who, *args))
                    except (RuntimeError, ValueError) as error:
                        reply.set_exception(error)

    def forget(self, process: str, job: str | None) -> None:
        """Take back what a job holds and wants, or all jobs of a process."""
        def stays(who: Who) -> bool:
            return who[0] != process or job not in (None, who[1])
        self.holders = [who for who in self.holders if stays(who)]
        self.readers = {name: reader for name, reader in self.readers.items() if stays(reader[0])}
        self.waiting = {reply: asked for reply, asked in self.waiting.items() if stays(asked[0])}


def _always(box: _Mailbox, *args: Any) -> bool:
    return True


STEPS: dict[str, tuple[Any, Any]] = {       # when this holds, change and answer
    "open":      (_always, lambda box, who: None),
    "acquire":   (lambda box: len(box.holders) < box.limit, lambda box, who: box.holders.append(who)),
    "release":   (_always, _Mailbox.release),
    "holders":   (_always, lambda box, who: len(box.holders)),
    "put":       (lambda box, item: not 0 < box.limit <= len(box.items), lambda box, who, item: box.items.append(item)),
    "get":       (lambda box: box.items, lambda box, who: box.items.popleft()),
    "size":      (_always, lambda box, who: len(box.items)),
    "set":       (_always, _Mailbox.set),
    "look":      (lambda box: box.items, lambda box, who: box.items[0]),
    "clear":     (_always, lambda box, who: box.items.clear()),
    "subscribe": (_always, lambda box, who, reader: box.readers.update({reader: (who, collections.deque())})),
    "publish":   (_always, _Mailbox.publish),
    "read":      (lambda box, reader: reader not in box.readers or box.readers[reader][1], _Mailbox.read),
    "leave":     (_always, lambda box, who, reader: box.readers.pop(reader, None) and None),
}


# ---- in the program: the table of mailboxes, and what carries questions and answers between it and the workers ----


class _End:
    """What the table knows of a worker process."""

    def __init__(self, process: str, view: Executor) -> None:
        self.process, self.view = process, view
        self.seen = 0                                       # the number of the last question that came
        self.asked: dict[int, tuple[str, Reply]] = {}       # steps and replies, until the answer has arrived there
        self.outbox: dict[int, tuple[bool, Any]] = {}       # answers on their way: is it a value, and which
        self.is_speaking = False                            # a thread brings them


class Table:
    """All mailboxes of this program; one lock makes each step of each of them atomic."""

    def __init__(self) -> None:
        self.key, self.lock = os.urandom(8).hex(), threading.RLock()
        self.boxes: dict[tuple[str, str], _Mailbox] = {}
        self.ends: dict[str, _End] = {}
        self.posts: dict[Executor, _Post] = {}

    def ask(self, kind: str, name: str, limit: int, step: str, args: tuple, now: bool, who: Who = ("", "")) -> Reply:
        """Return the answer to come; with `now` it is TimeoutError unless it comes at once."""
        reply = Reply()
        with self.lock:
            if (kind, name) not in self.boxes:
                self.boxes[kind, name] = _Mailbox(kind, name, limit)
            box = reply.place = self.boxes[kind, name]
            if kind == "Semaphore" and box.limit != limit:
                reply.set_exception(ValueError(f"{box.label} was made with the value {box.limit}, not {limit}"))
                return reply
            box.waiting[reply] = who, step, args
            box.advance()
            if now:
                self.withdraw(reply)
        return reply

    def withdraw(self, reply: Reply) -> None:
        """Answer TimeoutError unless there is an answer."""
        with self.lock:
            if reply.place.waiting.pop(reply, None):
                reply.set_exception(TimeoutError(f"{reply.place.label} did not answer in time"))

    def wait(self, reply: Reply, timeout: float | None) -> Any:
        """Return the answer, or raise TimeoutError."""
        return reply.result(timeout)

    def serve(self, executor: Executor) -> None:
        """Listen to the jobs of an executor from now on, until it is shut down."""
        with self.lock:
            if executor not in self.posts:
                self.posts[executor] = _Post(self, executor)

    def hear(self, view: Executor, process: str, over: list[str], number: int, question: tuple) -> int:
        """Take in what a worker process says; return the number of the last question that was understood."""
        with self.lock:
            end = self.ends.setdefault(process, _End(process, view))
            for job in over:
                self.forget(process, job)
            if number > end.seen:               # else the listener of another view of this pool brought it
                end.seen = number
                self._answer(end, number, *question)
            self._speak(end)
            return end.seen

    def _answer(self, end: _End, number: int, job: str, step: str, *rest: Any) -> None:
        if step == "withdraw":
            if rest[0] in end.asked:
                self.withdraw(end.asked[rest[0]][1])
            return
        kind, name, limit, args, now = rest
        reply = self.ask(kind, name, limit, step, args, now, (end.process, job))
        end.asked[number] = step, reply

        def answered(reply: concurrent.futures.Future) -> None:     # under the lock, as are all answers
            error = reply.exception()
            end.outbox[number] = error is None, error or reply.result()
            self._speak(end)
        reply.add_done_callback(answered)

    def _speak(self, end: _End) -> None:
        if end.outbox and not end.is_speaking:
            end.is_speaking = True
            threading.Thread(target=self._send, args=(end,), name="coordination-answers", daemon=True).start()

    def _send(self, end: _End) -> None:
        """Bring answers to a worker until none is left, or it does not take them: then hear() begins again."""
        took: bool | None = True
        while True:
            with self.lock:
                number = next(iter(end.outbox), 0)
                if not number or not took:
                    end.is_speaking = False
                    return
                is_value, value = end.outbox[number]
            try:
                took = _at(end.view, _take, self.key, end.process, number, is_value, value)
            except Exception as error:          # it cannot travel, or the executor is closed
                took = is_value
                end.outbox[number] = False, RuntimeError(f"an item cannot come to this job: {error!r}")
            else:
                with self.lock:
                    if took:
                        end.outbox.pop(number, None)
                        end.asked.pop(number, None)

    def forget(self, process: str, job: str | None = None) -> None:
        """Take back what a job had that has ended, or all jobs of a process that is no more."""
        if not process:                         # none was heard yet
            return
        with self.lock:
            if job is None and (end := self.ends.pop(process, None)):
                for number, (is_value, value) in reversed(end.outbox.items()):
                    step, reply = end.asked[number]
                    if is_value and step == "get":
                        reply.place.items.appendleft(value)     # it never got there
            for box in self.boxes.values():
                box.forget(process, job)
                box.advance()


def _at(view: Executor, fn: Any, *args: Any) -> Any:
    """Return what a worker answers; None if it is not there."""
    try:
        return next(iter(view.run(fn, *args).values()), None)
    except (WorkerDied, JobKilled, TimeoutError):
        return None


class _Post:
    """Listens to the workers of one executor, until that is shut down."""

    def __init__(self, table: Table, executor: Executor) -> None:
        self.table, self.executor = table, executor
        self.processes: dict[str, str] = {}     # of the workers that are listened to, "" if not known yet
        self.is_closed = threading.Event()
        threading.Thread(target=self._watch, name="coordination-watch", daemon=True).start()

    def _watch(self) -> None:
        """Listen to each worker that comes; take back what those had that the server has not known for long."""
        absent: dict[str, float] = {}
        while not self.is_closed.is_set():
            now, workers = time.monotonic(), list[dict[str, Any]]()
            try:
                workers = self.executor.info()["workers"]
                there = {worker["name"] for worker in workers}
                absent = {name: absent.get(name, now) for name in self.processes if name not in there}
            except TimeoutError:                # the server is away; at once: the executor is closed
                if not self.processes and time.monotonic() < now + POLL:
                    break
                absent = {}
            for name in [name for name, since in absent.items() if now > since + GONE]:
                self.table.forget(self.processes.pop(name))
            for worker in workers:
                self._look(worker["name"], worker["connected"], worker["state"] == "draining" and not worker["jobs"])
            self.is_closed.wait(POLL)
        del self.table.posts[self.executor]

    def _look(self, name: str, is_connected: bool, is_leaving: bool) -> None:
        """Begin to listen to a worker, or let it go."""
        if is_leaving:                          # a worker that is asked something stays for the answer
            self.processes.pop(name, None)
        elif is_connected and name not in self.processes:
            self.processes[name] = ""
            threading.Thread(target=self._listen, args=(name,), name="coordination-listen", daemon=True).start()

    def _listen(self, name: str) -> None:
        """Hear what the jobs in one worker want, as long as there is one of that name."""
        process, seen, over = "", 0, list[str]()
        try:
            view = self.executor.options(on=name, timeout=POLL + 30)
            while name in self.processes:
                try:
                    found = _at(view, _talk, self.table.key, process, seen, over, POLL)
                except Exception as error:      # closed: then this fails too; or what a job gave cannot be opened here
                    found = _at(view, _refuse, self.table.key, process, seen + 1, repr(error))
                if found is None:
                    self.is_closed.wait(0.1)
                    continue
                now, over, number, question = found
                if now != process:
                    self.table.forget(process)
                    self.processes[name] = process = now
                    seen = 0
                seen = max(seen, self.table.hear(view, process, over, number, question))
        except ValueError:                      # it went just now
            pass
        except RuntimeError:                    # the executor is closed, or broken
            self.is_closed.set()
        finally:
            self.processes.pop(name, None)
            self.table.forget(process)


# ---- in the workers ----

_home = ""      # which table this copy of the file belongs to


class Line:
    """What the jobs of a worker process want of a table."""

    def __init__(self, key: str) -> None:
        self.key, self.process = key, os.urandom(8).hex()
        self.numbers = itertools.count(1)
        self.changed = threading.Condition()
        self.questions: dict[int, tuple] = {}       # that the table may not have
        self.replies: dict[int, Reply] = {}
        self.jobs: dict[str, tuple[int, Any]] = {}  # that may hold something: the thread of each, and its frame there
        self.asked_at = time.monotonic()            # when the program last wanted to know

    def ask(self, kind: str, name: str, limit: int, step: str, args: tuple, now: bool) -> Reply:
        """Do as the table's."""
        job, frame = current_job(), _job_frame()
        who = f"{job.id}.{job.attempt}" if job and frame else ""
        with self.changed:
            if who and step in ("acquire", "subscribe"):
                self.jobs[who] = threading.get_ident(), frame
            reply = self._post(who, step, kind, name, limit, args, now)
            self.replies[reply.place] = reply
        return reply

    def _post(self, *question: Any) -> Reply:
        reply = Reply()
        reply.place = next(self.numbers)
        self.questions[reply.place] = question
        self.changed.notify_all()
        return reply

    def withdraw(self, reply: Reply) -> None:
        """Do as the table's; the answer comes like any other."""
        with self.changed:
            if reply.place in self.replies:
                self._post("", "withdraw", reply.place)

    def wait(self, reply: Reply, timeout: float | None) -> Any:
        """Do as the table's; RuntimeError if nobody listens."""
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        while not reply.done() and (left := give_up - time.monotonic()) > 0:
            if time.monotonic() > self.asked_at + FORGOTTEN:
                raise RuntimeError(f"nobody has asked for {FORGOTTEN:g} s what this job wants: its program has ended, "
                                   "or shut the executor down before this job ended, or the server is away")
            concurrent.futures.wait([reply], min(POLL, left))
        return reply.result(0)

    def over(self) -> list[str]:
        """Return the jobs that have ended: their frame is not on the stack of their thread any more."""
        stacks, over = sys._current_frames(), []
        for job, (thread, frame) in self.jobs.items():
            there = stacks.get(thread)
            while there is not None and there is not frame:
                there = there.f_back
            if there is None:
                over.append(job)
        return over


def _job_frame() -> Any:
    """Return the frame that the worker called for the job that this thread runs; None in a helper thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        below = frame.f_back
        if below is not None and below.f_globals.get("__name__") == "minipool_worker":
            return frame
        frame = below
    return None


def _talk(key: str, process: str, seen: int, known: list[str], seconds: float) -> tuple[str, list[str], int, tuple]:
    """Return process, jobs that have ended, and the next question, or wait for it; `seen` and `known` were heard."""
    line = desk(key)
    with line.changed:
        line.asked_at = time.monotonic()
        if process == line.process:
            line.questions = {number: asked for number, asked in line.questions.items() if number > seen}
            line.jobs = {job: there for job, there in line.jobs.items() if job not in known}
        over = line.over()
        line.changed.wait_for(lambda: line.questions or over, seconds)
        number = min(line.questions, default=0)
        return line.process, over, number, line.questions.get(number, ())


def _take(key: str, process: str, number: int, is_value: bool, value: Any) -> bool:
    """Take an answer; False if the question was another process's."""
    line = desk(key)
    if line.process == process and (reply := line.replies.pop(number, None)):
        reply.set_result(value) if is_value else reply.set_exception(value)
    return line.process == process


def _refuse(key: str, process: str, number: int, error: str) -> None:
    """Answer a question that the program could not open."""
    line = desk(key)
    with line.changed:
        reply = line.replies.pop(number, None) if process in ("", line.process) else None
        if reply and line.questions.pop(number, None):
            reply.set_exception(RuntimeError(f"an item of this job cannot be opened there: {error}"))


# ---- both ----


def desk(key: str = "") -> Any:
    """Return whom to ask: here the table, or in a worker the line to it; with a key, that of what was pickled."""
    global _home
    # no globals of this file, of which a worker has a copy for each client that sent it: jobs of jobs use the same line
    here = vars(minipool).setdefault("_mailboxes", types.SimpleNamespace(lines={}))
    table = vars(here).get("table")
    if table and key in ("", table.key):
        return table
    if not key and not here.lines and current_job() is None:
        return vars(here).setdefault("table", Table())
    give_up = time.monotonic() + GONE
    while not (key or _home) and time.monotonic() < give_up:        # a new worker will soon be asked
        time.sleep(0.05)
    _home = key or _home
    return here.lines.setdefault(_home, Line(_home))
