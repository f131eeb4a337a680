"""The kernels compiled for GPUs that this machine need not have: registers, memory, wide loads."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import agc_torch
from agc import AGC
from agc.nfnet import WsDtype
from agc_torch import fused, triton_kernels
from agc_torch.nfnet import nfnet
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
    return built.asm["ptx"], used(built.asm["cubin"])


def used(binary: bytes) -> dict[str, int]:
    """Return registers and bytes of stack and local memory of a compiled kernel."""
    file = Path(f"{id(binary)}.cubin")
    file.write_bytes(binary)
    report = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


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


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", [(256, 1), (1, 1024)])
def test_decisions(shape: tuple[int, int], capability: int) -> None:
    constants = dict(zip(("SUMS", "PIECES"), shape, strict=True))
    for kernel in (triton_kernels.decide_kernel, triton_kernels.share_kernel):
        _, uses = build(kernel, constants, capability)
        assert uses["LOCAL"] == uses["STACK"] == 0
        assert uses["REG"] <= 72


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
