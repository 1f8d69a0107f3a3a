"""The exporter: cuts a plain PyTorch model into the shards of tensor- and pipeline-parallel ranks.

`trace` (torch.export, made functional) → `propagate` with `rules` (placements through the graph, collectives where they
meet; one local graph per tensor-parallel rank) → `cut` (pipeline stages) → `assemble` and `write` (files) → `verify`
(from the files).
"""

from shardserve.export.api import export, export_subgraphs
from shardserve.export.plan import Plan
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
