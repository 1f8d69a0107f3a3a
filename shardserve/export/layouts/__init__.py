"""How a model lies on tensor_parallel x pipeline_parallel ranks: `layout` makes one layout, `balance` says where its
pipeline stages begin, `choice` which layout is taken.
"""
