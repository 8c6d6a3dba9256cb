"""Locks, semaphores, events, queues, variables and topics that a program shares with its jobs.

Copy this file and mailboxes.py beside your program; they need nothing but minipool, and the workers need no copy.

    from minipool import Executor
    from coordination import Lock, Queue

    def work(n, disk, done):
        with disk:                                      # one job at a time
            ...
        done.put(n)

    with Executor() as ex, ex.options() as jobs:        # the view's end waits for its jobs, which still are listened to
        disk, done = Lock("disk", executor=ex), Queue(executor=ex)
        for n in range(10):
            jobs.submit(work, n, disk, done)
        print([done.get() for _ in range(10)])

`python examples/coordination.py` shows it. Methods, arguments and exceptions are those of the standard library. What
travels is a name: jobs may be given an object, refer to it as a global, or make it again, as `Lock("disk")`. It reaches
jobs of `executor`; of the executor that was opened last if none is given.

Everything is kept by the program that made it (mailboxes.py says how): other programs share nothing, and with that one
all is lost. Shut an executor down when its jobs have ended, as above: then nobody listens to them any more. A job that
waits keeps its worker.

What a job holds and its subscriptions end with it: within about two seconds if it forgot them or its process died, in
half a minute if its host cannot be reached. A death costs the items that its jobs had got, and a job that begins anew
puts its items again. An item is copied when it goes to a job or comes from one. What has been made stays to the end of
the program, used or not.
"""
from __future__ import annotations

import os
import pickle
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from mailboxes import Table, desk

import minipool
from minipool import Executor


def _last_executor() -> Executor | None:
    try:
        return minipool.get_executor()
    except (AttributeError, RuntimeError):      # an older minipool; none is open
        return None


class _Face:
    """A mailbox as its users see it: a name, and whom to ask."""

    def __init__(self, name: str | None, limit: int, executor: Executor | None) -> None:
        self.name, self._limit, self._executor, self._desk = name or os.urandom(8).hex(), limit, executor, desk()
        if executor is not None and isinstance(self._desk, Table):
            self._desk.serve(executor)
        self._ask("open")

    def _ask(self, step: str, *args: Any, block: bool = True, timeout: float | None = None) -> Any:
        """Return the answer, or raise TimeoutError; what was not answered by then never will be."""
        reply = self._desk.ask(type(self).__name__, self.name, self._limit, step, args, not block)
        try:
            return self._desk.wait(reply, timeout)
        except TimeoutError:
            self._desk.withdraw(reply)
            return self._desk.wait(reply, None)     # an answer that crossed it, or TimeoutError
        except BaseException:                       # Ctrl-C
            self._desk.withdraw(reply)
            raise

    def _give(self, step: str, item: Any, block: bool = True, timeout: float | None = None) -> None:
        try:
            cloudpickle.dumps(item)                 # twice, to say it now: it may go to a job much later
        except Exception as error:
            raise pickle.PicklingError(f"{self!r} cannot take a {type(item).__qualname__}: {error}") from error
        self._ask(step, item, block=block, timeout=timeout)

    def __reduce__(self) -> Any:
        if isinstance(self._desk, Table):
            if executor := self._executor or _last_executor():
                self._desk.serve(executor)
            elif not self._desk.posts:
                raise RuntimeError(f"{self!r} is known in this program only: give it executor= for jobs to reach it")
        return _arrived, (type(self), self.name, self._limit, self._desk.key)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _arrived(cls: Any, name: str, limit: int, key: str) -> Any:
    """Return the face of a mailbox that was pickled."""
    face = object.__new__(cls)
    face.name, face._limit, face._executor, face._desk = name, limit, None, desk(key)
    return face


class Semaphore(_Face):
    """A threading.Semaphore; whoever holds it may be in any process, and only who acquired it releases it."""

    def __init__(self, name: str | None = None, value: int = 1, *, executor: Executor | None = None) -> None:
        if value < 0:
            raise ValueError("semaphore initial value must be >= 0")
        super().__init__(name, value, executor)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Return True once it is held; False if it was not to be had in time."""
        if not blocking and timeout is not None:
            raise ValueError("can't specify a timeout for a non-blocking call")
        try:
            self._ask("acquire", block=blocking, timeout=timeout)
        except TimeoutError:
            return False
        return True

    def release(self, n: int = 1) -> None:
        """Give it back; RuntimeError if it is not held here."""
        if n < 1:
            raise ValueError("n must be one or more")
        self._ask("release", n)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


class Lock(Semaphore):
    """A threading.Lock."""

    def __init__(self, name: str | None = None, *, executor: Executor | None = None) -> None:
        super().__init__(name, executor=executor)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Return True once it is held; False if it was not to be had in time."""
        if timeout < 0 and timeout != -1:
            raise ValueError("timeout value must be a non-negative number")
        return super().acquire(blocking, None if timeout == -1 else timeout)

    def release(self) -> None:
        """Give it back; RuntimeError if it is not held here."""
        super().release()

    def locked(self) -> bool:
        """Return whether somebody holds it."""
        return self._ask("holders") > 0


