import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
STUBS = REPOSITORY / "shardserve" / "wire" / "stubs"


def test_the_stubs_are_those_of_the_protos(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which writes the stubs, isn't installed")
    generate = runpy.run_path(str(REPOSITORY / "protos" / "generate.py"))["generate"]
    written = generate(tmp_path / "stubs")
    assert [path.name for path in written] == sorted(path.name for path in STUBS.iterdir() if path.is_file())
    for path in written:
        assert path.read_bytes() == (STUBS / path.name).read_bytes(), f"{path.name}: run `make stubs`"


@pytest.mark.parametrize("module", ["client", "main.app", "worker.worker", "server"])
def test_importing_it_needs_no_torch(module):
    """import-linter doesn't see what the packages of an imported module import."""
    code = f"import sys, shardserve.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
