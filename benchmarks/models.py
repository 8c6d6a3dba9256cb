"""Model workers: many that are nothing but a socket each, to see what a server makes of so many.

    python benchmarks/models.py PORT SECRET_FILE COUNT      # until it is ended

They join as the workers of one node do, over real connections with the real handshake, and answer every job at once
with ANSWER, without running it. All are served by one thread, which is about as quick as two real workers.
One line is printed when all have joined.
"""
from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import minipool

ANSWER = 42
START_LIMIT = 30.0      # seconds for the server to listen
NAME = "models"         # of their node; the workers are models-0, models-1 and so on


def dial(port: int) -> socket.socket:
    give_up = time.monotonic() + START_LIMIT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def join(port: int, secret: minipool.Secret, role: str, identity: bytes, **info: Any) -> minipool.Connection:
    """Connect, as soon as somebody listens there, and announce."""
    sock = dial(port)
    keys, _ = minipool.handshake(sock, role, secret.role_key, identity if role == "worker" else b"")
    connection = minipool.Connection(minipool.Plain(sock), keys.up, keys.down, "server")
    connection.post([(role, {"id": identity, "python": minipool.PYTHON, "pid": os.getpid(), **info},
                      *[[]] * (role == "worker"))])        # a worker says what it runs: nothing
    connection.flush()
    return connection


def answers(messages: Iterable[tuple[Any, ...]], value: Any) -> list[tuple[Any, ...]]:
    """What a worker says to these messages if all jobs are done as soon as they come."""
    said: list[tuple[Any, ...]] = []
    for kind, *fields in messages:
        if kind == "run":
            token, options = fields[0], fields[-1] or {}
            said += [("started", token)] * ("say" in options)
            said.append(("finished", token, "ok", value, 1e-5, False))
        elif kind == "recall":
            said.append(("recalled", fields[0], []))       # none of them has not begun
    return said


def main() -> int:
    port, file, count = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    secret, node, value = minipool.Secret(file.read_text()), secrets.token_bytes(12), minipool.encode_value(ANSWER)
    connections = [join(port, secret, "node", node, name=NAME, host=NAME)]
    for place in range(count):
        identity = node + place.to_bytes(4, "big") + (1).to_bytes(4, "big")      # its slot, and the first of it
        connections.append(join(port, secret, "worker", identity, node=node, node_name=NAME, slot=place, device="cpu",
                                tags=[], has=[], positions={}, returns=False))
    selector = selectors.DefaultSelector()
    for connection in connections:
        selector.register(connection._seam.sock, selectors.EVENT_READ, connection)
    print("joined", flush=True)
    while True:
        connections[0].post([("beat",)])        # the node is there
        connections[0].flush()
        for key, _ in selector.select(0.5):
            connection = key.data
            while connection.has_input(0):
                connection.post(answers(connection.receive(), value))
            connection.flush()


if __name__ == "__main__":
    raise SystemExit(main())
