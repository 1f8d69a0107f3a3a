"""What a gRPC client is told when something is wrong, of an instance or of the whole request."""

import numpy as np
import pytest
from main_harness import X, announce, echo, predict

from shardserve.client import AsyncClient
from shardserve.errors import Aborted, InternalError, InvalidInput, MessageTooLarge, NotFound, StepError, Unavailable
from shardserve.main.grpc.front import _reply
from shardserve.wire.messages import TensorMeta, front
from shardserve.wire.stubs import ms_service_pb2 as pb


def test_names_that_are_wrong_say_what_there_is():
    async def test(launcher, worker, client, address):
        for arguments, text in [
            (("nobody", "predict"), "no servable 'nobody' here; there are: 'echo' version 1"),
            (("echo", "nothing"), "servable 'echo' version 1 has no method 'nothing'; it has: predict"),
            (("echo", "predict", 9), "servable 'echo' has no version 9; it has: 1"),
        ]:
            async with AsyncClient(address, *arguments) as wrong:
                assert await wrong.infer(X) == {"error": text}
            async with AsyncClient(address, *arguments, raise_errors=True) as wrong:
                with pytest.raises(NotFound):
                    await wrong.infer(X)

    predict(test)


def test_inputs_that_are_wrong():
    async def test(launcher, worker, client, address):
        with pytest.raises(InvalidInput, match="at least one instance"):
            await client.infer([])
        with pytest.raises(InvalidInput, match="instance 0: missing 'x' and unknown 'z'; method 'predict' takes"):
            await client.infer({"z": 1})
        async with AsyncClient(address, "echo", "predict") as lenient:
            results = await lenient.infer([X, {}, {**X, "z": 1}, X])
        assert [list(result) for result in results] == [["x"], ["error"], ["error"], ["x"]]
        assert results[1]["error"].startswith("instance 1: missing 'x'")
        infer = await worker.next(front.Infer)
        assert (len(infer.instances), infer.places) == (2, (0, 3))

    predict(test)


def test_instances_that_all_fail_have_their_errors_in_their_places():
    async def test(launcher, worker, client, address):
        async with AsyncClient(address, "echo", "predict") as lenient:
            for instances in ([{}], [{}, {"z": 1}]):
                results = await lenient.infer(instances)
                assert [list(result) for result in results] == [["error"]] * len(instances)
            assert "at least one instance" in (await lenient.infer([]))["error"]
        assert worker.frames.empty()

    predict(test)


def test_errors_of_instances_and_of_requests():
    def script(worker, message, payload):
        first = front.InstanceOutputs(message.instances[0])
        if message.method == "predict":
            failed = front.InstanceError("StepError", "id 9 is out of range")
            worker.send(front.Reply(message.request, [first, failed]), [memoryview(payload[:24])])
        else:
            worker.send(front.Failed(message.request, "Aborted", "two generations ended"))

    async def test(launcher, worker, client, address):
        worker.script = script
        worker.send(announce(methods={name: front.MethodInfo(("x",), ("x",)) for name in ("predict", "abort")}))
        async with AsyncClient(address, "echo", "predict") as lenient:
            good, bad = await lenient.infer([X, X])
        assert np.array_equal(good["x"], X["x"])
        assert bad == {"error": "id 9 is out of range"}
        with pytest.raises(StepError, match="out of range"):
            await client.infer([X, X])
        async with AsyncClient(address, "echo", "abort") as lenient:
            assert await lenient.infer(X) == {"error": "ABORTED: two generations ended"}
        async with AsyncClient(address, "echo", "abort", raise_errors=True) as strict:
            with pytest.raises(Aborted):
                await strict.infer(X)

    predict(test)


@pytest.mark.parametrize("character", ["%", "é", "漢", "😀"])
def test_a_long_text_does_not_break_the_status(character):
    def script(worker, message, payload):
        worker.send(front.Failed(message.request, "Unavailable", character * 20_000))

    async def test(launcher, worker, client, address):
        worker.script = script
        for _ in range(20):  # Between its two limits gRPC throws dice.
            with pytest.raises(Unavailable, match=f"^UNAVAILABLE: {character}{{500,2000}}$"):
                await client.infer(X)

    predict(test)


def test_a_long_name_is_not_told_as_a_whole():
    """Its repr, four times as long, took seconds of the event loop."""
    name = "\0" * 1_000_000

    async def test(launcher, worker, client, address):
        for servable, method, instance in [(name, "predict", X), ("echo", name, X), ("echo", "predict", {name: 1})]:
            async with AsyncClient(address, servable, method, raise_errors=True) as other:
                with pytest.raises(
                    (NotFound, InvalidInput), match=r"x00… \(999800 more characters left out\)'"
                ) as raised:
                    await other.infer(instance)
                assert len(str(raised.value)) < 1500

    predict(test)


def test_outputs_that_no_message_holds():
    size = 2**31
    result = {"y": TensorMeta("uint8", (size,), size)}, [np.zeros(size, np.uint8)]
    with pytest.raises(MessageTooLarge, match=r"^the outputs have [0-9]+ bytes and more; a gRPC message has at most"):
        _reply(pb.ServableSpec(), [result])


def test_a_bug_in_main_is_an_internal_error_without_a_traceback():
    def script(worker, message, payload):
        outputs = {"y": TensorMeta("float99", (0,), 0)}
        worker.send(front.Reply(message.request, [front.InstanceOutputs(outputs)]))

    async def test(launcher, worker, client, address):
        worker.script = script
        with pytest.raises(InternalError, match="INTERNAL: a bug in the server; its log has the traceback"):
            await client.infer(X)
        worker.script = echo
        assert len(await client.infer(X)) == 1

    predict(test)
