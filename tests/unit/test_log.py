"""The lines of our processes."""

import logging
import re

import pytest

from shardserve.log import MAX_LOGGED, Lines, servable_in_words, work_for


@pytest.fixture
def said(monkeypatch):
    """The lines of a process that is called "worker"."""

    class Keeping(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    lines, handler = [], Keeping()
    handler.setFormatter(Lines("worker"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler(), handler])
    return lines


def test_a_line_names_the_servable_that_its_process_works_for(said):
    logger = logging.getLogger("shardserve.test")
    logger.warning("before %s", "it")
    work_for(servable_in_words("100% %s", 2))
    logger.warning("rank %d", 3)
    before, after = said
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \S+ WARNING worker\[\d+\] before it", before)
    assert after.endswith("] servable '100% %s' version 2: rank 3")


def test_a_line_has_an_end(said):
    work_for(servable_in_words("net", 1))
    logging.getLogger("shardserve.test").warning("x" * 2 * MAX_LOGGED)
    assert len(said[0]) < MAX_LOGGED + 200
    assert "servable 'net' version 1: xxx" in said[0]
