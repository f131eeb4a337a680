"""Bytes, kernels and collectives, read from lines as XLA prints them."""

from __future__ import annotations

import pytest

from agc.errors import FormatError
from agc_conformance.compiled.hlo import Collectives, Program, parse

HBM, VMEM = "f32[100,200]{1,0:T(8,128)}", "f32[100,200]{1,0:T(8,128)S(1)}"
PADDED = 4 * 104 * 256


def program(*lines: str, more: str = "") -> Program:
    body = "\n".join(f"  {line}" for line in lines)
    return parse(
        f"HloModule m, is_scheduled=true\n\n{more}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}"
    )


FUSIONS = """
%whole (p: f32[100,200]) -> f32[200] {
  %p = f32[100,200]{1,0:T(8,128)} parameter(0)
  %square = f32[100,200]{1,0:T(8,128)} multiply(%p, %p)
  ROOT %sum = f32[200]{0:T(256)} reduce(%square, %zero), dimensions={0}, to_apply=%add
}

%sliced (p.1: f32[100,200]) -> f32[8,128] {
  %p.1 = f32[100,200]{1,0:T(8,128)} parameter(0)
  %b = f32[100,200]{1,0:T(8,128)} bitcast(%p.1)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} slice(%b), slice={[0:8], [0:128]}
}

%both (p.4: f32[100,200]) -> (f32[200], s32[200]) {
  %p.4 = f32[100,200]{1,0:T(8,128)} parameter(0)
  ROOT %r = (f32[200]{0:T(256)}, s32[200]{0:T(256)}) reduce(%p.4, %i, %z, %z), dimensions={0}
}

%updated (p.2: f32[100,200], p.3: f32[8,128]) -> f32[100,200] {
  %p.2 = f32[100,200]{1,0:T(8,128)} parameter(0)
  %p.3 = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %update = f32[100,200]{1,0:T(8,128)} dynamic-update-slice(%p.2, %p.3, %zero, %zero)
}
"""
PIECE = "f32[8,128]{1,0:T(8,128)}"
CASES = {
    "a copy to the chip": (
        f"%s = ({VMEM}, {HBM}, u32[]{{:S(2)}}) copy-start(%a)",
        PADDED,
    ),
    "a copy on the chip": (f"%s = ({VMEM}, {VMEM}, u32[]{{:S(2)}}) copy-start(%b)", 0),
    "a slice to the chip": (
        f"%s = (({HBM}), f32[8,128]{{1,0:T(8,128)S(1)}}, s32[]{{:S(2)}}) slice-start(%a)",
        4 * 8 * 128,
    ),
    "its arrival": (f"%d = {VMEM} copy-done(%b)", 0),
    "operands in two memories": (f"%x = {HBM} multiply(%a, /*index=1*/%b)", 2 * PADDED),
    "a fusion": ("%f = f32[200]{0:T(256)} fusion(%a), kind=kLoop, calls=%whole", PADDED + 4 * 256),
    "with two results": (
        "%f = (f32[200]{0:T(256)}, s32[200]{0:T(256)}) fusion(%a), calls=%both",
        PADDED + 2 * 4 * 256,
    ),
    "of what is on the chip": ("%f = f32[200]{0:T(256)S(1)} fusion(%b), calls=%on_chip", 0),
    "that reads a slice": (
        "%f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), calls=%sliced",
        4 * 8 * 128,
    ),
    "an update in place": (f"%u = {HBM} dynamic-update-slice(%a, %c)", 2 * 4 * 8 * 128),
    "in a fusion": (f"%f = {HBM} fusion(%a, %c), calls=%updated", 2 * 4 * 8 * 128),
    "a view": (f'%v = {VMEM} custom-call(%b), custom_call_target="ConcatBitcast"', 0),
    "a vector in tiles of two axes": ("%x = f32[3]{0:T(8,128)} negate(%b)", 4 * 1024),
    "a loop": (
        f"%w = {HBM} while(%a), condition=%yes, body=%large, "
        'backend_config={"known_trip_count":{"n":"3"}}',
        3 * PADDED,
    ),
    "a branch, the larger": (
        f"%d = {VMEM} conditional(%b, %b), branch_computations={{%small, %large}}",
        PADDED,
    ),
}
BRANCHES = f"""
%on_chip (q: f32[100,200]) -> f32[200] {{
  %q = {VMEM} parameter(0)
  ROOT %sum.1 = f32[200]{{0:T(256)}} reduce(%q, %zero), dimensions={{0}}, to_apply=%add
}}

%small (t: f32[100,200]) -> f32[100,200] {{
  %t = {VMEM} parameter(0)
  ROOT %n = {VMEM} negate(%t)
}}

%yes (v: f32[100,200]) -> pred[] {{
  %v = {VMEM} parameter(0)
  ROOT %true = pred[] constant(true)
}}

%large (u: f32[100,200]) -> f32[100,200] {{
  %u = {VMEM} parameter(0)
  ROOT %n.1 = {HBM} negate(%u)
}}
"""
ARGUMENTS = tuple(
    f"%{name} = {kind} parameter({place})"
    for place, (name, kind) in enumerate({"a": HBM, "b": VMEM, "c": PIECE}.items())
)


@pytest.mark.parametrize("case", CASES)
def test_device_bytes(case: str) -> None:
    line, expected = CASES[case]
    assert program(*ARGUMENTS, line, more=FUSIONS + BRANCHES).device_bytes == expected


def test_kernels_are_what_runs() -> None:
    lines = [CASES[case][0] for case in ("a fusion", "a copy to the chip", "its arrival")]
    assert program(*ARGUMENTS, *lines, more=FUSIONS).kernels == 2


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%r = (f32[3]{0}, s32[5]{0}) all-reduce(%x, %y), to_apply=%add", 32),
        ("%r = f32[3,8]{1,0} all-gather(%x), dimensions={1}", 96),
        ("%r = (f32[3]{0}, f32[24]{0}) all-gather-start(%x), dimensions={0}", 96),
        ("%r = f32[3]{0} all-reduce-start(%x), to_apply=%add", 12),
        ("%r = f32[1]{0} reduce-scatter(%x), to_apply=%add", 12),
    ],
)
def test_collectives(line: str, size: int) -> None:
    arguments = ("%x = f32[3]{0} parameter(0)", "%y = s32[5]{0} parameter(1)")
    assert program(*arguments, line).collectives == Collectives(1, size)
    assert program(*arguments).collectives == Collectives(0, 0)


def test_what_is_unknown_is_no_guess() -> None:
    with pytest.raises(FormatError, match="'fft': no rule says which bytes it moves"):
        _ = program(*ARGUMENTS, f"%x = {HBM} fft(%a)").device_bytes
    with pytest.raises(FormatError, match="'while': no rule"):
        _ = program(*ARGUMENTS, f"%w = {HBM} while(%a), body=%whole", more=FUSIONS).device_bytes
    with pytest.raises(FormatError, match="no line that begins with ENTRY"):
        parse("module @jit_f {}")
    with pytest.raises(FormatError, match="a bracket is not closed"):
        program("%x = f32[3]{0} add(%a")
    with pytest.raises(FormatError, match="no operation in"):
        program("%x = f32[3]{0} add")
