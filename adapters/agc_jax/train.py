"""The step of ``agc train`` in JAX; the loop around it is :mod:`agc.training`.

Each device computes the gradient of its own examples, and no example moves between devices
(``shard_map``); what they exchange is gradients. All that follows is compiled as if there was one
device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from jax import lax
from optax.tree_utils import tree_get, tree_set

from agc import nfnet as core
from agc.config import AGC, SAM, Nonfinite
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.data.batches import block_of
from agc.errors import FormatError, NonFiniteError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training import Launch, Metrics, State, Totals, check_offered, trained_names
from agc_jax.clip import Clipper
from agc_jax.devices import DATA, EVERYWHERE, SPLIT, Devices, Named, join, mesh
from agc_jax.nfnet import NFNet
from agc_jax.recipe import after_clipping
from agc_jax.sam import SamStats, sharpen, two_passes
from agc_jax.stats import Stats
from agc_jax.units import ModelUnits, flatten, plan, units

__all__ = ["Trainer", "trainer"]

Tree = Any


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is all local devices of JAX's first platform if None, as ``"cuda:1"`` is the
        second GPU alone. ``engine="fsdp"`` shards parameters, momentum and average over the
        devices.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model cannot do, there is no such device, the hosts do not
        divide the batch, or the other processes cannot be joined.

    Notes
    -----
    A step is one compiled program, in which only the recipe is a constant; a step at which SAM does
    not perturb is that of the recipe without SAM. Trainings of equal recipes share them.

    Of the devices of a process as many are used as divide its part of the batch, or the groups of
    SAM in it.

    JAX has float64 only where it is enabled: for a recipe in float64, within the methods.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        check_offered(launch, "JAX", engines=("fsdp",), coordinator=True)
        self.hosts = join(launch)
        self._recipe = recipe
        self._plain = replace(recipe, sam=None)  # of the steps that do not perturb
        part = len(block_of("train.batch", recipe.train.batch, 0, self.hosts.count))
        group = recipe.sam.group if recipe.sam else "batch"
        self._devices = Devices(
            mesh(launch.device, part if group == "batch" else part // group),
            sharded=launch.engine == "fsdp",
            dtype=recipe.precision.state,
        )
        self._own = self._devices.count // self.hosts.count
        self._microbatch = max(1, (launch.microbatch or part) // self._own)
        self._model = _model(recipe.model.options())
        first = self._devices.mesh.devices[0]
        self.facts: Mapping[str, Any] = {
            "framework": "jax",
            "jax": jax.__version__,
            "device": f"{first.platform}:{first.id}",
            "devices": self._devices.count,
            "processes": self.hosts.count,
        }
        self._trained = trained_names(recipe)
        self._arrays: _Arrays | None = None
        self._idle: dict[str, npt.NDArray[Any]] = {}  # momentum of what is not trained
        self._made = 0

    def _enabled(self) -> AbstractContextManager[None]:
        """Let JAX compute in the dtype of the recipe, in this thread."""
        wide = self._devices.dtype == "float64"
        enabled: AbstractContextManager[None] = jax.enable_x64(True) if wide else nullcontext()
        return enabled

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        ema = (state.ema or {}) if self._recipe.ema else None
        for arrays in (state.parameters, state.momentum, ema):
            if arrays is not None:
                core.check_arrays(self._specs(), arrays)
        placed, momentum = self._devices.placed, state.momentum
        with self._enabled():
            self._arrays = _Arrays(
                placed(state.parameters),
                placed({name: momentum[name] for name in self._trained}),
                None if ema is None else placed(ema),
            )
        idle = set(momentum).difference(self._trained)
        self._idle = {name: np.array(momentum[name], self._devices.dtype) for name in idle}
        self._made = state.step

    def state(self) -> State:
        """Return a copy of the state."""
        assert self._arrays is not None
        parts: dict[str, Any] = {}
        for part, arrays in self._arrays._asdict().items():
            if arrays is not None:
                with self._enabled():
                    known = self._devices.whole(arrays)
                known |= self._idle if part == "momentum" else {}
                parts[part] = {spec.name: known[spec.name] for spec in self._specs()}
        return State(step=self._made, facts=self.facts, **parts)

    def save_sharded(self, folder: Path) -> None:
        """Write the state by Orbax, each process its part."""
        assert self._arrays is not None
        with self._enabled():
            finite = _all_finite(self._arrays)
        if not finite:
            raise NonFiniteError(f"the state is not finite before step {self._made}")
        parts = {part: of for part, of in self._arrays._asdict().items() if of is not None}
        parts["momentum"] = {**parts["momentum"], **self._idle}
        with (
            self._enabled(),
            _checkpointer(OSError, f"{folder}: cannot be written") as checkpointer,
        ):
            checkpointer.save(folder.absolute(), parts)

    def load_sharded(self, folder: Path, step: int) -> None:
        """Take over what :meth:`save_sharded` has written, on any number of devices."""
        shapes = {spec.name: spec.shape for spec in self._specs()}
        wanted: dict[str, Any] = self._devices.shapes(shapes)
        idle = {
            name: np.zeros(shape, self._devices.dtype)
            for name, shape in shapes.items()
            if name not in self._trained
        }
        parts: dict[str, Any] = {"parameters": wanted, "momentum": wanted | idle}
        if self._recipe.ema:
            parts["ema"] = wanted
        with (
            self._enabled(),
            _checkpointer(FormatError, f"{folder}: cannot be read") as checkpointer,
        ):
            parts = checkpointer.restore(folder.absolute(), parts)
        self._idle = {name: parts["momentum"].pop(name) for name in idle}
        self._arrays = _Arrays(parts["parameters"], parts["momentum"], parts.get("ema"))
        self._made = step

    def _specs(self) -> list[core.ParameterSpec]:
        options = self._recipe.model.options()
        return [*core.parameters(options.variant, options.num_classes, options.in_channels)]

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        recipe = self._recipe
        classes, dtype = recipe.model.num_classes, self._devices.dtype
        assert classes is not None
        targets = soft_labels(batch, classes, recipe.train.smoothing, dtype)
        if recipe.sam and not float(numbers.rho or 0):
            recipe = self._plain
        with self._enabled():
            self._arrays, done = _step(
                self._arrays,
                self._devices.examples(_Examples(batch.images, targets, batch.masks)),
                jax.tree.map(lambda number: number.astype(dtype), vars(numbers)),
                np.uint32(self._made),
                recipe=recipe,
                microbatch=self._microbatch,
                devices=self._devices,
            )
        self._raise_if_nonfinite(done)
        self._made += 1
        perturbed = done.sam.perturbed_loss if done.sam else None
        if done.agc is None:
            return Metrics(loss=done.loss, perturbed_loss=perturbed)
        return Metrics(
            loss=done.loss,
            perturbed_loss=perturbed,
            units=done.agc.units,
            clipped=done.agc.clipped,
            max_ratio=done.agc.max_ratio,
        )

    def _raise_if_nonfinite(self, done: _Done) -> None:
        """Raise where a rule says ``nonfinite="raise"``, for which alone the host waits."""
        sam, agc = self._recipe.sam, self._recipe.agc
        if sam and done.sam and sam.rule.nonfinite == "raise" and not np.isfinite(done.sam.norm):
            raise NonFiniteError(f"the norm of the ascent gradient is {done.sam.norm}")
        if agc and done.agc and agc.nonfinite == "raise" and done.agc.nonfinite:
            assert self._arrays is not None
            names = plan(self._arrays.momentum, agc, units=self._model.units)
            rows = done.agc.parameters(names)
            bad = [name for name, row in rows.items() if row.nonfinite]
            raise NonFiniteError(f"units of these parameters have a norm that is not finite: {bad}")
        if agc and done.norm is not None and agc.nonfinite == "raise":
            norm = float(done.norm)
            if not np.isfinite(norm):
                raise NonFiniteError(f"the norm of all gradients together is {norm}")

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images; of equal logits, that of the lowest class counts as the largest."""
        assert self._arrays is not None
        parameters = self._arrays.ema if weights == "ema" else self._arrays.parameters
        assert parameters is not None
        loss, top1, top5, images = 0.0, 0, 0, 0
        options = self._recipe.model.options()
        for batch in batches:
            # What fills the devices up has weight 0.
            more = -len(batch.images) % self._own
            filled = (np.pad(rows, [(0, more)] + [(0, 0)] * (rows.ndim - 1)) for rows in batch)
            with self._enabled():
                classified = _classify(
                    parameters,
                    *self._devices.examples(tuple(filled)),
                    options=options,
                    devices=self._devices,
                )
            losses, rank, real = map(np.asarray, classified)
            loss += float(losses[real].sum(dtype=np.float64))
            top1 += int((rank[real] < 1).sum())
            top5 += int((rank[real] < min(5, options.num_classes)).sum())
            images += int(real.sum())
        return Totals(loss, top1, top5, images)


