"""The rank table: which host and device each rank has. Both known layouts, with errors that name the JSON path.

The layouts are those of MindSpore's `hccl` rank tables: `server_list` (version 1.0) and `group_list` (older).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardserve.errors import RankTableError

# Of a table's status: tools that make one while hosts come in write another until all are there.
COMPLETED = "completed"
# No longer than a 64-bit integer: Python refuses to convert thousands of digits.
_CANONICAL = re.compile(r"(0|[1-9][0-9]{0,17})\Z")


@dataclass(frozen=True)
class RankEntry:
    rank: int
    host: str
    device: str


@dataclass(frozen=True)
class RankTable:
    """entries: one per rank, in the order of the ranks 0…n-1."""

    entries: tuple[RankEntry, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.host for entry in self.entries))

    def ranks_on(self, hosts: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(entry.rank for entry in self.entries if entry.host in hosts)


def load_rank_table(path: str, rank_size: int, stage_size: int) -> RankTable:
    """RankTableError names the file, the JSON path and the value that is wrong."""
    file = Path(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_JsonObject)
    except OSError as error:
        raise RankTableError(f"rank table {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RankTableError(f"rank table {path}: not JSON: {error}") from error
    try:
        _check_keys(document, "$")
        table = parse_rank_table(document)
        _check_sizes(table, rank_size, stage_size)
    except RankTableError as error:
        raise RankTableError(f"rank table {path}: {error}") from error
    return table


def parse_rank_table(document: Any) -> RankTable:
    if not isinstance(document, dict):
        raise RankTableError(f"$ is {_show(document)}, not an object")
    if document.get("status", COMPLETED) != COMPLETED:
        raise RankTableError(f'$.status is {_show(document["status"])}, not "{COMPLETED}"')
    if "server_list" in document:
        placed = _server_list(document)
    elif "group_list" in document:
        placed = _group_list(document)
    else:
        raise RankTableError("$ has neither server_list nor group_list")
    by_rank: dict[int, tuple[str, RankEntry]] = {}
    taken: dict[tuple[str, str], str] = {}
    for path, entry in placed:
        if entry.rank in by_rank:
            raise RankTableError(f"{path}.rank_id {entry.rank} is also that of {by_rank[entry.rank][0]}")
        by_rank[entry.rank] = path, entry
        device = entry.host, entry.device
        if device in taken:
            raise RankTableError(f"{path}: device {entry.device} of host {entry.host} is also that of {taken[device]}")
        taken[device] = path
    count = len(by_rank)
    missing = ", ".join(str(rank) for rank in range(count) if rank not in by_rank)
    for path, entry in by_rank.values():
        if entry.rank >= count:
            raise RankTableError(
                f"{path}.rank_id is {entry.rank}, but there are {count} ranks, and no rank_id {missing}"
            )
    return RankTable(tuple(by_rank[rank][1] for rank in range(len(by_rank))))


def make_rank_table(hosts: Sequence[tuple[str, Sequence[int]]], layout: str = "server_list") -> dict[str, Any]:
    """The document of a table in which ranks are counted through the hosts in order; each has (address, device ids)."""
    placed = [(host, device) for host, devices in hosts for device in devices]
    ranks = {place: str(rank) for rank, place in enumerate(placed)}
    if layout == "group_list":
        instances = [
            {
                "rank_id": ranks[host, device],
                "server_id": host,
                "devices": [{"device_id": str(device), "device_ip": host}],
            }
            for host, device in placed
        ]
        group = {"device_num": str(len(placed)), "server_num": str(len(hosts)), "instance_count": str(len(placed))}
        return {"group_count": "1", "group_list": [{**group, "instance_list": instances}]}
    servers = [
        {
            "server_id": host,
            "host_nic_ip": "reserve",
            "device": [{"device_id": str(d), "device_ip": host, "rank_id": ranks[host, d]} for d in devices],
        }
        for host, devices in hosts
    ]
    return {"version": "1.0", "server_count": str(len(hosts)), "status": "completed", "server_list": servers}


class _JsonObject(dict[str, Any]):
    """An object of a file, with the keys that it has twice: of those a plain dict keeps the last in silence."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.twice = [key for key in self if keys.count(key) > 1]


