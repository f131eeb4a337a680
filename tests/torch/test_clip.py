"""Clipping by hand, against the float64 reference: dtypes, layouts, policies, sparsity, telemetry,
cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import agc_torch
from agc import AGC, SAM, Schedule
from agc.errors import (
    AmbiguousUnitsError,
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    SelectorError,
    ShapeError,
    UnitsError,
)
from agc.reference import Result, RowSparse, adaptive_clip
from tests.helpers import uneven

# Plain tensors are clipped here, whose units follow the layout; test_units.py asserts that warning.
pytestmark = pytest.mark.filterwarnings("ignore:no layer's type settles:agc.errors.UnitsWarning")

SHAPES = {
    "scalar": (),
    "bias": (7,),
    "one": (1,),
    "linear": (5, 6),
    "linear 1->C": (5, 1),
    "conv": (5, 4, 3, 3),
    "conv3d": (3, 2, 3, 1, 2),
    "wide": (4, 700),
    "empty": (0, 3),
}
ULP_LIMITS = {
    torch.float16: 1,
    torch.bfloat16: 1,
    torch.float32: 4,
    torch.float64: 8,
    torch.complex64: 4,
    torch.complex128: 8,
}


@pytest.fixture(params=["cpu", "accelerator"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the code; the second never looks at a value."""
    if request.param == "accelerator":
        for module in ("clip", "norms"):
            monkeypatch.setattr(f"agc_torch.{module}.on_host", lambda device: False)
    return str(request.param)


