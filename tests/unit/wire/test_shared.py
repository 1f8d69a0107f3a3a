"""Large payloads through shared memory: real sockets, real processes, and never a byte that changes under a reader."""

import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import threading

import numpy as np
import pytest
import torch
from limits import memory_left
from shared_pairs import LARGE, Note, Pair, holds, segments

from shardserve.wire import segments as pools
from shardserve.wire import shared
from shardserve.wire.blocking import FrameSocket
from shardserve.wire.frames import FrameError, NoMemory
from shardserve.wire.segments import MOST_SEGMENTS, PAGE, TOKEN, Parcel, Pool
from shardserve.wire.shared import PLACE, SMALLEST, SharedError, SharedPath

NOBODY = bytes(TOKEN)


@pytest.fixture(autouse=True)
def own_pool(monkeypatch):
    """The process has one, in which other tests' connections that were never told of their end may have left some."""
    monkeypatch.setattr(pools, "_pool", None)


@pytest.fixture
def pair(own_pool):
    with contextlib.closing(Pair()) as pair:
        yield pair.accepted()


def test_large_payloads_are_mapped_and_small_ones_sent(pair):
    pair.send(1)
    number, payload = pair.get()
    assert number == 1
    assert holds(payload, 1)
    assert len(payload) == LARGE
    assert not payload.flags.writeable
    pair.send(2, 100)
    assert pair.get()[1].flags.writeable


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_what_somebody_looks_at_is_never_used_again(pair):
    kept = []
    for number in range(1, 9):
        pair.send(number)
        kept.append(pair.get()[1])
    assert segments() == 8
    assert all(holds(payload, number) for number, payload in enumerate(kept, 1))
    # A view of a view, a tensor, a memoryview: whatever is left of it.
    kept[0] = kept[0][1000:2000].view(np.uint16)[::2]
    kept[1] = torch.from_numpy(kept[1][:64]).view(torch.int32)
    kept[2] = memoryview(kept[2])[5:6]
    del kept[3:]
    for number in range(100, 140):
        pair.send(number)
        assert holds(pair.get()[1], number)
    assert segments() == 8
    assert (kept[0] == 0x0101).all()
    assert (kept[1] == 0x02020202).all()
    assert kept[2][0] == 3


def test_a_segment_is_used_again_when_nobody_looks_at_it(pair):
    for number in range(1, 50):
        pair.send(number, LARGE + number * 1000)
        assert holds(pair.get()[1][: LARGE + number * 1000], number)
    assert segments() <= 2


def test_several_receivers_of_one_copy():
    with contextlib.closing(Pair()) as one, contextlib.closing(Pair()) as other:
        one.accepted()
        other.accepted()
        with Parcel([b"\7" * LARGE]) as parcel:
            one.ours.send(Note(7), parcel)
            other.ours.send(Note(7), parcel)
        first, second = one.get()[1], other.get()[1]
        assert segments() == 1
        assert holds(first, 7)
        del first
        one.send(8)
        assert holds(one.get()[1], 8)
        assert holds(second, 7)
        assert segments() == 2


def test_a_connection_that_ends_leaves_its_reader_what_it_has():
    with contextlib.closing(Pair()) as other:
        other.accepted()
        with contextlib.closing(Pair()) as ends:
            ends.accepted()
            ends.send(5)
            kept = ends.get()[1]
        for number in range(10, 20):
            other.send(number)
            assert holds(other.get()[1], number)
        assert holds(kept, 5)
        assert segments() <= 2


def test_with_the_last_connection_all_ends(pair):
    pair.send(1)
    kept = pair.get()[1]
    pair.close()
    assert segments() == 0
    assert holds(kept, 1)


def test_memory_that_is_short_is_no_error(pair, monkeypatch):
    monkeypatch.setattr(pools.pool(), "_limit", 3 * LARGE)
    kept = []
    for number in range(1, 7):
        pair.send(number)
        kept.append(pair.get()[1])
    assert [payload.flags.writeable for payload in kept] == [False, False, False, True, True, True]
    assert all(holds(payload, number) for number, payload in enumerate(kept, 1))


def test_a_segment_that_can_not_be_made_is_no_error(pair, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    pair.send(1)
    assert holds(pair.get()[1], 1)
    assert segments() == 0


def test_segments_of_other_sizes_make_room(monkeypatch):
    pool = Pool(8 * LARGE, 60)
    for size in (LARGE, 2 * LARGE, 6 * LARGE):
        segment = pool.take(size)
        pool.give_back(segment)
    assert sum(segment.capacity for segment in pool._segments) <= 8 * LARGE
    pool.abandon()


def test_another_process_that_can_not_open_ours_gets_it_through_the_socket(monkeypatch):
    monkeypatch.setattr(shared, "_can_open", lambda *_: False)
    with contextlib.closing(Pair()) as pair:
        for number in range(3):
            pair.send(number)
            assert pair.get()[1].flags.writeable


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (b"x", "a place of 1 bytes"),
        (PLACE.pack(os.getpid(), 99999, NOBODY, 0, 4096, 1, 10), "descriptor 99999 of process .*: No such file"),
        (PLACE.pack(os.getpid(), 0, NOBODY, 0, 4096, 1, LARGE + 1), "is over the limit of this connection"),
    ],
    ids=["short", "no descriptor", "large"],
)
def test_places_that_can_not_be(place, message):
    with pytest.raises(SharedError, match=message):
        SharedPath(lambda record: None).payload(place, LARGE)


