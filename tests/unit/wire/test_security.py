import asyncio
import contextlib
import os
import socket
import ssl
import threading

import numpy as np
import pytest
from certificates import Authority

from shardserve.errors import ConfigError, JoinRefused, StartError
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import PREFIX, encode
from shardserve.wire.messages import Generation, group
from shardserve.wire.messages.launch import SecurityFiles, TLSFiles
from shardserve.wire.security import (
    JOIN_LIMIT,
    Admission,
    Security,
    check_guarded,
    is_loopback,
    perform_handshake,
    read_secret,
)
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp
from shardserve.wire.stream import FrameStream

pytestmark = pytest.mark.usefixtures("nothing_left")
G = Generation(1, 1)
SECRET = Security(b"a long and random secret")
OTHER = Security(b"another secret")
OPEN = Security(insecure=True)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Security by what a side has: a certificate of our CA, of another, none; for the right address or another."""
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority(folder / "ours"), Authority(folder / "theirs")

    def load(issuer, trusted, address="127.0.0.1", secret=None):
        certificate, key = issuer.certificate(f"{address}-{os.urandom(4).hex()}", address)
        files = TLSFiles(str(certificate), str(key), str(trusted.custom_ca), True)
        security = Security.load(SecurityFiles(None, files))
        return Security(secret, security.listening, security.connecting)

    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(ours.custom_ca)
    return {
        "ours": load(ours, ours),
        "with secret": load(ours, ours, secret=b"s"),
        "with another secret": load(ours, ours, secret=b"t"),
        "of another CA": load(theirs, ours),
        "trusts another CA": load(ours, theirs),
        "for another address": load(ours, ours, "127.0.0.9"),
        "without certificate": Security(None, None, bare),
    }


class Peers:
    """A FrameStream that listens in an event loop of its own thread, and blocking sides that connect to it."""

    def __init__(self, port, security, timeout=20.0, twin=None):
        self.address = Address("127.0.0.1", port)
        self.twin = twin
        self.admitted, self.lost, self.taken = 0, [], []
        self._admission = Admission(security, "test", timeout)
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._streams = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        listener = listen_abstract(self.twin) if self.twin else listen_tcp(self.address, "test")
        server = await self._loop.create_server(self._stream, sock=listener)
        self._started.set()
        await self._stop.wait()
        server.close()
        for stream in list(self._streams):
            stream.abort()
        while self._streams:
            await asyncio.sleep(0.01)

    def _stream(self):
        def frame(message, payload):
            with self._changed:
                self.taken.append(message)
                self._changed.notify_all()
            stream.send(message, [payload.data])

        def lost(reason):
            self._streams.discard(stream)
            with self._changed:
                self.lost.append(reason)
                self._changed.notify_all()

        def admitted():
            self.admitted += 1

        stream = FrameStream(group.OnStageLink, frame, lost, admission=self._admission, on_admitted=admitted)
        self._streams.add(stream)
        return stream

    def __enter__(self):
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def connect(self):
        if not self.twin:
            return socket.create_connection(self.address, 20)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + self.twin)
        return connection

    def join(self, security, purpose="test"):
        return FrameSocket(
            perform_handshake(self.connect(), Admission(security, purpose, 20, self.address)), group.OnStageLink
        )

    def reason(self):
        """Why the first connection ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.lost, 20)
            return str(self.lost[0])


def check_echo(frames, size=3_000_000):
    """Both ways at once, more than any buffer holds."""
    data = np.arange(size, dtype=np.int64)
    got = []

    def receive():
        got.extend(frames.receive() for _ in range(4))

    reader = threading.Thread(target=receive)
    reader.start()
    for step in range(4):
        frames.send(group.Transfer(G, step), [data.view(np.uint8).data])
    reader.join(60)
    for step, (message, payload) in enumerate(got):
        assert message == group.Transfer(G, step)
        assert np.array_equal(payload.view(np.int64), data)
    assert len(got) == 4


@pytest.mark.parametrize("kind", ["open", "secret", "ours", "with secret"])
def test_who_is_admitted_sends_and_receives(free_port, tls, kind):
    security = {"open": OPEN, "secret": SECRET, **tls}[kind]
    with Peers(free_port, security) as peers, contextlib.closing(peers.join(security)) as frames:
        check_echo(frames)
        assert peers.admitted == 1


