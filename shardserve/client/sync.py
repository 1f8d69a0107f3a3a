"""The client for ordinary code: one method call, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc

from shardserve.client import channel, codec
from shardserve.client.method import MethodClient
from shardserve.errors import ShardserveError


class InferFuture:
    """The answer of an `infer_async`, once it's there."""

    def __init__(self, call: Any, raise_errors: bool, error: ShardserveError | None = None) -> None:
        self._call = call
        self._raise_errors = raise_errors
        self._error = error

    def result(self) -> codec.Reply:
        """Waits for the answer and gives what `Client.infer` gives."""
        if self._error is not None:
            return codec.failed(self._error, self._raise_errors)
        try:
            reply = self._call.result()
        except grpc.FutureCancelledError:
            return codec.failed(codec.cancelled(), self._raise_errors)
        except grpc.RpcError as error:
            return codec.failed(codec.from_rpc(error), self._raise_errors)
        return codec.decode_reply(reply, self._raise_errors)

    def done(self) -> bool:
        return self._call is None or bool(self._call.done())

    def cancel(self) -> None:
        """Tells the server that the answer isn't needed."""
        if self._call is not None:
            self._call.cancel()


class Client(MethodClient[grpc.Channel]):
    """Calls one method of one servable. address: host:port or unix:path; version_number 0: the latest.

    `infer` and `infer_async` take a dict of inputs or a list of such dicts, values numpy arrays, numbers, str or bytes
    (numbers are sent as int64 and float64 of shape (1,)). An instance that failed is `{"error": message}` in its place;
    a request that failed as a whole is the dict `{"error": message}`; with `raise_errors` both raise the class of
    `shardserve.errors` instead. Arguments that are wrong (address, names, timeout) are a ConfigError in any case.
    Threads may share a client. A server that comes back is found by itself, within a second or so.
    """

    def _connect(self, address: str, ssl_config: channel.SSLConfig | None) -> grpc.Channel:
        return channel.connect(address, ssl_config)

    def infer(self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None) -> codec.Reply:
        """Waits for the answer, `timeout` seconds at most; a server that can't be reached is an error at once."""
        return self.infer_async(instances, timeout).result()

    def infer_async(
        self, instances: codec.Instance | Sequence[codec.Instance], timeout: float | None = None
    ) -> InferFuture:
        """Sends the request and returns; errors of the input, too, come from `result()`."""
        seconds = channel.seconds(timeout)
        self._check_open()
        try:
            request = codec.encode_request(self._spec, instances)
        except ShardserveError as error:
            return InferFuture(None, self._raise_errors, error)
        try:
            return InferFuture(self._predict.future(request, timeout=seconds), self._raise_errors)
        except ValueError:
            self._check_open()  # Another thread closed it meanwhile.
            raise

    def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
