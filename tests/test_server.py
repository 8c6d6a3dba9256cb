"""The server's door and its threads: who gets in, who is turned away, and that nobody holds up or harms another."""

import contextlib
import errno
import itertools
import os
import socket
import stat
import threading
import time

import pytest
from processes import SECRET

import minipool
from minipool import PYTHON, Connection, Plain, Refused, Secret, Server, find_secret

WORKER = b"worker 1".ljust(20)


def wait_until(true, seconds=20):
    """Poll until `true()`; fail after `seconds`."""
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.005)


def open_descriptors():
    """Return how many there are; no test may leave more, but what an earlier one left may go meanwhile."""
    return len(os.listdir("/proc/self/fd"))


def our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("minipool")}


@pytest.fixture
def join(server):
    """join(role): a member of the server's pool, played by the test."""
    members = []

    def join(role, announcement=None, identity=b""):
        members.append(Member(server, role, announcement, identity))
        return members[-1]
    yield join
    for member in members:
        member.connection.dispose()


def a_client(session, **info):
    return "client", {"session": session, "name": "me", "max_workers": None, "workers_seen": 0,
                      **info}, []


def a_node(**info):
    return "node", {"id": b"node", "name": "node", "python": PYTHON, "host": "here", "pid": 1, **info}


def a_worker(identity, attempts=(), **info):
    return "worker", {"id": identity, "node": b"node", "node_name": "node", "slot": 0, "pid": 1, "device": "cpu",
                      "tags": [], "has": [], "positions": {},
                      "returns": False, **info}, list(attempts)


class Member:
    """One authenticated connection, and what is said over it."""

    numbers = itertools.count()

    def __init__(self, server, role, announcement=None, identity=b""):
        sock = stranger(server)
        keys, _ = minipool.handshake(sock, role, Secret(SECRET).role_key, identity)
        self.connection = Connection(Plain(sock), keys.up, keys.down, "server")
        self.heard = []
        self.say(announcement or self.announcement(role, identity))

    def announcement(self, role, identity):
        name = b"%s %d" % (role.encode(), next(self.numbers))
        return {"client": a_client(name), "node": a_node(), "worker": a_worker(identity)}[role]

    def say(self, *messages):
        self.connection.post(messages)
        self.connection.flush()

    def hear(self, kind):
        """Return the next message of this kind; others before it are passed over."""
        while True:
            while self.heard:
                message = self.heard.pop(0)
                if message[0] == kind:
                    return message
            assert self.connection.has_input(10), f"no {kind!r} came"
            self.heard = self.connection.receive()

    def is_closed(self):
        """Whether the server closes this connection now; says nothing meanwhile."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.has_input(10):
                self.connection.receive()
            return False
        return True


def stranger(server):
    return socket.create_connection(minipool.parse_address(server.address), timeout=10)


def is_closed(sock):
    """Whether the server closes this socket without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


# ---- the door ----


class TestListening:
    def test_only_this_machine_can_reach_it_unless_asked_otherwise(self, server):
        assert server._doorkeeper._listener.getsockname()[0] == "127.0.0.1"
        assert server.address.startswith("127.0.0.1:") and not server.address.endswith(":0")

    def test_a_server_on_every_interface_has_an_address_that_can_be_dialled(self):
        with Server("0.0.0.0", 0, secret=SECRET) as server:
            assert not server.address.startswith("0.0.0.0")
            with stranger(server) as sock:
                minipool.handshake(sock, "client", Secret(SECRET).role_key)

    def test_a_port_in_use_is_an_os_error_and_leaves_nothing_behind(self, server):
        port, threads, before = int(server.address.rpartition(":")[2]), our_threads(), open_descriptors()
        with pytest.raises(OSError) as error:
            Server(port=port, secret=SECRET).start()
        assert error.value.errno == errno.EADDRINUSE
        assert our_threads() <= threads and open_descriptors() <= before

    def test_a_port_is_free_for_the_next_server_at_once(self):
        with Server(port=0, secret=SECRET) as first:
            port = int(first.address.rpartition(":")[2])
            member = Member(first, "client")
            member.hear("welcome")
        member.connection.dispose()
        with Server(port=port, secret=SECRET) as second:
            assert second.address == first.address

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
    def test_a_weak_password_is_for_loopback_only(self, host):
        with pytest.raises(ValueError, match="under 12 characters"):
            Server(host, 0, secret="12345678901")
        Server("127.0.0.1", 0, secret="short")
        Server(host, 0, secret="123456789012")

    def test_is_server_running_tells_a_server_from_none_and_from_something_else(self, server):
        assert minipool.is_server_running(server.address)
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = minipool.format_address(*other.getsockname())

            def greet():
                with other.accept()[0] as sock:
                    sock.sendall(b"SSH-2.0-server\r\n" * 8)
                    sock.recv(64, socket.MSG_WAITALL)
            answering = threading.Thread(target=greet)
            answering.start()
            assert not minipool.is_server_running(address)
            answering.join()
        assert not minipool.is_server_running(address)


