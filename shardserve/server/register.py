"""What a servable_config.py uses to declare methods."""

from shardserve.servable import add_stage, register_method

__all__ = ["add_stage", "register_method"]
