"""Main: the process that clients talk to. gRPC and REST in front, admission and routing, one connection to each Worker.

`python -m shardserve.main FD` is how the launcher starts it (`app`). Imports no torch.

- in front: `grpc/` and `rest/`; what both listen on: `addresses`, `tls`; what is told of the server: `status`,
  `timeline`
- behind both: `router` finds the Worker, `servable` keeps each request until that has answered
"""