def test_memory_that_can_shrink_is_refused():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 2 * PAGE)
    try:
        with pytest.raises(SharedError, match="is no segment of 4096 bytes"):
            SharedPath(lambda record: None).payload(PLACE.pack(os.getpid(), fd, NOBODY, 0, PAGE, 1, 10), LARGE)
    finally:
        os.close(fd)


def test_a_segment_that_another_took_the_number_of_is_refused():
    pool = Pool(8 * LARGE, 60)
    segment = pool.take(LARGE)
    place = (os.getpid(), segment.fd, segment.token, 0, segment.capacity, 1)
    try:
        with pytest.raises(SharedError, match="is another segment than was said"):
            SharedPath(lambda record: None).payload(PLACE.pack(*place[:2], NOBODY, *place[3:], 10), LARGE)
        receiver = SharedPath(lambda record: None)
        assert len(receiver.payload(PLACE.pack(*place, 10), LARGE)) == 10
        for word, size in ((510, 10), (0, LARGE + 8 * PAGE)):
            with pytest.raises(SharedError, match=f"a place of {size} bytes, word {word}"):
                receiver.payload(PLACE.pack(*place[:3], word, *place[4:], size), 2 * LARGE)
    finally:
        pool.abandon()


def test_of_several_receivers_one_is_gone_before_the_other_looks():
    """The segment stays until the other has read it; nothing else takes its number or its memory meanwhile."""
    with contextlib.closing(Pair()) as other:
        other.accepted()
        with contextlib.closing(Pair()) as one, contextlib.closing(Pair()) as late:
            one.accepted()
            late.accepted()
            places = []
            late.theirs._shared.payload, open_place = (
                lambda *place: places.append(place) or np.zeros(1),
                (late.theirs._shared.payload),
            )
            with Parcel([b"\7" * LARGE]) as parcel:
                one.ours.send(Note(7), parcel)
                late.ours.send(Note(7), parcel)
            kept = one.get()[1]
            late.get()
            one.ours.close()
            for number in range(20, 30):
                other.send(number)
                assert holds(other.get()[1], number)
            read = open_place(*places[0])
            assert holds(read, 7)
            other.send(31)
            assert holds(read, 7)
            assert holds(kept, 7)
            assert holds(other.get()[1], 31)
            before = segments()
            del read
            other.send(32)
            other.get()
            assert segments() <= before


def test_a_connection_that_was_closed_takes_no_part_any_more():
    path = SharedPath(lambda record: None)
    path.close()
    assert not path.ready()
    assert pools.pool().join(path) is None