def _check_keys(value: Any, path: str) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_keys(item, f"{path}[{i}]")
    elif isinstance(value, _JsonObject):
        if value.twice:
            raise RankTableError(f"{path}.{value.twice[0]} is given twice")
        for key, item in value.items():
            _check_keys(item, f"{path}.{key}")


def _server_list(document: dict[str, Any]) -> list[tuple[str, RankEntry]]:
    _check_notes(document, "$", "version")
    servers = _list(document, "$", "server_list")
    _count(document, "$", "server_count", len(servers))
    placed = []
    for i, server in enumerate(servers):
        at = f"$.server_list[{i}]"
        host = _text(_object(server, at), at, "server_id")
        _check_notes(server, at, "host_nic_ip")
        for j, device in enumerate(_list(server, at, "device")):
            path = f"{at}.device[{j}]"
            _text(_object(device, path), path, "device_ip")
            rank = _decimal(device, path, "rank_id")
            placed.append((path, RankEntry(rank, host, str(_decimal(device, path, "device_id")))))
    return placed


def _group_list(document: dict[str, Any]) -> list[tuple[str, RankEntry]]:
    _check_notes(document, "$", "board_id")
    groups = _list(document, "$", "group_list")
    _count(document, "$", "group_count", len(groups))
    placed = []
    for i, group in enumerate(groups):
        at = f"$.group_list[{i}]"
        instances = _list(_object(group, at), at, "instance_list")
        _check_notes(group, at, "group_name")
        _count(group, at, "instance_count", len(instances))
        for j, instance in enumerate(instances):
            path = f"{at}.instance_list[{j}]"
            host = _text(_object(instance, path), path, "server_id")
            devices = _list(instance, path, "devices")
            if len(devices) != 1:
                raise RankTableError(f"{path}.devices has {len(devices)} devices; a rank has one")
            device = _object(devices[0], f"{path}.devices[0]")
            _text(device, f"{path}.devices[0]", "device_ip")
            number = _decimal(device, f"{path}.devices[0]", "device_id")
            placed.append((path, RankEntry(_decimal(instance, path, "rank_id"), host, str(number))))
        _count(group, at, "device_num", len(instances))
        _count(group, at, "server_num", len({_text(i, at, "server_id") for i in instances}))
    return placed


def _check_sizes(table: RankTable, rank_size: int, stage_size: int) -> None:
    ranks = len(table.entries)
    if ranks % rank_size:
        raise RankTableError(
            f"$ has {ranks} ranks; the servable declares rank_size={rank_size}, stage_size={stage_size}, so it needs "
            f"{rank_size} or a multiple of it, one for each replica"
        )


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RankTableError(f"{path} is {_show(value)}, not an object")
    return value


def _field(parent: dict[str, Any], path: str, name: str) -> Any:
    if name not in parent:
        raise RankTableError(f"{path}.{name} is missing")
    return parent[name]


def _list(parent: dict[str, Any], path: str, name: str) -> list[Any]:
    value = _field(parent, path, name)
    if not isinstance(value, list) or not value:
        raise RankTableError(f"{path}.{name} is {_show(value)}, not a list with at least one entry")
    return value


def _text(parent: dict[str, Any], path: str, name: str) -> str:
    value = _field(parent, path, name)
    if not isinstance(value, str) or not value:
        raise RankTableError(f"{path}.{name} is {_show(value)}, not a string with something in it")
    return value


def _check_notes(parent: dict[str, Any], path: str, name: str) -> None:
    """What says nothing about ranks may be missing or empty, as in tables of the field's tools, but not anything."""
    value = parent.get(name, "")
    if not isinstance(value, str):
        raise RankTableError(f"{path}.{name} is {_show(value)}, not a string")


def _decimal(parent: dict[str, Any], path: str, name: str) -> int:
    value = _text(parent, path, name)
    if not _CANONICAL.match(value):
        raise RankTableError(f"{path}.{name} is {_show(value)}, not a canonical decimal")
    return int(value)


def _count(parent: dict[str, Any], path: str, name: str, actual: int) -> None:
    value = _decimal(parent, path, name)
    if value != actual:
        raise RankTableError(f"{path}.{name} is {value}, but there are {actual}")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
