"""A TCP proxy that misbehaves on purpose: what netem does in the kernel, without needing root.

    with FaultProxy("127.0.0.1", 8899) as proxy:        # dial proxy.port instead
        proxy.cut()                                     # every connection is reset, new ones are welcome
        proxy.frozen = True                             # both directions stop, nothing is closed
        proxy.freeze_down = True                        # only what the server says is held back
        proxy.delay, proxy.chop = 0.05, 7               # seconds per piece, bytes per piece
        proxy.flip_after = 1000                         # one bit of the byte 1,000 bytes from now, once
        proxy.cut_after = 5000                          # the connection that carries byte 5,000 from now is reset
"""
from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time


class FaultProxy:
    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.delay, self.chop = 0.0, 65536
        self.frozen = self.freeze_up = self.freeze_down = False
        self.flip_after: int | None = None
        self.cut_after: int | None = None
        self.cuts = 0
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._stopping = False
        self._threads = [threading.Thread(target=self._accept, name="fault-proxy", daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Reset every connection there is."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
            self.cuts += len(pairs)
        for pair in pairs:
            self._reset(pair)

    def close(self) -> None:
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)           # wakes accept(), where closing alone does not
        self._threads[0].join(5)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _reset(pair: tuple[socket.socket, socket.socket]) -> None:
        for sock in pair:
            with contextlib.suppress(OSError):              # linger 0: the other end sees a reset, not an end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            pair = (near, far)
            with self._lock:
                self._pairs.add(pair)
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                thread = threading.Thread(target=self._carry, args=(pair, source, sink, way), daemon=True)
                thread.start()
                self._threads[1:] = [*(t for t in self._threads[1:] if t.is_alive()), thread]

    def _carry(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket,
               way: str) -> None:
        try:
            while True:
                data = source.recv(self.chop)
                while not self._stopping and (self.frozen or getattr(self, f"freeze_{way}")):
                    time.sleep(0.01)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if self.delay:
                    time.sleep(self.delay)
                sink.sendall(self._spoil(pair, data))
        except OSError:
            with self._lock:
                self._pairs.discard(pair)
            self._reset(pair)

    def _spoil(self, pair: tuple[socket.socket, socket.socket], data: bytes) -> bytes:
        with self._lock:
            if self.flip_after is not None:
                place, self.flip_after = self.flip_after, self.flip_after - len(data)
                if place < len(data):
                    self.flip_after = None
                    data = data[:place] + bytes([data[place] ^ 16]) + data[place + 1:]
            if self.cut_after is not None:
                self.cut_after -= len(data)
                if self.cut_after < 0:
                    self.cut_after = None
                    self.cuts += 1
                    raise OSError("cut here")
        return data