def draw(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return uneven(random, random.standard_normal(shape), spread)


def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        array = array * np.exp(1j * np.arange(array.size).reshape(array.shape))
    return torch.tensor(array).to(dtype)


def parameter(weight: Tensor, gradient: Tensor | None) -> nn.Parameter:
    made = nn.Parameter(weight.clone())
    if gradient is not None:
        set_gradient(made, gradient.clone())
    return made


def set_gradient(made: Tensor, gradient: Tensor) -> None:
    """Set a gradient of any dtype and shape."""
    if gradient.layout == torch.strided:
        made.grad = torch.zeros_like(made)
        made.grad.data = gradient
    else:
        made.grad = gradient


def model_of(dtype: torch.dtype, gradient_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        name: parameter(
            tensor(draw(shape, seed), dtype),
            tensor(0.03 * draw(shape, seed + 100), gradient_dtype or dtype),
        )
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def array_of(given: Tensor | None) -> Any:
    if given is None:
        return None
    if given.layout == torch.sparse_coo:
        given = given.coalesce()
        return RowSparse(given.indices()[0].numpy(), array_of(given.values()), tuple(given.shape))
    given = given.detach()
    if given.is_complex():
        return given.to(torch.complex128).resolve_conj().numpy()
    return given.double().numpy() if given.is_floating_point() else given.numpy()


def by_reference(parameters: dict[str, Tensor], rule: AGC, *, step: int = 0) -> Result:
    return adaptive_clip(
        {name: array_of(p) for name, p in parameters.items()},
        {name: array_of(p.grad) for name, p in parameters.items()},
        agc_torch.plan(parameters, rule),
        rule,
        step=step,
    )


def ulp_error(got: Tensor, expected: np.ndarray) -> float:
    """Largest distance in units in the last place of the correctly rounded result."""
    if got.is_complex():
        return max(ulp_error(got.real, np.real(expected)), ulp_error(got.imag, np.imag(expected)))
    if got.numel() == 0:
        return 0.0
    rounded = torch.tensor(expected).to(got.dtype)
    toward = torch.nextafter(rounded.abs(), torch.full_like(rounded, math.inf))
    ulp = (toward.double() - rounded.abs().double()).numpy()
    reference = rounded.double().numpy() if got.dtype.itemsize == 2 else expected
    return float(np.max(np.abs(got.double().numpy() - reference) / ulp))


def check(parameters: dict[str, Tensor], rule: AGC, *, step: int = 0) -> agc_torch.Stats:
    """Clip, and compare with the reference."""
    expected = by_reference(parameters, rule, step=step)
    dtypes = {name: p.grad.dtype for name, p in parameters.items() if p.grad is not None}
    stats = agc_torch.adaptive_clip_grad_(parameters, rule, step=step)
    for name, wanted in expected.gradients.items():
        got = parameters[name].grad
        if got is None:
            assert wanted is None
            continue
        assert got.dtype == dtypes[name]
        if isinstance(wanted, RowSparse):
            assert got.layout == torch.sparse_coo
            assert torch.equal(got.indices()[0], torch.tensor(wanted.indices))
            got, wanted = got.values(), wanted.values
        assert ulp_error(got, wanted) <= ULP_LIMITS[got.dtype], name
    total = stats.total()
    assert (total.units, total.clipped) == (expected.total.units, expected.total.clipped)
    assert total.nonfinite == expected.total.nonfinite
    assert total.max_ratio == pytest.approx(expected.total.max_ratio, rel=1e-6)
    assert total.min_scale == pytest.approx(expected.total.min_scale, rel=1e-6)
    return stats


# Numbers


@pytest.mark.parametrize("dtype", ULP_LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype(dtype, path):
    stats = check(model_of(dtype), AGC(clipping=0.02))
    assert 0 < stats.total().clipped < stats.units


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ],
    ids=["float32 weights", "bfloat16 weights", "float64 weights"],
)
def test_gradients_of_another_dtype(dtype, gradient_dtype, path):
    check(model_of(dtype, gradient_dtype), AGC(clipping=0.02))


@pytest.mark.parametrize("wide", ["weight", "gradient"])
def test_float64_on_one_side_is_exact(wide, path):
    dtypes = {"weight": torch.float32, "gradient": torch.float32, wide: torch.float64}
    weight, gradient = (
        tensor(draw((3, 4608), seed, 0.1), dtype) for seed, dtype in enumerate(dtypes.values())
    )
    made = {"w": parameter(weight, gradient), "b": parameter(weight[0], gradient[0])}
    stats = agc_torch.adaptive_clip_grad_(made, AGC())
    ratio = gradient.double().norm(dim=1) / weight.double().norm(dim=1)
    assert stats.total().max_ratio == pytest.approx(ratio.max().item(), rel=1e-14)
    assert stats.parameters()["b"].max_ratio == pytest.approx(ratio[0].item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_of_more_than_one_piece(dtype):
    weight, gradient = draw((600, 500), 1, 0.1), draw((600, 500), 2, 0.1)
    parameters = {"w": parameter(tensor(weight, dtype), tensor(gradient, dtype))}
    check(parameters, AGC(clipping=0.5))
    check({"w": parameter(tensor(weight.ravel(), dtype), tensor(gradient.ravel(), dtype))}, AGC())


def families(kind: str, rows: int, length: int, random: np.random.Generator) -> np.ndarray:
    if kind == "log-normal":
        return np.exp(3 * random.standard_normal((rows, length)))
    if kind == "positive":
        return random.random((rows, length)) + 0.5
    if kind == "constant":
        return np.ones((rows, length)) * (random.random((rows, 1)) + 0.5)
    if kind == "descending":
        return -np.sort(-np.abs(random.standard_normal((rows, length))), axis=1)
    if kind == "one large":
        array = random.standard_normal((rows, length))
        array[np.arange(rows), random.integers(length, size=rows)] = 1e4
        return array
    if kind == "decay":
        fall = np.exp(-np.arange(length) / length * random.uniform(0, 30, (rows, 1)))
        return fall * (1 + 0.1 * random.random((rows, length)))
    if kind == "drop":  # first a few large values, then many whose squares are almost lost on them
        array = np.ones((rows, length)) * random.uniform(0.2, 1.0, (rows, 1)) * 2**-11.5
        array[:, :8] = 1 + random.random((rows, 8))
        return array
    raise ValueError(kind)


@pytest.mark.parametrize("length", [27, 64, 147, 512, 1153, 4608])
@pytest.mark.parametrize(
    "kind", ["log-normal", "positive", "constant", "descending", "one large", "decay", "drop"]
)
def test_accuracy_of_float32(kind, length):
    random = np.random.default_rng(length)
    for _ in range(4):
        weight, gradient = (
            torch.tensor(families(kind, 48, length, random), dtype=torch.float32) for _ in range(2)
        )
        check({"w": parameter(weight, gradient)}, AGC())


@pytest.mark.parametrize("kind", ["log-normal", "constant"])
def test_accuracy_of_a_unit_of_a_million_elements(kind):
    random = np.random.default_rng(5)
    weight, gradient = (
        torch.tensor(families(kind, 1031, 1021, random), dtype=torch.float32) for _ in range(2)
    )
    check({"w": parameter(weight, gradient)}, AGC(granularity="tensor"))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "slice": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "units", ["o i h w -> o", "i o h w -> o", "(g=2 i) o h w -> g o", "o ... ->"]
)
def test_memory_layouts(layout, units, path):
    weight, gradient = (tensor(draw((12, 130, 3, 3), seed), torch.float32) for seed in (1, 2))
    made = nn.Parameter(LAYOUTS[layout](weight))
    set_gradient(made, LAYOUTS[layout](gradient))
    strides = made.grad.stride()
    check({"w": made}, AGC(clipping=0.5, units={"w": units}))
    assert made.grad.stride() == strides


def test_weight_and_gradient_in_different_layouts(path):
    weight, gradient = (tensor(draw((12, 130, 3, 3), seed), torch.float32) for seed in (1, 2))
    made = nn.Parameter(weight)
    set_gradient(made, gradient.contiguous(memory_format=torch.channels_last))
    check({"w": made}, AGC(clipping=0.5))


def test_conjugate_gradient(path):
    weight, gradient = (tensor(draw((5, 6), seed), torch.complex64) for seed in (1, 2))
    made = nn.Parameter(weight)
    made.grad = gradient.clone()
    made.grad.data = gradient.clone().conj()
    check({"w": made}, AGC())


def test_every_element_a_unit(path):
    check({"w": parameter(torch.randn(4, 3), torch.randn(4, 3))}, AGC(units={"w": "o i -> o i"}))


def test_huge_and_tiny_gradients_are_clipped_right():
    """Squares that leave float32: 1e25 overflows, 1e-25 underflows, and the limit may be as
    tiny.
    """
    weight = torch.zeros(4, 600)
    weight[1] = 1e25
    weight[3] = 1e-25
    gradient = torch.full((4, 600), 1e25)
    gradient[2:] = 1e-25
    check({"w": parameter(weight, gradient)}, AGC(eps=0.0))
    check({"w": parameter(weight, gradient)}, AGC(eps=1e-3))


def test_factor_that_float32_cannot_hold():
    parameters = {"w": parameter(torch.zeros(2, 8), torch.full((2, 8), 3e38))}
    check(parameters, AGC(clipping=0.01, eps=1e-6))
    assert parameters["w"].grad.norm(dim=1).tolist() == pytest.approx([1e-8] * 2)


# Bits


def bits(given: Tensor) -> Tensor:
    return given.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[given.dtype.itemsize])


