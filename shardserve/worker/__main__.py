"""`python -m shardserve.worker CONTROL DISTRIBUTED LOCAL FRONT`: a Worker on four inherited descriptors.

CONTROL is the socketpair with the launcher, the others are listeners that the launcher keeps, so that whoever connects
while a Worker is being respawned waits in their backlog.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvloop

from shardserve.errors import InternalError, ShardserveError
from shardserve.log import configure_logging, servable_in_words, work_for
from shardserve.settings import Settings
from shardserve.wire.frames import Payload
from shardserve.wire.messages import launch
from shardserve.wire.process import control_of_parent, raise_descriptor_limit
from shardserve.wire.stream import FrameStream
from shardserve.worker.worker import Worker

logger = logging.getLogger(__name__)


async def run(control: socket.socket, listeners: list[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    worker: Worker | None = None

    async def serve(message: launch.Serve) -> None:
        nonlocal worker
        work_for(servable_in_words(message.servable_name, message.version))
        try:
            worker = Worker(message, Settings.from_environment(), stream)
            stream.send(launch.Loaded())
            await worker.start(*listeners)
        except ShardserveError as error:
            stream.send(launch.Refused(message.order, type(error).__name__, str(error)))
        except Exception as error:
            logger.exception("the Worker can't start")
            text = f"{type(error).__name__}: {error}"
            stream.send(launch.Refused(message.order, InternalError.__name__, text))

    async def stop(message: launch.Stop) -> None:
        if worker is not None:
            await worker.stop()
        stream.send(launch.Done(message.order))
        stream.close()

    tasks = set()

    def on_frame(message: launch.ToWorker, payload: Payload) -> None:
        if isinstance(message, launch.Ping):
            stream.send(launch.Pong())
            return
        task = loop.create_task(serve(message) if isinstance(message, launch.Serve) else stop(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def on_lost(reason: Exception | None) -> None:
        if not ended.done():
            ended.set_result(None)

    stream: FrameStream[launch.ToWorker] = FrameStream(launch.ToWorker, on_frame, on_lost)
    await loop.create_connection(lambda: stream, sock=control)
    await ended


def main() -> None:
    control = control_of_parent(int(sys.argv[1]))
    # The launcher drives the stop; a Ctrl-C reaches every process of the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("worker")
    raise_descriptor_limit()
    uvloop.run(run(control, [socket.socket(fileno=int(fd)) for fd in sys.argv[2:]]))


if __name__ == "__main__":
    main()
