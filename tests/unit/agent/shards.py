"""Shards written by hand: each rank of a stage adds its share, a stage after the first adds its number.

x float32 [batch, 3] → y float32 [batch, 3]; with 2 ranks a stage and 2 stages, y = 2 * (2 * x) + 2.
"""

import hashlib
import json

import torch
from safetensors.torch import save

NAME = "net.graph.json"


def write_shards(directory, tensor_parallel=2, stages=1, export_id="e1", then=()):
    """Writes device0, device1, …; gives the graph files, in rank order. then: nodes after those."""
    size = tensor_parallel * stages
    return [_write(directory / f"device{rank}", rank, size, stages, export_id, then) for rank in range(size)]


def _write(directory, rank, rank_size, stage_size, export_id, then):
    directory.mkdir(parents=True)
    stage = rank // (rank_size // stage_size)
    shape = ["batch", 3]
    nodes = [{"name": "a", "op": "aten.add.Tensor", "args": [{"node": "x"}, {"node": "w"}]}]
    if rank_size > stage_size:
        nodes.append(
            {
                "name": "s",
                "op": "collective.all_reduce",
                "args": [{"node": "a"}, "sum"],
                "shape": shape,
                "dtype": "float32",
            }
        )
    nodes += then
    graph = {
        "format_version": 1,
        "export_id": export_id,
        "dims": ["batch"],
        "inputs": ["x"],
        "parameters": [{"name": "w", "tensor": "w", "dtype": "float32", "shape": [1]}],
        "nodes": nodes,
        "outputs": [nodes[-1]["name"]],
    }
    content = json.dumps(graph).encode()
    weights = save({"w": torch.tensor([float(stage)])})
    (directory / NAME).write_bytes(content)
    (directory / "weights.safetensors").write_bytes(weights)

    def spec(name):
        return {"name": name, "dtype": "float32", "shape": shape}

    config = {
        "format_version": 1,
        "export_id": export_id,
        "name": "net",
        "rank_size": rank_size,
        "stage_size": stage_size,
        "rank": rank,
        "signature": {"dims": {"batch": {"min": 1, "max": 8}}, "inputs": [spec("x")], "outputs": [spec("y")]},
        "receives": [spec("x")],
        "sends": [spec("y")],
        "graph_file": NAME,
        "graph_sha256": hashlib.sha256(content).hexdigest(),
        "weights_file": "weights.safetensors",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "parameter_bytes": 4,
    }
    (directory / "group_config.json").write_text(json.dumps(config))
    return str(directory / NAME)
