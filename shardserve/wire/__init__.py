"""What crosses process borders. Imports no torch.

- `frames` is the layout, `messages/` what is said on each link, `tensors` and `proto` how values are encoded
- `stream` (asyncio) and `blocking` (threads) are the two ends of a connection; `sockets` makes them
- `security` says who may connect, `tls` encrypts
- `shared`, `segments` and `relays` carry large payloads through memory that both sides map
- `process` starts children; `stubs/` are generated from `protos/`
"""
