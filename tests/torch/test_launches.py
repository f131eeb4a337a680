"""How many kernels AGC, SAM and weight standardisation launch on a GPU, counted without one.

Tensors have no memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agc_torch
from agc import AGC, SAM, Schedule
from agc.config import Nonfinite, SkipPolicy
from agc.data import Batch
from agc.nfnet import WsDtype, parameters
from agc.recipe import load_recipe, numbers
from agc.training import Launch
from agc_conformance.backends.peers import timm
from agc_torch import fused
from agc_torch.nfnet import WSConv2d, nfnet
from agc_torch.train import Trainer
from benchmarks.shapes import gpt2_small

FOREACH = {1: 110, 2: 64, 3: 48}
"""Tensors that one launch of a foreach operation takes, by its lists of tensors."""
BLOCKS, BLOCK = 320, 65536
"""Blocks that one launch of it takes, and their elements."""
NO_KERNELS = ("empty", "new_empty", "empty_like", "detach", "promote_types", "scalar_tensor")
Build: TypeAlias = Callable[[], tuple[nn.Module, AGC]]
PROCESSES = 8
KERNELS = (
    "norms",
    "share",
    "decide",
    "scale",
    "norm",
    "perturb",
    "standardise",
    "standardise_back",
    "standardise_low",
    "standardise_low_back",
)


class Launches(TorchDispatchMode):  # type: ignore[misc]
    """Counts kernels of PyTorch's own, the bytes that they move, collectives, and what is sent.

    Sent is what comes from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = self.collectives = self.sent = 0
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            self.collectives += func.namespace == "c10d"
            return result
        name = func.overloadpacket.__name__
        inputs = args[1:] if "copy_" in name else args
        read = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name.endswith("_"):  # in place
            written = list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]]
        if name in ("_to_copy", "copy_"):
            source = args[1 if name == "copy_" else 0]
            self.sent += source.device.type == "cpu" and written[0].device.type != "cpu"
        if not func.is_view and name not in NO_KERNELS:
            self.names.append(name)
            self.count += self._foreach(name, args) if name.startswith("_foreach") else 1
            self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in read + written)
        return result

    @staticmethod
    def _foreach(name: str, args: tuple[Any, ...]) -> int:
        lists = [argument for argument in args if isinstance(argument, (list, tuple))]
        most = FOREACH[len(lists)]
        launches = tensors = blocks = 0
        for tensor in lists[0]:
            tensors += 1
            last = math.ceil(tensor.numel() / BLOCK) - 1
            for block in range(last + 1):
                blocks += 1
                if blocks == BLOCKS or (block == last and tensors == most):
                    launches, blocks, tensors = launches + 1, 0, int(block < last)
        launches += blocks > 0
        if name == "_foreach_norm":  # two fills, and sums of the blocks' sums
            launches += 2 + math.ceil(len(lists[0]) / most)
        return launches


class Kernel:
    """Stands for a kernel of Triton's."""

    def __init__(self) -> None:
        self.count = self.lanes = 0

    def run(self, *_: Any, warmup: bool = False, LANES: int = 0, **__: Any) -> None:  # noqa: N803
        self.count += not warmup
        self.lanes = LANES

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kernel]]:
    """Take tensors without memory for a GPU's that has Triton."""
    module = ModuleType("agc_torch.triton_kernels")
    stand_ins = {f"{name}_kernel": Kernel() for name in KERNELS}
    module.__dict__.update(stand_ins)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused, "_triton_dtypes", lambda: {torch.float32: None})
    monkeypatch.setattr(fused, "available", lambda device: True)
    checks = (
        fused.table,
        fused.shared_table,
        fused._moving_compiles,
        fused._standardising_compiles,
    )
    for cached in checks:
        cached.cache_clear()
    yield list(stand_ins.values())
    for cached in checks:
        cached.cache_clear()


class Gpt2(nn.ParameterDict):  # type: ignore[misc]
    """Parameters of GPT-2, in the shapes that a list of them has."""

    def __init__(self) -> None:
        super().__init__(
            {name.replace(".", "/"): torch.empty(shape) for name, shape in gpt2_small().items()}
        )


def gpt2() -> tuple[nn.Module, AGC]:
    model = Gpt2()
    units = {n: "o i -> o" if p.ndim == 2 else "... ->" for n, p in model.named_parameters()}
    return model, AGC(clipping=0.01, units=units)


def f0() -> tuple[nn.Module, AGC]:
    return nfnet("F0", 1000), AGC.profile("deepmind")


def with_gradients(model: Build) -> tuple[nn.Module, AGC, int]:
    """Return a model, how it is clipped, and the bytes of its parameters."""
    with torch.device("meta"):
        module, rule = model()
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
    return module, rule, sum(p.numel() * p.itemsize for p in module.parameters())