def test_a_local_socket_asks_for_the_secret_too(tls):
    name = f"shardserve-test-security-{os.getpid()}"
    with Peers(0, SECRET, twin=name) as peers:
        with contextlib.closing(peers.join(SECRET)) as frames:
            frames.send(group.Transfer(G, 1))
            assert frames.receive()[0] == group.Transfer(G, 1)
        with pytest.raises(JoinRefused, match="wrong join secret"):
            peers.join(OTHER)


WORKER = r"the test at 127.0.0.1:\d+"
UNKNOWN_CA = r"TLS: (unable to get local issuer certificate|self-signed certificate in certificate chain)"


@pytest.mark.parametrize(
    ("listening", "connecting", "there", "here"),
    [
        ("secret", "other", "wrong join secret", "wrong join secret"),
        ("ours", "secret", "came without TLS: give ssl_config", "came without TLS: give ssl_config"),
        ("with secret", "ours", "came without a join secret: give join_secret_file", "came without a join secret"),
        ("ours", "with secret", "was given a join secret, this side wasn't", "was given a join secret"),
        ("with secret", "with another secret", "wrong join secret", "wrong join secret"),
        ("ours", "of another CA", "TLS: unable to get local issuer certificate", "TLS: tlsv1 alert unknown ca"),
        ("ours", "trusts another CA", "TLS: tlsv1 alert unknown ca", UNKNOWN_CA),
        (
            "for another address",
            "ours",
            "TLS: sslv3 alert bad certificate",
            "TLS: IP address mismatch, certificate is not valid",
        ),
        (
            "ours",
            "without certificate",
            "TLS: peer did not return a certificate",
            "TLS: tlsv13 alert certificate required",
        ),
        ("secret", "ours", "came without a join secret", "TLS: "),
    ],
)
def test_who_is_refused_and_what_both_sides_say(free_port, tls, listening, connecting, there, here):
    known = {"secret": SECRET, "other": OTHER, **tls}
    with Peers(free_port, known[listening]) as peers:
        with pytest.raises(JoinRefused, match=rf"^{WORKER}: {here}"):
            peers.join(known[connecting])
        assert peers.reason().partition(": ")[2].startswith(there)
        assert (peers.admitted, peers.taken) == (0, [])


def test_a_proof_for_one_kind_of_connection_is_none_for_another(free_port):
    with Peers(free_port, SECRET) as peers, pytest.raises(JoinRefused, match="wrong join secret"):
        peers.join(SECRET, purpose="another")


def raw(peers, *pieces):
    """What a stranger is told that sends these bytes, until the connection ends."""
    with peers.connect() as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
            while data := connection.recv(65536):
                answer += data
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"".join(encode(group.Transfer(G, 0))),
        PREFIX.pack(JOIN_LIMIT + 1, 0),
        PREFIX.pack(10, 1),
        PREFIX.pack(60_000_000, 60_000_000_000),
        b"".join(encode(group.Join(b"short"))),
        b"".join(encode(group.Join(b""))),
        b"".join(encode(group.Proof(bytes(32)))),
        b"".join(encode(group.Admitted(bytes(32)))),
        b"".join(encode(group.Join(bytes(32))) + encode(group.Join(bytes(32)))),
        b"".join(encode(group.Join(bytes(32))) + encode(group.Proof(bytes(32)))),
        b"".join(encode(group.Join(bytes(32))) + encode(group.Transfer(G, 0))),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["a frame", "a long header", "a payload", "huge", "short nonce", "no nonce", "proof first", "admitted", "twice",
         "wrong proof", "frame too early", "HTTP"],
)  # fmt: skip
def test_strangers_reach_nothing(free_port, data):
    with Peers(free_port, SECRET) as peers:
        answer = raw(peers, data)
        assert b"Refuse" in answer
        peers.reason()
        assert (peers.admitted, peers.taken) == (0, [])


def test_who_says_nothing_is_left(free_port):
    with Peers(free_port, SECRET, timeout=0.2) as peers:
        assert raw(peers) == b""
        assert "proved nothing within 0.2 s (join_timeout)" in peers.reason()


