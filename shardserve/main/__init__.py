"""Main: the process that clients talk to. gRPC and REST in front, admission and routing, one connection to each Worker.

`python -m shardserve.main FD` is how the launcher starts it (`app`). Imports no torch.

- gRPC: `grpc_front`, `grpc_methods`, `health`; what it tells of the server: `status`, `timeline`
- REST: `rest_front` on `rest_protocol`; `rest_body` reads a body, `json_bodies` decodes it by `rest_codec`, a large one
  in a process of its own (`json_link`, `json_process`)
- behind both: `router` finds the Worker, `servable` keeps each request until that has answered
"""
