"""The shards on disk against the unsharded model: `running` runs all ranks of a folder in this process, `unsharded` the
model; `sizes` chooses at which sizes; `verify` compares a graph, `chain` subgraphs that keep buffers; `parting` finds
the first pipeline stage where values part.
"""

from shardserve.export.verification.chain import verify_chain
from shardserve.export.verification.verify import VerifyResult, verify

__all__ = ["VerifyResult", "verify", "verify_chain"]
