"""With TLS nobody reads along, and who stands in the middle is caught though nobody copied a certificate."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest
from processes import ROOT, wait_until

import minipool
import minipool_worker
from minipool import Connection, Plain, Refused, Secret, Tls, tls_client_context, tls_server_context

SECRET = Secret.new()


@pytest.fixture(scope="module")
def server():
    """A server with TLS and a node of two workers; its address and secret."""
    with minipool.Server(port=0, secret=SECRET.text, tls=True) as server:
        with minipool_worker.Node(server.address, secret=SECRET.text, gpus="", cpu_workers=2, tls=True):
            yield server


def dial(address, tls):
    sock = socket.create_connection(minipool.parse_address(address), timeout=10)
    seam = Tls(sock, tls_client_context()).establish() if tls else Plain(sock)
    try:
        return seam, minipool.handshake(seam, "client", SECRET.role_key, binding=seam.binding)
    except BaseException:
        sock.close()
        raise


class TestAPoolWithTls:
    def test_runs_jobs(self, server):
        with minipool.Executor(server.address, secret=SECRET.text, tls=True) as ex:
            assert list(ex.map(abs, range(-500, 0))) == list(range(500, 0, -1))

    def test_carries_large_values_both_ways(self, server):
        value = os.urandom(1 << 20) * 20
        with minipool.Executor(server.address, secret=SECRET.text, tls=True) as ex:
            assert ex.submit(bytes.swapcase, value).result(60) == value.swapcase()

    def test_answers_is_server_running(self, server):
        assert minipool.is_server_running(server.address)

    def test_turns_a_wrong_secret_away(self, server):
        with pytest.raises(Refused):
            minipool.Executor(server.address, secret=Secret.new().text, tls=True)

    def test_needs_tls_1_3(self, server):
        context = tls_client_context()
        context.minimum_version, context.maximum_version = context.maximum_version, 0x0303
        with socket.create_connection(minipool.parse_address(server.address), timeout=10) as sock:
            with pytest.raises(OSError):
                context.wrap_socket(sock)

    def test_sends_no_word_of_a_job_in_the_clear(self, server):
        with Tap(server.address) as tap:
            with minipool.Executor(tap.address, secret=SECRET.text, tls=True) as ex:
                assert ex.submit(str.upper, "the word").result(60) == "THE WORD"
        assert len(tap.seen) > 1000 and b"the word" not in tap.seen and b"THE WORD" not in tap.seen
        assert b"minipool" not in tap.seen


class TestOneSideOnly:
    def test_with_tls_says_so_in_a_sentence(self, cluster):
        with pytest.raises(minipool.ServerLost, match="or one that has no TLS"):
            minipool.Executor(cluster.address, secret=cluster.secret, tls=True, connect_timeout=1)

    def test_without_says_so_in_a_sentence(self, server):
        with pytest.raises(minipool.ServerLost, match="or one that wants TLS"):
            minipool.Executor(server.address, secret=SECRET.text, connect_timeout=1)


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
        assert status.code() == 0 and "1 node, 1 worker" in status.out

    def test_take_a_certificate_from_files(self, program, certificate, tmp_path):
        cert, key = certificate
        served = program(ROOT / "minipool.py", "serve", "--port", "0", "--tls-cert", cert, "--tls-key", key)
        address = served.says(r"server on (\S+)")[1]
        with socket.create_connection(minipool.parse_address(address), timeout=10) as sock:
            pem = cert.read_text()
            assert Tls(sock, tls_client_context()).establish().binding == tls_server_context(cert, key)[1], pem

    @pytest.mark.parametrize("flags, words", [
        (["--tls-cert", "x"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "No such file"),
    ])
    def test_say_what_is_wrong_with_the_files(self, program, flags, words):
        served = program(ROOT / "minipool.py", "serve", "--port", "0", *flags)
        assert served.code() == 1 and words in served.err and "Traceback" not in served.err

    def test_say_so_where_openssl_is_missing(self, program, tmp_path):
        served = program(ROOT / "minipool.py", "serve", "--port", "0", "--tls", PATH=str(tmp_path))
        assert served.code() == 1 and "--tls-cert and --tls-key" in served.err and "Traceback" not in served.err


def test_the_python_that_deadlocks_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 6, "final", 0))
    for context in (tls_client_context, tls_server_context):
        with pytest.raises(ValueError, match=r"Python 3\.13\.6"):
            context()


@pytest.fixture
def certificate(tmp_path):
    """PEM files of a certificate and its key, as `openssl` makes them."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", "/CN=test", "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


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
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            while True:
                near, far = (stack.enter_context(sock) for sock in (self.listener.accept()[0],
                                                                   socket.create_connection(self.target)))
                if self.context:
                    near, far = Tls(near, *self.context), Tls(far, tls_client_context()).establish()
                else:
                    near, far = Plain(near), Plain(far)
                for pair in ((near, far), (far, near)):
                    thread = threading.Thread(target=self.relay, args=pair)
                    stack.callback(thread.join, 20)
                    thread.start()

    def relay(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
        source.shutdown()
        sink.shutdown()


class TestAMiddleman:
    def test_with_a_certificate_of_his_own_is_refused_each_time(self, server):
        with Tap(server.address, tls_server_context()) as middle:
            for _ in range(100):
                with pytest.raises((Refused, ConnectionError)):
                    dial(middle.address, tls=True)
            assert b"minipool" in middle.seen       # he read the first hello, and it was worth nothing

    def test_who_only_relays_is_no_harm(self, server):
        with Tap(server.address) as relay:
            dial(relay.address, tls=True)[0].sock.close()


class TestTheSeam:
    @pytest.fixture
    def ends(self):
        """Two seams that have greeted each other, over a socket pair with small buffers."""
        near, far = socket.socketpair()
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        dialer, answerer = Tls(near, tls_client_context()), Tls(far, *tls_server_context())
        hello = memoryview(bytearray(5))
        heard = threading.Thread(target=answerer.receive_into, args=(hello,))
        heard.start()
        dialer.establish().sendall(b"hello")
        heard.join(10)
        assert bytes(hello) == b"hello" and dialer.binding == answerer.binding
        yield dialer, answerer
        near.close(), far.close()

    def test_carries_frames_both_ways_at_once(self, ends):
        up, down = Connection(ends[0], b"up", b"down", "server"), Connection(ends[1], b"down", b"up", "client")
        body, found = os.urandom(200_000), {}

        def hear(connection, side):
            found[side] = [connection.receive()[0][-1] for _ in range(20)]
        threads = [threading.Thread(target=hear, args=pair) for pair in ((up, "near"), (down, "far"))]
        for thread in threads:
            thread.start()
        for connection in (up, down):
            connection.post([("range", (b"x", 1), 0, b"", body)] * 20)
            connection.flush()
        for thread in threads:
            thread.join(60)
        assert all(bytes(part) == body for side in ("near", "far") for part in found[side])
        for connection in (up, down):
            connection.dispose()

    def test_knows_of_bytes_that_it_holds_decrypted(self, ends):
        import select
        near, far = ends
        near.sendall(b"two bytes and more")
        wait_until(lambda: far.poll(select.POLLIN, 0))
        assert far.recv(2) == b"tw" and far.poll(select.POLLIN, 0)
        assert far.recv(100) == b"o bytes and more" and not far.poll(select.POLLIN, 0)

    def test_ends_when_the_other_side_does(self, ends):
        ends[0].sock.close()
        assert ends[1].recv(10) == b""
