"""The conformance backend where the suite's own run does not look, and the package's manners."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from agc import AGC, Units
from agc.errors import NonFiniteError, SelectorError
from agc.reference import RowSparse
from agc_conformance.backend import Layer, Problem, TrainingTask, Unavailable, Unsupported
from agc_conformance.backend import Optimizer as Sgd
from agc_conformance.backends.jax.backend import JaxBackend
from agc_conformance.runner import run_case
from agc_conformance.training.ask import result_ids, run_task
from agc_conformance.vectors import load_vectors

BACKEND = JaxBackend()
CASES = {
    f"{vector.id}:{dtype}": (vector, dtype)
    for vector in load_vectors()
    if vector.id.startswith(("L2", "L3"))
    and vector.id != "L3-sam-stale"  # no gradient is left behind in JAX
    for dtype in vector.data["dtypes"][:1]
}


@pytest.mark.parametrize("case", CASES)
def test_settings_of_real_training(case: str) -> None:
    """Trajectories and scenarios; the conformance run has all the rest."""
    result = run_case(BACKEND, *CASES[case])
    assert result["status"] == "passed", result["detail"]


def problem(**options: Any) -> Problem:
    arrays = {"w": np.ones((4, 3), np.float32)}
    return Problem(AGC(**options), arrays, dict(arrays), {"w": Units("i o -> o")})


def test_absent_devices() -> None:
    with pytest.raises(Unavailable, match="sees no tpu device"):
        JaxBackend("tpu")


def test_what_jax_does_not_have() -> None:
    sparse = RowSparse(np.array([0]), np.ones((1, 3), np.float32), (4, 3))
    whole = problem()
    with pytest.raises(Unsupported, match="no row-sparse gradients"):
        BACKEND.clip(Problem(whole.rule, whole.parameters, {"w": sparse}, whole.units))
    with pytest.raises(Unsupported, match="Flax has no bilinear layer"):
        BACKEND.layer_plan(Layer("bilinear", {"i": 2, "j": 3, "o": 4}), AGC())
    with pytest.raises(Unsupported, match="16 shards need as many devices, there are 8"):
        BACKEND.scenario_sharded(whole, 16)


def test_errors_reach_the_suite() -> None:
    with pytest.raises(SelectorError):
        BACKEND.clip(problem(exclude=["v"]))
    bad = problem(nonfinite="raise")
    bad.gradients["w"][0, 0] = np.nan  # type: ignore[index, union-attr, call-overload]
    with pytest.raises(NonFiniteError, match="parameter 'w'"):
        BACKEND.clip(bad)


def task(rule: AGC) -> TrainingTask:
    rng = np.random.default_rng(0)
    shapes = {"conv1.weight": (4, 1, 3, 3), "conv2.weight": (5, 4, 3, 3), "head.weight": (3, 5)}
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    weights |= {
        name.replace("weight", "bias"): np.zeros(w.shape[0], np.float32)
        for name, w in weights.items()
    }
    batch = rng.standard_normal((2, 1, 6, 6)).astype(np.float32), np.array([0, 2])
    return TrainingTask(rule, Sgd(0.1), weights, [batch, batch])


def test_training_translates_names_and_layouts() -> None:
    rule = AGC(exclude=["head.weight"], clipping={"conv1.weight": None, "*": 0.001})
    first, second = BACKEND.train(task(rule))
    np.testing.assert_array_equal(first.clipped["head.weight"], first.gradients["head.weight"])
    np.testing.assert_array_equal(first.clipped["conv1.weight"], first.gradients["conv1.weight"])
    axes = (1, 2, 3)
    norms = np.sqrt((first.clipped["conv2.weight"] ** 2).sum(axes))
    limits = 0.001 * np.sqrt((first.before["conv2.weight"] ** 2).sum(axes))
    np.testing.assert_allclose(norms, limits, rtol=1e-5)
    np.testing.assert_array_equal(first.after["conv2.weight"], second.before["conv2.weight"])
    moved = first.before["conv2.weight"] - first.after["conv2.weight"]
    np.testing.assert_allclose(moved, 0.1 * first.clipped["conv2.weight"], atol=1e-6)
    assert first.plan is not None
    assert first.plan["head.weight"].excluded
    with pytest.raises(Unsupported, match="declares units for the layout"):
        next(iter(BACKEND.train(task(AGC(units={"head.weight": "o i -> o"})))))


def test_training_with_sam() -> None:
    records = run_task(BACKEND, "sam-digits", steps=4)
    found = {r["id"]: r["status"] for r in records if r["type"] == "result"}
    assert found == dict.fromkeys(result_ids("sam-digits"), "passed")


def run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_backend_imports_no_other_framework() -> None:
    script = """
import sys, agc_conformance.backends.jax.backend
others = ("torch", "tensorflow", "keras", "haiku", "equinox", "agc_torch", "agc_tensorflow")
print(*[name for name in others if name in sys.modules], "end")
"""
    assert run(script) == ["end"]


@pytest.mark.parametrize("missing", ["jax", "optax", "flax"])
def test_a_missing_package_names_the_extra(missing: str) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import agc_jax
except ImportError as error:
    print('pip install "agc-sam[jax]"' in str(error), {missing!r} in str(error))
"""
    assert run(script) == ["True", "True"]
