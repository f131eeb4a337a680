"""Outputs first and outputs last are permutations of each other, of arrays and of axes."""

import numpy as np
import pytest

from agc.layouts import out_first, out_first_axes, out_last, out_last_axes

# out-first and out-last shapes of a dense layer and of 1-D, 2-D and 3-D convolutions
SHAPES = [
    ((64, 3), (3, 64)),
    ((64, 3, 5), (5, 3, 64)),
    ((64, 3, 5, 7), (5, 7, 3, 64)),
    ((64, 3, 5, 7, 9), (5, 7, 9, 3, 64)),
]


@pytest.mark.parametrize(("first", "last"), SHAPES, ids=["OI", "OIW", "OIHW", "OIDHW"])
def test_a_weight_in_both_layouts(first, last):
    array = np.arange(np.prod(first)).reshape(first)
    assert out_last(array).shape == last
    assert out_last(array)[..., 2, 11].ravel().tolist() == array[11, 2].ravel().tolist()
    assert np.shares_memory(out_last(array), array)
    assert np.array_equal(out_first(out_last(array)), array)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_and_scalars_are_the_same_in_both(shape):
    array = np.ones(shape)
    assert out_first(array).shape == out_last(array).shape == shape


@pytest.mark.parametrize("rank", range(6))
def test_axes_undo_each_other(rank):
    assert [out_first_axes(rank)[axis] for axis in out_last_axes(rank)] == list(range(rank))
