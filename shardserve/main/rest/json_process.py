"""`python -m shardserve.main.rest.json_process FD`: reads and writes large JSON bodies for Main, on its end of a
socketpair.

In a process, not in a thread: reading JSON and making arrays of it holds the interpreter's lock all the time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import sys

from shardserve.errors import InternalError, ShardserveError, from_wire
from shardserve.log import configure_logging
from shardserve.main.rest import codec
from shardserve.main.router import check_strings
from shardserve.main.servable import Result
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import Buffer, Payload, split
from shardserve.wire.messages import Message, bodies, front
from shardserve.wire.process import control_of_parent

logger = logging.getLogger(__name__)


def serve(connection: FrameSocket[bodies.ToProcess]) -> None:
    """Answers one request after the other; EOFError or OSError when Main is gone."""
    while True:
        message, payload = connection.receive()
        try:
            answer, buffers = _answer(message, payload)
        except ShardserveError as error:
            answer, buffers = bodies.Refused(message.request, type(error).__name__, str(error)), []
        except Exception:
            logger.exception("a body could not be handled")
            bug = InternalError("a bug in the server; its log has the traceback")
            answer, buffers = bodies.Refused(message.request, type(bug).__name__, str(bug)), []
        del payload
        connection.send(answer, buffers)


def _answer(message: bodies.ToProcess, payload: Payload) -> tuple[Message, list[Buffer]]:
    if isinstance(message, bodies.WriteBody):
        body = codec.encode_reply(results_of(message.results, payload))
        return bodies.Written(message.request, len(body)), [body]
    body = b"".join(map(bytes, split(payload, message.pieces)))
    instances: list[front.Instance | front.InstanceError] = []
    buffers: list[Buffer] = []
    decoded = codec.decode_request(body, message.dtypes, message.max_instances)
    check_strings(decoded)  # Main would, but what describes them has to get there.
    for instance in decoded:
        if isinstance(instance, ShardserveError):
            instances.append(front.InstanceError(type(instance).__name__, str(instance)))
        else:
            instances.append(instance[0])
            buffers += instance[1]
    return bodies.Read(message.request, instances), buffers


def results_of(results: list[front.InstanceOutputs | front.InstanceError], payload: Payload) -> list[Result]:
    """The results that a message describes; FrameError if the payload has another size."""
    outputs = [result.outputs for result in results if isinstance(result, front.InstanceOutputs)]
    parts = iter(split(payload, [meta.nbytes for metas in outputs for meta in metas.values()]))
    return [
        (result.outputs, list(itertools.islice(parts, len(result.outputs))))
        if isinstance(result, front.InstanceOutputs)
        else from_wire(result.error, result.message)
        for result in results
    ]


def main(fd: int) -> None:
    control = control_of_parent(fd)
    # The launcher drives the stop; a Ctrl-C reaches every process of the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("json")
    with contextlib.suppress(EOFError, OSError):
        serve(FrameSocket(control, bodies.ToProcess))


if __name__ == "__main__":
    main(int(sys.argv[1]))
