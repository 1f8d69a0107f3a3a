"""What whoever waits is told: a callback that bars are made of, and lines in the log of what a start waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of it are done, and of how many; from any thread, and has to return soon."""


def quietly(what: str, done: int, total: int) -> None:
    """The Progress of whoever needs none."""


async def remind(first: float, waiting: Callable[[], str]) -> None:
    """Logs who waits for what after `first` seconds, then each time after twice as long, until it is cancelled."""
    pause = first
    while True:
        await asyncio.sleep(pause)
        logger.warning("%s", waiting())
        pause *= 2


def agents_waited_for(total: int, missing: Iterable[int]) -> str:
    """ "agents: 3 of 8 are there, missing ranks 3-7"; missing: the ranks that aren't there, ascending."""
    absent = list(missing)
    if not absent:
        return f"groups to form and Python stages to start; all {total} agents are there"
    there = total - len(absent)
    return f"agents: {there} of {total} {'is' if there == 1 else 'are'} there, missing rank{_in_words(absent)}"


def _in_words(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    plural = "s" if len(numbers) > 1 else ""
    return f"{plural} " + ", ".join("-".join(map(str, span)) for span in spans)
