"""Recorded steps as a trace in Chrome's Trace Event Format (JSON), which Perfetto and chrome://tracing show.

A replica is a process there. Of its rows, "queued" and "in flight" are the Worker's, where steps overlap, so they are
asynchronous events ("b", "e"); each rank has a row of complete events ("X"): a step's from when the shard's graph began
to run until it had ended. What lies between two of them is a bubble.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import shardserve

Event = dict[str, Any]
Name = tuple[int, int, int]
"""A step's generation and number."""

MICRO = 1e6


def last_seconds(recorded: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `client.timeline` gave, without the steps that ended earlier; ranks keep those that the Worker keeps, and
    those that it doesn't know: it had no answer yet, or was respawned meanwhile."""
    return {"servables": [_last_seconds(servable, seconds) for servable in recorded["servables"]]}


def _last_seconds(servable: dict[str, Any], seconds: float) -> dict[str, Any]:
    since = servable["now"] - seconds
    replicas = []
    for replica in servable["replicas"]:
        known = {_name(step) for step in replica["steps"]}
        steps = [step for step in replica["steps"] if step["answered"] >= since]
        kept = {_name(step) for step in steps}
        ranks = []
        for rank in replica["ranks"]:
            own = [
                step
                for step in rank["steps"]
                if _name(step) in kept or (_name(step) not in known and step["finished"] >= since)
            ]
            ranks.append({**rank, "steps": own})
        replicas.append({**replica, "steps": steps, "ranks": ranks})
    return {**servable, "replicas": replicas}


def _name(step: dict[str, Any]) -> Name:
    incarnation, counter = step["generation"]
    return incarnation, counter, step["step"]


def trace(recorded: dict[str, Any], address: str) -> dict[str, Any]:
    """The trace as JSON knows it; time 0 is that of the first event of all."""
    replicas = [(servable, replica) for servable in recorded["servables"] for replica in servable["replicas"]]
    starts = [step["queued"] for _, replica in replicas for step in replica["steps"]]
    starts += [step["received"] for _, replica in replicas for rank in replica["ranks"] for step in rank["steps"]]
    start = min(starts, default=0.0)
    events: list[Event] = []
    for process, (servable, replica) in enumerate(replicas, start=1):
        title = f"{servable['name']} version {servable['version']}, replica {replica['replica']}"
        events += _rows(process, title, replica)
        events += _replica_events(process, replica, start)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "shardserve": shardserve.__version__,
            "server": address,
            "clock": "CLOCK_MONOTONIC of each Worker's host; time 0 is that of the first event. Ranks on other hosts "
            "have been moved by clock_offset, estimated from a round trip; it may be wrong by clock_error (seconds).",
            "servables": [_notes(servable) for servable in recorded["servables"]],
        },
    }


def _notes(servable: dict[str, Any]) -> dict[str, Any]:
    """What there is to know of how the steps were recorded."""
    ranks = [
        {key: rank[key] for key in ("rank", "stage", "host", "device", "pid", "clock_offset", "clock_error")}
        for replica in servable["replicas"]
        for rank in replica["ranks"]
    ]
    kept = {key: servable[key] for key in ("name", "version", "reason", "capacity", "missing_ranks")}
    return {**kept, "ranks": ranks}


def _rows(process: int, title: str, replica: dict[str, Any]) -> Iterator[Event]:
    yield _metadata("process_name", process, name=title)
    yield _metadata("process_sort_index", process, sort_index=process)
    yield _metadata("thread_name", process, name="Worker")
    for row, rank in enumerate(replica["ranks"], start=1):
        name = f"stage {rank['stage']}, rank {rank['rank']} ({rank['host']} {rank['device']})"
        yield _metadata("thread_name", process, row, name=name)
        yield _metadata("thread_sort_index", process, row, sort_index=row)


def _metadata(what: str, process: int, row: int = 0, **args: Any) -> Event:
    return {"name": what, "ph": "M", "pid": process, "tid": row, "args": args}


def _replica_events(process: int, replica: dict[str, Any], start: float) -> Iterator[Event]:
    known: dict[Name, dict[str, Any]] = {}
    for step in replica["steps"]:
        args = {key: step[key] for key in ("step", "subgraph", "instances", "dims")} | {"generation": _generation(step)}
        known[_name(step)] = args
        args = args | {key: True for key in ("failed", "ended") if step[key]}
        identity = f"{process}.{_generation(step)}.{step['step']}"
        for name, begin, end in (("queued", "queued", "sent"), ("in flight", "sent", "answered")):
            event: Event = {"name": name, "cat": name, "id": identity, "pid": process, "tid": 0}
            yield event | {"ph": "b", "ts": _ts(step[begin], start), "args": args}
            yield event | {"ph": "e", "ts": _ts(step[end], start)}
    for row, rank in enumerate(replica["ranks"], start=1):
        for step in rank["steps"]:
            own = {
                "step": step["step"],
                "generation": _generation(step),
                "stage": rank["stage"],
                "received": _ts(step["received"], start),
                "ready": _ts(step["ready"], start),
            }
            started, finished = _ts(step["started"], start), _ts(step["finished"], start)
            yield {
                "name": f"step {step['step']}",
                "cat": "step",
                "ph": "X",
                "ts": started,
                "dur": round(finished - started, 3),
                "pid": process,
                "tid": row,
                "args": known.get(_name(step), {}) | own,
            }


def _generation(step: dict[str, Any]) -> str:
    return ".".join(map(str, step["generation"]))


def _ts(seconds: float, start: float) -> float:
    """Microseconds, to the nanosecond."""
    return round((seconds - start) * MICRO, 3)
