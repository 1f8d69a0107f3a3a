"""What a reply or a gRPC status means."""

import asyncio

import grpc
import numpy as np
import pytest

from shardserve.client import AsyncClient, Client, codec
from shardserve.errors import InternalError, MessageTooLarge, Overloaded
from shardserve.wire import proto, tensors
from shardserve.wire.stubs import ms_service_pb2 as pb

REPLIES = [
    (pb.PredictReply(error_msg=[pb.ErrorMsg(error_code=1), pb.ErrorMsg()]), "2 errors for 0 instances"),
    (pb.PredictReply(instances=[pb.Instance(items={"y": pb.Tensor()})]), "unknown dtype number 0"),
]


@pytest.mark.parametrize(("reply", "text"), REPLIES)
def test_a_reply_that_is_none_is_an_error_like_others(reply, text):
    assert text in codec.decode_reply(reply, False)["error"]
    with pytest.raises(InternalError, match=text):
        codec.decode_reply(reply, True)


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("CLIENT: Sent message larger than max (2 vs. 1)", MessageTooLarge),
        ("SERVER: Received message larger than max (2 vs. 1)", MessageTooLarge),
        ("Concurrent RPC limit exceeded!", Overloaded),
        (None, Overloaded),
    ],
)
def test_what_grpc_itself_refuses(details, kind):
    assert type(codec.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, details, None)) is kind


@pytest.mark.parametrize(
    ("details", "setting"),
    [
        ("Received message larger than max (2 vs. 1)", "max_msg_mb_size"),
        ("Concurrent RPC limit exceeded!", "max_calls"),
    ],
)
def test_what_grpc_itself_refuses_names_the_setting(details, setting):
    error = codec.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, details, None)
    assert str(error) == f"RESOURCE_EXHAUSTED: {details}: the server's {setting} is the limit"


def test_a_request_that_no_message_holds_is_not_sent():
    instances = [{"x": np.zeros(3, np.uint8)}, {"x": np.zeros(2**31 - 2**20, np.uint8)}, {"x": 1}]
    text = "^the first 2 of 3 instances have [0-9]+ bytes; a message has at most 2146435072$"
    client = Client("127.0.0.1:1", "echo", "predict", raise_errors=True)
    with client, pytest.raises(MessageTooLarge, match=text):
        client.infer(instances)

    async def run():
        async with AsyncClient("127.0.0.1:1", "echo", "predict", raise_errors=True) as client:
            with pytest.raises(MessageTooLarge, match=text):
                await client.infer(instances)

    asyncio.run(run())


def test_the_size_of_an_instance_is_not_more_than_is_counted():
    values = {"x": np.zeros((2, 3, 4)), "ä" * 50: np.array(["ü" * 200, "", "a"] * 20, object), "": 1}
    request = codec.encode_request(codec.servable_spec("s", "m", 0), values)
    metas, _ = tensors.encode_instance(values, "")
    assert request.instances[0].ByteSize() <= proto.size_of(metas)
