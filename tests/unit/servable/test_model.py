import pytest

from shardserve.errors import ConfigError
from shardserve.servable import Model, PadRule
from shardserve.servable.model import pad_rules


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank_size": 0}, "rank_size=0 is not an integer of at least 1"),
        ({"rank_size": "4"}, "rank_size='4' is not an integer"),
        ({"rank_size": True}, "rank_size=True is not an integer"),
        ({"stage_size": 2.0}, "stage_size=2.0 is not an integer"),
        ({"stage_size": -1}, "stage_size=-1 is not an integer of at least 1"),
        ({"stage_size": 3}, "rank_size=4 is not a multiple of stage_size=3"),
        ({"with_batch_dim": 1}, "with_batch_dim=1 is not a bool"),
        ({"enable_pipeline_infer": None}, "enable_pipeline_infer=None is not a bool"),
        ({"without_batch_dim_inputs": (-1,)}, r"without_batch_dim_inputs=\(-1,\): not positions"),
        ({"without_batch_dim_inputs": ("x",)}, r"without_batch_dim_inputs=\('x',\): not positions"),
        ({"without_batch_dim_inputs": (True,)}, r"without_batch_dim_inputs=\(True,\): not positions"),
        (
            {"without_batch_dim_inputs": (0,), "with_batch_dim": False},
            "without_batch_dim_inputs needs with_batch_dim=True",
        ),
        ({"max_batch_size": 0}, "max_batch_size=0 is not an integer of at least 1"),
        ({"max_batch_size": "8"}, "max_batch_size='8' is not an integer"),
        ({"max_batch_size": True}, "max_batch_size=True is not an integer"),
        ({"max_batch_size": 8, "with_batch_dim": False}, "max_batch_size needs with_batch_dim=True"),
        ({"max_batch_delay_ms": -1}, "max_batch_delay_ms=-1 is not a number of milliseconds of at least 0"),
        ({"max_batch_delay_ms": "5"}, "max_batch_delay_ms='5' is not a number"),
        ({"max_batch_delay_ms": float("nan")}, "max_batch_delay_ms=nan is not a number"),
        ({"max_batch_delay_ms": 5, "with_batch_dim": False}, "max_batch_delay_ms is for a model with_batch_dim=True"),
        ({"max_batch_delay_ms": 5, "stateful": True}, "max_batch_delay_ms is for a model .* that isn't stateful"),
        ({"pad": {"ids": PadRule(0, 0)}, "with_batch_dim": False}, "pad is for a model with_batch_dim=True"),
    ],
)
def test_wrong_declaration(options, text):
    with pytest.raises(ConfigError, match=rf"^declare_servable: {text}"):
        Model(**{"rank_size": 4, "stage_size": 2, **options})


def test_pad_rules():
    assert pad_rules(None, "x") == {}
    assert pad_rules({"a": (0, 1), "b": [1, 0.5, 8]}, "x") == {"a": PadRule(0, 1, 1), "b": PadRule(1, 0.5, 8)}


@pytest.mark.parametrize(
    ("pad", "text"),
    [
        ([("ids", 0)], r"pad=\[\('ids', 0\)\] is not a dict of input: \(dim, value\[, multiple\]\)"),
        ({"ids": 0}, r"pad=\{'ids': 0\}: expected input: \(dim, value\[, multiple\]\)"),
        ({"ids": (0,)}, r"pad=\{'ids': \(0,\)\}: expected"),
        ({0: (0, 0)}, r"pad=\{0: \(0, 0\)\}: expected"),
        ({"ids": (-1, 0)}, r"pad=\{'ids': …\}: -1 is not a dim of an instance, from 0"),
        ({"ids": (0, "0")}, r"pad=\{'ids': …\}: '0' is neither a number nor a bool"),
        ({"ids": (0, 0, 0)}, r"pad=\{'ids': …\}: 0 is not a multiple of at least 1"),
    ],
)
def test_wrong_pad(pad, text):
    with pytest.raises(ConfigError, match=f"^declare_servable: {text}"):
        pad_rules(pad, "declare_servable")


def test_call_works_inside_a_stage_only():
    with pytest.raises(ConfigError, match=r"^Model.call: works inside a Python stage only"):
        Model(rank_size=1, stage_size=1).call(1)


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((), {}, "is given no inputs"),
        ((1,), {"subgraph": -1}, "subgraph=-1 is not an integer of at least 0"),
        ((1,), {"subgraph": "0"}, "subgraph='0' is not an integer"),
        (([1],), {}, "instance 0 is a int; each is a tuple of that instance's inputs"),
    ],
)
def test_wrong_call(args, options, text):
    with pytest.raises(ConfigError, match=f"^Model.call: {text}"):
        Model(rank_size=1, stage_size=1).call(*args, **options)


def test_call_of_an_instance_and_of_instances(monkeypatch):
    model = Model(rank_size=1, stage_size=1)

    def caller(called, subgraph, instances):
        """As many outputs as an instance has inputs, each with the subgraph added."""
        assert called is model
        return [tuple(value + subgraph for value in instance) for instance in instances]

    monkeypatch.setattr("shardserve.servable.model._caller", caller)
    assert model.call(5) == 5
    assert model.call(5, 6, subgraph=2) == (7, 8)
    assert model.call([(5, 6), [7]], subgraph=3) == [(8, 9), (10,)]
    assert model.call([]) == []