class TestStrangers:
    @pytest.mark.parametrize("words", [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\n", b"mini",
        bytes(64),
        b"minipoop" + bytes(56), os.urandom(5000), minipool.first_hello("client")[:63],
        minipool.first_hello("client")[:9] + b"\7" + bytes(54),
    ], ids=["http", "tls", "newline", "half the magic", "zeros", "nearly the magic", "noise", "half a hello", "role"])
    def test_who_speaks_something_else_is_closed_quietly(self, monkeypatch, words):
        monkeypatch.setattr(minipool, "HANDSHAKE_SECONDS", 0.3)
        with Server(port=0, secret=SECRET) as server, stranger(server) as sock:
            sock.sendall(words)
            assert is_closed(sock)

    @pytest.mark.parametrize("place", [8, 10])
    def test_who_is_of_another_version_hears_ours_and_is_closed(self, place):
        hello = bytearray(minipool.first_hello("client"))
        hello[place] = 77
        with Server(port=0, secret=SECRET) as server, stranger(server) as sock:
            sock.sendall(hello)
            assert sock.recv(64, socket.MSG_WAITALL)[place] == minipool.first_hello("client")[place]
            assert is_closed(sock)

    @pytest.mark.parametrize("steps", [0, 1])
    def test_who_says_nothing_is_closed_at_the_deadline(self, monkeypatch, steps):
        monkeypatch.setattr(minipool, "HANDSHAKE_SECONDS", 0.3)
        with Server(port=0, secret=SECRET) as server, stranger(server) as sock:
            began = time.monotonic()
            sock.sendall(minipool.first_hello("client") * steps)
            assert len(sock.recv(64 * steps, socket.MSG_WAITALL)) == 64 * steps
            assert is_closed(sock)
            assert 0.2 < time.monotonic() - began < 5

    def test_who_drips_is_closed_at_the_same_deadline(self, monkeypatch):
        monkeypatch.setattr(minipool, "HANDSHAKE_SECONDS", 0.3)
        with Server(port=0, secret=SECRET) as server, stranger(server) as sock:
            sock.settimeout(0.05)
            began = time.monotonic()
            for byte in minipool.first_hello("client"):
                with contextlib.suppress(TimeoutError, OSError):
                    sock.sendall(bytes([byte]))
                    if sock.recv(1) == b"":
                        break
            assert time.monotonic() - began < 2

    def test_the_deadline_of_a_handshake_is_five_seconds(self):
        assert minipool.HANDSHAKE_SECONDS == 5

    def test_an_honest_member_gets_in_among_many_who_are_not(self, server, join):
        crowd = [stranger(server) for _ in range(300)]
        for number, sock in enumerate(crowd):
            with contextlib.suppress(OSError):
                sock.sendall([b"", b"min", b"GET /", os.urandom(70), minipool.first_hello("node")][number % 5])
        began = time.monotonic()
        join("client").hear("welcome")
        assert time.monotonic() - began < 2
        for sock in crowd:
            sock.close()
        join("client").hear("welcome")

    def test_a_crowd_beyond_the_limit_makes_room_for_the_next(self, monkeypatch, server, join):
        monkeypatch.setattr(minipool, "GUESTS", 20)
        crowd = [stranger(server) for _ in range(200)]
        for sock in crowd:
            with contextlib.suppress(OSError):
                sock.sendall(b"m")
        wait_until(lambda: len(server._doorkeeper._guests) == 20)
        for sock in crowd:
            sock.close()
        join("client").hear("welcome")

    def test_guests_dismissed_while_they_speak_do_not_stop_the_doorkeeper(self, monkeypatch, server, join):
        monkeypatch.setattr(minipool, "GUESTS", 2)
        for _ in range(100):
            crowd = [stranger(server) for _ in range(5)]
            for sock in crowd:
                with contextlib.suppress(OSError):
                    sock.sendall(b"x")
            for sock in crowd:
                sock.close()
        monkeypatch.setattr(minipool, "GUESTS", 1024)
        join("client").hear("welcome")

    def test_another_secret_is_refused_in_words_and_at_once(self, server):
        began = time.monotonic()
        with stranger(server) as sock, pytest.raises(Refused, match="does not match"):
            minipool.handshake(sock, "client", Secret.new().role_key)
        assert time.monotonic() - began < 1
        assert not server._readers

    def test_a_stranger_makes_no_thread(self, server):
        before = threading.active_count()
        with stranger(server) as sock:
            sock.sendall(minipool.first_hello("client"))
            sock.recv(64, socket.MSG_WAITALL)
            assert threading.active_count() == before

    def test_one_line_in_the_log_says_what_a_stranger_spoke_and_no_more(self, server, caplog):
        caplog.set_level("INFO", logger="minipool")
        for _ in range(20):
            with stranger(server) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert is_closed(sock)
        assert [r.message for r in caplog.records if "GET" in r.message] == [caplog.records[0].message]
        assert SECRET not in caplog.text


