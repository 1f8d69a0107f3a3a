"""The Distributed Worker, one process per servable version: rank table, agents, batching, sequencing, recovery."""
