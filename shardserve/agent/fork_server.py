"""`python -m shardserve.agent.fork_server FD`: imports torch, stays single-threaded, opens no device, forks agents."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from typing import NoReturn

import msgspec

from shardserve.agent.agent import run_agent
from shardserve.agent.forking import MESSAGE_LIMIT, EndingReply, ForkReply, ForkRequest, ToForkServer
from shardserve.log import configure_logging
from shardserve.wire.process import control_of_parent, die_with_parent, raise_descriptor_limit


def serve(control: socket.socket) -> None:
    """Forks on request until the supervisor's end of `control` is closed. Reaps what it forked."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    codes: dict[int, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is control:
                data, fds, _, _ = socket.recv_fds(control, MESSAGE_LIMIT, 1)
                if not data:
                    return
                request: ToForkServer = msgspec.msgpack.decode(data, type=ToForkServer)
                if isinstance(request, ForkRequest):
                    fork(control, request, fds[0] if fds else None, (wake_read, wake_write))
                    continue
                # The supervisor may have seen its end before this process has.
                reap(codes)
                control.send(msgspec.msgpack.encode(EndingReply(codes.pop(request.pid, None))))
            else:
                os.read(wake_read, 4096)
                reap(codes)


def fork(control: socket.socket, request: ForkRequest, shared_memory: int | None, own: tuple[int, ...]) -> None:
    """Forks an agent and replies; without memory or descriptors for one, replies why and lives on for the others."""
    parent = os.getpid()
    with contextlib.ExitStack() as stack:
        if shared_memory is not None:
            stack.callback(os.close, shared_memory)
        pid = 0
        try:
            words_read, words_write = os.pipe()
            stack.callback(os.close, words_read)
            stack.callback(os.close, words_write)
            pid = os.fork()
            if pid == 0:
                # Leaves by os._exit: the stack's callbacks are the fork server's.
                live(parent, control, request, shared_memory, words_write, (*own, words_read))
            # Nobody reaps the child before this loop turns again, so the pid is still its own.
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            socket.send_fds(control, [msgspec.msgpack.encode(ForkReply(pid))], [pidfd, words_read])
        except OSError as error:
            if pid:
                os.kill(pid, signal.SIGKILL)
            control.send(msgspec.msgpack.encode(ForkReply(0, str(error))))


def live(
    parent: int,
    control: socket.socket,
    request: ForkRequest,
    shared_memory: int | None,
    last_words: int,
    own: tuple[int, ...],
) -> NoReturn:
    """The whole life of a forked agent."""
    code = 1
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for fd in own:
            os.close(fd)
        code = run_agent(request, shared_memory, last_words)
    finally:
        # Not sys.exit: the fork server's stack and its exit handlers are not the agent's.
        sys.stderr.flush()
        os._exit(code)


def reap(codes: dict[int, int]) -> None:
    """Notes, by its pid, how each agent that has ended did."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        codes[pid] = os.waitstatus_to_exitcode(status)


def main() -> None:
    control = control_of_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("agent")
    raise_descriptor_limit()
    # Objects of the parent that the collector never touches again stay shared with the children.
    gc.collect()
    gc.freeze()
    serve(control)


if __name__ == "__main__":
    main()
