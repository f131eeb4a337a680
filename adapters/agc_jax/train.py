"""The step of ``agc train`` in JAX; the loop around it is :mod:`agc.training`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from optax.tree_utils import tree_get, tree_set

from agc import nfnet as core
from agc.config import AGC, Nonfinite
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.errors import ConfigError, NonFiniteError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training import Hosts, Launch, Metrics, State, Totals, ascent_first, check_offered
from agc_jax.clip import Clipper
from agc_jax.nfnet import NFNet
from agc_jax.recipe import after_clipping
from agc_jax.sam import SamStats, sam_value_and_grad
from agc_jax.stats import Stats
from agc_jax.units import ModelUnits, flatten, plan, units

__all__ = ["Trainer", "trainer"]

Tree = Any
Gradient = Callable[[Tree, Any], tuple[jax.Array, Tree]]


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is JAX's first one if None, as ``"cuda:1"`` is its second GPU.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model cannot do, or there is no such device.

    Notes
    -----
    A step is one compiled program, in which only the recipe is a constant; a step at which SAM does
    not perturb is that of the recipe without SAM. Trainings of equal recipes share them.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        check_offered(recipe, launch, "JAX")
        self._recipe = recipe
        self._plain = replace(recipe, sam=None)  # of the steps that do not perturb
        self._microbatch = launch.microbatch or recipe.train.batch
        self._device = _device(launch.device)
        self.hosts = Hosts()
        self._model = _model(recipe.model.options())
        self.facts: Mapping[str, Any] = {
            "framework": "jax",
            "jax": jax.__version__,
            "device": f"{self._device.platform}:{self._device.id}",
        }
        self._arrays: _Arrays | None = None
        self._made = 0

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        parts = dict(state.parts())
        ema = None if self._recipe.ema is None else self._tree(parts.get("ema", {}))
        self._arrays = _Arrays(self._tree(parts["parameters"]), self._tree(parts["momentum"]), ema)
        self._made = state.step

    def state(self) -> State:
        """Return a copy of the state."""
        assert self._arrays is not None
        parts: dict[str, Any] = {
            part: None if tree is None else self._neutral(tree)
            for part, tree in self._arrays._asdict().items()
        }
        return State(step=self._made, facts=self.facts, **parts)

    def _tree(self, arrays: Mapping[str, Any]) -> Tree:
        core.check_arrays(self._specs(), arrays)
        names, _, structure = flatten(self._model.parameters)
        # The copy is this training's alone, so that its memory can be donated.
        copies = [np.array(arrays[name], np.float32) for name in names]
        return jax.tree.unflatten(structure, jax.device_put(copies, self._device))

    def _neutral(self, tree: Tree) -> dict[str, Any]:
        names, leaves, _ = flatten(tree)
        named = dict(zip(names, leaves, strict=True))
        return {spec.name: np.array(named[spec.name], order="C") for spec in self._specs()}

    def _specs(self) -> list[core.ParameterSpec]:
        options = self._recipe.model.options()
        return [*core.parameters(options.variant, options.num_classes, options.in_channels)]

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        recipe = self._recipe
        assert recipe.model.num_classes is not None
        targets = soft_labels(batch, recipe.model.num_classes, recipe.train.smoothing)
        if recipe.sam and not float(numbers.rho or 0):
            recipe = self._plain
        self._arrays, done = _step(
            self._arrays,
            _Examples(batch.images, targets, batch.masks),
            vars(numbers),
            np.uint32(self._made),
            recipe=recipe,
            microbatch=self._microbatch,
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
            names = plan(self._model.parameters, agc, units=self._model.units)
            rows = done.agc.parameters(names)
            bad = [name for name, row in rows.items() if row.nonfinite]
            raise NonFiniteError(f"units of these parameters have a norm that is not finite: {bad}")

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images; of equal logits, that of the lowest class counts as the largest."""
        assert self._arrays is not None
        parameters = self._arrays.ema if weights == "ema" else self._arrays.parameters
        assert parameters is not None
        loss, top1, top5, images = 0.0, 0, 0, 0
        options = self._recipe.model.options()
        for batch in batches:
            classified = _classify(parameters, batch.images, batch.labels, options=options)
            losses, rank = (np.asarray(row)[batch.weight > 0] for row in classified)
            loss += float(losses.sum(dtype=np.float64))
            top1 += int((rank < 1).sum())
            top5 += int((rank < min(5, options.num_classes)).sum())
            images += len(rank)
        return Totals(loss, top1, top5, images)


