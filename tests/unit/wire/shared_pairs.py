"""Two ends of a connection with shared memory, for the tests of what goes through it."""

import contextlib
import socket
import threading

import msgspec

from shardserve.wire import segments as pools
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import FrameError
from shardserve.wire.shared import SMALLEST

LARGE = 4 * SMALLEST


class Note(msgspec.Struct, tag=True):
    number: int


class Pair:
    """Two ends of a connection; what the second receives is read by a thread of its own."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        self.ours, self.theirs = (FrameSocket(end, Note, share=True) for end in (ours, theirs))
        self.came = []
        self.error = None
        self.more = threading.Condition()
        self.threads = [threading.Thread(target=self.read), threading.Thread(target=self.answer)]
        for thread in self.threads:
            thread.start()

    def read(self):
        try:
            while True:
                message, payload = self.theirs.receive()
                with self.more:
                    self.came.append((message.number, payload))
                    # Or this thread would look at it until the next one comes.
                    del payload
                    self.more.notify()
        except (EOFError, OSError):
            pass
        except FrameError as error:
            self.error = error

    def answer(self):
        """Control records are all that comes back."""
        with contextlib.suppress(EOFError, OSError):
            self.ours.receive()

    def send(self, number, size=LARGE):
        self.ours.send(Note(number), [bytes([number % 256]) * size])

    def get(self):
        with self.more:
            assert self.more.wait_for(lambda: self.came, 10)
            return self.came.pop(0)

    def accepted(self):
        """Sends through the socket until the other side takes shared memory."""
        accepted = threading.Event()
        path = self.ours._shared
        control = path.control

        def hears(record):
            control(record)
            accepted.set()

        path.control = hears
        self.send(0)
        number, payload = self.get()
        assert (number, payload.flags.writeable) == (0, True)
        assert accepted.wait(30)
        assert path.accepted
        return self

    def close(self):
        self.ours.close()
        self.theirs.close()
        for thread in self.threads:
            thread.join(30)


def segments():
    return len(pools.pool()._segments)


def holds(payload, number):
    return bool((payload == number % 256).all())
