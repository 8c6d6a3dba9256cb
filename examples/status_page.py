"""A status page: what a pool's workers do now and did in the last minutes, in a browser, for programs and Prometheus.

    python examples/status_page.py                      # of the pool at MINIPOOL_ADDRESS, else of this machine's
    python examples/status_page.py head:8899 --port 8900

It is a client of the pool and finds the secret as every client does. Inside a program, for an embedded pool too:

    with Executor() as ex, StatusPage(ex) as page:
        print(page.url)

`/` is one page that loads nothing from elsewhere; `/info.json` is what `minipool.py status --json` prints, and what was
seen; `/metrics` is Prometheus's text format; `/healthz` is 200 while the pool answers, else 503. Only this machine can
reach it. With `--bind`, others can, if they send the token in `--token-file` (made if it is not there): programs as
`Authorization: Bearer TOKEN`, browsers by `http://host:8900/#TOKEN`, which stays in the browser; `/` and `/healthz`,
which tell nothing of the pool's content, are open. Nothing is encrypted: `ssh -L 8900:localhost:8900 head` is.

It looks once per second, so shorter jobs are seen in counts only, and it judges from outside: a worker is listed as
lost that another process replaced (after `--max-tasks` too), or that is gone and was busy or away at the last look; why
is in the node's log. Counts of jobs are the server's: what a client has not sent yet, beyond some thousands, is not in
them. It shows no load of processors and GPUs.
"""
from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import hmac
import http.server
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor, MinipoolError

PERIOD = 1.0        # seconds between two looks; more if the pool takes long to answer
KEPT = 300.0        # seconds that are remembered
AWAY = 5.0          # seconds after which a worker that is gone will not come back: longer than a server's restart
SPANS = 5000        # that are remembered at most

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minipool</title><link rel="icon" href="data:,"><style>
:root { --bg: #f6f7f9; --card: #fff; --text: #1c2330; --dim: #667085; --line: #e3e6eb; --busy: #2563eb; --ok: #15803d;
  --bad: #c62828; --warn: #a15c00; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --bg: #12151b; --card: #1b2029; --text: #e6e9ef; --dim: #97a1b2;
  --line: #2c333f; --busy: #6ea2ff; --ok: #5fce86; --bad: #ff7b72; --warn: #f0b45a } }
body { margin: 0 auto; max-width: 70rem; padding: .8rem; background: var(--bg); color: var(--text);
  font: 14px/1.4 system-ui, sans-serif }
h1 { font-size: 1.15rem; margin: 0 } h2 { font-size: .9rem; margin: 0 0 .4rem } p { margin: .2rem 0 }
header { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline; margin-bottom: .7rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem;
  margin-bottom: .7rem; min-width: 0 }
.grid { display: grid; gap: 0 .7rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)) }
.dim { color: var(--dim) } .bad { color: var(--bad) } .right { float: right; font-weight: normal }
#counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(5.5rem, 1fr)); gap: .4rem }
#counts b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
svg { display: block; width: 100%; height: 64px } svg.strip { height: 16px; background: var(--bg); border-radius: 3px }
.worker { display: grid; gap: .1rem .6rem; align-items: center; padding: .2rem 0; border-top: 1px solid var(--line);
  grid-template-columns: 8rem 4.5rem 4.5rem minmax(6rem, 1fr) 5.5rem minmax(12rem, 3fr) }
.worker > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.busy { color: var(--busy) } .idle { color: var(--ok) } .draining, .suspect, .away { color: var(--warn) }
.number { text-align: right; font-variant-numeric: tabular-nums }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin: 0 .3em 0 .9em }
li { overflow-wrap: anywhere } ul { margin: 0; padding-left: 1.1rem }
@media (max-width: 44rem) { .worker { gap: .1rem .3rem;
  grid-template-columns: minmax(3.5rem, 1fr) 3rem 3.5rem minmax(3rem, 1fr) 4.5rem }
  .strip { grid-column: 1 / -1 } }
