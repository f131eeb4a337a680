"""The programs that are compiled, and what each may cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from agc import AGC, Schedule

__all__ = ["Peer", "Program", "gpu_programs", "tpu_programs"]

GPU: Final = "H100"
TPU: Final = "v5e:2x2"
POD: Final = "v5e:16x16"
LARGE_POD: Final = "v5p:8x16x16"

Shapes = dict[str, tuple[int, ...]]
Tree = dict[str, Any]
Function = Callable[..., Any]
Devices = Callable[[str], Any]
"""From the name of a target to its devices."""
Cost = Literal["device_bytes", "kernels", "collective_bytes"]


@dataclass(frozen=True)
class Peer:
    """What a program is compared with."""

    name: str
    function: Function
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """One program to compile.

    Attributes
    ----------
    id : str
        Name in the report.
    target : str
        TPU topology or GPU.
    function : callable
        The function to compile.
    arguments : tuple
        Trees of ``jax.ShapeDtypeStruct`` with shardings.
    minimum : int, optional
        Least number of bytes that one device must read and write, if that says anything.
    most : float
        What it may move in device memory, in multiples of the minimum.
    donate : tuple of int
        Indices of the arguments whose memory is donated.
    reused : int
        Bytes of donated memory that must hold results.
    options : mapping
        Options of the compiler.
    peer : Peer, optional
        What it is compared with.
    at_most_peer : mapping
        From a cost to what it may be, in multiples of the peer's.
    """

    id: str
    target: str
    function: Function
    arguments: tuple[Any, ...]
    minimum: int | None = None
    most: float = math.inf
    donate: tuple[int, ...] = ()
    reused: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: Peer | None = None
    at_most_peer: Mapping[Cost, float] = field(default_factory=dict)


def tpu_programs(devices: Devices) -> Iterator[Program]:
    """Yield the programs for TPUs: those of one chip, then those of a pod."""
    place = _on_one(devices(TPU))
    for name, rule, shapes, most in _TPU_TREES:
        for dtype, largest in zip(("float32", "bfloat16"), most, strict=True):
            compared = name != "transformer"  # optax takes other units for its layers
            yield _clip(
                f"{name} {dtype}", TPU, rule, _tree(shapes, dtype, place), largest, compared
            )
    tree = _tree(_nfnet_f0(), "float32", place)
    yield _clip("NFNet-F0 float32", TPU, _OUT_LAST, tree, 1.25, telemetry=True)
    in_order = {"xla_memory_scheduler": "post_order"}
    yield _clip(
        "post_order NFNet-F0 float32", TPU, _OUT_LAST, tree, 1.05, telemetry=True, options=in_order
    )
    yield _step(tree, TPU, place, 1.36)
    yield _step(tree, TPU, place, 1.15, scheduler="dfs")
    yield from _pod_programs(devices)


def gpu_programs(devices: Devices) -> Iterator[Program]:
    """Yield the programs for a GPU.

    A gradient is read for its norm and again to scale it: 4 passes, where 3 are the least.
    """
    place = _on_one(devices(GPU))
    options = {"xla_gpu_autotune_level": 0}  # there is nothing to time kernels on
    limits: Mapping[Cost, float] = {"kernels": 1.0, "device_bytes": 1.05}
    more: dict[str, Any] = {"options": options, "compared": True, "at_most_peer": limits}
    single, half = (_tree(_nfnet_f0(), dtype, place) for dtype in ("float32", "bfloat16"))
    yield _clip("NFNet-F0 float32", GPU, _OUT_LAST, single, 1.37, **more)
    yield _clip("NFNet-F0 bfloat16", GPU, _OUT_LAST, half, 1.40, **more)
    yield _clip("NFNet-F0 float32", GPU, _OUT_LAST, single, 1.38, telemetry=True, **more)
    step = _step(single, GPU, place, 1.45)
    yield replace(step, options=options, at_most_peer=limits)
    tree = _tree(_gpt2(), "float32", place)
    yield _clip("GPT-2 float32", GPU, _GPT2, tree, 1.37, **more)
    yield _clip("GPT-2 float32", GPU, _GPT2, tree, 1.38, telemetry=True, options=options)


def _pod_programs(devices: Devices) -> Iterator[Program]:
    """Yield programs for many chips, of which the exchange matters."""
    import optax

    import agc_jax

    pod = _mesh(devices(POD))
    tree = _tree(_nfnet_f0(), "float32", _along_the_longest_axis(pod))
    exchange: dict[str, Any] = {"at_most_peer": {"collective_bytes": 1.0}}
    what = f"fully sharded over {pod.size} NFNet-F0 float32"
    yield _clip(what, POD, _OUT_LAST, tree, math.inf, compared=True, **exchange)
    # As many numbers for each parameter whatever the number of devices.
    large = _mesh(devices(LARGE_POD))
    shapes: Shapes = {"wide.kernel": (512, 2 * large.size), "tall.kernel": (large.size, 512)}
    shapes |= {"kernel": (512, large.size), "bias": (2 * large.size,)}
    small_tree, tree = (
        _tree(shapes, "float32", _along_the_longest_axis(mesh)) for mesh in (pod, large)
    )
    function = _clip_function(_OUT_LAST, telemetry=True)
    yield Program(
        f"clip and telemetry, fully sharded over {large.size} stand-in float32",
        LARGE_POD,
        function,
        (tree, tree),
        peer=Peer(f"{pod.size} devices", function, (small_tree, small_tree)),
        **exchange,
    )
    sgd = optax.sgd(0.1, 0.9, nesterov=True)
    rule = AGC(units=_OUT_LAST.units)
    step, plain = (
        _training_step(tx, pod) for tx in (optax.chain(agc_jax.adaptive_grad_clip(rule), sgd), sgd)
    )
    yield Program(
        f"training step, replicated over {pod.size} stand-in float32",
        POD,
        *step,
        peer=Peer("without AGC", *plain),
        **exchange,
    )


def _clip(
    what: str,
    target: str,
    rule: AGC,
    tree: Tree,
    most: float,
    compared: bool = False,
    *,
    telemetry: bool = False,
    **more: Any,
) -> Program:
    """Return the program that clips a tree, compared with optax's or not."""
    name = "clip and telemetry" if telemetry else "clip"
    separator = ", " if what.startswith("fully") else " "
    return Program(
        name + separator + what,
        target,
        _clip_function(rule, telemetry=telemetry),
        (tree, tree),
        3 * _bytes(tree),
        most,
        peer=Peer("optax", _optax_clip, (tree, tree)) if compared else None,
        **more,
    )


