"""Every argument of the launch API, given what it isn't: a ConfigError that names it and the value."""

import inspect
import math
import re
from pathlib import Path

import pytest

import shardserve.client
from shardserve import server
from shardserve.errors import ConfigError
from shardserve.servable import declaring
from shardserve.server import distributed, register

pytestmark = pytest.mark.usefixtures("nothing_left")

ADDRESS = "127.0.0.1:6200"
MODEL = __file__  # A file that is there; none of these calls comes as far as reading it.


def declared(function):
    """The function as a servable_config.py calls it."""

    def call(*args, **kwargs):
        with declaring("s"):
            return function(*args, **kwargs)

    return call


def method(**options):
    """add_stage in a method; `stage` is its function."""

    @declared
    def call():
        def predict(x):
            return register.add_stage(options.pop("stage", len), x, **{"outputs_count": 1, **options})

        register.register_method("y")(predict)

    return call()


# What works, as far as arguments can tell, for each function.
GOOD = {
    "declare_servable": (declared(distributed.declare_servable), {"rank_size": 2, "stage_size": 1}),
    "start_servable": (
        distributed.start_servable,
        {"servable_directory": ".", "servable_name": "net", "rank_table_json_file": "r.json"},
    ),
    "startup_agents": (distributed.startup_agents, {"distributed_address": ADDRESS, "model_files": [MODEL]}),
    "start_servables": (server.start_servables, {}),
    "ServableStartConfig": (server.ServableStartConfig, {"servable_directory": ".", "servable_name": "net"}),
    "start_grpc_server": (server.start_grpc_server, {"address": "127.0.0.1:5500"}),
    "start_restful_server": (server.start_restful_server, {"address": "127.0.0.1:1500"}),
    "SSLConfig": (server.SSLConfig, {"certificate": "c", "private_key": "k"}),
    "declare_model": (declared(register.declare_model), {"model_file": "m", "model_format": "shardserve"}),
    "register_method": (declared(register.register_method), {}),
    "add_stage": (method, {}),
}
PATHS = ("", 3, None, b"x", ["x"], "a\0b", Path("x"))
BOOLS = (1, 0, None, "yes")
ADDRESSES = (6200, None, "", "6200", ":6200", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", ("h", 1))
COUNTS = (0, -1, "8", 2.0, True, None, math.nan)
NAMES = ("", ".", "..", "a/b", "../a", "a:b", 3, None)
CERTIFICATES = ("cert.pem", {"certificate": "c"}, shardserve.client.SSLConfig())
SECONDS = (-1, "1", None, True, math.inf, math.nan)
WRONG = {
    "declare_servable": {
        "rank_size": COUNTS,
        "stage_size": (*COUNTS, 3),
        "with_batch_dim": BOOLS,
        "without_batch_dim_inputs": ("0", 2.5, [-1], [True], ["x"], {"x": 1}, [0.0]),
        "enable_pipeline_infer": BOOLS,
        "stateful": BOOLS,
        "max_batch_size": (0, -1, "8", 2.0, True),
        "max_batch_delay_ms": (-1, "1", None, True, math.inf, math.nan),
        "pad": ("ids", ["ids"], {"ids": 0}, {"ids": (0,)}, {3: (0, 0)}, {"ids": ("x", 0)}),
    },
    "start_servable": {
        "servable_directory": PATHS,
        "servable_name": NAMES,
        "rank_table_json_file": PATHS,
        "version_number": (*COUNTS, 2**64),
        "distributed_address": ADDRESSES,
        "wait_agents_time_in_seconds": SECONDS,
        "join_secret_file": ("", 3, b"x", "a\0b"),
        "ssl_config": CERTIFICATES,
        "insecure": BOOLS,
    },
    "startup_agents": {
        "distributed_address": ADDRESSES,
        "model_files": ([], "x", None, 3, [3], [[]], [""], [["a"], []], [["a", 3]], [["a", "b"], ["c"]], {"a": "b"}),
        "group_config_files": ([], "x", 3, [3], ["b", "c"], [["b", "c"]]),
        "agent_start_port": (0, -1, 65536, "7000", 7000.0, True, None),
        "agent_ip": ("127.0.0.1", 3),
        "rank_start": (0, "0"),
        "device_type": ("tpu", "", 3, ["cpu"]),
        "join_secret_file": ("", 3, b"x"),
        "ssl_config": CERTIFICATES,
        "insecure": BOOLS,
    },
    "start_servables": {"servable_configs": ([], None, "net", ["net"], 3, {}, {"servable_name": "net"})},
    "ServableStartConfig": {
        "servable_directory": PATHS,
        "servable_name": NAMES,
        "device_ids": ([], [0, 0], "0", [-1], [True], True, 1.5, {0: 1}, ["0"]),
        "version_number": (-1, "1", 1.0, True, None, 2**64),
        "device_type": ("ascend", "", 1, ["cpu"]),
        "num_parallel_workers": (-1, "1", 1.0, True, None),
    },
    "start_grpc_server": {
        "address": (*ADDRESSES, "unix:"),
        "max_msg_mb_size": (0, 513, "x", "100", 100.0, True, None),
        "ssl_config": CERTIFICATES,
    },
    "start_restful_server": {
        "address": (*ADDRESSES, "unix:/tmp/x"),
        "max_msg_mb_size": (0, 513, "x", "100", 100.0, True, None),
        "ssl_config": CERTIFICATES,
    },
    "SSLConfig": {
        "certificate": PATHS,
        "private_key": PATHS,
        "custom_ca": ("", 3, b"x", ["x"]),
        "verify_client": BOOLS,
    },
    "declare_model": {
        "model_file": ("", 3, None, [], [""], ["a", 3], {"a": 1}),
        "model_format": ("", "MindIR", 3, None),
        "with_batch_dim": BOOLS,
        "options": (3, {}),
        "without_batch_dim_inputs": ("0", 2.5, [-1], [True], ["x"]),
        "context": (3, {}),
        "config_file": ("c", 3),
    },
    "register_method": {"output_names": ("", 3, None, [], [""], ["a", 3], ["a", "a"], {"a": 1})},
    "add_stage": {
        "stage": ("f", 3, None),
        "outputs_count": COUNTS,
        "batch_size": (-1, True, "1", 1.0),
        "tag": ("", 3, b"x"),
    },
}
SIGNATURES = {
    "declare_servable": distributed.declare_servable,
    "declare_model": register.declare_model,
    "register_method": register.register_method,
    "add_stage": register.add_stage,
}
CASES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{value!r}")
    for name, arguments in WRONG.items()
    for argument, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_a_wrong_argument_is_named_with_its_value(name, argument, value):
    call, good = GOOD[name]
    with pytest.raises(ConfigError) as caught:
        call(**{**good, argument: value})
    said = str(caught.value)
    assert re.search(rf"\b{argument}\b", said), said
    shown = value[next(iter(value))] if argument == "pad" and isinstance(value, dict) else value
    if argument not in ("options", "context", "config_file", "stage"):
        assert _shows(said, shown), said


def _shows(said, value):
    """The value as it was given, or what of it is wrong."""
    parts = value if isinstance(value, list | tuple) else ()
    shown = repr(value) in said or any(repr(part) in said for part in parts)
    # What has to agree with another list is told by the counts.
    return shown or (isinstance(value, list | tuple) and bool(re.search(r"\d", said)))


@pytest.mark.parametrize("name", WRONG)
def test_every_argument_is_among_those(name):
    takes = inspect.signature(SIGNATURES.get(name, GOOD[name][0])).parameters.values()
    arguments = {parameter.name for parameter in takes if parameter.kind is not parameter.VAR_POSITIONAL}
    assert arguments == WRONG[name].keys()


def test_every_public_function_is_among_those():
    public = {*server.__all__, *distributed.__all__, *register.__all__}
    assert public - {"stop", "distributed", "register"} == WRONG.keys()


def test_a_host_that_there_is_not_is_an_error_at_once():
    call, good = GOOD["start_servable"]
    with pytest.raises(ConfigError) as caught:
        call(**{**good, "distributed_address": "no-such-host.invalid:6200"})
    said = "distributed_address='no-such-host.invalid:6200': there is no host 'no-such-host.invalid': "
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("name", ["start_servable", "startup_agents"])
@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".local"])
def test_what_can_be_no_hosts_name_is_an_error_at_once(name, host):
    call, good = GOOD[name]
    with pytest.raises(ConfigError) as caught:
        call(**{**good, "distributed_address": f"{host}:6200"})
    assert str(caught.value).startswith(f"distributed_address='{host}:6200': there is no host '{host}': ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agent_ip": "127.0.0.1"}, "agent_ip='127.0.0.1' and rank_start=None: give both or neither"),
        ({"rank_start": 0}, "agent_ip=None and rank_start=0: give both or neither"),
        ({"agent_ip": "127.0.0.1", "rank_start": -1}, "rank_start=-1 is not an integer of at least 0"),
        ({"agent_ip": "127.0.0.1", "rank_start": True}, "rank_start=True is not an integer of at least 0"),
        ({"agent_ip": 3, "rank_start": 0}, "agent_ip=3 is not an address of this host"),
        ({"agent_ip": "192.0.2.7", "rank_start": 0}, "agent_ip='192.0.2.7' is not an address of this host"),
        ({"model_files": [MODEL] * 3, "agent_start_port": 65534}, "agent_start_port=65534 leaves no room for 3 ports"),
        ({"group_config_files": ["b", "c"]}, "group_config_files has 2 entries, model_files 1"),
        ({"model_files": ["/none/device0"]}, "model_files: there is no file /none/device0"),
        ({"model_files": [MODEL, "/none/device1"]}, "model_files: there is no file /none/device1"),
    ],
)
def test_arguments_that_do_not_agree(options, said):
    call, good = GOOD["startup_agents"]
    with pytest.raises(ConfigError) as caught:
        call(**{**good, **options})
    assert str(caught.value) == said
