"""What came in shared memory goes on without a copy, and never changes under whoever it went to."""

import contextlib
import os
import socket

import numpy as np
import pytest
from shared_pairs import LARGE, Note, Pair, holds, segments

from shardserve.wire import segments as pools
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.segments import RELAYS, Parcel


@pytest.fixture(autouse=True)
def own_pool(monkeypatch):
    monkeypatch.setattr(pools, "_pool", None)


class Relay:
    """A first connection, what comes on which goes out on the second: as a Worker between Main and an agent does."""

    def __init__(self):
        self.before, self.after = Pair().accepted(), Pair().accepted()
        for end in (self.before.theirs, self.after.ours):
            end._shared._relay = True

    def bring(self, number, size=LARGE):
        self.before.send(number, size)
        return self.before.get()[1]

    def pass_on(self, *buffers):
        self.after.ours.send(Note(0), [memoryview(buffer) for buffer in buffers])

    def close(self):
        self.before.close()
        self.after.close()


@pytest.fixture
def relay(own_pool):
    with contextlib.closing(Relay()) as relay:
        yield relay


def test_what_came_goes_on_without_a_copy(relay):
    for number in range(1, 20):
        came = relay.bring(number)
        relay.pass_on(came)
        last = relay.after.get()[1]
        assert holds(last, number)
        assert not last.flags.writeable
    # The reader of the one before had it still when the next one came.
    assert segments() <= 2


def test_the_last_reader_is_waited_for(relay):
    came = relay.bring(1)
    relay.pass_on(came)
    kept = relay.after.get()[1]
    del came
    for number in range(2, 12):
        assert holds(relay.bring(number), number)
        assert holds(kept, 1)
    assert segments() == 2
    view = kept[5:6]
    del kept
    assert holds(relay.bring(12), 12)
    assert holds(view, 1)
    del view
    relay.bring(13)
    relay.bring(14)
    assert segments() == 2


def test_who_relays_may_read_longer(relay):
    came = relay.bring(1)
    relay.pass_on(came)
    assert holds(relay.after.get()[1], 1)
    for number in range(2, 12):
        assert holds(relay.bring(number), number)
    assert holds(came, 1)


def test_tensors_of_one_payload_that_go_on_together(relay):
    parts = [b"\1" * (LARGE - 100), b"", b"\2" * 77]
    relay.before.ours.send(Note(1), parts)
    came = relay.before.get()[1]
    at = -(-(LARGE - 100) // 64) * 64
    relay.pass_on(came[: LARGE - 100], came[:0], came[at : at + 77])
    got = relay.after.get()[1]
    assert segments() == 1
    assert bytes(got[at : at + 77]) == parts[2]


@pytest.mark.parametrize("change", ["a part", "another order", "one more", "other bytes", "later bytes"])
def test_whatever_else_goes_on_is_copied(relay, change):
    relay.before.ours.send(Note(1), [b"\1" * LARGE, b"\2" * LARGE])
    came = relay.before.get()[1]
    first, second = came[:LARGE], came[LARGE:]
    sent = {
        "a part": [first],
        "another order": [second, first],
        "one more": [first, second, np.full(3, 3, np.uint8)],
        "other bytes": [first, np.full(LARGE, 4, np.uint8)],
        "later bytes": [came[64:], np.full(64, 5, np.uint8)],
    }[change]
    relay.pass_on(*sent)
    got = relay.after.get()[1]
    assert segments() == 2
    at = 0
    for part in sent:
        assert bytes(got[at : at + len(part)]) == bytes(part)
        at += -(-len(part) // 64) * 64


def test_several_get_the_same(relay):
    came = relay.bring(1)
    with contextlib.closing(Pair()) as other:
        other.accepted()
        other.ours._shared._relay = True
        with Parcel([memoryview(came)]) as parcel:
            relay.after.ours.send(Note(0), parcel)
            other.ours.send(Note(0), parcel)
        kept = other.get()[1]
        assert holds(relay.after.get()[1], 1)
        assert segments() == 1
        del came, parcel
        for number in range(2, 12):
            assert holds(relay.bring(number), number)
        assert holds(kept, 1)


def test_more_of_them_than_there_are_words_get_a_copy(relay):
    came = relay.bring(1)
    for _ in range(RELAYS):
        relay.pass_on(came)
        assert holds(relay.after.get()[1], 1)
    assert segments() == 1
    relay.pass_on(came)
    assert holds(relay.after.get()[1], 1)
    assert segments() == 2


def test_a_reader_whose_connection_ends_may_look_at_it_for_ever(relay):
    came = relay.bring(1)
    relay.pass_on(came)
    kept = relay.after.get()[1]
    relay.after.close()
    del came
    for number in range(2, 12):
        assert holds(relay.bring(number), number)
    assert holds(kept, 1)


def test_when_who_relays_is_gone_its_readers_may_look_at_it_for_ever(relay):
    with contextlib.closing(Pair()) as other:
        other.accepted()
        came = relay.bring(1)
        [lent] = pools.pool()._segments
        relay.pass_on(came)
        kept = relay.after.get()[1]
        del came
        relay.before.close()
        for number in range(2, 12):
            other.send(number)
            assert holds(other.get()[1], number)
        assert holds(kept, 1)
        assert lent not in pools.pool()._segments


def test_what_was_relayed_can_be_opened_when_its_owner_has_left(relay):
    """The owner's connection ends before the other side has looked."""
    path = relay.after.theirs._shared
    places, path.payload = [], lambda *place: places.append(place) or np.zeros(1)
    came = relay.bring(1)
    relay.pass_on(came)
    relay.after.get()
    del path.payload, came
    relay.before.close()
    assert holds(path.payload(*places[0]), 1)


def test_whoever_it_was_relayed_to_forgets_it_with_us(relay):
    came = relay.bring(1)
    relay.pass_on(came)
    relay.after.get()
    mapped = relay.after.theirs._shared._mapped
    assert len(mapped) == 1
    del came
    relay.before.close()
    relay.after.send(2, 100)
    relay.after.get()
    assert not mapped


def test_after_its_owner_was_killed_it_is_copied(relay):
    """Nobody can open what it had; what we have mapped is there."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            child = FrameSocket(theirs, Note, share=True)
            child.send(Note(1), [b"\1" * LARGE])
            child.take_acceptance()
            child.receive()
            child.send(Note(2), [b"\2" * LARGE])
            child.receive()
        finally:
            os._exit(0)
    theirs.close()
    with contextlib.closing(FrameSocket(ours, Note, share=True)) as parent:
        parent._shared._relay = True
        assert parent.receive()[1].flags.writeable
        parent.send(Note(1))
        came = parent.receive()[1]
        assert not came.flags.writeable
        parent.send(Note(2))
        os.waitpid(pid, 0)
        relay.pass_on(came)
        assert holds(relay.after.get()[1], 2)
    assert segments() == 1
