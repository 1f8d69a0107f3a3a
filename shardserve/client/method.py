"""What both clients have in common: the method that they call and how they were made."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from shardserve.client import channel, codec
from shardserve.errors import ConfigError
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceStub

C = TypeVar("C")


class MethodClient(ABC, Generic[C]):
    """Calls one method of one servable through a channel of type C.

    address: ip:port, name:port or unix:path. version_number: 0 is the latest. An argument that is wrong here or in a
    call (`timeout`) is a ConfigError, also without `raise_errors`.
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
        self._closed = False
        self._where = address, ssl_config
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._channel = self._connect(*self._where)
        # Any: the stub's type is that of grpc's blocking channels.
        self._predict: Any = MSServiceStub(self._channel).Predict  # type: ignore[no-untyped-call]

    @abstractmethod
    def _connect(self, address: str, ssl_config: channel.SSLConfig | None) -> C: ...

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(f"the client of {self._spec.name}.{self._spec.method_name} is closed")
        if os.getpid() != self._process:
            # The parent's connection is of no use to a process that was forked from it.
            self._open()