@pytest.mark.parametrize(("model", "most"), [(f0, 7), (gpt2, 3)])
def test_agc_takes_a_handful(model: Build, most: int, kernels: list[Kernel]) -> None:
    module, rule, size = with_gradients(model)
    agc_torch.adaptive_clip_grad_(module, rule)
    before = sum(kernel.count for kernel in kernels)
    with Launches() as others:
        agc_torch.adaptive_clip_grad_(module, rule)
    assert sum(kernel.count for kernel in kernels) - before == most
    assert others.count <= 1  # addresses, if they changed
    assert others.bytes < size / 1000


@pytest.mark.parametrize("capturable", [False, True])
def test_a_schedule_sends_nothing_from_the_host(capturable: bool, kernels: list[Kernel]) -> None:
    """A number that is sent without pinned memory is waited for; a graph cannot even record it."""
    module, rule, _ = with_gradients(gpt2)
    schedule = Schedule([(0, 0.5), (4, 0.1)])
    optimizer = Idle(module.parameters())
    optimizer.param_groups[0]["capturable"] = capturable
    rule = replace(rule, clipping={"wte/*": 0.02, "*": schedule})
    agc_torch.attach(optimizer, module, rule)
    optimizer.step()
    sent = fused._numbers.cache_info().misses
    with Launches() as launches:
        optimizer.step()
    assert fused._numbers.cache_info().misses == sent
    assert launches.sent == 0
    assert len(launches.names) <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("policy", "operations", "passes"), [("propagate", 15, 3.1), ("zero", 18, 5.1)]
)
@pytest.mark.parametrize("model", [f0, gpt2])
def test_the_norm_of_all_gradients_takes_a_few(
    model: Build, policy: Nonfinite, operations: int, passes: float, dtype: torch.dtype
) -> None:
    """Whatever the number of parameters: one operation on all of them is some launches."""
    module, _, _ = with_gradients(model)
    for parameter in module.to(dtype).parameters():
        parameter.grad = torch.empty_like(parameter)
    size = sum(p.numel() * p.itemsize for p in module.parameters())
    optimizer = Idle(module.parameters())
    agc_torch.attach(optimizer, module, AGC(clipping=None, nonfinite=policy), max_norm=1.0)
    with Launches() as launches:
        optimizer.step()
    assert len(launches.names) <= operations
    assert launches.count <= 50
    assert launches.bytes < passes * size


