import multiprocessing
import os
import threading

import pytest

from shardserve.agent.collectives.leaving import LeaveInTime
from shardserve.agent.lifetime import Lifetime
from shardserve.wire.messages import Generation

pytestmark = pytest.mark.usefixtures("nothing_left")
fork = multiprocessing.get_context("fork")


def blocked(inside):
    lifetime = Lifetime(Generation(1, 1))
    leaving = LeaveInTime("a test", lifetime, 0.05)
    with leaving:
        pass
    if inside:
        leaving.__enter__()
    lifetime.end()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    os._exit(7)


@pytest.mark.parametrize(("inside", "code"), [(True, 1), (False, 7)])
def test_who_is_inside_after_the_end_ends(inside, code):
    process = fork.Process(target=blocked, args=(inside,))
    process.start()
    process.join(30)
    assert process.exitcode == code
    process.close()
