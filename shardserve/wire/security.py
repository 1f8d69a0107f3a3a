"""Who may connect, for the Worker's distributed address and for stage links: TLS, the join secret, or both.

What is sent before any other frame, if either is set (the steps 2 and 3 only with a secret):

1. connecting side  `Join(nonce)`, without a nonce if it has no secret
2. listening side   `Challenge(nonce)`
3. connecting side  `Proof(HMAC-SHA256(secret, label, "connects", purpose, both nonces))`
4. listening side   `Admitted(HMAC-SHA256(secret, label, "listens", purpose, both nonces))`, or `Refuse`

The side that connects proves itself first: whoever can reach a port gets nothing from it to guess the secret by. TLS is
for TCP alone; the secret is asked for on local sockets as well, so that one rule holds whichever way a peer came. With
neither, nor `insecure`, who comes by TCP is refused: it may be anybody of this host. Until a peer is admitted it can
make us hold no more than JOIN_LIMIT bytes of frames, and has `join_timeout`.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
import stat
import time
from dataclasses import dataclass

import msgspec

from shardserve.errors import ConfigError, JoinRefused
from shardserve.wire.frames import FrameError, FrameReader, encode
from shardserve.wire.messages import group
from shardserve.wire.messages.launch import SecurityFiles
from shardserve.wire.sockets import Address
from shardserve.wire.tls import TLSSession, TLSSocket, connecting_context, listening_context, why

JOIN_LIMIT = 4096
SECRET_LIMIT = 64 << 10
NONCE_SIZE = 32
LABEL = b"shardserve join 1"
# The first byte of a TLS connection (RFC 8446, section 5.1: ContentType handshake); no frame of ours begins so.
TLS_HANDSHAKE = 0x16

JoinMessage = group.Join | group.Challenge | group.Proof | group.Admitted | group.Refuse


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def check_guarded(host: str, files: SecurityFiles, what: str) -> None:
    """ConfigError if `host`, of the argument `what`, is beyond loopback and nothing says who may join."""
    if files.local_only and not is_loopback(host):
        raise ConfigError(
            f"{what} {host} can be reached from other hosts: give join_secret_file or ssl_config, or insecure=True if "
            "whoever reaches it may join"
        )


def read_secret(path: str) -> bytes:
    """The secret, without the space around it. ConfigError names a file that is missing, empty or open to all users."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"join_secret_file {path}: is not a file")
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise ConfigError(
                    f"join_secret_file {path}: every user of this host has access to it (mode {mode & 0o777:04o}): "
                    "chmod 600 it"
                )
            secret = file.read(SECRET_LIMIT + 1).strip()
    except OSError as error:
        raise ConfigError(f"join_secret_file {path}: {error.strerror}") from error
    if not secret:
        raise ConfigError(f"join_secret_file {path}: is empty")
    if len(secret) > SECRET_LIMIT:
        raise ConfigError(f"join_secret_file {path}: is longer than {SECRET_LIMIT} bytes")
    return secret


@dataclass(frozen=True)
class Security:
    """What the files of a process say; nothing of it: local processes of the same user are taken, and with `insecure`
    whoever connects."""

    secret: bytes | None = None
    listening: ssl.SSLContext | None = None
    connecting: ssl.SSLContext | None = None
    insecure: bool = False

    @property
    def local_only(self) -> bool:
        """As of the files."""
        return self.secret is None and self.listening is None and not self.insecure

    @classmethod
    def load(cls, files: SecurityFiles) -> Security:
        """ConfigError or StartError names the file that is wrong."""
        secret = read_secret(files.join_secret_file) if files.join_secret_file is not None else None
        if files.tls is None:
            return cls(secret, insecure=files.insecure)
        return cls(secret, listening_context(files.tls), connecting_context(files.tls), files.insecure)


