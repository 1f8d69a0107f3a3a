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
