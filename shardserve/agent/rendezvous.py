"""torch.distributed's store over the agent's connection to the Worker, which keeps the keys of a generation.

Not TCPStore: that listens on every interface and knows no authentication.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed

from shardserve.agent.lifetime import Lifetime
from shardserve.wire.messages import group

# torch's stubs lack the store.
dist: Any = torch.distributed


class WorkerStore(dist.Store):  # type: ignore[misc]
    """What a ProcessGroup is given. prefix: keeps the groups of a generation apart.

    A call raises GenerationEnded when the generation ends meanwhile, TimeoutError after `timeout` seconds. Only the
    thread that made it may call: the answers of others, of which torch has some to tell errors around, would get mixed
    up with its own.
    """

    def __init__(
        self, send: Callable[[group.StoreCall], None], lifetime: Lifetime, prefix: str, timeout: float
    ) -> None:
        super().__init__()
        self._send = send
        self._lifetime = lifetime
        self._prefix = prefix
        self._timeout = timeout
        self._calls = 0
        self._thread = threading.get_ident()

    def _call(self, operation: str, keys: Sequence[str], value: bytes = b"") -> bytes:
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{operation} of {', '.join(keys)}: this store is for forming a group")
        self._calls += 1
        full = tuple(self._prefix + key for key in keys)
        self._send(group.StoreCall(self._lifetime.generation, self._calls, operation, full, value))
        reply = self._lifetime.await_answer(self._timeout)
        assert isinstance(reply, group.StoreReply)
        assert reply.call == self._calls
        return reply.value

    def set(self, key: str, value: str | bytes) -> None:
        self._call("set", (key,), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._call("get", (key,))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._call("wait", keys)

    def check(self, keys: list[str]) -> bool:
        return self._call("check", keys) == b"1"

    def add(self, key: str, amount: int) -> int:
        return int(self._call("add", (key,), str(amount).encode()))

    def delete_key(self, key: str) -> bool:
        return self._call("delete", (key,)) == b"1"
