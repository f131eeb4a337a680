"""Compile AGC's JAX programs ahead of time for a TPU, on a machine that need not have one.

libtpu holds the whole TPU compiler and compiles for topologies that the machine does not have. The
status is ``compiled``, never ``passed``: nothing ran. It shows that every program lowers and fits,
and how many bytes the compiler says it will move, beside the least possible and beside optax's
clipping of the same tree.

The compiler counts every byte that an operation reads or writes, also between the chip's memory and
its vector memory, where it prefetches operands. So the least possible is not within reach, and the
comparison with optax, compiled in the same way, says more.

Run it in an environment of its own: ``python -m agc_conformance.tpu --out tpu-aot.json``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from agc import AGC, Schedule
from agc.errors import MissingPackageError
from agc_conformance.records import TpuRecord, Writer, make_header

__all__ = ["Program", "compile_programs", "main", "programs"]

TOPOLOGY: Final = "v5e:2x2"

Shapes = dict[str, tuple[int, ...]]
Tree = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Compile every program, write a file of records, and return the exit status.

    The file appears under its name only when it is complete.
    """
    parser = argparse.ArgumentParser(
        prog="python -m agc_conformance.tpu",
        description="Compile AGC's JAX programs for a TPU topology.",
    )
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--topology", default=TOPOLOGY, help=f"for example {TOPOLOGY}, the default")
    options = parser.parse_args(arguments)

    def show(done: int, total: int, program: str) -> None:
        print(f"[{done + 1}/{total}] {program}", file=sys.stderr, flush=True)

    header = make_header(
        "tpu",
        device="tpu",
        device_name=f"{options.topology} (ahead of time)",
        versions=_versions(),
        command=f"python -m agc_conformance.tpu --topology {options.topology}",
    )
    try:
        devices = _devices(options.topology)
    except MissingPackageError as error:
        print(f"agc_conformance.tpu: {error}", file=sys.stderr)
        return 2
    failed = 0
    with Writer(options.out, header) as file:
        for record in _compile(devices, options.topology, show):
            file.write(record)
            failed += record["status"] != "compiled"
            print(f"    {record['status']}: {record['detail']}", file=sys.stderr, flush=True)
    return int(failed > 0)


def compile_programs(
    topology: str = TOPOLOGY, *, progress: Callable[[int, int, str], None] | None = None
) -> list[TpuRecord]:
    """Compile every AGC program for a TPU topology.

    Parameters
    ----------
    topology : str, default "v5e:2x2"
        Name of a topology that libtpu knows.
    progress : callable, optional
        Called with the number of programs done, the number of all programs, and the id of the next.

    Returns
    -------
    list of TpuRecord
        One record for each program: bytes accessed as the compiler counts them, the least possible,
        and, if the program has a peer, the bytes of optax's clipping as ``optax_bytes_accessed``.

    Raises
    ------
    MissingPackageError
        If libtpu, JAX or the adapter is not installed.
    """
    return list(_compile(_devices(topology), topology, progress))


def _compile(
    devices: Any, topology: str, progress: Callable[[int, int, str], None] | None
) -> Iterator[TpuRecord]:
    todo = list(programs(devices))
    for done, program in enumerate(todo):
        if progress is not None:
            progress(done, len(todo), program.id)
        yield _record(program, topology)


