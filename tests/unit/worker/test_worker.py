"""Requests from Main to the agents and back; recovery; the end."""

import asyncio
import os
import socket

import numpy as np
import psutil
import pytest
from asynchronous import asynchronous
from limits import memory_left

from shardserve.wire.frames import encode
from shardserve.wire.messages import Generation, TensorMeta, front, group, launch
from shardserve.wire.sockets import twin_name

from .scene import SERVABLE, STATEFUL, TEXT, Scene, X, infer, state

pytestmark = pytest.mark.usefixtures("nothing_left")


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


@asynchronous
async def test_a_stateful_servable_has_a_process_of_python_stages_for_each_replica(tmp_path, free_port):
    async with Scene(tmp_path, free_port, replicas=3, servable=STATEFUL) as scene:
        main = await scene.main()
        await scene.agents(0, 1)
        await scene.agents(2, 3)
        await scene.agents(4, 5)
        await state(main, "ready")
        stages = [child for child in psutil.Process().children() if "shardserve.worker.stages" in child.cmdline()]
        assert len(stages) == 3
        await scene.worker.stop()


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
async def test_a_request_that_there_is_no_memory_for_fails_alone(tmp_path, free_port):
    size = 64 << 20
    message, _ = infer(1, x=TensorMeta("uint8", (size,), size))
    frame = b"".join(encode(message, [bytes(size)]))
    async with Scene(tmp_path, free_port) as scene:
        main = await scene.main()
        _, (leader, _) = await scene.agents(0, 1)
        main.send(*infer(7))
        step = await leader.next(group.Step)
        # Not by the stream, which would need memory for it, too.
        with socket.socket(fileno=os.dup(main.stream.peer_socket.fileno())) as ours, memory_left(size // 2):
            await asyncio.get_running_loop().sock_sendall(ours, frame)
            failed = await main.next(front.Failed)
        assert failed == front.Failed(
            1, "Overloaded", f"the Worker has no memory for {size} bytes of the request's inputs"
        )
        leader.send(group.Output(step.generation, step.step), bytes(64))
        assert (await main.next(front.Reply)).request == 7


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
