import signal
import socket

import psutil
import pytest

from .scripts import SERVABLE, Script, write_servable

pytestmark = pytest.mark.usefixtures("nothing_left")


def start(port, options="", name="net"):
    return (
        f"distributed.start_servable('.', {name!r}, 'ranks.json', distributed_address='127.0.0.1:{port}'"
        f"{', ' if options else ''}{options})\n"
    )


def test_distributed_port_in_use(tmp_path, free_port):
    write_servable(tmp_path)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", free_port))
        busy.listen()
        with Script(tmp_path, start(free_port)) as script:
            code, stderr = script.end()
    assert code == 1
    assert f"StartError: distributed_address 127.0.0.1:{free_port}: the port is in use" in stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = nonsense\n", "net/servable_config.py, line 1: NameError: name 'nonsense' is not defined"),
        ("", "net/servable_config.py: declares no model"),
        ("import sys\nsys.exit(0)\n", "net/servable_config.py, line 2: SystemExit: 0"),
        (
            SERVABLE.replace("rank_size=2", "rank_size=3"),
            "ranks.json: $ has 2 ranks; the servable declares rank_size=3",
        ),
    ],
)
def test_servable_that_is_wrong(tmp_path, free_port, text, said):
    write_servable(tmp_path, text)
    with Script(tmp_path, start(free_port)) as script:
        code, stderr = script.end()
    assert code == 1
    assert f"{tmp_path}/{said}" in stderr


@pytest.mark.parametrize(
    "text", ["import time\ntime.sleep(1000)\n", "while True:\n    pass\n", "import os\nos.read(os.pipe()[0], 1)\n"]
)
def test_a_servable_config_that_never_ends(tmp_path, free_port, text):
    write_servable(tmp_path, text, name="endless")
    write_servable(tmp_path)
    retry = start(free_port, "wait_agents_time_in_seconds=0.1").rstrip()
    calls = f"""
        for call in ({start(free_port, name="endless")!r}, {retry!r}):
            try:
                exec(call)
            except Exception as error:
                print(type(error).__name__, error, flush=True)
        server.stop()
    """
    with Script(tmp_path, calls, SHARDSERVE_CONFIG_TIMEOUT="2") as script:
        path = f"{tmp_path}/endless/servable_config.py"
        assert script.line() == f"ConfigError {path}: did not end within 2 s (config_timeout)"
        # The port is free again, and the next servable is started on it.
        assert script.line().startswith("StartError servable 'net': 0 of 2 agents came")
        assert script.end()[0] == 0


def test_a_servable_config_that_takes_longer_than_the_heartbeat_is_not_taken_for_frozen(tmp_path, free_port):
    write_servable(tmp_path, "import re\nre.match('(a+)+b', 'a' * 25)\n" + SERVABLE)
    call = start(free_port, "wait_agents_time_in_seconds=0.1")
    environment = {"SHARDSERVE_HEARTBEAT_TIMEOUT": "1"}
    with Script(tmp_path, call, **environment) as script:
        _, stderr = script.end(120)
    assert "0 of 2 agents came within" in stderr
    assert "heartbeat_timeout" not in stderr


def test_a_worker_that_freezes_while_it_waits_for_agents_fails_the_start(tmp_path, free_port):
    write_servable(tmp_path)
    with Script(
        tmp_path, start(free_port), SHARDSERVE_HEARTBEAT_TIMEOUT="1", SHARDSERVE_WAITING_NOTICE="0.1"
    ) as script:
        while "waits for agents" not in script.process.stderr.readline():
            pass
        [worker] = [child for child in script.children() if "shardserve.worker" in child.cmdline()]
        worker.suspend()
        code, stderr = script.end()
    assert code == 1
    said = f"shardserve.worker (pid {worker.pid}) was killed: it did not answer for 1 s (heartbeat_timeout)"
    assert f"StartError: {said}" in stderr


def test_what_failed_may_be_started_again(tmp_path, free_port):
    """Its port, its name and its processes are free again."""
    write_servable(tmp_path)
    call = start(free_port, "wait_agents_time_in_seconds=0.2")
    text = "".join(f"try:\n    {call}except Exception as error:\n    print(error, flush=True)\n" for _ in range(2))
    with Script(tmp_path, text + "server.stop()\n") as script:
        said = "servable 'net': 0 of 2 agents came within wait_agents_time_in_seconds=0.2; missing: rank 0, 1"
        assert [script.line(), script.line()] == [said, said]
        code, stderr = script.end()
    assert code == 0
    assert "Traceback" not in stderr


def test_started_twice(tmp_path, free_port):
    write_servable(tmp_path)
    text = f"""
import socket, threading
from shardserve.wire.sockets import Address, connect_within

def start():
    {start(free_port)}
threading.Thread(target=start, daemon=True).start()
connect_within(Address("127.0.0.1", {free_port}), 30, 0.05, threading.Event()).close()
try:
    start()
except Exception as error:
    print(type(error).__name__, error, flush=True)
server.stop()
"""
    with Script(tmp_path, text) as script:
        assert script.line() == "ConfigError servable 'net' version 1 is started already"
        assert script.end()[0] == 0


def test_a_worker_that_dies_while_it_starts_fails_the_start(tmp_path, free_port):
    """It is not respawned behind the back of a script that was told of its death."""
    write_servable(tmp_path)
    text = f"try:\n    {start(free_port)}except Exception as error:\n    print(error, flush=True)\n"
    with Script(tmp_path, text + "input_ = __import__('threading').Event().wait()\n") as script:
        worker = None
        while worker is None:
            for child in script.children():
                try:
                    if "shardserve.worker" in child.cmdline():
                        worker = child
                except psutil.NoSuchProcess:
                    continue
        worker.kill()
        assert script.line() == f"shardserve.worker (pid {worker.pid}) ended with code -9"
        script.process.send_signal(signal.SIGTERM)
        code, stderr = script.end()
    assert code == 0
    assert "Traceback" not in stderr
    assert "respawned" not in stderr
