"""The same client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import cast

import grpc

from shardserve.client import channel, codec
from shardserve.errors import ShardserveError
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceStub


class AsyncClient:
    """`Client` with coroutines: `await client.infer(…)`; made and used inside one event loop.

    `infer_async` starts the call and returns a task, so that code reads the same with both.
    """

    def __init__(
        self,
        address: str,
        servable_name: str,
        method_name: str,
        version_number: int = 0,
        ssl_config: channel.SSLConfig | None = None,
        raise_errors: bool = False,
    ) -> None:
        self._spec = codec.servable_spec(servable_name, method_name, version_number)
        self._raise_errors = raise_errors
        target = channel.target(address)
        if ssl_config is None:
            self._channel = grpc.aio.insecure_channel(target, channel.OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, ssl_config.credentials(), channel.OPTIONS)
        self._stub = MSServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def infer(
        self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None
    ) -> codec.Reply:
        """Waits for the answer, `timeout` seconds at most; cancelling it tells the server."""
        try:
            request = codec.encode_request(self._spec, instances)
            reply = await self._stub.Predict(request, timeout=timeout)
        except ShardserveError as error:
            return codec.failed(error, self._raise_errors)
        except grpc.aio.AioRpcError as error:
            trailers = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata())
            return codec.failed(codec.from_status(error.code(), error.details(), trailers), self._raise_errors)
        return codec.decode_reply(reply, self._raise_errors)

    def infer_async(
        self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None
    ) -> asyncio.Task[codec.Reply]:
        """The call as a task of the running loop: `await` it, or use `result()` once it is done."""
        return asyncio.get_running_loop().create_task(self.infer(instances, timeout))

    async def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
