"""Many steps in flight through tensor- and pipeline-parallel ranks: every answer belongs to its own input."""

import asyncio
import itertools
import random

import numpy as np
import pytest
from serving import Up, token_ids, transformer_instances, transformer_reference, write_servable

from shardserve.client import AsyncClient

TOLERANCE = 1e-5
INPUTS = 300
IN_FLIGHT = 96


@pytest.fixture(scope="module")
def questions(transformer):
    """(instance, its logits): no two inputs, and no two answers, are the same."""
    lengths = itertools.cycle([1, 2, 3, 5, 8, 8, 8, 13, 21, 34, 64])
    inputs = [token_ids(1, length, seed=1000 + i) for i, length in zip(range(INPUTS), lengths, strict=False)]
    return [(transformer_instances(ids)[0], transformer_reference(transformer.model, ids)[0]) for ids in inputs]


@pytest.fixture(scope="module")
def padded(transformer, tmp_path_factory):
    pad = '{"ids": (0, 0), "attention_mask": (0, 0)}'
    folder = write_servable(
        tmp_path_factory.mktemp("padded"),
        "transformer",
        f"rank_size=4, stage_size=2, max_batch_delay_ms=2, pad={pad}",
        "ids, attention_mask",
        "logits",
    )
    return Up(folder, transformer.model_dir, "transformer")


async def ask(address, questions, count):
    """Sends `count` requests of one to three instances, drawn at random, and checks each answer against its input."""
    draw = random.Random(11)
    left = iter(range(count))

    async def client():
        for _ in left:
            chosen = draw.choices(questions, k=draw.choice([1, 1, 1, 2, 3]))
            results = await predict.infer([instance for instance, _ in chosen], timeout=120)
            for (_, expected), result in zip(chosen, results, strict=True):
                assert result["logits"].shape == expected.shape
                np.testing.assert_allclose(result["logits"], expected, atol=TOLERANCE)

    async with AsyncClient(address, "transformer", "predict", raise_errors=True) as predict:
        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))


def test_20000_requests_of_mixed_shapes_each_get_the_answer_to_their_own_input(transformer, questions):
    with transformer.up() as up:
        asyncio.run(ask(up.grpc, questions, 20_000))
        replica = up.replica()
        assert (replica["state"], up.stop()) == ("serving", 0)
        assert replica["dropped"] == 0


def test_padded_to_one_length_each_gets_the_answer_that_its_own_length_has(padded, questions):
    with padded as up:
        asyncio.run(ask(up.grpc, questions, 4_000))
        assert up.stop() == 0
