"""Each example runs by its one command, and leaves nothing behind."""

import shutil

import pytest
from serving import EXAMPLES, Processes, copy_matmul_example, free_ports


def run(name, *arguments, folder=EXAMPLES, script="run.py"):
    with Processes() as processes:
        process = processes.start(folder / name / script, *arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        processes.wait_all_ended(5)
    assert output.endswith("stopped\n")
    return output


@pytest.mark.timeout(150)
def test_matmul_distributed(tmp_path):
    copy_matmul_example(tmp_path)
    output = run("matmul_distributed", folder=tmp_path, script="demo.py")
    assert "gRPC: y of shape (128, 16), from -48 to -48" in output
    assert "kill -9 of rank 3" in output


def test_python_stages():
    output = run("python_stages")
    assert "error': \"method 'classify', stage 'tokenize': ValueError: the text has no words" in output
    assert output.count("'label': ") == 3


def test_replicas():
    output = run("replicas")
    assert output.count("200 instances") == 2
    assert "was killed; the other one answered" in output


@pytest.mark.timeout(150)
def test_subgraphs():
    output = run("subgraphs", "--distributed-address", f"127.0.0.1:{free_ports(1)[0]}")
    assert output.count("generate: ") == 4
    assert "the same as the whole model" in output


@pytest.mark.timeout(150)
def test_decoder():
    ports = free_ports(5)
    output = run("decoder", "--distributed-address", f"127.0.0.1:{ports[0]}", "--agent-start-port", str(ports[1]))
    assert output.count("64 written: ") == 2
    assert "the same as the whole model" in output
    assert "kill -9 of rank 3 while it generated: ABORTED" in output
    assert "the next call is answered, right" in output


@pytest.mark.timeout(150)
def test_transformer(tmp_path):
    left_out = shutil.ignore_patterns("model", "__pycache__")
    shutil.copytree(EXAMPLES / "transformer", tmp_path / "transformer", ignore=left_out)
    ports = free_ports(5)
    flags = ("--distributed-address", f"127.0.0.1:{ports[0]}", "--agent-start-port", str(ports[1]))
    output = run("transformer", *flags, folder=tmp_path)
    assert "4 ranks, 2 pipeline stages" in output
    assert "64 tokens: logits of shape (64, 256), largest error" in output
    assert (tmp_path / "transformer" / "model" / "device3").is_dir()
    # The second time the model is there.
    assert "pipeline stages" not in run("transformer", *flags, folder=tmp_path)