# ---- members ----


class TestMembers:
    @pytest.mark.parametrize("role, opening", [
        ("client", ("submit", 1, (b"c", 1), b"", 0, None)), ("client", ("ask", 1, "jobs")),
        ("node", ("beat",)), ("worker", ("started", 1)),
        ("client", ("client", {}, [])), ("client", a_client("text")),
        ("client", a_client(b"s", name=None)), ("node", a_node(name=None)),
        ("worker", a_worker(WORKER, has=None)),
        ("client", a_client(b"s", max_workers="many")),
        ("client", a_client(b"s", workers_seen=None)),
        ("worker", a_worker(WORKER, tags=[1])),
    ])
    def test_the_first_message_is_the_announcement_of_ones_role(self, server, join, role, opening):
        assert join(role, opening, WORKER if role == "worker" else b"").is_closed()
        join("client").hear("welcome")

    @pytest.mark.parametrize("attempts", [[1], [(1, 2, "outcome")], [(1, (b"c", 1))], [("1", (b"c", 1), "outcome")]])
    def test_a_worker_lists_its_attempts_as_agreed(self, server, join, attempts, caplog):
        assert join("worker", a_worker(WORKER, attempts), WORKER).is_closed()
        assert "stumbled" not in caplog.text

    def test_a_worker_cannot_announce_another_ones_identity(self, server, join):
        assert join("worker", a_worker(b"worker 2".ljust(20)), WORKER).is_closed()
        assert not server._scheduler.workers

    @pytest.mark.parametrize("words", [("finished", 1, "ok", b"", 0.0, False), ("welcome", {}), ("nonsense",),
                                       a_client(b"t"), ("drop", [1]),
                                       ("delivered", ["x"]), ("submit", -1, (b"c", 1), b"", 0, None)])
    def test_a_client_that_says_what_no_client_says_is_closed_and_the_others_live(self, server, join, words):
        good, bad = join("client"), join("client")
        good.hear("welcome")
        bad.hear("welcome")
        bad.say(words)
        assert bad.is_closed()
        good.say(("ask", 1, "status"))
        assert good.hear("answer")[1] == 1

    def test_an_empty_frame_is_malformed_and_not_a_bug_of_the_server(self, server, join, caplog):
        member = join("client")
        member.hear("welcome")
        member.connection._encode_frame([], b"")
        member.connection._seam.send(member.connection._rest)
        assert member.is_closed()
        assert "stumbled" not in caplog.text

    def test_noise_after_the_handshake_is_closed_and_the_others_live(self, server, join):
        good, bad = join("client"), join("client")
        bad.hear("welcome")
        bad.connection._seam.sock.sendall(os.urandom(1000))
        assert bad.is_closed()
        good.hear("welcome")

    def test_a_server_that_is_full_turns_the_next_one_away_and_keeps_the_others(self, monkeypatch, server, join):
        monkeypatch.setattr(minipool, "PEERS", 2)
        first, second, third = join("client"), join("client"), join("client")
        first.hear("welcome")
        second.hear("welcome")
        assert third.is_closed()
        second.connection.dispose()
        wait_until(lambda: sum(thread.is_alive() for thread in server._readers) == 1)
        join("client").hear("welcome")

    def test_one_job_goes_from_client_to_worker_and_back(self, server, join):
        join("node").hear("welcome")
        worker = join("worker", identity=WORKER)
        worker.hear("welcome")
        client = join("client", a_client(b"s"))
        client.say(("put", (b"s", 1), b"code"), ("submit", 9, (b"s", 1), b"arguments", 0, None))
        assert worker.hear("put") == ("put", (b"s", 1), b"code")
        _, token, job, fn, payload, _log, _options = worker.hear("run")
        assert (job, fn, payload) == ((b"s", 9), (b"s", 1), b"arguments")
        worker.say(("started", token), ("finished", token, "ok", b"result", 0.5, False))
        assert client.hear("done")[:4] == ("done", 9, "ok", b"result")
        client.say(("delivered", [9]))
        wait_until(lambda: not server._scheduler.sessions[b"s"].jobs)
        server._scheduler.check()

    def test_a_large_outcome_is_pulled_through_the_server(self, server, join):
        join("node").hear("welcome")
        worker = join("worker", identity=WORKER)
        client = join("client", a_client(b"s"))
        client.say(("put", (b"s", 1), b"code"), ("submit", 9, (b"s", 1), b"", 0, None))
        token, value, body = worker.hear("run")[1], ((WORKER, 1), 300_000, ""), os.urandom(1000)
        worker.say(("finished", token, "ok", value, 0.5, False))
        assert client.hear("done")[3] == value
        client.say(("pull", (WORKER, 1), 5000, 1000))
        assert worker.hear("pull") == ("pull", (WORKER, 1), 5000, 1000)
        worker.connection.post([("range", (WORKER, 1), 5000, b"digest", body)])
        worker.connection.flush()
        *header, received = client.hear("range")
        assert header == ["range", (WORKER, 1), 5000, b"digest"] and bytes(received) == body

    def test_a_reader_that_does_not_read_holds_up_nobody(self, server, join):
        deaf, other = join("client"), join("client")
        other.hear("welcome")
        for number in range(2000):
            deaf.say(("ask", number, "status"))
        began = time.monotonic()
        for number in range(50):
            other.say(("ask", number, "status"))
            assert other.hear("answer")[1] == number
        assert time.monotonic() - began < 5
        assert [deaf.hear("answer")[1] for _ in range(2000)] == list(range(2000))


