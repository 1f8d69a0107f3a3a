"""Collectives of one tensor-parallel group, all with the interface of shards.collective."""
