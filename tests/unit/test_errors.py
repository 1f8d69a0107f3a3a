import http
import re
from pathlib import Path

import grpc
import pytest

from shardserve import errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def rows():
    cells = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in cells}


def test_every_class_has_its_row_and_every_row_its_class():
    assert rows().keys() == errors.CLASSES.keys()


@pytest.mark.parametrize("name", list(errors.CLASSES))
def test_a_row_says_what_the_class_says(name):
    error = errors.CLASSES[name]
    grpc_status, http_status, mindspore_code, channel, cause, cure = rows()[name]
    assert grpc_status == error.grpc_status
    assert int(http_status) == error.http_status
    assert int(mindspore_code) == error.mindspore_code
    assert channel == ("reply" if error.in_reply else "status")
    assert cause
    assert cure


@pytest.mark.parametrize("name", list(errors.CLASSES))
def test_codes_exist(name):
    error = errors.CLASSES[name]
    assert error.grpc_status in grpc.StatusCode.__members__
    assert http.HTTPStatus(error.http_status) >= 400
    assert 1 <= error.mindspore_code <= 5


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    drawn = re.findall(r"^[│├└─ ]*(\w+)", errors.__doc__.split("\n\n")[1], re.M)
    assert sorted(drawn) == sorted(errors.CLASSES)


def test_an_error_crosses_processes_by_its_name():
    error = errors.from_wire("NotFound", "no servable 'x' here")
    assert (type(error), str(error)) == (errors.NotFound, "no servable 'x' here")
    assert type(errors.from_wire("OfALaterRelease", "text")) is errors.InternalError


def test_a_text_is_cut_off_and_can_be_written():
    assert errors.shortened("abc", 3) == "abc"
    assert errors.shortened("abcd", 3) == "abc… (1 more characters left out)"
    assert errors.shortened("é\udce9") == "é\\udce9"


def test_an_error_is_described_whatever_its_class_does():
    class NoText(Exception):
        def __str__(self):
            raise RecursionError

    assert errors.described(ValueError("x")) == "ValueError: x"
    assert errors.described(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert errors.described(NoText()) == "NoText: (its text can't be made: RecursionError)"
    assert errors.text_of(errors.StageError(NoText())) == "(its text can't be made: RecursionError)"