def test_a_tie_keeps_its_bits_and_more_than_a_tie_does_not(path):
    weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    gradient = torch.tensor([[0.0, 1.25], [-0.0, math.nextafter(1.25, 2)]], dtype=torch.float64)
    made = parameter(weight.double(), gradient)
    stats = agc_torch.adaptive_clip_grad_({"w": made}, AGC(clipping=0.25))
    assert torch.equal(bits(made.grad[0]), bits(gradient[0]))
    assert made.grad[1, 1] == 1.25
    assert stats.total().clipped == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unclipped_units_keep_their_bits(dtype, path):
    weight = torch.full((3, 4), 1e3, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    gradient = torch.tensor([[-0.0, 0.0, tiny / 4, 1.0]] * 3, dtype=dtype)
    gradient[1, 3] = 1e3
    made = parameter(weight, gradient)
    stats = agc_torch.adaptive_clip_grad_({"w": made}, AGC())
    assert stats.total().clipped == 1
    kept = [0, 2]
    assert torch.equal(bits(made.grad)[kept], bits(gradient)[kept])


def test_excluded_and_switched_off_parameters_keep_their_bits(path):
    payload = torch.tensor([0x7FC12345, 0x7F800000, -1], dtype=torch.int32).view(torch.float32)
    off, out = parameter(torch.ones(3), payload), parameter(torch.ones(3), payload)
    on = parameter(torch.ones(3), torch.ones(3))
    rule = AGC(clipping={"off": None, "*": 0.01}, exclude=["out"])
    stats = agc_torch.adaptive_clip_grad_({"off": off, "out": out, "on": on}, rule)
    assert torch.equal(bits(off.grad), bits(payload))
    assert torch.equal(bits(out.grad), bits(payload))
    assert list(stats.parameters()) == ["on"]


# Policies


def poisoned(kind: str) -> dict[str, Tensor]:
    weight, gradient = torch.ones(4, 3), torch.full((4, 3), 0.5)
    bad = torch.inf if "infinite" in kind else torch.nan
    (weight if "weight" in kind else gradient)[1, 2] = bad
    return {"a": parameter(torch.ones(2), torch.full((2,), 1e-4)), "w": parameter(weight, gradient)}


POISONS = ["nan gradient", "infinite gradient", "nan weight", "infinite weight"]


@pytest.mark.parametrize("kind", POISONS)
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_poisoned_unit(kind, policy, path):
    parameters = poisoned(kind)
    stats = agc_torch.adaptive_clip_grad_(parameters, AGC(nonfinite=policy))
    got = parameters["w"].grad
    if policy == "zero":
        assert torch.equal(got[1], torch.zeros(3))
    else:
        assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2, 3]], torch.full((3, 3), 0.01 / 1))
    assert torch.equal(parameters["a"].grad, torch.full((2,), 1e-4))
    assert stats.parameters()["w"].nonfinite == 1
    assert stats.total().clipped == 3


