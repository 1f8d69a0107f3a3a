"""docs/compatibility.md names tests that exist, and all that it should; the guide's calls are those of the API."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from shardserve import server
from shardserve.client import Client
from shardserve.servable import Model
from shardserve.server import distributed, register

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
GUIDE = ROOT / "docs" / "from-mindspore-serving.md"
HEADINGS = [
    "1 Launch API",
    "2 Clients and REST",
    "3 Rank tables",
    "4 Several hosts",
    "5 Errors",
    "6 Commands",
    "7 Examples",
    "8 Guide for MindSpore Serving users",
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises():
    """Heading to its lines, each a promise with the tests that hold it."""
    found, heading = {}, None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = found.setdefault(line.removeprefix("## "), [])
        elif line.startswith("- ") and heading is not None:
            heading.append(line)
    return found


def names_in(file):
    """By reading it: importing end-to-end tests would take their helpers along."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def named():
    return NAMED.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_heading_has_promises_and_every_promise_tests(heading):
    lines = promises()[heading]
    assert lines
    assert [line for line in lines if not NAMED.search(line)] == []


def test_every_test_that_is_named_exists():
    there = {path: names_in(ROOT / path) if (ROOT / path).is_file() else set() for path, _ in named()}
    assert [f"{path}::{test}" for path, test in named() if test not in there[path]] == []
    # Whatever looks like a test is one that was checked.
    assert len(named()) == PAGE.read_text(encoding="utf-8").count("::")


def test_every_file_of_end_to_end_and_chaos_tests_is_named():
    files = {
        str(file.relative_to(ROOT)) for kind in ("e2e", "chaos") for file in (ROOT / "tests" / kind).glob("test_*.py")
    }
    assert sorted(files - {path for path, _ in named()}) == []


# The guide.

ROOMS = {"distributed": distributed, "register": register, "server": server, "Model": Model, "Client": Client}


def guide_calls():
    """Each call in the first column of the guide's table: its name and arguments, None where it names none."""
    rows = [line.split("|")[1] for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for cell in rows:
        for name, arguments in re.findall(r"`([A-Za-z_.]+)(?:\(([^`]*)\))?`", cell):
            if name.partition(".")[0] in ROOMS:
                yield name, arguments.split(", ") if arguments else None


def function_of(name):
    room, _, attribute = name.partition(".")
    return getattr(ROOMS[room], attribute) if attribute else ROOMS[room]


@pytest.mark.parametrize(("name", "arguments"), [call for call in guide_calls() if call[1] is not None])
def test_the_guide_has_the_arguments_of_each_call(name, arguments):
    if name == "server.start_servables":
        # Named by what it takes; nobody gives it by keyword.
        arguments = ["servable_configs"]
    has = [parameter for parameter in inspect.signature(function_of(name)).parameters if parameter != "self"]
    wanted = [argument.lstrip("*") for argument in arguments]
    assert [parameter for parameter in has if parameter in wanted] == wanted


def test_the_guide_has_every_public_function():
    public = {
        f"{room}.{name}"
        for room, module in (("distributed", distributed), ("register", register), ("server", server))
        for name in module.__all__
    } - {"server.distributed", "server.register"}
    assert public - {name for name, _ in guide_calls()} == set()