@dataclass(frozen=True)
class Admission:
    """Who is admitted to one kind of connection, seen from one side. purpose: what the listening side is; address: whom
    this side connects to, None where it listens; timeout: in seconds, for the handshake."""

    security: Security
    purpose: str
    timeout: float
    address: Address | None = None

    def handshake(self, connection: socket.socket) -> Handshake | None:
        """What has to be done before frames flow; None for nothing."""
        security = self.security
        context = security.listening if self.address is None else security.connecting
        tls = None
        if context is not None and connection.family != socket.AF_UNIX:
            tls = TLSSession(context, self.address.host if self.address is not None else None)
        closed = security.local_only and self.address is None and connection.family != socket.AF_UNIX
        if tls is None and security.secret is None and not closed:
            return None
        joining = Joining(security.secret, self.purpose, listens=self.address is None)
        peer = peer_in_words(connection) if self.address is None else f"the {self.purpose} at {self.address}"
        return Handshake(tls, joining, peer, closed)


def peer_in_words(connection: socket.socket) -> str:
    """How errors call the other side of a connection that this side has accepted."""
    if connection.family == socket.AF_UNIX:
        return "a local process"
    try:
        return str(Address(*connection.getpeername()[:2]))
    except OSError:
        return "a peer that has left"


class Joining:
    """The exchange of frames above, from one side; does no input or output. `done` when the other side is admitted."""

    def __init__(self, secret: bytes | None, purpose: str, *, listens: bool) -> None:
        self._secret = secret
        self._purpose = purpose
        self.listens = listens
        self._own = os.urandom(NONCE_SIZE)
        self._theirs: bytes | None = None
        self._reader: FrameReader[JoinMessage] = FrameReader(JoinMessage, max_payload=0, max_header=JOIN_LIMIT)
        self.done = False

    def first(self) -> bytes:
        return b"" if self.listens else _frame(group.Join(self._own if self._secret is not None else b""))

    def received(self, data: memoryview) -> bytes:
        """What to answer. JoinRefused or FrameError if the other side isn't admitted."""
        answer = b""
        while data:
            buffer = self._reader.buffer()
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            data = data[count:]
            for message, _ in self._reader.advance(count):
                if self.done:
                    raise FrameError("more came before this side had answered")
                answer += self._answer(message)
        return answer

    def _answer(self, message: JoinMessage) -> bytes:
        match message:
            case group.Join(nonce=nonce) if self.listens and self._theirs is None:
                return self._challenge(nonce)
            case group.Proof(mac=mac) if self.listens and self._theirs is not None:
                self._check(mac, "connects", "wrong join secret")
                self.done = True
                return _frame(group.Admitted(self._mac("listens")))
            case group.Challenge(nonce=nonce) if not self.listens and self._theirs is None:
                if self._secret is None:
                    raise JoinRefused("asks for a join secret: give join_secret_file")
                self._theirs = _checked_nonce(nonce)
                return _frame(group.Proof(self._mac("connects")))
            case group.Admitted(mac=mac) if not self.listens:
                if self._secret is not None:
                    if self._theirs is None:
                        raise JoinRefused("asks for no join secret, and this side was given one")
                    self._check(mac, "listens", "doesn't know the join secret")
                self.done = True
                return b""
            case group.Refuse(message=text) if not self.listens:
                raise Refused("".join(c if c.isprintable() else "?" for c in text))
        raise FrameError(f"{type(message).__name__} came out of turn")

    def _challenge(self, nonce: bytes) -> bytes:
        if self._secret is None:
            if nonce:
                raise JoinRefused("was given a join secret, this side wasn't")
            self._theirs = b""
            self.done = True
            return _frame(group.Admitted(b""))
        if not nonce:
            raise JoinRefused("came without a join secret: give join_secret_file")
        self._theirs = _checked_nonce(nonce)
        return _frame(group.Challenge(self._own))

    def _check(self, mac: bytes, role: str, otherwise: str) -> None:
        if not hmac.compare_digest(mac, self._mac(role)):
            raise JoinRefused(otherwise)

    def _mac(self, role: str) -> bytes:
        """Of what this side and the other contributed; the connecting side's nonce first."""
        assert self._secret is not None
        assert self._theirs is not None
        nonces = self._theirs + self._own if self.listens else self._own + self._theirs
        text = b"\0".join((LABEL, role.encode(), self._purpose.encode(), nonces))
        return hmac.digest(self._secret, text, "sha256")