def test_infinite_weight_where_nothing_else_happens(path):
    made = parameter(torch.tensor([[torch.inf, 1.0], [1.0, 1.0]]), torch.full((2, 2), 1e-6))
    agc_torch.adaptive_clip_grad_({"w": made}, AGC())
    assert made.grad[0].isnan().all()
    assert torch.equal(made.grad[1], torch.full((2,), 1e-6))


@pytest.mark.parametrize("kind", POISONS)
def test_policy_raise_names_the_parameter_and_changes_nothing(kind, path):
    parameters = poisoned(kind)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteError, match=r"parameter 'w': 1 of 4 units .* not finite"):
        agc_torch.adaptive_clip_grad_(parameters, AGC(clipping=1e-6, nonfinite="raise"))
    for name, p in parameters.items():
        assert torch.equal(bits(p.grad), bits(before[name]))


def test_policy_raise_with_finite_norms(path):
    check(model_of(torch.float32), AGC(clipping=0.02, nonfinite="raise"))


# Configuration


def test_thresholds_by_parameter(path):
    rule = AGC(clipping={"linear*": 0.5, "conv": None, "*": 0.02}, exclude=["bias"])
    check(model_of(torch.float32), rule)


@pytest.mark.parametrize("step", [0, 3, 10])
def test_schedules(step, path):
    rule = AGC(
        clipping={
            "conv*": Schedule([(0, 0.5), (4, 0.1)]),
            "linear": lambda step: 0.3 / (1 + step),
            "*": 0.02,
        }
    )
    check(model_of(torch.float32), rule, step=step)
    as_tensor, as_number = model_of(torch.float32), model_of(torch.float32)
    agc_torch.adaptive_clip_grad_(as_tensor, rule, step=torch.tensor(step))
    agc_torch.adaptive_clip_grad_(as_number, rule, step=step)
    for name, p in as_number.items():
        assert torch.equal(as_tensor[name].grad, p.grad)


@dataclass
class Ramp:  # compares equal by value, so it cannot be hashed
    slope: float

    def __call__(self, step: int) -> float:
        return 0.01 + self.slope * step


def test_a_schedule_that_cannot_be_hashed(path):
    check(model_of(torch.float32), AGC(clipping={"conv*": Ramp(0.1), "*": Ramp(0.2)}), step=2)


@pytest.mark.parametrize("most", [1, 100, 3000])
@pytest.mark.parametrize("policy", ["propagate", "zero", "raise"])
def test_a_few_parameters_at_a_time(most, policy, monkeypatch):
    monkeypatch.setattr("agc_torch.clip._CHUNK", most)
    rule = AGC(clipping={"conv*": 0.05, "*": 0.02}, nonfinite=policy)
    check(model_of(torch.float32), rule)
    if policy != "raise":
        return
    parameters = model_of(torch.float32)
    parameters["wide"].grad[0, 0] = torch.nan  # the last of them
    before = {name: p.grad.clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteError, match="parameter 'wide': 1 of 4 units"):
        agc_torch.adaptive_clip_grad_(parameters, rule)
    for name, p in parameters.items():
        assert torch.equal(bits(p.grad), bits(before[name]))


def test_whole_tensors(path):
    check(model_of(torch.float32), AGC(clipping=0.02, granularity="tensor"))


@pytest.mark.parametrize("profile", ["optax", "timm", "composer", "dreamerv3"])
def test_profiles(profile, path):
    check(model_of(torch.float32), AGC.profile(profile))


def test_floor_of_the_division(path):
    weight, gradient = torch.zeros(3, 2), torch.full((3, 2), 1e-7)
    rule = AGC(clipping=1e-2, eps=1e-5, div_eps=1e-6)
    parameters = {"w": parameter(weight, gradient)}
    check(parameters, rule)
    assert parameters["w"].grad[0, 0] == pytest.approx(1e-7 * 1e-7 / 1e-6, rel=1e-5)


# What has a gradient


def test_parameters_without_a_gradient_are_left_alone(path):
    frozen = parameter(torch.ones(2), None).requires_grad_(False)
    parameters = {"none": parameter(torch.ones(2), None), "frozen": frozen} | model_of(
        torch.float32
    )
    check(parameters, AGC())
    assert parameters["none"].grad is None
    assert frozen.grad is None


