"""The Distributed Worker, one process per servable version: rank table, agents, batching, sequencing, recovery.

`worker` puts it together; `connections` takes each message to whom it is for.

- who may join: `registry`, by `rank_table` and `placement`; `rendezvous` is the store of gloo and NCCL
- requests: `requests`, or `direct` where a method is one model stage; `stages/` runs Python functions; `replies`
- from calls to steps: `model_calls` checks a call (`calls`, `answer`), `scheduler` chooses from its `queue` those that
  share a step, `batching` and `padding` make it, `group` sends it; `sessions` keeps a group for a stateful method call
"""