</style></head><body>
<header><h1>minipool</h1><span id="where" class="dim"></span><span id="state" role="status"></span></header>
<section id="counts"></section>
<div class="grid">
<section><h2>Busy workers <span id="busy-now" class="right dim"></span></h2><svg id="busy"></svg></section>
<section><h2>Results per second <span id="rate-now" class="right dim"></span></h2><svg id="rate"></svg></section></div>
<section><h2>Workers, and what they did in the last <span id="shown"></span></h2>
<div id="workers"></div><p id="legend" class="dim"></p></section>
<div class="grid"><section><h2>Lost workers</h2><ul id="losses"></ul></section>
<section><h2>Nodes</h2><ul id="nodes"></ul></section><section><h2>Clients</h2><ul id="clients"></ul></section></div>
<script>
const $ = id => document.getElementById(id), colours = new Map([["short jobs", "var(--dim)"]])    // red is for losses
const palette = ["#4c8dff", "#e58a2b", "#35a66a", "#c45bd0", "#2aa5b5", "#8f78e8", "#a88a2d"]
const token = decodeURIComponent(location.hash.slice(1))
const add = (parent, name, text, kind) => {       // what the pool says becomes text, never HTML
  const made = parent.appendChild(document.createElement(name))
  made.textContent = text ?? ""
  if (kind) made.className = kind
  return made
}
const shape = (parent, name, attributes, hint) => {
  const made = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name))
  for (const key in attributes) made.setAttribute(key, attributes[key])
  if (hint) shape(made, "title", {}).textContent = hint
  return made
}
const colour = name => colours.get(name) ?? colours.set(name, palette[colours.size % palette.length]).get(name)
const clock = seconds => new Date(seconds * 1000).toLocaleTimeString()
const fill = (id, items, empty, text) => {
  $(id).replaceChildren()
  for (const item of items) add($(id), "li", text(item), item.lost?.length ? "bad" : "")
  if (!items.length) add($(id), "li", empty, "dim")
}
function chart(id, history, x, value, top) {
  const svg = $(id), y = n => 63 - 60 * n / top
  svg.setAttribute("viewBox", "0 0 300 64")
  svg.setAttribute("preserveAspectRatio", "none")
  svg.replaceChildren()
  const points = history.map(one => `${x(one.time).toFixed(1)},${y(value(one)).toFixed(1)}`)
  if (!points.length) return
  const area = [`${points[0].split(",")[0]},63`, ...points, `${points.at(-1).split(",")[0]},63`]
  shape(svg, "polygon", {points: area.join(" "), fill: "var(--busy)", opacity: .18})
  const line = {fill: "none", "stroke-width": 1.5, "vector-effect": "non-scaling-stroke"}
  shape(svg, "polyline", {...line, points: points.join(" "), stroke: "var(--busy)"})
  shape(svg, "polyline", {...line, points: "0,63.5 300,63.5", stroke: "var(--line)"})
}
function draw(info) {
  const {history, spans, losses, kept, time, trouble} = info.seen, jobs = info.jobs
  const workers = info.workers.sort((a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}))
  const now = history.at(-1), shown = Math.min(kept, Math.max(60, time - history[0].time))
  const x = when => 300 * (1 - (time - when) / shown)
  const rate = n => n >= 100 ? Math.round(n).toLocaleString() : n.toFixed(1)
  $("where").textContent = `${info.embedded ? "embedded pool" : "server"} ${info.address}, Python ${info.python}`
  $("state").textContent = trouble ? `no answer since ${clock(now.time)}: ${trouble}` : ""
  $("state").className = "bad"
  $("shown").textContent = shown < 120 ? `${Math.round(shown)} seconds` : `${Math.round(shown / 60)} minutes`
  $("counts").replaceChildren()
  for (const [name, count] of [["workers", workers.length], ["busy", now.busy], ["ready", jobs.ready],
      ["waiting", jobs.waiting], ["running", jobs.running], ["delivered", jobs.delivered], ["lost", info.seen.lost]]) {
    const cell = add($("counts"), "div")
    add(cell, "b", count.toLocaleString(), name == "lost" && count ? "bad" : "")
    add(cell, "span", name, "dim")
  }
  const most = Math.max(1, ...history.map(one => one.workers)), fastest = Math.max(1, ...history.map(one => one.rate))
  chart("busy", history, x, one => one.busy, most)
  chart("rate", history, x, one => one.rate, fastest)
  $("busy-now").textContent = `${now.busy} of ${now.workers}, at most ${Math.max(...history.map(one => one.busy))}`
  $("rate-now").textContent = `${rate(now.rate)}, at most ${rate(Math.max(...history.map(one => one.rate)))}`
  $("workers").replaceChildren()
  for (const worker of workers) {
    const row = add($("workers"), "div", "", "worker"), state = worker.connected ? worker.state : "away"
    add(row, "span", worker.name).title = `pid ${worker.pid} on ${worker.node}`
    add(row, "span", worker.device, "dim")
    add(row, "span", state, state)
    add(row, "span", worker.jobs[0]).title = worker.jobs.join("\n")
    add(row, "span", `${worker.finished.toLocaleString()} done`, "number dim")
    const strip = shape(row, "svg", {class: "strip", viewBox: "0 0 300 10", preserveAspectRatio: "none"})
    for (const [name, begin, end, job, done] of spans) if (name == worker.name)
      shape(strip, "rect", {x: x(begin), width: Math.max(.6, x(end) - x(begin)), y: 0, height: 10, fill: colour(job)},
        `${job}, ${clock(begin)} to ${clock(end)}${done > 1 ? `, ${done} jobs` : ""}`)
    for (const loss of losses) if (loss.worker == worker.name)
      shape(strip, "rect", {x: x(loss.time) - 1.5, width: 3, y: 0, height: 10, fill: "var(--bad)"},
        `lost at ${clock(loss.time)}`)
  }
  if (!workers.length) add($("workers"), "p", "None has joined: python minipool_worker.py connect " + info.address)
  $("legend").replaceChildren()
  for (const job of [...new Set(spans.map(span => span[3]).reverse())].slice(0, 16)) {
    add($("legend"), "span", "", "chip").style.background = colour(job)
    add($("legend"), "span", job)
  }
  fill("losses", losses.slice().reverse(), "none seen", one => `${clock(one.time)} ${one.worker} on ${one.device}, ` +
    `pid ${one.pid}${one.jobs.length ? `, at ${one.jobs[0]}` : ""}`)
  fill("nodes", info.nodes, "none", one => `${one.name} on ${one.host}: ${one.workers} workers` +
    (one.connected ? "" : `, away for ${one.silent_s} s`) + (one.lost ?? []).map(text => `; ${text}`).join(""))
  fill("clients", info.clients, "none", one => `${one.name}: ${one.jobs} jobs` + (one.connected ? "" : ", away"))
}
async function look() {
  let trouble = ""
  try {
    const answer = await fetch("info.json", {headers: token ? {Authorization: `Bearer ${token}`} : {}})
    if (answer.ok) draw(await answer.json())
    else trouble = answer.status == 401 ? "the address of this page must end with # and its token" : await answer.text()
  } catch (error) { trouble = `this page has no answer from its server: ${error.message}` }
  if (trouble) { $("state").textContent = trouble; $("state").className = "bad" }
  setTimeout(look, 2000)
}
look()
</script></body></html>
"""


def policy() -> str:
    """Allow the page its own style and script, by their hashes, and requests to its own server; nothing else."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (
        re.search("<style>(.*)</style>", PAGE, re.DOTALL)[1], re.search("<script>(.*)</script>", PAGE, re.DOTALL)[1]))
    return (f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Watch:
    """What a pool did in the last minutes, from snapshots: history, spans of work, lost workers. One thread writes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor.options(timeout=5)
        self.info: dict[str, Any] = {}      # the last snapshot
        self.trouble = ""                   # why there is no newer one
        self.lost = 0
        self.history: list[dict[str, Any]] = []     # this and the next two are bound anew, so others may read them
        self.spans: list[list] = []         # [worker, begin, end, job, how many jobs]
        self.losses: list[dict[str, Any]] = []
        self._known: dict[tuple[str, int], dict] = {}       # by name and pid: the workers at the last look
        self._missing: dict[tuple[str, int], tuple[float, dict]] = {}   # those that are gone, and since when
        self._open: dict[tuple[str, int], list] = {}        # the spans that may go on
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status page: watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            begin, pause = time.monotonic(), PERIOD
            try:
                info = self._executor.info()
                # a snapshot walks all that the server holds: the more that is, the more seldom it is asked for
                pause = max(PERIOD, 20 * (time.monotonic() - begin))
                self._note(time.time(), info)
                self.info, self.trouble = info, ""
            except Exception as error:      # whatever it is: this thread goes on, and the page tells it
                self.trouble = f"{type(error).__name__}: {error}"
            self._stopped.wait(pause)

    def _note(self, now: float, info: dict[str, Any]) -> None:
        there = {(worker["name"], worker["pid"]): worker for worker in info["workers"]}
        done, last = info["jobs"]["delivered"], self.history[-1] if self.history else None
        rate = max(0, done - last["done"]) / max(now - last["time"], 1e-3) if last else 0.0
        look = {"time": round(now, 2), "workers": len(there), "done": done, "rate": round(rate, 2),
                "busy": sum(worker["state"] == "busy" for worker in there.values()), "ready": info["jobs"]["ready"]}
        spans = [self._note_span(now, key, worker, self._known.get(key)) for key, worker in there.items()]
        self.spans = [span for span in self.spans + spans if span and span[2] >= now - KEPT][-SPANS:]
        self.history = [*(old for old in self.history if old["time"] >= now - KEPT), look]
        self._note_losses(now, there)
        self._known = there

    def _note_span(self, now: float, key: tuple[str, int], worker: dict, before: dict | None) -> list | None:
        """Extend what the worker does by this look, or return a new span."""
        done = max(0, worker["finished"] - before["finished"]) if before else 0     # a new server counts anew
        job = worker["jobs"][0] if worker["jobs"] else "short jobs" if done else None
        span, now = self._open.get(key), round(now, 2)
        if span and span[3] == job:
            span[2], span[4] = now, span[4] + done
        elif job:
            begin = span[2] if span else now if worker["jobs"] else self.history[-1]["time"]
            self._open[key] = [worker["name"], begin, now, job, done]
            return self._open[key]
        elif span:
            del self._open[key]
        return None

    def _note_losses(self, now: float, there: dict[tuple[str, int], dict]) -> None:
        """List those that are gone, once another has their place or they had time to come back to a new server."""
        for key in self._known.keys() - there.keys():
            self._missing[key] = now, self._known[key]
            self._open.pop(key, None)
        names = {name for name, _ in there}
        for key, (since, worker) in list(self._missing.items()):
            if key in there or key[0] in names or now > since + AWAY:
                del self._missing[key]
                was_quiet = worker["connected"] and worker["state"] in ("idle", "draining")
                if key not in there and (key[0] in names or not was_quiet):
                    self.lost += 1
                    self.losses = [*self.losses[-49:], {
                        "time": round(since, 2), "worker": key[0], "pid": key[1],
                        **{name: worker[name] for name in ("node", "device", "jobs")}}]

    def seen(self) -> dict[str, Any]:
        """Return the last snapshot, and under `seen` what was seen before."""
        return {**self.info, "seen": {"time": round(time.time(), 2), "kept": KEPT, "trouble": self.trouble,
                                      "lost": self.lost, "losses": self.losses, "history": self.history,
                                      "spans": self.spans}}

    def metrics(self) -> str:
        """Return the last snapshot in Prometheus's text format."""
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, values: dict[tuple[tuple[str, Any], ...], float]) -> None:
            lines.extend((f"# HELP minipool_{name} {text}", f"# TYPE minipool_{name} {kind}"))
            for labels, value in values.items():
                inside = ",".join(f'{label}="{escaped(content)}"' for label, content in labels)
                lines.append(f"minipool_{name}{{{inside}}} {value}" if inside else f"minipool_{name} {value}")

        info, workers = self.info, self.info.get("workers", [])
        metric("up", "gauge", "Whether the pool answers.", {(): int(bool(info) and not self.trouble)})
        metric("lost_workers_total", "counter", "Workers that died or were replaced.", {(): self.lost})
        if info:
            jobs, states = info["jobs"], collections.Counter(worker["state"] for worker in workers)
            for name in ("accepted", "delivered", "cancelled"):
                metric(f"jobs_{name}_total", "counter", f"Jobs {name} by this server.", {(): jobs[name]})
            metric("jobs", "gauge", "Jobs that the server holds.", {(("state", state),): jobs[state] for state in (
                "waiting", "ready", "running", "delivering", "failed")})
            metric("workers", "gauge", "Workers.", {(("state", state),): states[state] for state in (
                "busy", "idle", "draining", "suspect")})
            metric("worker_jobs_total", "counter", "Jobs that a worker's process has ended.", {
                tuple((name, worker[name]) for name in ("node", "name", "device")): worker["finished"]
                for worker in workers})
            metric("nodes", "gauge", "Nodes.", {(): len(info["nodes"])})
            metric("clients", "gauge", "Clients, this page among them.", {(): len(info["clients"])})
            metric("object_bytes", "gauge", "Bytes of values at the server.", {(): info["objects"]["bytes"]})
        return "\n".join(lines) + "\n"


