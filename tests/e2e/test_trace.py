"""`shardserve trace` of a pipeline of 2 stages of 2 ranks under load, and what recording can't disturb."""

import concurrent.futures
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
from serving import token_ids, transformer_instances

from shardserve.client import timeline

CLIENTS, REQUESTS = 6, 40
# Microseconds by which two clocks of one host may differ in the trace: times are rounded to a nanosecond.
ROUNDED = 0.01


@pytest.fixture(scope="module")
def served(transformer):
    with transformer.up() as up:
        yield up


def shardserve(*arguments, **options):
    line = [sys.executable, "-m", "shardserve.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **options)


def drive(up, clients=CLIENTS, requests=REQUESTS):
    """So many clients, requests of different lengths; then one alone: the last step's end may not be recorded yet."""

    def work(seed):
        with up.client(raise_errors=True) as client:
            for i in range(requests):
                client.infer(transformer_instances(token_ids(1 + i % 3, 5 + (seed + i) % 4, seed)), timeout=60)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    work(0)


def read(path):
    """The trace's replica events by phase and rows: name of the row → its complete events, in their order."""
    content = json.loads(path.read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    rows = {name: [] for name in names.values()}
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            rows[names[event["pid"], event["tid"]]].append(event)
    return content, rows


def steps_of(row):
    return {(event["args"]["generation"], event["args"]["step"]): event for event in row}


def test_each_step_of_a_pipeline_and_its_bubbles(served, tmp_path):
    drive(served)
    done = shardserve("trace", served.grpc, "--out", "trace.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    content, rows = read(tmp_path / "trace.json")
    assert [e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"] == [
        "transformer version 1, replica 0"
    ]
    worker, *ranks = rows
    assert worker == "Worker"
    assert [name.partition(" (")[0] for name in ranks] == [f"stage {r // 2}, rank {r}" for r in range(4)]
    begun = [e for e in content["traceEvents"] if e["ph"] == "b"]
    ended = {(e["name"], e["id"]): e["ts"] for e in content["traceEvents"] if e["ph"] == "e"}
    queued, flying = ({e["args"]["step"]: e for e in begun if e["name"] == name} for name in ("queued", "in flight"))
    assert list(queued) == list(flying) == list(range(len(queued)))
    # All instances are there, and each rank has run each step but the last one, whose end some are about to record.
    assert sum(event["args"]["instances"] for event in flying.values()) == sum(
        (CLIENTS + 1) * (1 + i % 3) for i in range(REQUESTS)
    )
    last = max(flying)
    for name in ranks:
        assert {step for _, step in steps_of(rows[name])} | {last} == set(flying)
    for step, event in flying.items():
        sent, answered = event["ts"], ended["in flight", event["id"]]
        assert queued[step]["ts"] <= ended["queued", event["id"]] == sent <= answered
        assert event["args"]["dims"]["batch"] == event["args"]["instances"]
    # No two steps of a rank overlap, and they run in the order of their numbers.
    for name in ranks:
        for before, after in itertools.pairwise(rows[name]):
            assert before["ts"] + before["dur"] <= after["ts"] + ROUNDED
            assert before["args"]["step"] < after["args"]["step"]
            assert after["args"]["received"] <= after["ts"] + ROUNDED
    # A step is sent, runs in the first stage, crosses, runs in the second one, and is answered.
    for first, second in (ranks[0::2], ranks[1::2]):
        later = steps_of(rows[second])
        for name, event in steps_of(rows[first]).items():
            assert flying[name[1]]["ts"] <= event["args"]["received"] + ROUNDED
            if name in later:
                crossed = later[name]["args"]["ready"]
                assert event["ts"] + event["dur"] <= crossed + ROUNDED <= later[name]["ts"] + 2 * ROUNDED
    for (_, step), event in steps_of(rows[ranks[2]]).items():
        assert event["ts"] + event["dur"] <= ended["in flight", flying[step]["id"]] + ROUNDED
    # Both stages were at work at the same time, on different steps: that is what the pipeline is for.
    spans = [[(e["ts"], e["ts"] + e["dur"]) for e in rows[name]] for name in (ranks[0], ranks[2])]
    assert any(a < d and c < b for a, b in spans[0] for c, d in spans[1])
    [servable] = content["otherData"]["servables"]
    assert [(rank["rank"], rank["clock_offset"], rank["clock_error"]) for rank in servable["ranks"]] == [
        (rank, 0.0, 0.0) for rank in range(4)
    ]


def test_only_the_last_seconds(served, tmp_path):
    drive(served, clients=1, requests=2)
    before = timeline(served.grpc)["servables"][0]["replicas"][0]["steps"][-1]["step"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        command = pool.submit(
            shardserve, "trace", served.grpc, "--servable", "transformer", "--seconds", "1.5", "--out", tmp_path / "t"
        )
        while not command.done():
            drive(served, clients=1, requests=2)
    assert command.result().returncode == 0
    content, rows = read(tmp_path / "t")
    steps = [e["args"]["step"] for e in content["traceEvents"] if e["ph"] == "b"]
    assert steps
    # The command asks before it waits: it may have begun before the load that this test made first had ended.
    last = max(e["ts"] for e in content["traceEvents"] if e["ph"] == "e")
    ended = [e["ts"] for e in content["traceEvents"] if e["ph"] == "e" and e["name"] == "in flight"]
    assert last - min(ended) <= 1.5e6
    assert max(steps) > before
    # The Worker's are told first: its agents may have gone on meanwhile.
    for row in rows.values():
        assert all(step in steps or step > max(steps) for _, step in steps_of(row))


def test_a_rank_that_was_killed_and_one_that_is_stopped(transformer, tmp_path):
    with transformer.up(SHARDSERVE_TIMELINE_STEPS="8") as up:
        drive(up, clients=1, requests=20)
        os.kill(up.pids()[1], signal.SIGKILL)
        drive(up, clients=1, requests=4)
        [servable] = timeline(up.grpc, "transformer")["servables"]
        [replica] = servable["replicas"]
        assert servable["capacity"] == len(replica["steps"]) == 8
        counters = [step["generation"][1] for step in replica["steps"]]
        assert counters == sorted(counters)
        assert counters[-1] == 2
        # The survivors remember the generation before, the rank that was forked anew does not.
        known = [{step["generation"][1] for step in rank["steps"]} for rank in replica["ranks"]]
        assert known[1] == {2}
        assert known[0] == known[2] == known[3] == {1, 2} or known[0] == {2}
        done = shardserve("trace", up.grpc, "--seconds", "0.01", "--out", tmp_path / "trace.json")
        assert done.returncode == 0
        stopped = up.pids()[3]
        os.kill(stopped, signal.SIGSTOP)
        try:
            done = shardserve("trace", up.grpc, "--timeout", "6", "--out", tmp_path / "trace.json")
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert done.returncode == 0
        assert "transformer version 1: no answer from rank 3" in done.stderr
        _, rows = read(tmp_path / "trace.json")
        assert len(rows) == 4
        drive(up, clients=1, requests=2)
        assert up.stop() == 0


def test_steps_that_are_cut_short_and_that_raise(transformer):
    with transformer.up(SHARDSERVE_TIMELINE_TIMEOUT="2") as up, up.client() as client:
        bad = transformer_instances(token_ids(1, 5, 0) + 1000)
        assert "IndexError" in client.infer(bad, timeout=60)[0]["error"]
        good = transformer_instances(token_ids(1, 5, 0))
        # With this answer the step that raised has ended, too.
        assert "logits" in client.infer(good, timeout=60)[0]
        victim = up.pids()[2]
        os.kill(victim, signal.SIGSTOP)
        answer = client.infer_async(good, timeout=60)
        while not under_way(up):
            pass
        os.kill(victim, signal.SIGKILL)
        assert "logits" in answer.result()[0]
        steps = timeline(up.grpc)["servables"][0]["replicas"][0]["steps"]
        failed, ended = ([step[key] for step in steps] for key in ("failed", "ended"))
        assert failed == [True, False, False, False]
        assert ended == [False, False, True, False]
        assert up.stop() == 0


def under_way(up):
    """Whether a rank of the first stage has run a step that has no answer yet."""
    [replica] = timeline(up.grpc)["servables"][0]["replicas"]
    return any(len(rank["steps"]) > len(replica["steps"]) for rank in replica["ranks"])


def test_what_is_wrong_is_said_in_one_line(served, tmp_path):
    for arguments, said in [
        (("--servable", "nobody"), "no servable 'nobody' here"),
        (("--servable", "transformer", "--version", "7"), "has no version 7"),
        (("--out", tmp_path / "nowhere" / "t.json"), "there is no directory"),
        (("--out", tmp_path), "is a directory"),
    ]:
        done = shardserve("trace", served.grpc, "--seconds", "30", "--out", tmp_path / "t.json", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("shardserve trace: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
