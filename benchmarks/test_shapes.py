"""Each set of shapes is that of the model it is named after."""

from __future__ import annotations

import pytest

from benchmarks.shapes import MODELS, out_last, parameters


@pytest.mark.parametrize(
    ("model", "tensors", "count"), [("nfnet-f0", 233, 71_489_284), ("gpt2-small", 148, 124_439_808)]
)
def test_tensors_and_parameters(model: str, tensors: int, count: int) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == tensors
    assert parameters(shapes) == count
    assert parameters({name: out_last(name, shape) for name, shape in shapes.items()}) == count


def test_the_kinds_of_tensors_in_nfnet_f0() -> None:
    shapes = MODELS["nfnet-f0"]()
    kinds = {
        "convolutions": {n: s for n, s in shapes.items() if len(s) == 4},
        "squeeze-excite": {n: s for n, s in shapes.items() if len(s) == 2 and n != "head.weight"},
        "gains": {n: s for n, s in shapes.items() if n.endswith(".gain")},
        "skip gains": {n: s for n, s in shapes.items() if s == ()},
    }
    assert {kind: (len(shapes), parameters(shapes)) for kind, shapes in kinds.items()} == {
        "convolutions": (57, 46_480_304),
        "squeeze-excite": (24, 21_823_488),
        "gains": (57, 44_912),
        "skip gains": (12, 12),
    }
