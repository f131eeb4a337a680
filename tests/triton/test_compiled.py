"""The kernels compiled for GPUs that this machine need not have.

Registers, memory, wide loads, exact arithmetic; and that nothing is compiled late.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource

import agc_torch
from agc import AGC, Units
from agc.nfnet import WsDtype
from agc_torch import fused, triton_kernels
from agc_torch.clip import clip_
from agc_torch.nfnet import nfnet
from agc_torch.shards import Held
from agc_torch.units import resolve
from agc_torch.views import ShardUnits
from benchmarks.shapes import gpt2_small

CAPABILITIES = (80, 90, 120)
"""A100, H100, RTX 50."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TYPES = {
    **dict.fromkeys(("addresses", "sizes", "places", "firsts", "counts"), "*i64"),
    **dict.fromkeys(("tiles", "chosen", "pairs", "rules", "order", "starts"), "*i32"),
    **dict.fromkeys(("sums", "factors", "thresholds", "grad_scale", "numbers", "shares"), "*fp64"),
    **dict.fromkeys(("factor", "eta"), "*fp64"),
    **dict.fromkeys(("count", "gradients", "units", "tensors", "filters", "length"), "i32"),
    **dict.fromkeys(("eps", "div_eps"), "fp64"),
}
"""Types of the kernels' arguments; the others are constants."""
ORDERS = {
    "short rows": (64, 64, 1, 1),
    "rows": (64, 1024, 1, 1),
    "long rows": (4, 1 << 16, 1, 1),
    "columns": (1, 64, 64, 1),
    "gather": (2, 4, 6, 9),
}
REGISTERS = {"short rows": 184, "rows": 72, "long rows": 64, "columns": 128, "gather": 216}
"""Most that a thread may use. Short rows that are not aligned and gathered ones are rare."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = dict(zip(DTYPES, ("fp32", "bf16", "fp16", "fp64"), strict=True))
WEIGHTS = ("weight", "gain", "out", "gradient", "of_weight", "of_gain")
FILTERS = {9: False, 27: False, 144: True, 1152: True, 1536: True, 4608: True}
"""Lengths of filters, and whether they allow wide loads."""


def build(
    kernel: Any,
    constants: dict[str, Any],
    capability: int,
    types: Mapping[str, str] = TYPES,
    multiples: Sequence[str] = (),
    warps: int = 4,
) -> tuple[str, dict[str, int]]:
    """Return the PTX of a kernel, and what it uses; ``multiples`` are sizes divisible by 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    places = {name: (place,) for place, name in enumerate(names)}
    source = ASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {
            places[name]: [["tt.divisibility", 16]]
            for name in names
            if signature[name].startswith("*") or name in multiples
        },
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    ptx = built.asm["ptx"]
    # Float32 has fast divisions and roots that are not exact, and may flush subnormal numbers to 0.
    assert not [one for one in arithmetic(ptx) if re.search(r"approx|full|ftz", one)]
    return ptx, used(built.asm["cubin"])


def arithmetic(ptx: str) -> set[str]:
    """Return the operations on floating-point numbers in a kernel, such as ``add.f32``."""
    return set(re.findall(r"\b[a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.b?f\d+(?:x2)?\b", ptx))


