"""The kernels in Triton's interpreter, on the CPU, against the float64 reference."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from agc import AGC, Units
from agc.nfnet import Conv, WsDtype, WsEps, seeded_parameters
from agc.reference import adaptive_clip
from agc.reference.nfnet import NFNet
from agc_conformance.backend import Backend
from agc_conformance.backends.torch.backend import TorchBackend
from agc_conformance.runner import run_case
from agc_conformance.vectors import load_vectors
from agc_conformance.verdict import ulp, ulp_error
from agc_torch import adaptive_clip_grad_, fused, plan, triton_kernels
from agc_torch.nfnet import WSConv2d
from tests.contract.clip import ClipContract, VectorsContract
from tests.helpers import draw
from tests.torch.driver import TorchDriver

# NumPy, by which the interpreter computes, warns of what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|underflow):RuntimeWarning")

LIMITS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 8}


WAYS = ("float64 sums", "float32 sums")
"""Of the two kinds of GPU."""


def on_kernels(patch: pytest.MonkeyPatch, way: str) -> None:
    """Take the CPU for a GPU."""
    patch.setattr(fused, "available", lambda device: True)
    patch.setattr(fused, "_float64_is_fast", lambda device: way == "float64 sums")
    fused.table.cache_clear()
    fused._standardising_compiles.cache_clear()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch, request.param)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch, WAYS[0])


class KernelDriver(TorchDriver):
    clip_ways = ("host", *WAYS)
    accurate_ways = clip_ways

    @contextmanager
    def clipping(self, way: str) -> Iterator[Backend]:
        with pytest.MonkeyPatch.context() as patch:
            if way != "host":
                on_kernels(patch, way)
            yield TorchBackend()


class TestClip(ClipContract):
    driver = KernelDriver()


class TestVectors(VectorsContract):
    driver = KernelDriver()


@dataclass(frozen=True)
class Case:
    """A parameter: its shape and units, and how the two tensors lie in memory."""

    shape: tuple[int, ...]
    units: str
    weight: Callable[[Tensor], Tensor] = torch.clone
    gradient: Callable[[Tensor], Tensor] = torch.clone
    scale: float = 1.0
    rule: dict[str, Any] = field(default_factory=dict)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def unaligned(tensor: Tensor) -> Tensor:
    flat = tensor.new_empty(tensor.numel() + 1)[1:]
    return flat.copy_(tensor.flatten()).view(tensor.shape)


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


CASES = {
    "fan-in 4608": Case((6, 512, 3, 3), "o i h w -> o"),
    "fan-in 27": Case((40, 3, 3, 3), "o i h w -> o"),
    "fan-in 144": Case((5, 16, 3, 3), "o i h w -> o"),
    "fan-in 288": Case((5, 32, 3, 3), "o i h w -> o"),
    "fan-in 576": Case((5, 64, 3, 3), "o i h w -> o"),
    "fan-in 1152": Case((5, 128, 3, 3), "o i h w -> o"),
    "ragged": Case((37, 131), "o i -> o"),
    "bias": Case((70,), "... ->"),
    "scalar": Case((), "... ->"),
    "vector of rank 3": Case((1, 1, 64), "... ->"),
    "whole, in 10 pieces": Case((300, 1000), "... ->"),
    "whole, in 40 pieces": Case((40, 1 << 15), "... ->"),
    "rows in 3 pieces": Case((3, 70_000), "o i -> o"),
    "columns in 3 pieces": Case((700, 130), "i o -> o"),
    "columns, unaligned": Case((30, 20), "i o -> o", unaligned, unaligned),
    "transposed": Case((20, 30), "o i -> o", transposed, transposed),
    "transposed weight": Case((20, 30), "o i -> o", transposed),
    "transposed gradient": Case((20, 30), "i o -> o", gradient=transposed),
    "transposed convolution": Case((8, 6, 3, 3), "(g=2 i) o h w -> g o"),
    "channels last": Case((6, 8, 3, 3), "o i h w -> o", channels_last, channels_last),
    "channels last weight": Case((6, 8, 3, 3), "o i h w -> o", channels_last),
    "unaligned": Case((6, 40), "o i -> o", unaligned, unaligned),
    "unaligned gradient": Case((6, 400), "o i -> o", gradient=unaligned),
    "every element": Case((4, 6), "a b -> a b"),
    "experts": Case((3, 8, 20), "l i o -> l o"),
    "depthwise": Case((9, 1, 3, 3), "o i h w -> o"),
    "no weights": Case((5, 70), "o i -> o", torch.zeros_like),
    "1e30": Case((5, 70), "o i -> o", scale=1e30),
    "1e-30": Case((5, 70), "o i -> o", scale=1e-30, rule={"eps": 1e-35}),
    "subnormal": Case((5, 70), "o i -> o", scale=1e-40, rule={"eps": 1e-45}),
    "float16": Case((5, 72), "o i -> o", to(torch.float16), to(torch.float16)),
    "bfloat16": Case((5, 72), "o i -> o", to(torch.bfloat16), to(torch.bfloat16)),
    "float64": Case((5, 72), "o i -> o", to(torch.float64), to(torch.float64)),
    "bfloat16 gradient": Case((5, 72), "o i -> o", gradient=to(torch.bfloat16)),
    "float64 gradient": Case((5, 72), "o i -> o", gradient=to(torch.float64)),
}  # fmt: skip


def parameter(case: Case, seed: int = 0) -> Tensor:
    """Return a parameter with a gradient of which some units are clipped."""
    w, g = (case.scale * torch.tensor(a).float() for a in draw(case.shape, seed, small=True))
    made = case.weight(w).requires_grad_()
    made.grad_dtype = None  # a gradient of any dtype
    made.grad = case.gradient(g)
    return made


def expect(parameters: dict[str, Tensor], rule: AGC) -> dict[str, np.ndarray]:
    """Return the reference's clipped gradients."""
    weights = {name: p.detach().double().numpy() for name, p in parameters.items()}
    raw = {name: p.grad.double().numpy() for name, p in parameters.items()}
    return dict(adaptive_clip(weights, raw, plan(parameters, rule), rule).gradients)


