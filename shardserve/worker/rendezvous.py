"""The key-value store in which the ranks of a generation find each other: what gloo and NCCL call a rendezvous store.

Its calls come over the agents' own connections, so nothing listens for it and no one else can reach it. It lives and
dies with a generation. Semantics: those of torch.distributed.Store.
"""

from __future__ import annotations

from collections.abc import Callable

from shardserve.wire.frames import FrameError
from shardserve.wire.messages import group

Respond = Callable[[bytes], None]


class Rendezvous:
    """One generation's keys, and the calls that wait for some of them."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: list[tuple[tuple[str, ...], Respond, bool]] = []

    def call(self, message: group.StoreCall, answer: Respond) -> None:
        """Answers now or, for `get` and `wait`, when the keys are there. FrameError for an operation that isn't one."""
        key = message.keys[0] if message.keys else ""
        match message.operation:
            case "set":
                answer(b"")
                self._put(key, message.value)
            case "get":
                self._await((key,), answer, gives_value=True)
            case "wait":
                self._await(message.keys, answer, gives_value=False)
            case "check":
                answer(b"1" if self._has(message.keys) else b"0")
            case "add":
                total = str(int(self._values.get(key, b"0")) + int(message.value)).encode()
                answer(total)
                self._put(key, total)
            case "delete":
                answer(b"1" if self._values.pop(key, None) is not None else b"0")
            case operation:
                raise FrameError(f"the rendezvous store has no operation {operation!r}")

    def _has(self, keys: tuple[str, ...]) -> bool:
        return all(key in self._values for key in keys)

    def _await(self, keys: tuple[str, ...], answer: Respond, gives_value: bool) -> None:
        if self._has(keys):
            answer(self._values[keys[0]] if gives_value else b"")
        else:
            self._waiting.append((keys, answer, gives_value))

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = value
        waiting, self._waiting = self._waiting, []
        for keys, answer, gives_value in waiting:
            self._await(keys, answer, gives_value)
