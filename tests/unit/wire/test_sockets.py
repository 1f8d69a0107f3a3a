import os
import socket
import threading
import time

import pytest
from strangers import stranger

from shardserve.errors import ConfigError, StartError
from shardserve.wire.sockets import (
    Address,
    connect,
    connect_within,
    is_local,
    listen_abstract,
    listen_tcp,
    parse_address,
    same_user,
    tune,
    twin_name,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:6200", Address("127.0.0.1", 6200)),
        ("node-3.example:1", Address("node-3.example", 1)),
        ("[::1]:65535", Address("::1", 65535)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text, "x") == address


def test_an_address_is_written_as_it_is_read():
    for text in ("127.0.0.1:6200", "[::1]:1"):
        assert str(parse_address(text, "x")) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "6200",
            ":6200",
            "host:",
            "host",
            "host:0",
            "host:65536",
            "host:-1",
            "host:http",
            "http://host:1",
            "a b:1",
        ),
        *("[::1:1", "host:1 ", "host:9999999999999999999999", 6200, None),
    ],
)
def test_text_that_is_no_address(text):
    with pytest.raises(ConfigError) as caught:
        parse_address(text, "distributed_address")
    assert str(caught.value) == f"distributed_address: {text!r} is not ip:port"


def test_local_peers_take_the_twin(free_port):
    address = Address("127.0.0.1", free_port)
    with listen_tcp(address, "test") as tcp, listen_abstract(twin_name(address)) as twin:
        with connect(address, 5) as ours, twin.accept()[0] as theirs:
            assert ours.family == theirs.family == socket.AF_UNIX
            assert same_user(ours)
            assert same_user(theirs)
            tune(ours)
            assert ours.getblocking()
        tcp.setblocking(False)
        with pytest.raises(BlockingIOError):
            tcp.accept()


def test_the_twin_of_an_address_is_found_by_its_name(free_port):
    address = Address("localhost", free_port)
    with (
        listen_tcp(address, "test") as tcp,
        listen_abstract(twin_name(Address(*tcp.getsockname()))),
        connect(address, 5) as ours,
    ):
        assert ours.family == socket.AF_UNIX


def test_without_a_twin_it_is_tcp(free_port):
    address = Address("127.0.0.1", free_port)
    with listen_tcp(address, "test") as tcp, connect(address, 5, local_only=False) as ours, tcp.accept()[0] as theirs:
        assert ours.family == socket.AF_INET
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert ours.gettimeout() is None
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"


def test_local_only_is_never_tcp(free_port):
    address = Address("127.0.0.1", free_port)
    said = f"whoever listens at {address} is no local process of this user or root, .* give both sides join_secret_file"
    with listen_tcp(address, "test"), pytest.raises(PermissionError, match=said):
        connect(address, 5)


def test_the_twin_of_another_user_is_none(free_port):
    address = Address("127.0.0.1", free_port)
    script = f"""
address = Address("127.0.0.1", {free_port})
with listen_tcp(address, "test"), listen_abstract(twin_name(address)):
    print(flush=True)
    os.read(0, 1)
"""
    with stranger(script) as process:
        assert process.stdout.readline()
        with pytest.raises(PermissionError):
            connect(address, 5)
        with connect(address, 5, local_only=False) as connection:
            assert connection.family == socket.AF_INET


def test_nobody_listens(free_port):
    with pytest.raises(ConnectionRefusedError):
        connect(Address("127.0.0.1", free_port), 5)


def test_a_listener_is_bound_to_its_address_alone(free_port):
    with listen_tcp(Address("127.0.0.1", free_port), "test"), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", free_port), 5)


def test_busy_port(free_port):
    address = Address("127.0.0.1", free_port)
    with listen_tcp(address, "test"), pytest.raises(StartError) as caught:
        listen_tcp(address, "distributed_address")
    assert str(caught.value) == f"distributed_address 127.0.0.1:{free_port}: the port is in use"


def test_a_name_is_looked_up(free_port):
    with listen_tcp(Address("localhost", free_port), "test") as listener:
        assert listener.getsockname() == ("127.0.0.1", free_port)
    with pytest.raises(StartError, match=r"^test no-such-host.invalid:1: "):
        listen_tcp(Address("no-such-host.invalid", 1), "test")
    with pytest.raises(StartError, match=r"^test \.\.:1: "):
        listen_tcp(Address("..", 1), "test")


def test_address_of_another_host(free_port):
    with pytest.raises(StartError, match=rf"test 192.0.2.1:{free_port}: Cannot assign requested address"):
        listen_tcp(Address("192.0.2.1", free_port), "test")


def test_busy_name():
    name = f"shardserve-test-{os.getpid()}"
    with listen_abstract(name), pytest.raises(StartError) as caught:
        listen_abstract(name)
    assert str(caught.value) == f"local socket {name}: Address already in use"


def test_a_listener_that_comes_later_is_found(free_port):
    address = Address("127.0.0.1", free_port)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(connect_within(address, float("inf"), 0.02, threading.Event())), daemon=True
    )
    thread.start()
    with listen_abstract(twin_name(address)) as listener:
        listener.accept()[0].close()
        thread.join(30)
    found[0].close()


def test_attempts_end(free_port):
    address = Address("127.0.0.1", free_port)
    assert connect_within(address, 0.1, 0.02, threading.Event()) is None
    stopped = threading.Event()
    threading.Timer(0.05, stopped.set).start()
    began = time.monotonic()
    assert connect_within(address, float("inf"), 30, stopped) is None
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *(("127.0.0.1", True), ("127.3.4.5", True), ("localhost", True), ("192.0.2.1", False), ("2001:db8::1", False)),
        # Those that another host would find itself by, and what can be no host.
        *((host, False) for host in ("0.0.0.0", "0", "::", "", "a\0b")),
    ],
)
def test_is_local(host, local):
    assert is_local(host) is local


def test_a_name_that_nobody_has_is_not_local():
    assert is_local("no-such-host.invalid") is False


def test_a_host_that_vanishes_is_noticed_within_the_peer_timeout(free_port):
    address = Address("127.0.0.1", free_port)
    with listen_tcp(address, "test") as listener, connect(address, 5, 12, False) as ours, listener.accept()[0]:
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_000
        idle, interval, count = (
            ours.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count == 12
