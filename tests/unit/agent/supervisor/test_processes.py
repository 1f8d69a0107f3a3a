import asyncio
import contextlib
import os
import resource
import select
import signal
import subprocess
import sys

import psutil
import pytest

from shardserve.agent.forking import ForkRequest, LastWords, Loading, LoadingTeller
from shardserve.agent.supervisor.processes import ENVIRONMENT, ForkServer
from shardserve.errors import StartError
from shardserve.wire.process import SPARE

from ..scripted import no_descriptors_left
from ..shards import write_shards

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def server():
    made = ForkServer()
    yield made
    with contextlib.suppress(ProcessLookupError, OSError):
        made.close()


def request(port, model, rank=0, device="cpu", config=None, worker=1):
    return ForkRequest(rank, "127.0.0.1", device, f"127.0.0.1:{worker}", port, 1, (str(model),), (config,))


def ended(process, timeout=60):
    """The agent's last words, once it has ended."""
    ready, _, _ = select.select([process.pidfd], [], [], timeout)
    assert ready, f"agent {process.pid} lives"
    words = process.read_last_words()
    process.close()
    return words


def fork(server, *requests, timeout=60):
    """Agents, forked one after the other by one loop."""

    async def body():
        return await asyncio.gather(*(server.fork(each, None, timeout) for each in requests))

    return asyncio.run(body())


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_an_agent_says_why_it_ends(server, tmp_path, free_port):
    [model] = write_shards(tmp_path, 1)
    (tmp_path / "device0" / "weights.safetensors").unlink()
    missing = tmp_path / "device0" / "none.graph.json"
    no_config, wrong_graph, no_cuda = fork(
        server,
        request(free_port, tmp_path / "none" / "net.graph.json"),
        request(free_port, missing),
        request(free_port, model, rank=3, device="cuda:0"),
    )
    assert ended(no_config) == LastWords("ShardError", f"{tmp_path}/none/group_config.json: No such file or directory")
    config = tmp_path / "device0" / "group_config.json"
    assert ended(wrong_graph) == LastWords("ShardError", f"{config} describes 'net.graph.json', not 'none.graph.json'")
    assert ended(no_cuda) == LastWords("StartError", "rank 3: device cuda:0: CUDA is not available on this host")
    [no_weights] = fork(server, request(free_port, model))
    words = ended(no_weights)
    assert words == LastWords("ShardError", f"{tmp_path}/device0/weights.safetensors: No such file or directory")


def test_an_agent_says_how_much_it_has_loaded(server, tmp_path, free_port):
    [model] = write_shards(tmp_path, 1)
    size = (tmp_path / "device0" / "weights.safetensors").stat().st_size
    [agent] = fork(server, request(free_port, model))
    while agent.loading is None or agent.loading.done < size:
        ready, _, _ = select.select([agent.words], [], [], 60)
        assert ready
        assert agent.read()
    assert agent.loading == Loading(size, size)
    signal.pidfd_send_signal(agent.pidfd, signal.SIGKILL)
    assert ended(agent) is None


def test_what_is_told_of_a_load_fits_into_a_pipe():
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        tell = LoadingTeller(writer)
        for done in range(0, 10**12 + 1, 10**7):
            tell(done, 10**12)
        assert len(os.read(reader, 1 << 16).splitlines()) == 101


def test_the_server_has_one_thread_and_reaps_its_agents(server, tmp_path, free_port):
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    [model] = write_shards(tmp_path, 1)
    agents = fork(server, *[request(free_port, model, rank=rank) for rank in range(3)])
    process = psutil.Process(server.pid)
    assert process.num_threads() == 1
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard - SPARE
    assert {child.pid for child in process.children()} == {agent.pid for agent in agents}
    for agent in agents:
        signal.pidfd_send_signal(agent.pidfd, signal.SIGKILL)
        assert ended(agent) is None
    descriptors = process.num_fds()
    for _ in range(10):
        [agent] = fork(server, request(free_port, model))
        signal.pidfd_send_signal(agent.pidfd, signal.SIGKILL)
        assert ended(agent) is None
    # It closes its own of an agent just after it has given them to the supervisor.
    assert process.num_fds() <= descriptors + 3
    _, left = psutil.wait_procs(process.children(), timeout=30)
    assert not left


def test_how_an_agent_ended(server, tmp_path, free_port):
    [model] = write_shards(tmp_path, 1)
    agents = fork(server, *[request(free_port, model, rank=rank) for rank in range(3)])
    signals = [signal.SIGBUS, signal.SIGKILL, signal.SIGRTMIN + 1]
    for agent, number in zip(agents, signals, strict=True):
        signal.pidfd_send_signal(agent.pidfd, number)
        assert ended(agent) is None
    [excepted] = fork(server, request(free_port, tmp_path / "none" / "net.graph.json"))
    assert ended(excepted) is not None

    async def endings():
        return [await server.ending_of(each.pid, 60) for each in (*agents, excepted)], await server.ending_of(1, 60)

    said, of_nobody = asyncio.run(endings())
    assert said == ["died of SIGBUS", "died of SIGKILL", f"died of signal {signals[2]}", "ended with code 1"]
    assert of_nobody == "died"


