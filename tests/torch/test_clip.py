"""Clipping by hand: what is peculiar to tensors, the remembered plan, and what clipping costs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import agc_torch
from agc import AGC, Schedule, Units
from agc.errors import ConfigError, DTypeError, NonFiniteError, ParameterError, UnitsError
from agc.reference import Result, adaptive_clip
from agc_conformance.backends.torch.arrays import gradient_arrays, set_gradient, to_array
from agc_torch.norms import all_norms
from agc_torch.views import View
from tests.contract.clip import (
    ClipContract,
    SparseContract,
    VectorsContract,
    check_gradients,
    check_stats,
)
from tests.helpers import draw
from tests.torch.driver import TorchDriver, never_look_at_values

# Plain tensors are clipped here, whose units follow the layout; test_units.py asserts that warning.
pytestmark = pytest.mark.filterwarnings("ignore:no layer's type settles:agc.errors.UnitsWarning")


class TestClip(ClipContract):
    driver = TorchDriver()


class TestSparse(SparseContract):
    driver = TorchDriver()


class TestVectors(VectorsContract):
    driver = TorchDriver()


SHAPES = {
    "scalar": (),
    "bias": (7,),
    "linear": (5, 6),
    "conv": (5, 4, 3, 3),
    "wide": (4, 700),
    "empty": (0, 3),
}


@pytest.fixture(params=["host", "accelerator"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the code."""
    if request.param == "accelerator":
        never_look_at_values(monkeypatch)
    return str(request.param)


