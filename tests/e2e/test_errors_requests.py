"""What is wrong with a request, over gRPC and REST: its error says what, and the next good request is answered."""

import base64
import json

import grpc
import httpx
import numpy as np
import pytest
import torch
from driver import DONE, Driver
from ports import free_ports
from serving import Processes
from torch.export import Dim

from shardserve import errors
from shardserve.client import Client
from shardserve.export import export
from shardserve.wire.stubs import ms_service_pb2 as pb
from shardserve.wire.stubs.ms_service_pb2_grpc import MSServiceStub
from shardserve.worker.rank_table import make_rank_table

LIMIT_MB = 1
SERVABLE = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=2)


@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)


def mode(instances):
    return int(instances[0][0][0])


def alone(x):
    if x[0] == 13:
        raise ValueError("out of cheese")
    return (x, x) if x[0] == 14 else x


def returns(instances):
    return [x for (x,) in instances] if mode(instances) != 13 else [1, 2, 3]


def yields(instances):
    if mode(instances) == 13:
        return
    for (x,) in instances:
        yield x
        if mode(instances) == 14:
            yield x


@register.register_method(output_names=["y"])
def one_by_one(x):
    return register.add_stage(alone, x, outputs_count=1)


@register.register_method(output_names=["y"])
def in_a_list(x):
    return register.add_stage(returns, x, outputs_count=1, batch_size=4)


@register.register_method(output_names=["y"])
def generated(x):
    return register.add_stage(yields, x, outputs_count=1, batch_size=0)
