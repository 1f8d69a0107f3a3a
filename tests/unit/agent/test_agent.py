import asyncio
import contextlib
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from asynchronous import asynchronous
from limits import memory_left

from shardserve.agent.agent import check_collectives
from shardserve.errors import StartError
from shardserve.shards.program import Program
from shardserve.wire import segments
from shardserve.wire.messages import Generation, group
from shardserve.wire.shared import SMALLEST

from .scripted import HOST, Host, ScriptedWorker, formed, output, send_step
from .shards import write_shards

pytestmark = pytest.mark.usefixtures("nothing_left")
X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


@contextlib.asynccontextmanager
async def registered(directory, ports, tensor_parallel, stages, then=()):
    """A Worker and its agents, which have registered."""
    models = write_shards(directory, tensor_parallel, stages, then=then)
    worker = ScriptedWorker(ports[0], len(models), stages)
    async with worker, Host(ports[0], models, ports[1]):
        await worker.supervisor(*range(len(models)))
        yield worker, await worker.agents(len(models))


@pytest.mark.parametrize(
    ("tensor_parallel", "stages", "expected"), [(1, 1, X), (2, 1, 2 * X), (1, 2, X + 1), (2, 2, 4 * X + 2)]
)
def test_steps_in_every_layout(tmp_path, ports, tensor_parallel, stages, expected):
    @asynchronous
    async def run():
        async with registered(tmp_path, ports, tensor_parallel, stages) as (worker, agents):
            generation = await worker.form(agents)
            # Several in flight; the leader of the last stage answers in their order.
            for step in range(3):
                send_step(agents, generation, step, X * step if step else X, tensor_parallel)
            leader = agents[-tensor_parallel]
            for step in range(3):
                assert await leader.next(group.Output) == group.Output(generation, step)
                last = stages - 1
                offset = tensor_parallel * last
                wanted = (X * step if step else X) * tensor_parallel**stages + offset
                assert np.array_equal(output(leader, X.shape), wanted)
                assert step or np.array_equal(wanted, expected)

    run()


