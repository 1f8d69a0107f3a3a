import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import urllib.request

import pytest

from shardserve.errors import StartError
from shardserve.server import runtime

from .scripts import LOCAL, Script, write_servable

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_script_that_ends_stays_up_until_a_signal(tmp_path, free_port):
    with Script(
        tmp_path, f"server.start_restful_server('127.0.0.1:{free_port}')\nprint('last line', flush=True)"
    ) as script:
        assert script.line() == "last line"
        with socket.create_connection(("127.0.0.1", free_port), 10):
            pass
        assert len(script.children()) == 1
        script.process.send_signal(signal.SIGTERM)
        assert script.end() == (0, "")


def test_a_signal_ends_a_script_in_the_middle(tmp_path, free_port):
    text = f"""
        import threading
        server.start_grpc_server('127.0.0.1:{free_port}')
        print('waiting', flush=True)
        threading.Event().wait()
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        with Script(tmp_path, text) as script:
            assert script.line() == "waiting"
            script.process.send_signal(number)
            assert script.end() == (0, "")


def test_the_scripts_own_handler_stays(tmp_path, free_port):
    text = f"""
        import signal, threading
        told = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: told.set())
        server.start_grpc_server('127.0.0.1:{free_port}')
        print('waiting', flush=True)
        told.wait()
        server.stop()
        print('stopped', flush=True)
    """
    with Script(tmp_path, text) as script:
        script.line()
        script.process.send_signal(signal.SIGTERM)
        assert script.line() == "stopped"
        assert script.end()[0] == 0


def test_a_script_that_raises_ends_by_itself(tmp_path, free_port):
    text = f"server.start_grpc_server('127.0.0.1:{free_port}')\nraise RuntimeError('out of cheese')"
    with Script(tmp_path, text) as script:
        code, stderr = script.end()
        assert code == 1
        assert "RuntimeError: out of cheese" in stderr


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("server.start_grpc_server('127.0.0.1:0x')", "address: '127.0.0.1:0x' is not ip:port"),
        ("distributed.startup_agents('127.0.0.1:6200', ['none'])", "model_files: there is no file "),
        ("distributed.start_servable('.', 'net', 'r.json', version_number=0)", "version_number=0 is not an integer"),
    ],
)
def test_wrong_arguments_end_the_script(tmp_path, call, said):
    with Script(tmp_path, call) as script:
        code, stderr = script.end()
        assert code == 1
        assert said in stderr


def test_wrong_settings_end_the_script(tmp_path, free_port):
    call = f"server.start_grpc_server('127.0.0.1:{free_port}')"
    with Script(tmp_path, call, SHARDSERVE_STEP_TIMEOUT="soon") as script:
        code, stderr = script.end()
        assert code == 1
        assert "environment variable SHARDSERVE_STEP_TIMEOUT='soon' is not a positive float" in stderr


def test_a_variable_that_is_no_setting_is_named_once(tmp_path, free_port):
    text = f"""
        for _ in range(2):
            server.start_restful_server('127.0.0.1:{free_port}')
            server.stop()
    """
    with Script(tmp_path, text, SHARDSERVE_FOO="1") as script:
        code, stderr = script.end()
        assert code == 0
        (line,) = stderr.splitlines()
        assert line.endswith("environment variable SHARDSERVE_FOO is no setting, and ignored")


def test_wrong_settings_that_are_caught_leave_nothing_running(tmp_path, free_port):
    text = f"""
        try:
            server.start_grpc_server('127.0.0.1:{free_port}')
        except Exception as error:
            print(type(error).__name__, flush=True)
    """
    with Script(tmp_path, text, SHARDSERVE_STEP_TIMEOUT="soon") as script:
        assert script.line() == "ConfigError"
        assert script.end()[0] == 0


def test_without_descriptors_for_the_background_thread_the_start_is_an_error(tmp_path):
    """And no wait for a thread that has died; with some again, it is one like any other."""
    text = """
        import os, resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
        try:
            server.start_restful_server('127.0.0.1:1')
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            print(type(error).__name__, error, flush=True)
        server.start_grpc_server('unix:grpc.sock')
        print("up", flush=True)
        server.stop()
    """
    with Script(tmp_path, text) as script:
        said = "StartError the background thread of this process can't be started: [Errno 24] Too many open files"
        assert script.line() == said
        assert script.line() == "up"
        assert script.end()[0] == 0


def test_stop_twice_and_start_again(tmp_path, free_port):
    text = f"""
        server.stop()
        for _ in range(2):
            server.start_restful_server('127.0.0.1:{free_port}')
            print('up', flush=True)
            server.stop()
            server.stop()
        print('done', flush=True)
    """
    with Script(tmp_path, text) as script:
        assert [script.line() for _ in range(3)] == ["up", "up", "done"]
        assert script.end() == (0, "")


def test_stop_ends_a_start_that_waits_for_agents(tmp_path, free_port):
    write_servable(tmp_path)
    text = f"""
        import threading
        from shardserve.wire.sockets import Address, connect_within
        def start():
            try:
                distributed.start_servable('.', 'net', 'ranks.json', distributed_address='127.0.0.1:{free_port}')
            except Exception as error:
                print(type(error).__module__, type(error).__name__, flush=True)
        server.start_grpc_server('unix:grpc.sock')
        thread = threading.Thread(target=start)
        thread.start()
        connect_within(Address("127.0.0.1", {free_port}), 30, 0.05, threading.Event()).close()
        server.stop()
        thread.join()
    """
    with Script(tmp_path, text) as script:
        assert script.line() == "shardserve.errors StartError"
        assert script.end()[0] == 0


def test_the_second_signal_does_not_wait(tmp_path, free_port):
    with Script(tmp_path, f"server.start_restful_server('127.0.0.1:{free_port}')\nprint('up', flush=True)") as script:
        script.line()
        [main] = script.children()
        # Main can't answer the stop, so that the first signal waits for it.
        main.suspend()
        script.process.send_signal(signal.SIGTERM)
        # As a person does who presses Ctrl-C again and again: of two signals at the very same moment Python may keep
        # the second for later.
        for _ in range(10):
            script.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.process.wait(0.4)
                break
        code, _ = script.end(timeout=10)
        assert code == 128 + signal.SIGINT or code == 128 + signal.SIGTERM


def test_main_is_respawned_with_its_front_ends(tmp_path, free_port):
    with Script(tmp_path, f"server.start_restful_server('127.0.0.1:{free_port}')\nprint('up', flush=True)") as script:
        script.line()
        [main] = script.children()
        main.kill()
        main.wait(30)

        def answers():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/nothing", timeout=1):
                    return True
            except urllib.error.HTTPError:
                return True
            except OSError:
                return False

        while not answers():
            assert script.process.poll() is None
        assert script.children()[0].pid != main.pid
        script.process.send_signal(signal.SIGTERM)
        code, stderr = script.end()
        assert code == 0
        assert f"Main (pid {main.pid}) ended with code -9; it is respawned" in stderr


def test_where_standard_error_is_closed_no_socket_of_a_child_has_its_number(tmp_path, free_port):
    text = f"server.start_restful_server('127.0.0.1:{free_port}')\nprint('up', flush=True)"
    with Script(tmp_path, text, launched_by=("bash", "-c", 'exec "$@" 2>&-', "bash")) as script:
        assert script.line() == "up"
        [main] = script.children()
        assert os.readlink(f"/proc/{main.pid}/fd/2") == "/dev/null"
        script.process.send_signal(signal.SIGTERM)
        assert script.end()[0] == 0


def test_all_die_with_the_script(tmp_path, free_port):
    with Script(tmp_path, f"server.start_restful_server('127.0.0.1:{free_port}')\nprint('up', flush=True)") as script:
        script.line()
        [main] = script.children()
        script.process.kill()
        main.wait(30)


class Lodger:
    needs_others = False
    failure = None

    def __init__(self, last=lambda: None):
        self.lives, self.leaves = threading.Event(), asyncio.Event()
        self.last = last

    async def run(self):
        self.lives.set()
        await self.leaves.wait()
        self.last()

    def stop(self):
        self.leaves.set()


def new_runtime():
    home = runtime.Runtime()
    home.start()
    return home


def test_who_settles_while_the_last_resident_ends_is_told():
    """As a script is that starts agents again as soon as it heard why the first ones ended; it settles in the next."""
    home = new_runtime()
    begun, told = threading.Event(), []

    def begin(work, begin=home.begin):
        future = begin(work)
        begun.set()
        return future

    def settle():
        try:
            home.settle(Lodger)
        except runtime.RuntimeEnded as error:
            told.append(error)

    thread = threading.Thread(target=settle)

    def next_one():
        thread.start()
        # The loop's thread: the newcomer's turn can only come after this resident has ended.
        assert begun.wait(30)

    first = home.settle(lambda: Lodger(next_one))
    home.begin = begin
    home._loop.call_soon_threadsafe(first.stop)
    home.wait()
    thread.join(30)
    assert len(told) == 1
    assert not home.alive


INTERRUPTED = """
    import asyncio, linecache, signal, sys, threading
    from shardserve.server import runtime

    class Lodger:
        needs_others = False
        failure = None

        def __init__(self):
            self.leaves = asyncio.Event()

        async def run(self):
            await self.leaves.wait()

        def stop(self):
            self.leaves.set()

    def lines(number, at):
        passed = 0

        def trace(frame, event, arg):
            nonlocal passed
            if frame.f_code.co_filename != runtime.__file__:
                return None
            # Python calls no handler between a block's end and the release of its lock, where this would.
            held = linecache.getline(runtime.__file__, frame.f_lineno).strip().startswith("with")
            passed += event == "line" and not held
            if passed == at and not held:
                sys.settrace(None)
                told.append(frame.f_lineno)
                signal.raise_signal(number)
            return trace

        return trace

    told, tries = [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        while True:
            told.clear()
            tries += 1
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.default_int_handler)
            runtime._runtime = None
            try:
                sys.settrace(lines(number, tries))
                runtime.settle(Lodger)
            except (KeyboardInterrupt, SystemExit):
                pass
            finally:
                sys.settrace(None)
            if not told:
                runtime.stop()
                break
            for thread in threading.enumerate():
                if thread.name == "shardserve":
                    thread.join(30)
                    assert not thread.is_alive(), told
            # Of what has ended, or never began, as a script's last lines may.
            runtime.stop()
        print(tries > 40, flush=True)
        tries = 0