def parameter(weight: Any, gradient: Any = None) -> nn.Parameter:
    """Return a parameter with a gradient of any dtype and shape, by default of ones."""
    made = nn.Parameter(torch.as_tensor(weight).clone())
    gradient = torch.ones_like(made) if gradient is None else torch.as_tensor(gradient).clone()
    set_gradient(made, gradient)
    return made


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a parameter with a gradient, of which some units are clipped."""
    return parameter(*(torch.tensor(array, dtype=dtype) for array in draw(shape, seed, small=True)))


def model_of() -> dict[str, Tensor]:
    return {name: drawn(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def by_reference(parameters: dict[str, Tensor], rule: AGC, step: int = 0) -> Result:
    weights = {name: to_array(p) for name, p in parameters.items()}
    plan = agc_torch.plan(parameters, rule)
    return adaptive_clip(weights, gradient_arrays(parameters), plan, rule, step=step)


def check(parameters: dict[str, Tensor], rule: AGC, step: int = 0) -> None:
    """Clip, and compare with the reference."""
    want = by_reference(parameters, rule, step)
    stats = agc_torch.adaptive_clip_grad_(parameters, rule, step=step)
    check_gradients(gradient_arrays(parameters), want)
    check_stats(stats.parameters(), want)


# Numbers


@pytest.mark.parametrize("wide", ["weight", "gradient"])
def test_float64_on_one_side_is_exact(wide, path):
    dtypes = {"weight": torch.float32, "gradient": torch.float32, wide: torch.float64}
    weight, gradient = (
        torch.tensor(array, dtype=dtype)
        for array, dtype in zip(draw((3, 4608)), dtypes.values(), strict=True)
    )
    made = {"w": parameter(weight, gradient), "b": parameter(weight[0], gradient[0])}
    stats = agc_torch.adaptive_clip_grad_(made, AGC())
    ratio = gradient.double().norm(dim=1) / weight.double().norm(dim=1)
    assert stats.total().max_ratio == pytest.approx(ratio.max().item(), rel=1e-14)
    assert stats.parameters()["b"].max_ratio == pytest.approx(ratio[0].item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(600, 500), (300_000,)], ids=str)
def test_half_precision_of_more_than_one_block(shape, dtype):
    check({"w": drawn(shape, dtype=dtype)}, AGC())


def test_one_long_unit_that_is_mostly_one_block():
    values = draw((300_000,))[0] * 1e-3
    values[70_000:70_050] = 7.3
    check({"w": parameter(torch.tensor(values).float(), values[::-1].astype("f"))}, AGC())


@pytest.mark.parametrize("beside", [1e-6, 0.0, torch.inf, torch.nan])
def test_a_row_that_is_mostly_one_block_is_summed_exactly(beside):
    """Whatever a tensor beside it holds."""
    gradient = torch.full((8, 1024), 1e-6)
    gradient[1, 100:120] = torch.tensor(draw((20,))[0]).float()
    want = gradient[1].double().norm().item() / 1e-3
    weight = torch.zeros(8, 1024)
    made = {
        "w": parameter(weight, gradient),
        "v": parameter(weight, torch.full((8, 1024), beside)),
    }
    stats = agc_torch.adaptive_clip_grad_(made, AGC(units={"*": "o i -> o"}))
    assert stats.parameters()["w"].max_ratio == pytest.approx(want, rel=1e-13)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "slice": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
}
PAIRS = [*((name, name) for name in LAYOUTS), ("contiguous", "channels last")]


@pytest.mark.parametrize("layouts", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    "units", ["o i h w -> o", "i o h w -> o", "(g=2 i) o h w -> g o", "o ... ->"]
)
def test_memory_layouts(layouts, units, path):
    weight, gradient = (
        LAYOUTS[layout](torch.tensor(array).float())
        for layout, array in zip(layouts, draw((12, 130, 3, 3)), strict=True)
    )
    made = nn.Parameter(weight)
    set_gradient(made, gradient)
    strides = made.grad.stride()
    check({"w": made}, AGC(clipping=0.5, units={"w": units}))
    assert made.grad.stride() == strides


def test_conjugate_gradient(path):
    weight, gradient = torch.randn(2, 5, 6, dtype=torch.complex64)
    plain, conjugate = parameter(weight, gradient.conj().resolve_conj()), parameter(weight)
    conjugate.grad.data = gradient.conj()
    for made in (plain, conjugate):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())
    assert torch.equal(plain.grad, conjugate.grad)


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


@pytest.mark.parametrize("beside", ["alike", "unclipped", "not finite"])
def test_factor_that_float32_cannot_hold(beside):
    gradient = torch.full((2, 8), 3e38)
    gradient[1] = {"alike": 3e38, "unclipped": 1e-9, "not finite": torch.nan}[beside]
    parameters = {"w": parameter(torch.zeros(2, 8), gradient)}
    want = by_reference(parameters, AGC(eps=1e-6))
    stats = agc_torch.adaptive_clip_grad_(parameters, AGC(eps=1e-6))
    check_gradients(gradient_arrays(parameters), want)
    assert stats.total().max_ratio == pytest.approx(want.total.max_ratio, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    parameters = {"w": drawn((4, 1200))}
    rule = AGC(clipping=0.01, units={"w": "o i -> o"})
    want = by_reference(parameters, rule)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            agc_torch.adaptive_clip_grad_(parameters, rule)
    finally:
        torch.set_default_dtype(before)
    check_gradients(gradient_arrays(parameters), want)


# Policies and configuration


@pytest.mark.parametrize("most", [1, 100, 1 << 22])
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_policy_raise_changes_nothing(where, most, path, monkeypatch):
    """Whatever was clipped before."""
    monkeypatch.setattr("agc_torch.clip._CHUNK", most)
    parameters = model_of()
    last = parameters["wide"]
    (last.data if where == "weight" else last.grad)[0, 0] = torch.nan
    before = {name: p.grad.clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteError, match=r"parameter 'wide': 1 of 4 units .* not finite"):
        agc_torch.adaptive_clip_grad_(parameters, AGC(clipping=1e-6, nonfinite="raise"))
    for name, p in parameters.items():
        assert torch.equal(p.grad.view(torch.int32), before[name].view(torch.int32))


@dataclass
class Ramp:  # compares equal by value, so it cannot be hashed
    slope: float

    def __call__(self, step: int) -> float:
        return 0.01 + self.slope * step


def test_a_schedule_that_cannot_be_hashed(path):
    check(model_of(), AGC(clipping={"conv*": Ramp(0.1), "*": Ramp(0.2)}), step=2)


# What has a gradient


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


@pytest.mark.parametrize("exclude", [[], ["w"]])
def test_integers(exclude):
    made = parameter(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int32))
    whole = torch.ones(2, 3, dtype=torch.int64)
    whole.grad = torch.ones_like(whole)
    for wrong in (made, whole):
        with pytest.raises(DTypeError, match=r"'w': the gradient has dtype torch\.int"):
            agc_torch.adaptive_clip_grad_({"w": wrong, "b": torch.ones(3)}, AGC(exclude=exclude))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(dtype):
    made = torch.ones(2, 3).to(dtype)
    made.grad = torch.ones(2, 3).to(dtype)
    good = parameter(torch.ones(2))
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
    other = parameter(torch.ones(2, 2))
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
    other = parameter(torch.ones(2, 2))
    agc_torch.adaptive_clip_grad_({"w": made, "o": other}, AGC(exclude=["w"]))
    assert other.grad.max() < 1


def test_quantised_gradient_cannot_be_written():
    made = nn.Parameter(Quantised(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1)))
    made.grad = Quantised(torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1))
    with pytest.raises(ParameterError, match=r"'w': the gradient of shape \(3, 2\) is a Quantised"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


NAMELESS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "no names": lambda model: dict(enumerate(model.parameters())),
    "no tensors": lambda model: dict.fromkeys(model.state_dict()),
    "tensor": lambda model: model.weight,
    "short": lambda model: [("weight",)],
    "text": lambda model: "weight",
    "None": lambda model: None,
}


@pytest.mark.parametrize("given", NAMELESS)
def test_model_without_names(given):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    attach = partial(agc_torch.attach, optimizer)
    for function in (agc_torch.adaptive_clip_grad_, agc_torch.plan, attach):
        with pytest.raises(ParameterError, match=r"give the module, or model\.named_parameters"):
            function(NAMELESS[given](model), AGC())


def test_a_plan_takes_the_place_of_the_rule():
    model = model_of()
    planned = AGC(clipping=1e-3, exclude=["bias"])
    want, plan = by_reference(model, planned), agc_torch.plan(model, planned)
    agc_torch.adaptive_clip_grad_(model, AGC(clipping=0.5, exclude=["conv"]), plan=plan)
    check_gradients(gradient_arrays(model), want)


def test_plan_of_another_model():
    made = parameter(torch.ones(2))
    plan = agc_torch.plan({"w": made, "b": made.detach()}, AGC())
    with pytest.raises(ParameterError, match="'b' of the plan is missing from the model"):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC(), plan=plan)
    others = {"w": made.detach(), "b": made.detach()}
    with pytest.raises(ParameterError, match="'v' is not in the plan"):
        agc_torch.adaptive_clip_grad_({"v": made} | others, AGC(), plan=plan)


# Sparse gradients


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: x.to_sparse(2), "sparse in its first 2 axes"),
        (lambda x: x.to_sparse_csr(), r"'w': a gradient of layout torch\.sparse_csr"),
    ],
    ids=["elements", "compressed"],
)
def test_sparse_layouts_without_rows(convert, message):
    made = nn.Parameter(convert(torch.ones(9, 4)) if "csr" in message else torch.ones(9, 4))
    made.grad = convert(torch.ones(9, 4))
    with pytest.raises(UnitsError, match=message):
        agc_torch.adaptive_clip_grad_({"w": made}, AGC())


def test_embedding_layer_with_sparse_gradients():
    layer = nn.Embedding(9, 4, sparse=True)
    layer(torch.tensor([1, 3, 3])).sum().backward()
    stats = agc_torch.adaptive_clip_grad_(layer, AGC())
    assert stats.total().units == stats.total().clipped == 2
    assert layer.weight.grad.is_coalesced()


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


def stack() -> nn.Sequential:
    """Return layers whose norms are taken in every way that there is."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(31, 32),  # copied
        nn.Conv2d(8, 64, 3),
        nn.Linear(300, 40),  # in float64
        nn.Linear(768, 10),  # in blocks
        nn.Linear(700, 12),
        nn.Conv2d(64, 16, 3).to(memory_format=torch.channels_last),
    )