def trainer(recipe: Recipe, launch: Launch) -> Trainer:
    """Return a training; see :meth:`agc.cli.frameworks.Framework.trainer`."""
    return Trainer(recipe, launch)


def _device(name: str | None) -> Any:
    if name is None:
        return jax.local_devices()[0]
    platform, _, number = name.partition(":")
    try:
        return jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"device={name!r}: JAX cannot use it: {error}") from None


# --- what is compiled -----------------------------------------------------------------------------


class _Model(NamedTuple):
    """An NFNet without numbers, taken apart."""

    graph: Any
    parameters: Tree
    others: Tree
    """Random numbers, of which none is drawn: masks are given."""
    units: ModelUnits

    def __call__(self, parameters: Tree, images: jax.Array, **options: Any) -> jax.Array:
        """Return the logits in float32."""
        logits = nnx.merge(self.graph, parameters, self.others)(images, **options)
        return logits.astype(jnp.float32)


@lru_cache(maxsize=8)
def _model(options: core.Options, compute: str = "float32") -> _Model:
    made = partial(NFNet, options, dtype=jnp.dtype(compute))
    model = nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0)))
    graph, parameters, others = nnx.split(model, nnx.Param, ...)
    return _Model(graph, parameters, others, units(model))


class _Arrays(NamedTuple):
    """What a step changes, by the names of :class:`State`: trees like the model's parameters."""

    parameters: Tree
    momentum: Tree
    ema: Tree | None


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


@partial(jax.jit, static_argnames=("recipe", "microbatch"), donate_argnames="arrays")
def _step(
    arrays: _Arrays,
    batch: _Examples,
    numbers: Mapping[str, Any],
    made: jax.Array,
    *,
    recipe: Recipe,
    microbatch: int,
) -> tuple[_Arrays, _Done]:
    """Make a step: gradient, AGC, decay, momentum, rate, average (AGC-7)."""
    parameters = arrays.parameters
    batch = batch._replace(masks=_masks(recipe, batch.masks, len(batch.images), made))
    gradient = partial(_gradient, recipe, microbatch)
    sam = None
    if recipe.sam:
        loss, gradients, sam = _sharpness_aware(recipe, gradient, numbers["rho"], parameters, batch)
    else:
        loss, gradients = gradient(parameters, batch)
    agc = None
    if recipe.agc:
        rule = _rule(recipe.agc, numbers["clipping"])
        clip = Clipper(rule, _model(recipe.model.options()).units)
        gradients, agc = clip(gradients, parameters, made)
    updated = _updated(recipe, arrays, gradients, numbers["rate"])
    if (may := _may_step(recipe, sam, agc)) is not None:
        updated = jax.tree.map(partial(jnp.where, may), updated, (parameters, arrays.momentum))
    parameters, momentum = updated
    ema, decay = arrays.ema, numbers["ema_decay"]
    if decay is not None:
        ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, parameters)
    return _Arrays(parameters, momentum, ema), _Done(loss, sam, agc)


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


def _gradient(
    recipe: Recipe, microbatch: int, parameters: Tree, batch: _Examples
) -> tuple[jax.Array, Tree]:
    """Return the mean loss of examples and its gradient, one micro-batch after another."""
    model = _model(recipe.model.options(), recipe.precision.compute)
    examples = len(batch.images)

    def share(parameters: Tree, part: _Examples) -> jax.Array:
        logits = model(parameters, _images(recipe, part.images), masks=part.masks)
        return optax.softmax_cross_entropy(logits, part.targets).sum() / examples

    def add(sums: Any, part: _Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, derive(parameters, part)), None

    derive: Gradient = jax.value_and_grad(share)
    if examples <= microbatch:
        return derive(parameters, batch)
    whole = examples - examples % microbatch
    stacked, rest = (
        jax.tree.map(take, batch)
        for take in (
            lambda leaf: leaf[:whole].reshape(-1, microbatch, *leaf.shape[1:]),
            lambda leaf: leaf[whole:],
        )
    )
    zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters)
    sums: tuple[jax.Array, Tree] = lax.scan(add, zeros, stacked)[0]
    return sums if whole == examples else add(sums, rest)[0]