def listen_once(port, *answers):
    """A listener that answers whatever comes with these frames, one for each."""

    def work():
        connection, _ = listener.accept()
        with listener, connection:
            for answer in answers:
                connection.recv(4096)
                connection.sendall(b"".join(encode(answer)))
            connection.recv(4096)

    listener = listen_tcp(Address("127.0.0.1", port), "test")
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([group.Challenge(bytes(32)), group.Admitted(bytes(32))], "doesn't know the join secret"),
        ([group.Admitted(b"")], "asks for no join secret, and this side was given one"),
        ([group.Challenge(bytes(31))], "is no shardserve that asks for a join secret or TLS"),
        ([group.Refuse("JoinRefused", "no\x1b[2Jtrick")], r"no\?\[2Jtrick"),
    ],
)
def test_a_listener_that_can_not_prove_itself_is_left(free_port, answers, said):
    thread = listen_once(free_port, *answers)
    address = Address("127.0.0.1", free_port)
    with pytest.raises(JoinRefused, match=rf"^{WORKER}: {said}$"):
        perform_handshake(socket.create_connection(address), Admission(SECRET, "test", 20, address))
    thread.join(30)


def test_a_listener_that_is_silent_or_leaves_is_no_refusal(free_port):
    address = Address("127.0.0.1", free_port)
    with listen_tcp(address, "test") as listener:
        with pytest.raises(TimeoutError, match=rf"{WORKER} proved nothing within 0.1 s"):
            perform_handshake(socket.create_connection(address), Admission(SECRET, "test", 0.1, address))
        listener.accept()[0].close()
        connection = socket.create_connection(address)
        listener.accept()[0].close()
        with pytest.raises(ConnectionError):
            perform_handshake(connection, Admission(SECRET, "test", 20, address))


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_secret_files(tmp_path):
    assert read_secret(write(tmp_path / "good", "  a secret \n")) == b"a secret"
    assert read_secret(write(tmp_path / "group", "x", 0o640)) == b"x"
    for path, said in [
        (str(tmp_path / "none"), "No such file or directory"),
        (write(tmp_path / "empty", " \n"), "is empty"),
        (write(tmp_path / "open", "x", 0o644), r"every user of this host has access to it \(mode 0644\): chmod 600 it"),
        (str(tmp_path), "Is a directory"),
        (write(tmp_path / "long", "x" * 70_000), "is longer than 65536 bytes"),
    ]:
        with pytest.raises(ConfigError, match=rf"^join_secret_file {path}: {said}$"):
            read_secret(path)


def test_tls_files(tmp_path):
    authority = Authority(tmp_path / "ca")
    certificate, key = map(str, authority.certificate("a", "127.0.0.1"))
    other = str(authority.certificate("b", "127.0.0.1")[1])
    ca = str(authority.custom_ca)
    for files, said in [
        (TLSFiles(certificate, key, None, True), "verify_client needs custom_ca"),
        (TLSFiles("/nowhere.pem", key, ca, True), "TLS file /nowhere.pem: No such file"),
        (TLSFiles(certificate, other, ca, True), f"TLS files {certificate} and {other}: key values mismatch"),
        (TLSFiles(certificate, key, key, True), f"TLS file {key}: no certificate or crl found"),
    ]:
        with pytest.raises(StartError, match=rf"^{said}"):
            Security.load(SecurityFiles(None, files))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("no-such-host.invalid", False)],
)  # fmt: skip
def test_beyond_loopback_something_has_to_guard(host, loopback):
    assert is_loopback(host) is loopback
    for files in (
        SecurityFiles("secret"),
        SecurityFiles(None, TLSFiles("", "", None, False)),
        SecurityFiles(None, None, True),
    ):
        check_guarded(host, files, "distributed_address")
    if loopback:
        check_guarded(host, SecurityFiles(), "distributed_address")
    else:
        with pytest.raises(
            ConfigError, match=rf"^distributed_address {host} .*: give join_secret_file or ssl_config, or"
        ):
            check_guarded(host, SecurityFiles(), "distributed_address")
