"""The launcher's orders: attach a Worker, open a front end, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TypeAlias

from shardserve.errors import InternalError, ShardserveError
from shardserve.main.grpc.front import GrpcFront
from shardserve.main.rest.front import RestFront
from shardserve.main.router import Router
from shardserve.settings import Settings
from shardserve.wire.frames import Payload
from shardserve.wire.messages import launch
from shardserve.wire.stream import FrameStream

logger = logging.getLogger(__name__)

Order: TypeAlias = launch.Attach | launch.Detach | launch.StartGrpc | launch.StartRest | launch.Stop


class Main:
    """Obeys the launcher until it says stop or its connection ends, which ends the process at once."""

    def __init__(self) -> None:
        self._settings = Settings.from_environment()
        self._router = Router(self._settings)
        self._fronts: list[GrpcFront | RestFront] = []
        self._stream: FrameStream[launch.ToMain] = FrameStream(launch.ToMain, self._on_order, self._on_lost)
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._stopped = asyncio.Event()

    async def run(self, launcher: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._stream, sock=launcher)
        await self._stopped.wait()

    def _on_order(self, order: launch.ToMain, payload: Payload) -> None:
        if isinstance(order, launch.Ping):
            self._stream.send(launch.Pong())
            return
        task = asyncio.get_running_loop().create_task(self._answer(order))
        kept = self._opening if isinstance(order, launch.StartGrpc | launch.StartRest) else self._tasks
        kept.add(task)
        task.add_done_callback(kept.discard)

    def _on_lost(self, reason: Exception | None) -> None:
        if self._stopping:
            self._stopped.set()
            return
        logger.warning("the launcher is gone%s", f": {reason}" if reason else "")
        os._exit(1)

    async def _answer(self, order: Order) -> None:
        try:
            await self._obey(order)
        except ShardserveError as error:
            self._stream.send(launch.Refused(order.order, type(error).__name__, str(error)))
            return
        except Exception:
            logger.exception("order %s failed", type(order).__name__)
            bug = InternalError(f"a bug in Main at {type(order).__name__}; its log has the traceback")
            self._stream.send(launch.Refused(order.order, type(bug).__name__, str(bug)))
            return
        self._stream.send(launch.Done(order.order))
        if isinstance(order, launch.Stop):
            self._stopping = True
            self._stream.close()  # Once Done has left, the connection is lost and `run` returns.

    async def _obey(self, order: Order) -> None:
        match order:
            case launch.Attach():
                await self._router.attach(order.name, order.version, order.address)
            case launch.Detach():
                self._router.detach(order.name, order.version)
            case launch.StartGrpc():
                self._fronts.append(await GrpcFront.start(self._router, order))
            case launch.StartRest():
                self._fronts.append(await RestFront.start(self._router, order))
            case launch.Stop():
                # A front end that is being opened has to be closed, too.
                while self._opening:
                    await asyncio.wait(self._opening)
                end = time.monotonic() + order.grace
                await self._router.stop(order.grace)
                flush = max(self._settings.flush_timeout, end - time.monotonic())
                await asyncio.gather(*(front.stop(flush) for front in self._fronts))
                self._router.close()