def clip(parameters: dict[str, Tensor], rule: AGC) -> None:
    """Clip, and compare gradients with the reference."""
    expected = expect(parameters, rule)
    raw = {name: p.grad.clone() for name, p in parameters.items()}
    adaptive_clip_grad_(parameters, rule)
    for name, p in parameters.items():
        dtype = str(p.grad.dtype).removeprefix("torch.")
        errors = ulp_error(p.grad.double().numpy(), expected[name], dtype)
        assert errors.max() <= LIMITS[p.grad.dtype], name
        same = torch.tensor(expected[name] == raw[name].double().numpy())
        assert torch.equal(p.grad[same], raw[name][same]), name


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layouts_and_dtypes(case: Case) -> None:
    clip({"p": parameter(case)}, AGC(clipping=0.02, units={"p": case.units}, **case.rule))


@pytest.mark.usefixtures("way")
def test_everything_in_one_call() -> None:
    parameters = {name: parameter(case, seed) for seed, (name, case) in enumerate(CASES.items())}
    units = {name: case.units for name, case in CASES.items()}
    clip(parameters, AGC(clipping=0.02, units=units, eps=1e-6))


def test_tensors_without_memory_take_the_other_path() -> None:
    axes = Units("o i -> o").bind((4, 6))
    assert fused.part_of(torch.ones(4, 6), axes) is not None
    with FakeTensorMode():
        assert fused.part_of(torch.ones(4, 6), axes) is None
    for hole in (torch.ones(4, 12)[:, ::2], torch.ones(4, 1).expand(4, 6)):
        assert fused.part_of(hole, axes) is None
    assert fused.part_of(torch.ones(0, 6), Units("o i -> o").bind((0, 6))) is None


@pytest.mark.usefixtures("way")
def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: fused.Table) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(fused.Table, "compile", fail)
    monkeypatch.setenv("AGC_TORCH_TRITON", "1")
    case = CASES["ragged"]
    with pytest.warns(RuntimeWarning, match="do not compile here.*OSError: no compiler"):
        clip({"p": parameter(case)}, AGC(clipping=0.02, units={"p": case.units}))
    assert os.environ["AGC_TORCH_TRITON"] == "0"