def _clip_function(rule: AGC, *, telemetry: bool) -> Function:
    import agc_jax

    def function(gradients: Any, params: Any) -> Any:
        result = agc_jax.adaptive_clip_gradients(gradients, params, rule)
        return result if telemetry else result[0]

    return function


def _optax_clip(gradients: Any, params: Any) -> Any:
    import optax

    return optax.adaptive_grad_clip(0.01).update(gradients, optax.EmptyState(), params)[0]


def _step(params: Tree, target: str, place: Any, most: float, scheduler: str = "") -> Program:
    """Return an optimizer's step on NFNet-F0: everything a rule can ask for, and SGD."""
    import jax
    import optax

    import agc_jax

    rule = AGC(
        clipping={"stem*": None, "*": Schedule([(0, 0.04), (1000, 0.01)])},
        exclude=["@head"],
        units=_OUT_LAST.units,
        nonfinite="zero",
        head="head",
    )

    def step_of(first: Any) -> tuple[Function, tuple[Any, ...]]:
        tx = optax.chain(first, optax.sgd(0.1, 0.9, nesterov=True))

        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf.shape)),
            jax.eval_shape(tx.init, params),
        )
        return step, (params, state, params)

    name = f", {scheduler}" if scheduler else ""
    return Program(
        f"step with SGD, schedule, zero policy{name} NFNet-F0 float32",
        target,
        *step_of(agc_jax.adaptive_grad_clip(rule)),
        5 * _bytes(params),  # parameters and momentum: read and written; gradients: read
        most,
        donate=(0, 1),
        reused=2 * _bytes(params),  # parameters and momentum
        options={"xla_memory_scheduler": scheduler} if scheduler else {},
        peer=Peer("optax", *step_of(optax.adaptive_grad_clip(0.01))),
    )


