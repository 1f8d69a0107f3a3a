"""What each operator does with sharded tensors: a table of small functions, by what they do to dims.

`table` has the table and what is elementwise; the other files enter their own.
"""

from shardserve.export.sharding.rules import channels, dims, index, products, reshape, updates
from shardserve.export.sharding.rules.table import RULES, emit

__all__ = ["RULES", "channels", "dims", "emit", "index", "products", "reshape", "updates"]
