"""What each operator does with sharded tensors: a table of small functions, by what they do to dims.

`table` has the table, what is elementwise and matrix products; the other files enter their own.
"""

from shardserve.export.rules import channels, dims, index, updates
from shardserve.export.rules.table import RULES, emit

__all__ = ["RULES", "channels", "dims", "emit", "index", "updates"]
