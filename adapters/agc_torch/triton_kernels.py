"""Kernels of AGC, SAM and weight standardisation for GPUs, in Triton.

A launch of AGC or SAM covers tiles of many tensors, one of weight standardisation a weight.

A dense tensor in memory order is ``[G, I, O, K]``, of which ``(G, O)`` name a unit and ``(I, K)``
are reduced. Three ways to walk through it are enough:

* ``rows``, if O is 1: a unit is one stretch of memory;
* ``columns``, if G and K are 1: neighbours in memory are the same element of neighbouring units;
* ``gather``, anything else: transposed convolutions with groups.

A tile is some units, and for long units a piece of each. No tile writes what another one reads, so
there are no atomics, every sum has one order, and results are the same in every run.

Every way, dtype and alignment is a kernel of its own: one for all of them would hold the registers
of the hungriest. Hints on alignment stand on pointers and sizes, where the compiler keeps them.
Neither numbers of tensors and units nor where numbers of units start are compiled for: another one
would be another kernel.

Importing this module imports Triton, which comes with PyTorch for CUDA and ROCm.
"""

# Annotations are read by Triton, so they are not postponed.
import triton
import triton.language as tl

__all__ = [
    "decide_kernel",
    "norm_kernel",
    "norms_kernel",
    "perturb_kernel",
    "scale_kernel",
    "share_kernel",
    "standardise_back_kernel",
    "standardise_kernel",
    "standardise_low_back_kernel",
    "standardise_low_kernel",
]

# The sum of squares between which float32 holds it, and every square that matters, well.
_LEAST = tl.constexpr(1e-24)
_MOST = tl.constexpr(1e37)