# ---- ending ----


class TestEnding:
    def test_stop_leaves_no_thread_and_no_descriptor(self):
        before, threads = open_descriptors(), our_threads()
        server = Server(port=0, secret=SECRET).start()
        members = [Member(server, role, None, WORKER if role == "worker" else b"")
                   for role in ("node", "worker", "client", "client")]
        guests = [stranger(server) for _ in range(3)]
        members[-1].hear("welcome")
        assert len(our_threads()) >= len(threads) + 2 + 4
        server.stop()
        assert server.wait(0) and all(member.is_closed() for member in members)
        for member in members:
            member.connection.dispose()
        for guest in guests:
            guest.close()
        wait_until(lambda: our_threads() <= threads and open_descriptors() <= before)

    def test_stop_does_not_wait_for_members_that_do_not_read(self):
        before = open_descriptors()
        server = Server(port=0, secret=SECRET).start()
        deaf = Member(server, "client")
        for number in range(5000):
            deaf.say(("ask", number, "status"))
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 2
        deaf.connection.dispose()
        wait_until(lambda: open_descriptors() <= before)

    @pytest.mark.parametrize("round", range(5))
    def test_a_server_stopped_as_soon_as_it_runs_stops_fast(self, round):
        began, threads = time.monotonic(), our_threads()
        Server(port=0, secret=SECRET).start().stop()
        assert time.monotonic() - began < 1 and our_threads() <= threads

    def test_stop_twice_and_without_a_start_is_harmless(self):
        server = Server(port=0, secret=SECRET)
        server.stop()
        with server:
            assert not server.wait(0)
        server.stop()

    def test_two_hundred_members_that_come_and_go_leave_nothing_behind(self, server):
        descriptors, threads = open_descriptors(), our_threads()
        for number in range(200):
            member = Member(server, "client")
            if number % 3:
                member.hear("welcome")
                member.say(("bye", "done"))
            member.connection.dispose()
        wait_until(lambda: open_descriptors() <= descriptors and our_threads() <= threads)
        assert not server._scheduler._peers

    def test_two_hundred_strangers_that_come_and_go_leave_nothing_behind(self, server):
        descriptors = open_descriptors()
        for number in range(200):
            with stranger(server) as sock:
                sock.sendall(minipool.first_hello("client")[:number % 65])
        wait_until(lambda: open_descriptors() <= descriptors and not server._doorkeeper._guests)


