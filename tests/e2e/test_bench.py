"""`shardserve bench` against running servers: figures, files, errors."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from serving import Up, token_ids, write_servable

NO_TORCH = """
import sys


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", HIDDEN):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, NoTorch())
from shardserve.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def served(transformer):
    with transformer.up() as up:
        yield up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ids.npy and mask.npy of one instance, short.npz and long.npz of two, bad.npy with an id that there is not."""
    folder = tmp_path_factory.mktemp("inputs")
    ids = token_ids(1, 12, 1)[0].numpy()
    np.save(folder / "ids.npy", ids)
    np.save(folder / "mask.npy", np.ones(12, np.int64))
    np.save(folder / "bad.npy", ids + 1000)
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    for name, length in (("short", 3), ("long", 20)):
        ids = token_ids(1, length, 2)[0].numpy()
        np.savez(folder / f"{name}.npz", ids=ids, attention_mask=np.ones(length, np.int64))
    return folder


INPUTS = ("--input", "ids=ids.npy", "--input", "attention_mask=mask.npy")
SHORT = ("--seconds", "0.5", "--warmup", "0.1")


def bench(folder, address, *arguments, hidden="", name="transformer"):
    """Run where torch can't be imported, nor what is `hidden`."""
    script = NO_TORCH.replace("HIDDEN", repr(hidden))
    line = [sys.executable, "-c", script, "bench", address, name, "predict", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=90, check=False, cwd=folder)


def test_a_table_json_and_a_plot(served, folder):
    done = bench(
        folder, served.grpc, *INPUTS, *SHORT, "--concurrency", "1,4", "--json", "out.json", "--plot", "out.svg"
    )
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert " ".join(head) == "clients req/s p50 ms p90 ms p99 ms max ms errors"
    assert [row[0] for row in rows] == ["1", "4"]
    found = json.loads((folder / "out.json").read_text())
    assert (found["servable"], found["method"], found["address"]) == ("transformer", "predict", served.grpc)
    for level, row in zip(found["levels"], rows, strict=True):
        taken = level["latency_ms"]
        order = [taken[key] for key in ("min", "p50", "p90", "p99", "max")]
        assert order == sorted(order)
        assert order[0] > 0
        assert level["requests"] > 0
        assert level["requests_per_second"] == pytest.approx(level["requests"] / 0.5, rel=1e-3)
        # A closed loop: so many clients, each with one request under way (less what the ends of the time cut off).
        assert level["requests"] * taken["mean"] / 500 <= level["concurrency"] * 1.3
        assert (level["errors"], level["errors_by_class"], level["first_error"]) == (0, {}, None)
        assert row == [
            str(level["concurrency"]),
            f"{level['requests_per_second']:.1f}",
            *(f"{taken[key]:.2f}" for key in ("p50", "p90", "p99", "max")),
            "0",
        ]
    assert xml.etree.ElementTree.parse(folder / "out.svg").getroot().tag.endswith("svg")


def test_a_png_and_instances_in_turn(served, folder):
    def counted():
        return sum(step["instances"] for step in recorded(served))

    before = counted()
    arguments = (*SHORT, "--concurrency", "2", "--instances", "3", "--plot", "out.png", "--json", "out.json")
    done = bench(folder, served.grpc, "--npz", "short.npz", "--npz", "long.npz", *arguments)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    [level] = json.loads((folder / "out.json").read_text())["levels"]
    assert level["instances_per_second"] == pytest.approx(3 * level["requests_per_second"], rel=1e-3)
    assert counted() - before >= 3 * level["requests"]
    assert {step["dims"]["length"] for step in recorded(served)[-20:]} == {3, 20}


def recorded(up):
    from shardserve.client import timeline

    return timeline(up.grpc)["servables"][0]["replicas"][0]["steps"]


def test_a_request_that_the_server_refuses(served, folder):
    wrong = ("--input", "ids=bad.npy", "--input", "attention_mask=mask.npy")
    done = bench(folder, served.grpc, *wrong, *SHORT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"shardserve bench: {served.grpc}: instance 0: ")
    assert "IndexError" in done.stderr
    done = bench(folder, served.grpc, *SHORT, name="nobody")
    assert done.returncode == 1
    assert "no servable 'nobody' here" in done.stderr
    done = bench(folder, served.grpc, "--input", "ids=nowhere.npy", *SHORT)
    assert "input 'ids': nowhere.npy: " in done.stderr
    for option, file, said in [
        ("--npz", "ids.npy", "has one array without a name"),
        ("--npz", "broken.npz", "broken.npz: "),
        ("--input", "ids=short.npz", "input 'ids': short.npz has several arrays"),
    ]:
        done = bench(folder, served.grpc, option, file, *SHORT)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_errors_are_counted_and_the_first_is_shown(tmp_path, folder, transformer):
    """A server with room for one instance at a time: of several clients most are turned away."""
    servables = write_servable(
        tmp_path, "transformer", "rank_size=4, stage_size=2, max_batch_size=1", "ids, attention_mask", "logits"
    )
    with Up(servables, transformer.model_dir, "transformer", SHARDSERVE_MAX_REQUESTS="1") as up:
        done = bench(folder, up.grpc, *INPUTS, *SHORT, "--concurrency", "1,8", "--json", "out.json")
        assert up.stop() == 0
    assert done.returncode == 1
    alone, crowd = json.loads((folder / "out.json").read_text())["levels"]
    assert alone["errors"] == 0
    assert alone["requests"] > 0
    assert crowd["errors_by_class"] == {"Overloaded": crowd["errors"]}
    assert crowd["errors"] > 0
    assert "wait for an answer already" in crowd["first_error"]
    assert done.stdout.splitlines()[-1].split()[-1] == str(crowd["errors"])
    assert f"shardserve bench: {crowd['errors']} requests failed, the first: " in done.stderr


def test_a_server_that_ends_meanwhile(folder, transformer):
    with transformer.up() as up:
        script = NO_TORCH.replace("HIDDEN", "''")
        arguments = ["bench", up.grpc, "transformer", "predict", *INPUTS, "--concurrency", "2", "--seconds", "3"]
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments, "--warmup", "0"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(recorded(up)) < 20:
            assert process.poll() is None
        assert up.stop() == 0
        output, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(output.splitlines()) == 2
    # Two clients, 3 s, a try every 0.1 s; and those that were under way.
    assert 0 < int(output.split()[-1]) <= 2 * 30 + 2
    assert re.fullmatch(r"shardserve bench: \d+ requests failed, the first: .+\n", error)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(served, folder):
    done = bench(folder, served.grpc, *INPUTS, "--plot", "none.svg", hidden="matplotlib")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--plot needs matplotlib" in done.stderr
    assert "pip install 'shardserve[bench]'" in done.stderr
    assert not (folder / "none.svg").exists()
    assert bench(folder, served.grpc, *INPUTS, *SHORT, "--concurrency", "1", hidden="matplotlib").returncode == 0