class Refused(JoinRefused):
    """The other side has refused this one, so need not be told."""


class Handshake:
    """TLS, if there is any, and the exchange inside it; between received bytes and bytes to send.

    `refused` says why the other side isn't admitted (or doesn't admit this one): then send what is left and close.
    closed: whatever it says.
    """

    def __init__(self, tls: TLSSession | None, joining: Joining, peer: str, closed: bool = False) -> None:
        self.tls = tls
        self.refused: JoinRefused | None = None
        self._joining = joining
        self._listens = joining.listens
        self.peer = peer
        self._silent = True
        self._closed = closed

    @property
    def done(self) -> bool:
        return self._joining.done and self.refused is None

    def start(self) -> bytes:
        if self.tls is None:
            return self._joining.first()
        self.tls.handshake()
        return self.tls.outgoing()

    def received(self, data: memoryview) -> bytes:
        """What to send now."""
        try:
            if self._closed:
                return self._refuse("came by TCP, where only a secret or TLS can tell who it is: give join_secret_file")
            if self.tls is None:
                return self._joining.received(data)
            if self._silent and self._listens and data[0] != TLS_HANDSHAKE:
                return self._refuse("came without TLS: give ssl_config", plain=True)
            self._silent = False
            self.tls.feed(data)
            self._through_tls(self.tls)
            return self.tls.outgoing()
        except ssl.SSLError as error:
            assert self.tls is not None
            self._set_refused(f"TLS: {why(error)}")
            return self.tls.outgoing()
        except FrameError:
            if self._listens:
                return self._refuse("came without a join secret: give join_secret_file")
            return self._refuse("is no shardserve that asks for a join secret or TLS")
        except Refused as error:
            self._set_refused(str(error))
            return b""
        except JoinRefused as error:
            return self._refuse(str(error))

    def _through_tls(self, tls: TLSSession) -> None:
        if not tls.established:
            if not tls.handshake():
                return
            if first := self._joining.first():
                tls.write(first)
        buffer = memoryview(bytearray(JOIN_LIMIT))
        # What follows the exchange is the connection's own.
        while not self._joining.done and (count := tls.read_into(buffer)):
            if answer := self._joining.received(buffer[:count]):
                tls.write(answer)

    def _refuse(self, text: str, plain: bool = False) -> bytes:
        """Notes why, and tells the other side if it listens to us."""
        self._set_refused(text)
        if not self._listens:
            return b""
        frame = _frame(group.Refuse(JoinRefused.__name__, text))
        if self.tls is None or plain:
            return frame
        self.tls.write(frame)
        return self.tls.outgoing()

    def _set_refused(self, text: str) -> None:
        self.refused = JoinRefused(f"{self.peer}: {text}")


def perform_handshake(connection: socket.socket, admission: Admission) -> socket.socket | TLSSocket:
    """Does the handshake, blocking; gives what a FrameSocket is made of. JoinRefused says why not, TimeoutError and
    ConnectionError that the other side says nothing or is gone; then the connection is closed."""
    handshake = admission.handshake(connection)
    if handshake is None:
        return connection
    deadline = time.monotonic() + admission.timeout
    try:
        outgoing = handshake.start()
        while True:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if outgoing:
                connection.sendall(outgoing)
            if handshake.refused is not None:
                raise handshake.refused
            if handshake.done:
                break
            data = connection.recv(JOIN_LIMIT)
            if not data:
                raise ConnectionResetError(f"{handshake.peer} ended the connection before it had admitted this side")
            outgoing = handshake.received(memoryview(data))
        connection.settimeout(None)
    except TimeoutError:
        connection.close()
        raise TimeoutError(f"{handshake.peer} proved nothing within {admission.timeout} s (join_timeout)") from None
    except BaseException:
        connection.close()
        raise
    return connection if handshake.tls is None else TLSSocket(connection, handshake.tls)


def _frame(message: msgspec.Struct) -> bytes:
    return b"".join(encode(message))


def _checked_nonce(nonce: bytes) -> bytes:
    if len(nonce) != NONCE_SIZE:
        raise FrameError(f"a nonce of {len(nonce)} bytes")
    return nonce
