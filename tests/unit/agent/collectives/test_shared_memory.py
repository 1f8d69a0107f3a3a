import dataclasses
import itertools
import os
import random
import select
import threading
import time

import psutil
import pytest
import torch

from shardserve.agent.collectives.errors import CollectiveBroken
from shardserve.agent.collectives.memory import slot_size
from shardserve.agent.collectives.shared_memory import SHARED_OUT, TURNS
from shardserve.agent.lifetime import GenerationEnded
from shardserve.settings import Settings
from shardserve.shards.config import DTYPES as DTYPE_NAMES
from shardserve.shards.operators import can_reduce

from .ranks import SLOT, Ranks, run_ranks

pytestmark = pytest.mark.usefixtures("nothing_left")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
OPS = ["sum", "avg", "max", "min", "product"]


def tensor(rank, shape, dtype, seed=0):
    made = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(100 * seed + rank))
    return made.to(dtype)


def reduced(parts, op):
    """In rank order and the tensors' own dtype, as every rank must have it to the bit."""
    out = parts[0].clone()
    for part in parts[1:]:
        if op in ("sum", "avg"):
            out = out + part
        elif op == "product":
            out = out * part
        else:
            out = torch.maximum(out, part) if op == "max" else torch.minimum(out, part)
    return out / len(parts) if op == "avg" else out