@dataclass(frozen=True)
class Program:
    """One program to compile.

    Attributes
    ----------
    id : str
        Name in the report.
    function : callable
        The function to compile.
    arguments : tuple
        Trees of ``jax.ShapeDtypeStruct`` with shardings.
    minimum : int
        Least number of bytes that one device must read and write.
    donate : tuple of int
        Indices of the arguments whose memory is donated.
    peer : (callable, tuple), optional
        The same with optax's clipping: function and arguments.
    """

    id: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    minimum: int
    donate: tuple[int, ...] = ()
    peer: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def programs(devices: Any) -> Iterator[Program]:
    """Yield every program for these devices."""
    import jax
    import optax

    import agc_jax

    place = jax.sharding.SingleDeviceSharding(devices[0])
    peer = optax.adaptive_grad_clip(0.01)

    def clip(rule: AGC, *, stats: bool = False) -> Callable[..., Any]:
        def function(gradients: Any, params: Any) -> Any:
            result = agc_jax.adaptive_clip_gradients(gradients, params, rule)
            return result if stats else result[0]

        return function

    def optax_clip(gradients: Any, params: Any) -> Any:
        return peer.update(gradients, optax.EmptyState(), params)[0]

    for name, (shapes, rule) in _TREES.items():
        for dtype in ("float32", "bfloat16"):
            tree = _tree(shapes, dtype, lambda _: place)
            # optax takes other units for the layers of the block, so the two do not compare.
            other = None if name == "transformer" else (optax_clip, (tree, tree))
            least = 3 * _bytes(tree)
            yield Program(f"clip {name} {dtype}", clip(rule), (tree, tree), least, peer=other)
    tree = _tree(_nfnet_f0(), "float32", lambda _: place)
    least = 3 * _bytes(tree)
    yield Program(
        "clip and telemetry NFNet-F0 float32",
        clip(AGC(units=_OUT_LAST), stats=True),
        (tree, tree),
        least,
    )
    rule = AGC(
        clipping={"stem*": None, "*": Schedule([(0, 0.04), (1000, 0.01)])},
        exclude=["@head"],
        units=_OUT_LAST,
        nonfinite="zero",
        head="head",
    )
    sgd = optax.sgd(0.1, 0.9, nesterov=True)
    step, peer_step = (
        _step(optax.chain(first, sgd), tree, place)
        for first in (agc_jax.adaptive_grad_clip(rule), peer)
    )
    least = 5 * _bytes(tree)  # parameters and momentum: read and written; gradients: read
    yield Program(
        "step with SGD, schedule, zero policy NFNet-F0 float32", *step, least, (0, 1), peer_step
    )
    if len(devices) > 1:
        yield from _sharded(devices, clip(AGC(units=_OUT_LAST), stats=True), optax_clip)


def _step(tx: Any, params: Any, place: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return an optimizer's step and its arguments: parameters, state, gradients."""
    import jax
    import optax

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return step, (params, jax.tree.map(placed, jax.eval_shape(tx.init, params)), params)


def _sharded(
    devices: Any, clip: Callable[..., Any], optax_clip: Callable[..., Any]
) -> Iterator[Program]:
    """Yield the programs for all devices: sharded along units, and along reduced axes."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(devices), ("shard",))
    for what, axis in (("units", -1), ("sums", -2)):

        def place(shape: tuple[int, ...], axis: int = axis) -> Any:
            spec: list[str | None] = [None] * len(shape)
            if len(shape) >= 2 and shape[axis] % len(devices) == 0:
                spec[axis] = "shard"
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

        tree = _tree(_nfnet_f0(), "float32", place)
        yield Program(
            f"clip and telemetry, {what} split over {len(devices)} NFNet-F0 float32",
            clip,
            (tree, tree),
            3 * _bytes(tree),
            peer=(optax_clip, (tree, tree)),
        )


def _record(program: Program, topology: str) -> TpuRecord:
    record: dict[str, Any] = {
        "type": "tpu",
        "id": program.id,
        "program": program.id,
        "status": "compiled",
        "topology": topology,
        "minimum_bytes": program.minimum,
        "bytes_accessed": None,
        "detail": "",
    }
    try:
        costs = _costs(program.function, program.arguments, program.donate)
        other = None if program.peer is None else _costs(*program.peer, program.donate)
    except Exception as error:  # a failure of the compiler is a result
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {**record, "status": "failed", "detail": lines[0]}  # type: ignore[typeddict-item]
    accessed = costs["bytes accessed"]
    detail = f"{accessed / program.minimum:.2f} times the least"
    if other is not None:
        record["optax_bytes_accessed"] = other["bytes accessed"]
        detail += f"; optax {other['bytes accessed'] / program.minimum:.2f} times"
    more = {"bytes_accessed": accessed, "flops": costs.get("flops"), "detail": detail}
    return {**record, **more}  # type: ignore[typeddict-item]


def _costs(
    function: Callable[..., Any], arguments: tuple[Any, ...], donate: tuple[int, ...]
) -> Mapping[str, float]:
    """Compile and return the compiler's own estimates for one device."""
    import jax

    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    costs: Mapping[str, float] = compiled.cost_analysis()
    return costs


def _devices(topology: str) -> Any:
    """Return the devices of a topology, which the machine need not have."""
    # Keeps libtpu from asking a metadata server about this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        from jax.experimental import topologies

        import agc_jax  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f'programs for TPU need JAX ({error}); try: pip install "agc-sam[jax,conformance]" libtpu'
        ) from error
    try:
        topology_description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    # A missing compiler and an unknown topology raise exceptions of several types.
    except Exception as error:
        raise MissingPackageError(
            f"no TPU compiler for the topology {topology!r} ({str(error).splitlines()[0]}); "
            "try: pip install libtpu"
        ) from error
    return topology_description.devices


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("jax", "jaxlib", "libtpu", "optax", "flax", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _tree(shapes: Shapes, dtype: str, place: Callable[[tuple[int, ...]], Any]) -> Any:
    import jax
    import jax.numpy as jnp

    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place(shape))
        for name, shape in shapes.items()
    }


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in tree.values()
    )


