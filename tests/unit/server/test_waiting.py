"""A start that waits says what for: without a terminal by lines in the log."""

import re
import signal
import socket

import pytest
from hosts import need_hosts

from .scripts import Script, write_servable

pytestmark = pytest.mark.usefixtures("nothing_left")
NOTICE = {"SHARDSERVE_WAITING_NOTICE": "0.2"}


def read_until(script, text):
    """What it has written to stderr, up to the line with this text."""
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(script.process.stderr.readline())
        assert lines[-1], f"{text!r} is not in {lines}"
    return lines


def test_a_server_says_which_agents_are_missing_but_not_all_the_time(tmp_path, free_port):
    write_servable(tmp_path)
    text = (
        "distributed.start_servable('.', 'net', 'ranks.json', "
        f"distributed_address='127.0.0.1:{free_port}', wait_agents_time_in_seconds=3)"
    )
    with Script(tmp_path, text, **NOTICE) as script:
        code, stderr = script.end()
    assert code == 1
    said = [line for line in stderr.splitlines() if " servable 'net' version 1 waits for " in line]
    # As the lines of all our processes: time, level, process.
    waits = "servable 'net' version 1 waits for agents: 0 of 2 are there, missing ranks 0-1"
    assert re.fullmatch(rf"20\d\d-\S+ \S+ WARNING script\[\d+\] {waits}", said[-1])
    # After 0.2, 0.6, 1.4, 3 s, …: the last that there is time for, on a slow machine too, comes long before 60 s.
    assert 2 <= len(said) <= 8


def test_a_server_whose_config_takes_long_says_that(tmp_path, free_port):
    write_servable(tmp_path, "import time\ntime.sleep(1000)\n")
    text = f"distributed.start_servable('.', 'net', 'ranks.json', distributed_address='127.0.0.1:{free_port}')"
    with Script(tmp_path, text, **NOTICE) as script:
        read_until(script, "servable 'net' version 1 waits for its Worker to run servable_config.py")
        script.process.send_signal(signal.SIGTERM)
        script.end()


def test_agents_say_that_there_is_no_server(tmp_path, free_port):
    (tmp_path / "net.graph.json").touch()
    text = f"distributed.startup_agents('127.0.0.1:{free_port}', ['net.graph.json'])"
    with Script(tmp_path, text, **NOTICE) as script:
        read_until(script, f"this host waits for the server at 127.0.0.1:{free_port}")
        script.process.send_signal(signal.SIGTERM)
        script.end()


def test_agents_say_why_they_do_not_go_to_a_server_that_may_be_anybodys(tmp_path):
    (tmp_path / "net.graph.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        text = f"distributed.startup_agents('{address}', ['net.graph.json'])"
        with Script(tmp_path, text, **NOTICE) as script:
            waits = f"this host waits for the server at {address}: whoever listens at {address} is no local process of "
            assert "give both sides join_secret_file" in read_until(script, waits)[-1]
            script.process.send_signal(signal.SIGTERM)
            script.end()


def test_agents_wait_for_a_server_whose_name_nobody_knows_yet(tmp_path):
    need_hosts()
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n")
    (tmp_path / "net.graph.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        text = f"distributed.startup_agents('late.test:{port}', ['net.graph.json'], insecure=True)"
        seen_by = ("unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh")
        with Script(tmp_path, text, seen_by, **NOTICE) as script:
            waits = f"this host waits for the server at late.test:{port}, a name that isn't known yet: "
            assert waits in read_until(script, waits)[-1]
            names.write_text("127.0.0.1 late.test\n")
            listener.settimeout(30)
            listener.accept()[0].close()
            read_until(script, f"the Worker at late.test:{port} is gone")
            script.process.send_signal(signal.SIGTERM)
            script.end()
