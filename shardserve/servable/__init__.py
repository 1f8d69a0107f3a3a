"""What a servable_config.py declares: models, methods and their method stages. Imports no torch."""

from shardserve.servable.declaration import (
    Servable,
    declare_distributed,
    declaring,
    load_servable,
    register_method,
)
from shardserve.servable.method import Method, MethodStage, Source, add_stage
from shardserve.servable.model import Model

__all__ = [
    "Method",
    "MethodStage",
    "Model",
    "Servable",
    "Source",
    "add_stage",
    "declare_distributed",
    "declaring",
    "load_servable",
    "register_method",
]
