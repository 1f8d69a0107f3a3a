"""The REST front end: POST /model/{servable}[/version/{v}]:{method} and GET /healthz."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from shardserve.errors import (
    InternalError,
    InvalidInput,
    NotFound,
    Overloaded,
    ShardserveError,
    Unavailable,
    shortened,
)
from shardserve.main import addresses, tls
from shardserve.main.rest import codec
from shardserve.main.rest.body import RestBody, Stalled
from shardserve.main.rest.json_bodies import JsonBodies, is_large
from shardserve.main.rest.protocol import protocol
from shardserve.main.router import Decoded, Router, infer
from shardserve.wire.messages import front
from shardserve.wire.messages.launch import StartRest

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that the client waits for the answer; without it, as long as it keeps the connection."""

PLAIN_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
MOST_SHOWN = 40

# Seconds, of answers that may be better soon. What waits is bounded, so a queue is hardly longer than that.
RETRY_AFTER = "1"

# Of a version in the path: it is a 64-bit number in the protocol.
MAX_VERSION_DIGITS = 19


class RestFront:
    """One listening HTTP server."""

    def __init__(self, router: Router, order: StartRest) -> None:
        self._router = router
        self._limit = order.max_msg_mb_size << 20
        routes = [
            Route("/model/{servable}:{method}", self._predict, methods=["POST"]),
            Route("/model/{servable}/version/{version}:{method}", self._predict, methods=["POST"]),
            Route("/healthz", self._healthz, methods=["GET"]),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _bug})
        # No redirect for a path with a slash too many: Starlette's would go to whatever the client's Host header says.
        self._app.router.redirect_slashes = False
        self._bodies = JsonBodies(router.settings)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, router: Router, order: StartRest) -> RestFront:
        """Listens as ordered; StartError names the address or the file that is wrong."""
        front = cls(router, order)
        config = uvicorn.Config(
            front._app,
            http=protocol(router.settings.receive_timeout),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            **(tls.uvicorn_options(order.tls) if order.tls is not None else {}),
        )
        listener = addresses.listen(order.address, "REST address")
        front._server = _Server(config)
        front._serving = asyncio.get_running_loop().create_task(front._server.serve([listener]))
        return front

    async def stop(self, grace: float) -> None:
        """Takes no more connections and waits up to `grace` seconds until the answers under way have left."""
        assert self._server is not None
        assert self._serving is not None
        self._server.config.timeout_graceful_shutdown = math.ceil(grace)
        self._server.should_exit = True
        await self._serving
        if cancelled := self._server.server_state.tasks:
            await asyncio.wait(cancelled, timeout=grace)  # They answer at once.
        await self._bodies.close()

    async def _predict(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except ClientDisconnect:
            return Response(status_code=499)  # Nobody reads it.
        except ShardserveError as error:
            return _failed(error)
        except asyncio.CancelledError:
            assert self._server is not None
            if not self._server.should_exit:
                raise
            # By uvicorn, when the grace of a stop is over.
            return _failed(Unavailable("the server stopped before it had answered this request"))

    async def _answer(self, request: Request) -> Response:
        parameters = request.path_params
        version = parameters.get("version", "0")
        if not (version.isascii() and version.isdecimal()) or len(version) > MAX_VERSION_DIGITS:
            raise NotFound(f"version {shortened(version, MOST_SHOWN)!r} isn't a version number")
        method = parameters["method"]
        servable, info = self._router.resolve(parameters["servable"], int(version), method)
        deadline = _deadline(request)
        _refuse_encoded(request)
        instances = await self._instances(request, info, deadline)

        async def run() -> Response:
            results = [*map(codec.writable, await infer(servable, method, info, instances, deadline))]
            errors = [result for result in results if isinstance(result, ShardserveError)]
            status = errors[0].http_status if len(errors) == len(results) else 200
            body = await self._bodies.encode(results, deadline)
            return Response(body, status, media_type="application/json")

        return await _unless_it_leaves(request, run())

    async def _instances(self, request: Request, info: front.MethodInfo, deadline: float | None) -> list[Decoded]:
        settings = self._router.settings
        with self._router.intake.body() as came:
            pieces = await RestBody(request, self._limit, came).receive(settings.receive_timeout, deadline)
            reading = self._bodies.decode(pieces, info.dtypes, settings.max_instances, deadline)
            if not is_large(pieces):
                return await reading  # At once.
            return await _unless_it_leaves(request, reading)

    async def _healthz(self, request: Request) -> Response:
        ready = self._router.ready
        states = {f"{servable.name}:{servable.version}": servable.state for servable in self._router.servables}
        body = codec.encode_health(ready, states)
        return Response(body, 200 if ready else 503, media_type="application/json")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # The launcher, not a signal, stops Main.


def _deadline(request: Request) -> float | None:
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    # float() alone takes underscores, exponents, other scripts' digits, inf and nan.
    timeout = float(value) if PLAIN_NUMBER.fullmatch(value) else 0.0
    if not 0 < timeout < math.inf:
        raise InvalidInput(
            f"header {TIMEOUT_HEADER}: {value[:MOST_SHOWN]!r} isn't a number of seconds over 0, as in 30 or 0.5"
        )
    return time.monotonic() + timeout


def _refuse_encoded(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidInput(f"header content-encoding: {encoding[:MOST_SHOWN]!r} isn't taken, bodies are plain JSON")


async def _unless_it_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which is cancelled if the client leaves: ClientDisconnect. For when the body has come."""
    task = asyncio.current_task()
    assert task is not None
    left = over = False

    def leave(_: asyncio.Future[Any]) -> None:
        nonlocal left
        if not over:  # It may have been scheduled before it was removed.
            left = True
            task.cancel()

    leaving = asyncio.ensure_future(request.receive())  # After the body only a disconnect comes.
    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not left:
            raise
        raise ClientDisconnect from None
    finally:
        over = True
        leaving.remove_done_callback(leave)
        leaving.cancel()


def _failed(error: ShardserveError) -> Response:
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = RETRY_AFTER
    if isinstance(error, Stalled):
        headers["connection"] = "close"
    return Response(codec.encode_error(error), error.http_status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "POST /model/{servable}[/version/{number}]:{method} or GET /healthz"
    body = codec.encode_error(NotFound(f"{request.method} {request.url.path} isn't {known}"))
    return Response(body, error.status_code, error.headers, media_type="application/json")


async def _bug(request: Request, error: Exception) -> Response:
    return _failed(InternalError("a bug in the server; its log has the traceback"))