"""


def test_a_signal_at_any_line_of_a_start_ends_it(tmp_path):
    with Script(tmp_path, INTERRUPTED) as script:
        assert [script.line(), script.line()] == ["True", "True"]
        assert script.end()[0] == 0


def test_what_has_ended_is_asked_nothing_any_more():
    home = new_runtime()
    home.settle(Lodger)
    home.request_stop()
    home.wait()
    for ask in (home.call, home.begin):
        with pytest.raises(StartError, match="the server was stopped meanwhile"):
            ask(asyncio.sleep(0))
    home.request_stop()
    assert not home.alive


def test_a_script_ends_whose_start_was_waited_for_when_all_had_been_stopped(tmp_path):
    write_servable(tmp_path, LOCAL)
    (tmp_path / "net" / "1").mkdir()
    text = f"""
        from shardserve.server import servables
        config = server.ServableStartConfig({str(tmp_path)!r}, "net")
        start = servables._Start(config, config.options(), servables.quietly)
        server.stop()
        try:
            start.wait()
        except Exception:
            print("failed", flush=True)
    """
    with Script(tmp_path, text) as script:
        assert script.line() == "failed"
        assert script.end()[0] == 0


def test_a_command_ends_whose_server_ended_as_soon_as_it_was_ready(tmp_path, free_port):
    text = f"""
        from shardserve.cli.serving import in_foreground

        def start(progress):
            server.start_restful_server('127.0.0.1:{free_port}')
            server.stop()
            return "all"

        raise SystemExit(in_foreground("up", start))
    """
    with Script(tmp_path, text) as script:
        assert script.line() == "ready: all"
        assert script.end()[0] == 0


def test_a_command_that_is_ended_as_soon_as_its_ready_line_is_read_was_ready(tmp_path, free_port):
    text = f"""
        import signal
        import sys
        from shardserve.cli.serving import in_foreground

        class Read:
            write = sys.stdout.write

            def flush(self):
                sys.stdout = sys.__stdout__
                sys.stdout.flush()
                signal.raise_signal(signal.SIGTERM)

        def start(progress):
            server.start_restful_server('127.0.0.1:{free_port}')
            sys.stdout = Read()
            return "all"

        raise SystemExit(in_foreground("up", start))
    """
    with Script(tmp_path, text) as script:
        assert script.line() == "ready: all"
        assert script.end() == (0, "")


def test_a_command_ends_whose_ready_line_can_not_be_written(tmp_path, free_port):
    text = f"""
        from shardserve.cli.serving import in_foreground

        def start(progress):
            server.start_restful_server('127.0.0.1:{free_port}')
            return "all"

        try:
            in_foreground("up", start)
        except OSError as error:
            # As the command does with it; nothing reaches the hook of uncaught ones.
            raise SystemExit(error.strerror)
    """
    with Script(tmp_path, text, launched_by=("bash", "-c", 'exec "$@" >/dev/full', "bash")) as script:
        assert script.end() == (1, "No space left on device\n")


def test_a_command_says_why_it_failed_although_a_signal_comes_while_it_stops(tmp_path, free_port):
    text = f"""
        import signal
        from shardserve.cli.serving import in_foreground
        from shardserve.errors import ConfigError, ShardserveError
        from shardserve.server.runtime import Runtime

        wait = Runtime.wait

        def wait_and_be_told(self):
            Runtime.wait = wait
            signal.raise_signal(signal.SIGTERM)
            wait(self)

        def start(progress):
            server.start_restful_server('127.0.0.1:{free_port}')
            Runtime.wait = wait_and_be_told
            raise ConfigError("nothing of it is right")

        try:
            in_foreground("up", start)
        except ShardserveError as error:
            raise SystemExit(str(error))
    """
    with Script(tmp_path, text) as script:
        assert script.end() == (1, "nothing of it is right\n")
