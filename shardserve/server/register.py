"""What a servable_config.py uses to declare methods, and models that are not distributed."""

from shardserve.servable import add_stage, declare_model, register_method

__all__ = ["add_stage", "declare_model", "register_method"]
