"""The shard format: the files of one local rank, for the exporter that writes them and the agent that runs them.

`config` and `expressions` import no torch (the Worker reads signatures); `program`, `graph` and `operators` do.
"""
