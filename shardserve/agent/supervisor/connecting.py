"""The way to the Worker: tried until it listens, beside the event loop of whoever wants it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from shardserve.settings import Settings
from shardserve.wire.sockets import Address, connect_within


class Connector:
    """`hindrance`: the end of a sentence that says why the last try failed, where that isn't that nobody listens."""

    def __init__(self, address: Address, settings: Settings, local_only: bool, stopping: threading.Event) -> None:
        self._address = address
        self._settings = settings
        self._local_only = local_only
        self._stopping = stopping
        self.hindrance = ""

    async def connect(self, seconds: float) -> socket.socket | None:
        """A blocking connection; None after `seconds` (infinity: never), or when `stopping` is set.

        On a thread of its own: executors take no work once the script's last line has run.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[socket.socket | None] = loop.create_future()

        def tell(connected: socket.socket | None) -> None:
            # The loop's end cancels whoever waited, possibly between this call and its turn.
            if not done.done():
                done.set_result(connected)
            elif connected is not None:
                connected.close()

        def work() -> None:
            connected = connect_within(
                address=self._address,
                seconds=seconds,
                interval=self._settings.connect_retry_interval,
                stopped=self._stopping,
                peer_timeout=self._settings.peer_timeout,
                failed=self._failed,
                local_only=self._local_only,
            )
            # The loop is closed if its owner was stopped meanwhile; then nobody wants to know.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(tell, connected)
                return
            if connected is not None:
                connected.close()

        threading.Thread(target=work, name="connect", daemon=True).start()
        return await done

    def _failed(self, error: OSError) -> None:
        match error:
            case socket.gaierror():
                self.hindrance = f", a name that isn't known yet: {error.strerror}"
            case PermissionError():
                self.hindrance = f": {error.strerror}"
            case _:
                self.hindrance = ""