def escaped(content: Any) -> str:
    return str(content).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version, sys_version, timeout = "minipool", "", 10

    def do_GET(self) -> None:
        status, kind, text, *more = self.server.answer(urlsplit(self.path).path, self.headers)
        body = text.encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), *more):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class StatusPage(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serve the status page of an executor's pool until it is closed; `url` is where. `port=0`: a free one."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, executor: Executor, port: int = 8900, *, bind: str = "127.0.0.1", token: str = "") -> None:
        address = ipaddress.ip_address("127.0.0.1" if bind == "localhost" else bind)
        if token and len(token) < 16:
            raise ValueError("the token must have 16 characters or more")
        if not (token or address.is_loopback):
            raise ValueError(f"a token is needed where others can reach the page, as at {bind}")
        self.address_family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        super().__init__((str(address), port), _Handler)
        host = f"[{address}]" if address.version == 6 else str(address)
        self.url, self._token, self._policy = f"http://{host}:{self.server_address[1]}/", token, policy()
        self.watch = Watch(executor)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="status page", daemon=True)
        self._thread.start()

    def server_close(self) -> None:
        """Stop serving and looking; the executor stays as it is."""
        if hasattr(self, "_thread"):        # else its port was taken
            self.shutdown()
            self._thread.join()
            self.watch.stop()
        super().server_close()

    def handle_error(self, *_: Any) -> None:
        pass                                # a browser that went away

    def answer(self, path: str, headers: Any) -> tuple[Any, ...]:
        """Return status, content type, text and further headers for a path."""
        plain, watch = "text/plain; charset=utf-8", self.watch
        if not self._token and not is_local(headers.get("Host", "")):     # a foreign page that renamed itself to this
            return 403, plain, "this page is for this machine: open it as localhost\n"
        if path == "/":
            return 200, "text/html; charset=utf-8", PAGE, ("Content-Security-Policy", self._policy)
        if path == "/healthz":
            return (200, plain, "ok\n") if watch.info and not watch.trouble else (503, plain, "the pool is silent\n")
        given = headers.get("Authorization", "").encode("latin-1", "replace")
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return 401, plain, "this needs the token\n", ("WWW-Authenticate", "Bearer")
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", watch.metrics()
        if path == "/info.json":
            found = (503, plain, "the pool has not answered yet\n")
            return (200, "application/json", json.dumps(watch.seen())) if watch.info else found
        return 404, plain, "there are /, /info.json, /metrics and /healthz\n"


def is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """Return the token in a file, which is made if it is not there."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(24) + "\n")
    return path.read_text().strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", nargs="?", metavar="HOST[:PORT]", default=os.environ.get("MINIPOOL_ADDRESS")
                        or "127.0.0.1", help="the pool; default: MINIPOOL_ADDRESS, then this machine")
    parser.add_argument("--port", type=int, default=8900, help="of the page; default: %(default)s; 0: a free one")
    parser.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="where to listen; default: %(default)s")
    parser.add_argument("--token-file", type=Path, metavar="F", help="file with the token; made if it is not there")
    parser.add_argument("--tls", action="store_true", help="the pool encrypts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        token = read_token(options.token_file) if options.token_file else ""
        # the page outlives any outage of the pool, and says how long it lasts
        with (Executor(options.address, name="status page", tls=options.tls, connect_timeout=5,
                       reconnect_timeout=1e9) as ex,
              StatusPage(ex, options.port, bind=options.bind, token=token) as page):
            print(f"status page: {page.url}{f'#TOKEN, the one in {options.token_file}' if token else ''}", flush=True)
            threading.Event().wait()
    except (MinipoolError, OSError, ValueError) as error:
        print(f"status page: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