def _images(recipe: Recipe, images: jax.Array) -> jax.Array:
    """Return images as floats; bytes are normalised as the core does it."""
    if images.dtype != jnp.uint8:
        return images
    table = jnp.asarray(normalisation_table(recipe.input.mean, recipe.input.std))
    return table[images.astype(jnp.int32), jnp.arange(images.shape[-1])]


def _sharpness_aware(
    recipe: Recipe, gradient: Gradient, rho: jax.Array, parameters: Tree, batch: _Examples
) -> tuple[jax.Array, Tree, SamStats]:
    """Return SAM's loss, gradient and numbers, from a function that has loss and gradient."""
    assert recipe.sam is not None
    loss = jax.custom_vjp(lambda parameters, batch: gradient(parameters, batch)[0])
    # With the loss comes its gradient, so that no micro-batch has to be kept for a second pass.
    loss.defvjp(gradient, lambda known, share: (jax.tree.map(lambda g: share * g, known), None))
    count = 1 if recipe.sam.group == "batch" else recipe.train.batch // recipe.sam.group
    policy = recipe.sam.rule.nonfinite
    rule = replace(
        recipe.sam.rule,
        rho=lambda _: rho,
        every=1,  # who calls this knows that the step perturbs
        microbatches=count,
        nonfinite="skip_step" if policy == "raise" else policy,
    )
    if (order := ascent_first(recipe)) is not None:
        batch = jax.tree.map(lambda leaf: leaf[order], batch)
    perturbed = sam_value_and_grad(loss, rule, batch_argnums=1, return_stats=True)
    made: tuple[jax.Array, Tree, SamStats] = perturbed(parameters, batch, step=0)
    return made


def _rule(rule: AGC, thresholds: Mapping[str, jax.Array]) -> AGC:
    """Return the rule with the thresholds of a step; the host raises, if anybody."""
    patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
    clipping = {pattern: partial(_first, thresholds[pattern]) for pattern in patterns}
    nonfinite: Nonfinite = "propagate" if rule.nonfinite == "raise" else rule.nonfinite
    return replace(rule, clipping=clipping, nonfinite=nonfinite)


def _first(value: jax.Array, _: Any) -> jax.Array:
    return value


def _updated(
    recipe: Recipe, arrays: _Arrays, gradients: Tree, rate: jax.Array
) -> tuple[Tree, Tree]:
    """Return parameters and momentum after decay, momentum and rate."""
    rule = recipe.optimizer
    optimizer = optax.chain(*after_clipping(rate, rule.momentum, rule.weight_decay))
    state = optimizer.init(arrays.parameters)
    if rule.momentum:
        state = tree_set(state, trace=arrays.momentum)
    updates, state = optimizer.update(gradients, state, arrays.parameters)
    momentum = tree_get(state, "trace", arrays.momentum)
    return optax.apply_updates(arrays.parameters, updates), momentum


def _may_step(recipe: Recipe, sam: SamStats | None, agc: Stats | None) -> jax.Array | None:
    """Tell whether weights and momentum may change; None if nothing speaks against it."""
    reasons = []
    if recipe.sam and sam and recipe.sam.rule.nonfinite != "skip_perturb":
        reasons.append(jnp.isfinite(sam.norm))
    if recipe.agc and agc and recipe.agc.nonfinite == "raise":
        reasons.append(agc.nonfinite == 0)
    return jnp.stack(reasons).all() if reasons else None


@partial(jax.jit, static_argnames="options")
def _classify(
    parameters: Tree, images: jax.Array, labels: jax.Array, *, options: core.Options
) -> tuple[jax.Array, jax.Array]:
    """Return for each image its cross entropy, and how many classes come before the right one.

    These are all of them if the right one's logit is NaN.
    """
    logits = _model(options)(parameters, images, deterministic=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    lower = jnp.arange(logits.shape[1]) >= labels[:, None]
    behind = (own > logits) | ((own == logits) & lower)
    return losses, logits.shape[1] - behind.sum(1)