def drawn_(model: nn.Module, dtype: torch.dtype) -> None:
    """Draw gradients, about half of whose units are clipped."""
    for p in model.parameters():
        p.grad = None
        p.grad_dtype = None
        row_sizes = (0.3 + 0.8 * torch.rand(len(p))).view(-1, *[1] * (p.ndim - 1))
        p.grad = (torch.randn_like(p) * p.std() * row_sizes).to(dtype)


def test_what_is_remembered_changes_no_bit():
    """Of gradients whose layout, dtype, number or place among the others changes."""
    model, rule = stack(), AGC(clipping=0.7)
    given = agc_torch.plan(model, AGC(clipping=0.6))

    def check(plan: Any = None) -> None:
        fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            fresh[name].grad_dtype = None
            fresh[name].grad = None if p.grad is None else p.grad.clone()
        expected = agc_torch.adaptive_clip_grad_(
            fresh, rule, plan=plan or agc_torch.plan(model, rule)
        )
        stats = agc_torch.adaptive_clip_grad_(model, rule, plan=plan)
        assert stats.parameters() == expected.parameters()
        assert 0 < stats.total().clipped < stats.units
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.equal(p.grad, fresh[name].grad)

    for dtype in (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float32):
        drawn_(model, dtype)
        check()
    drawn_(model, torch.float32)
    model[5].weight.grad = model[5].weight.grad.contiguous()
    model[3].weight.grad = model[3].weight.grad.t().contiguous().t()
    check()
    drawn_(model, torch.float32)
    model[0].weight.grad = model[4].bias.grad = None
    check()
    for plan in (given, given, None):
        drawn_(model, torch.float32)
        check(plan)


