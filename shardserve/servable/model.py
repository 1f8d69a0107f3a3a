"""The model of a servable: what `distributed.declare_servable` says of it."""

from __future__ import annotations

from dataclasses import dataclass

from shardserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model cut into rank_size shards: stage_size pipeline stages of rank_size / stage_size tensor-parallel ranks.

    with_batch_dim: the model's tensors have a batch dim in front that instances don't have: the Worker stacks and
    splits. without_batch_dim_inputs: positions of the inputs that have none nevertheless. enable_pipeline_infer:
    several steps are in flight at once. max_batch_size: None takes the exported batch dim's greatest value.
    """

    rank_size: int
    stage_size: int
    with_batch_dim: bool = True
    without_batch_dim_inputs: tuple[int, ...] = ()
    enable_pipeline_infer: bool = True
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank_size", "stage_size"):
            if not _is_integer(getattr(self, name), least=1):
                raise ConfigError(f"declare_servable: {name}={getattr(self, name)!r} is not an integer of at least 1")
        if self.rank_size % self.stage_size:
            raise ConfigError(
                f"declare_servable: rank_size={self.rank_size} is not a multiple of stage_size={self.stage_size}"
            )
        for name in ("with_batch_dim", "enable_pipeline_infer"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"declare_servable: {name}={getattr(self, name)!r} is not a bool")
        if not all(_is_integer(i, least=0) for i in self.without_batch_dim_inputs):
            raise ConfigError(
                f"declare_servable: without_batch_dim_inputs={self.without_batch_dim_inputs!r}: not positions of inputs"
            )
        if self.without_batch_dim_inputs and not self.with_batch_dim:
            raise ConfigError("declare_servable: without_batch_dim_inputs needs with_batch_dim=True")
        size = self.max_batch_size
        if size is not None and not _is_integer(size, least=1):
            raise ConfigError(f"declare_servable: max_batch_size={size!r} is not an integer of at least 1")


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