def used(binary: bytes) -> dict[str, int]:
    """Return registers and bytes of stack and local memory of a compiled kernel."""
    file = Path(f"{id(binary)}.cubin")
    file.write_bytes(binary)
    report = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def computing(ptx: str) -> set[str]:
    """Return the operations of a kernel that may round; to nearest, which some releases spell."""
    return {
        one.replace(".rn", "")
        for one in arithmetic(ptx)
        if not re.match(r"ld|st|mov|cvt|setp|selp|neg|abs", one)
    }


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "dtype", "aligned"),
    [
        (name, dtype, aligned)
        for name, dtype, aligned in product(ORDERS, DTYPES, (True, False))
        if not (name == "gather" and aligned)
    ],
)
def test_tiles(name: str, dtype: torch.dtype, aligned: bool, capability: int) -> None:
    part = fused.Part(ORDERS[name], dtype, aligned, exact=False)
    assert (part.lanes > 1) == aligned
    constants = fused.constants(part.kind)
    kernels = [
        (triton_kernels.norms_kernel, {"EXACT": True}),
        (triton_kernels.scale_kernel, {"ZERO": False}),
    ]
    if capability == 120:  # where float64 is slow
        kernels[0][1]["EXACT"] = dtype == torch.float64
    for kernel, options in kernels:
        ptx, uses = build(kernel, {**constants, **options}, capability)
        # Float64 is a function call on a GPU that has few units for it.
        assert uses["LOCAL"] == 0
        assert uses["STACK"] == 0 or capability == 120
        assert uses["REG"] <= (64 if aligned else REGISTERS[name])
        wide = {"ld.global.v4.b32"} if dtype != torch.float64 else {"ld.global.v2.b64"}
        if aligned:
            assert wide <= set(re.findall(r"ld\.global[.\w]+", ptx))
        if aligned and kernel is triton_kernels.scale_kernel:
            assert "st.global.v" in ptx
        if kernel is triton_kernels.scale_kernel:
            assert computing(ptx) == {"mul.f64"}  # one rounding, and one to the dtype
        elif options["EXACT"]:
            assert computing(ptx) <= {"fma.f64", "mul.f64", "add.f64", "min.f64", "max.f64"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", [(256, 1), (1, 1024)])
def test_decisions(shape: tuple[int, int], capability: int) -> None:
    constants = dict(zip(("SUMS", "PIECES"), shape, strict=True))
    for kernel in (triton_kernels.decide_kernel, triton_kernels.share_kernel):
        ptx, uses = build(kernel, constants, capability)
        assert uses["LOCAL"] == uses["STACK"] == 0
        assert uses["REG"] <= 72
        exact = {"add.f64"}
        if kernel is triton_kernels.decide_kernel:
            exact |= {"mul.f64", "div.f64", "sqrt.f64"}
        assert computing(ptx) == exact


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_perturbation(dtype: torch.dtype, adaptive: bool, capability: int) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    kind = fused.Move(weight, weight.clone(), adaptive).kind
    ptx, uses = build(triton_kernels.perturb_kernel, kind.constants, capability)
    assert uses["LOCAL"] == uses["STACK"] == 0
    assert uses["REG"] <= 64
    assert "ld.global.v" in ptx
    assert "st.global.v" in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm_of_gradients(dtype: torch.dtype, adaptive: bool, capability: int) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    kind = fused.Move(weight, weight.clone(), adaptive).kind
    ptx, uses = build(triton_kernels.norm_kernel, kind.constants, capability)
    assert uses["LOCAL"] == uses["STACK"] == 0
    assert uses["REG"] <= 64
    assert "ld.global.v" in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("length", "wide"), FILTERS.items())
@pytest.mark.parametrize(
    ("dtype", "ws_dtype"),
    [*((dtype, "float32") for dtype in DTYPES), *((dtype, "bfloat16") for dtype in DTYPES[:2])],
)
def test_standardisation(
    dtype: torch.dtype, ws_dtype: WsDtype, length: int, wide: bool, capability: int
) -> None:
    kind = fused.Filters(dtype, length, "deepmind", ws_dtype)
    constants = kind.constants
    warps = constants.pop("num_warps")
    types = {**TYPES, **dict.fromkeys(WEIGHTS, f"*{NAMES[dtype]}")}
    types |= dict.fromkeys(("out", "gradient"), f"*{NAMES[kind.out]}")
    most = (
        144 if not wide else 128 if dtype == torch.float64 else 72 if ws_dtype == "float32" else 84
    )
    for kernel in kind.kernels:
        ptx, uses = build(kernel, constants, capability, types, ["length"] if wide else [], warps)
        assert uses["LOCAL"] == uses["STACK"] == 0
        assert uses["REG"] <= most
        if wide:
            vector = "v2.b64" if dtype == torch.float64 else "v4.b32"
            assert {f"ld.global.{vector}", f"st.global.{vector}"} <= set(
                re.findall(r"(?:ld|st)\.global[.\w]+", ptx)
            )


def launches(model: Any, rule: AGC) -> int:
    """Return how many kernels clip a model."""
    tensors = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else model
    parts = []
    for entry in agc_torch.plan(model, rule):
        if entry.clipped:
            part = fused.part_of(tensors[entry.name].view(entry.axes.view), entry.axes)
            assert part is not None, entry.name
            parts.append((part, part))
    return fused.Table(parts, [0] * len(parts), torch.device("cpu")).launches


def test_a_handful_of_launches() -> None:
    with torch.device("meta"):
        f0 = nfnet("F0", 1000)
    assert launches(f0, AGC.profile("deepmind")) == 7
    shapes = gpt2_small()
    gpt2 = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    units = {n: "o i -> o" if len(shape) == 2 else "... ->" for n, shape in shapes.items()}
    assert launches(gpt2, AGC(clipping=0.01, units=units)) == 3


