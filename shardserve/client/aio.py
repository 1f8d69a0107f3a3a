"""The same client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import cast

import grpc

from shardserve.client import channel, codec
from shardserve.client.method import MethodClient
from shardserve.errors import ShardserveError


def _is_cancelled(task: asyncio.Task[object] | None) -> bool:
    """Whether somebody cancelled this task; Python 3.10 doesn't know, and then it may have been."""
    return task is None or not hasattr(task, "cancelling") or task.cancelling() > 0


class AsyncClient(MethodClient[grpc.aio.Channel]):
    """`Client` with coroutines: `await client.infer(…)`; made and used inside one event loop.

    `infer_async` starts the call and returns a task, so that code reads the same with both.
    """

    def _connect(self, address: str, ssl_config: channel.SSLConfig | None) -> grpc.aio.Channel:
        return channel.connect_async(address, ssl_config)

    async def infer(
        self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None
    ) -> codec.Reply:
        """Waits for the answer, `timeout` seconds at most; cancelling it tells the server."""
        seconds = channel.seconds(timeout)
        self._check_open()
        try:
            request = codec.encode_request(self._spec, instances)
            reply = await self._predict(request, timeout=seconds)
        except ShardserveError as error:
            return codec.failed(error, self._raise_errors)
        except grpc.aio.AioRpcError as error:
            trailers = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata())
            return codec.failed(codec.from_status(error.code(), error.details(), trailers), self._raise_errors)
        except asyncio.CancelledError:
            # grpc says it so, too, when the channel is closed under a call.
            if not self._closed or _is_cancelled(asyncio.current_task()):
                raise
            return codec.failed(codec.cancelled(), self._raise_errors)
        return codec.decode_reply(reply, self._raise_errors)

    def infer_async(
        self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None
    ) -> asyncio.Task[codec.Reply]:
        """The call as a task of the running loop: `await` it, or use `result()` once it is done."""
        return asyncio.get_running_loop().create_task(self.infer(instances, timeout))

    async def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        self._closed = True
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