def test_a_remembered_model_keeps_no_gradient():
    model = trained(stack())
    agc_torch.adaptive_clip_grad_(model, AGC())
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert all(gradient() is None for gradient in gradients)


def test_norms_come_in_the_order_of_views():
    """Of which two lengths of rows alternate, but not their numbers."""
    tensors = [torch.randn(shape) for shape in ((2, 5), (3, 7), (4, 5), (3, 7))]
    views = [View(tensor, Units("o i -> o").bind(tuple(tensor.shape))) for tensor in tensors]
    exact = torch.cat([torch.linalg.vector_norm(tensor.double(), 2, 1) for tensor in tensors])
    torch.testing.assert_close(all_norms(views, tensors, 0.0), exact)


def test_norms_of_equal_values_in_blocks():
    """Rounding, the same in all blocks, does not average out."""
    values = torch.linspace(1, 2, 501)[:-1, None] ** torch.tensor([1.0, 3.0])
    for length in (512, 768, 1024, 3072):
        layer = nn.Linear(length, 1000, bias=False)
        layer.weight.data = values.reshape(-1, 1).expand(-1, length).contiguous()
        layer.weight.grad = torch.ones_like(layer.weight)
        stats = agc_torch.adaptive_clip_grad_(layer, AGC(clipping=0.01))
        (numbers,) = stats._numbers
        exact = torch.linalg.vector_norm(layer.weight.detach().double(), 2, 1)
        error = (numbers.floor / exact - 1).abs().max() / torch.finfo(torch.float32).eps
        assert error < 1.5


# Telemetry


def test_telemetry(path):
    stats = agc_torch.adaptive_clip_grad_(model_of(), AGC())
    assert list(stats.parameters()) == [name for name in SHAPES if name != "empty"]
    assert "units" in repr(stats)
    for value in (stats.clipped, stats.nonfinite, stats.max_ratio, stats.min_scale):
        assert isinstance(value, Tensor)
        assert value.shape == ()


