"""Checks that the core and the adapters share: what passes, and how each failure reads."""

from types import SimpleNamespace

import numpy as np
import pytest

from agc import AGC, SAM, Units
from agc.checks import (
    check_batch,
    check_batch_given,
    check_count,
    check_distinct,
    check_inexact,
    check_microbatches,
    check_rule,
    check_shapes,
    check_step,
    rows_are_not_units,
    short_repr,
)
from agc.errors import ConfigError, DTypeError, ParameterError, ShapeError
from agc.verification import Verification


def test_counts_and_steps_are_integers():
    assert (check_count("batch", np.int64(2)), check_step(0)) == (2, 0)
    for value in (0, True, 1.0, "1"):
        with pytest.raises(ConfigError, match="batch must be an integer >= 1, got"):
            check_count("batch", value)
    with pytest.raises(ConfigError, match="step must be an integer >= 0, got -1"):
        check_step(-1)


def test_a_rule_is_of_its_class():
    check_rule(AGC(), AGC)
    with pytest.raises(ConfigError, match=r"rule must be an agc.SAM, got AGC\("):
        check_rule(AGC(), SAM)
    with pytest.raises(ConfigError, match=r"got 0\.01; for example AGC\(clipping=0\.01\)$"):
        check_rule(0.01, AGC)


def test_a_message_has_one_short_line_of_a_value():
    assert short_repr({"steps": "2"}) == "{'steps': '2'}"
    model = SimpleNamespace(layers="\n".join(["layer"] * 500))
    said = short_repr({"a": [model] * 500, "b": "c" * 500})
    assert "\n" not in said
    assert len(said) < 400


def test_names_are_distinct():
    check_distinct(["a", "b"])
    with pytest.raises(ParameterError, match="two parameters are called 'a'"):
        check_distinct(["a", "b", "a"])


@pytest.mark.parametrize("wrong", ["weight", "gradient", "plan"])
def test_shapes_agree(wrong):
    shapes = dict.fromkeys(("weight", "gradient", "plan"), (2, 3))
    check_shapes("w", **shapes)
    with pytest.raises(ShapeError, match=r"parameter 'w' has shape .*, its gradient .*, and the"):
        check_shapes("w", **shapes | {wrong: (3, 2)})


def test_dtypes_are_inexact():
    check_inexact("the weight", "float32", inexact=True)
    with pytest.raises(DTypeError, match="the weight has dtype int8; AGC needs floating point or"):
        check_inexact("the weight", "int8", inexact=False)


def test_rows_that_are_no_units():
    error = rows_are_not_units("the gradient", (4, 3), Units("d v -> v"), "give the model, ")
    assert str(error) == (
        "the gradient of shape (4, 3) is row-sparse, but the rows are not units of d v -> v; "
        "give the model, declare row units such as 'v d -> v', or make the gradient dense"
    )


def test_parts_of_a_batch_need_one():
    check_batch_given(1.0, 1, given=False, cure="")
    check_batch_given(0.2, 1, given=True, cure="")
    for fraction, microbatches in ((0.2, 1), (1.0, 2)):
        with pytest.raises(ConfigError, match=r"take parts of the batch: give batch=\(x, y\)"):
            check_batch_given(fraction, microbatches, given=False, cure="give batch=(x, y)")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.ones(3)}, r"got dict; give batch=tuple\(batch.values\(\)\)"),
        (np.ones((3, 2)), r"got ndarray; give .* batch=\(inputs,\) of one alone"),
        ("images", "must be a sequence of tensors, got str"),
        ((np.ones(3), np.float32(1)), r"batch\[1\] has no first axis"),
        ((np.ones(3), 0.1), r"batch\[1\] has no first axis"),
    ],
)
def test_what_is_no_batch(batch, message):
    with pytest.raises(ConfigError, match=message):
        check_batch(batch)


def test_batches():
    for batch in ((np.ones(3),), [np.ones((3, 2)), ["a", "b", "c"]]):
        check_batch(batch)


def test_no_microbatch_is_empty():
    check_microbatches(4, 4)
    with pytest.raises(ConfigError, match="microbatches=5 is more than the 4 examples of a batch"):
        check_microbatches(5, 4, " of a batch")


def test_sam_is_verified_by_all_of_its_numbers():
    fields = {  # what is right, and what is wrong
        "passes": (2, 1),
        "perturbation": (0.05, 0.0),
        "cosine": (1.0, -1.0),
        "gradient_error": (1e-7, 0.1),
        "restored": (True, False),
    }
    sam = {field: right for field, (right, _) in fields.items()}
    assert Verification(**sam).ok
    for field, (_, wrong) in fields.items():
        assert not Verification(**sam | {field: wrong}).ok, field