def trainer(recipe: Recipe, launch: Launch) -> Trainer:
    """Return a training; see :meth:`agc.cli.frameworks.Framework.trainer`."""
    return Trainer(recipe, launch)


@contextmanager
def _checkpointer(failure: type[Exception], what: str) -> Iterator[Any]:
    """Give what writes and reads sharded checkpoints; raise a failure in place of its own."""
    # Here, because it takes longer to import than all else.
    import orbax.checkpoint

    try:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            yield checkpointer
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise failure(f"{what} by Orbax: {error}") from None


# --- what is compiled -----------------------------------------------------------------------------


class _Model(NamedTuple):
    """An NFNet without numbers, taken apart."""

    graph: Any
    names: tuple[str, ...]
    structure: Any
    others: Tree
    """Random numbers, of which none is drawn: masks are given."""
    units: ModelUnits

    def __call__(
        self, parameters: Mapping[str, Any], images: jax.Array, **options: Any
    ) -> jax.Array:
        """Return the logits in the dtype of the parameters."""
        tree = jax.tree.unflatten(self.structure, [parameters[name] for name in self.names])
        logits = nnx.merge(self.graph, tree, self.others)(images, **options)
        return logits.astype(parameters[self.names[0]].dtype)


@lru_cache(maxsize=8)
def _model(options: core.Options, compute: str = "float32") -> _Model:
    made = partial(NFNet, options, dtype=jnp.dtype(compute))
    model = nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0)))
    graph, parameters, others = nnx.split(model, nnx.Param, ...)
    names, _, structure = flatten(parameters)
    return _Model(graph, names, structure, others, units(model))


