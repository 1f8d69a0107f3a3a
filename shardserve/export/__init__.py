"""The exporter: cuts a plain PyTorch model into the shards of tensor- and pipeline-parallel ranks.

The road of a model, package by package: `sources` (where it and its values come from) → `tracing` (torch.export,
made functional) → `planning` (which parameters are cut, where the user doesn't say) → `sharding` (placements through
the graph, a local graph for each tensor-parallel rank, pipeline stages) → `layouts` (how many ranks, where stages
begin; by `cost`) → `writing` (the files) → `verification` (from the files). `api` goes it.
"""

from shardserve.export.api import export, export_subgraphs
from shardserve.export.planning.plan import Plan
from shardserve.export.report import Report, StageReport
from shardserve.export.sources import load_checkpoint, without_storage
from shardserve.export.subgraphs import Subgraph
from shardserve.export.verification import VerifyResult, verify, verify_chain

__all__ = [
    "Plan",
    "Report",
    "StageReport",
    "Subgraph",
    "VerifyResult",
    "export",
    "export_subgraphs",
    "load_checkpoint",
    "verify",
    "verify_chain",
    "without_storage",
]