def _transformer_block() -> Shapes:
    """Twelve blocks of width 768, stacked as ``scan`` stacks them: 12 heads of 64."""
    return {
        "query.kernel": (12, 768, 12, 64),
        "query.bias": (12, 12, 64),
        "out.kernel": (12, 12, 64, 768),
        "up.kernel": (12, 768, 3072),
        "down.kernel": (12, 3072, 768),
        "scale": (12, 768),
        "embedding": (32768, 768),
    }


def _nfnet_f0() -> Shapes:
    """NFNet-F0 (arXiv:2102.06171) in Flax's layout: 233 tensors, 71,489,284 parameters."""
    shapes: Shapes = {}

    def conv(name: str, kernel: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}.kernel"] = (kernel, kernel, inputs, outputs)
        shapes[f"{name}.gain"] = shapes[f"{name}.bias"] = (outputs,)

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.kernel"], shapes[f"{name}.bias"] = (inputs, outputs), (outputs,)

    widths = (3, 16, 32, 64, 128)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        conv(f"stem{index}", 3, inputs, outputs)
    inputs, block = 128, 0
    for outputs, depth in ((256, 1), (512, 2), (1536, 6), (1536, 3)):
        for _ in range(depth):
            name, middle = f"block{block}", outputs // 2
            shapes[f"{name}.gain"] = ()
            if inputs != outputs or name == "block9":  # the first of a stage
                conv(f"{name}.shortcut", 1, inputs, outputs)
            conv(f"{name}.conv0", 1, inputs, middle)
            conv(f"{name}.conv1", 3, 128, middle)
            conv(f"{name}.conv1b", 3, 128, middle)
            conv(f"{name}.conv2", 1, middle, outputs)
            dense(f"{name}.squeeze", outputs, middle)
            dense(f"{name}.excite", middle, outputs)
            inputs, block = outputs, block + 1
    conv("final", 1, 1536, 3072)
    dense("head", 3072, 1000)
    return shapes


# A tree of bare arrays has names, but no layer types.
_OUT_LAST: Final = {"*.kernel": "... i o -> o"}
_TREES: Final[dict[str, tuple[Shapes, AGC]]] = {
    "conv": ({"kernel": (3, 3, 256, 512), "bias": (512,)}, AGC()),
    "dense": ({"kernel": (1024, 4096), "bias": (4096,)}, AGC()),
    "transformer": (
        _transformer_block(),
        AGC(
            units={
                "query.kernel": "l i h d -> l h d",
                "query.bias": "l h d -> l",
                "out.kernel": "l h d o -> l o",
                "*.kernel": "l i o -> l o",
                "scale": "l o -> l",
                "embedding": "v d -> v",
            }
        ),
    ),
    "NFNet-F0": (_nfnet_f0(), AGC(units=_OUT_LAST)),
}


if __name__ == "__main__":
    sys.exit(main())
