"""What a servable_config.py declares: models, methods and their method stages. Imports no torch."""

from shardserve.servable.declaration import (
    Servable,
    declare_distributed,
    declare_model,
    declaring,
    load_servable,
    register_method,
)
from shardserve.servable.method import Method, MethodStage, ModelStage, PythonStage, Source, add_stage
from shardserve.servable.model import Model, PadRule, set_caller

__all__ = [
    "Method",
    "MethodStage",
    "Model",
    "ModelStage",
    "PadRule",
    "PythonStage",
    "Servable",
    "Source",
    "add_stage",
    "declare_distributed",
    "declare_model",
    "declaring",
    "load_servable",
    "register_method",
    "set_caller",
]