SAM_CASES = {
    "matrix": (64, 80),
    "ragged": (37, 131),
    "vector": (70,),
    "scalar": (),
    "two pieces": (3, 7000),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sam_moves_weights(dtypes: tuple[torch.dtype, ...], poisoned: bool, adaptive: bool) -> None:
    moves = []
    for seed, shape in enumerate(SAM_CASES.values()):
        w, g = (
            torch.tensor(a).to(dtype) for a, dtype in zip(draw(shape, seed), dtypes, strict=True)
        )
        moves.append(fused.Move(w, g, adaptive and w.ndim >= 2))
    moves.append(fused.Move(transposed(moves[0].weight), transposed(moves[0].gradient), adaptive))
    before = [move.weight.clone() for move in moves]
    if poisoned:
        moves[1].gradient[2] = math.nan
    factor = torch.tensor(0.0 if poisoned else 1e-3, dtype=torch.float64)
    products = [
        (m.weight.double().abs() + 0.01 if m.adaptive else 1.0) * m.gradient.double() for m in moves
    ]
    norm = torch.cat([product.flatten() for product in products]).norm()
    made = fused.Moves(moves, 0.01)
    tensors = [move.weight for move in moves], [move.gradient for move in moves]
    torch.testing.assert_close(made.norm(*tensors), norm, rtol=1e-14, atol=0, equal_nan=True)
    copies = made.perturb(*tensors, factor)
    for move, old, copy in zip(moves, before, copies, strict=True):
        assert copy.stride() == move.weight.stride()
        assert torch.equal(copy, old)
        scale = (old.double().abs() + 0.01) ** 2 if move.adaptive else 1.0
        step = torch.zeros(()) if poisoned else 1e-3 * scale * move.gradient.double()
        expected = old.double() + step
        size = torch.maximum(old.double().abs(), step.abs()).numpy()
        dtype = str(old.dtype).removeprefix("torch.")
        errors = np.abs(move.weight.double().numpy() - expected.numpy()) / ulp(size, dtype)
        # Roundings of the factor, and of each product and sum, of which ASAM has five.
        assert errors.max() <= (0 if poisoned else 5 if adaptive else 3)


def test_sam_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once, and steps as on a CPU."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    vector, dtype = SAM_VECTORS["L1-sam-restore-adaptive:float32"]
    monkeypatch.setattr(fused, "_triton_is_installed", lambda: True)
    monkeypatch.setenv("AGC_TORCH_TRITON", "1")
    monkeypatch.setattr(
        fused, "available", lambda device: os.environ.get("AGC_TORCH_TRITON") != "0"
    )
    monkeypatch.setattr(triton_kernels.perturb_kernel, "run", fails)
    fused._moving_compiles.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiler here") as warned:
        record = run_case(TorchBackend("cpu"), vector, dtype)
    fused._moving_compiles.cache_clear()
    assert record["status"] == "passed", record.get("detail")
    assert len(warned) == 1


FILTERS = {
    "stem": (16, 3, 3, 3),
    "stem, 16 inputs": (32, 16, 3, 3),
    "grouped": (5, 128, 3, 3),
    "depth 1": (9, 1, 3, 3),
    "one weight": (3, 1, 1, 1),
    "1x1": (5, 128, 1, 1),
    "1x1, wide": (3, 1536, 1, 1),
    "7x7": (6, 3, 7, 7),
    "longest of NF-ResNets": (2, 512, 3, 3),
    "ragged": (37, 5, 3, 3),
}


class Standardised(WSConv2d):
    """Gives its weight."""

    def __init__(
        self,
        weight: Tensor,
        gain: Tensor,
        ws_eps: WsEps = "deepmind",
        ws_dtype: WsDtype = "float32",
    ) -> None:
        outputs, inputs, kernel, _ = weight.shape
        super().__init__(Conv("conv", inputs, outputs, kernel), ws_eps, ws_dtype, device="meta")
        self.weight, self.gain = nn.Parameter(weight), nn.Parameter(gain)

    def forward(self) -> Tensor:
        return self.standardised(torch.bfloat16 if self.ws_dtype == "bfloat16" else None)


def filters(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight of which a filter is below the floor, a gain, and a gradient."""
    weight, gradient = (torch.tensor(a) + 0.3 for a in draw(shape))
    weight[1] *= 1e-4
    return weight, torch.tensor(draw(shape[:1])[0]) + 0.3, gradient / 100


@dataclass
class Wanted:
    """Numbers of the float64 reference, and the sum of the magnitudes of what each adds up."""

    value: Tensor
    size: Tensor

    def check(self, found: Tensor, limit: float) -> None:
        dtype = str(found.dtype).removeprefix("torch.")
        error = np.abs(found.detach().double().numpy() - self.value.numpy())
        assert (error / ulp(self.size.expand_as(self.value).numpy(), dtype)).max() <= limit


def reference(
    weight: Tensor, gain: Tensor, gradient: Tensor, ws_eps: WsEps
) -> tuple[Wanted, Wanted, Wanted]:
    """Return the standardised weight, and the gradients of weight and gain."""
    weight, gain, gradient = (t.detach().double() for t in (weight, gain, gradient))
    axes, (count, *rest) = (1, 2, 3), weight.shape
    length = math.prod(rest)
    mean = weight.mean(axes, keepdim=True)
    centred = weight - mean
    squared = centred.square().sum(axes, keepdim=True)
    if ws_eps == "deepmind":
        neutral = (t.permute(2, 3, 1, 0).numpy() for t in (weight, gradient))
        made = NFNet("micro", seeded_parameters("micro"))
        value, backward = made.standardise(next(neutral), gain.numpy())
        backs = backward(next(neutral))
        out, of_weight = (torch.from_numpy(a).permute(3, 2, 0, 1) for a in (value, backs[0]))
        of_gain = torch.from_numpy(backs[1])
        scale, depends = squared.clamp(min=1e-4).rsqrt(), squared > 1e-4
    else:
        weight.requires_grad_(), gain.requires_grad_()
        scale, depends = (squared + length * 1e-5).rsqrt(), squared >= 0
        mine = weight - weight.mean(axes, keepdim=True)
        norm = (mine.square().sum(axes, keepdim=True) + length * 1e-5).sqrt()
        out = gain.view(-1, 1, 1, 1) * mine / norm
        of_weight, of_gain = torch.autograd.grad(out, (weight, gain), gradient)
    factor = gain.detach().abs().view(count, 1, 1, 1) * scale
    weight, out = weight.detach(), out.detach()
    along = (gradient * centred).abs().sum(axes, keepdim=True)
    sizes = weight.abs() + weight.abs().mean(axes, keepdim=True)
    norms = depends * scale**2 * along * sizes
    back = gradient.abs() + gradient.abs().mean(axes, keepdim=True) + norms
    by_gain = (gradient.abs() * sizes).sum(axes) * scale.flatten()
    return (
        Wanted(out, factor * sizes),
        Wanted(of_weight, factor * back),
        Wanted(of_gain, by_gain),
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", FILTERS.values(), ids=FILTERS)
def test_standardisation(shape: tuple[int, ...], dtype: torch.dtype, ws_eps: WsEps) -> None:
    weight, gain, gradient = (t.to(dtype) for t in filters(shape))
    expected = reference(weight, gain, gradient, ws_eps)
    for arrange in (torch.clone, channels_last, unaligned):
        conv = Standardised(arrange(weight), gain.clone(), ws_eps)
        out = conv.standardised()
        assert type(out.grad_fn).__name__ == "_FusedBackward"
        assert out.stride() == conv.weight.stride()
        out.backward(gradient)
        with torch.no_grad():
            assert torch.equal(conv.standardised(), out)
        found = (out, conv.weight.grad, conv.gain.grad)
        for name, ours, wanted in zip(("out", "weight", "gain"), found, expected, strict=True):
            assert ours.dtype == dtype, name
            wanted.check(ours, LIMITS[dtype])


@pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", FILTERS.values(), ids=FILTERS)
def test_standardisation_in_bfloat16(
    shape: tuple[int, ...], dtype: torch.dtype, ws_eps: WsEps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is rounded is rounded as without kernels: but for sums close to a tie, all is equal."""
    weight, gain, gradient = (t.to(dtype) for t in filters(shape))
    gradient = gradient.bfloat16()

    def run(arrange: Callable[[Tensor], Tensor], made_by: str) -> tuple[Tensor, ...]:
        conv = Standardised(arrange(weight), gain.clone(), ws_eps, "bfloat16")
        out = conv()
        assert type(out.grad_fn).__name__ == made_by
        assert out.dtype == torch.bfloat16
        out.backward(arrange(gradient))
        with torch.no_grad():
            again = conv()
        assert torch.equal(again, out)
        if made_by == "_FusedBackward":
            assert again.stride() == out.stride() == conv.weight.stride()
        return out.detach(), conv.weight.grad, conv.gain.grad

    expected = run(torch.clone, "ToCopyBackward0")
    on_kernels(monkeypatch, WAYS[0])
    for arrange in (torch.clone, channels_last):
        for ours, wanted in zip(run(arrange, "_FusedBackward"), expected, strict=True):
            assert (ours == wanted).float().mean() > 0.95
            torch.testing.assert_close(ours, wanted, rtol=0.02, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("ws_dtype", ["float32", "bfloat16"])
def test_standardisation_of_what_is_not_finite(ws_dtype: WsDtype) -> None:
    """It stays in its filter."""
    weight, gain, _ = filters((5, 8, 3, 3))
    weight, gain = weight.float(), gain.float()
    weight[2, 3] = math.nan
    out = fused.standardise(weight, gain, "deepmind", ws_dtype)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.usefixtures("kernels")
def test_derivatives_that_the_kernels_do_not_have() -> None:
    """Second ones, and those of many gradients at once, are derived from the formula."""
    weight, gain, gradient = filters((5, 8, 3, 3))
    conv = Standardised(weight, gain)
    inputs = conv.weight, conv.gain

    def run(weight: Tensor, gain: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight, "gain": gain}, ())

    assert torch.autograd.gradgradcheck(run, inputs, eps=1e-8, atol=1e-3)
    out = run(*inputs)
    assert type(out.grad_fn).__name__ == "_FusedBackward"
    both = torch.stack([gradient, 2 * gradient])
    many = torch.autograd.grad(out, inputs, both, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(out, inputs, gradient)
    for ours, wanted in zip(many, once, strict=True):
        torch.testing.assert_close(ours, torch.stack([wanted, 2 * wanted]))
    found = torch.func.vmap(run, (0, None))(torch.stack([weight, 2 * weight]), gain)
    torch.testing.assert_close(found[0], out)


@pytest.mark.usefixtures("kernels")
def test_many_gradients_at_once_in_bfloat16() -> None:
    weight, gain, gradient = (t.float() for t in filters((5, 8, 3, 3)))
    conv = Standardised(weight, gain, "deepmind", "bfloat16")
    out, inputs = conv(), (conv.weight, conv.gain)
    gradient = gradient.bfloat16()
    many = torch.autograd.grad(
        out, inputs, gradient[None], is_grads_batched=True, retain_graph=True
    )
    once = torch.autograd.grad(out, inputs, gradient)
    for ours, wanted in zip(many, once, strict=True):
        torch.testing.assert_close(ours[0], wanted, rtol=0.02, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_weights_that_the_kernels_do_not_take() -> None:
    weight, gain, _ = filters((5, 8, 3, 3))
    how: tuple[WsEps, WsDtype] = ("deepmind", "float32")
    assert fused.standardises(weight, gain, *how)
    assert not fused.standardises(weight, gain, "deepmind", "bfloat16")  # float64 has no use for it
    long = torch.ones(1, 1000, 3, 3)
    for other in (weight[:, ::2], weight.permute(1, 0, 3, 2), weight[:, :0], weight.float(), long):
        assert not fused.standardises(other, gain, *how)
    with FakeTensorMode():
        assert not fused.standardises(torch.ones(5, 8, 3, 3), torch.ones(5), *how)


def test_standardisation_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once, and takes PyTorch's kernels."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    on_kernels(monkeypatch, WAYS[0])
    monkeypatch.setenv("AGC_TORCH_TRITON", "1")
    monkeypatch.setattr(
        fused, "available", lambda device: os.environ.get("AGC_TORCH_TRITON") != "0"
    )
    monkeypatch.setattr(triton_kernels.standardise_kernel, "run", fails)
    conv = Standardised(*(t.float() for t in filters((5, 8, 3, 3))[:2]))
    with pytest.warns(RuntimeWarning, match="no compiler here") as warned:
        found = [conv.standardised() for _ in range(2)]
    fused._standardising_compiles.cache_clear()
    assert len(warned) == 1
    assert type(found[1].grad_fn).__name__ == "_StandardiseBackward"


SAM_VECTORS = {
    f"{vector.id}:{dtype}": (vector, dtype)
    for vector in load_vectors()
    if vector.id.startswith("L1-sam-")
    for dtype in vector.dtypes()
    if dtype in TorchBackend.dtypes
}


@pytest.mark.parametrize("name", SAM_VECTORS)
def test_vectors_of_sam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch, WAYS[0])
    record = run_case(TorchBackend("cpu"), *SAM_VECTORS[name])
    assert record["status"] == "passed", record.get("detail")
