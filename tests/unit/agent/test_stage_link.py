import contextlib
import os
import queue
import socket
import threading
import time
import weakref

import numpy as np
import psutil
import pytest
import torch

from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.stage_link import IncomingLink, LinkBroken, OutgoingLink
from shardserve.settings import Settings
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import NoMemory
from shardserve.wire.messages import Generation, group
from shardserve.wire.security import Security
from shardserve.wire.sockets import Address, connect, listen_abstract, listen_tcp, twin_name

pytestmark = pytest.mark.usefixtures("nothing_left")
NOW, OLD = Generation(3, 2), Generation(3, 1)


class Stage:
    """The listeners of an agent and what runs in threads of this test."""

    def __init__(self, port, twin=True):
        self.address = Address("127.0.0.1", port)
        self.listeners = [listen_tcp(self.address, "test")]
        # By TCP nobody is taken unless it is said that anybody may.
        self.security = Security(insecure=not twin)
        if twin:
            self.listeners.append(listen_abstract(twin_name(self.address)))
        self.ending = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ending.close()
        for listener in self.listeners:
            listener.close()

    def lifetime(self, generation=NOW):
        lifetime = Lifetime(generation)
        self.ending.callback(lifetime.end)
        return lifetime

    def accept(self, lifetime, timeout=20.0):
        return Running(IncomingLink, self.listeners, lifetime, timeout, Settings(), self.security)

    def pair(self, on_failure=print):
        sender, receiver = self.lifetime(), self.lifetime()
        outgoing = OutgoingLink(self.address, 1, sender, 20.0, on_failure, Settings(), self.security)
        return outgoing, self.accept(receiver).result(), sender, receiver

    def stranger(self, *frames):
        frame_socket = FrameSocket(connect(self.address, 10), group.OnStageLink)
        self.ending.callback(frame_socket.close)
        for message in frames:
            frame_socket.send(message)
        return frame_socket


class Running:
    """A call in another thread."""

    def __init__(self, function, *args):
        self._outcome = None
        self._thread = threading.Thread(target=self._run, args=(function, *args))
        self._thread.start()

    def _run(self, function, *args):
        try:
            self._outcome = True, function(*args)
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            self._outcome = False, error

    def result(self):
        self._thread.join(30)
        assert self._outcome is not None, "it still waits"
        good, value = self._outcome
        if not good:
            raise value
        return value

    def sleeps(self):
        """Returns when the thread waits in the kernel."""
        thread = f"/proc/self/task/{self._thread.native_id}/stat"
        while True:
            with open(thread) as stat:
                if stat.read().rpartition(")")[2].split()[0] == "S":
                    return self
            time.sleep(0.005)


def floats(payload):
    return payload.view(np.float32)


def test_tensors_without_memory_for_them_come_as_that_in_their_turn(free_port):
    def allocate(size):
        return np.empty(size if size < 1000 else 1 << 60, np.uint8)

    with Stage(free_port) as stage:
        sender, receiver = stage.lifetime(), stage.lifetime()
        outgoing = OutgoingLink(stage.address, 1, sender, 20.0, print)
        incoming = Running(IncomingLink, stage.listeners, receiver, 20.0, Settings(), stage.security, allocate).result()
        for step, size in enumerate([10, 1000, 10]):
            outgoing.send(step, [torch.full((size,), float(step))])
        payloads = [incoming.receive(step) for step in range(3)]
        assert isinstance(payloads.pop(1), NoMemory)
        assert [floats(payload)[0] for payload in payloads] == [0, 2]


