import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[3] / "README.md"


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


def test_bash_completes_after_the_line_of_the_readme(tmp_path):
    """What README says to run, then a Tab after the beginning of a line."""
    [line] = re.findall(r'`(eval "\$\(register-python-argcomplete shardserve\)")`', README.read_text())
    script = f"""
        {line}
        COMP_LINE="shardserve up --dev" COMP_POINT=19 COMP_WORDS=(shardserve up --dev) COMP_CWORD=2
        COMP_TYPE=9
        function=$(complete -p shardserve | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $function shardserve --dev up
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == {"--device-type", "--devices"}, done.stderr
