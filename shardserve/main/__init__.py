"""Main: the process that clients talk to. gRPC and REST in front, admission and routing, one connection to each Worker.

`python -m shardserve.main FD` is how the launcher starts it. Imports no torch.
"""
