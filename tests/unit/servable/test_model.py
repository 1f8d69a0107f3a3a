import pytest

from shardserve.errors import ConfigError
from shardserve.servable import Model


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
    ],
)
def test_wrong_declaration(options, text):
    with pytest.raises(ConfigError, match=rf"^declare_servable: {text}"):
        Model(**{"rank_size": 4, "stage_size": 2, **options})


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
