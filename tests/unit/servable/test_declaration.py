import sys

import pytest

from shardserve.errors import ConfigError
from shardserve.servable import Model, declare_distributed, declare_model, declaring, load_servable, register_method

GOOD = """
from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=4, stage_size=2)

@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
"""


def servable(directory, text, name="net"):
    (directory / name).mkdir()
    (directory / name / "servable_config.py").write_text(text)
    return str(directory)


def test_load(tmp_path):
    before = list(sys.path)
    loaded = load_servable(servable(tmp_path, GOOD), "net")
    assert loaded.name == "net"
    assert loaded.model == Model(rank_size=4, stage_size=2)
    assert list(loaded.methods) == ["predict"]
    assert sys.path == before
    assert "servable_config" not in sys.modules


def test_modules_beside_the_config_can_be_imported(tmp_path):
    directory = servable(
        tmp_path, "from shape_of_the_net import RANKS\n" + GOOD.replace("rank_size=4", "rank_size=RANKS")
    )
    (tmp_path / "net" / "shape_of_the_net.py").write_text("RANKS = 6\n")
    try:
        assert load_servable(directory, "net").model.rank_size == 6
    finally:
        del sys.modules["shape_of_the_net"]


def test_positions_without_batch_dim():
    def declare(positions):
        with declaring("s") as declared:
            declare_distributed(1, 1, without_batch_dim_inputs=positions)
        return declared.model.without_batch_dim_inputs

    assert [declare(p) for p in (None, 2, [0, 1], (3,))] == [(), (2,), (0, 1), (3,)]


@pytest.mark.parametrize("names", [[], "", [""], [1], ["a", None]])
def test_output_names_that_are_none(names):
    with pytest.raises(ConfigError, match=r"register_method: output_names=.* are not names"):
        register_method(names)


def test_output_name_given_twice():
    with pytest.raises(ConfigError, match=r"has a name twice"):
        register_method(["a", "b", "a"])


def test_declaration_in_another_file():
    with pytest.raises(ConfigError, match=r"declared in its servable_config.py, which the server runs"):
        declare_distributed(1, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "declares no model"),
        (GOOD.split("@")[0], "registers no method"),
        (GOOD + "distributed.declare_servable(1, 1)\n", "servable 'net': declare_servable is called a second time"),
        (GOOD + GOOD.split("stage_size=2)")[1], "method 'predict' is registered a second time"),
        (GOOD.replace("stage_size=2", "stage_size=3"), "rank_size=4 is not a multiple of stage_size=3"),
        ("import no_such_module_here\n", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("x = (\n", "SyntaxError"),
        (GOOD.replace("model, x,", "model, x + 1,"), "line 8: method 'predict': arithmetic of input 'x'"),
        ("raise ValueError('out of cheese')\n", "ValueError: out of cheese"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
def test_errors_name_the_file(tmp_path, text, said):
    before = list(sys.path)
    directory = servable(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_servable(directory, "net")
    assert str(caught.value).startswith(f"{tmp_path}/net/servable_config.py")
    assert said in str(caught.value)
    assert sys.path == before
    # Nothing of the failed one is left for the next.
    assert load_servable(servable(tmp_path, GOOD, "next"), "next").name == "next"


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=rf"servable 'net': there is no file {tmp_path}/net/servable_config.py"):
        load_servable(str(tmp_path), "net")


def test_config_that_changes_the_path(tmp_path):
    directory = servable(tmp_path, "import sys\nsys.path.pop(0)\n" + GOOD)
    before = list(sys.path)
    assert load_servable(directory, "net").name == "net"
    assert sys.path == before


def test_models_that_are_not_distributed():
    with declaring("s") as loaded:
        one = declare_model("a.graph.json", "shardserve")
        two = declare_model(["b.graph.json", "c.graph.json"], "shardserve", without_batch_dim_inputs=1)
    assert [loaded.number(one), loaded.number(two)] == [0, 1]
    assert (one.files, two.files) == (("a.graph.json",), ("b.graph.json", "c.graph.json"))
    assert (two.rank_size, two.stage_size, two.without_batch_dim_inputs) == (1, 1, (1,))
    with pytest.raises(ConfigError, match="the model of another servable"):
        loaded.number(Model(rank_size=1, stage_size=1))


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        (("a", "pt2"), {}, "model_format='pt2' is not supported; export the model with `shardserve export`"),
        (("a", None), {}, "model_format=None is not supported"),
        (([], "shardserve"), {}, r"model_file=\[\] is neither a path nor a list of paths"),
        ((["a", 3], "shardserve"), {}, "model_file=.* is neither a path nor a list of paths"),
        (("a", "shardserve"), {"with_batch_dim": 1}, "with_batch_dim=1 is not a bool"),
        (("a", "shardserve"), {"options": 1}, "options is for MindSpore's own runtime and is not supported"),
        (("a", "shardserve"), {"config_file": "c"}, "config_file is for MindSpore's own runtime"),
    ],
)
def test_wrong_model_that_is_not_distributed(args, options, said):
    with declaring("s"), pytest.raises(ConfigError, match=f"^declare_model: {said}"):
        declare_model(*args, **options)


def test_both_kinds_of_models_in_one_servable():
    with declaring("s"):
        declare_distributed(1, 1)
        with pytest.raises(ConfigError, match="declare_model and declare_servable are not for one servable"):
            declare_model("a", "shardserve")
