"""What PyTorch logs and prints of its own while a model is loaded and traced: left out, as its errors say it too."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from shardserve.settings import Settings

_GRAPH = "\ndef forward(self, "


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Within it PyTorch logs errors only, and the graphs that it prints on stderr when it gives up aren't shown.

    All is shown if the setting log_level is DEBUG or INFO, or TORCH_LOGS is set.
    """
    if Settings.from_environment().log_level in ("DEBUG", "INFO") or "TORCH_LOGS" in os.environ or sys.stderr is None:
        yield
        return
    from torch._logging import _internal

    _internal.set_logs(all=logging.ERROR)
    try:
        with contextlib.redirect_stderr(cast(TextIO, _WithoutGraphs(sys.stderr))):
            yield
    finally:
        _internal.set_logs()


class _WithoutGraphs:
    """A stream that leaves out the graphs printed to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._left_out = False

    def write(self, text: str) -> int:
        # print() writes its newline in a call of its own.
        left_out = _GRAPH in text or (self._left_out and text == "\n")
        self._left_out = _GRAPH in text
        return len(text) if left_out else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
