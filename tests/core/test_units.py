"""Patterns of units: errors, equality and properties; the suite has what they mean."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agc import Units
from agc.errors import ShapeError, UnitsError


def test_sizes_by_keyword_and_inline_are_the_same():
    by_keyword = Units("(g i) o ... -> g o", g=2)
    assert by_keyword == Units("(g=2 i) o ... -> g o")
    assert str(by_keyword) == "(g=2 i) o ... -> g o"
    assert by_keyword != Units("(g=4 i) o ... -> g o")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("o i -> o", "row column -> row", True),
        ("a b c -> a b", "a b c -> b a", True),
        ("o  i->o", "o i -> o", True),
        ("o i -> o", "o i -> i", False),
        ("o i -> o", "o ... -> o", False),
        ("... ->", "a ->", False),
    ],
)
def test_equality_is_by_meaning(left, right, same):
    assert (Units(left) == Units(right)) is same
    assert not same or hash(Units(left)) == hash(Units(right))


def test_is_not_equal_to_its_text():
    assert Units("o i -> o") != "o i -> o"


@pytest.mark.parametrize(
    ("pattern", "place", "problem"),
    [
        ("o i", 3, "'->' is missing"),
        ("o i -> x", 7, "'x' is not an axis on the left"),
        ("o (i -> o", 2, "never closed"),
        ("o i) -> o", 3, "never opened"),
        ("o o -> o", 2, "'o' appears twice on the left"),
        ("o i -> o o", 9, "'o' appears twice on the right"),
        ("o i -> o -> i", 9, "a second '->'"),
        ("o ! -> o", 2, "unexpected character '!'"),
        ("o () -> o", 3, "empty parentheses"),
        ("((a b) c) -> a", 1, "a '(' inside another"),
        ("... ... -> ...", 4, "'...' appears twice on the left"),
        ("(... a) -> a", 1, "'...' inside parentheses"),
        ("o i -> (o)", 7, "parentheses are not allowed on the right"),
        ("o i -> o=3", 7, "sizes belong on the left"),
        ("o=0 i -> o", 0, "the size of 'o' must be positive"),
    ],
)
def test_parse_errors_point_at_the_place(pattern, place, problem):
    with pytest.raises(UnitsError) as caught:
        Units(pattern)
    message, shown, caret = str(caught.value).split("\n")
    assert problem in message
    assert shown.strip() == pattern
    assert caret.index("^") - 4 == place


def test_the_caret_stands_below_the_place_whatever_the_white_space():
    with pytest.raises(UnitsError) as caught:
        Units("o\ti\n -> x")
    assert str(caught.value).split("\n")[1:] == ["    o i  -> x", "            ^"]


@pytest.mark.parametrize(
    "shape", [(-1, 3), (3, -1), 6, "ab", None, (None, 3), (2.5, 3), (2.0, 3)], ids=repr
)
def test_what_is_not_a_shape(shape):
    Units("o i -> o").bind((2, 3))  # remembered, and equal to the last of them
    with pytest.raises(ShapeError, match="a shape is a sequence of integers >= 0, got") as caught:
        Units("o i -> o").bind(shape)
    assert str(caught.value).endswith(repr(shape))


def test_numpy_integers_are_sizes():
    units = Units("(g i) o -> g o", g=np.int64(2))
    assert str(units) == "(g=2 i) o -> g o"
    assert repr(units.bind((np.int64(6), np.int64(5))).view) == "(2, 3, 5)"


@pytest.mark.parametrize("size", [0, True])
def test_sizes_are_positive_integers(size):
    with pytest.raises(UnitsError, match="must be a positive integer"):
        Units("(g i) o -> g o", g=size)


def test_pattern_must_be_text():
    with pytest.raises(UnitsError, match="got int"):
        Units(3)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.data(),
)
def test_every_element_belongs_to_exactly_one_unit(shape, data):
    names = "abcde"[: len(shape)]
    kept = data.draw(st.sets(st.sampled_from(names)))
    units = Units(f"{' '.join(names)} -> {' '.join(sorted(kept))}")
    axes = units.bind(tuple(shape))
    size = 1
    for length in shape:
        size *= length
    assert axes.count * axes.fan_in == size
    assert axes.count == units.count(tuple(shape))
    assert sorted(axes.keep + axes.reduce) == list(range(len(axes.view)))
    assert pickle.loads(pickle.dumps(units)) == units
    assert Units(str(units)) == units