def check(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


def every_operation(member, shapes, dtypes=DTYPES):
    collective, size, rank = member.join(), member.size, member.rank
    for seed, (shape, dtype) in enumerate(itertools.product(shapes, dtypes)):
        parts = [tensor(r, shape, dtype, seed) for r in range(size)]
        mine = parts[rank].clone()
        for op in OPS:
            if can_reduce(op, dtype):
                check(collective.all_reduce(mine, op), reduced(parts, op))
        for source in range(size):
            check(collective.broadcast(mine, source), parts[source])
        if shape:
            check(collective.all_gather(mine), torch.cat(parts))
        if shape and shape[0] % size == 0:
            for op in OPS:
                if not can_reduce(op, dtype):
                    continue
                expected = reduced(parts, op).reshape(size, shape[0] // size, *shape[1:])[rank]
                check(collective.reduce_scatter(mine, op), expected)
        if shape:
            cuts = [[shape[0] * (j + 1) // (size + i) for j in range(size)] for i in range(size)]
            splits = [[max(0, b - a) for a, b in itertools.pairwise([0, *cut])] for cut in cuts]
            for row in splits:
                row[-1] += shape[0] - sum(row)
            sent = [part.split(row) for part, row in zip(parts, splits, strict=True)]
            expected = torch.cat([rows[rank] for rows in sent])
            got = collective.all_to_all(mine, [row[rank] for row in splits], splits[rank])
            check(got, expected)
        assert torch.equal(mine, parts[rank])
    nan_is_kept(collective, [dtype for dtype in dtypes if dtype.is_floating_point])


def nan_is_kept(collective, dtypes):
    """In every rank's place, of every rank."""
    for dtype in dtypes:
        mine = torch.ones(collective.size, dtype=dtype)
        mine[collective.rank] = torch.nan
        for op in ("max", "min"):
            assert collective.all_reduce(mine, op).isnan().all()
            assert collective.reduce_scatter(mine, op).isnan().all()


SHAPES = [(), (12,), (12, 5), (1,), (7, 3), (0,), (0, 5), (12, 0)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_operation_and_dtype(size):
    run_ranks(every_operation, size, SHAPES)


def test_tensors_larger_than_a_slot():
    # A slot has 4096 bytes; ends on, just before and just after its end, for all element sizes.
    run_ranks(every_operation, 3, [(SLOT + 1,), (SLOT // 8,), (SLOT // 4 - 1, 3), (6000, 1, 2)])


def test_the_smallest_slots_have_an_element_of_each_rank():
    slot_bytes = slot_size(dataclasses.replace(Settings(), collective_slot_bytes=1))
    run_ranks(every_operation, 9, [(40,), (9 * 60,)], [torch.float64], slot_bytes=slot_bytes)


def test_every_dtype_of_a_shard():
    run_ranks(
        every_operation, 2, [(), (6, 5), (0, 3), (SLOT, 2)], [getattr(torch, name) for name in sorted(DTYPE_NAMES)]
    )


def test_reductions_that_are_shared_out():
    # Just below, at and above the size from which they are; one that the ranks can't share equally; several pieces.
    elements = SHARED_OUT // 4
    shapes = [(elements - 1,), (elements,), (elements + 3,), (elements + 4,), (elements, 9)]
    run_ranks(every_operation, 3, shapes, [torch.float32, torch.bfloat16], slot_bytes=2 * SHARED_OUT)


def same_bits(member):
    """A sum whose last bits depend on the order."""
    collective, chance = member.join(), torch.Generator().manual_seed(member.rank)
    sums = [collective.all_reduce(torch.randn(count, generator=chance), "sum") for count in (10, 5000, SHARED_OUT)]
    return [total.view(torch.int32).sum().item() for total in sums]


@pytest.mark.parametrize("size", [3, 4])
def test_all_ranks_get_the_same_bits(size):
    results = run_ranks(same_bits, size, slot_bytes=4 * SHARED_OUT)
    assert results == [results[0]] * size


def test_several_groups_at_once():
    """Each has memory of its own; more ranks than cores."""
    groups = [Ranks(many_small_calls, size) for size in (2, 3, 2)]
    assert [ranks.results() for ranks in groups] == [[True] * 2, [True] * 3, [True] * 2]


def many_small_calls(member):
    """Results stay as they were, however many calls follow; sizes change from call to call."""
    collective, rank, size = member.join(), member.rank, member.size
    chance = random.Random(5)
    kept = []
    for call in range(4000):
        count = chance.choice([0, 1, 2, 3, 17, 64, 65, 500, 1100])
        kind = chance.randrange(4)
        mine = torch.full((count,), float(call % 97 + rank))
        if kind == 0:
            got = collective.all_reduce(mine, "sum")
            expected = torch.full((count,), float(call % 97 * size + size * (size - 1) // 2))
        elif kind == 1:
            got = collective.all_gather(mine)
            expected = (torch.arange(size) + call % 97).repeat_interleave(count).float()
        elif kind == 2:
            source = chance.randrange(size)
            got = collective.broadcast(mine, source)
            expected = torch.full((count,), float(call % 97 + source))
        else:
            got = collective.reduce_scatter(mine.repeat(size), "max")
            expected = torch.full((count,), float(call % 97 + size - 1))
        # What the caller does with its input afterwards is its own business.
        mine.fill_(-1)
        assert torch.equal(got, expected), (call, kind, count)
        kept.append((got, expected))
        if len(kept) > 300:
            assert all(torch.equal(*pair) for pair in kept), call
            kept = kept[250:]
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_thousands_of_small_calls(size):
    assert run_ranks(many_small_calls, size) == [True] * size


def wait_for_the_dead(member, pipe):
    collective = member.join()
    collective.all_reduce(torch.ones(3), "sum")
    if member.rank == 1:
        os.write(pipe, b"x")
        threading.Event().wait()
    asked = []

    def end():
        # Once told by the test that the rank is dead and this one sleeps.
        select.select([pipe_end], [], [])
        asked.append(time.monotonic())
        member.lifetime.end()

    pipe_end = member.ends[member.rank]
    threading.Thread(target=end).start()
    with pytest.raises(GenerationEnded):
        collective.all_reduce(torch.ones(3), "sum")
    took = time.monotonic() - asked[0]
    # And stays ended.
    with pytest.raises(GenerationEnded):
        collective.all_reduce(torch.ones(3), "sum")
    return took


def test_a_rank_dies_and_the_others_are_ended_while_asleep():
    reached, write = os.pipe()
    ends = [os.pipe() for _ in range(3)]

    def function(member):
        member.ends = [end[0] for end in ends]
        return wait_for_the_dead(member, write)

    ranks = Ranks(function, 3)
    os.read(reached, 1)
    ranks.kill(1)
    for rank in (0, 2):
        process = psutil.Process(ranks.pids[rank])
        while process.status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        os.write(ends[rank][1], b"x")
    took = ranks.results(1)
    assert max(took[0], took[2]) < 10
    for fd in (reached, write, *itertools.chain(*ends)):
        os.close(fd)


def mismatch(member, what):
    collective = member.join()
    collective.all_reduce(torch.ones(2), "sum")
    with pytest.raises(CollectiveBroken) as caught:  # noqa: PT012
        if what == "size":
            collective.all_reduce(torch.ones(4 + member.rank), "sum")
        elif what == "step":
            collective.begin(7 + member.rank)
            collective.all_reduce(torch.ones(4), "sum")
        elif what == "missed":
            if member.rank == 1:
                collective.begin(8)
            collective.all_reduce(torch.ones(4), "sum")
        elif member.rank == 0:
            collective.all_reduce(torch.ones(4), "sum")
        else:
            collective.all_gather(torch.ones(4))
    # The others may not have read what this one published.
    member.barrier.wait(30)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "places"),
    [
        ("size", ("all_reduce of 16 bytes, piece 2 of step 0", "all_reduce of 20 bytes, piece 2 of step 0")),
        ("kind", ("all_reduce of 16 bytes, piece 2 of step 0", "all_gather of 16 bytes, piece 2 of step 0")),
        ("step", ("all_reduce of 16 bytes, piece 1 of step 7", "all_reduce of 16 bytes, piece 1 of step 8")),
        ("missed", ("all_reduce of 16 bytes, piece 2 of step 0", "all_reduce of 16 bytes, piece 1 of step 8")),
    ],
)
def test_ranks_at_other_places_see_it(what, places):
    zero, one = (f"rank {rank} is at {place}" for rank, place in enumerate(places))
    assert run_ranks(mismatch, 2, what) == [
        f"{zero}, {one.replace('is at', 'at')}",
        f"{one}, {zero.replace('is at', 'at')}",
    ]


def impossible(member):
    collective = member.join()
    with pytest.raises(
        CollectiveBroken, match=r"reduce_scatter of \[7, 2\]: its first dim can't be divided by 2 ranks"
    ):
        collective.reduce_scatter(torch.ones(7, 2), "sum")
    with pytest.raises(CollectiveBroken, match=r"all_to_all of \[3\] in \[1, 1\] rows to 2 ranks"):
        collective.all_to_all(torch.ones(3), [1, 1], [1, 1])
    # Nothing was published.
    check(collective.all_reduce(torch.ones(2), "sum"), torch.full((2,), 2.0))


def test_what_ranks_cannot_share_is_an_error_before_anything_is_exchanged():
    run_ranks(impossible, 2)


def wrong_splits(member):
    collective = member.join()
    with pytest.raises(CollectiveBroken, match=rf"rank {member.rank} expects .3, 3. rows, is sent .1, 1."):
        collective.all_to_all(torch.ones(2), [3, 3], [1, 1])


def test_all_to_all_checks_what_it_is_sent():
    run_ranks(wrong_splits, 2)


def silent(member):
    collective = member.join()
    if member.rank == 0:
        with pytest.raises(CollectiveBroken, match=r"rank 0 waited 0.2 s for rank 1 at turn 1, piece 1 of step 0"):
            collective.all_reduce(torch.ones(2), "sum")
    member.barrier.wait(30)


def test_a_wait_has_an_end():
    run_ranks(silent, 2, timeout=0.2)


def generations(member, turns):
    """Each generation stops after another number of turns, some with one rank ahead of the others."""
    for generation, turn in enumerate(turns):
        collective = member.join()
        for step in range(turn):
            got = collective.all_reduce(torch.full((5,), float(generation + step + member.rank)), "max")
            assert got[0] == generation + step + member.size - 1
        if member.rank == generation % member.size:
            # The others never come: ended by another thread, perhaps before it even waits.
            ender = threading.Thread(target=member.lifetime.end)
            ender.start()
            with pytest.raises(GenerationEnded):
                collective.all_reduce(torch.ones(5000), "sum")
            ender.join()
        else:
            member.lifetime.end()
        # The Worker forms the next one when all have parked.
        member.barrier.wait(30)
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [2, 3])
def test_new_generations_start_clean(size):
    chance = random.Random(size)
    turns = [chance.randrange(6) for _ in range(300)]
    few = run_ranks(generations, size, turns[:5])
    assert run_ranks(generations, size, turns) == few


def wrap_around(member):
    collective = member.join()
    # As if so many turns had passed.
    collective._turn = TURNS - 20
    collective._words[collective._own] = TURNS - 20
    member.barrier.wait(30)
    for step in range(60):
        got = collective.all_reduce(torch.full((5,), float(step + member.rank)), "sum")
        assert got[0] == step * member.size + sum(range(member.size)), step
    assert collective._turn == 40
    # Ended just after the turns began anew; nobody may still be reading.
    member.barrier.wait(30)
    collective._turn = TURNS - 1
    collective._words[collective._own] = TURNS - 1
    member.barrier.wait(30)
    collective.all_reduce(torch.ones(2), "sum")
    member.lifetime.end()
    with pytest.raises(GenerationEnded):
        collective.all_reduce(torch.ones(2), "sum")
    member.barrier.wait(30)
    assert member.join().all_reduce(torch.ones(2), "sum")[0] == member.size


def test_turns_begin_anew():
    run_ranks(wrap_around, 3)


def everybody_aborts(member, rounds):
    """All ranks are ended at once, at any point of a step, again and again."""
    chance = random.Random(member.rank)
    longest = 0.0
    for _ in range(rounds):
        collective = member.join()
        stop = threading.Timer(chance.random() * 0.003, member.lifetime.end)
        stop.start()
        with pytest.raises(GenerationEnded):  # noqa: PT012
            while True:
                collective.all_reduce(torch.ones(chance.choice([1, 1])), "sum")
        began = time.monotonic()
        stop.join()
        member.barrier.wait(30)
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize("size", [2, 4])
def test_aborts_of_all_ranks_at_once(size):
    # Were a wake lost, a rank would sleep for the 30 s of its timeout.
    assert max(run_ranks(everybody_aborts, size, 300)) < 10


def one_aborts_early(member, rounds):
    """Rank 0 is ended long before the others, which wait for it until they are ended themselves."""
    for _ in range(rounds):
        collective = member.join()
        collective.all_reduce(torch.ones(4), "sum")
        if member.rank == 0:
            member.lifetime.end()
            with pytest.raises(GenerationEnded):
                collective.all_reduce(torch.ones(4), "sum")
            member.barrier.wait(30)
        else:
            # A third thread lets the others go only after rank 0 has gone.
            def later(lifetime=member.lifetime):
                member.barrier.wait(30)
                lifetime.end()

            thread = threading.Thread(target=later)
            thread.start()
            with pytest.raises(GenerationEnded):
                collective.all_reduce(torch.ones(4), "sum")
            thread.join()
        member.barrier.wait(30)


def test_one_rank_is_ended_before_the_others():
    run_ranks(one_aborts_early, 3, 50)
