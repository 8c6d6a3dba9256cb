"""Record README's commands in terminals and draw them as docs/terminal.svg.

    python docs/make_terminal.py [PATH [PORT]]      # a few seconds; without a PORT it needs 8899 of this machine

Everything in the picture was printed by the real commands, each in a terminal (a pty) of its own: a server, a node, a
small program, and `status` while that runs. All is on loopback and in a folder of its own; the picture names no other
path. Only the standard library. The text stays text: it can be selected, searched and read aloud, and follows the
reader's light or dark theme.
"""

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LINE, CHARACTER = 100, 18, 7.83        # columns; pixels per line and per column at 13 px
PATIENCE = 60.0                                 # seconds for a command to say what it is to say
PROGRAM = """\
import time
from minipool import Executor

def train(rate):
    time.sleep(0.5)                 # your training loop here
    return (rate - 0.1) ** 2, rate

with Executor() as pool:
    results = list(pool.map(train, [n / 100 for n in range(1, 25)]))
print("best loss and rate:", min(results))
"""
STYLE = """
    svg { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; }
    .window { fill: #f6f8fa; stroke: #d0d7de; } .bar { fill: #eaeef2; } .title { fill: #57606a; }
    text { fill: #24292f; white-space: pre; } .prompt { fill: #1a7f37; } .typed { font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      .window { fill: #0d1117; stroke: #30363d; } .bar { fill: #161b22; } .title { fill: #8b949e; }
      text { fill: #e6edf3; } .prompt { fill: #3fb950; }
    }
"""


class Terminal:
    """A command in a terminal of its own; `text` is what it has printed."""

    def __init__(self, command, folder, environment):
        self.command, self.text = command, ""
        self._screen, inside = pty.openpty()
        words = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
        self._process = subprocess.Popen(["/bin/sh", "-c", f"exec env {words}"], cwd=folder, env=environment,
                                         stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
        os.close(inside)

    def read_until(self, pattern):
        """Read until it has printed this; None: until it ends."""
        give_up = time.monotonic() + PATIENCE
        while pattern is None or not re.search(pattern, self.text):
            if not select.select([self._screen], [], [], max(0, give_up - time.monotonic()))[0]:
                raise SystemExit(f"{self.command}: printed no {pattern} in {PATIENCE:g} s, but: {self.text}")
            try:
                self.text += os.read(self._screen, 4096).decode().replace("\r\n", "\n")
            except OSError:         # the end of a pty
                if pattern is None:
                    return
                raise SystemExit(f"{self.command}: ended, and said: {self.text}") from None

    def has_ended(self):
        """Whether the command is no more."""
        return self._process.poll() is not None

    def close(self):
        """End the command as Ctrl-C does, and let go of the terminal."""
        if not self.has_ended():
            self._process.send_signal(signal.SIGINT)
        self._process.wait(PATIENCE)
        os.close(self._screen)


def record(folder, port):
    """Run everything; return the windows of the picture as (title, [(command, what it printed)])."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MINIPOOL_")}
    environment |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / ".config"), "PYTHONPATH": str(ROOT),
                    "XDG_RUNTIME_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("minipool.py", "minipool_worker.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "train.py").write_text(PROGRAM, encoding="utf-8")
    started = []

    def run(command, until=None):
        started.append(Terminal(command, folder, environment))
        started[-1].read_until(until)
        return started[-1]

    def status_with(words):
        """Ask for the status until it has these words."""
        while words not in (status := run(f"python minipool.py status{at}")).text:
            status.close()
            started.remove(status)
            if started[-1].command.endswith("train.py") and started[-1].has_ended():
                raise SystemExit(f"the program ended before status showed it: {status.text}")
        return status
    try:
        place = f":{port}" if port != 8899 else ""
        at = f" --address 127.0.0.1{place}" if place else ""
        server = run("python minipool.py serve" + (f" --port {port}" if place else ""), "Ctrl-C")
        node = run(f"python minipool_worker.py connect 127.0.0.1{place} --name desk --cpu-workers 4", "connected.*\n")
        status_with("workers: 4")
        code, program = run("cat train.py"), run(f"MINIPOOL_ADDRESS=127.0.0.1{place} python train.py", "")
        status = status_with(" 4 running")
        program.read_until(None)
    finally:
        for terminal in reversed(started):
            terminal.close()

    def shown(*terminals):
        return [(one.command, one.text.replace(str(folder), "~").rstrip("\n")) for one in terminals]
    return [("server", shown(server)), ("node", shown(node)), ("program", shown(code, program)),
            ("status, meanwhile", shown(status))]


def wrapped(text):
    """Return the lines of a terminal of WIDTH columns."""
    return [line[at:at + WIDTH] for line in text.split("\n") for at in range(0, max(1, len(line)), WIDTH)]


def window(title, commands, top):
    """Return the picture of one terminal as lines of SVG, and its height."""
    rows = []
    for command, output in commands:
        rows.append(f'<tspan class="prompt">$ </tspan><tspan class="typed">{escape(command)}</tspan>')
        rows += map(escape, wrapped(output))
    width, height = WIDTH * CHARACTER + 32, (len(rows) + 1) * LINE + 26
    drawn = [f'<rect class="window" x="1" y="{top}" width="{width:.0f}" height="{height}" rx="8"/>',
             f'<rect class="bar" x="2" y="{top + 1}" width="{width - 2:.0f}" height="24" rx="7"/>',
             f'<text class="title" x="16" y="{top + 17}">{title}</text>']
    drawn += [f'<text x="16" y="{top + 26 + LINE * number + 14}" xml:space="preserve">{row}</text>'
              for number, row in enumerate(rows) if row]
    return drawn, height


def draw(windows):
    """Return the picture."""
    drawn, top = [], 1
    for title, commands in windows:
        lines, height = window(title, commands, top)
        drawn, top = drawn + lines, top + height + 12
    size = f"{WIDTH * CHARACTER + 34:.0f} {top}"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" role="img">',
        "<title>A pool of minipool in three terminals</title>",
        "<desc>A server, a node that joins it, a program that runs on the pool, and the pool's status.</desc>",
        f"<style>{STYLE}</style>", *drawn, "</svg>", ""])


def main():
    path = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs/terminal.svg"
    port = int(sys.argv[2]) if sys.argv[2:] else 8899
    with tempfile.TemporaryDirectory() as folder:
        path.write_text(draw(record(Path(folder).resolve(), port)), encoding="utf-8")


if __name__ == "__main__":
    main()
