import asyncio
import contextlib

import numpy as np
import pytest
from asynchronous import asynchronous

from shardserve.errors import JoinRefused
from shardserve.settings import Settings
from shardserve.wire.frames import NoMemory
from shardserve.wire.messages import Generation, group
from shardserve.worker.group import ReplicaGroup

from .harness import NOTHING, SIZES, Group, Owner, agent, batch, until


@asynchronous
async def test_forms_when_all_have_come_and_serves_when_all_have_formed():
    g = Group(serving=False)
    g.join(2, 0, 3)
    assert (g.group.state, g.sent(group.Form)) == ("waiting", [0] * 4)
    g.join(1)
    assert (g.group.state, g.generation) == ("forming", Generation(5, 1))
    forms = [each.stream.sent[0] for each in g.agents]
    assert [form.next_address for form in forms] == ["10.0.0.1:7002", "10.0.0.1:7003", None, None]
    assert {(form.generation, form.collective) for form in forms} == {(Generation(5, 1), "shared_memory")}
    g.say(group.Formed, 0, 1, 2, 2)
    assert g.group.state == "forming"
    assert not g.group.has_room
    g.say(group.Formed, 3)
    assert g.group.state == "serving"
    assert g.group.has_room


@asynchronous
async def test_a_stage_across_hosts_uses_gloo():
    g = Group(serving=False, hosts=("a", "a", "b", "c"))
    g.join(*range(4))
    collectives = [each.stream.sent[0].collective for each in g.agents]
    assert collectives == ["shared_memory", "shared_memory", "gloo", "gloo"]


@pytest.mark.parametrize(("setting", "expected"), [("auto", "nccl"), ("gloo", "gloo"), ("nccl", "nccl")])
@asynchronous
async def test_a_stage_on_cuda_uses_nccl(setting, expected):
    g = Group(serving=False, hosts=("a", "a", "b", "c"), collective=setting)
    for rank, each in enumerate(g.agents):
        each.device = f"cuda:{rank}"
    g.join(*range(4))
    assert {each.stream.sent[0].collective for each in g.agents} == {expected}


@pytest.mark.parametrize(
    ("setting", "device", "said"),
    [
        ("nccl", "cpu", "rank 3: runs on cpu; SHARDSERVE_COLLECTIVE=nccl is for CUDA devices"),
        ("shared_memory", "cuda:1", "rank 3: runs on cuda:1; SHARDSERVE_COLLECTIVE=shared_memory is for CPUs"),
        ("gloo", "cuda:1", None),
        ("gloo", "cpu", None),
        ("auto", "cuda:1", None),
    ],
)
@asynchronous
async def test_a_collective_of_another_kind_of_device_is_refused(setting, device, said):
    replica = Group(serving=False, collective=setting).group
    with pytest.raises(JoinRefused, match=said) if said else contextlib.nullcontext():
        replica.check_device(3, device)
    # Where there is nothing to exchange, none is needed.
    ReplicaGroup(0, 2, 2, 3, Owner(), Settings(collective=setting)).check_device(3, device)


@asynchronous
async def test_steps_are_numbered_and_only_the_first_stage_gets_inputs():
    g = Group()
    for _ in range(3):
        g.group.send_step(batch())
    assert not g.group.has_room
    for each in g.agents:
        assert each.stream.sent == [group.Step(g.generation, n, 0, {"batch": 2}) for n in range(3)]
        data = np.arange(6, dtype=np.float32).tobytes() + b"\x01"
        assert each.stream.payloads == [data if each.stage == 0 else b""] * 3


@asynchronous
async def test_outputs_free_their_place():
    g = Group()
    batches = [batch(), batch()]
    for each in batches:
        g.group.send_step(each)
    payload = np.ones(64, np.uint8)
    g.say(group.Output, 2, step=1, payload=payload)
    # The next step is sent before the answers.
    assert g.owner.said[-3:] == [("answered", batches[1], payload), ("step ended",), ("delivered",)]
    assert g.group.in_flight == 1
    # A second answer is ignored.
    g.say(group.Output, 2, step=1)
    assert g.group.dropped == 1
    assert len(g.owner.take("answered")) == 1


