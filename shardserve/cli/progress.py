"""Progress bars on a terminal, and only there."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shardserve.progress import Progress, quietly

REFRESH_SECONDS = 1.0
COLUMNS, ROWS = 80, 24
FORM = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed}"


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """A Progress that draws on stderr until it is left; if that is no terminal, one that does nothing."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield quietly
        return
    with logging_redirect_tqdm(), contextlib.closing(Bars()) as bars:
        yield bars.show


class Bars:
    """One bar at a time, for what is being done now; each vanishes when it is done, and all when closed."""

    def __init__(self) -> None:
        # Without a lock of its own, tqdm makes one for processes, too, and with it a helper process.
        tqdm.set_lock(threading.RLock())
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        self._what = ""
        self._closed = threading.Event()
        # Some terminals (those of scripts) don't say how large they are.
        sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._columns = None if sized else COLUMNS
        self._rows = None if sized else ROWS
        # Redraws the elapsed time while nothing else changes.
        self._clock = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._clock.start()

    def show(self, what: str, done: int, total: int) -> None:
        """The Progress that draws."""
        with self._lock:
            if self._closed.is_set():
                return
            bar = self._bar
            if bar is None or what != self._what:
                self._drop()
                self._what = what
                bar = self._bar = self._new(what, total)
            bar.total, bar.n = total, done
            bar.refresh()

    def _new(self, what: str, total: int) -> tqdm[Any]:
        return tqdm(
            desc=what,
            total=total,
            bar_format=FORM,
            leave=False,
            dynamic_ncols=self._columns is None,
            ncols=self._columns,
            nrows=self._rows,
        )

    def _tick(self) -> None:
        while not self._closed.wait(REFRESH_SECONDS):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()

    def _drop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._drop()
        self._clock.join()