def test_without_descriptors_there_is_no_offer(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with contextlib.closing(Pair()) as pair:
        for number in range(3):
            pair.send(number)
            assert pair.get()[1].flags.writeable


def test_many_payloads_that_are_kept_need_few_descriptors(pair):
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for number in range(2 * MOST_SEGMENTS):
        pair.send(number, SMALLEST)
        kept.append(pair.get()[1])
    assert all(holds(payload, number) for number, payload in enumerate(kept))
    assert segments() == MOST_SEGMENTS
    assert len(os.listdir("/proc/self/fd")) <= before + MOST_SEGMENTS + 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > MOST_SEGMENTS


def test_what_is_not_needed_for_long_is_given_up(pair, monkeypatch):
    monkeypatch.setattr(pools.pool(), "_idle", 0.05)
    gone = threading.Semaphore(0)
    forget = pair.theirs._shared.control
    pair.theirs._shared.control = lambda record: (forget(record), gone.release())
    kept = []
    for number in range(5):
        pair.send(number)
        kept.append(pair.get()[1])
    pools.pool()._trim()
    assert segments() == 5
    del kept[1:]
    gc.collect()
    assert all(gone.acquire(timeout=10) for _ in range(4))
    assert segments() == 1
    assert holds(kept[0], 0)


def test_without_a_thread_a_segment_is_had_all_the_same():
    pool = Pool(1 << 30, 60)
    before = threading.stack_size(1 << 46)  # No thread can have that.
    try:
        first = pool.take(LARGE)
    finally:
        threading.stack_size(before)
    assert first is not None
    assert pool._trimming is None
    assert pool.take(LARGE) is not first
    assert pool._trimming.is_alive()
    pool.leave(object())
    assert pool._trimming is None


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_an_offer_of_what_is_no_probe_is_not_taken(kind):
    read, write = os.pipe()
    folder = os.open("/", os.O_RDONLY)
    try:
        assert not shared._can_open(os.getpid(), {"pipe": read, "directory": folder}[kind], NOBODY)
    finally:
        for fd in (read, write, folder):
            os.close(fd)


def test_a_forked_child_does_not_say_that_its_parent_has_read(pair):
    pair.send(1)
    payload = pair.get()[1]
    pid = os.fork()
    if pid == 0:
        del payload
        os._exit(0)
    os.waitpid(pid, 0)
    pair.send(2)
    assert holds(pair.get()[1], 2)
    assert holds(payload, 1)


def test_a_connection_without_shared_memory_ends_when_it_is_sent_some():
    ours, theirs = socket.socketpair()
    sender, receiver = FrameSocket(ours, Note, share=True), FrameSocket(theirs, Note)
    sender._shared.ready()
    with pytest.raises(FrameError, match="on a connection that has none"):
        receiver.receive()
    sender.close()
    receiver.close()


def test_what_lies_in_shared_memory_needs_no_memory_of_the_reader():
    given = []

    def allocate(size):
        given.append(size)
        return np.empty(size, np.uint8)

    ours, theirs = socket.socketpair()
    sender, receiver = FrameSocket(ours, Note, share=True), FrameSocket(theirs, Note, share=True, allocate=allocate)
    sender.send(Note(0), [b"\0" * 64])
    receiver.receive()
    # The offer, and its acceptance.
    sender._shared.ready()
    sender.send(Note(1))
    receiver.receive()
    sender.take_acceptance()
    sender.send(Note(2), [b"\2" * LARGE])
    assert holds(receiver.receive()[1], 2)
    assert given == [64]
    sender.close()
    receiver.close()


@contextlib.contextmanager
def sharing():
    """Sender and receiver, which takes shared memory by now."""
    with contextlib.ExitStack() as closing:
        sender, receiver = (
            closing.enter_context(contextlib.closing(FrameSocket(end, Note, share=True))) for end in socket.socketpair()
        )
        sender._shared.ready()
        sender.send(Note(0))
        receiver.receive()
        sender.take_acceptance()
        yield sender, receiver


def test_what_can_not_be_mapped_is_told_and_counts_as_read():
    size = 64 << 20
    with sharing() as (sender, receiver):
        sender.send(Note(1), [b"\1" * size])
        sender.send(Note(2))
        with memory_left(size // 2):
            with pytest.raises(NoMemory, match=f"no memory for {size} bytes, to read what process"):
                receiver.receive()
            assert receiver.receive()[0] == Note(2)
        # The sender uses the same memory again, and now there is room for it.
        sender.send(Note(3), [b"\3" * size])
        assert segments() == 1
        message, payload = receiver.receive()
        assert message == Note(3)
        assert holds(payload, 3)


@pytest.mark.parametrize("mappings", [0, 1])
def test_without_mappings_a_payload_is_dropped_and_counts_as_read(monkeypatch, mappings):
    """As where vm.max_map_count is reached: neither the words nor the bytes can be mapped, or the words only."""
    map_memory, left = shared.map_memory, [None] * mappings

    def refuse(*args, **named):
        if not left:
            raise OSError(errno.ENOMEM, "mmap failed")
        left.pop()
        return map_memory(*args, **named)

    with sharing() as (sender, receiver):
        sender.send(Note(1), [b"\1" * LARGE])
        with monkeypatch.context() as patch:
            patch.setattr(shared, "map_memory", refuse)
            with pytest.raises(NoMemory, match="to read what process"):
                receiver.receive()
        sender.send(Note(2), [b"\2" * LARGE])
        # In the same memory.
        assert segments() == 1
        message, payload = receiver.receive()
        assert message == Note(2)
        assert holds(payload, 2)


def test_between_processes_of_which_one_is_killed():
    """Nothing has a name, so nothing is left; who lives on reads what it had."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            child = FrameSocket(theirs, Note, share=True)
            message, _ = child.receive()
            child.send(Note(message.number), [b"\1" * LARGE])
            child.take_acceptance()
            child.receive()
            child.send(Note(2), [b"\2" * LARGE])
            signal.pause()
        finally:
            os._exit(1)
    theirs.close()
    parent = FrameSocket(ours, Note, share=True)
    parent.send(Note(1))
    assert parent.receive()[1].flags.writeable
    parent.send(Note(2))
    payload = parent.receive()[1]
    assert not payload.flags.writeable
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(EOFError):
        parent.receive()
    parent.close()
    assert holds(payload, 2)
