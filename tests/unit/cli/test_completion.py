import os
import subprocess
import sys

import pytest


def complete(line, tmp_path):
    """What a shell is offered at the end of `line`."""
    out = tmp_path / "completions"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "shardserve.cli"], env=environment, check=True)
    return set(out.read_text().split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [("shardserve st", "status"), ("shardserve up --grpc", "--grpc-address"), ("shardserve export --ver", "--verify")],
)
def test_commands_and_flags_are_completed(tmp_path, line, expected):
    assert expected in complete(line, tmp_path)
