"""What a reply or a gRPC status means."""

import grpc
import pytest

from shardserve.client import codec
from shardserve.errors import InternalError, MessageTooLarge, Overloaded
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