@asynchronous
async def test_a_failed_step_is_noted_first_and_its_output_ignored():
    g = Group()
    failing = batch()
    g.group.send_step(failing)
    noted = []
    g.owner.failed = lambda *what: noted.append((what, g.sent(group.FailureNoted)))
    g.say(group.StepFailed, 1, step=0, message="IndexError: 9")
    assert noted == [((failing, "IndexError: 9"), [0, 1, 0, 0])]
    # Another rank raised too: it is released as well, the request fails once.
    g.say(group.StepFailed, 0, step=0, message="IndexError: 9")
    assert g.sent(group.FailureNoted) == [1, 1, 0, 0]
    assert len(noted) == 1
    assert g.group.in_flight == 1
    g.say(group.Output, 2, step=0)
    assert (g.group.in_flight, g.owner.take("answered"), g.owner.take("step ended")) == (0, [], [()])


@asynchronous
async def test_an_output_without_memory_for_it_fails_its_step():
    g = Group()
    failing = batch()
    g.group.send_step(failing)
    g.say(group.Output, 2, step=0, payload=NoMemory(None, "no memory for 9 bytes"))
    text = "MemoryError: the Worker has no memory for 9 bytes of outputs"
    assert g.owner.said[-2:] == [("failed", failing, text), ("step ended",)]
    assert (g.group.state, g.group.in_flight) == ("serving", 0)


@asynchronous
async def test_failure_after_the_answer_only_releases_the_rank():
    g = Group()
    g.group.send_step(batch())
    g.say(group.Output, 2, step=0)
    g.say(group.StepFailed, 3, step=0, message="late")
    assert g.sent(group.FailureNoted) == [0, 0, 0, 1]
    assert g.owner.take("failed") == []


@asynchronous
async def test_a_group_that_can_not_form_says_why_and_tries_on():
    g = Group(serving=False, form_backoff=0.001, max_formings=3)
    g.join(*range(4))
    for number in range(1, 4):
        await until(lambda: g.group.state == "forming")
        assert g.group.generation == Generation(5, number)
        assert g.group.failure is None
        g.say(group.Broken, 1, message=f"no route {number}")
        g.say(group.Parked, *range(4))
    assert g.group.failure == "replica 0 could not form, 3 times in a row: rank 1: no route 3"
    # It tries on, since what is wrong may be mended.
    await until(lambda: g.group.state == "forming")
    g.say(group.Formed, *range(4))
    assert (g.group.state, g.group.failure) == ("serving", None)


@asynchronous
async def test_what_is_of_another_generation_is_dropped_and_counted():
    g = Group()
    g.group.send_step(batch())
    stranger = agent(2, **SIZES)
    for generation in (Generation(5, 0), Generation(5, 2), Generation(4, 1)):
        g.say(group.Output, 2, generation=generation, step=0)
        g.say(group.StepFailed, 2, generation=generation, step=0, message="x")
        g.say(group.Broken, 2, generation=generation, message="x")
    g.group.handle(stranger, group.Output(g.generation, 0), NOTHING)
    g.group.handle(g.agents[0], group.Introduce(1, "s"), NOTHING)
    assert (g.group.dropped, g.group.state, g.group.in_flight) == (11, "serving", 1)
    assert g.sent(group.FailureNoted) == [0] * 4


@asynchronous
async def test_what_comes_out_of_turn_is_dropped_and_counted():
    g = Group()
    g.say(group.Formed, 0)
    g.say(group.Parked, 0)
    assert (g.group.dropped, g.group.state) == (2, "serving")
    g.lose(1)
    g.say(group.Output, 2, step=0)
    g.say(group.Formed, 2)
    assert (g.group.dropped, g.group.state) == (4, "ending")


@asynchronous
async def test_close_leaves_no_step_and_no_timer():
    g = Group(step_timeout=0.02)
    g.group.send_step(batch())
    g.group.close()
    assert not g.group.in_flight
    assert not g.group.has_room
    # The step's timer would have come by then.
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0.04, passed.set)
    await passed.wait()
    g.lose(0)
    assert g.group.endings == 0