def test_no_gradient_at_all():
    with pytest.raises(
        MissingGradientError, match="no parameter has a gradient; compute gradients"
    ):
        agc_torch.adaptive_clip_grad_(nn.Linear(3, 2), AGC())


def test_nothing_to_clip_is_no_error():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    stats = agc_torch.adaptive_clip_grad_(layer, AGC(clipping=None))
    assert stats.total().units == 0
    assert stats.total().min_scale == 1.0


def test_tied_weights_are_clipped_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.grad = torch.ones(4, 4)
    stats = agc_torch.adaptive_clip_grad_(model, AGC())
    assert stats.units == 4
    once = parameter(model[0].weight.detach(), torch.ones(4, 4))
    agc_torch.adaptive_clip_grad_({"w": once}, AGC())
    assert torch.equal(model[0].weight.grad, once.grad)


def test_gradient_of_another_shape():
    made = parameter(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match=r"'w' has shape \(2, 3\), its gradient \(2, 4\)"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


@pytest.mark.parametrize("exclude", [[], ["w"]])
def test_integer_gradient(exclude):
    made = parameter(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32))
    with pytest.raises(DTypeError, match=r"'w': the gradient has dtype torch\.int32"):
        agc_torch.adaptive_clip_grad_({"w": made, "b": made.detach()}, AGC(exclude=exclude))


def test_integer_weight():
    made = torch.ones(2, 3, dtype=torch.int64)
    made.grad = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(DTypeError, match=r"'w': the gradient has dtype torch\.int64"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8(dtype):
    made = torch.ones(2, 3).to(dtype)
    made.grad = torch.ones(2, 3).to(dtype)
    good = parameter(torch.ones(2), torch.ones(2))
    with pytest.raises(DTypeError, match=r"'w': the gradient has dtype torch\.float8.* supports"):
        agc_torch.adaptive_clip_grad_({"w": made, "b": good}, AGC())
    agc_torch.adaptive_clip_grad_({"w": made, "b": good}, AGC(exclude=["w"]))
    assert good.grad.max() < 1


class Quantised(Tensor):
    """As torchao's: a wrapper around other tensors that looks like a float one, with few
    operations.
    """

    inner: tuple[str, ...] = ("codes", "scale")
    readable = True

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor | None = None) -> Quantised:
        dtype = codes.dtype if scale is None else scale.dtype
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor | None = None) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [name for name in self.inner if getattr(self, name) is not None], None

    def dequantize(self) -> Tensor:
        if not self.readable:
            raise NotImplementedError
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} has no {function}")


class Unreadable(Quantised):
    readable = False


def test_quantised_weight_is_read_dequantised(path):
    codes, scale = torch.tensor([[3, 4], [6, 8]], dtype=torch.int8), torch.tensor([[0.5], [1.0]])
    made = nn.Parameter(Quantised(codes, scale))
    made.grad = torch.tensor([[0.0, 1.0], [0.0, 0.05]])
    other = parameter(torch.ones(2, 2), torch.ones(2, 2))
    stats = agc_torch.adaptive_clip_grad_({"w": made, "o": other}, AGC(clipping=0.01))
    torch.testing.assert_close(made.grad, torch.tensor([[0.0, 0.025], [0.0, 0.05]]))
    assert stats.parameters()["w"].clipped == 1


def test_wrapper_around_one_tensor_is_that_tensor(path):
    made = nn.Parameter(Quantised(torch.tensor([[3.0, 4.0]])))
    made.grad = torch.tensor([[0.0, 1.0]])
    agc_torch.adaptive_clip_grad_({"w": made}, AGC(clipping=0.01, units={"w": "o i -> o"}))
    torch.testing.assert_close(made.grad, torch.tensor([[0.0, 0.05]]))


def test_wrapper_that_cannot_be_read():
    made = nn.Parameter(Unreadable(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1)))
    made.grad = torch.ones(3, 2)
    match = r"parameter 'w': the weight of shape \(3, 2\) is a Unreadable.*exclude=\['w'\]"
    with pytest.raises(ParameterError, match=match):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())
    other = parameter(torch.ones(2, 2), torch.ones(2, 2))
    agc_torch.adaptive_clip_grad_({"w": made, "o": other}, AGC(exclude=["w"]))
    assert other.grad.max() < 1


