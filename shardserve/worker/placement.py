"""Where a servable's ranks are and what they load: by the rank table, or on this host if it is not distributed."""

from __future__ import annotations

from pathlib import Path

from shardserve.errors import ConfigError
from shardserve.servable import Servable
from shardserve.wire.messages import launch
from shardserve.worker.rank_table import RankEntry, RankTable, load_rank_table

LOCAL_HOST = "127.0.0.1"


def ranks_and_files(servable: Servable, serve: launch.Serve) -> tuple[RankTable, tuple[str, ...]]:
    """The rank table, and the graph files that every agent loads if the servable is not distributed (else none).

    RankTableError or ConfigError says what is wrong, or that it was started by the wrong function.
    """
    model = servable.model
    assert model is not None
    if serve.devices is None:
        if model.files is not None:
            raise ConfigError(
                f"servable {servable.name!r} is not distributed (declare_model): start it with server.start_servables "
                "(shardserve up --devices)"
            )
        return load_rank_table(serve.rank_table_json_file, model.rank_size, model.stage_size), ()
    if model.files is None:
        raise ConfigError(
            f"servable {servable.name!r} is distributed (declare_servable): start it with distributed.start_servable "
            "(shardserve up --model-dir)"
        )
    folder = Path(serve.servable_directory) / servable.name / str(serve.version)
    files = tuple(str(folder / file) for model in servable.models for file in model.files or ())
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"declare_model of servable {servable.name!r}: there is no file {file}")
    entries = (RankEntry(rank, LOCAL_HOST, str(device)) for rank, device in enumerate(serve.devices))
    return RankTable(tuple(entries)), files
