"""Models of many families, exported in several layouts, compared and counted. `make bench-zoo` runs all."""

from benchmarks.zoo import diffusion, own, text, vision
from benchmarks.zoo.registry import MODELS, Case, make

__all__ = ["MODELS", "Case", "diffusion", "make", "own", "text", "vision"]
