"""The conformance backend: that it reports what it cannot do, and passes errors on."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from agc import AGC, Units
from agc.errors import NonFiniteError
from agc.reference import RowSparse, adaptive_clip, clip_units
from agc_conformance.backend import (
    Layer,
    Optimizer,
    Problem,
    TrainingTask,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.tensorflow.backend import TensorFlowBackend
from agc_conformance.training.ask import result_ids, run_task
from agc_tensorflow import plan


@pytest.fixture
def backend():
    return TensorFlowBackend(device="cpu")


def problem(rule: AGC, gradient: object = None) -> Problem:
    random = np.random.RandomState(0)
    weight = random.randn(4, 3).astype(np.float32)
    if gradient is None:
        gradient = random.randn(4, 3).astype(np.float32)
    return Problem(rule, {"w": weight}, {"w": gradient}, {"w": Units("v d -> v")})


@pytest.mark.parametrize(
    "name", ["clip", "scenario_compiled", "scenario_optimizer", "accumulate", "unscale"]
)
def test_every_way_to_the_same_gradient(backend, name):
    one = problem(AGC())
    if name == "unscale":
        outcome = backend.scenario_unscale(problem(AGC(), 8 * one.gradients["w"]), 8.0)
    elif name == "accumulate":
        micro = [{"w": share * one.gradients["w"]} for share in (0.5, 1.5)]
        outcome = backend.scenario_accumulate(one, micro)
    else:
        outcome = getattr(backend, name)(one)
    want = clip_units(one.gradients["w"], one.parameters["w"], one.units["w"])
    np.testing.assert_allclose(outcome.gradients["w"], want.gradient, rtol=5e-7)
    assert outcome.stats["w"].clipped == want.clipped.sum()


@pytest.mark.parametrize("name", ["clip", "scenario_compiled"])
def test_errors_come_through(backend, name):
    poisoned = problem(AGC(nonfinite="raise"), np.full((4, 3), np.inf, np.float32))
    with pytest.raises(NonFiniteError, match=r"parameters(.|\n)*w"):
        getattr(backend, name)(poisoned)


@pytest.mark.parametrize("name", ["clip", "scenario_optimizer"])
def test_sparse_gradients_come_back_sparse(backend, name):
    rows = RowSparse(np.array([3, 1, 3]), np.ones((3, 3), np.float32), (4, 3))
    one = problem(AGC(), rows)
    outcome = getattr(backend, name)(one)
    found = outcome.gradients["w"]
    assert isinstance(found, RowSparse)
    assert sorted(found.indices.tolist()) == [1, 3]


def test_what_it_cannot_do(backend):
    with pytest.raises(Unsupported, match="MirroredStrategy"):
        backend.scenario_sharded(problem(AGC()), 2)
    with pytest.raises(Unsupported, match="refuses a step in which no variable has a gradient"):
        backend.scenario_idle(problem(AGC()))
    for kind, reason in {"bilinear": "no bilinear", "rope": "no layer 'rope'"}.items():
        with pytest.raises(Unsupported, match=reason):
            backend.layer_plan(Layer(kind, {}), AGC())
    with pytest.raises(Unavailable, match="tpu"):
        TensorFlowBackend(device="tpu")


def test_without_a_gpu(backend, monkeypatch):
    found = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: [] if kind == "GPU" else found(kind)
    )
    with pytest.raises(Unavailable, match="sees no cuda device"):
        TensorFlowBackend(device="cuda")
    assert backend.versions()["tensorflow"] == tf.__version__
    assert backend.device_name() == "cpu"


@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_trajectory(backend, decoupled):
    """Momentum and both kinds of weight decay mean what the suite says they do."""
    one = problem(AGC())
    settings = Optimizer(0.1, momentum=0.5, weight_decay=0.2, decoupled=decoupled)
    steps = backend.trajectory(one, settings, [one.gradients] * 3)
    weight = one.parameters["w"].astype(np.float64)
    momentum = np.zeros_like(weight)
    for step in steps:
        clipped = clip_units(one.gradients["w"], weight, one.units["w"]).gradient
        decay = 0.2 * weight
        momentum = 0.5 * momentum + clipped + (0 if decoupled else decay)
        weight = weight - 0.1 * momentum - (0.1 * decay if decoupled else 0)
        np.testing.assert_allclose(step["w"], weight, rtol=1e-5, atol=1e-6)


def test_training_with_sam(backend):
    records = run_task(backend, "sam-digits", steps=4)
    found = {r["id"]: r["status"] for r in records if r["type"] == "result"}
    assert found == dict.fromkeys(result_ids("sam-digits"), "passed")


def test_training_reports_every_step(backend):
    random = np.random.RandomState(0)
    shapes = {
        "conv1.weight": (4, 1, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (5, 4, 3, 3),
        "conv2.bias": (5,),
        "head.weight": (3, 5),
        "head.bias": (3,),
    }
    weights = {name: 0.3 * random.randn(*s).astype(np.float32) for name, s in shapes.items()}
    batches = [(random.randn(2, 1, 8, 8).astype(np.float32), np.array([0, 2])) for _ in range(2)]
    rule = AGC(clipping=0.01, exclude=["head.*"])
    steps = list(backend.train(TrainingTask(rule, Optimizer(0.5, momentum=0.9), weights, batches)))
    assert len(steps) == 2
    for name, weight in weights.items():
        assert (steps[0].before[name] == weight).all()
        assert (steps[1].before[name] == steps[0].after[name]).all()
    for step in steps:
        counts = {name: count for name, (count, _, _) in step.plan.decisions().items()}
        assert counts == dict(zip(shapes, (4, 1, 5, 1, 3, 1), strict=True))
        # Out-last units become out-first ones with the arrays.
        units = {name: Units("o ... -> o" if len(s) > 1 else "o ->") for name, s in shapes.items()}
        for name in shapes:
            clipped = step.clipped[name]
            if name.startswith("head"):
                assert (clipped == step.gradients[name]).all()
            else:
                want = clip_units(step.gradients[name], step.before[name], units[name])
                np.testing.assert_allclose(clipped, want.gradient, rtol=5e-7)
    first = steps[0]
    np.testing.assert_allclose(
        first.after["conv1.bias"],
        first.before["conv1.bias"] - 0.5 * first.clipped["conv1.bias"],
        rtol=1e-6,
    )


def test_reference_agrees_on_several_parameters(backend):
    random = np.random.RandomState(0)
    shapes = {"a": (3, 3, 2, 4), "b": (4,), "c": (5, 2)}
    weights = {name: random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = {name: random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    units = {"a": Units("h w i o -> o"), "b": Units("o ->"), "c": Units("i o -> o")}
    one = Problem(AGC(exclude=["c"]), weights, gradients, units)
    outcome = backend.clip(one)
    rule = one.declared_rule
    made = plan({name: tf.Variable(value) for name, value in weights.items()}, rule)
    want = adaptive_clip(weights, gradients, made, rule)
    for name in shapes:
        np.testing.assert_allclose(outcome.gradients[name], want.gradients[name], rtol=5e-7)
    assert set(outcome.stats) == {"a", "b"}
