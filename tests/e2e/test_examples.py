"""Each example runs by its one command, and leaves nothing behind."""

import pytest
from serving import EXAMPLES, Processes, free_ports


def run(*command):
    with Processes() as processes:
        process = processes.start(EXAMPLES / command[0] / "run.py", *command[1:])
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        processes.wait_all_ended(5)
    assert output.endswith("stopped\n")
    return output


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