def test_quantised_gradient_cannot_be_written():
    made = nn.Parameter(Quantised(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1)))
    made.grad = Quantised(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1))
    with pytest.raises(ParameterError, match=r"'w': the gradient of shape \(3, 2\) is a Quantised"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


@pytest.mark.parametrize("rule", [None, 0.01, {"clipping": 0.01}, SAM(), AGC], ids=str)
def test_rule_that_is_none(rule):
    model = model_of(torch.float32)
    plan = agc_torch.plan(model, AGC())
    for call in (
        partial(agc_torch.adaptive_clip_grad_, model, rule),
        partial(agc_torch.adaptive_clip_grad_, model, rule, plan=plan),
        partial(agc_torch.plan, model, rule),
        partial(agc_torch.plan, nn.Linear(2, 2), rule),
        partial(agc_torch.attach, torch.optim.SGD([model["bias"]]), model, rule),
    ):
        with pytest.raises(ConfigError, match=r"^rule must be an agc\.AGC, got "):
            call()


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
        lambda model: dict(enumerate(model.parameters())),
        lambda model: dict.fromkeys(model.state_dict()),
        lambda model: model.weight,
        lambda model: [("weight",)],
        lambda model: "weight",
        lambda model: None,
    ],
    ids=["parameters", "list", "no-names", "no-tensors", "tensor", "short", "text", "None"],
)
def test_model_without_names(given):
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    for call in (
        lambda: agc_torch.adaptive_clip_grad_(given(model), AGC()),
        lambda: agc_torch.plan(given(model), AGC()),
        lambda: agc_torch.attach(torch.optim.SGD(model.parameters()), given(model), AGC()),
    ):
        with pytest.raises(
            ParameterError, match=r"give the module, or model\.named_parameters\(\)"
        ):
            call()


def test_a_plan_takes_the_place_of_the_rule():
    model = model_of(torch.float32)
    plan = agc_torch.plan(model, AGC(clipping=1e-3, exclude=["bias"]))
    want = by_reference(model, AGC(clipping=1e-3, exclude=["bias"]))
    agc_torch.adaptive_clip_grad_(model, AGC(clipping=0.5, exclude=["conv"]), plan=plan)
    for name, made in model.items():
        np.testing.assert_allclose(made.grad.numpy(), want.gradients[name], rtol=1e-5)


