"""What `shardserve trace` makes of recorded steps."""

import pytest

from shardserve.cli import events
from shardserve.cli.commands.trace import _notes


def step(number, at, generation=(1, 1), **more):
    """Queued `at`, sent a second later, answered ten seconds later."""
    return {
        "generation": list(generation),
        "step": number,
        "subgraph": 0,
        "instances": 2,
        "dims": {"batch": 2},
        "queued": at,
        "sent": at + 1,
        "answered": at + 10,
        "failed": False,
        "ended": False,
        **more,
    }


def ran(number, at, generation=(1, 1)):
    """Received two seconds after `at`, ran from the fourth to the ninth."""
    times = {"received": at + 2, "ready": at + 3, "started": at + 4, "finished": at + 9}
    return {"generation": list(generation), "step": number, **times}


def rank(number, steps, stage=0):
    place = {"rank": number, "stage": stage, "host": "10.0.0.1", "device": "cpu", "pid": 40 + number}
    return {**place, "clock_offset": 0.5, "clock_error": 0.001, "steps": steps}


def recorded(*replicas, now=1000.0, capacity=4096, missing=(), reason=""):
    servable = {"name": "net", "version": 3, "reason": reason, "capacity": capacity, "now": now}
    numbered = [{"replica": i, "steps": steps, "ranks": ranks} for i, (steps, ranks) in enumerate(replicas)]
    return {"servables": [{**servable, "missing_ranks": list(missing), "replicas": numbered}]}


def test_events_of_a_step():
    content = events.trace(recorded(([step(7, 100.0)], [rank(0, [ran(7, 100.0)])])), "10.0.0.1:5500")
    metadata, rest = content["traceEvents"][:5], content["traceEvents"][5:]
    assert [(event["name"], event["args"].get("name")) for event in metadata] == [
        ("process_name", "net version 3, replica 0"),
        ("process_sort_index", None),
        ("thread_name", "Worker"),
        ("thread_name", "stage 0, rank 0 (10.0.0.1 cpu)"),
        ("thread_sort_index", None),
    ]
    assert [(event["ph"], event["name"], event["ts"]) for event in rest] == [
        ("b", "queued", 0.0),
        ("e", "queued", 1e6),
        ("b", "in flight", 1e6),
        ("e", "in flight", 10e6),
        ("X", "step 7", 4e6),
    ]
    assert {event["id"] for event in rest[:4]} == {"1.1.1.7"}
    assert rest[4]["dur"] == 5e6
    assert (rest[4]["pid"], rest[4]["tid"]) == (1, 1)
    assert rest[4]["args"] == {
        "step": 7,
        "generation": "1.1",
        "subgraph": 0,
        "instances": 2,
        "dims": {"batch": 2},
        "stage": 0,
        "received": 2e6,
        "ready": 3e6,
    }
    notes = content["otherData"]
    assert notes["server"] == "10.0.0.1:5500"
    assert notes["servables"][0]["ranks"][0]["clock_error"] == 0.001


def test_replicas_are_processes_and_steps_of_several_generations_are_told_apart():
    one = [step(0, 5.0), step(0, 50.0, (1, 2), failed=True), step(1, 60.0, (1, 2), ended=True)]
    content = events.trace(recorded((one, []), ([step(0, 8.0)], [rank(1, [ran(0, 8.0)])])), "a:1")
    begun = [event for event in content["traceEvents"] if event["ph"] == "b" and event["name"] == "in flight"]
    assert [(event["pid"], event["id"]) for event in begun] == [
        (1, "1.1.1.0"),
        (1, "1.1.2.0"),
        (1, "1.1.2.1"),
        (2, "2.1.1.0"),
    ]
    assert [event["args"].get("failed") for event in begun] == [None, True, None, None]
    assert [event["args"].get("ended") for event in begun] == [None, None, True, None]


def test_a_rank_knows_a_step_that_the_worker_does_not():
    content = events.trace(recorded(([], [rank(0, [ran(3, 100.0, (1, 9))])])), "a:1")
    [event] = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert (event["ts"], event["args"]["generation"]) == (2e6, "1.9")
    assert "instances" not in event["args"]


def test_nothing_recorded():
    assert events.trace({"servables": []}, "a:1")["traceEvents"] == []


@pytest.mark.parametrize(("seconds", "kept"), [(200.0, [0, 1, 2]), (96.0, [1, 2]), (50.0, [2]), (1.0, [])])
def test_the_last_seconds(seconds, kept):
    starts = [800.0, 900.0, 970.0]
    steps = [step(number, at) for number, at in enumerate(starts)]
    # The second ended for the rank before the time begins, for the Worker after it: both keep it or neither.
    ranks = [rank(0, [ran(number, at) for number, at in enumerate(starts)])]
    found = events.last_seconds(recorded((steps, ranks)), seconds)
    [replica] = found["servables"][0]["replicas"]
    assert [each["step"] for each in replica["steps"]] == kept
    assert [each["step"] for each in replica["ranks"][0]["steps"]] == kept


def test_the_last_seconds_of_what_the_worker_does_not_know():
    ranks = [rank(0, [ran(5, 900.0, (0, 1)), ran(0, 985.0)])]
    [replica] = events.last_seconds(recorded(([], ranks)), 10)["servables"][0]["replicas"]
    assert [each["step"] for each in replica["ranks"][0]["steps"]] == [0]


def test_what_a_trace_has_not_is_said():
    full = [step(number, 900.0 + number) for number in range(3)]
    assert _notes(recorded((full, []), capacity=3), 100.0) == [
        "net version 3, replica 0: the trace begins 10.0 s late, the server remembers 3 steps "
        "(SHARDSERVE_TIMELINE_STEPS)"
    ]
    assert _notes(recorded((full, []), capacity=4), 100.0) == []
    assert _notes(recorded((full, []), capacity=3), 0.0) == []
    assert _notes(recorded(missing=(2, 3)), 0.0) == ["net version 3: no answer from rank 2, 3"]
    assert _notes(recorded(reason="it is gone"), 0.0) == ["net version 3: it is gone"]
    assert _notes({"servables": []}, 0.0) == ["the server has no servable so far"]
