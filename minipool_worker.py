# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12"]
# ///
"""The worker's half of minipool: a node process that supervises, and one worker process per device.

    python minipool_worker.py connect HOST          # one worker per visible GPU; one per core where there is none

    with minipool_worker.Node("head:8899") as node: # the same inside a program
        node.wait()

    +- node (this host; never runs user code) ----------+        +- worker (one process, one device) -------+
    |  finds devices, spawns a worker for each slot     | spawn  |  main thread: runs jobs, one at a time   |
    |  watches: pidfd -> reads the cell -> tells server | =====> |  I/O thread: talks to the server         |
    |  kills by the cell's word, respawns               |  cell  |  inbox, functions, outcomes not yet      |
    |  beats the heart for the host, collects output    | <----- |  acknowledged                            |
    +---------------------------------------------------+        +------------------------------------------+

The *cell* is shared memory in which a worker's main thread writes the token of the attempt it executes, before and
after user code. It tells the node whom to blame for a death, and makes a kill hit the right attempt or nothing.

Sections: 1 devices, 2 worker, 3 node, 4 CLI.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import heapq
import importlib.util
import logging
import multiprocessing.connection
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import minipool
from minipool import AGAIN, DRAIN_SECONDS, FOREVER, OK, PYTHON, RAISED, UNFIT, Blob, Message, Name, Peer, Secret, Value

__all__ = ["Node", "is_node_running", "find_slots"]

_log = logging.getLogger("minipool.node")


# ==================================================================================================================
# 1 devices
#
# Which workers this node starts, and what each one sees. A *slot* is one worker process to be: its device, and the
# variables that show it that device alone. The mask (CUDA_VISIBLE_DEVICES) is obeyed, never translated: Slurm, MIG
# and containers have decided what is ours. NVML (`pynvml`) ignores the mask and may be missing, old or half broken,
# so all it says is optional: it lists devices where no mask is set, and names them. Nothing here starts anything.
# ==================================================================================================================

_MASK, _ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_AMD = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # torch says "cuda" to AMD's devices too
# Thread pools are sized by the whole machine, and JAX and TensorFlow take most of a GPU's memory: bad for neighbours.
_THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")  # the first is OpenBLAS' and MKL's too
_SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
# A node started under torchrun or Slurm would lend every worker one stale rank; users' code never needs the secret.
_REMOVED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
            "MASTER_PORT", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE")


class Slot(NamedTuple):
    device: str  # what a person and torch read: "cuda:0", its place on the node, or "cpu"
    label: str  # what `connect` prints: "cuda:0 NVIDIA A100 GPU-1a2b3c4d"
    env: dict[str, str | None]  # to set in the child's environment, the mask as we got it; None: to remove
    lock: str | None  # names the physical device for the one-node-per-device lock; None for a CPU worker


class _Gpu(NamedTuple):
    token: str
    uuid: str | None = None
    name: str | None = None
    usable: bool = True  # False: it is lost, or CUDA sees its MIG instances in its place


def visible_devices(mask: str, gpus: Sequence[_Gpu] = ()) -> list[_Gpu]:
    """Return the devices that a value of CUDA_VISIBLE_DEVICES shows, in order, with what NVML says of them in `gpus`.

    The driver's rules, as torch tested them: the first entry that is no device ends the list, numbers are read like
    strtoul ("1gpu2" is 1), UUIDs may be prefixes and do not mix with numbers. But one that is repeated is meant once.
    """
    kind = mask[:4] if mask.startswith(("GPU-", "MIG-")) else ""
    # NVML cannot rule a device out where CUDA counts otherwise or where a UUID was not told; MIG has old spellings.
    certain = any(gpu.token.isdecimal() for gpu in gpus) and all(gpu.uuid for gpu in gpus) and kind != "MIG-"
    shown: dict[str, _Gpu] = {}
    for entry in mask.split(","):
        number = None if kind else re.match(r"\s*\+?([0-9]+)", entry)
        if not number and not (kind and entry.startswith(kind)):
            break
        token = str(int(number[1])) if number else entry
        fits = [gpu for gpu in gpus if gpu.token == token or (gpu.uuid or "").startswith(token)]
        if len(fits) != 1 and certain:
            break
        gpu = fits[0]._replace(token=token) if len(fits) == 1 else _Gpu(token)
        shown.setdefault(gpu.uuid or token, gpu)        # it may be there by another prefix of its UUID
    return list(shown.values())


def _listed(names: str | Iterable[str]) -> list[str]:
    parts = names.split(",") if isinstance(names, str) else names
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))  # named twice is meant once


def _select(usable: list[_Gpu], variable: str, gpus: str | None) -> list[Slot]:
    """Return the slots that `--gpus` names. A number is a place among those found, as it is for torch."""
    found: list[Slot] = []
    for place, gpu in enumerate(usable):
        device = f"{'cuda' if variable in (_MASK, *_AMD) else 'device'}:{place}"
        setting = f"{variable}={gpu.token}"
        label = " ".join(filter(None, [device, gpu.name, gpu.uuid[:12] if gpu.uuid else setting]))
        found.append(Slot(device, label, {variable: gpu.token}, gpu.uuid or setting))
    if gpus is None or (gpus == "all" and found):
        return found
    chosen: list[Slot] = []
    for name in _listed(gpus):
        fits = [slot for place, slot in enumerate(found) if name in (str(place), slot.device) or not name.isdecimal()
                and any(known.startswith(name) for known in (str(slot.env[variable]), slot.lock or ""))]
        if len(fits) != 1:
            here = ", ".join(slot.label for slot in found) or "no GPU at all"
            raise ValueError(f"--gpus {gpus}: {name!r} is {'several' if fits else 'none'} of those found here: {here}.")
        chosen += fits
    return chosen


def _ask(nvml: Any, query: str, *arguments: Any) -> Any:
    """Return the answer to one query, or None: each may be unsupported on this device, driver or binding."""
    answer = None
    with contextlib.suppress(Exception):  # whatever it is, only this answer is missing
        answer = None if None in arguments else getattr(nvml, f"nvmlDeviceGet{query}")(*arguments)
    return answer.decode() if isinstance(answer, bytes) else answer  # older bindings return bytes


def _enumerate(by_index: bool) -> Iterator[_Gpu]:
    """Yield the node's GPUs, each followed by its MIG instances; by number, since many programs `int()` the mask."""
    import pynvml as nvml  # late: the rest of the node works without it
    nvml.nvmlInit()
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _ask(nvml, "HandleByIndex", index)
        uuid, name = _ask(nvml, "UUID", handle), _ask(nvml, "Name", handle)
        mig = (_ask(nvml, "MigMode", handle) or [0])[0] == 1  # the mode now; the second is that after a reset
        token = str(index) if by_index or not uuid else uuid
        yield _Gpu(token, uuid, name, usable=handle is not None and not mig)
        for place in range(_ask(nvml, "MaxMigDeviceCount", handle) or 0 if mig else 0):
            part = _ask(nvml, "MigDeviceHandleByIndex", handle, place)  # None: an empty place
            if part_uuid := _ask(nvml, "UUID", part):
                yield _Gpu(part_uuid, part_uuid, _ask(nvml, "Name", part) or name)


