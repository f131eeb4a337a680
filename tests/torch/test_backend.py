"""The conformance backend: what the suite relies on, without running the suite."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from agc import AGC, Units
from agc.errors import DTypeError, MissingGradientError, NonFiniteError, ShapeError
from agc.plan import Parameter, make_plan
from agc.reference import RowSparse, adaptive_clip
from agc_conformance.backend import (
    Layer,
    Optimizer,
    Problem,
    TrainingTask,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.torch.backend import TorchBackend
from agc_conformance.training.ask import run_task
from agc_torch import SharpnessAware, adaptive_clip_grad_

BACKEND = TorchBackend()
UNITS = {"w": Units("o i -> o"), "b": Units("... ->"), "e": Units("v d -> v")}
DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "complex128": np.complex128,
}


def problem(dtype: object = np.float32, rule: AGC | None = None, step: int = 0) -> Problem:
    random = np.random.default_rng(0)
    weights = {"w": random.random((4, 3)), "b": random.random(4), "e": random.random((6, 2))}
    gradients = {
        "w": random.random((4, 3)).astype(dtype),
        "b": None,
        "e": RowSparse(np.array([4, 1, 4]), random.random((3, 2)).astype(dtype), (6, 2)),
    }
    weights = {name: value.astype(dtype) for name, value in weights.items()}
    return Problem(rule or AGC(), weights, gradients, UNITS, step)


def expected(given: Problem) -> dict[str, object]:
    parameters = [Parameter(name, value.shape) for name, value in given.parameters.items()]
    rule = given.declared_rule
    plan = make_plan(parameters, rule)
    return adaptive_clip(given.parameters, given.gradients, plan, rule, step=given.step)


def compare(outcome, given: Problem) -> None:
    wanted = expected(given)
    for name, value in wanted.gradients.items():
        got = outcome.gradients[name]
        if value is None:
            assert got is None
            continue
        if isinstance(value, RowSparse):
            assert np.array_equal(got.indices, value.indices)
            got, value = got.values, value.values
        raw = given.gradients[name]
        assert got.dtype == (raw.values if isinstance(raw, RowSparse) else raw).dtype
        wide = np.complex128 if np.iscomplexobj(value) else np.float64
        np.testing.assert_allclose(
            got.astype(wide), value, rtol=1e-2 if got.itemsize == 2 else 1e-6
        )
    for name, stats in wanted.stats.items():
        assert outcome.stats[name].clipped == stats.clipped


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(dtype):
    assert set(DTYPES) == TorchBackend.dtypes
    given = problem(DTYPES[dtype])
    compare(BACKEND.clip(given), given)


@pytest.mark.parametrize(
    ("rule", "gradient", "error"),
    [
        (AGC(nonfinite="raise"), np.full((4, 3), np.nan, np.float32), NonFiniteError),
        (AGC(), np.ones((4, 2), np.float32), ShapeError),
        (AGC(), np.ones((4, 3), np.int32), DTypeError),
        (AGC(), None, MissingGradientError),
    ],
    ids=["not finite", "shape", "dtype", "missing"],
)
def test_errors_come_through(rule, gradient, error):
    weights = {"w": np.ones((4, 3), np.float32)}
    given = Problem(rule, weights, {"w": gradient}, {"w": UNITS["w"]})
    with pytest.raises(error):
        BACKEND.clip(given)


@pytest.mark.parametrize("name", ["optimizer", "accumulate", "unscale"])
def test_scenarios(name):
    dense = problem(step=3)
    given = Problem(
        AGC(clipping=lambda step: 0.1 / (1 + step)),
        {"w": dense.parameters["w"]},
        {"w": dense.gradients["w"]},
        {"w": UNITS["w"]},
        3,
    )
    settings = {
        "accumulate": {"micro": [{"w": g * dense.gradients["w"]} for g in (0.5, 1.5)]},
        "unscale": {"scale": 1024.0},
    }
    asked = given
    if name == "unscale":
        asked = Problem(
            given.rule, given.parameters, {"w": given.gradients["w"] * 1024}, given.units, 3
        )
    ask = getattr(BACKEND, f"scenario_{name}")
    compare(ask(asked, **settings.get(name, {})), given)


@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_trajectory(decoupled):
    optimizer = Optimizer(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, decoupled=decoupled)
    rule = AGC(clipping=0.1, units={"w": "o i -> o"})
    w = np.random.default_rng(0).random((4, 3))
    gradients = [{"w": np.random.default_rng(step).random((4, 3))} for step in range(1, 4)]
    got = BACKEND.trajectory(Problem(rule, {"w": w}, {"w": None}), optimizer, gradients)
    m: object = 0.0
    for step, one in enumerate(gradients):
        plan = make_plan([Parameter("w", (4, 3))], rule)
        g = adaptive_clip({"w": w}, one, plan, rule).gradients["w"]
        u = g if decoupled else g + 0.1 * w
        m = 0.9 * m + u
        w = w - 0.1 * (u + 0.9 * m) - (0.1 * 0.1 * w if decoupled else 0.0)
        np.testing.assert_allclose(got[step]["w"], w, rtol=1e-12)


TABLE = {
    "dense": ({"i": 4, "o": 6}, 6),
    "conv3d": ({"i": 4, "o": 6, "t": 2, "h": 3, "w": 3}, 6),
    "depthwise_conv2d": ({"c": 4, "m": 2, "h": 3, "w": 3}, 8),
    "grouped_conv_transpose2d": ({"i": 4, "o": 6, "g": 2, "h": 3, "w": 3}, 6),
    "attention": ({"i": 8, "o": 8, "h": 2, "d": 4}, 32),
    "lstm": ({"i": 4, "o": 6}, 48),
    "bilinear": ({"i": 4, "j": 3, "o": 6}, 6),
    "layer_norm": ({"o": 6}, 0),
}


@pytest.mark.parametrize("kind", TABLE)
def test_layer_plan(kind):
    sizes, count = TABLE[kind]
    made = BACKEND.layer_plan(Layer(kind, sizes), AGC())
    assert sum(entry.count for entry in made if not entry.units.whole) == count


@pytest.mark.parametrize("kind", ["einsum", "stacked_dense", "perceptron"])
def test_layer_that_pytorch_has_not(kind):
    with pytest.raises(Unsupported, match="PyTorch"):
        BACKEND.layer_plan(Layer(kind, {}), AGC())


def test_train():
    random = np.random.default_rng(0)
    shapes = {"conv1": (4, 1, 3, 3), "conv2": (5, 4, 3, 3), "head": (3, 5)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = random.standard_normal(shape).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    batches = [
        (random.standard_normal((6, 1, 8, 8)).astype(np.float32), random.integers(3, size=6))
        for _ in range(3)
    ]
    rule = AGC(clipping=0.02, exclude=["head.*"])
    steps = list(BACKEND.train(TrainingTask(rule, Optimizer(0.1, momentum=0.9), weights, batches)))
    assert len(steps) == 3
    for index, step in enumerate(steps):
        wanted = adaptive_clip(step.before, step.gradients, step.plan, rule, step=index).gradients
        for name, value in wanted.items():
            np.testing.assert_allclose(step.clipped[name], value, rtol=1e-6)
        assert np.array_equal(step.clipped["head.weight"], step.gradients["head.weight"])
        assert not np.array_equal(step.clipped["conv1.weight"], step.gradients["conv1.weight"])
        before = steps[index - 1].after if index else weights
        assert all(np.array_equal(step.before[name], before[name]) for name in weights)
    assert steps[0].plan["conv2.weight"].count == 5


def statuses(records):
    return {r["id"].rpartition("-")[2]: r["status"] for r in records if r["type"] == "result"}


def test_train_with_sam():
    found = statuses(run_task(BACKEND, "sam-digits", steps=4))
    assert found == dict.fromkeys(("plan", "perturb", "descent", "clip", "update", "run"), "passed")


def restore_nearly(self):
    """Restore to one unit in the last place, as subtracting ``e`` does."""
    for weight, copy in self._backup or ():
        copy.copy_(torch.nextafter(copy, weight))
    RESTORE(self)


def clip_twice(self, reach):
    """Clip the ascent gradient as well, as a clipper inside the closure does."""
    adaptive_clip_grad_(self.model, AGC(clipping=0.05))
    return ASCENT(self, reach)


ASCENT, RESTORE = SharpnessAware._ascent, SharpnessAware._restore


@pytest.mark.parametrize(
    ("part", "mistake", "noticed"),
    [("_restore", restore_nearly, "descent"), ("_ascent", clip_twice, "perturb")],
)
def test_train_with_sam_notices(monkeypatch, part, mistake, noticed):
    monkeypatch.setattr(SharpnessAware, part, mistake)
    assert statuses(run_task(BACKEND, "sam-digits", steps=4))[noticed] == "failed"


def test_devices(monkeypatch):
    with pytest.raises(Unavailable, match="not on 'tpu'"):
        TorchBackend("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="sees no CUDA device"):
        TorchBackend("cuda")
    assert BACKEND.device_name() == "cpu"
    assert set(BACKEND.versions()) == {"torch", "numpy"}