"""


def write_model(out):
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
    for layer in (model[1], model[2]):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    shapes = {"input": {0: Dim("batch", min=1, max=8)}}
    options = {"dynamic_shapes": shapes, "input_names": ["x"], "output_names": ["y"], "pipeline_parallel": 2}
    export(model, (torch.ones(2, 4),), name="net", out=out, **options)


class Served:
    def __init__(self, grpc_address, rest_address):
        self.grpc, self.rest = grpc_address, f"http://{rest_address}"

    def infer(self, instances, name="net", method="predict", version=0):
        with Client(self.grpc, name, method, version, raise_errors=True) as client:
            return client.infer(instances, timeout=60)

    def post(self, instances, name="net", method="predict", version=None):
        """instances: as Python has them, or the whole body as bytes."""
        where = f"{name}/version/{version}" if version is not None else name
        body = instances if isinstance(instances, bytes) else json.dumps({"instances": instances}).encode()
        return httpx.post(f"{self.rest}/model/{where}:{method}", content=body, timeout=60)

    def check(self):
        """The next good requests, on both ways in."""
        [answer] = self.infer({"x": np.arange(4, dtype=np.float32)})
        assert answer["y"].tolist() == [2, 3, 4, 5]
        reply = self.post([{"x": [0, 1, 2, 3]}])
        assert (reply.status_code, reply.json()) == (200, {"instances": [{"y": [2, 3, 4, 5]}]})
        for method in ("one_by_one", "in_a_list", "generated"):
            [answer] = self.infer({"x": np.ones(4, np.float32)}, method=method)
            assert answer["y"].tolist() == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "model")
    (folder / "net").mkdir()
    (folder / "net" / "servable_config.py").write_text(SERVABLE)
    (folder / "ranks.json").write_text(json.dumps(make_rank_table([("127.0.0.1", range(2))])))
    ports = free_ports(5)
    grpc_address, rest_address, distributed = (f"127.0.0.1:{port}" for port in ports[:3])
    with Processes() as processes:
        server, agents = (Driver(processes, folder, name, folder) for name in ("server", "agents"))
        for call, address in (("start_grpc_server", grpc_address), ("start_restful_server", rest_address)):
            assert server.ask(call, address=address, max_msg_mb_size=LIMIT_MB) == DONE
        where = {"servable_directory": ".", "servable_name": "net", "rank_table_json_file": "ranks.json"}
        server.begin("start_servable", **where, distributed_address=distributed)
        files = [f"model/device{rank}/net.graph.json" for rank in range(2)]
        agents.begin("startup_agents", distributed_address=distributed, model_files=files, agent_start_port=ports[3])
        assert [driver.answer() for driver in (agents, server)] == [DONE, DONE]
        served = Served(grpc_address, rest_address)
        served.check()
        yield served
        assert [driver.end() for driver in (server, agents)] == [0, 0]
        processes.wait_all_ended(20)


X = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("where", "kind", "status", "said"),
    [
        ({"name": "nett"}, errors.NotFound, 404, "no servable 'nett' here; there are: 'net' version 1"),
        (
            {"method": "predikt"},
            errors.NotFound,
            404,
            "servable 'net' version 1 has no method 'predikt'; it has: generated, in_a_list, one_by_one, predict",
        ),
        ({"version": 7}, errors.NotFound, 404, "servable 'net' has no version 7; it has: 1"),
    ],
    ids=["name", "method", "version"],
)
def test_wrong_names(served, where, kind, status, said):
    with pytest.raises(kind, match=said):
        served.infer({"x": X}, **where)
    reply = served.post([{"x": X.tolist()}], **where)
    assert (reply.status_code, reply.json()) == (status, {"error_msg": said})
    served.check()


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ({}, "instance 0: missing 'x'; method 'predict' takes the inputs 'x'"),
        ({"z": X}, "instance 0: missing 'x' and unknown 'z'; method 'predict' takes the inputs 'x'"),
        ({"x": X, "z": X}, "instance 0: unknown 'z'; method 'predict' takes the inputs 'x'"),
    ],
    ids=["none", "another", "one more"],
)
def test_missing_and_unknown_inputs(served, instance, said):
    with pytest.raises(errors.InvalidInput, match=f"^{said}"):
        served.infer(instance)
    reply = served.post([{name: value.tolist() for name, value in instance.items()}])
    assert reply.status_code == 400
    assert said in reply.text
    served.check()


@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "bool", "float16", "uint8"])
def test_wrong_dtype(served, dtype):
    """int32 is as long as float32: the bytes would fit."""
    said = f"instance 0: input 'x' must have dtype float32, got {dtype}"
    with pytest.raises(errors.InvalidInput, match=f"^{said}$"):
        served.infer({"x": np.ones(4, dtype)})
    data = base64.b64encode(np.ones(4, dtype).tobytes()).decode()
    reply = served.post([{"x": {"b64": data, "type": dtype, "shape": [4]}}])
    assert reply.status_code == 400
    assert said in reply.text
    served.check()


def test_a_string_where_a_number_belongs(served):
    with pytest.raises(errors.InvalidInput, match="instance 0: input 'x' must have dtype float32, got str"):
        served.infer({"x": "four"})
    reply = served.post([{"x": "four"}])
    assert reply.status_code == 400
    assert "instances[0].x: a string where float32 is expected" in reply.text
    served.check()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5,), "input 'x' must have size 4 at axis 0, got 5"),
        ((3,), "input 'x' must have size 4 at axis 0, got 3"),
        ((0,), "input 'x' must have size 4 at axis 0, got 0"),
        # As many bytes as the right shape has.
        ((2, 2), "input 'x' must have shape [4], got [2, 2]"),
        ((4, 1), "input 'x' must have shape [4], got [4, 1]"),
        ((1, 4), "input 'x' must have shape [4], got [1, 4]"),
    ],
)
def test_wrong_shape(served, shape, said):
    with pytest.raises(errors.InvalidInput) as caught:
        served.infer({"x": np.ones(shape, np.float32)})
    assert str(caught.value) == f"instance 0: {said}"
    reply = served.post([{"x": np.ones(shape).tolist()}])
    assert reply.status_code == 400
    assert said in reply.text
    served.check()


def test_no_instances(served):
    said = "a request has at least one instance, got none"
    with pytest.raises(errors.InvalidInput, match=said):
        served.infer([])
    reply = served.post([])
    assert (reply.status_code, reply.json()) == (400, {"error_msg": said})
    served.check()


def test_bad_instances_among_good_ones(served):
    with Client(served.grpc, "net", "predict") as client:
        good, bad, last = client.infer([{"x": X}, {"x": X[:3]}, {"x": X}], timeout=60)
    assert bad == {"error": "instance 1: input 'x' must have size 4 at axis 0, got 3"}
    assert good["y"].tolist() == last["y"].tolist() == [3, 3, 3, 3]
    reply = served.post([{"x": [1, 1, 1, 1]}, {"x": [[1]]}])
    assert reply.status_code == 200
    assert reply.json()["instances"][0] == {"y": [3, 3, 3, 3]}
    assert "must have shape [4], got [1, 1]" in reply.json()["instances"][1]["error_msg"]
    served.check()


def test_a_message_over_the_limit(served):
    with pytest.raises(errors.MessageTooLarge, match=r"^RESOURCE_EXHAUSTED: .*larger than max"):
        served.infer({"x": np.ones(LIMIT_MB << 18, np.float32)})
    reply = served.post(b'{"instances": [{"x": [' + b"1," * (LIMIT_MB << 19) + b"1]}]}")
    said = f"the body is larger than {LIMIT_MB << 20} bytes, this server's max_msg_mb_size"
    assert (reply.status_code, reply.json()) == (413, {"error_msg": said})
    served.check()


def test_a_client_prints_nothing(served, capfd):
    with Client(served.grpc, "net", "predict") as client:
        client.infer([{"x": X}, {"x": X[:3]}])
        client.infer({"z": 1})
    with Client(served.grpc, "nett", "predict") as client:
        client.infer_async({"x": X}).result()
    with Client("127.0.0.1:1", "net", "predict") as client:
        client.infer({"x": X}, timeout=5)
    assert capfd.readouterr() == ("", "")


# What only JSON can have.


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body isn't JSON: "),
        (b"{", "the body isn't JSON: "),
        (b'{"instances": [{"x": [1, 2, 3, 4]}]', "the body isn't JSON: "),
        (b"{'instances': []}", "the body isn't JSON: "),
        (b'{"instances": [{"x": [NaN, 1, 1, 1]}]}', "the body isn't JSON: "),
        (b"\xff\xfe", "the body isn't JSON: "),
        (b"[]", 'the body isn\'t an object with "instances"'),
        (b'{"inputs": []}', 'the body isn\'t an object with "instances"'),
        (b'{"instances": 3}', "instances is neither an object nor an array of objects"),
        (b'{"instances": [3]}', "instances[0] isn't an object"),
        (b'{"instances": [{"x": [[1, 2], [3]]}]}', "instances[0].x[1]: a ragged array: 1 elements, where its first"),
        (b'{"instances": [{"x": [[1, 2], 3, 4]}]}', "instances[0].x[1]: a ragged array: no array, where its first"),
        (
            b'{"instances": [{"x": [1, "a", 3, 4]}]}',
            "instances[0].x[1]: neither number, bool nor string like the others",
        ),
        (b'{"instances": [{"x": [1, null, 3, 4]}]}', "instances[0].x[1]: neither number"),
        (b'{"instances": [{"x": [true, true, true, true]}]}', "a bool where float32 is expected"),
        (b'{"instances": [{"x": {"b64": "####", "type": "fp32"}}]}', "instances[0].x.b64: not base64: "),
        (b'{"instances": [{"x": {"b64": "AAA", "type": "fp32"}}]}', "instances[0].x.b64: not base64: "),
        (
            b'{"instances": [{"x": {"b64": "AAAA", "type": "fp32"}}]}',
            "instances[0].x.b64: 3 bytes are no whole number of",
        ),
        (
            b'{"instances": [{"x": {"b64": "AAAAAA==", "type": "fp33"}}]}',
            "instances[0].x.type: unknown type 'fp33'; known",
        ),
        (b'{"instances": [{"x": {"b64": "AAAAAA==", "type": "fp32", "shape": [4]}}]}', "instances[0].x"),
        (
            b'{"instances": [{"x": {"b64": "AAAAAA==", "type": "fp32", "shape": "4"}}]}',
            "instances[0].x.shape: not an array",
        ),
        (b'{"instances": [{"x": {"data": "AAAAAA=="}}]}', "instances[0].x: an object isn't {"),
    ],
)
def test_broken_json_ragged_arrays_bad_base64_and_unknown_types(served, body, said):
    reply = served.post(body)
    assert reply.status_code == 400
    assert said in json.dumps(reply.json(), ensure_ascii=False).replace('\\"', '"')
    served.check()


# What only the protocol can have.


def tensor(**changes):
    fields = {"shape": pb.TensorShape(dims=[4]), "dtype": pb.MS_FLOAT32, "data": X.tobytes()}
    return pb.Tensor(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": 0}, "instance 0, input 'x': unknown dtype number 0"),
        ({"dtype": 99}, "instance 0, input 'x': unknown dtype number 99"),
        ({"data": X.tobytes()[:-1]}, "instance 0, input 'x': float32 of shape [4] is 16 bytes, got 15"),
        ({"data": b""}, "instance 0, input 'x': float32 of shape [4] is 16 bytes, got 0"),
        ({"shape": pb.TensorShape(dims=[-4])}, "instance 0, input 'x': shape [-4] has a negative dim"),
        ({"shape": pb.TensorShape(dims=[5])}, "instance 0, input 'x': float32 of shape [5] is 20 bytes, got 16"),
        ({"shape": pb.TensorShape(dims=[2**40, 2**40])}, "instance 0, input 'x': shape [1099511627776, "),
        ({"dtype": pb.MS_INT32}, "instance 0: input 'x' must have dtype float32, got int32"),
        ({"shape": pb.TensorShape(dims=[2, 2])}, "instance 0: input 'x' must have shape [4], got [2, 2]"),
    ],
)
def test_tensors_that_are_none(served, changes, said):
    spec = pb.ServableSpec(name="net", method_name="predict")
    request = pb.PredictRequest(servable_spec=spec, instances=[pb.Instance(items={"x": tensor(**changes)})])
    with grpc.insecure_channel(served.grpc) as channel:
        reply = MSServiceStub(channel).Predict(request, timeout=60)
    [entry] = reply.error_msg
    assert entry.error_code == 2
    assert entry.error_msg.decode().startswith(said)
    served.check()


# Method stages.


def of_a_stage(method, name, text):
    return f"method '{method}', stage '{name}': {text}"


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        ("one_by_one", 13, of_a_stage("one_by_one", "alone", "ValueError: out of cheese")),
        ("one_by_one", 14, of_a_stage("one_by_one", "alone", "gave 2 outputs for an instance; outputs_count=1")),
        ("in_a_list", 13, of_a_stage("in_a_list", "returns", "gave more than 1 results for 1 instances; ")),
        ("generated", 13, of_a_stage("generated", "yields", "gave 0 results for 1 instances; ")),
        ("generated", 14, of_a_stage("generated", "yields", "gave more than 1 results for 1 instances; ")),
    ],
    ids=["raises", "wrong outputs", "wrong count", "yields too few", "yields too many"],
)
def test_stages_that_fail(served, method, value, said):
    bad = np.full(4, value, np.float32)
    with Client(served.grpc, "net", method) as client:
        good, error, last = client.infer([{"x": X}, {"x": bad}, {"x": X}], timeout=60)
    assert error["error"].startswith(said)
    assert good["y"].tolist() == last["y"].tolist() == X.tolist()
    reply = served.post([{"x": [1, 1, 1, 1]}, {"x": bad.tolist()}], method=method)
    assert reply.status_code == 200
    assert reply.json()["instances"][0] == {"y": [1, 1, 1, 1]}
    assert reply.json()["instances"][1]["error_msg"].startswith(said)
    # All of the instances: the REST status says it, too.
    assert served.post([{"x": bad.tolist()}], method=method).status_code == 500
    served.check()