def test_its_end_ends_its_agents(server, tmp_path, free_port):
    [model] = write_shards(tmp_path, 1)
    agents = fork(server, request(free_port, model), request(free_port, model))
    os.kill(server.pid, signal.SIGKILL)
    for agent in agents:
        assert ended(agent) is None
    with pytest.raises(ConnectionError):
        fork(server, request(free_port, model))


def test_close_ends_all(tmp_path, free_port):
    server = ForkServer()
    [model] = write_shards(tmp_path, 1)
    [agent] = fork(server, request(free_port, model))
    server.close()
    assert ended(agent) is None
    assert not alive(server.pid)


def test_a_server_that_is_silent_is_ended(server, free_port, tmp_path):
    """What it says too late is nobody's: whoever asks next would get the other rank's process."""
    os.kill(server.pid, signal.SIGSTOP)
    said = rf"the fork server \(pid {server.pid}\) did not answer within 0.2 s \(start_timeout\) and was killed"
    with pytest.raises(ConnectionError, match=said):
        fork(server, request(free_port, tmp_path), timeout=0.2)
    assert not alive(server.pid)
    with pytest.raises(ConnectionError, match=said):
        fork(server, request(free_port, tmp_path, rank=1))


def links(pid):
    """What its descriptors are, by their numbers."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_server_that_has_no_descriptors_left_lives_on(server, tmp_path, free_port, spare):
    """With 2 it has forked already when it sees that it can't watch the child."""
    [model] = write_shards(tmp_path, 1)
    [agent] = fork(server, request(free_port, model))
    words = os.readlink(f"/proc/self/fd/{agent.words}")
    while words in links(server.pid).values():
        pass  # It closes its own of an agent just after it has given them away.
    free = [number for number in range(64) if number not in links(server.pid)]
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (free[spare], limits[1]))
    said = rf"the fork server \(pid {server.pid}\) could not fork: \[Errno 24\] Too many open files"
    with pytest.raises(StartError, match=said):
        fork(server, request(free_port, model, rank=1))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    [another] = fork(server, request(free_port, model, rank=2))
    _, left = psutil.wait_procs(
        [child for child in psutil.Process(server.pid).children() if child.pid not in (agent.pid, another.pid)], 10
    )
    assert not left
    for each in (agent, another):
        each.kill()
        assert ended(each) is None


def test_an_agent_that_this_process_has_no_descriptors_for_is_none(server, tmp_path, free_port):
    [model] = write_shards(tmp_path, 1)

    async def body():
        with no_descriptors_left(), pytest.raises(StartError, match=rf"{os.getpid()}\) has no descriptors left for an"):
            await server.fork(request(free_port, model), None, 60)

    asyncio.run(body())
    _, left = psutil.wait_procs(psutil.Process(server.pid).children(), timeout=30)
    assert not left


def test_no_descriptors_left_for_a_server():
    before = links(os.getpid())
    said = r"shardserve.agent.fork_server can't be started: \[Errno 24\] Too many open files"
    with no_descriptors_left(), pytest.raises(StartError, match=said):
        ForkServer()
    assert links(os.getpid()).keys() == before.keys()


PARENT = """
import asyncio, sys
from shardserve.agent.forking import ForkRequest
from shardserve.agent.supervisor.processes import ENVIRONMENT, ForkServer

async def main():
    server = ForkServer()
    request = ForkRequest(0, "127.0.0.1", "cpu", "127.0.0.1:1", 0, 1, (sys.argv[1],), (None,))
    agent = await server.fork(request, None, 60)
    print(server.pid, agent.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_all_die_with_the_parent(tmp_path):
    [model] = write_shards(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", PARENT, model], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        parent.kill()
    for pid, pidfd in zip(pids, pidfds, strict=True):
        assert select.select([pidfd], [], [], 10)[0], f"{pid} lives"
        os.close(pidfd)


def test_what_the_user_set_in_the_environment_stays(monkeypatch, free_port, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    server = ForkServer()
    try:
        # It runs when it has forked: before, it may be us still.
        [agent] = fork(server, request(free_port, tmp_path / "none" / "net.graph.json"))
        environment = psutil.Process(server.pid).environ()
        ended(agent)
    finally:
        server.close()
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"
    assert environment["GLIBC_TUNABLES"] == ENVIRONMENT["GLIBC_TUNABLES"]