def _nvidia(environ: Mapping[str, str]) -> list[_Gpu]:
    """Return the NVIDIA devices this node may use: those of the mask, or without a mask all that NVML knows."""
    mask = environ.get(_MASK)
    if mask is not None and not visible_devices(mask):
        return []
    try:
        gpus = list(_enumerate(by_index=environ.get(_ORDER, "PCI_BUS_ID") == "PCI_BUS_ID"))
    except Exception as error:  # not only NVMLError: a foreign binding may fail in any way
        amd = any(name in environ for name in _AMD)
        usual = "LibraryNotFound" in type(error).__name__ and not mask and not amd         # a machine without a GPU
        _log.log(logging.INFO if usual else logging.WARNING, "NVML does not answer (%s: %s): %s%s",
                 type(error).__name__, error, f"{_MASK} is taken as it is" if mask else "no NVIDIA GPU is used",
                 f"; for AMD GPUs give --devices 0,1,... --device-env {_AMD[0]}" if amd else "")
        return visible_devices(mask or "")
    return [gpu for gpu in gpus if gpu.usable] if mask is None else visible_devices(mask, gpus)


def find_slots(*, gpus: str | None = None, workers_per_gpu: int = 1, cpu_workers: int | None = None,
               devices: str | Iterable[str] | None = None, device_env: str | None = None, workers: int | None = None,
               environ: Mapping[str, str] = os.environ, cores: int | None = None) -> list[Slot]:
    """Return the workers to start: GPUs first, then CPU workers; raise ValueError when there would be none.

    `gpus` selects by place or UUID prefix among those found ("" or "none": NVML is not even asked); `devices` with
    `device_env` lists another vendor's. CPU workers stand in, one per core, for want of a device; a number adds some.
    """
    if (devices is None) != (device_env is None):
        raise ValueError("--devices and --device-env go together: which devices, and the variable that selects one.")
    variable = device_env or _MASK
    gpus = gpus and ("" if gpus.strip() == "none" else gpus.strip())
    found = [] if gpus == "" else _nvidia(environ) if devices is None else [_Gpu(token) for token in _listed(devices)]
    chosen = _select(found, variable, gpus)
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    cpus = cpu_workers if cpu_workers is not None else 0 if chosen else cores
    hidden: dict[str, str | None] = {_MASK: "", variable: ""}  # else a preprocessing job opens a context on GPU 0
    slots = [slot for slot in chosen for _ in range(workers_per_gpu)] + [Slot("cpu", "cpu", hidden, None)] * cpus
    if not slots:
        raise ValueError("No GPU is used and no CPU worker is asked for: there is no worker to start.")
    slots = [slots[i % len(slots)] for i in range(workers or len(slots))]       # so many in all: dealt in turn
    # PCI order makes CUDA count as NVML and nvidia-smi do; CUDA's own default is fastest first.
    defaults = {_ORDER: "PCI_BUS_ID", **dict.fromkeys(_THREADS, str(max(1, cores // len(slots))))}
    defaults |= _SHARING if any(slot.lock and slots.count(slot) > 1 for slot in slots) else {}
    common = {**dict.fromkeys(_REMOVED), **{name: value for name, value in defaults.items() if name not in environ}}
    return [slot._replace(env={**common, **slot.env}) for slot in slots]


# ==================================================================================================================
# 2 worker
#
# One process, one device. The main thread runs user code and nothing else runs any; the I/O thread (of the Peer)
# reads messages, keeps the inbox in the queue's order and answers what needs no user code. A worker keeps every
# outcome until the server says that its client has it, and survives a lost connection: it finishes what it has
# begun, begins nothing, and announces all that it holds when it is back.
# ==================================================================================================================

class Attempt(NamedTuple):
    """One attempt at a job, from its arrival until its outcome is made."""
    token: int
    job: Name
    fn: Name
    payload: Value
    log: int
    options: dict[str, Any]
    missing: set[Name]                          # objects that are still on their way


class JobInfo(NamedTuple):
    """What a job can know of itself."""
    id: str
    name: str
    attempt: int
    worker: str
    device: str


def encode_exception(error: BaseException, where: str, limit: int) -> bytes | Blob:
    """Return a job's exception as it travels: itself if it is known to load again, and its text in any case.

    Many exceptions pickle well and fail at loading, because __init__ wants more than `args` holds. Of one that takes
    more than `limit` bytes only the beginning of its text travels.
    """
    pickled = None
    frames = error.__traceback__.tb_next if error.__traceback__ else None       # without the worker's own frame
    with contextlib.suppress(BaseException):
        data = minipool._dump("exception", error, error).file.getvalue()
        pickled = data if type(minipool.decode_value(data)) is type(error) else None
    kind = type(error).__qualname__
    text, words = f"{kind} (its text cannot be shown)", ""
    with contextlib.suppress(BaseException):        # an exception whose __str__ raises
        words = str(error)
        text = "".join(traceback.format_exception(type(error), error, frames))
    value = minipool.encode_value((pickled, kind, words, text, where))
    if (value.size if isinstance(value, Blob) else len(value)) > limit:
        value = minipool.encode_value((None, kind, words[:1000] + " [...]", text[:1000] + " [...]", where))
    return value


def _awaited(coroutine: Any) -> Any:
    import asyncio  # late: slow to import, and few need it
    return asyncio.run(coroutine)


class Worker:
    """The worker process: `run()` is its main thread's life."""

    def __init__(self, setup: dict[str, Any], cell: Any) -> None:
        self.id, self.setup, self._cell = setup["id"], setup, cell
        self.device: str = setup["device"]              # its place on the node; a job sees this one alone, as cuda:0
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)    # who wants a job, or its slot, waits here
        # all below is guarded by _lock
        self._inbox: dict[int, Attempt] = {}            # attempts that have not begun, by token
        self._ready: list[tuple[float, int]] = []       # a heap, in the queue's order, of those with nothing missing
        self._begun: Attempt | None = None              # the one that has the slot
        self._beside: dict[int, Attempt] = {}           # those that take no slot: runs, and jobs that wait for others
        self._returning = 0                             # jobs that wait for their slot again
        self._extra = 0                                 # threads that took over for one that is back: to end, or main
        self._executor: minipool.Executor | None = None # of the jobs here
        self._outcomes: dict[int, tuple[Name, Message]] = {}    # by token: job, and the message that tells it
        self.objects: dict[Name, Any] = {}              # small or pulled ones, as bytes; opened functions; instances
        # of each client its log, how much of that was run, and what an entry raised: then nothing of it runs here
        self._sessions: dict[bytes, Any] = collections.defaultdict(
            lambda: types.SimpleNamespace(log=[], applied=0, unfit=b""))
        self._welcomed = False                          # the server has settled what we hold: jobs may begin
        self._name = ""                                 # as the first welcome said
        self._leaving = ""                              # why no new job is begun
        self._dismissed = False                         # the server let us go
        self._read_at = time.monotonic()                # when the socket was last seen empty
        self.peer = Peer("worker", setup["address"], self._key, lock=self._lock, identity=self.id,
                         announce=self._announce, on_batch=self._on_batch, on_lost=self._on_lost, tls=setup["tls"])

    # ---- the main thread ----

    def run(self) -> None:
        """Run jobs until the server lets us go."""
        self.peer.thread.start()
        self._work()
        minipool._clients.clear()       # what jobs left to the pool is not waited for here
        self.peer.stop(("bye", self._leaving))

    def _work(self) -> None:
        """Take what is next and execute it; in the main thread, or one that runs jobs while others wait."""
        while attempt := self._next():
            self._execute(attempt)
            limit = min(self.setup.get("max_tasks") or FOREVER, attempt.options.get("max_tasks") or FOREVER)
            if self._cell[1] >= limit and not self._leaving and not self._beside:
                self.leave("it has run as many jobs as it may")

    def leave(self, reason: str, is_last: bool = False) -> None:
        """Begin the one planned exit: take nothing new, hand back what has not begun, deliver every outcome.

        Another process takes the place of this one, unless it `is_last`.
        """
        with self._lock:
            self._leaving = self._leaving or reason
            self._cell[1] |= LAST * is_last
            self.peer.send(("retire", reason))

    def _next(self) -> Attempt | None:
        """Wait for the attempt to begin next, and mark it begun; None: it is time to go, or this thread is one more."""
        connection = self.peer.connection
        if connection and time.monotonic() - self._read_at > 0.5:   # a job held the GIL: there may be a recall to hear
            with self.peer._reading:    # when the I/O thread has handled what it may have read a moment ago
                while not connection.closed and connection.has_input(0):
                    self.peer._hear(connection)
            self._read_at = time.monotonic()
        if not self._may_go_on():
            self.peer.lead(self._may_go_on)
        with self._wake:
            self._wake.wait_for(self._may_go_on)
            if self._is_over():
                self._extra -= 1
                return None
            attempt = self._begun = self._inbox.pop(heapq.heappop(self._ready)[1])
            self._cell[0], os.environ["MINIPOOL_JOB"] = attempt.token, minipool.job_id(attempt.job)
            return attempt

    def _may_go_on(self) -> bool:
        with self._lock:
            return (bool(self._ready) and self._welcomed and not self._begun and not self._returning
                    and (not self._leaving or bool(self._parked()))) or self._is_over()

    def _is_over(self) -> bool:
        return self._dismissed or (bool(self._extra) and threading.current_thread() is not threading.main_thread())

    def _execute(self, attempt: Attempt) -> None:
        """Run one attempt: outcome or failure are encoded inside the same try, the cell is set all the while."""
        if attempt.options.get("say"):
            self.peer.send(("started", attempt.token))
        began = time.perf_counter()
        retry, retry_on = False, ()        # the types of the exceptions to retry on, if there are any
        try:
            if attempt.log and (error_of_log := self._apply_log(attempt)):
                self.drop([attempt.payload[0]] if isinstance(attempt.payload, tuple) else [])
                return self._finish(attempt, UNFIT, error_of_log, 0.0, False)
            fn = self.objects[attempt.fn]
            if not callable(fn):
                fn = self.objects[attempt.fn] = minipool.decode_value(fn)
            packed = attempt.payload
            args, kwargs, *retry_on = minipool.decode_value(
                self.objects.pop(packed[0]) if isinstance(packed, tuple) else packed)
            minipool._running.attempt = attempt
            result = fn(*args, **kwargs)
            result = _awaited(result) if type(result) is types.CoroutineType else result
            status, value, result = OK, minipool.encode_value(result), None     # it may be large
            minipool.check_size(value, self._max_value, "result", fn)
        except minipool.Reschedule:
            status, value = AGAIN, b""
        except BaseException as error:          # SystemExit and KeyboardInterrupt too: the job's, not the worker's
            status, value = RAISED, encode_exception(error, self._where, self._max_value)
            with contextlib.suppress(Exception):
                retry = bool(retry_on and isinstance(error, retry_on[0]))
        self._finish(attempt, status, value, time.perf_counter() - began, retry)

    def describe(self, attempt: Attempt) -> JobInfo:
        """Return what current_job() tells."""
        device = "cuda:0" if self.device.startswith("cuda") else self.device
        return JobInfo(minipool.job_id(attempt.job), attempt.options.get("name", ""), attempt.options.get("attempt", 1),
                       self._name, device)

    def _finish(self, attempt: Attempt, status: str, value: bytes | Blob, seconds: float, retry: bool) -> None:
        """Keep the outcome and tell it; a lone one goes at once, one of many leaves with the next ones."""
        with self._lock:
            told = value if isinstance(value, bytes) else self.peer.share((self.id, attempt.token), value)
            message = ("finished", attempt.token, status, told, seconds, retry)
            self._outcomes[attempt.token] = (attempt.job, message)
            if attempt is self._begun:
                self._begun = None
                self._cell[0] = 0
                self._cell[1] += 1
            elif not self._beside.pop(attempt.token).options.get("beside"):
                self._extra += 1        # it ends without a slot, and its thread may be the main one
                self._note_waiting()
            if self._returning or self._extra:
                self._wake.notify_all()
            if connection := self.peer.connection:
                connection.post([message])
        if connection:
            connection.flush(0 if self._ready else minipool.BORROWED_FRAMES)

    def slot(self, held: bool) -> bool:
        """Leave the slot of this thread's job to others, and start a thread for them; or wait until it is free (held).

        The cell goes on naming the job until another begins: till then, what goes wrong is its doing. True: it changed.
        """
        attempt: Attempt | None = getattr(minipool._running, "attempt", None)
        with self._wake:
            # a run has no slot; and what this thread ran may be over
            if not attempt or attempt.options.get("beside") or attempt is not (
                    self._beside.get(attempt.token) if held else self._begun):
                return False
            if held:
                self._returning += 1
                self._wake.wait_for(lambda: not self._begun)
                self._returning -= 1
                self._extra += 1
                self._begun = self._beside.pop(attempt.token)
                self._cell[0], os.environ["MINIPOOL_JOB"] = attempt.token, minipool.job_id(attempt.job)
            else:
                self._beside[attempt.token], self._begun = attempt, None
                threading.Thread(target=self._work, name="minipool-jobs", daemon=True).start()
            self._note_waiting()
            self._wake.notify_all()     # who waits for a slot, and who took over and is no longer needed
            self.peer.send(("slot", attempt.token, held))
        return True

    def _parked(self) -> list[int]:
        """Return the attempts that wait for others: as long as there are some, those others may have to run here."""
        return [attempt.token for attempt in self._beside.values() if not attempt.options.get("beside")]

    def _note_waiting(self) -> None:
        self._cell[2:] = [*self._parked(), *[0] * WAITING][:WAITING]

    @contextlib.contextmanager
    def _lend(self) -> Iterator[None]:
        """Lend the slot of the job that this thread runs, for as long as that waits for others of the pool."""
        with contextlib.ExitStack() as stack:
            if self.slot(False):
                stack.callback(self.slot, True)
            yield

    def executor(self) -> minipool.Executor:
        """Return an executor for the jobs of this process, on a client's connection of its own."""
        if self._executor is None or self._executor._client.broken:
            self._executor = minipool.Executor(minipool.format_address(*self.setup["address"]), name=self._name,
                                               secret=self._key, tls=self.setup["tls"])
            self._executor._client.lend = self._lend
        return self._executor.options()         # a view: its user may shut that down

    def _key(self, role: str, *_: bytes) -> bytes:
        """Return its key as a worker of this identity, or as a client: of the secret it has no more than that."""
        return bytes(self.setup["keys"][32 * (role == "client"):][:32])     # renewed when the server is a new one

    def _apply_log(self, attempt: Attempt) -> bytes:
        """Run the entries of the session's log that this worker has not run; return what one raised, now or before."""
        minipool._running.attempt = None        # that job of this thread is over
        state = self._sessions[attempt.job[0]]
        while state.applied < attempt.log and not state.unfit:
            name = state.log[state.applied]         # no such place: the session has left meanwhile
            try:
                args, kwargs, fn = minipool.decode_value(self.objects[name])
                fn(*args, **kwargs)
                state.applied += 1
            except BaseException as error:
                state.unfit = bytes(encode_exception(error, self._where, minipool.INLINE))     # type: ignore[arg-type]
        return bytes(state.unfit)

    # ---- what Executor.map, Actor and Pool call here, as jobs ----

    def call_each(self, fn: Callable[..., Any], *chunk: tuple[Any, ...]) -> list[Any]:
        """Make several calls of one function as one job, for `map(chunksize=)`."""
        values = [fn(*args) for args in chunk]
        return [*map(_awaited, values)] if type(values[0]) is types.CoroutineType else values

    def make_instance(self, name: Name, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make an instance that lives here; its name holds what the constructor raised, if it did."""
        try:
            self.objects[name] = cls(*args, **kwargs), None
        except BaseException as error:
            self.objects[name] = None, error
            raise

    def use_instance(self, name: Name, attribute: str, call: tuple[Any, Any] | None = None) -> Any:
        """Read an attribute of an instance, or call it with (args, kwargs)."""
        lost = minipool.WorkerDied(f"{attribute}: the process that the instance lived in is no more")
        instance, error = self.objects.get(name, (None, lost))
        if error is not None:
            raise error
        value = getattr(instance, attribute)
        return value if call is None else value(*call[0], **call[1])

    def drop(self, names: list[Name]) -> None:
        """Forget instances, which ends them; or functions, as the server says."""
        for name in names:
            self.objects.pop(name, None)

    _on_drop = drop

    # ---- the thread that reads: the I/O thread, or the main thread while it has nothing to run ----

    def _announce(self) -> list[Message]:
        """Return the announcement: this is all I hold."""
        attempts = [(token, job, "outcome") for token, (job, _) in self._outcomes.items()]
        attempts += [(a.token, a.job, "inbox") for a in self._inbox.values()]
        attempts += [(a.token, a.job, "beside" if a.options.get("beside") else "parked") for a in self._beside.values()]
        attempts += [(a.token, a.job, "begun") for a in (self._begun,) if a]
        info = {key: self.setup[key] for key in ("id", "node", "slot", "device", "tags", "node_name")}
        positions = {session: len(state.log) for session, state in self._sessions.items()}
        info |= {"pid": os.getpid(), "has": list(self.objects), "positions": positions, "returns": bool(self._name)}
        words: list[Message] = [("worker", info, attempts), *(message for _, message in self._outcomes.values())]
        return [*words, ("retire", self._leaving)] if self._leaving else words

    def _on_lost(self) -> None:
        with self._lock:
            self._welcomed = False
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass                    # a job closed its standard streams: their numbers must not become our socket
        os.close(descriptor)

    def _on_batch(self, messages: list[Message]) -> None:
        with self._wake:
            for message in messages:
                getattr(self, f"_on_{message[0]}")(*message[1:])
            self._read_at = time.monotonic()
            self._wake.notify()
        self.peer.send()                # a flush of what was posted meanwhile

    def _on_welcome(self, info: dict[str, Any]) -> None:
        self._welcomed = True
        self._name = os.environ["MINIPOOL_WORKER"] = info["name"]
        self._where = f"worker {self._name} on {self.device}"
        self.setup["node_name"], self._max_value = info["node_name"], info["max_value"]

    def _on_run(self, token: int, job: Name, fn: Name, payload: Value, log: int, options: dict[str, Any]) -> None:
        state = self._sessions[job[0]]
        needed = [fn, *state.log[state.applied:log]]
        if type(payload) is tuple:
            needed.append(payload[0])
            self._on_put(payload[0], payload)
        missing = {name for name in needed if name not in self.objects}
        attempt = self._inbox[token] = Attempt(token, job, fn, payload, log, options, missing)
        self._check_ready(attempt)

    def _check_ready(self, attempt: Attempt) -> None:
        if attempt.options.get("beside") and not attempt.missing:
            self._beside[attempt.token] = self._inbox.pop(attempt.token)
            threading.Thread(target=self._execute, args=(attempt,), name="minipool-run", daemon=True).start()
        elif not attempt.missing:
            heapq.heappush(self._ready, (-attempt.options.get("priority", 0), attempt.token))

    def _on_put(self, name: Name, value: Value) -> None:
        if isinstance(value, bytes):
            self.objects[name] = value
        elif name not in self.objects:
            self.peer.pull(value, lambda data: self._arrived(name, data))

    def _arrived(self, name: Name, data: Any) -> None:
        """A pulled object is here, or nobody holds it: then what needs it goes back."""
        with self._wake:
            if data is not None:
                self.objects[name] = data
            for attempt in [a for a in self._inbox.values() if name in a.missing]:
                if data is None:
                    self.peer.send(("recalled", [], self._take_out([attempt.token])))
                else:
                    attempt.missing.discard(name)
                    self._check_ready(attempt)
            self._wake.notify()

    def _on_log(self, position: int, name: Name, value: Value) -> None:
        self._sessions[name[0]].log.append(name)        # as it stands at `position`: we said how long ours is
        self._on_put(name, value)

    def _take_out(self, tokens: list[int]) -> list[int]:
        """Remove from the inbox those of `tokens` that have not begun; return them."""
        taken = [token for token in tokens if token in self._inbox]
        for token in taken:
            payload = self._inbox.pop(token).payload
            if isinstance(payload, tuple):
                self.peer.forget_pull(payload[0])
                self.objects.pop(payload[0], None)
        if taken:
            self._ready = sorted(entry for entry in self._ready if entry[1] in self._inbox)     # which is a heap too
        return taken

    def _on_recall(self, tokens: list[int]) -> None:
        self.peer.send(("recalled", tokens, self._take_out(tokens)))

    def _on_forget(self, tokens: list[int]) -> None:
        self._take_out(tokens)
        for token in tokens:
            if self._outcomes.pop(token, None):
                self.peer.values.pop((self.id, token), None)

    def _on_resend(self, tokens: list[int]) -> None:
        self.peer.send(*(self._outcomes[token][1] for token in tokens if token in self._outcomes))

    def _on_leave(self, session: bytes) -> None:
        self._sessions.pop(session, None)
        self.drop([name for name in self.objects if name[0] == session])
        minipool._shared_objects.pop(session, None)

    def _on_bye(self, reason: str) -> None:
        self._dismissed = True


def _watch_node(worker: Worker, life: Any) -> None:
    """Take fresh tickets from the node's pipe; at its end the node is dead, and this process group goes with it."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            worker.setup["keys"] = life.recv_bytes()
    os.killpg(0, signal.SIGKILL)


def _worker_main(setup: dict[str, Any], cell: Any, life: Any, output: Any) -> None:
    """Be a worker process: called by multiprocessing in a fresh interpreter whose mask is already set."""
    os.setsid()                         # one group per worker: killing it takes grandchildren along
    # a signal from the kernel when the node is gone: the backstop for a worker whose threads cannot run
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)        # its alarm() as handler: a second (SIGHUP is 1) for _watch_node's group kill
        libc.signal(signal.SIGHUP, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(1, signal.SIGHUP)    # PR_SET_PDEATHSIG
    for descriptor in (1, 2):           # what jobs print goes to the node, which never lets it block for long
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)     # type: ignore[union-attr]
    faulthandler.enable(all_threads=False)          # the crashing thread's stack: the tail of stderr is short
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the node's business
    logging.basicConfig(level=setup["log_level"], format="%(name)s: %(message)s")
    sys.path[:] = list(dict.fromkeys([*sys.path, *setup["sys_path"]]))
    minipool._here = worker = Worker(setup, cell)
    threading.Thread(target=_watch_node, args=(worker, life), name="minipool-parent", daemon=True).start()
    worker.run()


# ==================================================================================================================
# 3 node
#
# The supervisor of one host. It never runs user code, so its heartbeat is honest. Its main thread does all: it
# spawns (the death signal is tied to the thread that forks), waits on pidfds, output pipes and the pipe in which the
# Peer's I/O thread hands it the server's words, kills, respawns, beats.
# ==================================================================================================================

WAITING = 62                # attempts of a worker that wait for others and can be ended; those beyond it run on
DEVICE_SECONDS = 5.0        # between looks at whether a GPU has fallen off the bus
LAST = 1 << 62              # in a worker's cell, beside the number of its jobs: none is started in its place
_OF_SLOTS = ("gpus", "workers_per_gpu", "cpu_workers", "devices", "device_env", "workers")      # options of a node
_OF_NODES = ("name", "tags", "max_tasks", "lifetime", "death_timeout", "tls", "sys_path")
TAIL_LINES = 40             # of a worker's last output, for the error that tells of its death


class _Stderr(queue.SimpleQueue[Any]):      # reentrant: signal handlers log too
    """Writes what the node says and its workers print: a pipe that nobody empties must not stop the node."""
    # It has no flush(): logging, which flushes what can be flushed after each line, must not wait.

    def write(self, text: str) -> None:
        """Write whole lines, soon; they are lost where 10,000 wait already."""
        if self.qsize() < 10_000:
            self.put(text)

    def pass_on(self) -> None:
        """Be the thread that writes, until None is put."""
        for text in iter(self.get, None):
            with contextlib.suppress(OSError):
                os.write(2, text.encode(errors="replace"))      # not print: its lock would be held at exit


_stderr = _Stderr()


@contextlib.contextmanager
def _locked(name: str, mode: int) -> Iterator[None]:
    """Hold a lock file of this user's, or raise BlockingIOError; the kernel lets go of it, however we end."""
    folder = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", f"minipool-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(os.path.join(folder, name.replace("/", "_")), "a") as file:
        fcntl.flock(file, mode)
        yield


def _oom_kills() -> tuple[str, int]:
    """Return this process's memory cgroup, and how many processes the kernel has killed there for want of memory."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as cgroups:
        for line in cgroups:
            _, controllers, path = line.strip().split(":", 2)
            if controllers in ("", "memory"):       # version 2; version 1
                folder = f"/sys/fs/cgroup/{controllers}{path}"
                with open(f"{folder}/{'memory.oom_control' if controllers else 'memory.events'}") as events:
                    return path, next(int(words.split()[1]) for words in events if words.startswith("oom_kill "))
    return "", 0


class Child:
    """A worker process as its node sees it, from its start to its burial."""

    def __init__(self, setup: dict[str, Any], environ: Mapping[str, str | None]) -> None:
        self.id, self.place = setup["id"], setup["slot"]
        self.killed = ""                                    # why we killed it
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.rest = b""                                     # of its output: a line not complete yet
        context: Any = multiprocessing.get_context("spawn")
        self.cell = context.RawArray(ctypes.c_uint64, 2 + WAITING)  # [token it executes, jobs it has finished, tokens
        self.aimed = 0                                      # that wait for others]; the one for whose sake we killed it
        life, self.life = context.Pipe(duplex=False)        # of the end of file of ours it dies
        self.output, output = context.Pipe(duplex=False)    # its stdout and stderr
        os.set_blocking(self.output.fileno(), False)
        self.process = context.Process(target=_worker_main, args=(setup, self.cell, life, output),
                                       name=f"minipool-worker-{self.place}", daemon=False)
        for name, value in environ.items():     # what it inherits: multiprocessing has no env=
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        with life, output:
            self.process.start()
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/oom_score_adj", "w") as score:
            score.write("500")      # out of memory, the kernel is to take a worker, never the node that tells of it
        try:        # readable when the process is dead; the sentinel may lie while a grandchild lives
            self.pidfd = os.pidfd_open(self.process.pid)
        except (OSError, AttributeError):
            self.pidfd = os.dup(self.process.sentinel)

    def kill(self, why: str = "") -> None:
        """Kill its process group: grandchildren too."""
        self.killed = why or self.killed
        for kill in (os.killpg, os.kill):       # the group exists once the child has called setsid
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.process.pid, signal.SIGKILL)

    def end_attempt(self, token: int, why: str) -> None:
        """Stop the process, wait until it stands still, read the cell, and kill it only if it has that attempt."""
        pid, give_up = self.process.pid, time.monotonic() + 1
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGSTOP)
            kinds = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
            while not (state := os.waitid(os.P_PID, pid, kinds)) and time.monotonic() < give_up:
                time.sleep(0.0005)
            # None: a driver holds it in the kernel: there it begins no other attempt
            if (state is None or state.si_code == os.CLD_STOPPED) and token in self.cell[:]:
                self.aimed = token      # another one that it executes is not to blame
                self.kill(why)
            else:       # it is over
                os.kill(pid, signal.SIGCONT)


class Supervisor:
    """The node process: finds slots, keeps a worker in each, tells the server of every death."""

    def __init__(self, address: str | None, secret: Secret, options: dict[str, Any], lifeline: Any = None) -> None:
        if importlib.util.find_spec("cloudpickle") is None:     # else every job would fail, and take its worker along
            raise ValueError("cloudpickle is missing here: python -m pip install cloudpickle")
        self.id, self.secret, self.options = secrets.token_bytes(12), secret, options
        self.slots = find_slots(**{name: options[name] for name in _OF_SLOTS if options.get(name) is not None})
        self.name: str = options.get("name") or socket.gethostname().split(".")[0]
        self._environ = {name: os.environ.get(name) for slot in self.slots for name in slot.env}    # the node's own
        self._children: dict[int, Child] = {}           # those that run, by the place of their slot
        self._due = dict.fromkeys(range(len(self.slots)), 0.0)      # when a worker is to be started in each other slot
        self._started = 0                               # how many ever were: the generation of the next one
        self._deaths: collections.Counter[int] = collections.Counter()      # by place, since one there finished a job
        self._lost: dict[str | None, str] = {}          # what NVML says of the GPUs that are no more, by their lock
        self._unreported: collections.deque[Message] = collections.deque(maxlen=1000)
        self._sources: dict[Any, Callable[[], object]] = {}     # what the main thread waits for, and what it does then
        words, told = multiprocessing.Pipe(duplex=False)        # the server's words, on their way to the main thread
        self._sources[words] = lambda: self._heed(words.recv())
        if lifeline is not None:        # at its end, all it has to say, whoever started us is gone, or wants us to go
            self._sources[lifeline] = self.stop
        self._is_child = lifeline is not None
        self._born, self._beat_at, self._beat_every = time.monotonic(), 0.0, 1.0
        self._complain_at = self._born + 3
        self._stop_at: float | None = None              # when patience with running jobs ends
        self._oom_kills = _oom_kills()                  # as far as we know of them
        self._instance = b""
        self.on_welcome: Any = lambda: None
        self.peer = Peer("node", minipool.parse_address(address), secret.role_key, lock=threading.RLock(),
                         announce=self._announce, on_batch=told.send, tls=bool(options.get("tls")))

    def run(self) -> None:
        """Supervise until told to stop; returns when all workers are gone, or raises why. For the main thread."""
        with _locked("nodes", fcntl.LOCK_SH), contextlib.ExitStack() as locks:
            self._claim_devices(locks)
            self.peer.thread.start()
            threading.Thread(target=self._watch_devices, name="minipool-devices", daemon=True).start()
            try:
                while self._stop_at is None or (self._children and time.monotonic() < self._stop_at):
                    for source in multiprocessing.connection.wait(self._sources, 0.2):  # so late may a respawn be
                        if source in self._sources:     # not so the output of one that was just found dead
                            self._sources[source]()
                    for place in [place for place, when in self._due.items() if when <= time.monotonic()]:
                        if self._instance and self._stop_at is None and self.slots[place].lock not in self._lost:
                            self._spawn(place)
                    for child in self._children.values():
                        if (lock := self.slots[child.place].lock) in self._lost and not child.killed:
                            child.kill(f"its GPU is lost: {self._lost[lock]}")      # for good: nobody takes its place
                    self._look_at_the_clock()
            finally:
                for child in self._children.values():
                    child.kill()
                for child in list(self._children.values()):
                    multiprocessing.connection.wait([child.pidfd], 5)   # not join(): the sentinel may lie
                    self._bury(child)
                self.peer.stop(("bye", "the node stopped"))

    def stop(self, patience: float = 0.0) -> None:
        """Let running jobs end for `patience` seconds, take no new ones, then go. A second call does not wait."""
        if self._stop_at is None and patience:
            self._stop_at = time.monotonic() + patience
            self.peer.send(("retire", "its node is leaving"))
            _log.info("draining: running jobs have %g s to end", patience)
        else:
            self._stop_at = 0.0

    def _look_at_the_clock(self) -> None:
        """Beat, say so if there is no server yet, leave when it is time; raise when there is no hope."""
        now, lost_at, trouble = time.monotonic(), self.peer.lost_at, self.peer.trouble
        lifetime, patience = self.options.get("lifetime"), self.options.get("death_timeout")
        if now >= self._beat_at:
            self._beat_at = now + self._beat_every
            self.peer.send(("beat",) if self._stop_at is None else ("retire", "its node is leaving"))
        if lifetime and now >= self._born + lifetime and self._stop_at is None:
            self.stop(DRAIN_SECONDS)
        if not self._instance and now >= self._complain_at:
            self._complain_at = FOREVER
            _stderr.write(f"waiting for a server at {minipool.format_address(*self.peer.address)}: {trouble}\n")
        if patience and lost_at and now >= lost_at + patience:
            raise minipool.ServerLost(f"no server for {patience:g} s ({trouble})")
        # a refusal ends it only at first: after a welcome it may be forged, or a mistake being mended
        if not self._instance and isinstance(trouble, minipool.Refused | minipool.VersionMismatch):
            raise trouble

    # ---- talking ----

    def _announce(self) -> list[Message]:
        info = {"id": self.id, "name": self.name, "python": PYTHON, "host": socket.gethostname(), "pid": os.getpid()}
        words = [("node", info), *self._unreported]     # deaths are told again: the server may be a new one
        return [*words, ("retire", "its node is leaving")] if self._stop_at is not None else words

    def _heed(self, messages: list[Message]) -> None:
        for message in messages:
            getattr(self, f"_on_{message[0]}")(*message[1:])

    def _on_welcome(self, info: dict[str, Any]) -> None:
        """The first welcome starts the workers; a later one may be of a new server, with new tickets."""
        self.name, self._beat_every = info["name"], info["beat"]
        if self.peer.instance != self._instance:
            self._instance = self.peer.instance
            for child in self._children.values():
                with contextlib.suppress(OSError):
                    child.life.send_bytes(self._keys(child.id))
        self.on_welcome()

    def _on_kill(self, tokens: list[int], reason: str) -> None:
        for child in self._children.values():
            for token in set(tokens).intersection(child.cell) if not child.killed else ():  # else it is over
                child.end_attempt(token, reason)

    def _keys(self, worker: bytes) -> bytes:
        return b"".join(self.secret.role_key(role, self._instance, worker) for role in ("worker", "client"))

    # ---- life and death ----

    def _spawn(self, place: int) -> None:
        """Start the worker of one slot."""
        del self._due[place]
        self._started += 1
        id, slot = self.id + place.to_bytes(4, "big") + self._started.to_bytes(4, "big"), self.slots[place]
        setup = {"id": id, "node": self.id, "node_name": self.name, "slot": place, "device": slot.device,
                 "tags": self.options.get("tags") or [], "address": self.peer.address, "keys": self._keys(id),
                 "tls": bool(self.options.get("tls")), "max_tasks": self.options.get("max_tasks"),
                 "sys_path": self.options.get("sys_path") or [], "log_level": logging.getLogger().level}
        child = self._children[place] = Child(setup, self._environ | slot.env)
        self._sources[child.pidfd] = lambda: self._on_death(child)
        self._sources[child.output] = lambda: self._read_output(child)

    def _on_death(self, child: Child) -> None:
        """A worker process is no more: say so, with the cell's word on whom to blame, and start another."""
        child.kill()                        # grandchildren that stayed in the group
        known, self._oom_kills = self._oom_kills, _oom_kills()
        code = child.process.exitcode or 0
        self._bury(child)
        what = f"was killed: {child.killed}" if child.killed else f"exited with code {code}"
        if code < 0 and not child.killed:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            was_oom = self._oom_kills[1] and self._oom_kills != known
            what = f"died of {name}" + (": out of memory, says its memory cgroup" if code == -9 and was_oom else
                                        ", perhaps the kernel's out-of-memory killer" if code == -9 else "")
        slot, (token, successes, *_) = self.slots[child.place], child.cell
        cause = {"what": what, "exitcode": code, "stderr": "\n".join(child.tail), "planned": code == 0}
        if slot.lock in self._lost:
            cause["lost"] = f"{slot.label}: {self._lost[slot.lock]}"
        with self.peer.lock:
            self._unreported.append(("died", child.id, child.aimed or token, cause))
            self.peer.send(self._unreported[-1])
        if code:
            _log.warning("worker %d on %s %s", child.place, slot.device, what)
        # at once, but a slot whose workers die five times in a row without a success rests, longer each time
        deaths = self._deaths[child.place] = 0 if successes or child.killed else self._deaths[child.place] + 1
        if successes < LAST:
            self._due[child.place] = time.monotonic() + (min(60, 2 ** (deaths - 5)) if deaths >= 5 else 0)
        elif not self._children and all(self.slots[place].lock in self._lost for place in self._due):
            self.stop()                     # it was the last one

    def _bury(self, child: Child) -> None:
        del self._children[child.place], self._sources[child.pidfd]
        os.close(child.pidfd)
        self._read_output(child)
        self._sources.pop(child.output, None)
        child.output.close()
        child.life.close()

    # ---- devices ----

    def _claim_devices(self, locks: contextlib.ExitStack) -> None:
        """Lock our GPUs: two nodes on one would take each other's memory. An embedded pool only warns."""
        for name, label in {slot.lock: slot.label for slot in self.slots if slot.lock}.items():
            try:
                locks.enter_context(_locked(f"device {name}", fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                text = f"another node of this user has {label}: choose others by --gpus, or let one node have them all"
                if not self._is_child:
                    raise ValueError(text) from None
                _log.warning("%s", text)

    def _watch_devices(self) -> None:
        """Ask NVML now and then whether a GPU is lost; in a thread of its own, as a broken driver may never answer."""
        gpus = {slot.lock for slot in self.slots if slot.lock and slot.lock.startswith(("GPU-", "MIG-"))}
        while gpus and self._stop_at is None:
            for uuid in sorted(gpus):
                try:
                    import pynvml as nvml
                    nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid))
                except Exception as error:          # any other is about the question, not the GPU
                    if "GpuIsLost" in type(error).__name__:
                        gpus.discard(uuid)
                        self._lost[uuid] = str(error)       # the main thread looks there
            time.sleep(DEVICE_SECONDS)

    def _read_output(self, child: Child) -> None:
        """Take what a worker printed: it never blocks on us; keep its tail, pass it on with its name before it."""
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(child.output.fileno(), 64 * 1024)
        if not data:            # it was closed: by the worker's end, or by a job
            self._sources.pop(child.output, None)
        *lines, child.rest = (child.rest + data).split(b"\n")
        child.rest = child.rest[-8192:]
        for line in lines:
            child.tail.append(line[:2000].decode(errors="replace"))
            _stderr.write(f"[{self.name}-{child.place}] {child.tail[-1]}\n")


class Node:
    """A node inside a program: a handle on a child process that supervises this machine's workers.

    `address`, `secret` and `tls` as in `Executor`: for "local" the child is an embedded pool, server and all. The rest
    is named as the flags of `connect`: `name`, `gpus`, `workers_per_gpu`, `cpu_workers`, `devices`, `device_env`,
    `tags`, `max_tasks`, `lifetime` and `death_timeout` (seconds). `start()` returns when the server has welcomed it.
    Raises ServerLost, Refused, VersionMismatch, ValueError for devices that are not there, TypeError for other names.
    """

    def __init__(self, address: str | None = None, *, secret: str | None = None, connect_timeout: float = 10.0,
                 **options: Any) -> None:
        if unknown := options.keys() - {*_OF_SLOTS, *_OF_NODES}:
            raise TypeError(f"Node() takes no {', '.join(sorted(unknown))}")
        place = None if address == "local" else minipool.format_address(*minipool.parse_address(address))
        self._job = {"address": place, "secret": minipool.find_secret(secret).text, "options": options}
        self._patience = connect_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Node:
        """Start the child process, tell it what to do, and wait for its answer at the welcome."""
        self._line, theirs = multiprocessing.Pipe()         # the end of file of ours ends it
        with theirs:        # a session of its own: Ctrl-C in the terminal is for the client alone
            self._process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "_child"],
                                             stdin=theirs.fileno(), start_new_session=True)
        try:
            self._line.send(self._job)
            if not self._line.poll(self._patience):
                raise minipool.ServerLost("no server answered in time")
            self.answer = self._line.recv()
            if isinstance(self.answer, BaseException):
                raise self.answer
        except (EOFError, ConnectionResetError):
            self.stop()
            raise minipool.ServerLost(f"the child process ended with exit code {self._process.returncode}") from None
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the workers and the node at once; their jobs run again elsewhere."""
        if self._process:
            self._line.close()
            if not self.wait(10):
                self._process.kill()
                self._process.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the node has ended; False if `timeout` seconds passed first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return not self._process or self._process.wait(timeout) is not None
        return False

    def __enter__(self) -> Node:
        return self if self._process else self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def is_node_running() -> bool:
    """Return whether a node of this user runs on this machine."""
    with contextlib.suppress(BlockingIOError), _locked("nodes", fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    return True


# ==================================================================================================================
# 4 CLI
# ==================================================================================================================

def child_main(lifeline: multiprocessing.connection.Connection) -> int:
    """Be the child of a Node: its job is one message in, the answer one out, and end of file ends it all."""

    def answer(about: object) -> None:
        with contextlib.suppress(OSError):      # at each welcome, of which the first is read: it must not wait
            lifeline.send(about)

    level = logging.getLevelNamesMapping().get(os.environ.get("MINIPOOL_LOG", "").upper(), logging.WARNING)
    logging.basicConfig(stream=_stderr, format="%(name)s: %(message)s", level=level)
    try:
        job = lifeline.recv()
        os.set_blocking(lifeline.fileno(), False)
        address = job["address"]
        if address is None:                 # an embedded pool, whose server ends with this process
            gc.set_threshold(100_000)       # as `serve` does
            address = minipool.Server(port=0, secret=job["secret"], embedded=True).start().address
        supervisor = Supervisor(address, Secret(job["secret"]), job["options"], lifeline)
        supervisor.on_welcome = lambda: answer({"address": address, "devices": [s.device for s in supervisor.slots]})
        supervisor.run()
    except (EOFError, OSError, ValueError, minipool.MinipoolError) as error:
        answer(error)
        return 1
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _connect(options: argparse.Namespace) -> None:
    """Run a node in this process until a signal or the server's refusal ends it."""
    supervisor = Supervisor(options.address, minipool.find_secret(path=options.secret_file), vars(options))
    address, slots = minipool.format_address(*supervisor.peer.address), supervisor.slots
    supervisor.on_welcome = lambda: _stderr.write(
        f"connected to {address} as {supervisor.name}: {len(slots)} worker{'s' * (len(slots) > 1)}: "
        f"{', '.join(slot.label for slot in slots)}; Python {PYTHON}\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.stop(DRAIN_SECONDS))
    supervisor.run()


def main() -> int:
    """Run the command line; return the exit code."""
    parser, add = minipool.subcommands("minipool-worker", "Join this machine's devices to a pool.")
    connect = add("connect", _connect, "join a pool: one worker per visible GPU")
    connect.add_argument("address", nargs="?", metavar="HOST[:PORT]", help="default: MINIPOOL_ADDRESS, then 127.0.0.1")
    connect.add_argument("--name", help="this node's name (default: the host's)")
    connect.add_argument("--gpus", metavar="LIST", help='e.g. 0,2 or GPU-1a2b; "" for none (default: all visible)')
    connect.add_argument("--workers-per-gpu", type=_count, default=1, metavar="N")
    connect.add_argument("--cpu-workers", type=_count, metavar="N", help="default: one per core without a GPU")
    connect.add_argument("--devices", metavar="LIST", help="other vendors' devices, with --device-env")
    connect.add_argument("--device-env", metavar="VAR", help="the variable that selects one, e.g. HIP_VISIBLE_DEVICES")
    connect.add_argument("--tag", action="append", dest="tags", metavar="T", default=[], help="a word for `on=`")
    connect.add_argument("--lifetime", type=minipool.TIME, metavar="T", help="drain and leave after T, e.g. 55m")
    connect.add_argument("--death-timeout", type=minipool.TIME, metavar="T", help="leave after T without a server")
    connect.add_argument("--max-tasks", type=_count, metavar="N", help="renew a worker after N jobs")
    sys.modules["__main__"] = types.ModuleType("__main__")      # else multiprocessing imports ours anew in each worker
    writer = threading.Thread(target=_stderr.pass_on, name="minipool-output", daemon=True)
    writer.start()
    try:
        if sys.argv[1:] == ["_child"]:
            return child_main(multiprocessing.connection.Connection(os.dup(0)))
        return minipool.run_command(parser.parse_args(), log_to=_stderr)
    finally:
        _stderr.put(None)
        writer.join(1)          # let the last words out; for a second, as perhaps nobody reads them


if __name__ == "__main__":
    from minipool_worker import main as _main  # one copy of every class, not two
    raise SystemExit(_main())
