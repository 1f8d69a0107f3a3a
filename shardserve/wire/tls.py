"""TLS for connections of ours: contexts from files, and a session that both the asyncio and the blocking side drive.

The session does no input or output itself. An ssl.SSLSocket would not do: it can't be read by one thread while another
writes it, and asyncio's TLS drops the alert that tells the other side why it was refused.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from shardserve.errors import StartError
from shardserve.wire.messages.launch import TLSFiles

# Bytes of plaintext that are encrypted at once: a thread that reads the same connection waits no longer than that
# takes.
CHUNK = 256 << 10
RECEIVE = 64 << 10


def check_files(files: TLSFiles) -> None:
    """StartError names the file that is missing or isn't what it should be."""
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)


def listening_context(files: TLSFiles) -> ssl.SSLContext:
    """For the side that is connected to; asks for the other's certificate if there is a CA to check it against."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Connections live long; a ticket would only be a message that nobody waits for.
    context.num_tickets = 0
    _load(context, files)
    if files.custom_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def connecting_context(files: TLSFiles) -> ssl.SSLContext:
    """For the side that connects; checks the other's certificate and names against custom_ca or the system's CAs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, files)
    if files.custom_ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _load(context: ssl.SSLContext, files: TLSFiles) -> None:
    if files.verify_client and files.custom_ca is None:
        raise StartError(
            "verify_client needs custom_ca, the certificate that clients' certificates are checked against"
        )
    for path in (files.certificate, files.private_key, files.custom_ca):
        if path is not None:
            read_file(path)
    try:
        # A password is never asked for on a terminal: a server has none.
        context.load_cert_chain(files.certificate, files.private_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise StartError(f"TLS files {files.certificate} and {files.private_key}: {why(error)}") from error
    if files.custom_ca is not None:
        try:
            context.load_verify_locations(files.custom_ca)
        except ssl.SSLError as error:
            raise StartError(f"TLS file {files.custom_ca}: {why(error)}") from error


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"TLS file {path}: {error.strerror}") from error


def why(error: Exception) -> str:
    """OpenSSL's reason in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error)


def chunks(pieces: Iterable[bytes | bytearray | memoryview]) -> Iterator[memoryview]:
    """What is encrypted at once of pieces, in order."""
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, view.nbytes, CHUNK):
            yield view[start : start + CHUNK]


class TLSSession:
    """One side of one connection, between ciphertext and plaintext. Raises ssl.SSLError; whatever `outgoing` then holds
    is the alert for the other side. peer: the name or address that was connected to; None on the listening side."""

    def __init__(self, context: ssl.SSLContext, peer: str | None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=peer is None, server_hostname=peer)
        self.established = False

    def handshake(self) -> bool:
        """Goes as far as what was fed allows; whether it is complete."""
        if not self.established:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                return False
            self.established = True
        return True

    def feed(self, ciphertext: bytes | memoryview) -> None:
        self._incoming.write(ciphertext)

    def read_into(self, buffer: memoryview) -> int:
        """Bytes of plaintext that were there; 0 for none."""
        try:
            # With a buffer it gives the count, which typeshed doesn't know.
            return cast(int, self._object.read(len(buffer), buffer))
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return 0

    def write(self, plaintext: bytes | bytearray | memoryview) -> None:
        # A MemoryBIO takes everything.
        self._object.write(plaintext)

    def outgoing(self) -> bytes:
        """Ciphertext to be sent, in this order and once."""
        return self._outgoing.read()


class TLSSocket:
    """What a FrameSocket needs of a socket, over TLS that is established: one thread reads, another may write."""

    def __init__(self, connection: socket.socket, session: TLSSession) -> None:
        self._socket = connection
        self._session = session
        # An SSLObject is for one thread at a time; nobody waits for the network inside.
        self._lock = threading.Lock()

    def recv_into(self, buffer: memoryview) -> int:
        while True:
            with self._lock:
                count = self._session.read_into(buffer)
            if count:
                return count
            ciphertext = self._socket.recv(RECEIVE)
            if not ciphertext:
                return 0
            with self._lock:
                self._session.feed(ciphertext)

    def sendmsg(self, pieces: Sequence[memoryview]) -> int:
        """Sends some of the pieces, in order; how many bytes of them. For one thread at a time."""
        taken = 0
        with self._lock:
            for piece in pieces:
                part = piece[: CHUNK - taken]
                self._session.write(part)
                taken += part.nbytes
                if taken == CHUNK:
                    break
            ciphertext = self._session.outgoing()
        self._socket.sendall(ciphertext)
        return taken

    def settimeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()