@triton.jit
def _tensor(
    addresses,
    sizes,
    tensor,
    DTYPE: tl.constexpr,
    WAY: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the pointer of a tensor, its units, the elements of each, and I, O, K.

    ``LANES`` is the number of elements in 16 bytes if loads may be that wide, else 1.
    """
    row = sizes + tensor.to(tl.int64) * 5
    units = tl.load(row).to(tl.int32)
    length = tl.load(row + 1).to(tl.int32)
    inner = tl.load(row + 2).to(tl.int32)
    outputs = tl.load(row + 3).to(tl.int32)
    window = tl.load(row + 4).to(tl.int32)
    start = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    if LANES > 1:
        start = tl.multiple_of(start, 16)  # a hint on the address would be lost in the cast
        if WAY == "rows":
            length = tl.multiple_of(length, LANES)
        if WAY == "columns":
            units = tl.multiple_of(units, LANES)
            outputs = tl.multiple_of(outputs, LANES)
    return start, units, length, inner, outputs, window


@triton.jit
def _block(
    unit,
    units,
    element,
    end,
    length,
    inner,
    outputs,
    window,
    WAY: tl.constexpr,
):
    """Return offsets and mask of a block: units by elements, but elements by units in columns."""
    if WAY == "rows":
        offsets = (unit.to(tl.int64) * length)[:, None] + element[None, :]
        mask = (unit < units)[:, None] & (element < end)[None, :]
    elif WAY == "columns":
        offsets = (element.to(tl.int64) * outputs)[:, None] + unit[None, :]
        mask = (element < end)[:, None] & (unit < units)[None, :]
    else:
        g, o = (unit // outputs).to(tl.int64)[:, None], (unit % outputs)[:, None]
        i, k = (element // window)[None, :], (element % window)[None, :]
        offsets = ((g * inner + i) * outputs + o) * window + k
        mask = (unit < units)[:, None] & (element < end)[None, :]
    return offsets, mask


@triton.jit
def _squares(
    start,
    unit,
    units,
    first,
    end,
    length,
    inner,
    outputs,
    window,
    WAY: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the sum of squares of each unit's elements from ``first`` to ``end``, in float64.

    Squares are added up in ``WIDE`` lane by lane, and the lanes in float64.
    """
    if WAY == "columns":
        total = tl.zeros([ELEMENTS, UNITS], dtype=WIDE)
    else:
        total = tl.zeros([UNITS, ELEMENTS], dtype=WIDE)
    for at in range(first, end, ELEMENTS):
        element = at + tl.arange(0, ELEMENTS)
        offsets, mask = _block(unit, units, element, end, length, inner, outputs, window, WAY)
        value = tl.load(start + offsets, mask=mask, other=0.0).to(WIDE)
        total += value * value
    return tl.sum(total.to(tl.float64), axis=0 if WAY == "columns" else 1)


@triton.jit
def norms_kernel(
    addresses,
    sizes,
    tiles,
    sums,
    DTYPE: tl.constexpr,
    WAY: tl.constexpr,
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write the sum of squares of every unit, or of each of its pieces (AGC-3).

    Parameters
    ----------
    addresses : int64, shape (tensors,)
        Where each tensor starts.
    sizes : int64, shape (tensors, 5)
        Units, elements of each, I, O and K.
    tiles : int64, shape (programs, 4)
        Tensor, first unit, piece, and the place of the first unit's sum.
    sums : float64
        Sums of squares; those of one piece of neighbouring units are neighbours.
    EXACT : bool
        Whether squares are added up in float64; if not, in float32, and once more in float64
        where that did not hold them.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    start, units, length, inner, outputs, window = _tensor(
        addresses, sizes, tl.load(tile), DTYPE, WAY, LANES
    )
    lane = tl.arange(0, UNITS)
    unit = tl.multiple_of(tl.load(tile + 1).to(tl.int32), UNITS) + lane
    first = tl.load(tile + 2).to(tl.int32) * PIECE
    end = tl.minimum(length, first + PIECE)
    if LANES > 1 and WAY == "rows":
        end = tl.multiple_of(end, LANES)
    if EXACT:
        total = _squares(
            start, unit, units, first, end, length, inner, outputs, window,
            WAY, UNITS, ELEMENTS, tl.float64,
        )  # fmt: skip
    else:
        total = _squares(
            start, unit, units, first, end, length, inner, outputs, window,
            WAY, UNITS, ELEMENTS, tl.float32,
        )  # fmt: skip
        inexact = (total < _LEAST) | (total > _MOST) | (total != total)
        if tl.max(inexact.to(tl.int32), axis=0) > 0:
            total = _squares(
                start, unit, units, first, end, length, inner, outputs, window,
                WAY, UNITS, ELEMENTS, tl.float64,
            )  # fmt: skip
    tl.store(sums + tl.load(tile + 3) + lane, total, mask=unit < units)


@triton.jit(do_not_specialize=["count"])
def share_kernel(
    sums, order, starts, chosen, count, shares, SUMS: tl.constexpr, PIECES: tl.constexpr
):
    """Add up the squares that a process has of each unit, which may be none (AGC-8).

    Parameters
    ----------
    sums : float64
        From :func:`norms_kernel`.
    order : int32
        The sums of the first unit, then those of the second, and so on.
    starts : int32, shape (units + 1,)
        Where each unit's sums start in ``order``, and where the last one's end.
    chosen : int32, shape (count,)
        Units that are added up.
    shares : float64, shape (units,)
        What is written.
    """
    lane = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    mask = lane < count
    unit = tl.load(chosen + lane, mask=mask, other=0)
    first = tl.load(starts + unit, mask=mask, other=0)
    end = tl.load(starts + unit + 1, mask=mask, other=0)
    total = tl.zeros([SUMS, PIECES], tl.float64)
    for at in range(0, tl.max(end - first, axis=0), PIECES):
        place = first[:, None] + at + tl.arange(0, PIECES)[None, :]
        inside = place < end[:, None]
        own = tl.load(order + place, mask=inside, other=0)
        total += tl.load(sums + own, mask=inside, other=0.0)
    tl.store(shares + unit, tl.sum(total, axis=1), mask=mask)


@triton.jit
def _total(sums, places, tensor, unit, mask, SUMS: tl.constexpr, PIECES: tl.constexpr):
    """Add up the pieces of units; ``places`` has first sum, pieces and units of every tensor."""
    row = places + tensor.to(tl.int64) * 3
    first = tl.load(row, mask=mask, other=0)
    pieces = tl.load(row + 1, mask=mask, other=0)
    units = tl.load(row + 2, mask=mask, other=0)
    total = tl.zeros([SUMS, PIECES], tl.float64)
    for at in range(0, tl.max(pieces, axis=0), PIECES):
        piece = (at + tl.arange(0, PIECES)).to(tl.int64)[None, :]
        offsets = first[:, None] + piece * units[:, None] + unit[:, None]
        total += tl.load(sums + offsets, mask=piece < pieces[:, None], other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(
    do_not_specialize=["count", "gradients", "units"],
    do_not_specialize_on_alignment=["grad_scale"],
)
def decide_kernel(
    sums,
    places,
    chosen,
    count,
    pairs,
    firsts,
    rules,
    thresholds,
    grad_scale,
    gradients,
    units,
    eps: tl.float64,
    div_eps: tl.float64,
    numbers,
    SUMS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write floor, limit, gradient norm and factor of every unit (AGC-1, AGC-2).

    Parameters
    ----------
    sums : float64
        From :func:`norms_kernel`.
    places : int64, shape (tensors, 3)
        First sum, pieces and units of every tensor; weights stand before gradients.
    chosen : int32, shape (count,)
        Units that are decided on.
    pairs : int32, shape (units,)
        Parameter that each unit belongs to.
    firsts : int64, shape (parameters,)
        The first unit of each parameter.
    rules : int32, shape (parameters,)
        Which threshold each parameter has.
    thresholds : float64
    grad_scale : float64, one number
        What gradients are still multiplied by.
    gradients : int
        Index of the first gradient among the tensors, which is the number of parameters.
    units : int
        Number of all units.
    numbers : float64, shape (4, units)
    """
    lane = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    mask = lane < count
    unit = tl.load(chosen + lane, mask=mask, other=0)
    pair = tl.load(pairs + unit, mask=mask, other=0)
    inside = unit - tl.load(firsts + pair, mask=mask, other=0)
    weight = tl.sqrt(_total(sums, places, pair, inside, mask, SUMS, PIECES))
    norm = tl.sqrt(_total(sums, places, gradients + pair, inside, mask, SUMS, PIECES))
    norm = norm / tl.load(grad_scale)
    floor = tl.where(weight < eps, eps, weight)  # keeps NaN
    limit = floor * tl.load(thresholds + tl.load(rules + pair, mask=mask, other=0))
    infinity = float("inf")
    bad = ((norm < infinity) & (floor < infinity)) == 0
    divisor = tl.where(norm > limit, tl.where(norm < div_eps, div_eps, norm), 1.0)
    factor = tl.where(norm > limit, limit / divisor, 1.0)
    factor = tl.where(bad, float("nan"), factor)
    tl.store(numbers + unit, floor, mask=mask)
    tl.store(numbers + units + unit, limit, mask=mask)
    tl.store(numbers + 2 * units + unit, norm, mask=mask)
    tl.store(numbers + 3 * units + unit, factor, mask=mask)


@triton.jit(do_not_specialize=["gradients"], do_not_specialize_on_alignment=["factors"])
def scale_kernel(
    addresses,
    sizes,
    tiles,
    firsts,
    factors,
    gradients,
    DTYPE: tl.constexpr,
    WAY: tl.constexpr,
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PIECE: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Multiply gradients by their factors, in place and with one rounding (AGC-2 to AGC-4).

    A tile whose factors are all 1 reads nothing else. A unit whose factor is 1 is not written; in
    columns, where it shares every word of memory with its neighbours, it keeps its bits.

    Parameters
    ----------
    addresses, sizes, tiles
        As for :func:`norms_kernel`; tiles of gradients only.
    firsts : int64, shape (parameters,)
        The first unit of each parameter.
    factors : float64, shape (units,)
        NaN for a unit that is not finite.
    gradients : int
        Index of the first gradient among the tensors.
    ZERO : bool
        Whether a unit that is not finite becomes 0.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    tensor = tl.load(tile)
    start, units, length, inner, outputs, window = _tensor(
        addresses, sizes, tensor, DTYPE, WAY, LANES
    )
    unit = tl.multiple_of(tl.load(tile + 1).to(tl.int32), UNITS) + tl.arange(0, UNITS)
    place = tl.load(firsts + tensor - gradients) + unit
    factor = tl.load(factors + place, mask=unit < units, other=1.0)
    changes = factor != 1.0
    if tl.max(changes.to(tl.int32), axis=0) > 0:
        first = tl.load(tile + 2).to(tl.int32) * PIECE
        end = tl.minimum(length, first + PIECE)
        if LANES > 1 and WAY == "rows":
            end = tl.multiple_of(end, LANES)
        axis: tl.constexpr = 0 if WAY == "columns" else 1
        by = tl.expand_dims(factor, axis)
        written = tl.expand_dims(changes, axis)
        for at in range(first, end, ELEMENTS):
            element = at + tl.arange(0, ELEMENTS)
            offsets, mask = _block(unit, units, element, end, length, inner, outputs, window, WAY)
            if WAY != "columns":  # where a mask that differs by unit would make accesses narrow
                mask = mask & written
            raw = tl.load(start + offsets, mask=mask, other=0.0)
            value = raw.to(tl.float64) * by
            if ZERO:
                value = tl.where(by != by, 0.0, value)
            if DTYPE != tl.float64:
                value = value.to(tl.float32)  # the interpreter casts float64 to bfloat16 wrongly
            tl.store(start + offsets, tl.where(written, value.to(DTYPE), raw), mask=mask)


@triton.jit
def _moved(
    addresses,
    counts,
    tiles,
    tensors,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Return a tile's tensor, its first element, the tensor's elements, its weight and gradient."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(tile).to(tl.int64)
    count = tl.load(counts + tensor)
    weight = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    gradient = tl.load(addresses + tensors + tensor).to(tl.pointer_type(GRADIENT))
    if LANES > 1:
        weight, gradient = tl.multiple_of(weight, 16), tl.multiple_of(gradient, 16)
        count = tl.multiple_of(count, LANES)
    return tensor, tl.load(tile + 1).to(tl.int64) * PIECE, count, weight, gradient


@triton.jit(do_not_specialize=["tensors"])
def perturb_kernel(
    addresses,
    counts,
    tiles,
    tensors,
    factor,
    eta,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Copy weights aside and move them to ``w + e`` (SAM-1, SAM-5, SAM-10).

    Parameters
    ----------
    addresses : int64, shape (3 * tensors,)
        Where weights, gradients and copies start.
    counts : int64, shape (tensors,)
        Elements of each.
    tiles : int32, shape (programs, 2)
        Tensor and piece.
    tensors : int
        Number of weights.
    factor : float64, one number
        What gradients are multiplied by; if it is 0, the weights stay, whatever the gradients are.
    eta : float64, one number
        What ASAM adds to the magnitude of a weight.
    ADAPTIVE : bool
        Whether gradients are multiplied by ``(|w| + eta)**2`` too.
    """
    tensor, first, count, weight, gradient = _moved(
        addresses, counts, tiles, tensors, DTYPE, GRADIENT, LANES, PIECE
    )
    copy = tl.load(addresses + 2 * tensors + tensor).to(tl.pointer_type(DTYPE))
    if LANES > 1:
        copy = tl.multiple_of(copy, 16)
    WIDE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    by = tl.load(factor).to(WIDE)
    moves = (by + tl.zeros([ELEMENTS], WIDE)) != 0.0  # the interpreter mixes no scalar with a block
    for at in range(0, PIECE, ELEMENTS):
        element = first + at + tl.arange(0, ELEMENTS)
        mask = element < count
        raw = tl.load(weight + element, mask=mask, other=0.0)
        tl.store(copy + element, raw, mask=mask)
        value = raw.to(WIDE)
        move = by * tl.load(gradient + element, mask=mask & moves, other=0.0).to(WIDE)
        if ADAPTIVE:
            scale = tl.abs(value) + tl.load(eta).to(WIDE)
            move = move * scale * scale
        tl.store(weight + element, (value + move).to(DTYPE), mask=mask & moves)


@triton.jit(do_not_specialize=["tensors"])
def norm_kernel(
    addresses,
    counts,
    tiles,
    tensors,
    eta,
    sums,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add up the squares of gradients, a sum for each tile (SAM-1, SAM-10).

    Parameters
    ----------
    addresses : int64, shape (2 * tensors,)
        Where weights and gradients start.
    counts, tiles, tensors, eta
        As for :func:`perturb_kernel`.
    sums : float64, shape (programs,)
        What is written.
    ADAPTIVE : bool
        Whether gradients are multiplied by ``|w| + eta``.
    """
    _, first, count, weight, gradient = _moved(
        addresses, counts, tiles, tensors, DTYPE, GRADIENT, LANES, PIECE
    )
    total = tl.zeros([ELEMENTS], tl.float64)
    for at in range(0, PIECE, ELEMENTS):
        element = first + at + tl.arange(0, ELEMENTS)
        mask = element < count
        value = tl.load(gradient + element, mask=mask, other=0.0).to(tl.float64)
        if ADAPTIVE:
            size = tl.abs(tl.load(weight + element, mask=mask, other=0.0).to(tl.float64))
            value = value * (size + tl.load(eta))
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _loaded(
    weight,
    filters,
    length,
    WIDE: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Return a tile's filters, the offsets and masks of their elements, and the elements."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    element = tl.arange(0, ELEMENTS)
    offsets = unit.to(tl.int64)[:, None] * length + element[None, :]
    mask = (unit < filters)[:, None] & (element < length)[None, :]
    return unit, offsets, mask, tl.load(weight + offsets, mask=mask, other=0.0).to(WIDE)


@triton.jit
def _centred(value, mask, length, WIDE: tl.constexpr):
    """Return each filter less its mean, the sum of its squares, and the mean.

    Numbers of a filter are in float64, in which Triton's division and root are exact.
    """
    mean = tl.sum(value, axis=1).to(tl.float64) / length
    centred = tl.where(mask, value - mean.to(WIDE)[:, None], 0.0)
    return centred, tl.sum(centred * centred, axis=1).to(tl.float64), mean


@triton.jit
def _scale(squared_norm, length, eps: tl.float64, FLOOR: tl.constexpr):
    """Return what makes the norm of each filter 1, and whether that depends on the filter."""
    if FLOOR:
        depends = squared_norm > eps
        floored = tl.where(squared_norm < eps, eps, squared_norm)  # keeps NaN
    else:
        depends = squared_norm == squared_norm
        floored = (squared_norm / length + eps) * length
    return 1.0 / tl.sqrt(floored), depends


@triton.jit(do_not_specialize=["filters"], do_not_specialize_on_alignment=["gain"])
def standardise_kernel(
    weight,
    gain,
    out,
    filters,
    length,
    eps: tl.float64,
    WIDE: tl.constexpr,
    FLOOR: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Standardise a weight, which is read and written once.

    Parameters
    ----------
    weight, out : shape (filters, length)
    gain : shape (filters,)
    filters, length : int
        A filter has at most ``ELEMENTS`` elements.
    WIDE : dtype
        What elements are computed and added up in.
    FLOOR : bool
        Whether ``eps`` is the least squared norm of a filter; if not, it is added to its variance.
    """
    unit, offsets, mask, value = _loaded(weight, filters, length, WIDE, UNITS, ELEMENTS)
    centred, squared_norm, _ = _centred(value, mask, length, WIDE)
    scale, _ = _scale(squared_norm, length, eps, FLOOR)
    factor = tl.load(gain + unit, mask=unit < filters, other=0.0).to(tl.float64) * scale
    tl.store(out + offsets, centred * factor.to(WIDE)[:, None], mask=mask)


@triton.jit(do_not_specialize=["filters"], do_not_specialize_on_alignment=["gain"])
def standardise_back_kernel(
    weight,
    gain,
    gradient,
    of_weight,
    of_gain,
    filters,
    length,
    eps: tl.float64,
    WIDE: tl.constexpr,
    FLOOR: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Write the gradients of weight and gain; the weight and the gradient are read once.

    Parameters
    ----------
    weight, gradient, of_weight : shape (filters, length)
        The gradient is that of the standardised weight.
    gain, of_gain : shape (filters,)
    filters, length, eps, WIDE, FLOOR
        As for :func:`standardise_kernel`.
    """
    unit, offsets, mask, value = _loaded(weight, filters, length, WIDE, UNITS, ELEMENTS)
    centred, squared_norm, _ = _centred(value, mask, length, WIDE)
    scale, depends = _scale(squared_norm, length, eps, FLOOR)
    given = tl.load(gradient + offsets, mask=mask, other=0.0).to(WIDE)
    mean = tl.sum(given, axis=1).to(tl.float64) / length
    along = tl.sum(given * centred, axis=1).to(tl.float64)
    norms = tl.where(depends, along * scale * scale, 0.0).to(WIDE)
    factor = tl.load(gain + unit, mask=unit < filters, other=0.0).to(tl.float64) * scale
    back = (given - mean.to(WIDE)[:, None]) - norms[:, None] * centred
    tl.store(of_weight + offsets, back * factor.to(WIDE)[:, None], mask=mask)
    tl.store(of_gain + unit, (along * scale).to(WIDE), mask=unit < filters)


@triton.jit
def _rounded(value):
    """Round float32 to bfloat16, ties to even, and return it as float32.

    The cast of Triton's interpreter cuts off.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _low(
    weight,
    gain,
    filters,
    length,
    eps: tl.float64,
    FLOOR: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Return what both kernels of bfloat16 compute; all but ``centred`` and ``scale`` is rounded.

    That is filters, offsets, masks and elements; elements less their mean, the mean, the gain, what
    makes a norm 1 and whether that depends on the filter, and its product with the gain.
    """
    unit, offsets, mask, value = _loaded(weight, filters, length, tl.float32, UNITS, ELEMENTS)
    value = _rounded(value)
    centred, squared_norm, mean = _centred(value, mask, length, tl.float32)
    variance = _rounded((squared_norm / length).to(tl.float32))
    scale, depends = _scale((variance * length).to(tl.float64), length, eps, FLOOR)
    scale = scale.to(tl.float32)
    gains = _rounded(tl.load(gain + unit, mask=unit < filters, other=0.0).to(tl.float32))
    mean = _rounded(mean.to(tl.float32))
    return unit, offsets, mask, value, centred, mean, gains, scale, depends, _rounded(gains * scale)


@triton.jit(do_not_specialize=["filters"], do_not_specialize_on_alignment=["gain"])
def standardise_low_kernel(
    weight,
    gain,
    out,
    filters,
    length,
    eps: tl.float64,
    FLOOR: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Standardise a weight in bfloat16: round what :mod:`agc.reference.nfnet` rounds.

    Parameters
    ----------
    weight, out : shape (filters, length)
    gain : shape (filters,)
    filters, length, eps, FLOOR
        As for :func:`standardise_kernel`.
    """
    _, offsets, mask, value, _, mean, _, _, _, factor = _low(
        weight, gain, filters, length, eps, FLOOR, UNITS, ELEMENTS
    )
    shift = _rounded(mean * factor)
    tl.store(out + offsets, _rounded(value * factor[:, None] - shift[:, None]), mask=mask)


@triton.jit(do_not_specialize=["filters"], do_not_specialize_on_alignment=["gain"])
def standardise_low_back_kernel(
    weight,
    gain,
    gradient,
    of_weight,
    of_gain,
    filters,
    length,
    eps: tl.float64,
    FLOOR: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Write the gradients of weight and gain: what is rounded forward has a rounded gradient.

    Parameters
    ----------
    weight, gradient, of_weight : shape (filters, length)
        The gradient is that of the standardised weight.
    gain, of_gain : shape (filters,)
    filters, length, eps, FLOOR
        As for :func:`standardise_kernel`.
    """
    unit, offsets, mask, value, centred, mean, gains, scale, depends, factor = _low(
        weight, gain, filters, length, eps, FLOOR, UNITS, ELEMENTS
    )
    given = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
    of_shift = _rounded(-tl.sum(given, axis=1))
    of_factor = _rounded(tl.sum(given * value, axis=1) + of_shift * mean)
    of_squared_norm = -0.5 * (of_factor * gains) * (scale * scale * scale)
    of_variance = _rounded(length * tl.where(depends, of_squared_norm, 0.0))
    of_mean = _rounded(of_shift * factor)
    along = (2.0 * of_variance.to(tl.float64) / length).to(tl.float32)
    level = (of_mean.to(tl.float64) / length).to(tl.float32)
    back = given * factor[:, None] + (along[:, None] * centred + level[:, None])
    tl.store(of_weight + offsets, _rounded(back), mask=mask)
    tl.store(of_gain + unit, _rounded(of_factor * scale), mask=unit < filters)