@pytest.mark.parametrize("twin", [True, False])
def test_tensors_arrive_in_order(free_port, twin):
    with Stage(free_port, twin) as stage:
        outgoing, incoming, _, _ = stage.pair()
        for step in range(200):
            outgoing.send(step, [torch.full((step,), float(step)), torch.tensor(7)])
        for step in range(200):
            payload = incoming.receive(step)
            assert (floats(payload)[:step] == step).all()
            assert payload[-64] == 7
            assert len(payload) == -(-4 * step // 64) * 64 + 64


def test_a_large_payload_does_not_hold_up_its_sender(free_port):
    with Stage(free_port, twin=False) as stage:
        outgoing, incoming, _, _ = stage.pair()
        large = torch.arange(25_000_000, dtype=torch.float32)
        # Nobody receives yet: the kernel takes a few MB, the thread of the link waits with the rest.
        outgoing.send(0, [large])
        outgoing.send(1, [large[:3]])
        assert np.array_equal(floats(incoming.receive(0)), large.numpy())
        assert floats(incoming.receive(1))[:3].tolist() == [0, 1, 2]


def test_step_out_of_order(free_port):
    with Stage(free_port) as stage:
        outgoing, incoming, _, _ = stage.pair()
        outgoing.send(4, [])
        with pytest.raises(LinkBroken, match=r"the previous pipeline stage is at step 4, this one at 3"):
            incoming.receive(3)


def test_the_end_of_the_generation_ends_a_receive(free_port):
    with Stage(free_port) as stage:
        _, incoming, _, receiver = stage.pair()
        receiving = Running(incoming.receive, 0).sleeps()
        receiver.end()
        with pytest.raises(GenerationEnded):
            receiving.result()
        with pytest.raises(GenerationEnded):
            incoming.receive(1)


def test_the_end_of_the_generation_ends_a_send_that_the_other_side_does_not_take(free_port):
    with Stage(free_port) as stage:
        outgoing, _incoming, sender, _ = stage.pair()
        # Its receiving thread takes all it gets, so this one is taken by nobody.
        deaf = OutgoingLink(stage.address, 1, sender, 20.0, print)
        for step in range(3):
            deaf.send(step, [torch.zeros(5_000_000)])
        outgoing.send(0, [torch.zeros(3)])
        sender.end()
        # Both threads leave, or `nothing_left` finds them; what comes too late is dropped.
        outgoing.send(1, [torch.zeros(3)])


def test_the_end_of_the_generation_ends_an_accept(free_port):
    with Stage(free_port) as stage:
        lifetime = stage.lifetime()
        accepting = stage.accept(lifetime).sleeps()
        lifetime.end()
        with pytest.raises(GenerationEnded):
            accepting.result()
        with pytest.raises(GenerationEnded):
            stage.accept(lifetime).result()


def test_the_end_of_the_generation_ends_the_wait_for_a_hello(free_port):
    with Stage(free_port) as stage:
        lifetime = stage.lifetime()
        stage.stranger()
        accepting = stage.accept(lifetime).sleeps()
        lifetime.end()
        began = time.monotonic()
        with pytest.raises(GenerationEnded):
            accepting.result()
        assert time.monotonic() - began < 5


def test_nobody_connects(free_port):
    with Stage(free_port) as stage, pytest.raises(LinkBroken, match=r"stage did not connect within 0.1 s"):
        stage.accept(stage.lifetime(), timeout=0.1).result()


def test_only_the_hello_of_this_generation_is_taken(free_port):
    with Stage(free_port) as stage:
        old = stage.stranger(group.StageHello(OLD, 1))
        newer = stage.stranger(group.StageHello(Generation(3, 3), 1))
        wrong = stage.stranger(group.Transfer(NOW, 0))
        gone = stage.stranger()
        gone.close()
        junk = connect(stage.address, 10)
        junk.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        accepting = stage.accept(stage.lifetime())
        for refused in (old, newer, wrong):
            with pytest.raises((EOFError, ConnectionResetError)):
                refused.receive()
        junk.close()
        right = stage.stranger(group.StageHello(NOW, 1), group.Transfer(NOW, 0))
        assert len(accepting.result().receive(0)) == 0
        right.close()


def test_who_comes_by_tcp_is_taken_only_where_anybody_may(free_port, caplog):
    with Stage(free_port) as stage:
        accepting = stage.accept(stage.lifetime())
        with contextlib.closing(FrameSocket(socket.create_connection(stage.address), group.ToAgent)) as stranger:
            stranger.send(group.StageHello(NOW, 1))
            text = "came by TCP, where only a secret or TLS can tell who it is: give join_secret_file"
            assert stranger.receive()[0] == group.Refuse("JoinRefused", text)
        OutgoingLink(stage.address, 1, stage.lifetime(), 20.0, print).send(0, [])
        assert len(accepting.result().receive(0)) == 0
    assert f": {text}" in caplog.text


def test_who_connects_and_is_silent_keeps_nobody_out(free_port):
    with Stage(free_port) as stage:
        silent = stage.stranger()
        half = connect(stage.address, 10)
        half.sendall(b"\x20\x00")
        stage.ending.callback(half.close)
        outgoing = OutgoingLink(stage.address, 1, stage.lifetime(), 20.0, print)
        incoming = stage.accept(stage.lifetime()).result()
        outgoing.send(0, [torch.ones(1)])
        assert floats(incoming.receive(0))[0] == 1
        with pytest.raises(EOFError):
            silent.receive()
        assert half.recv(1) == b""


def test_the_previous_stage_dies(free_port):
    with Stage(free_port) as stage:
        # In the kernel, so that it holds no lock that the child would have for ever.
        accepting = stage.accept(stage.lifetime()).sleeps()
        pid = os.fork()
        if pid == 0:
            try:
                OutgoingLink(stage.address, 1, Lifetime(NOW), 20.0, print).send(0, [torch.ones(1)])
                threading.Event().wait()
            finally:
                # Else it would run the rest of the tests, too.
                os._exit(1)
        incoming = accepting.result()
        incoming.receive(0)
        receiving = Running(incoming.receive, 1).sleeps()
        psutil.Process(pid).kill()
        os.waitpid(pid, 0)
        with pytest.raises(LinkBroken, match=r"the link from the previous pipeline stage broke: the connection ended"):
            receiving.result()


def test_the_next_stage_dies(free_port):
    with Stage(free_port) as stage:
        said = queue.SimpleQueue()
        outgoing, _, _, receiver = stage.pair(said.put)
        receiver.end()
        # The kernel takes some before it knows.
        outgoing.send(0, [torch.zeros(10_000_000)])
        outgoing.send(1, [torch.zeros(10_000_000)])
        assert said.get(timeout=30).startswith("the link to the next pipeline stage broke: ")


def test_nobody_listens(free_port):
    with pytest.raises(ConnectionRefusedError):
        OutgoingLink(Address("127.0.0.1", free_port), 1, Lifetime(NOW), 5.0, print)


def test_neither_end_waits_for_the_other(free_port):
    """More is under way than the kernel holds, and one thread has both ends."""
    with Stage(free_port) as stage:
        outgoing, incoming, _, _ = stage.pair()
        for step in range(20):
            outgoing.send(step, [torch.full((500_000,), float(step))])
        for step in range(20):
            assert (floats(incoming.receive(step)) == step).all()


def test_a_link_that_waits_holds_nothing_of_the_last_step(free_port):
    """What comes and goes may lie in memory that another process shares, and would have for nothing else meanwhile."""
    with Stage(free_port) as stage:
        outgoing, incoming, _, _ = stage.pair()
        tensor, sent, given_back = torch.ones(3), threading.Event(), threading.Event()
        weakref.finalize(tensor, sent.set)
        outgoing.send(0, [tensor])
        del tensor
        weakref.finalize(incoming.receive(0), given_back.set)
        assert sent.wait(30)
        assert given_back.wait(30)


def test_links_end_with_their_sockets(free_port):
    with Stage(free_port) as stage:
        before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
        for counter in range(20):
            sender, receiver = Lifetime(Generation(1, counter)), Lifetime(Generation(1, counter))
            accepting = stage.accept(receiver)
            OutgoingLink(stage.address, 1, sender, 20.0, print)
            accepting.result()
            sender.end()
            receiver.end()
        # A descriptor is closed by the last thread that uses it.
        for thread in set(threading.enumerate()) - threads:
            thread.join(30)
        assert len(os.listdir("/proc/self/fd")) == before