class Event(_Face):
    """A threading.Event."""

    def __init__(self, name: str | None = None, *, executor: Executor | None = None) -> None:
        super().__init__(name, 0, executor)

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._ask("size") > 0

    def set(self) -> None:
        """Set it: all who wait go on."""
        self._ask("set", True)

    def clear(self) -> None:
        """Have those who wait from now on wait."""
        self._ask("clear")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; return False if that was not in time."""
        try:
            return self._ask("look", timeout=timeout)
        except TimeoutError:
            return False


class Queue(_Face):
    """A queue.Queue without join(); the first who makes it sets its maxsize."""

    def __init__(self, name: str | None = None, maxsize: int = 0, *, executor: Executor | None = None) -> None:
        super().__init__(name, maxsize, executor)

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an item at the end, or raise queue.Full."""
        if block and timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        try:
            self._give("put", item, block=block, timeout=timeout if block else None)
        except TimeoutError:
            raise queue.Full from None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first item, or raise queue.Empty."""
        if block and timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        try:
            return self._ask("get", block=block, timeout=timeout if block else None)
        except TimeoutError:
            raise queue.Empty from None

    def put_nowait(self, item: Any) -> None:
        """Put an item at the end, or raise queue.Full."""
        self.put(item, False)

    def get_nowait(self) -> Any:
        """Take the first item, or raise queue.Empty."""
        return self.get(False)

    def qsize(self) -> int:
        """Return how many items there are."""
        return self._ask("size")

    def empty(self) -> bool:
        """Return whether there are none."""
        return self.qsize() == 0


class Variable(_Face):
    """A value that anybody sets and anybody gets."""

    def __init__(self, name: str | None = None, *, executor: Executor | None = None) -> None:
        super().__init__(name, 0, executor)

    def set(self, value: Any) -> None:
        """Set it: the last one counts."""
        self._give("set", value)

    def get(self, timeout: float | None = None) -> Any:
        """Return the value, once there is one; TimeoutError if that is not in time."""
        return self._ask("look", timeout=timeout)

    def delete(self) -> None:
        """Take the value away: who gets it from now on waits for another."""
        self._ask("clear")


class Topic(_Face):
    """What is published goes to all who have subscribed by then, and to nobody else."""

    def __init__(self, name: str | None = None, *, executor: Executor | None = None) -> None:
        super().__init__(name, 0, executor)

    def publish(self, item: Any) -> None:
        """Give an item to each subscriber there is."""
        self._give("publish", item)

    def subscribe(self) -> Subscription:
        """Return an iterator of what is published from now on; it ends with close(), or with the job."""
        return Subscription(self)


class Subscription(Iterator[Any]):
    """The items of a topic, from when this was made; for one reader, in the process that made it."""

    def __init__(self, topic: Topic) -> None:
        self._topic, self._key = topic, os.urandom(8).hex()
        topic._ask("subscribe", self._key)

    def get(self, timeout: float | None = None) -> Any:
        """Return the next item; TimeoutError if there is none in time, ValueError once it is closed."""
        return self._topic._ask("read", self._key, timeout=timeout)

    def close(self) -> None:
        """Take no more items, and forget those that are unread."""
        self._topic._ask("leave", self._key)

    def __next__(self) -> Any:
        try:
            return self.get()
        except ValueError:
            raise StopIteration from None

    def __reduce__(self) -> Any:
        raise TypeError("a subscription cannot travel: give the topic, and subscribe there")


# ---- a small program ----


def measure(n: int, disk: Lock, done: Queue) -> None:
    """Do what only one job at a time may do, and tell of it."""
    with disk:
        time.sleep(0.01)
    done.put((n, os.getpid()))


def main() -> None:
    number = 6 if "--quick" in sys.argv else 60
    with Executor() as ex, ex.options() as jobs:
        disk, done = Lock("disk", executor=ex), Queue(executor=ex)
        for n in range(number):
            jobs.submit(measure, n, disk, done)
        found = [done.get() for _ in range(number)]
        print(f"{number} jobs in {len({pid for _, pid in found})} processes used the disk, one at a time")


if __name__ == "__main__":
    main()