def _training_step(tx: Any, mesh: Any) -> tuple[Function, tuple[Any, ...]]:
    """Return a step of a small network, its parameters replicated and its batch split."""
    import jax
    import jax.numpy as jnp

    def loss(params: Any, images: Any) -> Any:
        hidden = images
        for name in ("conv0", "conv1"):
            hidden = jax.lax.conv_general_dilated(
                hidden, params[f"{name}.kernel"], (2, 2), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            hidden = jax.nn.relu(hidden + params[f"{name}.bias"])
        hidden = jnp.tanh(hidden.mean((1, 2)) @ params["dense.kernel"] + params["dense.bias"])
        return jnp.mean((hidden @ params["head.kernel"]) ** 2)

    def step(params: Any, state: Any, images: Any) -> Any:
        gradients = jax.grad(loss)(params, images)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    def placed(leaf: Any, *spec: str) -> Any:
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes: Shapes = {
        "conv0.kernel": (3, 3, 3, 64),
        "conv0.bias": (64,),
        "conv1.kernel": (3, 3, 64, 128),
        "conv1.bias": (128,),
        "dense.kernel": (128, 512),
        "dense.bias": (512,),
        "head.kernel": (512, 10),
    }
    params = _tree(shapes, "float32", lambda _: jax.NamedSharding(mesh, jax.P()))
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
    images = jax.ShapeDtypeStruct((mesh.size, 16, 16, 3), jnp.float32)
    return step, (params, state, placed(images, "shard"))


def _on_one(devices: Any) -> Callable[[tuple[int, ...]], Any]:
    import jax

    place = jax.sharding.SingleDeviceSharding(devices[0])
    return lambda _: place


def _mesh(devices: Any) -> Any:
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(devices), ("shard",))


def _along_the_longest_axis(mesh: Any) -> Callable[[tuple[int, ...]], Any]:
    """Shard the longest axis that the number of devices divides, of parameters that have one."""
    import jax

    def place(shape: tuple[int, ...]) -> Any:
        fitting = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
        longest = max(fitting, key=lambda axis: shape[axis], default=None)
        spec = ["shard" if axis == longest else None for axis in range(len(shape))]
        return jax.NamedSharding(mesh, jax.P(*spec))

    return place


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


def _gpt2() -> Shapes:
    """GPT-2 small in Flax's layout, its output tied: 148 tensors, 124,439,808 parameters."""
    width = 768
    shapes: Shapes = {"wte.embedding": (50257, width), "wpe.embedding": (1024, width)}
    for name in ("ln_f", *(f"h{block}.ln_{k}" for block in range(12) for k in (1, 2))):
        shapes[f"{name}.scale"] = shapes[f"{name}.bias"] = (width,)
    for block, (name, inputs, outputs) in itertools.product(
        range(12), (("qkv", 1, 3), ("proj", 1, 1), ("up", 1, 4), ("down", 4, 1))
    ):
        shapes[f"h{block}.{name}.kernel"] = (inputs * width, outputs * width)
        shapes[f"h{block}.{name}.bias"] = (outputs * width,)
    return shapes


# A tree of bare arrays has names, but no layer types.
_OUT_LAST: Final = AGC(units={"*kernel": "... i o -> o"})
_GPT2: Final = AGC(units={"*kernel": "... i o -> o", "*embedding": "v d -> v"})
_TPU_TREES: Final[tuple[tuple[str, AGC, Shapes, tuple[float, float]], ...]] = (
    ("conv", AGC(), {"kernel": (3, 3, 256, 512), "bias": (512,)}, (1.02, 1.05)),
    ("dense", AGC(), {"kernel": (1024, 4096), "bias": (4096,)}, (1.02, 1.05)),
    (
        "transformer",
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
        _transformer_block(),
        (1.25, 1.15),  # the largest arrays leave no room on the chip, and are read twice
    ),
    ("NFNet-F0", _OUT_LAST, _nfnet_f0(), (1.02, 1.05)),
)
"""Name, rule, shapes, and the most that may be moved in float32 and bfloat16."""