# ---- where the secret comes from ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of the test's own, with nothing set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write_secret(path, text, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.chmod(mode)
    return str(path)


class TestFindSecret:
    def test_sources_are_asked_in_order(self, home, monkeypatch):
        texts = {name: f"the password of {name}" for name in ("given", "path", "file", "variable", "home")}
        write_secret(home / ".config/minipool/secret", texts["home"])
        assert find_secret().text == texts["home"]
        monkeypatch.setenv("MINIPOOL_SECRET", texts["variable"])
        assert find_secret().text == texts["variable"]
        monkeypatch.setenv("MINIPOOL_SECRET_FILE", write_secret(home / "file", texts["file"]))
        assert find_secret().text == texts["file"]
        path = write_secret(home / "path", texts["path"])
        assert find_secret(path=path).text == texts["path"]
        assert find_secret(texts["given"], path).text == texts["given"]

    def test_the_users_file_is_where_the_configuration_is(self, home, monkeypatch):
        assert find_secret(make=True).source == str(home / ".config/minipool/secret")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
        assert find_secret(make=True).source == str(home / "elsewhere/minipool/secret")

    def test_no_secret_at_all_is_refused_with_what_to_do(self, home):
        with pytest.raises(Refused, match="MINIPOOL_SECRET_FILE"):
            find_secret()
        assert not (home / ".config").exists()

    def test_a_server_makes_a_secret_for_its_user_once(self, home):
        server = Server(port=0)
        path = home / ".config/minipool/secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert server.secret.startswith("mp1_") and path.read_text() == server.secret + "\n"
        assert Server(port=0).secret == find_secret().text == server.secret
        assert os.listdir(path.parent) == ["secret"]

    def test_servers_that_start_together_agree_on_one_secret(self, home):
        found, gate = [], threading.Barrier(8)
        threads = [threading.Thread(target=lambda: (gate.wait(), found.append(find_secret(make=True).text)))
                   for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(found)) == 1

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
    def test_a_file_that_others_can_read_is_refused_with_the_command_that_helps(self, home, mode):
        path = write_secret(home / ".config/minipool/secret", SECRET, mode)
        with pytest.raises(Refused, match=f"chmod 600 {path}"):
            find_secret()

    def test_a_link_is_refused(self, home):
        write_secret(home / "real", SECRET)
        (home / ".config/minipool").mkdir(parents=True)
        (home / ".config/minipool/secret").symlink_to(home / "real")
        with pytest.raises(Refused):
            find_secret(make=True)

    def test_a_link_to_nothing_is_refused_and_not_written_through(self, home):
        (home / ".config/minipool").mkdir(parents=True)
        (home / ".config/minipool/secret").symlink_to(home / "nothing")
        with pytest.raises(Refused):
            find_secret(make=True)
        assert not (home / "nothing").exists()

    @pytest.mark.parametrize("kind", ["missing", "empty", "folder", "noise"])
    def test_a_named_file_that_is_of_no_use_is_fatal_and_never_skipped(self, home, monkeypatch, kind):
        monkeypatch.setenv("MINIPOOL_SECRET", SECRET)
        path = home / "named"
        if kind == "folder":
            path.mkdir(mode=0o700)
        elif kind != "missing":
            path.write_bytes({"empty": b"", "noise": b"\xff\xfe"}[kind])
            path.chmod(0o600)
        for find in (lambda: find_secret(path=str(path)), lambda: (monkeypatch.setenv("MINIPOOL_SECRET_FILE",
                     str(path)), find_secret(make=True))):
            with pytest.raises((Refused, ValueError, OSError)):
                find()

    def test_an_empty_secret_is_an_error_and_not_none_at_all(self, home):
        with pytest.raises(ValueError, match="empty"):
            Server(port=0, secret="")
        assert not (home / ".config").exists()
