"""What gRPC leaves to Python's text and a traceback in the log for each: requests that can't be read, and calls whose
client has gone just before the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from shardserve.errors import InvalidInput, ShardserveError

ERROR_CLASS = "shardserve-error"
"""The trailing metadata that names the class of errors.py, beside a gRPC status that several classes share."""

MAX_DETAILS = 2000
"""Bytes of a status's text, which travels as a header: clients refuse headers of more than 8 KB, some by chance, and a
byte may take 3 of it."""


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ShardserveError) -> None:
    """Ends the call with the error's status; raises."""
    code = grpc.StatusCode[error.grpc_status]
    details = str(error).encode(errors="replace")[:MAX_DETAILS].decode(errors="ignore")
    await context.abort(code, details, ((ERROR_CLASS, type(error).__name__),))


class CarefulServer:
    """The server as generated code registers methods with it: they answer a request that isn't their message with
    InvalidInput."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server: Any = server  # Its stubs lack the newer of the two.
        self._ended = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        # They go before the generic ones.
        careful = {name: self._careful(name, handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, careful)

    def end_streams(self) -> None:
        """Those of requests: one that its client leaves open would hold up a stop until its grace is over."""
        self._ended.set()

    def _careful(self, name: str, handler: Any) -> Any:
        def read(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return InvalidInput(
                    f"the request isn't a message of {name}: its {len(data)} bytes can't be read as one"
                )

        async def answer(request: Any, context: Any) -> Any:
            if isinstance(request, InvalidInput):
                await abort(context, request)
            return await run(request, context)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._careful_stream(handler.stream_stream), read, handler.response_serializer
            )
        run = handler.unary_unary or handler.unary_stream
        kind = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.unary_stream_rpc_method_handler
        return kind(answer, read, handler.response_serializer)

    def _careful_stream(self, run: Any) -> Any:
        async def readable(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
            ended = asyncio.ensure_future(self._ended.wait())
            try:
                while True:
                    coming = asyncio.ensure_future(anext(requests))
                    try:
                        await asyncio.wait((coming, ended), return_when=asyncio.FIRST_COMPLETED)
                        if not coming.done():
                            return
                        request = coming.result()
                    except StopAsyncIteration:
                        return
                    finally:
                        coming.cancel()
                    if isinstance(request, InvalidInput):
                        await abort(context, request)
                    yield request
            finally:
                ended.cancel()

        async def answers(requests: AsyncIterable[Any], context: Any) -> AsyncIterator[Any]:
            async with contextlib.aclosing(readable(aiter(requests), context)) as readable_ones:
                async for reply in run(readable_ones, context):
                    yield reply

        return answers


def _concerns_the_server(record: logging.LogRecord) -> bool:
    """Not what gRPC says when it can't write to a call any more: it knows that the client has gone a little later."""
    return record.exc_info is None or not isinstance(record.exc_info[1], cygrpc.ExecuteBatchError)


def quiet_late_answers() -> None:
    """gRPC logs no answer that came too late for its call."""
    logging.getLogger(cygrpc.__name__).addFilter(_concerns_the_server)