class _Arrays(NamedTuple):
    """What a step changes, by the names of :class:`State`."""

    parameters: Named
    momentum: Named
    """Of the parameters that are trained."""
    ema: Named | None


class _Examples(NamedTuple):
    """Examples, along the first axis of every array."""

    images: Any
    targets: Any
    masks: core.Masks


class _Done(NamedTuple):
    """What a step did; all stays on the device."""

    loss: jax.Array
    sam: SamStats | None
    agc: Stats | None
    norm: jax.Array | None
    """Of all gradients together, if it is limited."""


@partial(jax.jit, static_argnames=("recipe", "microbatch", "devices"), donate_argnames="arrays")
def _step(
    arrays: _Arrays,
    batch: _Examples,
    numbers: Mapping[str, Any],
    made: jax.Array,
    *,
    recipe: Recipe,
    microbatch: int,
    devices: Devices,
) -> tuple[_Arrays, _Done]:
    """Make a step: gradient, AGC, norm, decay, momentum, rate, average (AGC-7)."""
    batch = batch._replace(masks=_masks(recipe, batch.masks, len(batch.images), made))
    frozen = dict(arrays.parameters)
    trained = {name: frozen.pop(name) for name in arrays.momentum}
    gradient = devices.mapped(
        partial(_mean_gradient, recipe, microbatch, devices),
        (EVERYWHERE, EVERYWHERE, SPLIT, EVERYWHERE),
        (EVERYWHERE, {name: devices.spec(w.shape) for name, w in trained.items()}, EVERYWHERE),
    )
    loss, gradients, sam = gradient(trained, frozen, batch, numbers["rho"])
    agc = None
    if recipe.agc:
        rule = _rule(recipe.agc, numbers["clipping"])
        clip = Clipper(rule, _model(recipe.model.options()).units)
        gradients, agc = clip(gradients, trained, made)
    norm = None
    if recipe.optimizer.max_norm is not None:
        gradients, norm = _limited(recipe, recipe.optimizer.max_norm, gradients)
    updated = _updated(recipe, trained, arrays.momentum, gradients, numbers["rate"])
    if (may := _may_step(recipe, sam, agc, norm)) is not None:
        updated = jax.tree.map(partial(jnp.where, may), updated, (trained, arrays.momentum))
    trained, momentum = updated
    parameters = frozen | trained
    ema, decay = arrays.ema, numbers["ema_decay"]
    if decay is not None:
        ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, parameters)
    arrays = devices.kept(_Arrays(parameters, momentum, ema))
    everywhere = partial(lax.with_sharding_constraint, shardings=devices.sharding())
    return arrays, jax.tree.map(everywhere, _Done(loss, sam, agc, norm))


@jax.jit  # type: ignore[untyped-decorator]
def _all_finite(arrays: _Arrays) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays)]).all()