def test_ambiguous_shape():
    made = parameter(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(AmbiguousUnitsError, match=r"'w' with shape \(2, 3, 4\)"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


def test_pattern_that_matches_nothing():
    with pytest.raises(SelectorError, match=r"'head\.\*' matches no parameter"):
        agc_torch.adaptive_clip_grad_(model_of(torch.float32), AGC(exclude=["head.*"]))


def test_plan_of_another_model():
    plan = agc_torch.plan({"w": torch.ones(2), "b": torch.ones(2)}, AGC())
    made = parameter(torch.ones(2), torch.ones(2))
    with pytest.raises(ParameterError, match="'b' of the plan is missing from the model"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC(), plan=plan)
    with pytest.raises(ParameterError, match="'v' is not in the plan"):
        agc_torch.adaptive_clip_grad_(
            {"v": made, "w": made.detach(), "b": made.detach()}, AGC(), plan=plan
        )


# Sparse gradients


def embedding(rows: list[int], *, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(tensor(draw((9, 4), 1), dtype))
    values = tensor(draw((len(rows), 4), 2), dtype)
    made.grad = torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64), values, (9, 4), check_invariants=True
    )
    return made


@pytest.mark.parametrize("rows", [[7, 1, 7, 4], [3], []], ids=["repeated", "one", "none"])
@pytest.mark.parametrize("units", ["v d -> v", "v d ->"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_sparse_gradients_stay_sparse(rows, units, dtype, path):
    made = embedding(rows, dtype=dtype)
    if rows or "-> v" in units:
        check({"w": made}, AGC(units={"w": units}))
    else:
        agc_torch.adaptive_clip_grad_({"w": made}, AGC(units={"w": units}))
    assert made.grad.is_coalesced()


def test_sparse_gradients_touch_only_their_rows():
    made = embedding([7, 1])
    made.data[[0, 2, 3, 4, 5, 6, 8]] = torch.nan
    stats = agc_torch.adaptive_clip_grad_({"w": made}, AGC())
    assert stats.total().nonfinite == 0
    assert stats.units == 2


def test_sparse_gradient_whose_rows_are_no_units():
    rule = AGC(units={"w": "v d -> d"})
    with pytest.raises(
        UnitsError, match=r"'w': the gradient of shape \(9, 4\) is row-sparse.*'v d -> v'"
    ):
        agc_torch.adaptive_clip_grad_({"w": embedding([1])}, rule)


def test_sparse_elements_are_no_rows():
    made = embedding([1])
    made.grad = torch.ones(9, 4).to_sparse(2)
    with pytest.raises(UnitsError, match="sparse in its first 2 axes"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_compressed_sparse_gradient():
    made = torch.ones(9, 4)
    made.grad = torch.ones(9, 4)
    made = nn.Parameter(torch.ones(9, 4).to_sparse_csr())
    made.grad = torch.ones(9, 4).to_sparse_csr()
    with pytest.raises(UnitsError, match=r"'w': a gradient of layout torch\.sparse_csr"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


def test_embedding_layer_with_sparse_gradients():
    layer = nn.Embedding(9, 4, sparse=True)
    layer(torch.tensor([1, 3, 3])).sum().backward()
    stats = agc_torch.adaptive_clip_grad_(layer, AGC())
    assert stats.total().units == stats.total().clipped == 2


# The plan is remembered


def trained(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_a_changed_model_is_noticed():
    model = trained(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    clip = partial(agc_torch.adaptive_clip_grad_, model)
    assert clip(AGC()).units == 12
    model[0] = trained(nn.ConvTranspose2d(6, 4, 1))  # a weight of the same name
    assert clip(AGC()).units == 10
    model.append(trained(nn.Linear(2, 3)))
    assert clip(AGC()).units == 14
    assert clip(AGC(exclude=["2.*"])).units == 10
    model[2].weight.data = torch.ones(5, 2)
    model[2].weight.grad = torch.ones(5, 2)
    assert clip(AGC()).units == 16


def test_a_remembered_plan_does_not_keep_the_model():
    import gc
    import weakref

    model = trained(nn.Linear(4, 6))
    agc_torch.adaptive_clip_grad_(model, AGC())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_changes_dtype_or_is_copied():
    model = trained(nn.Linear(4, 6))
    agc_torch.adaptive_clip_grad_(model, AGC())
    assert agc_torch.adaptive_clip_grad_(trained(model.double()), AGC()).units == 7
    assert agc_torch.adaptive_clip_grad_(trained(copy.deepcopy(model)), AGC()).units == 7


# Telemetry


def test_telemetry_by_parameter(path):
    parameters = model_of(torch.float32)
    rule = AGC(clipping={"linear": 0.02, "*": 0.05})
    expected = by_reference(parameters, rule).stats
    stats = agc_torch.adaptive_clip_grad_(parameters, rule)
    found = stats.parameters()
    assert list(found) == [name for name in SHAPES if name != "empty"]
    for name, one in found.items():
        assert (one.units, one.clipped) == (expected[name].units, expected[name].clipped)
        assert one.max_ratio == pytest.approx(expected[name].max_ratio, rel=1e-6)
        assert one.min_scale == pytest.approx(expected[name].min_scale, rel=1e-6)
    assert "units" in repr(stats)
    for value in (stats.clipped, stats.nonfinite, stats.max_ratio, stats.min_scale):
        assert isinstance(value, Tensor)
        assert value.shape == ()


def test_telemetry_keeps_no_gradient():
    import gc
    import weakref

    parameters = model_of(torch.float32)
    stats = agc_torch.adaptive_clip_grad_(parameters, AGC())
    gradients = [weakref.ref(p.grad) for p in parameters.values()]
    for p in parameters.values():
        p.grad = None
    gc.collect()
    assert all(gradient() is None for gradient in gradients)
    assert stats.total().units > 0


# Cost

WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique")


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that brings a number from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(waiting in name for waiting in WAITING), f"{name} waits for the device"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") in (None, args[0].device), "copied to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_an_accelerator_is_not_waited_for(policy):
    """On pretended CUDA tensors, whose values nobody can know."""
    rule = AGC(clipping={"conv": Schedule([(0, 0.5), (4, 0.1)]), "*": 0.02}, nonfinite=policy)
    with FakeTensorMode(), NoWaiting():
        parameters = {}
        for name, shape in SHAPES.items():
            parameters[name] = nn.Parameter(torch.empty(shape, device="cuda:0"))
            parameters[name].grad = torch.empty(shape, device="cuda:0")
        step = torch.zeros((), dtype=torch.int64, device="cuda:0")
        stats = agc_torch.adaptive_clip_grad_(parameters, rule, step=step)
        scalars = (stats.clipped, stats.nonfinite, stats.max_ratio, stats.min_scale)
        assert {value.device.type for value in scalars} == {"cuda"}


def test_an_attached_optimizer_does_not_wait():
    with FakeTensorMode(), NoWaiting():
        model = {
            name: nn.Parameter(torch.empty(shape, device="cuda:0"))
            for name, shape in SHAPES.items()
        }
        optimizer = torch.optim.SGD(model.values(), 0.1, momentum=0.9)
        handle = agc_torch.attach(optimizer, model, AGC())
        for _ in range(2):
            for p in model.values():
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert handle.stats().clipped.device.type == "cuda"


def test_reading_telemetry_is_what_waits(monkeypatch):
    for module in ("clip", "norms"):
        monkeypatch.setattr(f"agc_torch.{module}.on_host", lambda device: False)
    parameters = model_of(torch.float32)
    with NoWaiting():
        stats = agc_torch.adaptive_clip_grad_(parameters, AGC())
        with pytest.raises(AssertionError, match="waits for the device"):
            stats.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peak_of_extra_memory(dtype):
    """With everything clipped; the profiler sees every allocation, also inside operations."""

    shapes = [(1536, 1536, 1, 1)] * 6 + [(768, 128, 3, 3)] * 6 + [(1536,)] * 12
    parameters = {
        f"p{index}": parameter(torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype))
        for index, shape in enumerate(shapes)
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stats = agc_torch.adaptive_clip_grad_(parameters, AGC())
    assert stats.total().clipped == stats.units
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    assert 0 < peak < 0.05 * size


# Properties

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
seeds = st.integers(0, 2**32 - 1)
clippings = st.floats(1e-3, 1.0)


def pair(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(draw(shape, seed), dtype=torch.float32),
        torch.tensor(draw(shape, seed + 1), dtype=torch.float32),
    )


def clip(weight: Tensor, gradient: Tensor, clipping: float) -> Tensor:
    made = parameter(weight, gradient)
    rule = AGC(clipping=clipping, eps=1e-30, units={"w": "o i -> o"})
    agc_torch.adaptive_clip_grad_({"w": made}, rule)
    return made.grad


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, clippings)
def test_no_unit_grows_and_each_keeps_its_direction(shape, seed, clipping):
    weight, gradient = pair(shape, seed)
    got = clip(weight, gradient, clipping).double()
    before, after = gradient.double().norm(dim=1), got.norm(dim=1)
    assert (after <= before * (1 + 1e-6)).all()
    assert (
        (after <= clipping * weight.double().norm(dim=1) * (1 + 1e-6))
        .logical_or(after == before)
        .all()
    )
    torch.testing.assert_close(
        got * before[:, None], gradient.double() * after[:, None], rtol=1e-6, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, clippings, st.integers(-20, 20))
def test_scaling_both_by_a_power_of_two_scales_the_result(shape, seed, clipping, power):
    weight, gradient = pair(shape, seed)
    factor = 2.0**power
    assert torch.equal(
        clip(weight * factor, gradient * factor, clipping),
        clip(weight, gradient, clipping) * factor,
    )


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, clippings, st.randoms())
def test_permuting_units_permutes_the_result(shape, seed, clipping, random):
    weight, gradient = pair(shape, seed)
    order = list(range(shape[0]))
    random.shuffle(order)
    assert torch.equal(
        clip(weight[order], gradient[order], clipping), clip(weight, gradient, clipping)[order]
    )


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, clippings)
def test_clipping_again_changes_next_to_nothing(shape, seed, clipping):
    weight, gradient = pair(shape, seed)
    once = clip(weight, gradient, clipping)
    torch.testing.assert_close(clip(weight, once, clipping), once, rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    parameters = {"w": nn.Parameter(tensor(draw((4, 1200), 1), torch.float32))}
    parameters["w"].grad = tensor(draw((4, 1200), 2), torch.float32)
    rule = AGC(clipping=0.01, units={"w": "o i -> o"})
    want = by_reference(parameters, rule)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            agc_torch.adaptive_clip_grad_(parameters, rule)
    finally:
        torch.set_default_dtype(before)
    assert ulp_error(parameters["w"].grad, want.gradients["w"]) <= 4


def test_one_long_unit_that_is_mostly_one_block():
    values = draw((300_000,), 1) * 1e-3
    values[70_000:70_050] = 7.3
    parameter = nn.Parameter(tensor(values, torch.float32))
    parameter.grad = tensor(values[::-1].copy(), torch.float32)
    want = by_reference({"w": parameter}, AGC(clipping=0.01))
    agc_torch.adaptive_clip_grad_({"w": parameter}, AGC(clipping=0.01))
    assert ulp_error(parameter.grad, want.gradients["w"]) <= 4
