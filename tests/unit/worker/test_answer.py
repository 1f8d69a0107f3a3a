import asyncio

import pytest
from asynchronous import asynchronous

from shardserve.worker.answer import Answer


def test_callbacks_run_at_once_and_in_order():
    answer, said = Answer(), []
    for name in "ab":
        answer.add_done_callback(lambda done, name=name: said.append((name, done.result())))
    answer.set_result(5)
    assert said == [("a", 5), ("b", 5)]
    answer.add_done_callback(lambda done: said.append(done))
    assert said[2] is answer


def test_an_error_and_a_cancellation():
    answer = Answer()
    answer.set_exception(ValueError("no"))
    answer.cancel()
    assert not answer.cancelled()
    with pytest.raises(ValueError, match="no"):
        answer.result()
    cancelled = Answer()
    cancelled.cancel()
    assert cancelled.done()
    with pytest.raises(asyncio.CancelledError):
        cancelled.result()


@asynchronous
async def test_it_is_awaited():
    early, late, wrong = Answer(), Answer(), Answer()
    early.set_result(1)
    assert await early == 1
    asyncio.get_running_loop().call_soon(late.set_result, 2)
    assert await late == 2
    asyncio.get_running_loop().call_soon(wrong.set_exception, KeyError("x"))
    with pytest.raises(KeyError):
        await wrong


@asynchronous
async def test_who_is_cancelled_while_waiting_cancels_it():
    answer = Answer()

    async def wait():
        return await answer

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled()