def _masks(recipe: Recipe, given: core.Masks, examples: int, made: jax.Array) -> core.Masks:
    """Return a batch's masks; those that it lacks are drawn, a function of seed and step."""
    options = recipe.model.options()
    rates = core.Masks(
        [options.stochastic_depth * b.stochastic_depth for b in core.blocks(options.variant)],
        [options.dropout] * core.features(options.variant),
    )
    high, low = divmod(recipe.seed, 2**32)
    key = jax.random.fold_in(jax.random.key(np.uint32(low)), high)
    masks = []
    for purpose, (mask, rate) in enumerate(zip(given, rates, strict=True)):
        if mask is None and any(rate):
            drawn = jax.random.fold_in(jax.random.fold_in(key, made), purpose)
            uniform = jax.random.uniform(drawn, (examples, len(rate)), jnp.float32)
            mask = uniform >= jnp.asarray(rate, jnp.float32)
        masks.append(mask)
    return core.Masks(*masks)


def _mean_gradient(
    recipe: Recipe,
    microbatch: int,
    devices: Devices,
    trained: Named,
    frozen: Named,
    batch: _Examples,
    rho: jax.Array | None,
) -> tuple[jax.Array, Named, SamStats | None]:
    """Return loss, gradient and SAM's numbers of the whole batch, from a device's examples."""
    gradient = partial(_gradient, recipe, microbatch, frozen)
    sam = None
    if recipe.sam:
        assert rho is not None
        loss, gradients, sam = _sharpness_aware(recipe, gradient, devices, rho, trained, batch)
        norms = lax.all_gather(sam.norm, DATA)  # NaN is the largest, as it may not be in pmax
        sam = SamStats(norms.max(), *lax.pmean((sam.loss, sam.perturbed_loss), DATA))
    else:
        loss, gradients = gradient(trained, batch)
    return lax.pmean(loss, DATA), jax.tree.map(devices.mean, gradients), sam


def _gradient(
    recipe: Recipe, microbatch: int, frozen: Named, trained: Named, batch: _Examples
) -> tuple[jax.Array, Named]:
    """Return the mean loss of examples and its gradient, one micro-batch after another."""
    model = _model(recipe.options(), recipe.precision.compute)
    examples = len(batch.images)

    def share(trained: Named, part: _Examples) -> jax.Array:
        logits = model(frozen | trained, _images(recipe, part.images), masks=part.masks)
        return optax.softmax_cross_entropy(logits, part.targets).sum() / examples

    def add(sums: Any, part: _Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, derive(trained, part)), None

    derive = jax.value_and_grad(share)
    if examples <= microbatch:
        known: tuple[jax.Array, Named] = derive(trained, batch)
        return known
    whole = examples - examples % microbatch
    stacked, rest = (
        jax.tree.map(take, batch)
        for take in (
            lambda leaf: leaf[:whole].reshape(-1, microbatch, *leaf.shape[1:]),
            lambda leaf: leaf[whole:],
        )
    )
    zeros = jnp.zeros((), batch.targets.dtype), jax.tree.map(jnp.zeros_like, trained)
    sums: tuple[jax.Array, Named] = lax.scan(add, zeros, stacked)[0]
    return sums if whole == examples else add(sums, rest)[0]


def _images(recipe: Recipe, images: jax.Array) -> jax.Array:
    """Return images as floats; bytes are normalised as the core does it."""
    if images.dtype != jnp.uint8:
        return images
    table = jnp.asarray(normalisation_table(recipe.input.mean, recipe.input.std))
    return table[images.astype(jnp.int32), jnp.arange(images.shape[-1])]


