import contextlib
import logging
import socket

import numpy as np
import pytest
import torch
from certificates import Authority

from shardserve.agent.lifetime import GenerationEnded, Lifetime
from shardserve.agent.stage_link import PURPOSE, IncomingLink, LinkBroken, OutgoingLink
from shardserve.errors import JoinRefused
from shardserve.settings import Settings
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import Generation, group
from shardserve.wire.messages.launch import SecurityFiles, TLSFiles
from shardserve.wire.security import Admission, Security, perform_handshake
from shardserve.wire.sockets import Address, listen_tcp

from .test_stage_link import Running

pytestmark = pytest.mark.usefixtures("nothing_left")
NOW, OLD = Generation(3, 2), Generation(3, 1)
SECRET = Security(b"a secret")


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("tls") / "ca")
    certificate, key = map(str, authority.certificate("a", "127.0.0.1"))
    return Security.load(SecurityFiles(None, TLSFiles(certificate, key, str(authority.custom_ca), True)))


class Stage:
    def __init__(self, port, security, **settings):
        self.address = Address("127.0.0.1", port)
        self.listener = listen_tcp(self.address, "test")
        self.security, self.settings = security, Settings(**settings)
        self.ending = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ending.close()
        self.listener.close()

    def lifetime(self):
        lifetime = Lifetime(NOW)
        self.ending.callback(lifetime.end)
        return lifetime

    def accept(self, lifetime, timeout=20.0):
        return Running(IncomingLink, [self.listener], lifetime, timeout, self.settings, self.security)

    def outgoing(self, lifetime, security=None):
        return OutgoingLink(self.address, 1, lifetime, 20.0, pytest.fail, self.settings, security or self.security)

    def hello(self, generation):
        """A peer that is admitted and says this hello."""
        connection = socket.create_connection(self.address)
        self.ending.callback(connection.close)
        frames = FrameSocket(
            perform_handshake(connection, Admission(self.security, PURPOSE, 20.0, self.address)), group.OnStageLink
        )
        frames.send(group.StageHello(generation, 1))
        return frames


@pytest.mark.parametrize("kind", ["secret", "tls"])
def test_tensors_arrive_once_both_have_proved_themselves(free_port, tls, kind):
    with Stage(free_port, {"secret": SECRET, "tls": tls}[kind]) as stage:
        sender, receiver = stage.lifetime(), stage.lifetime()
        accepting = stage.accept(receiver)
        outgoing = stage.outgoing(sender)
        incoming = accepting.result()
        large = torch.arange(5_000_000, dtype=torch.float32)
        for step in range(3):
            outgoing.send(step, [large + step])
        for step in range(3):
            assert np.array_equal(incoming.receive(step).view(np.float32), (large + step).numpy())


def test_strangers_keep_nobody_out(free_port, caplog):
    caplog.set_level(logging.WARNING)
    with Stage(free_port, SECRET, max_joining=2) as stage:
        accepting = stage.accept(stage.lifetime())
        silent = [socket.create_connection(stage.address) for _ in range(5)]
        with pytest.raises(JoinRefused, match=f"^the stage link at {stage.address}: wrong join secret$"):
            stage.outgoing(stage.lifetime(), Security(b"another"))
        talker = socket.create_connection(stage.address)
        talker.sendall(b"GET / HTTP/1.1\r\n\r\n")
        old = Running(stage.hello, OLD)
        old.result()
        outgoing = stage.outgoing(stage.lifetime())
        incoming = accepting.result()
        outgoing.send(0, [torch.ones(2)])
        assert incoming.receive(0).view(np.float32)[:2].tolist() == [1, 1]
        for connection in (*silent, talker):
            connection.close()
    assert "stage link: refused 127.0.0.1" in caplog.text
    assert "wrong join secret" in caplog.text


def test_the_end_of_the_generation_ends_the_wait_to_be_admitted(free_port):
    with Stage(free_port, SECRET) as stage:
        lifetime = stage.lifetime()
        connecting = Running(stage.outgoing, lifetime).sleeps()
        lifetime.end()
        with pytest.raises(GenerationEnded):
            connecting.result()


def test_only_strangers_come(free_port):
    with Stage(free_port, SECRET) as stage, socket.create_connection(stage.address):
        accepting = stage.accept(stage.lifetime(), timeout=0.2)
        with pytest.raises(LinkBroken, match=r"did not connect within 0.2 s"):
            accepting.result()