@asynchronous
async def test_an_agent_that_waits_holds_nothing_of_the_last_step(tmp_path, ports, monkeypatch):
    # Other tests' connections may have left some.
    monkeypatch.setattr(segments, "_pool", None)
    large = np.ones((SMALLEST // 12 + 1, 3), np.float32)
    async with registered(tmp_path, ports, 1, 1) as (worker, [agent]):
        generation = await worker.form([agent])
        # Before it answers the first it has said that it takes shared memory.
        for step in range(2):
            send_step([agent], generation, step, large)
            await agent.next(group.Output)
        [segment] = segments.pool()._segments
        async with asyncio.timeout(30):
            while segment.unread:
                await asyncio.sleep(0.005)


@asynchronous
async def test_a_rank_dies_in_a_step(tmp_path, ports):
    async with registered(tmp_path, ports, 2, 2) as (worker, agents):
        first = await worker.form(agents)
        victim = agents[1]
        os.kill(victim.register.pid, signal.SIGSTOP)
        send_step(agents, first, 0, X, 2)
        os.kill(victim.register.pid, signal.SIGKILL)
        await victim.lost.wait()
        survivors = [agent for agent in agents if agent is not victim]
        began = time.monotonic()
        for agent in survivors:
            agent.send(group.End(first))
        for agent in survivors:
            # Rank 3 may have seen its link break before it was told.
            message, _ = await agent.frames.get()
            while isinstance(message, group.Broken):
                message, _ = await agent.frames.get()
            assert message == group.Parked(first)
        assert time.monotonic() - began < 5
        [reborn] = await worker.agents(1)
        agents[1] = reborn
        second = await worker.form(agents, 2)
        # What is left of the old generation is nobody's.
        send_step(agents, first, 1, X * 100, 2)
        send_step(agents, second, 0, X, 2)
        assert await agents[2].next(group.Output) == group.Output(second, 0)
        assert np.array_equal(output(agents[2], X.shape), 4 * X + 2)


@asynchronous
async def test_an_exception_inside_a_step(tmp_path, ports):
    async with registered(tmp_path, ports, 2, 1) as (worker, agents):
        generation = await worker.form(agents)
        # As an export whose shapes don't fit each other would: only rank 1 raises.
        for i, rows in enumerate([2, -1]):
            agents[i].send(
                group.Step(generation, 0, 0, {"batch": abs(rows)}), X[: abs(rows)].tobytes().ljust(64, b"\0")
            )
        # Sizes differ: no exception of the step, but of the group.
        broken = await agents[0].next(group.Broken)
        assert broken.generation == generation
        assert "rank 0 is at all_reduce of 24 bytes, piece 1 of step 0, rank 1 at" in broken.message
        assert "rank 1 is at all_reduce of 12 bytes" in (await agents[1].next(group.Broken)).message
        for agent in agents:
            agent.send(group.End(generation))
            assert await agent.next(group.Parked) == group.Parked(generation)
        second = await worker.form(agents, 2)
        send_step(agents, second, 0, X)
        await agents[0].next(group.Output)
        assert np.array_equal(output(agents[0], X.shape), 2 * X)


@asynchronous
async def test_the_text_of_what_a_model_raises_has_an_end(tmp_path, ports):
    view = {"name": "v", "op": "aten.view.default", "args": [{"node": "a"}, [2] * 5000]}
    async with registered(tmp_path, ports, 1, 1, [view]) as (worker, agents):
        generation = await worker.form(agents)
        send_step(agents, generation, 0, X)
        failed = await agents[0].next(group.StepFailed)
        assert failed.message.startswith("RuntimeError: shape '[2, 2, ")
        text, _, rest = failed.message.partition("…")
        assert len(text) == 3000
        assert re.fullmatch(r" \(1\d{4} more characters left out\)", rest)
        agents[0].send(group.FailureNoted(generation, 0))


@asynchronous
async def test_inputs_without_memory_for_them_fail_their_step(tmp_path, ports):
    size = 64 << 20
    async with registered(tmp_path, ports, 2, 1) as (worker, agents):
        generation = await worker.form(agents)
        with memory_left(size // 2, agents[0].register.pid):
            # The first comes by the socket, the second in shared memory.
            for number in range(2):
                agents[0].send(group.Step(generation, number, 0, {"batch": 2}), bytes(size))
                agents[1].send(group.Step(generation, number, 0, {"batch": 2}), X.tobytes().ljust(64, b"\0"))
                failed = await agents[0].next(group.StepFailed)
                assert failed.step == number
                assert failed.message.startswith(f"NoMemory: no memory for {size} bytes")
                agents[0].send(group.FailureNoted(generation, number))
                assert await agents[0].next(group.Output) == group.Output(generation, number)
        send_step(agents, generation, 2, X)
        assert await agents[0].next(group.Output) == group.Output(generation, 2)
        assert np.array_equal(output(agents[0], X.shape), 2 * X)


@asynchronous
async def test_what_a_step_that_ran_out_of_memory_held_is_there_to_be_drained_with(tmp_path, ports):
    def node(name, op, *args, **kwargs):
        return {"name": name, "op": op, "args": list(args), **kwargs}

    mega = 1 << 18  # of float32
    then = [
        node("held", "aten.full.default", [40 * mega], 0.5),
        node("large", "aten.full.default", [80 * mega], 0.5),
        node("reduced", "collective.all_reduce", {"node": "large"}, "sum", shape=[80 * mega], dtype="float32"),
        node("one", "aten.sum.default", {"node": "reduced"}),
        node("other", "aten.sum.default", {"node": "held"}),
        node("sum", "aten.add.Tensor", {"node": "one"}, {"node": "other"}),
        node("y", "aten.add.Tensor", {"node": "a"}, {"node": "sum"}),
    ]
    async with registered(tmp_path, ports, 1, 1, then) as (worker, [agent]):
        generation = await worker.form([agent])
        with memory_left(100 << 20, agent.register.pid):
            send_step([agent], generation, 0, X)
            failed = await agent.next(group.StepFailed)
            assert "allocate memory" in failed.message
            agent.send(group.FailureNoted(generation, 0))
            assert await agent.next(group.Output) == group.Output(generation, 0)


@asynchronous
async def test_payload_of_another_size_breaks_the_generation(tmp_path, ports):
    async with registered(tmp_path, ports, 1, 1) as (worker, agents):
        generation = await worker.form(agents)
        agents[0].send(group.Step(generation, 0, 0, {"batch": 2}), bytes(128))
        broken = await agents[0].next(group.Broken)
        assert "a payload of 128 bytes came where the header says 64" in broken.message
        # Nothing more is run until the generation has ended.
        send_step(agents, generation, 1, X)
        agents[0].send(group.End(generation))
        await agents[0].next(group.Parked)


@asynchronous
async def test_the_end_while_the_group_forms(tmp_path, ports):
    async with registered(tmp_path, ports, 1, 2) as (worker, agents):
        first = Generation(1, 1)
        # The first stage never connects: rank 1 waits for it until it is told.
        agents[1].send(group.Form(first, "shared_memory", None))
        agents[1].send(group.End(first))
        assert await agents[1].next(group.Parked) == group.Parked(first)
        generation = await worker.form(agents, 2)
        send_step(agents, generation, 0, X, 1)
        await agents[1].next(group.Output)
        assert np.array_equal(output(agents[1], X.shape), X + 1)


@asynchronous
async def test_the_next_stage_is_not_there(tmp_path, ports):
    async with registered(tmp_path, ports, 1, 2) as (_, agents):
        agents[0].send(group.Form(Generation(1, 1), "shared_memory", f"{HOST}:{ports[1] + 3}"))
        broken = await agents[0].next(group.Broken)
        assert "Connection refused" in broken.message


@asynchronous
async def test_the_worker_is_gone_in_a_step(tmp_path, ports):
    models = write_shards(tmp_path, 2, 1)
    worker = ScriptedWorker(ports[0], 2)
    async with Host(ports[0], models, ports[1]):
        async with worker:
            await worker.supervisor(0, 1)
            agents = await worker.agents(2)
            generation = await worker.form(agents)
            # Rank 0 waits for rank 1, which is not told of the step.
            send_step(agents[:1], generation, 0, X)
        async with worker:
            again = []
            while len(again) < 2:
                peer = await worker.arrived.get()
                message, _ = await peer.frames.get()
                if isinstance(message, group.Register):
                    peer.register = message
                    again.append(peer)
                else:
                    peer.send(group.Roster((HOST,)))
            again.sort(key=lambda peer: peer.register.rank)
            assert [peer.register.pid for peer in again] == [peer.register.pid for peer in agents]
            generation = await worker.form(again, 2)
            send_step(again, generation, 0, X)
            await again[0].next(group.Output)
            assert np.array_equal(output(again[0], X.shape), 2 * X)


@asynchronous
async def test_generations_leave_nothing_in_an_agent(tmp_path, ports):
    async with registered(tmp_path, ports, 2, 2) as (worker, agents):
        counts = []
        for counter in range(1, 21):
            generation = await worker.form(agents, counter)
            send_step(agents, generation, 0, X, 2)
            await agents[2].next(group.Output)
            for agent in agents:
                agent.send(group.End(generation))
            parked = [await agent.frames.get() for agent in agents]
            # One may see its link end before it is told.
            for agent, (message, _) in zip(agents, parked, strict=True):
                while not isinstance(message, group.Parked):
                    message, _ = await agent.frames.get()
            if counter in (5, 20):
                processes = [psutil.Process(agent.register.pid) for agent in agents]
                counts.append([(process.num_fds(), process.num_threads()) for process in processes])
        for (fds, threads), (later_fds, later_threads) in zip(*counts, strict=True):
            assert later_fds <= fds + 2
            assert later_threads <= threads + 2


@asynchronous
async def test_told_to_leave_while_it_waits(tmp_path, ports):
    async with registered(tmp_path, ports, 2, 1) as (worker, agents):
        generation = await worker.form(agents)
        send_step(agents[:1], generation, 0, X)
        agents[0].send(group.Exit("stopped"))
        await agents[0].lost.wait()


@asynchronous
async def test_forming_is_ordered_not_guessed(tmp_path, ports):
    """Forms that reach the ranks in any order, one long after the others."""
    async with registered(tmp_path, ports, 2, 2) as (_, agents):
        generation = Generation(1, 1)
        for rank in (2, 1, 0, 3):
            after = rank + 2
            address = agents[after].register.stage_address if after < 4 else None
            agents[rank].send(group.Form(generation, "shared_memory", address))
            await asyncio.sleep(0.05)
        await formed(generation, agents)
        send_step(agents, generation, 0, X, 2)
        await agents[2].next(group.Output)
        assert np.array_equal(output(agents[2], X.shape), 4 * X + 2)


def test_cuda_graphs_on_a_cpu_leave_steps_eager(tmp_path, ports, monkeypatch, capfd):
    monkeypatch.setenv("SHARDSERVE_COMPILE", "cuda_graphs")

    @asynchronous
    async def run():
        async with registered(tmp_path, ports, 2, 1) as (worker, agents):
            generation = await worker.form(agents)
            send_step(agents, generation, 0, X)
            await agents[0].next(group.Output)
            assert np.array_equal(output(agents[0], X.shape), 2 * X)

    run()
    assert capfd.readouterr().err.count("steps stay eager: compile=cuda_graphs is for CUDA, this rank is on cpu") == 2


@pytest.mark.parametrize(("device", "tensor_parallel"), [("cpu", 2), ("cpu", 1), ("cuda:0", 1)])
def test_devices_whose_ranks_can_work_together(tmp_path, device, tensor_parallel):
    for model in write_shards(tmp_path, tensor_parallel, stages=2):
        check_collectives(device, Program.load(model).config)


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_tensor_parallel_ranks_on_cuda_are_refused_by_a_torch_without_nccl(tmp_path):
    config = Program.load(write_shards(tmp_path, 2)[1]).config
    with pytest.raises(StartError, match=r"^rank 1: device cuda:1: the torch that is installed \(2\S+\) has no NCCL"):
        check_collectives("cuda:1", config)
