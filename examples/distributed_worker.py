"""DistributedWorker: one rank of a DistributedRunner, or a plain object that works without a pool."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextvars
import copy
import importlib.util
import inspect
import io
import json
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from minipool import current_job


def text_event(item: Any, image_format: str = "jpeg") -> bytes:
    """Return an item as a server-sent event: its JSON, images and arrays of pixels as data URLs."""
    def as_json(value: Any) -> Any:
        if hasattr(value, "detach"):        # a tensor
            value = value.detach().cpu().numpy()
        pixels = getattr(value, "dtype", None) == "uint8" and value.ndim + (value.shape[-1:] in ((3,), (4,))) in (2, 4)
        if pixels and importlib.util.find_spec("PIL"):
            from PIL import Image
            value = Image.fromarray(value)
        if hasattr(value, "save"):
            file = io.BytesIO()
            (value.convert("RGB") if image_format == "jpeg" else value).save(file, image_format)
            return f"data:image/{image_format};base64,{base64.b64encode(file.getvalue()).decode()}"
        if hasattr(value, "tolist"):        # an array, or a number of numpy's
            return value.tolist()
        raise TypeError(f"no JSON for {type(value).__name__}")
    return b"data: " + json.dumps(item, default=as_json).encode() + b"\n\n"


def on_cpu(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a value with its tensors on the CPU: whoever gets it may have no GPU."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        return leaf(value.detach().cpu())
    if type(value) in (list, tuple):
        return type(value)(on_cpu(part, leaf) for part in value)
    if type(value) is dict:
        return {key: on_cpu(part, leaf) for key, part in value.items()}
    return leaf(value)


class DistributedWorker:
    """One rank. Override `setup`, `__call__` and `teardown`, functions or coroutines; it also works without a pool."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        job = current_job()
        self.device = job.device if job else "cpu"      # never cuda:{rank}: a worker sees one GPU
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"rank {rank}", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop).atexit = False
        # where items go: of the call that this thread works for, as far as that is known, else of the latest call
        self._emit: contextvars.ContextVar[Any] = contextvars.ContextVar("emit", default=None)
        self._latest: Any = None

    def setup(self, **kwargs: Any) -> Any:
        """Prepare this rank, with what start() was given."""

    def __call__(self, streaming: bool = False, **payload: Any) -> Any:
        """Do the work of one call; what rank 0 returns is the caller's."""
        raise NotImplementedError("a DistributedWorker has __call__(streaming=False, **payload)")

    def teardown(self) -> Any:
        """Clean up; what it raises is printed."""

    @property
    def running(self) -> bool:
        """Whether this worker's event loop runs."""
        return self._thread.is_alive()

    def initialize(self, **kwargs: Any) -> None:
        """Run `setup` and say how long it took."""
        began = time.monotonic()
        self.wait_for(self.setup(**kwargs))
        self.rank_print(f"set up in {time.monotonic() - began:.1f} s", debug=True)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run a coroutine on this worker's event loop."""
        if not self.running:
            coroutine.close()
            raise RuntimeError("this worker's event loop has stopped")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run_in_worker(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Run a coroutine function on the event loop, or any other in a thread."""
        if inspect.iscoroutinefunction(function):
            return self.submit(function(*args, **kwargs))
        return self.submit(asyncio.to_thread(function, *args, **kwargs))

    def wait_for(self, value: Any) -> Any:
        """Return a value, or what a coroutine returns."""
        async def awaited(awaitable: Awaitable[Any]) -> Any:
            return await awaitable
        return self.submit(awaited(value)).result() if inspect.isawaitable(value) else value

    def add_streaming_result(self, result: Any, image_format: str = "jpeg", as_text_event: bool = False) -> None:
        """Emit an item, as it is now, from any thread; dropped when nobody streams."""
        if emit := self._emit.get() or self._latest:
            emit(text_event(result, image_format) if as_text_event else on_cpu(result, copy.deepcopy))

    def add_streaming_error(self, error: BaseException | str) -> None:
        """Emit {"error": text}: an ordinary item, after which the stream goes on."""
        self.add_streaming_result({"error": str(error)})

    def rank_print(self, message: object, debug: bool = False) -> None:
        """Print a line that tells the rank."""
        print(f"[rank {self.rank}]{' [debug]' if debug else ''} {message}", flush=True)

    def shutdown(self, timeout: float | None = None) -> None:
        """Run `teardown` and end the event loop."""
        try:
            self.wait_for(self.teardown())
        except Exception:
            self.rank_print(f"teardown raised\n{traceback.format_exc()}")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout)
