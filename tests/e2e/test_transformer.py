"""A transformer in pipeline stages of tensor-parallel ranks, called as users call it."""

import concurrent.futures
import hashlib
import json
import shutil
import time
import urllib.request

import numpy as np
import pytest
import torch
from serving import (
    Up,
    export_transformer,
    token_ids,
    transformer_instances,
    transformer_reference,
    write_servable,
)

TOLERANCE = 1e-5
IN_FLIGHT = 10


@pytest.fixture(scope="module")
def served(transformer):
    with transformer.up() as up:
        yield up


@pytest.mark.parametrize("count", [1, 7, 32])
def test_instances_of_one_request_give_what_the_unsharded_model_gives(transformer, served, count):
    ids = token_ids(count, 12, seed=count)
    with served.client(raise_errors=True) as client:
        results = client.infer(transformer_instances(ids), timeout=60)
    expected = transformer_reference(transformer.model, ids)
    for result, logits in zip(results, expected, strict=True):
        assert result["logits"].dtype == np.float32
        np.testing.assert_allclose(result["logits"], logits, atol=TOLERANCE)


def test_instances_of_different_length_in_one_request_each_get_their_own_answer(transformer, served):
    rows = [token_ids(1, length, seed=length)[0] for length in (1, 64, 3, 3, 17, 2)]
    with served.client(raise_errors=True) as client:
        results = client.infer([transformer_instances(row[None])[0] for row in rows], timeout=60)
    for row, result in zip(rows, results, strict=True):
        expected = transformer_reference(transformer.model, row[None])[0]
        np.testing.assert_allclose(result["logits"], expected, atol=TOLERANCE)


def test_rest_gives_the_same(transformer, served):
    ids = token_ids(2, 5, seed=3)
    instances = [{"ids": row.tolist(), "attention_mask": [1] * 5} for row in ids]
    request = urllib.request.Request(
        f"http://{served.rest}/model/transformer:predict", json.dumps({"instances": instances}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        results = json.load(reply)["instances"]
    expected = transformer_reference(transformer.model, ids)
    for result, logits in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.array(result["logits"], np.float32), logits, atol=TOLERANCE)


def test_many_clients_with_mixed_shapes_each_get_the_answer_to_their_own_input(transformer, served):
    inputs = [token_ids(1, length, seed=100 + length) for length in range(1, 25)]
    expected = [transformer_reference(transformer.model, ids)[0] for ids in inputs]

    def work(start):
        with served.client(raise_errors=True) as client:
            for i in range(60):
                at = (start * 7 + i) % len(inputs)
                (result,) = client.infer(transformer_instances(inputs[at]), timeout=60)
                np.testing.assert_allclose(result["logits"], expected[at], atol=TOLERANCE)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_an_id_out_of_range_gets_its_error_at_once_and_the_next_1000_answers_are_right(transformer, served):
    pids = served.pids()
    check_error_then_answers(transformer, served, bad_id=256, error="IndexError: index out of range")
    assert served.pids() == pids


def check_error_then_answers(transformer, up, bad_id, error):
    """The bad instance, among good ones from other clients, fails alone and within a second."""
    good = token_ids(16, 9, seed=11) % 100
    expected = transformer_reference(transformer.model, good)
    bad = good[0].clone()
    bad[4] = bad_id
    with up.client() as client:
        # Once before, so that neither connecting nor a first step is in the second.
        client.infer(transformer_instances(good), timeout=60)
        taken = []
        for _ in range(3):
            start = time.monotonic()
            mixed = client.infer(transformer_instances(torch.stack([good[0], bad, good[1]])), timeout=60)
            taken.append(time.monotonic() - start)
            assert error in mixed[1]["error"]
            assert "Traceback" not in mixed[1]["error"]
            np.testing.assert_allclose(mixed[0]["logits"], expected[0], atol=TOLERANCE)
            np.testing.assert_allclose(mixed[2]["logits"], expected[1], atol=TOLERANCE)
        # A machine that others use, too, may stop for a second.
        assert min(taken) < 1
        # Some in flight at once, each a request of its own.
        for _ in range(1000 // IN_FLIGHT):
            pending = [client.infer_async(transformer_instances(good[i][None]), timeout=60) for i in range(IN_FLIGHT)]
            for i, answer in enumerate(pending):
                (result,) = answer.result()
                np.testing.assert_allclose(result["logits"], expected[i], atol=TOLERANCE)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_alone_gets_its_error_and_the_next_1000_answers_are_right(transformer, tmp_path, rank):
    """One rank of the first stage has a shard that refuses ids of 200 and more; its peers compute on."""
    model_dir = tmp_path / "model"
    shutil.copytree(transformer.model_dir, model_dir)
    narrow_vocabulary(model_dir / f"device{rank}", total=200)
    config = "rank_size=4, stage_size=2, with_batch_dim=True"
    servables = write_servable(tmp_path, "transformer", config, "ids, attention_mask", "logits")
    with Up(servables, model_dir, "transformer") as up:
        pids = up.pids()
        check_error_then_answers(transformer, up, bad_id=220, error="IndexError: index out of range")
        assert up.pids() == pids
        assert up.stop() == 0


def narrow_vocabulary(device, total):
    graph_file, config_file = device / "transformer.graph.json", device / "group_config.json"
    graph = json.loads(graph_file.read_text())
    lookups = [node for node in graph["nodes"] if node["op"] == "shardserve.embedding"]
    (lookup,) = [node for node in lookups if node["args"][3] == 256]
    lookup["args"][3] = total
    graph_file.write_text(json.dumps(graph))
    config = json.loads(config_file.read_text())
    config["graph_sha256"] = hashlib.sha256(graph_file.read_bytes()).hexdigest()
    config_file.write_text(json.dumps(config))


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (8, 2)], ids=["tp2", "pp2", "16 ranks in 2 stages"])
def test_whole_batches_on_other_layouts(tmp_path, layout):
    tensor_parallel, pipeline_parallel = layout
    model = export_transformer(tmp_path / "model", tensor_parallel, pipeline_parallel)
    ranks = tensor_parallel * pipeline_parallel
    config = f"rank_size={ranks}, stage_size={pipeline_parallel}, with_batch_dim=False"
    servables = write_servable(tmp_path, "transformer", config, "ids, attention_mask", "logits")
    with Up(servables, tmp_path / "model", "transformer") as up, up.client(raise_errors=True) as client:
        for count in (1, 7, 32):
            ids = token_ids(count, 11, seed=count)
            instance = {"ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
            (result,) = client.infer(instance, timeout=60)
            np.testing.assert_allclose(result["logits"], transformer_reference(model, ids), atol=TOLERANCE)
        assert up.stop() == 0


def test_gloo_in_place_of_shared_memory_gives_the_same(transformer):
    with transformer.up(SHARDSERVE_COLLECTIVE="gloo") as up:
        check_error_then_answers(transformer, up, bad_id=256, error="IndexError: index out of range")
        assert up.stop() == 0