def _sharpness_aware(
    recipe: Recipe,
    gradient: Any,
    devices: Devices,
    rho: jax.Array,
    trained: Named,
    batch: _Examples,
) -> tuple[jax.Array, Named, SamStats]:
    """Return SAM's loss, gradient and numbers of a device's examples.

    A group is on one device, and has its own perturbation. Where the whole batch is one group, what
    the devices exchange is the ascent gradient.
    """
    assert recipe.sam is not None

    def compute(weights: tuple[Named], batch: tuple[_Examples]) -> Any:
        loss, gradients = gradient(*weights, *batch)
        return (loss, None), (gradients,)

    policy = recipe.sam.rule.nonfinite
    nonfinite: Any = "skip_step" if policy == "raise" else policy
    rule: SAM = replace(recipe.sam.rule, scope="global", nonfinite=nonfinite)
    if recipe.sam.group == "batch":
        first = _ascent(recipe, devices, batch)
        made = two_passes(compute, (trained,), (first,), (batch,), rule, rho, DATA)
    else:
        rule = replace(rule, microbatches=len(batch.images) // recipe.sam.group)
        made = sharpen(compute, (trained,), (batch,), rule, rho)
    loss, _, (gradients,), stats = made
    return loss, gradients, stats


def _ascent(recipe: Recipe, devices: Devices, batch: _Examples) -> _Examples:
    """Return those of a device's examples that are among the ascent's, spread over the batch.

    A device may have one more than another. So each takes as many, and what is too many has
    targets of 0, hence neither loss nor gradient.
    """
    assert recipe.sam is not None
    ascent = np.array(recipe.sam.ascent(recipe.train.batch))
    own = len(batch.images)
    if len(ascent) == recipe.train.batch:
        return batch
    rows = [ascent[ascent // own == device] % own for device in range(devices.count)]
    most = max(map(len, rows))
    device = lax.axis_index(DATA)
    taken = jnp.array([np.resize(row, most) for row in rows])[device]
    # The mean over the device's examples is to be its share of the mean over all.
    factor = most * devices.count / len(ascent)
    factors = jnp.array([factor * (np.arange(most) < len(row)) for row in rows])
    first: _Examples = jax.tree.map(lambda leaf: leaf[taken], batch)
    scaled = first.targets * factors[device][:, None].astype(first.targets.dtype)
    return first._replace(targets=scaled)


def _rule(rule: AGC, thresholds: Mapping[str, jax.Array]) -> AGC:
    """Return the rule with the thresholds of a step; the host raises, if anybody."""
    patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
    clipping = {pattern: partial(_first, thresholds[pattern]) for pattern in patterns}
    nonfinite: Nonfinite = "propagate" if rule.nonfinite == "raise" else rule.nonfinite
    return replace(rule, clipping=clipping, nonfinite=nonfinite)


def _first(value: jax.Array, _: Any) -> jax.Array:
    return value


def _limited(recipe: Recipe, max_norm: float, gradients: Named) -> tuple[Named, jax.Array]:
    """Return gradients whose norm all together is at most ``max_norm``, and what it was.

    If it is not finite, the policy of AGC decides for all of them.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
    finite = jnp.isfinite(norm)
    factor = jnp.where(finite, jnp.minimum(max_norm / norm, 1), jnp.nan)
    limited = {name: gradient * factor for name, gradient in gradients.items()}
    if recipe.agc and recipe.agc.nonfinite == "zero":
        limited = {name: jnp.where(finite, gradient, 0) for name, gradient in limited.items()}
    return limited, norm


def _updated(
    recipe: Recipe, parameters: Named, momentum: Named, gradients: Named, rate: jax.Array
) -> tuple[Named, Named]:
    """Return parameters and momentum after decay, momentum and rate."""
    rule = recipe.optimizer
    optimizer = optax.chain(*after_clipping(rate, rule.momentum, rule.weight_decay))
    state = optimizer.init(parameters)
    if rule.momentum:
        state = tree_set(state, trace=momentum)
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), tree_get(state, "trace", momentum)


def _may_step(
    recipe: Recipe, sam: SamStats | None, agc: Stats | None, norm: jax.Array | None
) -> jax.Array | None:
    """Tell whether weights and momentum may change; None if nothing speaks against it."""
    reasons = []
    if recipe.sam and sam and recipe.sam.rule.nonfinite != "skip_perturb":
        reasons.append(jnp.isfinite(sam.norm))
    if recipe.agc and agc and recipe.agc.nonfinite == "raise":
        reasons.append(agc.nonfinite == 0)
        if norm is not None:
            reasons.append(jnp.isfinite(norm))
    return jnp.stack(reasons).all() if reasons else None


@partial(jax.jit, static_argnames=("options", "devices"))
def _classify(
    parameters: Named,
    images: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    *,
    options: core.Options,
    devices: Devices,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return for each image its cross entropy, how many classes come before, and if it is one.

    The classes before the right one are all of them if its logit is NaN.
    """

    def rows(parameters: Named, images: Any, labels: Any, weight: Any) -> tuple[jax.Array, ...]:
        model = _model(options, devices.dtype)
        logits = model(parameters, images, deterministic=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        own = jnp.take_along_axis(logits, labels[:, None], 1)
        lower = jnp.arange(logits.shape[1]) >= labels[:, None]
        behind = (own > logits) | ((own == logits) & lower)
        mine = losses, logits.shape[1] - behind.sum(1), weight > 0
        gathered: tuple[jax.Array, ...] = lax.all_gather(mine, DATA, tiled=True)
        return gathered

    specs = (EVERYWHERE, SPLIT, SPLIT, SPLIT)
    run = devices.mapped(rows, specs, EVERYWHERE)
    found: tuple[jax.Array, jax.Array, jax.Array] = run(parameters, images, labels, weight)
    return found
