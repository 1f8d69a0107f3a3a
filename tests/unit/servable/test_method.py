import numpy as np
import pytest

from shardserve.errors import ConfigError
from shardserve.servable import Model, Source, add_stage, declaring, register_method

MODEL = Model(rank_size=1, stage_size=1)


async def coroutine(x):
    return x


def trace(function, *output_names):
    with declaring("s") as servable:
        register_method(output_names)(function)
    [method] = servable.methods.values()
    return method


def test_one_stage():
    def predict(ids, mask):
        return add_stage(MODEL, ids, mask, outputs_count=1)

    method = trace(predict, "y")
    assert (method.name, method.inputs, method.output_names) == ("predict", ("ids", "mask"), ("y",))
    [stage] = method.stages
    assert stage.model is MODEL
    assert stage.inputs == (Source(0, 0), Source(0, 1))
    assert (stage.outputs_count, stage.tag) == (1, "stage 1")
    assert method.outputs == (Source(1, 0),)


def test_stages_that_feed_each_other():
    def refine(x, mask):
        a, b = add_stage(MODEL, x, mask, outputs_count=2, tag="first")
        c, _ = add_stage(MODEL, b, mask, outputs_count=2)
        d, e = add_stage(MODEL, c, a, outputs_count=2)
        return e, d, a, x

    method = trace(refine, "e", "d", "a", "x")
    assert [stage.inputs for stage in method.stages] == [
        (Source(0, 0), Source(0, 1)),
        (Source(1, 1), Source(0, 1)),
        (Source(2, 0), Source(1, 0)),
    ]
    assert [stage.tag for stage in method.stages] == ["first", "stage 2", "stage 3"]
    assert method.outputs == (Source(3, 1), Source(3, 0), Source(1, 0), Source(0, 0))


def test_outputs_may_be_a_list():
    def predict(x):
        return list(add_stage(MODEL, x, outputs_count=2))

    assert trace(predict, "a", "b").outputs == (Source(1, 0), Source(1, 1))


def test_stage_outside_of_a_method():
    with pytest.raises(ConfigError, match=r"add_stage: called outside of a method"):
        add_stage(MODEL, outputs_count=1)


@pytest.mark.parametrize(
    ("stage", "options", "text"),
    [
        (len, {"outputs_count": 1, "batch_size": -1}, "batch_size=-1 is neither None nor an integer of at least 0"),
        (len, {"outputs_count": 1, "batch_size": True}, "batch_size=True is neither"),
        (coroutine, {"outputs_count": 1}, "async functions can't be stages"),
        ("matmul", {"outputs_count": 1}, "'matmul' is neither a declared model nor a function"),
        (MODEL, {"outputs_count": 1, "batch_size": 4}, "batch_size is for Python functions"),
        (MODEL, {"outputs_count": 0}, "outputs_count=0 is not an integer of at least 1"),
        (MODEL, {"outputs_count": True}, "outputs_count=True is not an integer"),
        (MODEL, {"outputs_count": "2"}, "outputs_count='2' is not an integer"),
    ],
)
def test_bad_stage(stage, options, text):
    def predict(x):
        return add_stage(stage, x, **options)

    with pytest.raises(ConfigError, match=rf"^add_stage 1 of method 'predict': .*{text}"):
        trace(predict, "y")


def test_argument_that_is_no_value_of_the_method():
    kept = []

    def one(x):
        kept.append(x)
        return add_stage(MODEL, x, outputs_count=1)

    def constant(x):
        return add_stage(MODEL, x, 3, outputs_count=1)

    def stranger(x):
        return add_stage(MODEL, kept[0], outputs_count=1)

    trace(one, "y")
    with pytest.raises(ConfigError, match=r"add_stage 1 of method 'constant': argument 1 is no input"):
        trace(constant, "y")
    with pytest.raises(ConfigError, match=r"add_stage 1 of method 'stranger': argument 0 is no input"):
        trace(stranger, "y")


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (lambda *xs: None, r"\*xs"),
        (lambda **xs: None, r"\*\*xs"),
        (lambda *, x: None, "x"),
        (lambda x=1: None, "x=1"),
        (lambda x, /: None, "x"),
    ],
)
def test_parameters_are_plain_names(function, parameter):
    with pytest.raises(ConfigError, match=rf"method '<lambda>': parameter {parameter} is not a plain name"):
        trace(function, "y")


def test_outputs_that_do_not_fit():
    def nothing(x):
        add_stage(MODEL, x, outputs_count=1)

    def two(x):
        return add_stage(MODEL, x, outputs_count=2)

    def no_stage(x):
        return x

    with pytest.raises(ConfigError, match=r"method 'nothing': output 0 is no output of a stage"):
        trace(nothing, "y")
    with pytest.raises(ConfigError, match=r"method 'two': returns 2 outputs for 1 output_names"):
        trace(two, "y")
    with pytest.raises(ConfigError, match=r"method 'no_stage': has no add_stage"):
        trace(no_stage, "y")


def test_a_method_that_raises_leaves_no_trace_behind():
    def broken(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace(broken, "y")
    with pytest.raises(ConfigError, match=r"called outside of a method"):
        add_stage(MODEL, outputs_count=1)


def branches(x):
    return add_stage(MODEL if x else coroutine, x, outputs_count=1)


def compares(x):
    return add_stage(MODEL, x, outputs_count=1) if x == 3 else x


def unpacks(x):
    a, b = add_stage(MODEL, x, outputs_count=1)
    return a, b


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (branches, "the truth of input 'x'"),
        (compares, "comparison of input 'x'"),
        (unpacks, r"iteration of output 0 \(of 1\) of stage 'stage 1'"),
        (lambda x: max(x, 1), "comparison of input 'x'"),
        (lambda x: x + 1, r"arithmetic of input 'x'"),
        (lambda x: 2 * x, r"arithmetic of input 'x'"),
        (lambda x: -x, "arithmetic of input 'x'"),
        (lambda x: x[0], r"\[\] of input 'x'"),
        (lambda x: len(x), r"len\(\) of input 'x'"),
        (lambda x: 3 in x, "'in' of input 'x'"),
        (lambda x: x in (1, 2), "comparison of input 'x'"),
        (lambda x: int(x), r"the number of input 'x'"),
        (lambda x: f"{x}", "the text of input 'x'"),
        (lambda x: x.shape, r"\.shape of input 'x'"),
        (lambda x: np.exp(x), "the array of input 'x'"),
    ],
)
def test_a_placeholder_has_no_value_to_compute_or_decide_with(function, said):
    with pytest.raises(
        ConfigError, match=rf"^method '.*': {said}: a method's function is traced once.*Python function"
    ):
        trace(function, "y")


def test_a_method_may_ask_which_placeholder_it_has():
    def predict(x, mask):
        seen = {x: "x"}
        return add_stage(MODEL, x if x is not mask and x in seen else mask, outputs_count=1)

    assert trace(predict, "y").stages[0].inputs == (Source(0, 0),)