@pytest.fixture
def many_processes() -> Iterator[None]:
    """Be one of many processes, of which the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", FakeStore(), rank=1, world_size=PROCESSES)
    yield
    torch.distributed.destroy_process_group()


def shard_(module: nn.Module, axis: int) -> None:
    """Cut the parameters along an axis, as FSDP2 does; scalars and what is too short stay whole."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in module.modules():
        for name, p in layer._parameters.items():
            if p is None:
                continue
            if p.dim() <= axis or p.shape[axis] < PROCESSES:
                tensors = [torch.empty(p.shape) for _ in range(2)]
            else:
                local = list(p.shape)
                size = -(-local[axis] // PROCESSES)
                local[axis] = min(size, local[axis] - size)
                known = {"shape": p.shape, "stride": p.stride(), "run_check": False}
                tensors = [
                    DTensor.from_local(torch.empty(local), mesh, [Shard(axis)], **known)
                    for _ in range(2)
                ]
            layer._parameters[name] = nn.Parameter(tensors[0])
            layer._parameters[name].grad = tensors[1]


class Idle(torch.optim.Optimizer):  # type: ignore[misc]
    """Does nothing."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("model", "axis", "most"), [(f0, 0, 11), (f0, 1, 15), (gpt2, 0, 6), (gpt2, 1, 9)]
)
@pytest.mark.usefixtures("many_processes")
def test_agc_of_shards_takes_a_handful(
    model: Build, axis: int, most: int, kernels: list[Kernel]
) -> None:
    with torch.device("meta"):
        module, rule = model()
    shard_(module, axis)
    optimizer = Idle(module.parameters())
    agc_torch.attach(optimizer, module, rule)
    for step in (lambda: agc_torch.adaptive_clip_grad_(module, rule), optimizer.step):
        step()
        before = sum(kernel.count for kernel in kernels)
        with Launches() as others:
            step()
        assert sum(kernel.count for kernel in kernels) - before == most
        assert others.count <= 2  # factors of local units, and the number of steps
        assert others.collectives == 1


def test_a_gradient_is_loaded_as_its_address_allows(kernels: list[Kernel]) -> None:
    layer = nn.Linear(64, 8, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    agc_torch.attach(optimizer, layer, AGC(clipping=0.01))
    lanes = []
    for start in (0, 4, 1, 0):
        layer.weight.grad = torch.zeros(520)[start : start + 512].view(8, 64)
        optimizer.step()
        lanes.append(kernels[KERNELS.index("scale")].lanes)
    assert lanes == [4, 4, 1, 4]


@pytest.mark.parametrize("policy", ["skip_perturb", "skip_step"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("model", [f0, gpt2])
def test_sam_takes_a_few(
    model: Build, adaptive: bool, policy: SkipPolicy, kernels: list[Kernel]
) -> None:
    module, _, size = with_gradients(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    sharpness = agc_torch.SharpnessAware(module, SAM(rho=0.05, adaptive=adaptive, nonfinite=policy))
    descent = [torch.ones_like(parameter) for parameter in module.parameters()]

    def step() -> None:
        with sharpness.perturbed(optimizer):
            for parameter, gradient in zip(module.parameters(), descent, strict=True):
                parameter.grad = gradient

    step()  # makes what is the same in every step
    before = sum(kernel.count for kernel in kernels)
    with Launches() as others:
        step()
    poisons = policy == "skip_step"  # which makes the gradients NaN, or leaves them as they are
    assert others.count + sum(kernel.count for kernel in kernels) - before <= 30 + 20 * poisons
    others.bytes -= 2 * size * poisons
    assert others.bytes < 2.1 * size  # the restoration; the kernels move five times the size


def test_a_step_of_a_recipe_adds_few(
    kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step of ``agc train`` launches but for the model: AGC, SAM, SGD, average, numbers."""
    changes = ["train.batch=2", "train.epochs=1", "data.train.images=8", "schedule.warmup_epochs=0"]
    changes += ["precision.standardise=float32", "precision.compute=float32"]
    changes += ["sam.rho=0.05", "sam.group=2", "sam.nonfinite=skip_perturb"]
    recipe = load_recipe("nfnet-f0", changes)
    options = recipe.options()
    specs = parameters(options.variant, options.num_classes, options.in_channels)

    def pairs_of(model: nn.Module) -> list[tuple[Any, Tensor]]:
        named = dict(model.named_parameters())
        return [(spec, named[spec.name]) for spec in specs]

    # Which want numbers, or a device with autocast.
    monkeypatch.setattr("agc_torch.train.pairs_of", pairs_of)
    monkeypatch.setattr(Trainer, "_precision", lambda self: nullcontext())
    trainer = Trainer(recipe, Launch(device="meta"))
    for group in trainer._optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    trainer._begin(0)
    passes, kernels_inside = Launches(), 0
    run = trainer._loss

    def loss(*tensors: Tensor) -> Tensor:
        nonlocal kernels_inside
        before = sum(kernel.count for kernel in kernels)
        with passes:
            result = run(*tensors)
        kernels_inside += sum(kernel.count for kernel in kernels) - before
        return result

    monkeypatch.setattr(trainer, "_loss", loss)
    images, labels = np.zeros((2, 64, 64, 3), np.float32), np.zeros(2, np.int32)
    keep = np.ones((2, sum(options.variant.depths)), bool)
    batch = Batch(images, labels, labels, np.ones(2, np.float32), np.arange(2), keep, None)
    table = numbers(recipe)
    trainer.step(batch, table.at(0))  # makes what is the same in every step
    passes.count = passes.bytes = kernels_inside = 0
    before = sum(kernel.count for kernel in kernels)
    with Launches() as everything:
        trainer.step(batch, table.at(1))
    assert sum(kernel.count for kernel in kernels) - before - kernels_inside == 11
    size = sum(p.numel() * p.itemsize for p in trainer._model.parameters())
    assert passes.count <= 2 * 755
    assert everything.count - passes.count <= 86
    assert everything.bytes - passes.bytes < 19.1 * size  # 14 of SGD, 3 of the average, 2 of SAM


@pytest.mark.parametrize(
    ("ws_dtype", "name"), [("float32", "standardise"), ("bfloat16", "standardise_low")]
)
def test_standardisation_takes_two(ws_dtype: WsDtype, name: str, kernels: list[Kernel]) -> None:
    """One launch a weight forward and one backward, and no other."""
    with torch.device("meta"):
        model = nfnet("F0", 1000, ws_dtype=ws_dtype)
        weights = [m for m in model.modules() if isinstance(m, WSConv2d)]
    assert len(weights) == 57
    with Launches() as others:
        made = [weight.standardised(torch.bfloat16) for weight in weights]
        gradients = [torch.empty_like(one) for one in made]
        torch.autograd.backward(made, gradients)
    forward, backward = (kernels[KERNELS.index(f"{name}{which}")] for which in ("", "_back"))
    assert (forward.count, backward.count) == (57, 57)
    assert others.count == 0


@pytest.mark.parametrize("model", [f0, gpt2])
def test_without_triton_far_fewer_than_timm(model: Build) -> None:
    module, rule, size = with_gradients(model)
    with Launches() as ours:
        agc_torch.adaptive_clip_grad_(module, rule)
    with Launches() as theirs:
        timm.load().adaptive_clip_grad(module.parameters(), clip_factor=0.01)
    assert ours.count <= 2 * len(list(module.parameters()))
    assert ours.count < theirs.count / 5
    assert ours.bytes < 4.1 * size
    assert ours.bytes < theirs.bytes / 2
