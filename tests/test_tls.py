"""With TLS nobody reads along, and who stands in the middle is caught though nobody copied a certificate."""

import contextlib
import os
import socket
import threading

import pytest
from processes import ROOT

import minipool
import minipool_worker
from minipool import Connection, Plain, Refused, Secret, Tls, dial_tls, server_tls, tls_context

SECRET = Secret.new()


@pytest.fixture(scope="module")
def encrypted():
    """A server with TLS and a node of two workers; its address and secret."""
    with minipool.Server(port=0, secret=SECRET.text, tls=True) as server:
        with minipool_worker.Node(server.address, secret=SECRET.text, gpus="", cpu_workers=2, tls=True):
            yield server


def dial(address, tls):
    sock, binding = socket.create_connection(minipool.parse_address(address), timeout=10), b""
    if tls:
        sock, binding = dial_tls(sock, tls_context())
    with sock:
        return minipool.handshake(sock, "client", SECRET.role_key, binding=binding)


class TestAPoolWithTls:
    def test_runs_jobs(self, encrypted):
        with minipool.Executor(encrypted.address, secret=SECRET.text, tls=True) as ex:
            assert list(ex.map(abs, range(-500, 0))) == list(range(500, 0, -1))

    def test_carries_large_values_both_ways(self, encrypted, between_hosts):
        value = os.urandom(1 << 20) * 20
        with minipool.Executor(encrypted.address, secret=SECRET.text, tls=True) as ex:
            assert ex.submit(bytes.swapcase, value).result(60) == value.swapcase()

    def test_answers_is_server_running(self, encrypted):
        assert minipool.is_server_running(encrypted.address)

    def test_turns_a_wrong_secret_away(self, encrypted):
        with pytest.raises(Refused):
            minipool.Executor(encrypted.address, secret=Secret.new().text, tls=True)

    def test_needs_tls_1_3(self, encrypted):
        context = tls_context()
        context.minimum_version, context.maximum_version = context.maximum_version, 0x0303
        with socket.create_connection(minipool.parse_address(encrypted.address), timeout=10) as sock:
            with pytest.raises(OSError):
                context.wrap_socket(sock)

    def test_sends_no_word_of_a_job_in_the_clear(self, encrypted):
        with Tap(encrypted.address) as tap:
            with minipool.Executor(tap.address, secret=SECRET.text, tls=True) as ex:
                assert ex.submit(str.upper, "the word").result(60) == "THE WORD"
        assert len(tap.seen) > 1000 and b"the word" not in tap.seen and b"THE WORD" not in tap.seen
        assert b"minipool" not in tap.seen


class TestOneSideOnly:
    def test_with_tls_says_so_in_a_sentence(self, cluster):
        with pytest.raises(minipool.ServerLost, match="started without --tls"):
            minipool.Executor(cluster.address, secret=cluster.secret, tls=True, connect_timeout=1)

    def test_without_says_so_in_a_sentence(self, encrypted):
        with pytest.raises(minipool.ServerLost, match="one that wants TLS"):
            minipool.Executor(encrypted.address, secret=SECRET.text, connect_timeout=1)


class TestTheCommands:
    def test_serve_connect_and_status(self, program, tmp_path):
        secret = tmp_path / "secret"
        secret.touch(mode=0o600)
        secret.write_text(SECRET.text)
        served = program(ROOT / "minipool.py", "serve", "--port", "0", "--tls", "--secret-file", secret)
        address = served.says(r"server on (\S+)")[1]
        assert f"connect {address} --tls" in served.out
        program(ROOT / "minipool_worker.py", "connect", address, "--tls", "--secret-file", secret, "--gpus", "none",
                "--cpu-workers", "1").says("connected to")
        with minipool.Executor(address, secret=SECRET.text, tls=True) as ex:
            ex.submit(abs, 1).result(60)
        status = program(ROOT / "minipool.py", "status", "--address", address, "--tls", "--secret-file", secret)
        assert status.code() == 0 and "nodes: 1, workers: 1" in status.out

    def test_say_so_where_openssl_is_missing(self, program, tmp_path):
        served = program(ROOT / "minipool.py", "serve", "--port", "0", "--tls", PATH=str(tmp_path))
        assert served.code() == 1 and "TLS needs the command `openssl`" in served.err and "Traceback" not in served.err


