"""Writes the gRPC stubs of `protos/*.proto` into shardserve/wire/stubs (or into the folder given as argument).

protoc writes `import x_pb2`, which only works with the stubs' folder on sys.path; here the imports name the package.
"""

from __future__ import annotations

import importlib.resources
import re
import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "shardserve" / "wire" / "stubs"
PACKAGE = '"""Generated from protos/ by `make stubs`; not to be edited."""\n'


def generate(target: Path) -> list[Path]:
    """Compiles every .proto of this folder into `target`; returns the files that it wrote, sorted."""
    target.mkdir(parents=True, exist_ok=True)
    sources = sorted(PROTOS.glob("*.proto"))
    includes = [f"-I{PROTOS}", f"-I{importlib.resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *includes, *outputs, *map(str, sources)]):
        raise SystemExit("protoc failed, see above")
    (target / "__init__.py").write_text(PACKAGE)
    for path in target.glob("*_pb2*.py*"):
        path.write_text(
            re.sub(r"^import (\w+_pb2)", r"from shardserve.wire.stubs import \1", path.read_text(), flags=re.M)
        )
    return sorted(path for path in target.iterdir() if path.suffix in (".py", ".pyi"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
