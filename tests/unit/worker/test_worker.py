import asyncio
import contextlib
import json
import os
import socket

import numpy as np
import pytest

from shardserve.errors import ConfigError, RankTableError
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.messages import Generation, TensorMeta, front, group, launch
from shardserve.wire.security import Door, Security
from shardserve.wire.sockets import Address, listen_abstract, listen_tcp, twin_name
from shardserve.wire.stream import FrameStream
from shardserve.worker.worker import Worker

from .harness import Stream, asynchronous, quick
from .test_registry import config

pytestmark = pytest.mark.usefixtures("nothing_left")

SERVABLE = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1)

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
"""
FRONT = f"shardserve-test-front-{os.getpid()}"


class Peer:
    """One side of a connection to the Worker."""

    def __init__(self, union, door=None):
        self.frames = asyncio.Queue()
        self.lost, self.admitted = asyncio.Event(), asyncio.Event()
        self.stream = FrameStream(
            union,
            lambda *frame: self.frames.put_nowait(frame),
            lambda _: self.lost.set(),
            door=door,
            on_admitted=self.admitted.set,
        )

    async def next(self, kind):
        """The next message of this kind; others before it are skipped."""
        while True:
            message, self.payload = await self.frames.get()
            if isinstance(message, kind):
                return message

    def send(self, message, *buffers):
        self.stream.send(message, buffers)


class Scene:
    """A Worker in this process, on real listeners."""

    def __init__(
        self, directory, port, replicas=1, wait=0.0, incarnation=100, servable=SERVABLE, secret=None, **settings
    ):
        (directory / "net").mkdir(exist_ok=True)
        (directory / "net" / "servable_config.py").write_text(servable)
        devices = [{"device_id": str(r), "device_ip": "a", "rank_id": str(r)} for r in range(2 * replicas)]
        table = {"server_count": "1", "server_list": [{"server_id": "127.0.0.1", "device": devices}]}
        (directory / "ranks.json").write_text(json.dumps(table))
        self.launcher = Stream()
        guard = launch.SecurityFiles(secret)
        serve = launch.Serve(1, str(directory), "net", 3, str(directory / "ranks.json"), incarnation, wait, guard)
        self.address = Address("127.0.0.1", port)
        self.worker = Worker(serve, quick(**settings), self.launcher)
        self.peers = []

    async def __aenter__(self):
        await self.worker.start(
            listen_tcp(self.address, "test"), listen_abstract(twin_name(self.address)), listen_abstract(FRONT)
        )
        return self

    async def __aexit__(self, *error):
        for server in self.worker._servers:
            server.close()
        for peer in self.peers:
            peer.stream.abort()
            await peer.lost.wait()
        # The Worker's sides of the connections see it, too.
        while self.worker._connections or self.worker._mains:
            await asyncio.sleep(0.01)

    async def peer(self, union, name, door=None):
        peer = Peer(union, door)
        await asyncio.get_running_loop().create_unix_connection(lambda: peer.stream, "\0" + name)
        self.peers.append(peer)
        return peer

    async def agent(self, rank, shard=None, incarnation=0, device="cpu", pid=None):
        """Registers and forms whatever it is told to form."""
        agent = await self.peer(group.ToAgent, twin_name(self.address))
        shards = [shard or config(rank % 2)]
        pid, address = pid or 1000 + rank, f"127.0.0.1:{7000 + rank}"
        agent.send(group.Register(rank, pid, f"of {pid}", device, incarnation, address, shards))
        return agent

    async def agents(self, *ranks):
        agents = [await self.agent(rank) for rank in ranks]
        for agent in agents:
            form = await agent.next(group.Form)
            agent.send(group.Formed(form.generation))
        return form.generation, agents

    async def main(self):
        return await self.peer(front.ToMain, FRONT)

    async def supervisor(self, count=2):
        supervisor = await self.peer(group.ToSupervisor, twin_name(self.address))
        supervisor.send(group.Introduce(55, "s"))
        roster = await supervisor.next(group.Roster)
        supervisor.send(group.Enlist(roster.hosts, None, None, count))
        return supervisor

    async def said(self, kind):
        """What the launcher was told of this kind."""
        while not self.launcher.take(kind):
            await asyncio.sleep(0.005)
        return self.launcher.take(kind)


async def state(main, wanted):
    """The announcement with this state."""
    while (announced := await main.next(front.Announce)).state != wanted:
        pass
    return announced


X = np.array([1, 2, 3], np.float32)
TEXT = np.frombuffer(b"twelve bytes", np.float32)


def infer(number, value=X, method="predict", deadline=None, **names):
    meta = TensorMeta("float32", value.shape, value.nbytes)
    return front.Infer(number, method, [names or {"x": meta}], deadline), value.tobytes()


def test_wrong_declarations(tmp_path, free_port):
    async def body():
        with pytest.raises(ConfigError, match=rf"{tmp_path}/net/servable_config.py, line 1: NameError: name 'non"):
            Scene(tmp_path, free_port, servable="nonsense")
        broken = SERVABLE.replace("rank_size=2", "rank_size=4")
        said = rf"rank table {tmp_path}/ranks.json: \$ has 2 ranks; the servable declares rank_size=4, stage_size=1"
        with pytest.raises(RankTableError, match=said):
            Scene(tmp_path, free_port, servable=broken)

    asyncio.run(body())


@asynchronous
async def test_a_request_from_main_to_the_agents_and_back(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        announced = await main.next(front.Announce)
        assert (announced.name, announced.version, announced.state) == ("net", 3, "starting")
        assert announced.methods["predict"] == front.MethodInfo(("x",), ("y",), {})
        absent = [(rank.state, rank.device, rank.pid) for rank in announced.replicas[0].ranks]
        assert absent == [("absent", "", 0)] * 2
        generation, (leader, other) = await scene.agents(0, 1)
        assert generation == Generation(100, 1)
        ready = await state(main, "ready")
        assert ready.methods["predict"].dtypes == {"x": "float32"}
        assert [(rank.pid, rank.state) for rank in ready.replicas[0].ranks] == [(1000, "serving"), (1001, "serving")]
        assert await scene.said(launch.Done) == [launch.Done(1)]

        main.send(*infer(5))
        for agent in (leader, other):
            step = await agent.next(group.Step)
            assert step == group.Step(generation, 0, 0, {"batch": 1})
            assert agent.payload[:12].tobytes() == X.tobytes()
        leader.send(group.Output(generation, 0), (X * 2).tobytes())
        reply = await main.next(front.Reply)
        assert reply == front.Reply(5, [front.InstanceOutputs({"y": TensorMeta("float32", (3,), 12)})])
        assert main.payload[:12].tobytes() == (X * 2).tobytes()


@asynchronous
async def test_a_request_that_comes_before_the_agents_waits_for_them(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        main.send(*infer(1))
        generation, (leader, _) = await scene.agents(0, 1)
        await leader.next(group.Step)
        leader.send(group.Output(generation, 0), X.tobytes())
        assert (await main.next(front.Reply)).request == 1


@pytest.mark.parametrize("pipelined", [True, False])
@asynchronous
async def test_enable_pipeline_infer_is_several_steps_in_flight(tmp_path, free_port, pipelined):
    declared = SERVABLE.replace("stage_size=1", f"stage_size=1, enable_pipeline_infer={pipelined}")
    async with Scene(tmp_path, free_port, servable=declared) as scene:
        main = await scene.main()
        generation, (leader, _) = await scene.agents(0, 1)
        await state(main, "ready")
        main.send(*infer(1))
        assert (await leader.next(group.Step)).step == 0
        main.send(*infer(2))
        if pipelined:
            assert (await leader.next(group.Step)).step == 1
            return
        main.send(*infer(3))
        # Answered at once, after what came before it was taken in.
        main.send(*infer(4, method="none"))
        await main.next(front.Failed)
        assert leader.frames.empty()
        leader.send(group.Output(generation, 0), X.tobytes())
        assert await leader.next(group.Step) == group.Step(generation, 1, 0, {"batch": 2})


@asynchronous
async def test_recovery(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        first, (leader, other) = await scene.agents(0, 1)
        main.send(*infer(5))
        await leader.next(group.Step)
        other.stream.abort()
        assert await leader.next(group.End) == group.End(first)
        leader.send(group.Parked(first))
        recovering = await state(main, "recovering")
        assert recovering.replicas[0].restarts == 1
        other = await scene.agent(1)
        for agent in (leader, other):
            second = (await agent.next(group.Form)).generation
            agent.send(group.Formed(second))
        assert second == Generation(100, 2)
        await state(main, "ready")
        assert (await leader.next(group.Step)).step == 0
        # The old generation's answer is late; the new one's counts.
        leader.send(group.Output(first, 0), (X * 7).tobytes())
        leader.send(group.Output(second, 0), X.tobytes())
        await main.next(front.Reply)
        assert main.payload[:12].tobytes() == X.tobytes()
        assert len(scene.launcher.take(launch.Done)) == 1


@asynchronous
async def test_an_output_of_the_wrong_size_ends_the_leader_not_the_request(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        generation, (leader, other) = await scene.agents(0, 1)
        main.send(*infer(5))
        await leader.next(group.Step)
        leader.send(group.Output(generation, 0), bytes(640))
        await leader.lost.wait()
        await other.next(group.End)
        other.send(group.Parked(generation))
        leader = await scene.agent(0)
        for agent in (leader, other):
            agent.send(group.Formed((await agent.next(group.Form)).generation))
        await leader.next(group.Step)
        leader.send(group.Output(Generation(100, 2), 0), X.tobytes())
        assert (await main.next(front.Reply)).request == 5


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"rank": 2}, "JoinRefused", "rank 2: the rank table has ranks 0 to 1"),
        ({"rank": 1, "shard": config(0)}, "ShardError", "rank 1: needs the shard device1, was given device0"),
        ({"rank": 0, "pid": 7}, "Unavailable", "rank 0: is already there (pid 1000 on 127.0.0.1)"),
        ({"rank": 1, "device": "cuda:1"}, "JoinRefused", "rank 1: runs on cuda:1, rank 0 on cpu"),
    ],
)
@asynchronous
async def test_agent_that_is_refused(tmp_path, free_port, fields, error, said):
    async with Scene(tmp_path, free_port) as scene:
        await (await scene.agent(0)).next(group.Registered)
        refused = await scene.agent(**fields)
        answer = await refused.next(group.Refuse)
        assert (answer.error, answer.message[: len(said)]) == (error, said)
        await refused.lost.wait()


@asynchronous
async def test_model_without_the_declared_batch_dim(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        shard = config(0)
        shard["signature"]["inputs"] = [{"name": "x", "dtype": "float32", "shape": []}]
        agent = await scene.agent(0, shard)
        answer = await agent.next(group.Refuse)
        assert answer.error == "ConfigError"
        assert answer.message == "with_batch_dim=True, but these inputs of the model share no first dim: x[]"


@asynchronous
async def test_supervisor_that_is_refused(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        answer = await (await scene.supervisor(count=3)).next(group.Refuse)
        assert answer == group.Refuse(
            "ConfigError", "3 model_files for 2 ranks: the rank table gives this host rank 0, 1"
        )


@pytest.mark.parametrize(
    "message",
    [
        group.Formed(Generation(100, 1)),
        group.Enlist((), None, None, 1),
        group.GaveUp(0, "x"),
    ],
)
@asynchronous
async def test_what_comes_out_of_turn_ends_the_connection(tmp_path, free_port, caplog, message):
    async with Scene(tmp_path, free_port) as scene:
        stranger = await scene.peer(group.ToAgent, twin_name(scene.address))
        stranger.send(message)
        await stranger.lost.wait()
        assert f"{type(message).__name__} came out of turn" in caplog.text


@asynchronous
async def test_junk_on_the_distributed_address_ends_its_connection_alone(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        reader, writer = await asyncio.open_connection(*scene.address)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await (await scene.agent(0)).next(group.Registered)


@asynchronous
async def test_wait_agents_time(tmp_path, free_port):
    async with Scene(tmp_path, free_port, replicas=2, wait=0.3) as scene:
        await (await scene.agent(2)).next(group.Registered)
        [refused] = await scene.said(launch.Refused)
        assert refused.order == 1
        assert refused.error == "StartError"
        assert refused.message == (
            "servable 'net': 1 of 4 agents came within wait_agents_time_in_seconds=0.3; missing: rank 0, 1, 3"
        )


@asynchronous
async def test_agents_that_came_in_time(tmp_path, free_port):
    async with Scene(tmp_path, free_port, wait=0.5) as scene:
        await scene.agents(0, 1)
        await scene.said(launch.Done)
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.6, passed.set)
        await passed.wait()
        assert scene.launcher.take(launch.Refused) == []


@asynchronous
async def test_incarnation_is_greater_than_any_agents(tmp_path, free_port):
    async with Scene(tmp_path, free_port, incarnation=100) as scene:
        agents = [await scene.agent(0, incarnation=100), await scene.agent(1, incarnation=170)]
        assert await scene.said(launch.Incarnation) == [launch.Incarnation(171)]
        assert await agents[0].next(group.Registered) == group.Registered(100)
        assert await agents[1].next(group.Registered) == group.Registered(171)
        for agent in agents:
            assert (await agent.next(group.Form)).generation == Generation(171, 1)


@asynchronous
async def test_a_start_waits_for_others_in_the_place_of_agents_that_gave_up(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        main.send(*infer(5))
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(1, "model/w: No such file"))
        announced = await state(main, "failed")
        assert announced.reason == announced.replicas[0].reason == "rank 1: model/w: No such file"
        failed = await main.next(front.Failed)
        assert (failed.error, failed.message) == ("Unavailable", "rank 1: model/w: No such file")
        assert scene.launcher.take(launch.Waiting)[-1] == launch.Waiting(2, (0, 1), "rank 1: model/w: No such file")
        assert caplog.messages.count("replica 0 waits for other agents: rank 1: model/w: No such file") == 1
        assert not scene.launcher.take(launch.Refused)
        await scene.agents(0, 1)
        assert (await state(main, "ready")).replicas[0].reason == ""
        assert await scene.said(launch.Done)


@asynchronous
async def test_a_start_that_waited_long_enough_says_why_agents_gave_up(tmp_path, free_port):
    async with Scene(tmp_path, free_port, wait=0.2) as scene:
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(1, "model/w: No such file"))
        [refused] = await scene.said(launch.Refused)
        assert refused.message.endswith("missing: rank 0, 1; rank 1: model/w: No such file")


@asynchronous
async def test_a_first_agent_that_does_not_fit_the_methods_does_not_end_the_start(tmp_path, free_port, caplog):
    two_inputs = SERVABLE.replace("predict(x)", "predict(x, z)").replace("model, x,", "model, x, z,")
    async with Scene(tmp_path, free_port, servable=two_inputs) as scene:
        refused = await (await scene.agent(0)).next(group.Refuse)
        assert refused.message == "method 'predict' gives the model 2 inputs; its shards take 1"
        supervisor = await scene.supervisor()
        supervisor.send(group.GaveUp(0, refused.message))
        while not any(said.reason for said in await scene.said(launch.Waiting)):
            await asyncio.sleep(0.005)
        assert not scene.launcher.take(launch.Refused)
        assert [record.message for record in caplog.records if refused.message in record.message] == [
            f"replica 0 waits for other agents: rank 0: {refused.message}"
        ]


@asynchronous
async def test_requests_that_fail(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        generation, (leader, _) = await scene.agents(0, 1)
        main.send(*infer(1, method="train"))
        failed = await main.next(front.Failed)
        assert (failed.error, failed.message) == ("NotFound", "servable 'net' has no method 'train'")

        cases = [
            (infer(2, ids=TensorMeta("float32", (3,), 12)), "input 'x' is missing; predict takes x"),
            (infer(3, np.zeros(4, np.float32)), "input 'x' must have size 3 at axis 0, got 4"),
            (infer(4, TEXT, x=TensorMeta("str", (1,), 12, (12,))), "input 'x' must have dtype float32, got str"),
        ]
        for request, said in cases:
            main.send(*request)
            reply = await main.next(front.Reply)
            assert reply.results == [front.InstanceError("InvalidInput", f"instance 0: {said}")]

        main.send(*infer(6))
        await leader.next(group.Step)
        leader.send(group.StepFailed(generation, 0, "IndexError: 9"))
        assert await leader.next(group.FailureNoted) == group.FailureNoted(generation, 0)
        leader.send(group.Output(generation, 0), bytes(64))
        reply = await main.next(front.Reply)
        assert reply.results == [
            front.InstanceError("StepError", "instance 0: method 'predict', 'stage 1': the model raised IndexError: 9")
        ]


@asynchronous
async def test_cancelled_request_and_lost_main(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        main, second = await scene.main(), await scene.main()
        main.send(*infer(1))
        main.send(front.Cancel(1))
        main.send(front.Cancel(77))
        second.send(*infer(1, X * 2))
        second.stream.abort()
        await second.lost.wait()
        main.send(*infer(2, X * 3))
        _, (leader, _) = await scene.agents(0, 1)
        await leader.next(group.Step)
        assert leader.payload[:12].tobytes() == (X * 3).tobytes()


@asynchronous
async def test_stop_waits_until_all_have_left(tmp_path, free_port):
    async with Scene(tmp_path, free_port, exit_timeout=30) as scene:
        # Somebody had been there, alone, and left.
        stranger = await scene.peer(group.ToAgent, twin_name(scene.address))
        stranger.stream.abort()
        await stranger.lost.wait()
        main = await scene.main()
        _, agents = await scene.agents(0, 1)
        stopping = asyncio.ensure_future(scene.worker.stop())
        for agent in agents:
            assert (await agent.next(group.Exit)).reason == "the servable is stopped"
        assert (await state(main, "stopping")).reason == "the servable is stopped"
        assert not stopping.done()
        agents[0].stream.close()
        await agents[0].lost.wait()
        assert not stopping.done()
        agents[1].stream.close()
        await stopping


@asynchronous
async def test_stop_does_not_wait_for_ever(tmp_path, free_port, caplog):
    async with Scene(tmp_path, free_port, exit_timeout=0.1) as scene:
        await scene.agents(0, 1)
        await scene.worker.stop()
        assert "2 agents and supervisors did not leave in time" in caplog.text


def test_peer_may_be_a_blocking_socket(tmp_path, free_port):
    """As the agents are."""

    def ask(address):
        with contextlib.closing(FrameSocket(socket.create_connection(address, 10), group.ToAgent)) as frames:
            frames.send(group.Register(0, 1, "s", "cpu", 0, "127.0.0.1:7000", [config(0)]))
            return frames.receive()[0]

    async def body():
        async with Scene(tmp_path, free_port) as scene:
            assert await asyncio.to_thread(ask, scene.address) == group.Registered(100)

    asyncio.run(body())


@asynchronous
async def test_an_agent_with_a_secret_at_a_worker_without_one(tmp_path, free_port):
    async with Scene(tmp_path, free_port) as scene:
        agent = await scene.peer(group.ToAgent, twin_name(scene.address))
        agent.send(group.Join(bytes(32)))
        answer = await agent.next(group.Refuse)
        assert answer.error == "JoinRefused"
        assert "this Worker was given no join secret" in answer.message
        await agent.lost.wait()


@asynchronous
async def test_only_so_many_that_have_proved_nothing(tmp_path, free_port):
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("a secret")
    async with Scene(tmp_path, free_port, secret=str(secret), max_joining=2) as scene:
        silent = [await scene.peer(group.ToAgent, twin_name(scene.address)) for _ in range(3)]
        await silent[0].lost.wait()
        assert not silent[2].lost.is_set()
        door = Door(Security(b"a secret"), "Worker", 20, scene.address)
        agent = await scene.peer(group.ToAgent, twin_name(scene.address), door)
        await agent.admitted.wait()
        agent.send(group.Register(0, 1, "s", "cpu", 0, "127.0.0.1:7000", [config(0)]))
        await agent.next(group.Registered)
