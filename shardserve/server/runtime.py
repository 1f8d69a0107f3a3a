"""The background thread of a serving script: the launcher and this host's supervisors run in its asyncio loop.

The thread isn't a daemon: a script that has started a server stays up when its last line has run, until a signal or
`stop`. SIGINT and SIGTERM, where the script has no handler of its own, stop everything; a second one does so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

from shardserve.errors import ShardserveError, StartError
from shardserve.log import log_in_scripts
from shardserve.settings import warn_of_unknown

T = TypeVar("T")
R = TypeVar("R", bound="Resident")

STOPPED = "the server was stopped meanwhile"


class Resident(Protocol):
    """Something that lives in the thread: `run` is its life, `stop` asks for its end.

    needs_others: it ends before those that it needs are asked to (a server's last requests need the agents). failure:
    why it ended, if nobody asked it to.
    """

    needs_others: bool
    failure: ShardserveError | None

    async def run(self) -> None: ...
    def stop(self) -> None: ...


class RuntimeEnded(StartError):
    """The last resident has ended meanwhile."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class Runtime:
    """One for the process, as long as any resident lives."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._residents: list[Resident] = []
        self._idle: asyncio.Event | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardserve")
        self._stopping = False
        self.failure: ShardserveError | None = None
        self._signals = 0
        self._unable: Exception | None = None

    def start(self) -> None:
        """StartError without the descriptors and memory that it needs."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._unable = error
        else:
            self._started.wait()
        if self._unable is not None:
            raise StartError(f"the background thread of this process can't be started: {self._unable}")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    def _run(self) -> None:
        main = self._main()
        try:
            asyncio.run(main)
        except OSError as error:
            # There are no descriptors left for an event loop; what runs in it lets no OSError out.
            main.close()
            self._unable = error
            self._started.set()
        finally:
            self._done.set()
        if self.failure is not None and not threading.main_thread().is_alive():
            # The script's last line has run: only the exit code can still say that its service failed.
            sys.stderr.flush()
            os._exit(1)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._started.set()
        if self._stopping:
            self._stop_residents()
        while not self._ended:
            await self._idle.wait()
            self._idle.clear()
            with self._lock:
                self._ended = not self._residents
        # One turn for what was scheduled before the end, so that it can say that it was too late.
        await asyncio.sleep(0)

    def houses(self, resident: Resident) -> bool:
        return resident in self._residents

    def settle(self, make: Callable[[], R]) -> R:
        """Makes a resident in the thread and lets it live there. RuntimeEnded if the thread has none any more."""

        async def settle() -> R:
            assert self._idle is not None
            if self._ended:
                raise RuntimeEnded
            try:
                resident = make()
                self._residents.append(resident)
            finally:
                # Without any resident nothing would ever end this thread, and with it the script.
                if not self._residents:
                    self._idle.set()
            task = asyncio.ensure_future(self._live(resident))
            task.add_done_callback(_raise_in_loop)
            return resident

        return self.call(settle())

    async def _live(self, resident: Resident) -> None:
        assert self._idle is not None
        try:
            await resident.run()
        finally:
            self.failure = self.failure or resident.failure
            self._residents.remove(resident)
            if not self._residents:
                self._idle.set()
            elif self._stopping or self.failure is not None:
                self._stop_residents()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the thread and waits for its result. StartError if all is stopped meanwhile."""
        return self.begin(work).result()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine in the thread; the future's errors as those of `call`. RuntimeEnded if it was stopped."""

        async def guarded() -> T:
            try:
                return await work
            except asyncio.CancelledError:
                raise StartError(STOPPED) from None

        with self._lock:
            if not self._ended:
                assert self._loop is not None
                return asyncio.run_coroutine_threadsafe(guarded(), self._loop)
        work.close()
        raise RuntimeEnded

    def request_stop(self) -> None:
        """Asks every resident to end; returns at once, from any thread or signal handler."""
        # Set before `_loop` is read: a thread that is just being started either sees this, or has set its loop.
        self._stopping = True
        if self._loop is None:
            return
        # Without the lock, which may be held where a signal handler runs.
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._stop_residents)

    def _stop_residents(self) -> None:
        if not self._residents:
            # A signal has interrupted the call that was going to bring the first resident.
            assert self._idle is not None
            self._idle.set()
        first = [resident for resident in self._residents if resident.needs_others]
        for resident in first or list(self._residents):
            resident.stop()

    def join(self) -> None:
        """Waits until the last resident has ended; raises why, if nobody asked it to."""
        self.wait()
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Waits until the last resident has ended; not in the thread where they live, nor for one that never began."""
        if threading.current_thread() is self._thread or self._thread.ident is None:
            return
        # Not Thread.join: up to Python 3.12 one that a signal handler's exception interrupts takes the thread for ended
        # (bpo-45274), and the interpreter would no longer wait for it.
        self._done.wait()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            # The children die with this process.
            os._exit(128 + number)
        self.request_stop()
        # After the script's last line its main thread only waits for ours to end.
        if threading.main_thread().is_alive():
            raise SystemExit(0)


_runtime: Runtime | None = None


def _living_runtime() -> Runtime:
    """The process's runtime, started if there is none. Somebody has to settle there: nothing else ends it."""
    global _runtime
    if _runtime is None or not _runtime.alive:
        log_in_scripts()
        if _runtime is None:
            warn_of_unknown()
        _runtime = Runtime()
        # Before the start: otherwise a signal that comes before the first resident would leave the thread running for
        # ever.
        _handle_signals(_runtime)
        _stop_on_uncaught(_runtime)
        _runtime.start()
    return _runtime


def settle(make: Callable[[], R]) -> tuple[R, Runtime]:
    """Makes a resident of the process's runtime: of the next, if the present one is just ending."""
    while True:
        runtime = _living_runtime()
        try:
            return runtime.settle(make), runtime
        except RuntimeEnded:
            runtime.wait()


def stop() -> None:
    """Stops all servers and agents that this process started: requests under way get stop_grace, then all ends."""
    if _runtime is not None:
        _runtime.request_stop()
        _runtime.wait()


def join() -> None:
    """Waits until all servers and agents of this process have ended; raises why, if nobody asked them to."""
    if _runtime is not None:
        _runtime.join()


def _handle_signals(runtime: Runtime) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        ours = getattr(handler, "__func__", None) is Runtime.on_signal
        # SIG_IGN, too: shells start background jobs with SIGINT ignored, and a server has to end on either.
        if handler in (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN) or ours:
            signal.signal(number, runtime.on_signal)


def _stop_on_uncaught(runtime: Runtime) -> None:
    """A script that ends with an exception must not stay up for the servers that it had started before."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        runtime.request_stop()
        previous(kind, value, traceback)

    sys.excepthook = hook


def _raise_in_loop(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        task.get_loop().call_exception_handler({"message": "a resident failed", "exception": task.exception()})