class Driver(DriverBase):  # type: ignore[misc]
    """Stands for the driver of a GPU: kernels are compiled, but neither loaded nor launched.

    Attributes
    ----------
    late : list of str
        Kernels that were loaded outside the check whether kernels compile.
    launched : list of str
    """

    def __init__(self) -> None:
        self.late: list[str] = []
        self.launched: list[str] = []
        self.checking = False
        self.utils = self

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        if not self.checking:
            self.late.append(name)
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(programs: int, *_: Any) -> None:
            self.launched += [metadata.name] * (programs > 0)

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any: ...

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def variants(name: str) -> int:
    """Return how often a kernel was compiled; numbers that are not tensors have to be float64."""
    caches = getattr(triton_kernels, f"{name}_kernel").device_caches
    made = list(caches[0][0].values()) if 0 in caches else []
    for kernel in made:
        types = set(kernel.src.signature.values())
        assert not types & {"fp32", "fp16", "bf16"}
    return len(made)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Take tensors on the CPU for those of a GPU."""
    caches = (
        fused.table,
        fused.shared_table,
        fused._moving_compiles,
        fused._standardising_compiles,
    )
    kernels = [getattr(triton_kernels, name) for name in triton_kernels.__all__]

    def forget() -> None:
        for cached in caches:
            cached.cache_clear()
        for kernel in kernels:
            kernel.device_caches.clear()

    made, check = Driver(), fused._compiles

    def checked(*what: Any) -> bool:
        made.checking = True
        try:
            return check(*what)
        finally:
            made.checking = False

    forget()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(fused, "available", lambda device: True)
    monkeypatch.setattr(fused, "_compiles", checked)
    yield made
    forget()


COUNTS = (1, 2, 15, 16, 17)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_clipping_compiles_nothing_late(driver: Driver, nonfinite: Any) -> None:
    """Neither for another number of tensors or units, nor for the first scale of a loss."""
    rule = AGC(clipping=0.1, units={"*": "o i -> o"}, nonfinite=nonfinite)
    for count in COUNTS:
        parameters = {f"p{n}": torch.ones(count, 72) for n in range(count)}
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        pairs = resolve(parameters, rule)[1]
        for scale in (None, torch.tensor(2.0), torch.ones(2, dtype=torch.float64)[1]):
            clip_(pairs, rule, grad_scale=scale)
    assert driver.late == []
    assert driver.launched.count("scale_kernel") == 3 * len(COUNTS)
    assert [variants(name) for name in ("norms", "decide", "scale")] == [1, 1, 2]


def test_shards_compile_nothing_late(driver: Driver) -> None:
    cpu = torch.device("cpu")
    for count in COUNTS:
        axes = Units("o i -> o").bind((count, 72))
        weight, gradient = torch.ones(2, count, 72)
        units = ShardUnits(axes, Held((), first=True))
        part = fused.part_of(weight, axes)
        assert part is not None
        table = fused.shared_table((fused.Member(part, part, units, units, 0),), (count,), cpu)
        assert table is not None
        addresses = table.upload([weight.data_ptr(), gradient.data_ptr()])
        table.scale(table.decide(addresses, table.shares(addresses), [0.1], eps=1e-3), zero=False)
    assert driver.late == []
    assert driver.launched.count("share_kernel") == len(COUNTS)
    assert [variants(name) for name in ("norms", "share", "decide", "scale")] == [1, 1, 1, 2]


def test_sam_compiles_nothing_late(driver: Driver) -> None:
    factor = torch.tensor(0.5, dtype=torch.float64)
    for count in COUNTS:
        moves = [fused.Move(torch.ones(9, 8), torch.ones(9, 8), False) for _ in range(count)]
        assert all(move.fits for move in moves)
        way = fused.Moves(moves, 0.0)
        weights, gradients = [move.weight for move in moves], [move.gradient for move in moves]
        way.norm(weights, gradients)
        way.perturb(weights, gradients, factor, [])
    assert driver.late == []
    assert driver.launched.count("perturb_kernel") == len(COUNTS)
    assert variants("norm") == variants("perturb") == 1


@pytest.mark.parametrize("ws_dtype", ["float32", "bfloat16"])
def test_standardisation_compiles_nothing_late(driver: Driver, ws_dtype: WsDtype) -> None:
    """Neither for another number of filters, nor for a weight or a gain that starts elsewhere."""
    how: Any = ("deepmind", ws_dtype)
    for count in COUNTS:
        size = count * 16 * 9
        for start, gain_start in ((0, 0), (0, 1), (1, 0)):
            weight = torch.ones(size + 1)[start : start + size].view(count, 16, 3, 3)
            gain = torch.ones(count + 1)[gain_start : gain_start + count]
            assert fused.standardises(weight, gain, *how)
            out: Tensor = fused.standardise(weight, gain, *how)
            fused.standardise_back(weight, gain, torch.ones_like(out), *how)
    assert driver.late == []
    assert len(driver.launched) == 3 * 2 * len(COUNTS)
    low = "_low" if ws_dtype == "bfloat16" else ""
    assert variants(f"standardise{low}") == variants(f"standardise{low}_back") == 2
