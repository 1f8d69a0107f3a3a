"""Shards of models of several kinds, all ranks on one device, give what they give on the CPU."""

import pytest
import torch
from serving import export_transformer
from torch import nn
from torch.export import Dim

from shardserve.export import export
from shardserve.export.verification.threads import ThreadGroup
from shardserve.shards.program import Program

from .moving import Moving

DEVICE = torch.device("cuda", 0)


def run(programs, ranks, dims, inputs, device):
    """Pipeline stages one after the other; what the last one's leader gives."""
    for start in range(0, len(programs), ranks):
        stage = programs[start : start + ranks]

        def work(collective, stage=stage, inputs=inputs):
            with torch.inference_mode():
                return stage[collective.rank].run(dims, [x.to(device) for x in inputs], Moving(collective, "cpu"))

        inputs = [x.cpu() for x in ThreadGroup(ranks).run(work)[0]]
    return inputs


def compare(folder, name, ranks, stages, dims, inputs):
    files = [folder / f"device{rank}" / f"{name}.graph.json" for rank in range(ranks * stages)]
    on_cpu, on_device = (
        run([Program.load(file, device=device) for file in files], ranks, dims, inputs, device)
        for device in ("cpu", DEVICE)
    )
    for one, other in zip(on_device, on_cpu, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1)])
def test_the_transformer(tmp_path, ranks, stages):
    export_transformer(tmp_path, ranks, stages)
    ids = torch.randint(0, 256, (3, 17))
    config = Program.load(tmp_path / "device0" / "transformer.graph.json").config
    sizes = dict(zip(config.signature.inputs[0].shape, ids.shape, strict=True))
    compare(tmp_path, "transformer", ranks, stages, sizes, [ids, torch.ones_like(ids)])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=4)
        )
        self.recurrent = nn.GRU(8, 16, batch_first=True)

    def forward(self, x):
        return self.recurrent(self.layers(x).flatten(2).transpose(1, 2))[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_convolutions_and_a_recurrent_layer(tmp_path, ranks):
    torch.manual_seed(0)
    batch = ({0: Dim("batch", min=1, max=16)},)
    export(
        Convolutions().eval(),
        (torch.randn(2, 3, 12, 12),),
        name="net",
        out=tmp_path,
        dynamic_shapes=batch,
        tensor_parallel=ranks,
    )
    compare(tmp_path, "net", ranks, 1, {"batch": 5}, [torch.randn(5, 3, 12, 12)])


def test_an_id_out_of_range_raises_and_the_device_lives_on(tmp_path):
    batch = ({0: Dim("batch", min=1, max=16)},)
    args = (torch.tensor([1, 2]),)
    export(nn.Embedding(10, 4), args, name="net", out=tmp_path, dynamic_shapes=batch, tensor_parallel=1)
    program = Program.load(tmp_path / "device0" / "net.graph.json", device=DEVICE)

    def lookup(ids):
        return ThreadGroup(1).run(lambda collective: program.run({"batch": len(ids)}, [ids.to(DEVICE)], collective))[0]

    with pytest.raises(IndexError, match="index out of range: 10 isn't in 0 to 9"):
        lookup(torch.tensor([1, 10]))
    assert lookup(torch.tensor([1, 9]))[0].shape == (2, 4)
