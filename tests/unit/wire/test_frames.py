import random

import msgspec
import numpy as np
import pytest

from shardserve.errors import MessageTooLarge
from shardserve.wire.frames import PREFIX, FrameError, FrameReader, NoMemory, encode, padded, split
from shardserve.wire.messages import TensorMeta, front


def feed(reader, data, sizes):
    """Gives `data` to the reader in pieces of at most those sizes, as a socket would."""
    frames = []
    at = 0
    while at < len(data):
        room = reader.buffer()
        count = min(len(room), next(sizes), len(data) - at)
        room[:count] = data[at : at + count]
        frames += reader.advance(count)
        at += count
    return frames


def infer(number, sizes, method="m"):
    metas = {f"t{index}": TensorMeta("uint8", (size,), size) for index, size in enumerate(sizes)}
    return front.Infer(number, method, [metas], None)


@pytest.mark.parametrize("largest", [1, 7, 100, 70_000, 1 << 20])
def test_frames_come_back_whatever_the_chunks(largest):
    chance = random.Random(largest)
    top = 300 if largest == 1 else 200_000
    sent = []
    data = b""
    for number in range(12):
        sizes = [chance.choice([0, 1, 63, 64, 65, chance.randrange(top)]) for _ in range(chance.randrange(4))]
        parts = [chance.randbytes(size) for size in sizes]
        message = infer(number, sizes, "m" * chance.randrange(top))
        sent.append((message, parts))
        data += b"".join(encode(message, parts))
    reader = FrameReader(front.ToWorker)
    frames = feed(reader, data, iter(lambda: chance.randint(1, largest), None))
    assert len(frames) == len(sent)
    for (message, parts), (got, payload) in zip(sent, frames, strict=True):
        assert got == message
        assert [view.tobytes() for view in split(payload, [len(part) for part in parts])] == parts


def test_a_payload_is_the_readers_own_memory():
    first, second = (b"".join(encode(infer(0, [4]), [bytes([value] * 4)])) for value in (1, 2))
    frames = feed(FrameReader(front.ToWorker), first + second, iter(lambda: 1000, None))
    assert [payload[0] for _, payload in frames] == [1, 2]
    assert frames[0][1].flags.writeable
    assert not np.shares_memory(frames[0][1], frames[1][1])


def test_payloads_go_into_the_memory_that_is_given_for_them():
    given = []

    def allocate(size):
        given.append(np.empty(size, np.uint8))
        return given[-1]

    sizes = [4, 0, 100_000]
    data = b"".join(b"".join(encode(infer(0, [size]), [bytes([size % 251]) * size])) for size in sizes)
    frames = feed(FrameReader(front.ToWorker, allocate=allocate), data, iter(lambda: 1000, None))
    # None for the one that is empty.
    assert [len(memory) for memory in given] == [padded(4), padded(100_000)]
    assert frames[0][1] is given[0]
    assert frames[2][1] is given[1]
    assert [payload[:size].tobytes() for (_, payload), size in zip(frames, sizes, strict=True)] == [
        bytes([size % 251]) * size for size in sizes
    ]


@pytest.mark.parametrize("largest", [7, 70_000, 1 << 20])
def test_a_payload_without_memory_is_dropped_and_its_message_comes_in_its_turn(largest):
    def allocate(size):
        return np.empty(size if size < 1000 else 1 << 60, np.uint8)

    chance = random.Random(largest)
    sizes = [4, 200_000, 0, 1000, 1_000_000, 100]
    data = b"".join(
        b"".join(encode(infer(number, [size]), [bytes([number]) * size])) for number, size in enumerate(sizes)
    )
    reader = FrameReader(front.ToWorker, allocate=allocate)
    frames = feed(reader, data, iter(lambda: chance.randint(1, largest), None))
    assert [message.request for message, _ in frames] == list(range(len(sizes)))
    for (message, payload), size in zip(frames, sizes, strict=True):
        if size < 1000:
            assert payload[:size].tobytes() == bytes([message.request]) * size
        else:
            assert isinstance(payload, NoMemory)
            assert payload.message == message
            assert str(payload) == f"no memory for {padded(size)} bytes"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (PREFIX.pack(1 << 30, 0), "over the limit"),
        (PREFIX.pack(1, 1001), "over the limit"),
        (b"GET / HTTP/1.1\r\n", "over the limit"),
        (PREFIX.pack(4, 0) + b"\xc1\xc1\xc1\xc1", "no message"),
        (PREFIX.pack(1, 0) + b"\x01", "no message"),
        (b"".join(encode(front.Failed(1, "a", "b"))), "no message"),
    ],
)
def test_what_is_no_frame_of_the_link_is_refused(data, text):
    with pytest.raises(FrameError, match=text):
        feed(FrameReader(front.ToWorker, max_payload=1000), data, iter(lambda: 5, None))


def test_a_frame_that_the_other_side_would_refuse_is_not_made(monkeypatch):
    monkeypatch.setattr("shardserve.wire.frames.MAX_HEADER", 1000)
    monkeypatch.setattr("shardserve.wire.frames.MAX_PAYLOAD", 1000)
    encode(infer(0, [900], "m" * 900), [bytes(900)])
    for message, data in [(infer(0, [1], "m" * 1000), b"1"), (infer(0, [1001]), bytes(1001))]:
        with pytest.raises(MessageTooLarge, match=r"\(1000 and 1000 bytes\)"):
            encode(message, [data])


def test_split_wants_the_payload_filled():
    payload = np.zeros(padded(10) + padded(3), np.uint8)
    assert [len(view) for view in split(payload, [10, 3])] == [10, 3]
    for sizes in ([10], [10, 3, 1], [10, 100]):
        with pytest.raises(FrameError, match="header says"):
            split(payload, sizes)


def test_every_message_of_the_link_comes_back():
    reply = front.Reply(
        7, [front.InstanceOutputs({"y": TensorMeta("str", (1,), 2, (2,))}), front.InstanceError("E", "m")]
    )
    for message in (reply, front.Failed(1, "InternalError", "text"), front.Cancel(3)):
        union = front.ToMain if not isinstance(message, front.Cancel) else front.ToWorker
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message