def test_telemetry_keeps_no_gradient():
    parameters = model_of()
    stats = agc_torch.adaptive_clip_grad_(parameters, AGC())
    gradients = [weakref.ref(p.grad) for p in parameters.values()]
    for p in parameters.values():
        p.grad = None
    gc.collect()
    assert all(gradient() is None for gradient in gradients)
    assert stats.total().units > 0


# Cost

SCHEDULE = Schedule([(0, 0.5), (4, 0.1)])
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
@pytest.mark.parametrize("how", ["by hand", "attached"])
def test_an_accelerator_is_not_waited_for(how, policy):
    """On pretended CUDA tensors, whose values nobody can know."""
    rule = AGC(clipping={"conv": SCHEDULE, "*": 0.02}, nonfinite=policy)
    with FakeTensorMode(), NoWaiting():
        parameters = {
            name: nn.Parameter(torch.empty(shape, device="cuda:0"))
            for name, shape in SHAPES.items()
        }
        optimizer = torch.optim.SGD(parameters.values(), 0.1, momentum=0.9)
        # A schedule would read the count of steps, which is on the host, but pretended here too.
        handle = agc_torch.attach(optimizer, parameters, AGC(nonfinite=policy))
        for p in parameters.values():
            p.grad = torch.empty_like(p)
        if how == "by hand":
            step = torch.zeros((), dtype=torch.int64, device="cuda:0")
            stats = agc_torch.adaptive_clip_grad_(parameters, rule, step=step)
        else:
            optimizer.step()
            optimizer.step()
            stats = handle.stats()
        scalars = (stats.clipped, stats.nonfinite, stats.max_ratio, stats.min_scale)
        assert {value.device.type for value in scalars} == {"cuda"}


def test_replays_count_steps(monkeypatch):
    """A recorded step, run again and again as a CUDA graph is, goes on along its schedule."""
    never_look_at_values(monkeypatch)
    rule = AGC(clipping=SCHEDULE)
    parameters = model_of()
    optimizer = torch.optim.SGD(parameters.values(), lr=0)
    optimizer.param_groups[0]["capturable"] = True  # as Adam's, which takes tensors of a GPU alone
    handle = agc_torch.attach(optimizer, parameters, rule)
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    recorded = make_fx(lambda: optimizer.step())()
    for step in range(1, 6):
        for name, p in parameters.items():
            p.grad.copy_(gradients[name])
        want = by_reference(parameters, rule, step)
        with torch.no_grad():
            recorded()
        assert handle.steps == step + 1
        check_gradients(gradient_arrays(parameters), want)


def test_the_count_of_steps_goes_where_capturable_wants_it():
    """Which may be set, and the parameters may move, after AGC was attached."""
    weight = nn.Parameter(torch.empty(2, 3, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.SGD([weight], 0.1)
    handle = agc_torch.attach(optimizer, {"weight": weight}, AGC(clipping=SCHEDULE))
    optimizer.step()
    assert handle._steps.device.type == "cpu"
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    assert handle._steps.device.type == "meta"


@pytest.mark.parametrize(
    ("clipping", "capturable", "recorded"),
    [
        (0.1, False, True),
        (SCHEDULE, False, False),
        (SCHEDULE, True, True),
        (lambda step: 0.1, True, False),
    ],
    ids=["constant", "on the host", "on the device", "any function"],
)
def test_what_a_cuda_graph_would_freeze_is_refused(clipping, capturable, recorded, monkeypatch):
    never_look_at_values(monkeypatch)
    parameters = model_of()
    optimizer = torch.optim.SGD(parameters.values(), lr=0)
    optimizer.param_groups[0]["capturable"] = capturable
    agc_torch.attach(optimizer, parameters, AGC(clipping=clipping))
    optimizer.step()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    if not capturable:  # as a count on the host is read
        monkeypatch.setattr("agc_torch.schedules.on_host", lambda device: True)
    with nullcontext() if recorded else pytest.raises(ConfigError, match=r"for ever.*capturable"):
        optimizer.step()


def test_reading_telemetry_is_what_waits(monkeypatch):
    never_look_at_values(monkeypatch)
    parameters = model_of()
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