def listening(sock, context):
    """The answering side's seam of a socket whose other end begins TLS."""
    sock.settimeout(10)
    return Tls(context.wrap_socket(sock, server_side=True))


class Tap:
    """A relay that listens; with a context it stands in the middle: TLS of its own to both sides."""

    def __init__(self, target, context=None):
        self.target, self.context, self.seen = minipool.parse_address(target), context, bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(20)
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(self.target)
                if self.context:
                    near, far = listening(near, self.context), Tls(dial_tls(far, tls_context())[0])
                else:
                    near, far = Plain(near), Plain(far)
                threads = [threading.Thread(target=self.relay, args=pair) for pair in ((near, far), (far, near))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(20)
                near.sock.close(), far.sock.close()

    def relay(self, source, sink):
        buffer = memoryview(bytearray(65536))
        with contextlib.suppress(OSError, EOFError):
            while True:
                data = buffer[:source.receive_into(buffer)]
                self.seen += data
                send_all(sink, data)
        for seam in (source, sink):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(seam.sock, socket.SHUT_RDWR)


def send_all(seam, data):
    data = memoryview(data)
    while data:
        data = data[seam.send([data]):]


class TestAMiddleman:
    @pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
    def test_with_a_certificate_of_his_own_is_refused_each_time(self, encrypted, times):
        with Tap(encrypted.address, server_tls()[0]) as middle:
            for _ in range(times):
                with pytest.raises((Refused, ConnectionError)):
                    dial(middle.address, tls=True)
            assert b"minipool" in middle.seen       # he read the first hello, and it was worth nothing

    def test_who_only_relays_is_no_harm(self, encrypted):
        with Tap(encrypted.address) as relay:
            dial(relay.address, tls=True)


class TestTheSeam:
    @pytest.fixture
    def ends(self):
        """Two seams that have greeted each other, over a socket pair with small buffers."""
        near, far = socket.socketpair()
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        found = []
        answering = threading.Thread(target=lambda: found.append(listening(far, server_tls()[0])))
        answering.start()
        dialer = Tls(dial_tls(near, tls_context())[0])
        answering.join(10)
        yield dialer, found[0]
        dialer.sock.close(), found[0].sock.close()

    def test_carries_frames_both_ways_at_once(self, ends):
        up, down = Connection(ends[0], b"up", b"down", "server"), Connection(ends[1], b"down", b"up", "client")
        body, found = os.urandom(200_000), {}

        def hear(connection, side):
            found[side] = [(connection.receive()[0][-1], connection._seam.sock.pending()) for _ in range(20)]
        threads = [threading.Thread(target=hear, args=pair) for pair in ((up, "near"), (down, "far"))]
        for thread in threads:
            thread.start()
        for connection in (up, down):
            connection.post([("range", (b"x", 1), 0, b"", body)] * 20)
            connection.flush()
        for thread in threads:
            thread.join(60)
        # nothing is left inside after a frame: a poll() of the socket would not tell of it
        assert all(bytes(part) == body and not left for side in ("near", "far") for part, left in found[side])
        for connection in (up, down):
            connection.dispose()

    def test_says_how_much_the_kernel_took_and_waits_for_nobody(self, ends):
        data = os.urandom(1 << 20)
        count = 0
        while sent := ends[0].send([memoryview(data)[count:]]):
            count += sent
        assert count < len(data)        # a part of a record does not count
        heard = memoryview(bytearray(len(data)))
        hearing = threading.Thread(target=receive_all, args=(ends[1], heard))
        hearing.start()
        send_all(ends[0], data[count:])
        hearing.join(20)
        assert bytes(heard) == data

    def test_ends_when_the_other_side_does(self, ends):
        ends[0].sock.close()
        with pytest.raises(EOFError):
            ends[1].receive_into(memoryview(bytearray(10)))


def receive_all(seam, view):
    have = 0
    while have < len(view):
        have += seam.receive_into(view[have:])
