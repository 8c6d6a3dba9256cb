"""What crosses the wire: who may come in, what a frame may be, and that no message is lost, doubled or reordered."""

import contextlib
import functools
import hashlib
import os
import pickle
import queue
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import minipool
from minipool import Blob, Connection, Malformed, Peer, Plain, Refused, Secret

INSTANCE = b"instance of test"
WORKER, OTHER_WORKER = b"worker 1".ljust(20), b"worker 2".ljust(20)


def wait_until(true, seconds=20):
    """Poll until `true()`; fail after `seconds`."""
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.002)


def open_descriptors():
    """Return how many there are; no test may leave more, but what an earlier one left may go meanwhile."""
    return len(os.listdir("/proc/self/fd"))


def writers():
    return [thread for thread in threading.enumerate() if thread.name.endswith("-writer")]


# ---- the handshake ----


@contextlib.contextmanager
def door(secret, instance=INSTANCE):
    """A doorkeeper on a loopback port; yields the address and a queue of those it let in."""
    admitted, stopping = queue.Queue(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    address = listener.getsockname()
    keeper = minipool.Doorkeeper(listener, secret.role_key, instance, lambda *guest: admitted.put(guest), stopping)
    try:
        yield address, admitted
    finally:
        stopping.set()
        keeper.thread.join(5)
        while not admitted.empty():
            admitted.get()[0].close()


def knock(address, role, key, identity=b""):
    with socket.create_connection(address, timeout=10) as sock:
        source = key.role_key if isinstance(key, Secret) else lambda *_: key      # a ticket
        return minipool.handshake(sock, role, source, identity)


def answer_with(*answers):
    """A server of one connection that reads a step and answers it, for each of `answers` (functions of the step)."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)

    def serve():
        with theirs:
            for size, answer in zip((64, 32), answers, strict=False):
                theirs.sendall(answer(theirs.recv(size, socket.MSG_WAITALL)))
    threading.Thread(target=serve, daemon=True).start()
    ours.settimeout(10)
    return ours


def second_hello():
    return minipool.first_hello("server", bytes(5) + INSTANCE)


class TestHandshake:
    @pytest.mark.parametrize("role", ["client", "node", "worker"])
    def test_both_sides_hold_the_same_keys_after_the_right_secret(self, role):
        secret = Secret.new()
        with door(secret) as (address, admitted):
            keys, instance = knock(address, role, secret, WORKER if role == "worker" else b"")
            _sock, admitted_role, identity, server_keys = guest = admitted.get(timeout=10)
            admitted.put(guest)
        assert (admitted_role, instance) == (role, INSTANCE)
        assert identity == (WORKER if role == "worker" else bytes(20))
        assert keys == server_keys
        assert len({keys.dialer_proof, keys.server_proof, keys.up, keys.down}) == 4

    def test_another_secret_is_refused_and_nobody_is_admitted(self):
        with door(Secret.new()) as (address, admitted):
            with pytest.raises(Refused, match="secret does not match"):
                knock(address, "client", Secret.new())
            assert admitted.empty()

    def test_two_connections_with_one_secret_have_no_key_in_common(self):
        secret = Secret.new()
        with door(secret) as (address, _):
            first, second = knock(address, "client", secret)[0], knock(address, "client", secret)[0]
        assert not set(first) & set(second)

    def test_each_role_and_each_worker_has_a_key_of_its_own(self):
        secret = Secret.new()
        keys = {secret.role_key("client", INSTANCE), secret.role_key("node", INSTANCE),
                secret.role_key("worker", INSTANCE, WORKER), secret.role_key("worker", INSTANCE, OTHER_WORKER)}
        assert len(keys) == 4

    def test_a_ticket_opens_its_own_worker_and_no_other(self):
        secret = Secret.new()
        ticket = secret.role_key("worker", INSTANCE, WORKER)
        with door(secret) as (address, admitted):
            knock(address, "worker", ticket, WORKER)
            for role, identity in (("worker", OTHER_WORKER), ("client", b""), ("node", b"")):
                with pytest.raises(Refused):
                    knock(address, role, ticket, identity)
            assert admitted.qsize() == 1

    def test_a_server_without_the_magic_is_not_a_minipool_server(self):
        with answer_with(lambda first: b"HTTP/1.1 400 Bad Request".ljust(64)) as sock:
            with pytest.raises(ConnectionError, match="not a minipool server"):
                minipool.handshake(sock, "client", Secret.new().role_key)

    def test_a_server_that_closes_is_an_error_of_connection(self):
        with answer_with() as sock, pytest.raises(ConnectionError):
            minipool.handshake(sock, "client", Secret.new().role_key)

    @pytest.mark.parametrize(("place", "words"), [(8, f"protocol 7, this side {minipool.PROTOCOL}"),
                                                  (10, f"Python 3.7, this side {minipool.PYTHON}")],
                             ids=["protocol", "Python"])
    def test_another_version_of_the_protocol_or_of_python_is_named_together_with_ours(self, place, words):
        second = bytearray(second_hello())
        second[place] = 7
        with answer_with(lambda first: bytes(second)) as sock, pytest.raises(minipool.VersionMismatch, match=words):
            minipool.handshake(sock, "client", Secret.new().role_key)

    def test_the_server_tells_its_version_to_a_dialer_of_another_and_closes(self):
        with door(Secret.new()) as (address, admitted), socket.create_connection(address, timeout=10) as sock:
            hello = bytearray(minipool.first_hello("client"))
            hello[8] = 7
            sock.sendall(hello)
            answer = sock.recv(64, socket.MSG_WAITALL)
            assert (answer[:8], answer[8]) == (minipool.MAGIC, minipool.PROTOCOL)
            assert sock.recv(1) == b"" and admitted.empty()

    def test_a_server_that_reflects_the_dialers_proof_is_not_believed(self):
        with answer_with(lambda first: second_hello(), lambda proof: proof) as sock:
            with pytest.raises(ConnectionError, match="could not prove"):
                minipool.handshake(sock, "client", Secret.new().role_key)

    def test_a_server_that_reflects_everything_is_not_believed(self):
        with answer_with(lambda first: first, lambda proof: proof) as sock:
            with pytest.raises(ConnectionError, match="could not prove"):
                minipool.handshake(sock, "client", Secret.new().role_key)

    def test_a_recorded_handshake_is_worth_nothing_the_second_time(self):
        secret = Secret.new()
        with door(secret) as (address, admitted):
            first = minipool.first_hello("client")
            proof = b""
            for attempt in range(2):
                with socket.create_connection(address, timeout=10) as sock:
                    sock.sendall(first)
                    second = sock.recv(64, socket.MSG_WAITALL)
                    keys = minipool.SessionKeys.derive(secret.role_key("client", INSTANCE), first, second)
                    proof = proof or keys.dialer_proof
                    sock.sendall(proof)
                    refused = sock.recv(32, socket.MSG_WAITALL) == minipool.REFUSED
                    assert refused == bool(attempt)

    def test_the_binding_of_a_certificate_is_part_of_the_keys(self):
        first, second = minipool.first_hello("client"), second_hello()
        plain = minipool.SessionKeys.derive(b"k" * 32, first, second)
        assert not set(plain) & set(minipool.SessionKeys.derive(b"k" * 32, first, second, b"digest"))

    @pytest.mark.parametrize("place, value", [(0, 0), (9, 0), (9, 4), (11, 1), (31, 1)])
    def test_a_hello_with_any_wrong_byte_is_met_with_silence(self, place, value):
        hello = bytearray(minipool.first_hello("client"))
        hello[place] = value
        with door(Secret.new()) as (address, admitted), socket.create_connection(address, timeout=10) as sock:
            sock.sendall(hello)
            assert sock.recv(1) == b"" and admitted.empty()


class TestSecret:
    def test_a_password_is_stretched_with_the_servers_instance_as_salt(self):
        secret = Secret("correct horse battery")
        stretched = hashlib.scrypt(b"correct horse battery", salt=INSTANCE, n=2**15, r=8, p=1,
                                   maxmem=64 * 2**20, dklen=32)
        key = minipool._hmac(stretched, b"minipool/1 role client")
        assert secret.role_key("client", INSTANCE) == key
        assert secret.role_key("client", bytes(16)) != key

    def test_a_password_lets_in_who_knows_it_and_refuses_who_does_not(self):
        with door(Secret("correct horse battery")) as (address, _):
            knock(address, "client", Secret("correct horse battery\n"))
            with pytest.raises(Refused):
                knock(address, "client", Secret("correct horse batterz"))

    @pytest.mark.parametrize("text", ["mp1_", "mp1_tooshort", "mp1_" + "A" * 42, "mp1_" + "A" * 44,
                                      "mp1_" + "ä" * 43])
    def test_a_cut_or_mistyped_secret_is_an_error_and_not_a_password(self, text):
        with pytest.raises(ValueError, match="cut or mistyped"):
            Secret(text)

    @pytest.mark.parametrize("text", ["", " \n"])
    def test_an_empty_secret_is_an_error(self, text):
        with pytest.raises(ValueError, match="empty"):
            Secret(text)

    @pytest.mark.parametrize("secret", [Secret.new(), Secret("correct horse battery")])
    def test_neither_repr_nor_str_nor_an_error_shows_it(self, secret):
        shown = repr(secret) + str(secret) + f"{[secret]}"
        assert secret.text not in shown and secret.text[4:] not in shown
        with pytest.raises(ValueError) as error:
            Secret("mp1_" + "A" * 30)
        assert "A" * 30 not in str(error.value)

    def test_a_secret_survives_being_written_down(self):
        secret = Secret.new()
        assert secret.text.startswith("mp1_") and len(secret.text) == 47
        assert Secret(f" {secret.text}\n").role_key("node", b"") == secret.role_key("node", b"")

    def test_tags_are_compared_in_constant_time(self):
        source = Path(minipool.__file__).read_text()
        assert not re.findall(r".*\b(?:tag|proof|answer|guest\.data) [!=]= .*|.*[!=]= \S*(?:_proof|REFUSED).*", source)
        assert source.count("compare_digest(") >= 4


# ---- frames ----


@pytest.fixture
def pair():
    client, server = connect()
    yield client, server
    client.dispose()
    server.dispose()


class Guarded(Connection):
    """A Connection that notes it if two threads ever encode or write at the same time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.role, self.held_twice = threading.RLock(), 0
        self._seam.send = functools.partial(self._as_the_only_one, self._seam.send)

    def _as_the_only_one(self, step, *arguments):
        if not self.role.acquire(blocking=False):
            self.held_twice += 1
            return step(*arguments)
        try:
            return step(*arguments)
        finally:
            self.role.release()

    def _encode_frame(self, batch, body):
        return self._as_the_only_one(super()._encode_frame, batch, body)


class Chopped(Plain):
    """A seam whose kernel buffers are tiny, which writes a few bytes at a time and reads 1 to 7."""

    def __init__(self, sock):
        super().__init__(sock)
        self.chance = random.Random(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    def send(self, buffers):
        try:
            return self.sock.send(bytes(buffers[0][:self.chance.randint(1, 200)]), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive_into(self, view):
        return super().receive_into(view[:self.chance.randint(1, 7)])


def connect(seam=Plain, keys=(b"up", b"down")):
    """The client's and the server's end of one connection."""
    ours, theirs = socket.socketpair()
    return (Guarded(seam(ours), *keys, "server"), Guarded(seam(theirs), *reversed(keys), "client"))


def note(*numbers):
    """A message that a client may send, told from others by its numbers."""
    return ("delivered", list(numbers))


def receive_all(connection, count):
    received = []
    while len(received) < count:
        received += connection.receive()
    return received


def record(*batches, key=b"up"):
    """The bytes of one frame for each batch."""
    ours, theirs = socket.socketpair()
    connection = Connection(Plain(ours), key, b"down", "server")
    frames = []
    for batch in batches:
        connection.post(batch)
        connection.flush()
        frames.append(theirs.recv(1 << 20))
    connection.dispose()
    theirs.close()
    return frames


def deliver(data, key=b"up"):
    """Feed bytes to a receiver; return the messages that came out and the error that ended it."""
    ours, theirs = socket.socketpair()
    connection = Connection(Plain(ours), b"down", key, "client")
    received = []
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            while True:
                received += connection.receive()
        except (EOFError, Malformed) as error:
            return received, error
        finally:
            connection.dispose()


class TestFrames:
    def test_what_goes_in_comes_out(self, pair):
        client, server = pair
        messages = [("client", {"session": b"s", "name": "me", "workers_seen": 0}, [1, 2]), ("put", (b"s", 1), b"abc"),
                    ("submit", 7, (b"s", 1), ((b"s", 2), 1 << 40, ""), 0, {"retries": 2, "on": ("a", "b")}),
                    ("ask", 1, "jobs")]
        client.post(messages)
        client.flush()
        assert receive_all(server, len(messages)) == messages

    def test_a_range_carries_its_bytes_after_the_frame(self, pair):
        client, server = pair
        body = os.urandom(minipool.RANGE)
        header = ("range", (b"c", 1), 0, hashlib.sha256(body).digest())
        threading.Thread(target=lambda: (client.post([(*header, body)]), client.flush())).start()
        [message] = server.receive()
        assert message[:4] == header and bytes(message[4]) == body

    def test_a_range_goes_where_it_belongs_without_a_copy(self, pair):
        client, server = pair
        place = bytearray(5)
        client.post([("range", (b"c", 1), 0, b"", b"hello")])
        client.flush()
        server.receive({((b"c", 1), 0): memoryview(place)})
        assert place == b"hello"

    @pytest.mark.parametrize("size", [0, 20_000])
    @pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300])
    def test_batches_stay_under_their_bounds(self, pair, count, size):
        client, server = pair
        messages = [("submit", i, (b"s", 1), bytes(size), 0, None) for i in range(count)]
        batches = []
        client.post(messages)
        client.flush()
        while sum(map(len, batches)) < count:
            batches.append(server.receive())
        assert sum(batches, []) == messages
        assert all(len(batch) <= minipool.BATCH_MESSAGES for batch in batches)
        assert all(len(pickle.dumps(batch)) <= minipool.MAX_CONTROL // 2 for batch in batches)
        assert len(pickle.dumps(batches[-1])) <= minipool.BATCH_BYTES + size

    def test_after_one_fat_batch_the_next_keep_to_the_aim(self, pair):
        client, server = pair
        for _ in range(3):
            client.post([("submit", i, (b"s", 1), bytes(60_000), 0, None) for i in range(100)])
            client.flush()
            sizes, count = [], 0
            while count < 100:
                batch = server.receive()
                count += len(batch)
                sizes.append(len(pickle.dumps(batch)))
        assert max(sizes) <= minipool.BATCH_BYTES + 61_000

    def test_a_message_too_fat_to_send_ends_its_connection_and_no_other(self):
        (fat, a), (other, b) = connect(), connect()
        fat.post([("put", (b"s", 1), bytes(minipool.MAX_CONTROL))])
        fat.flush(0)
        with pytest.raises(EOFError):
            a.receive()
        other.post([note(1)])
        other.flush(0)
        assert b.receive() == [note(1)] and fat.closed and not other.closed
        for connection in (fat, a, other, b):
            connection.dispose()

    def test_a_flipped_bit_anywhere_delivers_nothing(self):
        [frame] = record([note(1)])
        for bit in range(len(frame) * 8):
            spoiled = bytearray(frame)
            spoiled[bit // 8] ^= 1 << bit % 8
            received, error = deliver(spoiled)
            assert received == [], f"bit {bit} was not noticed"
            assert isinstance(error, (Malformed, EOFError))

    def test_a_frame_cut_anywhere_delivers_nothing(self):
        [frame] = record([note(1)])
        for size in range(len(frame)):
            received, error = deliver(frame[:size])
            assert received == [] and isinstance(error, EOFError)

    @pytest.mark.parametrize("order, before", [("ba", ""), ("aa", "a"), ("aca", "a"), ("acb", "a"), ("aba", "ab")])
    def test_swapped_dropped_and_replayed_frames_are_refused(self, order, before):
        frames = dict(zip("abc", record([note(1)], [note(2)], [note(3)]), strict=True))
        received, error = deliver(b"".join(frames[name] for name in order))
        assert received == [note("abc".index(name) + 1) for name in before]
        assert isinstance(error, Malformed)

    def test_a_frame_of_another_connection_or_direction_is_refused(self):
        [mine], [other] = record([note(1)]), record([note(1)], key=b"another connection's")
        assert deliver(mine)[0] == [note(1)]
        received, error = deliver(other)
        assert received == [] and "tag" in str(error)

    def test_a_byte_too_many_is_not_a_message(self):
        [frame] = record([note(1)])
        received, error = deliver(frame + b"\0")
        assert received == [note(1)] and isinstance(error, EOFError)

    @pytest.mark.parametrize("control, body", [(0, 0), (minipool.MAX_CONTROL + 1, 0), (2**32 - 1, 0),
                                               (1, minipool.RANGE + 1), (1, 2**32 - 1)])
    def test_lengths_out_of_range_are_refused_before_anything_is_allocated(self, pair, control, body):
        client, server = pair
        client._seam.sock.sendall(minipool._FRAME.pack(control, body) + bytes(100))
        with pytest.raises(Malformed, match="lengths"):
            server.receive()
        assert len(server._pending) <= len(server._scratch) <= 64 * 1024

    def test_only_a_range_has_a_body(self, pair):
        client, server = pair
        client._encode_frame([note(1)], b"body")
        client._seam.send(client._rest)
        with pytest.raises(Malformed, match="only a range"):
            server.receive()


class TestOpening:
    def opens(self, data):
        with pytest.raises(Malformed) as error:
            minipool.decode_messages(data, "client")
        return str(error.value)

    @pytest.mark.parametrize("protocol", range(6))
    def test_a_pickle_that_names_a_global_is_refused(self, protocol):
        assert "global" in self.opens(pickle.dumps([os.getcwd], protocol))

    @pytest.mark.parametrize("data", [b"", b".", b"garbage", b"\x80\x05N.", b"\x80\x05]", b"]" * 10 + b"0",
                                      b"\x80\x05K\x01Q.", b"Pid\n.", b"\x97.", pickle.dumps([]), pickle.dumps({}),
                                      pickle.dumps([("delivered", [1])])[:-3], b"(" * 100_000 + b"t" * 100_000 + b"."])
    def test_a_pickle_that_is_no_list_of_messages_is_refused(self, data):
        self.opens(data)

    def test_nothing_is_ever_looked_up_by_name(self):
        program = (
            "import sys, os, pickle, minipool\n"
            "looked_up = []\n"
            "sys.addaudithook(lambda event, about: event == 'pickle.find_class' and looked_up.append(about))\n"
            "evil = [pickle.dumps([f], p) for f in (os.system, eval, minipool.Secret, OSError(1)) for p in range(6)]\n"
            "for data in [*evil, b'\\x80\\x05\\x82\\x01.', b'cos\\nsystem\\n(S\"false\"\\ntR.']:\n"
            "    try: minipool.decode_messages(data, 'client')\n"
            "    except minipool.Malformed: continue\n"
            "    raise SystemExit('it opened')\n"
            "assert not looked_up, looked_up\n"
            "pickle.loads(pickle.dumps(os.getcwd)); assert looked_up, 'the hook hears nothing'\n")
        folder = Path(minipool.__file__).parent
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("message", [
        ["delivered", [1]], (), (1,), ("no such kind",), ("run", 1, (b"", 1), (b"", 1), b"", 0, None),
        ("delivered",), ("delivered", [], []), ("delivered", (1,)), ("delivered", None),
        ("submit", -1, (b"", 1), b"", 0, None), ("submit", 1 << 62, (b"", 1), b"", 0, None),
        ("submit", True, (b"", 1), b"", 0, None), ("submit", 1.0, (b"", 1), b"", 0, None),
        ("submit", 1, (b"", -1), b"", 0, None), ("submit", 1, ("", 1), b"", 0, None), ("submit", 1, b"", b"", 0, None),
        ("submit", 1, (b"", 1, 1), b"", 0, None), ("submit", 1, (b"x" * 65, 1), b"", 0, None),
        ("submit", 1, (b"", 1), "text", 0, None), ("submit", 1, (b"", 1), ((b"", 1), -1, ""), 0, None),
        ("submit", 1, (b"", 1), (b"", 1), 0, None), ("submit", 1, (b"", 1), b"", 0, []),
        *(("submit", 1, (b"", 1), b"", 0, options) for options in (
            {"on": 5}, {"on": [5]}, {"on": [[]]}, {"priority": "x"}, {"priority": float("nan")}, {"retries": None},
            {"max_deaths": "3"}, {"name": 5})),
        ("pull", (b"", 1), 0, float("nan")), ("pull", (b"", 1), 0, -5),
    ])
    def test_an_ill_typed_message_is_refused(self, message):
        self.opens(pickle.dumps([message]))

    @pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, -0.001])
    def test_a_number_that_is_not_finite_or_is_negative_is_refused(self, seconds):
        with pytest.raises(Malformed, match="seconds is out of range"):
            minipool.check_message(("finished", 1, "ok", b"", seconds, False), "worker")

    @pytest.mark.parametrize("sender", ["client", "node", "worker", "server"])
    def test_each_role_sends_its_own_messages_only(self, sender):
        for kind, (senders, _) in minipool.CATALOGUE.items():
            if sender not in senders:
                with pytest.raises(Malformed, match="sends no"):
                    minipool.check_message((kind,), sender)

    def test_a_brief_text_of_a_message_shows_no_payload(self):
        text = minipool.brief(("submit", 7, (b"\1\2\3\4", 5), b"secret payload", 0, {"a": 1}))
        assert text == "submit(7, 010203:5, bytes[14], 0, dict[1])"


# ---- the writer role (R5) ----


class TestWriterRole:
    @pytest.mark.parametrize("count", [2, 8])
    def test_nothing_is_lost_doubled_or_reordered_when_writes_and_reads_are_chopped(self, count):
        client, server = connect(Chopped)
        each = 1200 // count

        def send(thread):
            for number in range(each):
                client.post([note(thread, number)])
                client.flush()
        threads = [threading.Thread(target=send, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        received = [tuple(message[1]) for message in receive_all(server, count * each)]
        for thread in threads:
            thread.join()
        assert sorted(received) == [(t, n) for t in range(count) for n in range(each)]
        assert all([n for t, n in received if t == thread] == list(range(each)) for thread in range(count))
        wait_until(lambda: not client.waiting)
        assert not client.held_twice and not client._role.locked() and not server.has_input(0)
        client.dispose()
        server.dispose()

    @pytest.mark.parametrize("seam", [Plain, Chopped])
    def test_nothing_is_left_behind_when_the_senders_stop_at_any_moment(self, seam):
        client, server = connect(seam)
        for number in range(300):
            threads = [threading.Thread(target=lambda n: (client.post([note(n)]), client.flush()), args=(number,))
                       for _ in "ab"]
            for thread in threads:
                thread.start()
            assert receive_all(server, 2) == [note(number)] * 2
            for thread in threads:
                thread.join()
        assert not client.held_twice
        client.dispose()
        server.dispose()

    def test_control_overtakes_ranges(self):
        client, server = connect(Chopped)
        for offset in range(4):
            client.post([("range", (b"c", 1), offset, b"", bytes(5000))])
        client.flush()
        client.post([note(1)])
        client.flush()
        kinds = [message[0] for message in receive_all(server, 5)]
        assert kinds.index("delivered") <= 1 and kinds.count("range") == 4
        client.dispose()
        server.dispose()

    def test_a_reader_that_stops_holds_up_neither_sender_nor_another_connection(self):
        (stuck, silent), (other, reader) = connect(), connect()
        began = time.monotonic()
        for number in range(300):
            stuck.post([("range", (b"c", 1), number, b"", bytes(100_000))])
            stuck.flush()
            other.post([note(number)])
            other.flush(0)
        assert receive_all(reader, 300) == [note(i) for i in range(300)]
        assert time.monotonic() - began < 5 and stuck.waiting > 250
        assert len(receive_all(silent, 300)) == 300         # and it goes on when it reads again
        for connection in (stuck, silent, other, reader):
            connection.dispose()

    @pytest.mark.parametrize("seam", [Plain, Chopped])
    def test_a_connection_closed_during_a_write_gives_its_descriptor_back(self, seam):
        before = open_descriptors()
        for _ in range(30):
            client, server = connect(seam)
            client.post([("range", (b"c", 1), 0, b"", bytes(minipool.RANGE))])
            client.post([("range", (b"c", 1), 1, b"", bytes(minipool.RANGE))])
            client.flush()
            client.dispose()
            client.flush()
            server.dispose()
        wait_until(lambda: open_descriptors() <= before)
        wait_until(lambda: not writers())

    def test_a_peer_that_vanishes_is_noticed_by_the_writer(self):
        client, server = connect()
        server.dispose()
        client.post([note(1)])
        client.flush()
        assert client.closed
        with pytest.raises((EOFError, OSError)):
            client.receive()
        client.dispose()

    def test_close_wakes_the_receiver(self, pair):
        client, server = pair
        ended = queue.Queue()

        def receive():
            try:
                server.receive()
            except (EOFError, OSError) as error:
                ended.put(error)
        threading.Thread(target=receive).start()
        server.close()
        ended.get(timeout=10)
        server.close()
        assert server.closed

    def test_a_descriptor_is_closed_once_and_never_somebody_elses(self):
        strangers = []
        for _ in range(200):
            client, server = connect()
            client.post([("range", (b"c", 1), 0, b"", bytes(minipool.RANGE))])
            client.flush()
            racers = [threading.Thread(target=step) for step in (client.dispose, server.dispose, client.close)]
            for racer in racers:
                racer.start()
            strangers.append(os.dup(0))             # takes the number that was just given back
            for racer in racers:
                racer.join()
            client.dispose()
        for stranger in strangers:
            os.fstat(stranger)                      # EBADF if somebody closed it
            os.close(stranger)

    def test_a_writer_that_never_gives_the_role_back_holds_nobody_up_for_long(self, monkeypatch):
        monkeypatch.setattr(minipool, "HANDSHAKE_SECONDS", 0.1)
        client, server = connect()
        client._role.acquire()                      # as a thread that Ctrl-C hit just then
        began, before = time.monotonic(), open_descriptors()
        client.dispose()
        assert time.monotonic() - began < 5 and open_descriptors() == before - 1
        server.dispose()

    def test_two_hundred_connections_leave_no_descriptor_behind(self):
        before = open_descriptors()
        for number in range(200):
            client, server = connect()
            client.post([note(number)])
            client.flush()
            assert server.receive() == [note(number)]
            for connection in (client, server):
                connection.dispose()
        wait_until(lambda: open_descriptors() <= before)


# ---- addresses and large values ----


@pytest.mark.parametrize("text, expected", [
    ("host", ("host", 8899)), ("host:1", ("host", 1)), (" 10.0.0.1:65535 ", ("10.0.0.1", 65535)),
    ("::1", ("::1", 8899)), ("[::1]", ("::1", 8899)), ("[::1]:22", ("::1", 22)),
    ("fe80::1%eth0", ("fe80::1%eth0", 8899)),
])
def test_an_address_is_a_host_and_perhaps_a_port(text, expected):
    assert minipool.parse_address(text) == expected
    assert minipool.parse_address(minipool.format_address(*expected)) == expected


@pytest.mark.parametrize("text", ["", " ", ":1", "host:0", "host:65536", "host:-1", "host:x", "host:²", "[]:1",
                                  "tcp://host:1", "minipool://host"])
def test_what_is_no_address_is_a_value_error_that_shows_it(text):
    with pytest.raises(ValueError) as error:
        minipool.parse_address(text)
    assert repr(text) in str(error.value)


def test_a_value_in_parts_reads_like_the_joined_bytes():
    chance = random.Random(3)
    parts = [os.urandom(n) for n in (0, 5, 1, 0, 70, 300, 2)]
    blob, whole = Blob([parts[0], bytearray(parts[1]), *map(memoryview, parts[2:])]), b"".join(parts)
    assert blob.size == len(whole)
    for _ in range(500):
        offset = chance.randint(0, len(whole))
        length = chance.randint(0, len(whole) - offset)
        assert bytes(blob.read(offset, length)) == whole[offset:offset + length]


@pytest.fixture
def reader(pair):
    """A peer that pulls, without its thread: the test takes each step."""
    peer = Peer("client", ("127.0.0.1", 9), Secret.new().role_key, lock=threading.RLock(), announce=list, on_batch=list)
    peer.connection = pair[0]
    yield peer
    peer.stop()


def pull(reader, size, name=(b"w", 1)):
    """Begin to pull a value; return the list that its outcome will be in."""
    outcome = []
    with reader.lock:
        reader.pull((name, size, ""), outcome.append)
    if reader.connection:
        reader.connection.flush()
    return outcome


def answer_pulls(reader, server, answer):
    """Answer everything that is asked for with answer(name, offset, length) until nothing is; return the questions."""
    asked = []
    while server.has_input(0.05):
        for _, name, offset, length in server.receive():
            asked.append(offset)
            header, body = answer(name, offset, length)
            server.post([(*header, body)])
            server.flush(0)
            for message in reader.connection.receive(reader._asked):
                reader._handle_range(reader.connection, message)
    return asked


def ranges_of(blob):
    def answer(name, offset, length):
        body = blob.read(offset, length)
        return ("range", name, offset, hashlib.sha256(body).digest()), body
    return answer


class TestPull:
    @pytest.mark.parametrize("size", [0, 1, minipool.RANGE, minipool.RANGE + 1, 3 * minipool.RANGE + 17])
    def test_a_value_arrives_whole(self, pair, reader, size):
        blob = Blob([os.urandom(size)])
        outcome = pull(reader, size)
        asked = answer_pulls(reader, pair[1], ranges_of(blob))
        assert outcome == [blob.read(0, size)]
        assert asked == list(range(0, max(size, 1), minipool.RANGE))
        assert (reader._pulls, reader._asked) == ({}, {})

    def test_no_more_than_two_ranges_are_asked_for_at_a_time(self, pair, reader):
        pull(reader, 10 * minipool.RANGE, (b"w", 1))
        pull(reader, 10 * minipool.RANGE, (b"w", 2))
        assert len(receive_all(pair[1], 2)) == 2
        assert not pair[1].has_input(0.02)

    @pytest.mark.parametrize("spoil", [lambda body: b"\1" + body[1:], lambda body: body[:-1]])
    def test_a_spoiled_range_is_asked_for_again(self, pair, reader, spoil):
        blob, spoiled = Blob([bytes(1000)]), []

        def answer(name, offset, length):
            header, body = ranges_of(blob)(name, offset, length)
            spoiled.append(1)
            return header, bytes(body) if len(spoiled) > 3 else spoil(bytes(body))
        outcome = pull(reader, 1000)
        assert answer_pulls(reader, pair[1], answer) == [0] * 4
        assert outcome == [bytes(1000)]

    def test_a_range_spoiled_a_fourth_time_makes_the_value_lost_and_the_connection_stays(self, pair, reader):
        outcome = pull(reader, 1000)
        answer = lambda name, offset, length: (("range", name, offset, b"wrong"), bytes(length))    # noqa: E731
        assert answer_pulls(reader, pair[1], answer) == [0] * 4
        assert outcome == [None] and (reader._pulls, reader._asked) == ({}, {})
        assert not reader.connection.closed

    def test_a_range_is_missing_until_it_was_checked(self, pair, reader, monkeypatch):
        blob, outcome = Blob([os.urandom(2 * minipool.RANGE)]), pull(reader, 2 * minipool.RANGE)
        answer = ranges_of(blob)

        def interrupted(body):
            raise KeyboardInterrupt
        header, body = answer((b"w", 1), 0, minipool.RANGE)
        with monkeypatch.context() as patch:
            patch.setattr(minipool.hashlib, "sha256", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reader._handle_range(pair[0], (*header, body))
        reader._asked.clear()                           # as the loss of the connection does
        receive_all(pair[1], 2)
        with reader.lock:
            reader._ask_more()
        reader.connection.flush()
        assert answer_pulls(reader, pair[1], answer) == [0, minipool.RANGE]
        assert outcome == [blob.read(0, blob.size)]

    def test_a_value_that_nobody_holds_is_none_and_the_next_one_is_asked_for(self, pair, reader):
        outcome = pull(reader, 2 * minipool.RANGE, (b"w", 1))
        pull(reader, 10, (b"w", 2))
        assert len(receive_all(pair[1], 2)) == 2
        reader._handle_range(pair[0], ("gone", (b"w", 1)))
        assert outcome == [None]
        assert pair[1].has_input(5) and pair[1].receive() == [("pull", (b"w", 2), 0, 10)]

    def test_what_was_wanted_without_a_connection_is_asked_for_on_the_next(self, pair, reader):
        reader.connection = None
        outcome = pull(reader, 10)

        serving = threading.Thread(target=reader._serve, args=(pair[0],), daemon=True)
        serving.start()
        assert pair[1].receive() == [("pull", (b"w", 1), 0, 10)]
        pair[1].post([("range", (b"w", 1), 0, hashlib.sha256(b"0123456789").digest(), b"0123456789")])
        pair[1].flush()
        wait_until(lambda: outcome)
        assert outcome == [b"0123456789"]
        pair[1].close()
        serving.join(5)
        assert not serving.is_alive()

    def test_a_holder_answers_ranges_and_says_gone_for_what_it_has_not_got(self, pair, reader):
        reader.values[(b"c", 5)] = Blob([b"01234", b"56789"])
        for request in [((b"c", 5), 3, 4), ((b"c", 5), 8, 3), ((b"c", 6), 0, 1)]:
            reader._handle_range(pair[0], ("pull", *request))
        found, *gone = receive_all(pair[1], 3)
        assert found[:4] == ("range", (b"c", 5), 3, hashlib.sha256(b"3456").digest()) and bytes(found[4]) == b"3456"
        assert gone == [("gone", (b"c", 5)), ("gone", (b"c", 6))]
