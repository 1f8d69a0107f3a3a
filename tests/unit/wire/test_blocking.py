import contextlib
import os
import socket
import threading

import numpy as np
import pytest

from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import PREFIX, FrameError
from shardserve.wire.messages import Generation, group

pytestmark = pytest.mark.usefixtures("nothing_left")
G = Generation(1, 1)


@pytest.fixture
def pair():
    with contextlib.ExitStack() as stack:
        ends = [FrameSocket(end, group.OnStageLink) for end in socket.socketpair()]
        for end in ends:
            stack.callback(end.close)
        yield ends


class Thread(threading.Thread):
    """`join` raises what the thread raised."""

    def __init__(self, target, *args):
        super().__init__(daemon=True)
        self._call, self._error, self.value = (target, args), None, None
        self.start()

    def run(self):
        try:
            self.value = self._call[0](*self._call[1])
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            self._error = error

    def join(self):
        super().join(30)
        assert not self.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self.value


def test_frames_in_order(pair):
    ours, theirs = pair
    for step in range(50):
        ours.send(group.Transfer(G, step), [bytes([step]) * step])
    for step in range(50):
        message, payload = theirs.receive()
        assert message == group.Transfer(G, step)
        assert bytes(payload[:step]) == bytes([step]) * step


def test_both_ways_at_once(pair):
    """More than the kernel holds, so `sendmsg` takes it in parts."""
    data = np.arange(3_000_000, dtype=np.int64)

    def talk(end):
        sender = Thread(end.send, group.Transfer(G, 1), [data.data, b"", data.data, b"end"])
        message, payload = end.receive()
        sender.join()
        return message, payload

    threads = [Thread(talk, end) for end in pair]
    for thread in threads:
        message, payload = thread.join()
        assert message == group.Transfer(G, 1)
        assert np.array_equal(payload[: data.nbytes].view(np.int64), data)
        assert np.array_equal(payload[data.nbytes : 2 * data.nbytes].view(np.int64), data)
        assert bytes(payload[2 * data.nbytes :][:3]) == b"end"


def test_frames_of_several_threads_do_not_mix(pair):
    ours, theirs = pair

    def send(number):
        for step in range(50):
            ours.send(group.Transfer(Generation(number, step), step), [bytes([number]) * 20_000])

    senders = [Thread(send, number) for number in range(4)]
    steps = [0] * 4
    for _ in range(200):
        message, payload = theirs.receive()
        number = message.generation.incarnation
        assert message.step == steps[number]
        steps[number] += 1
        assert (payload[:20_000] == number).all()
    for sender in senders:
        sender.join()


def test_a_frame_of_many_tensors(pair):
    ours, theirs = pair
    # The kernel takes 1024 pieces at a time (IOV_MAX), and each tensor is two: its bytes and its padding.
    sender = Thread(ours.send, group.Transfer(G, 1), [bytes([i % 256]) for i in range(3000)])
    _, payload = theirs.receive()
    sender.join()
    assert payload[::64].tolist() == [i % 256 for i in range(3000)]


def test_the_other_side_closes(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(EOFError, match=r"the connection ended"):
        ours.receive()
    with pytest.raises(BrokenPipeError):
        ours.send(group.Transfer(G, 1))


def test_the_other_side_closes_within_a_frame():
    end, raw = socket.socketpair()
    ours = FrameSocket(end, group.OnStageLink)
    raw.sendall(PREFIX.pack(100, 1000))
    raw.close()
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()


def test_junk():
    end, raw = socket.socketpair()
    ours = FrameSocket(end, group.OnStageLink)
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(FrameError, match=r"over the limit of this connection"):
        ours.receive()
    raw.close()
    ours.close()


def _waits(thread):
    """Returns when the thread sleeps in the kernel."""
    while True:
        with open(f"/proc/{os.getpid()}/task/{thread.native_id}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "S":
                return


def test_close_ends_a_receive_of_another_thread(pair):
    ours, _ = pair
    receiving = Thread(ours.receive)
    _waits(receiving)
    ours.close()
    with pytest.raises((EOFError, OSError)):
        receiving.join()
    with pytest.raises(OSError, match=r"Bad file descriptor"):
        ours.receive()


def test_close_ends_a_send_of_another_thread(pair):
    ours, _ = pair
    sending = Thread(ours.send, group.Transfer(G, 1), [bytes(50_000_000)])
    _waits(sending)
    ours.close()
    with pytest.raises(OSError, match=r"Broken pipe|Bad file"):
        sending.join()
    ours.close()


def test_timeout(pair):
    ours, theirs = pair
    ours.set_timeout(0.05)
    with pytest.raises(TimeoutError):
        ours.receive()
    ours.set_timeout(None)
    theirs.send(group.Transfer(G, 3))
    assert ours.receive()[0].step == 3


class Held:
    """A socket whose `recv_into` returns only when the test lets it."""

    def __init__(self, end):
        self.end, self.received, self.go = end, threading.Event(), threading.Event()

    def recv_into(self, buffer):
        count = self.end.recv_into(buffer)
        self.received.set()
        self.go.wait(30)
        return count

    def __getattr__(self, name):
        return getattr(self.end, name)


def test_a_descriptor_stays_with_the_thread_that_is_inside():
    end, other = socket.socketpair()
    held = Held(end)
    frames = FrameSocket(held, group.OnStageLink)
    receiving = Thread(frames.receive)
    _waits(receiving)
    frames.close()
    assert held.received.wait(30)
    assert end.fileno() != -1
    held.go.set()
    with pytest.raises(EOFError):
        receiving.join()
    assert end.fileno() == -1
    other.close()
