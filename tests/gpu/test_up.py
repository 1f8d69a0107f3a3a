"""Whole servers whose agents are on CUDA devices."""

import json
import os
import signal

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
from torch import nn
from torch.export import Dim

from shardserve.export import export

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
IDS = [token_ids(count, length, seed) for seed, (count, length) in enumerate([(2, 9), (3, 17), (2, 9), (2, 9), (1, 5)])]


class OnDevices(Up):
    """ranks: how many, all on the first device where `alone`."""

    def __init__(self, folder, model_dir, name, ranks, alone, **environment):
        # A host has no device twice, but may have several addresses.
        places = [(f"127.0.0.{rank + 1}", "0") if alone else ("127.0.0.1", str(rank)) for rank in range(ranks)]
        table = {
            "version": "1.0",
            "server_count": str(len({host for host, _ in places})),
            "status": "completed",
            "server_list": [
                {
                    "server_id": host,
                    "host_nic_ip": "reserve",
                    "device": [
                        {"device_id": device, "device_ip": host, "rank_id": str(rank)}
                        for rank, (other, device) in enumerate(places)
                        if other == host
                    ],
                }
                for host in dict.fromkeys(host for host, _ in places)
            ],
        }
        file = model_dir / "ranks.json"
        file.write_text(json.dumps(table))
        super().__init__(folder, model_dir, name, "--rank-table", str(file), "--device-type", "cuda", **environment)


def check(client, model):
    for ids in IDS:
        answers = client.infer(transformer_instances(ids), timeout=100)
        assert all("logits" in answer for answer in answers), answers
        got = np.stack([answer["logits"] for answer in answers])
        np.testing.assert_allclose(got, transformer_reference(model, ids), atol=1e-3, rtol=1e-3)


LAYOUTS = [
    pytest.param(1, 1, True, id="alone"),
    pytest.param(1, 2, True, id="two stages on one device"),
    pytest.param(2, 1, False, id="two ranks", marks=two_devices),
]


@pytest.mark.parametrize("compiled", ["off", "cuda_graphs"])
@pytest.mark.parametrize(("ranks", "stages", "alone"), LAYOUTS)
def test_answers_before_and_after_a_rank_is_killed(tmp_path, ranks, stages, alone, compiled):
    model_dir = tmp_path / "model"
    model = export_transformer(model_dir, ranks, stages)
    environment = {"SHARDSERVE_COMPILE": compiled}
    # The servable of a layout of its own.
    declaration = f"rank_size={ranks * stages}, stage_size={stages}"
    folder = write_servable(tmp_path / "servables", "transformer", declaration, "ids, attention_mask", "logits")
    with OnDevices(folder, model_dir, "transformer", ranks * stages, alone, **environment) as up, up.client() as client:
        assert {rank["device"].partition(":")[0] for rank in up.replica()["ranks"]} == {"cuda"}
        check(client, model)
        for pid in up.pids():
            os.kill(pid, signal.SIGKILL)
            check(client, model)
        assert up.stop() == 0


class Rows(nn.Module):
    """Its indices are checked by the device alone."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.arange(40.0).reshape(10, 4))

    def forward(self, index):
        return torch.index_select(self.rows, 0, index) * 2


def test_an_error_that_the_device_does_not_recover_from_is_that_of_its_request(tmp_path):
    model_dir = tmp_path / "model"
    batch = ({0: Dim("batch", min=1, max=16)},)
    export(
        Rows(),
        (torch.tensor([1, 2]),),
        name="rows",
        out=model_dir,
        dynamic_shapes=batch,
        tensor_parallel=1,
        input_names=["index"],
        output_names=["y"],
    )
    folder = write_servable(tmp_path / "servables", "rows", "rank_size=1, stage_size=1", "index", "y")
    few = {"SHARDSERVE_MAX_RESTARTS": "2"}
    with OnDevices(folder, model_dir, "rows", 1, True, **few) as up, up.client() as client:
        # More often than a rank may die.
        for _ in range(4):
            [before] = up.pids()
            [answer] = client.infer([{"index": np.int64(10)}], timeout=100)
            assert "assert" in answer["error"], answer
            [answer] = client.infer([{"index": np.int64(9)}], timeout=100)
            assert answer["y"].tolist() == [72.0, 74.0, 76.0, 78.0]
            assert up.pids() != [before]
        assert up.stop() == 0
