"""The launcher: parent of Main and of the Workers. Starts them, respawns them, ends them.

It keeps what must outlive a child: the listeners of each Worker (whoever connects while it is respawned waits in their
backlog), its incarnation, and which front ends Main has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from shardserve.errors import ConfigError, ShardserveError, StartError
from shardserve.log import servable_in_words
from shardserve.progress import Progress, agents_waited_for, quietly, remind
from shardserve.restarts import RestartBudget
from shardserve.server.children import Child
from shardserve.server.runtime import STOPPED
from shardserve.settings import Settings
from shardserve.wire.messages import launch
from shardserve.wire.messages.launch import UNGUARDED, SecurityFiles
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name

logger = logging.getLogger(__name__)

# On top of a child's own time for its stop: the exchange of the orders.
STOP_MARGIN = 1.0


@dataclass(frozen=True, kw_only=True)
class ServableOptions:
    """A servable to start; paths are absolute. devices: of one that is not distributed, which needs no rank table; its
    distributed address is a free port of this host (port 0). own_agents: this process has its agents, too."""

    servable_directory: str
    servable_name: str
    version_number: int
    rank_table_json_file: str
    distributed_address: Address
    wait_agents_time_in_seconds: float
    num_parallel_workers: int = 1
    devices: tuple[int, ...] | None = None
    security: SecurityFiles = UNGUARDED
    own_agents: bool = False

    def __str__(self) -> str:
        return servable_in_words(self.servable_name, self.version_number)


@dataclass(eq=False)
class Service:
    """A Worker and what outlives it."""

    options: ServableOptions
    listeners: tuple[socket.socket, ...]
    front_name: str
    incarnation: int
    restarts: RestartBudget
    worker: Child | None = None
    progress: Progress = quietly
    waits_for: str = ""
    ready: bool = False
    stopping: bool = False


class Launcher:
    """A resident of the runtime; one for the process."""

    needs_others = True
    failure: ShardserveError | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._main: Child | None = None
        self._main_restarts = RestartBudget(settings)
        self._main_lock = asyncio.Lock()
        self._fronts: list[Callable[[int], msgspec.Struct]] = []
        self._services: dict[tuple[str, int], Service] = {}
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        grace = self._settings.stop_grace
        if self._main is not None:
            main = self._main
            await main.end(launch.Stop(main.number(), grace), grace + STOP_MARGIN)
        await asyncio.gather(*(self._end(service) for service in self._services.values()))

    def stop(self) -> None:
        self._stop.set()

    async def start_front(self, order: Callable[[int], msgspec.Struct]) -> None:
        """Has Main open a front end; `order` makes the message from its number."""
        main = await self._ensure_main()
        await main.order(order(main.number()), self._settings.start_timeout)
        self._fronts.append(order)

    async def open_servable(self, options: ServableOptions) -> Service:
        """Takes its ports and tells Main of it; StartError for a port in use, ConfigError if it is started already."""
        key = options.servable_name, options.version_number
        main = await self._ensure_main()
        # No await from here until it is in `_services`: of two starts at once the second finds the first.
        if key in self._services:
            raise ConfigError(f"{options} is started already")
        front_name = f"shardserve-front-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.ExitStack() as stack:
            tcp = stack.enter_context(listen_tcp(options.distributed_address, "distributed_address"))
            address = Address(*tcp.getsockname()[:2])
            listeners = (
                tcp,
                stack.enter_context(listen_abstract(twin_name(address))),
                stack.enter_context(listen_abstract(front_name)),
            )
            options = replace(options, distributed_address=address)
            # The first incarnation is the time, which is greater than what an earlier launcher counted; agents say if
            # it isn't.
            service = Service(options, listeners, front_name, int(time.time()), RestartBudget(self._settings))
            self._services[key] = service
            stack.callback(self._services.pop, key)
            await main.order(launch.Attach(main.number(), *key, front_name), self._settings.start_timeout)
            stack.pop_all()
        return service

    async def run_servable(self, service: Service, progress: Progress = quietly) -> None:
        """Starts its Worker; returns when all agents are ready, raises what the Worker was refused with."""
        service.progress = progress
        try:
            worker = self._new_worker(service)
            await self._serve(service, worker)
        except BaseException:
            await self._withdraw(service)
            raise
        service.ready = True
        service.progress = quietly
        if worker.ended.is_set():
            # It died after it had answered and before `ready` was set, so `_worker_died` left it to this task.
            self._respawn_worker(service, worker.end_in_words)

    async def _withdraw(self, service: Service) -> None:
        """Ends a servable whose start failed; raises nothing that would hide why."""
        key = service.options.servable_name, service.options.version_number
        del self._services[key]
        try:
            if self._main is not None:
                await self._main.order(launch.Detach(self._main.number(), *key), self._settings.start_timeout)
        except ShardserveError as error:
            logger.warning("%s could not be started, and Main could not be told of it: %s", service.options, error)
        finally:
            await self._end(service)

    def _new_worker(self, service: Service) -> Child:
        """StartError if this host can't start one more process, or this launcher was stopped."""
        self._refuse_if_stopped()
        service.worker = Child(
            "shardserve.worker",
            [listener.fileno() for listener in service.listeners],
            self._settings.heartbeat_timeout,
            lambda child: self._worker_died(service, child),
            lambda incarnation: setattr(service, "incarnation", incarnation),
        )
        return service.worker

    async def _serve(self, service: Service, worker: Child) -> None:
        """Returns when all agents are ready, raises what the Worker was refused with."""
        await worker.connect()
        options = service.options
        order = launch.Serve(
            order=worker.number(),
            servable_directory=options.servable_directory,
            servable_name=options.servable_name,
            version=options.version_number,
            rank_table_json_file=options.rank_table_json_file,
            incarnation=service.incarnation,
            wait_agents_time_in_seconds=options.wait_agents_time_in_seconds,
            num_parallel_workers=options.num_parallel_workers,
            devices=options.devices,
            security=options.security,
            own_agents=options.own_agents,
            was_ready=service.ready,
        )
        seconds = self._settings.config_timeout
        watch = asyncio.get_running_loop().call_later(seconds, self._config_timed_out, worker, order)
        worker.on_loaded = watch.cancel
        worker.on_waiting = lambda message: self._waits(service, message)
        service.waits_for = "its Worker to run servable_config.py"
        service.progress("starting the Worker", 0, 1)
        notice = remind(self._settings.waiting_notice, lambda: f"{options} waits for {service.waits_for}")
        reminder = asyncio.ensure_future(notice)
        try:
            await worker.order(order, None)
        finally:
            watch.cancel()
            reminder.cancel()

    def _waits(self, service: Service, message: launch.Waiting) -> None:
        reason = f"; {message.reason}" if message.reason else ""
        service.waits_for = agents_waited_for(message.total, message.missing) + reason
        service.progress("loading agents", message.total - len(message.missing), message.total)

    def _config_timed_out(self, worker: Child, order: launch.Serve) -> None:
        """The Worker runs that file before all else, on its loop: it can't be asked to end."""
        path = Path(order.servable_directory, order.servable_name, "servable_config.py")
        seconds = self._settings.config_timeout
        worker.fail(order.order, ConfigError(f"{path}: did not end within {seconds:g} s (config_timeout)"))
        worker.kill()

    def _worker_died(self, service: Service, child: Child) -> None:
        service.worker = None
        # Before it is ready, the start hears of its death as the order's error.
        if service.ready:
            self._respawn_worker(service, child.end_in_words)

    def _respawn_worker(self, service: Service, ending: str) -> None:
        if service.stopping or self._stop.is_set():
            return
        if not service.restarts.spend():
            self._fail(f"the Worker of {service.options} ended {service.restarts}: stopping")
            return
        logger.error("the Worker of %s %s; it is respawned", service.options, ending)
        service.incarnation += 1
        # Agents that stay away are waited for as long as it takes: they were all there before.
        service.options = replace(service.options, wait_agents_time_in_seconds=0)
        self._in_background(self._restore_worker(service))

    async def _restore_worker(self, service: Service) -> None:
        await asyncio.sleep(service.restarts.pause)
        try:
            worker = self._new_worker(service)
        except StartError as error:
            self._respawn_worker(service, f"did not start ({error})")
            return
        try:
            await self._serve(service, worker)
        except ShardserveError as error:
            logger.error("the respawned Worker of %s: %s", service.options, error)
            # What is wrong may be mended meanwhile; until then each try counts against the restarts, as a death does.
            worker.kill()

    async def _end(self, service: Service) -> None:
        service.stopping = True
        if service.worker is not None:
            seconds = self._settings.exit_timeout + STOP_MARGIN
            await service.worker.end(launch.Stop(service.worker.number(), 0), seconds)
        for listener in service.listeners:
            listener.close()

    def _refuse_if_stopped(self) -> None:
        """What would be started now, nobody would end."""
        if self._stop.is_set():
            raise StartError(STOPPED)

    async def _ensure_main(self) -> Child:
        self._refuse_if_stopped()
        async with self._main_lock:
            main = self._main
            if main is None:
                main = self._main = Child("shardserve.main", (), self._settings.heartbeat_timeout, self._main_died)
                await main.connect()
            # It may have died meanwhile: then the first order to it fails.
            return main

    def _main_died(self, child: Child) -> None:
        self._main = None
        self._respawn_main(child.end_in_words)

    def _respawn_main(self, ending: str) -> None:
        if self._stop.is_set():
            return
        if not self._main_restarts.spend():
            self._fail(f"Main died {self._main_restarts}: stopping")
            return
        logger.error("Main %s; it is respawned", ending)
        self._in_background(self._restore_main())

    async def _restore_main(self) -> None:
        await asyncio.sleep(self._main_restarts.pause)
        try:
            main = await self._ensure_main()
        except StartError as error:
            self._respawn_main(f"did not start ({error})")
            return
        timeout = self._settings.start_timeout
        try:
            for key, service in list(self._services.items()):
                # Skipped if its start has failed meanwhile; under this key there may be another one now.
                if self._services.get(key) is service:
                    await main.order(launch.Attach(main.number(), *key, service.front_name), timeout)
            for order in list(self._fronts):
                await main.order(order(main.number()), timeout)
        except ShardserveError as error:
            # A port that somebody has taken may become free; each try spends of the restarts, as a death does.
            logger.error("Main could not be restored: %s", error)
            main.kill()

    def _fail(self, reason: str) -> None:
        """Ends the server, and the script with an error."""
        logger.critical("%s", reason)
        self.failure = StartError(reason)
        self.stop()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the launcher can't go on", exc_info=error)
                self._fail(f"{type(error).__name__}: {error}")

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(done)
