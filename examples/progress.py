"""Progress: a bar for futures, at the console and in notebooks.

Copy this file beside your program; it needs only the standard library, and draws by tqdm where that is installed.

    from progress import progress

    futures = [ex.submit(train, rate) for rate in rates]
    progress(futures)           # [################          ] | 40% Completed |  3.1s

Works with futures of any concurrent.futures executor. At the console it returns when all are done, or at the first that
failed, without raising its error. In a notebook it returns at once and one bar per function is redrawn in the cell. A
cancelled future is done. To see an error a future's value must be decoded, so all values are held by their futures.
"""
from __future__ import annotations

import collections
import html
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO

CELLS, REDRAW = 40, 0.1     # of the plain bar; seconds between two drawings


class Tally:
    """How many of some futures are done, per name of their function; threads of their executors count."""

    def __init__(self, futures: list[Future]) -> None:
        self.began, self.total = time.monotonic(), collections.Counter(map(_name, futures))
        self.done = collections.Counter[str]()
        self.failed: str | None = None      # the name of the first that did
        self._lock, self._over = threading.Lock(), threading.Event()
        for future in futures:
            future.add_done_callback(self._count)
        self._judge()

    def _count(self, future: Future) -> None:
        with self._lock:
            self.done[_name(future)] += 1
            if self.failed is None and not future.cancelled() and future.exception() is not None:
                self.failed = _name(future)
            self._judge()

    def _judge(self) -> None:
        if self.failed is not None or self.done.total() == self.total.total():
            self._over.set()

    def __iter__(self) -> Iterator[int]:
        """Yield how many are done, now and then, and once more when all are or one has failed."""
        while not self._over.wait(REDRAW):
            yield self.done.total()
        yield self.done.total()


def _name(future: Future) -> str:
    return getattr(future, "name", "jobs")


def _flat(futures: Any) -> Iterator[Future]:
    """Yield the futures in a nest of iterables, each once."""
    for one in futures:
        if isinstance(one, Future):
            yield one
        elif isinstance(one, Iterable) and not isinstance(one, str | bytes):
            yield from _flat(one)
        else:
            raise TypeError(f"progress() takes futures, or iterables of them, not {type(one).__name__}")


def progress(*futures: Any, notebook: bool | None = None, multi: bool = True, plain: bool = False,
             file: TextIO | None = None) -> None:
    """Show how many of the futures are done, until all are or one has failed.

    `notebook` is found out unless it is given; `multi`: there, one bar per function. `plain`: without tqdm. `file` is
    where the console's bar goes, sys.stderr by default. Raises TypeError for what is no future.
    """
    tally = Tally(list(dict.fromkeys(_flat(futures))))
    if in_notebook() if notebook is None else notebook:
        from IPython.display import HTML, display
        shown = display(HTML(markup(tally, multi)), display_id=True)
        threading.Thread(target=_redraw, args=(tally, multi, shown), name="progress", daemon=True).start()
    elif plain or not _by_tqdm(tally, file):
        _by_hand(tally, file or sys.stderr)


# ---- at the console ----

def _by_tqdm(tally: Tally, file: TextIO | None) -> bool:
    """Draw by tqdm; return whether it is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        return False
    with tqdm(total=tally.total.total(), unit="job", file=file) as bar:
        for done in tally:
            bar.update(done - bar.n)
    return True


def _by_hand(tally: Tally, file: TextIO) -> None:
    text = ""
    for done in tally:
        text = line(done, tally.total.total(), time.monotonic() - tally.began)
        if file.isatty():           # elsewhere only the last one is worth a line
            print(f"\r{text}", end="", file=file, flush=True)
    print("" if file.isatty() else text, file=file, flush=True)


def line(done: int, total: int, seconds: float) -> str:
    """Return the plain bar as text; of no jobs all are done."""
    share = done / total if total else 1.0
    return f"[{'#' * int(share * CELLS):{CELLS}}] | {int(share * 100)}% Completed | {elapsed(seconds)}"


def elapsed(seconds: float) -> str:
    """Return a duration as text: ` 1.7s`, ` 3min  0.2s`, ` 1hr  0min  5.0s`."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:4.1f}s"
    if hours or minutes:
        text = f"{minutes:2}min {text}"
    return f"{hours:2}hr {text}" if hours else text


# ---- in notebooks ----

def in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _redraw(tally: Tally, multi: bool, shown: Any) -> None:
    from IPython.display import HTML
    last = ""
    for _ in tally:
        if (text := markup(tally, multi)) != last:
            shown.update(HTML(text))
            last = text


def markup(tally: Tally, multi: bool) -> str:
    """Return the bars as HTML."""
    names = list(tally.total) if multi else ["all jobs"]
    rows = []
    for name in names:
        done, total = (tally.done[name], tally.total[name]) if multi else (tally.done.total(), tally.total.total())
        word = " failed" if tally.failed is not None and tally.failed in (name, *[tally.failed] * (not multi)) else ""
        rows.append(f"<div><progress value='{done}' max='{total or 1}' style='width: 20em'></progress> "
                    f"{html.escape(name)}: {done} of {total}<b>{word}</b></div>")
    return "".join(rows)


# ---- a small program ----

def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))       # a plain checkout
    from minipool import Executor
    with Executor() as ex:
        progress([ex.submit(time.sleep, 0.1) for _ in range(5 if "--quick" in sys.argv else 50)])


if __name__ == "__main__":
    main()
