"""The step of ``agc train`` in TensorFlow; the loop around it is :mod:`agc.training`.

A step is three compiled functions, each traced once: the batch as the model takes it, its gradient,
and the update. Numbers that change with the step are arguments of theirs, or variables.

A strategy of ``tf.distribute`` runs them on every device. A device, or replica, has an equal part
of the batch; losses are sums over its examples, divided by the number of all, so that a sum over
replicas is the mean. That sum of the gradients is the only one between AGC and them (AGC-7).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf

from agc import AGC
from agc import nfnet as core
from agc.config import Nonfinite
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.errors import ConfigError, FormatError, NonFiniteError, ParameterError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training import Hosts, Launch, Metrics, State, Totals, check_offered, trained_names
from agc_tensorflow.nfnet import NFNet
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.recipe import CoupledSGD
from agc_tensorflow.sam import are_perturbed, perturbed_values
from agc_tensorflow.weights import array_of, assign_array, pairs_of

__all__ = ["Trainer", "trainer"]

_compiled: Callable[..., Any] = partial(tf.function, autograph=False)


ENGINES: Final = ("one-device", "mirrored", "multi-worker")
"""What ``launch.engine`` may be: a device, all of this machine, those of all in ``TF_CONFIG``."""

_FILE: Final = "state"
"""Beginning of the names of files in a sharded checkpoint."""


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is one device. Without it and without ``engine``, the machines of ``TF_CONFIG``
        train together if that is set, else all GPUs of this machine, or its CPU.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model cannot do, if there are no such devices, or if they
        cannot share the batch.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        check_offered(launch, "TensorFlow", engines=ENGINES)
        self._recipe = recipe
        self._dtype = tf.as_dtype(recipe.precision.state)
        self._strategy, engine = _strategy(launch)
        self._replicas = int(self._strategy.num_replicas_in_sync)
        self._devices = self._strategy.extended.worker_devices  # of this host
        self._share = _share(recipe, self._replicas)
        self._replica = self._first_replica()
        self.hosts = Hosts()
        if self._replicas > len(self._devices):
            index = self._replica // len(self._devices)
            self.hosts = Hosts(index, self._replicas // len(self._devices), self._total)
        self.facts: Mapping[str, Any] = {
            "framework": "tensorflow",
            "tensorflow": str(tf.__version__),
            "keras": str(keras.__version__),
            "device": self._devices[0].rpartition("device:")[2],
            "engine": engine,
            "devices": self._replicas,
        }
        self._thresholds: dict[str, tf.Variable] = {}
        self._orders, self._ascents = self._ascent_first()
        self._made = 0
        with self._strategy.scope():
            self._build(recipe, launch)
        self._prepare = self._everywhere(self._prepared)
        self._plain = self._everywhere(self._plain_gradient)
        self._sharp = self._everywhere(self._sharp_gradient)
        self._update = _compiled(self._updated)
        self._classify = self._everywhere(self._classified)
        self._read = {
            "raw": self._everywhere(partial(_values, self._weights)),
            "ema": self._everywhere(partial(_values, self._average or [])),
        }

    def _build(self, recipe: Recipe, launch: Launch) -> None:
        options = recipe.options()
        low = recipe.precision.compute == "bfloat16"
        self._model = NFNet(options, dtype="mixed_bfloat16" if low else recipe.precision.state)
        self._evaluated = NFNet(options, dtype="float32") if low else self._model
        self._specs, weights = zip(*pairs_of(self._model), strict=True)
        self._weights = list(weights)
        trained = trained_names(recipe)
        for spec, variable in zip(self._specs, self._weights, strict=True):
            variable.trainable = spec.name in trained
        self._trained = [variable for variable in self._weights if variable.trainable]
        self._average = [_zeros(v) for v in self._weights] if recipe.ema else None
        inner = _ReducedSGD(
            0.0,
            momentum=recipe.optimizer.momentum,
            weight_decay=recipe.optimizer.weight_decay,
            global_clipnorm=recipe.optimizer.max_norm,
        )
        inner.nonfinite = recipe.agc.nonfinite if recipe.agc else "propagate"
        self._optimizer = AdaptiveGradClip(inner, self._rule(), model=self._model)
        self._optimizer.build(self._trained)
        buffers = iter(inner.buffers)
        self._momentum = [
            next(buffers) if inner.momentum and variable.trainable else _zeros(variable)
            for variable in self._weights
        ]
        self._perturbs: list[bool] = []
        if recipe.sam:
            self._perturbs = are_perturbed(self._trained, self._model, recipe.sam.rule)
        table = normalisation_table(recipe.input.mean, recipe.input.std)
        self._table = tf.constant(table, self._dtype)
        self._passes = _Passes(self._model, self._trained, recipe, launch.microbatch)

    # --- several devices --------------------------------------------------------------------------

    def _everywhere(self, function: Callable[..., Any]) -> Any:
        """Compile what every replica runs; arguments are the same for all, or :meth:`_split`."""
        return _compiled(partial(self._run, function))

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._strategy.run(function, arguments)

    def _from_each(self, function: Callable[[int], Any]) -> Any:
        """Return a value for each replica of this host, a function of the replica's number."""
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: function(context.replica_id_in_sync_group)
        )

    def _first(self, value: Any) -> Any:
        """Return the value of this host's first replica."""
        return self._strategy.experimental_local_results(value)[0]

    def _first_replica(self) -> int:
        return int(self._first(self._from_each(tf.constant)))

    def _split(self, arrays: Sequence[Any]) -> Any:
        """Return an equal part of this host's arrays for each of its replicas."""
        parts = [np.split(array, len(self._devices)) for array in arrays]

        def part(replica: int) -> list[tf.Tensor]:
            place = replica - self._replica
            with tf.device(self._devices[place]):
                return [tf.constant(each[place]) for each in parts]

        return self._from_each(part)

    def _total(self, numbers: list[float]) -> list[float]:
        """Sum numbers over hosts; see :class:`agc.training.Hosts`."""
        own, none = (tf.constant(each, tf.float64) for each in (numbers, [0.0] * len(numbers)))
        values = self._from_each(lambda replica: own if replica == self._replica else none)
        total: list[float] = self._strategy.reduce("SUM", values, axis=None).numpy().tolist()
        return total

    def _ascent_first(self) -> tuple[Any, Any]:
        """Return orders of the replicas' parts in which SAM's ascent examples come first.

        Also how many those are, which may differ by one: they are spread evenly over the batch.
        None if the examples are taken in their own order.
        """
        sam = self._recipe.sam
        if sam is None or sam.group != "batch":
            return None, None
        batch = self._recipe.train.batch
        ascends = np.isin(np.arange(batch), sam.ascent(batch)).reshape(self._replicas, self._share)
        order = np.argsort(~ascends, axis=1, kind="stable") if sam.rule.fraction < 1 else None
        return order, ascends.sum(1)

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        arrays = dict(state.parts())
        for part in self._parts():
            core.check_arrays(self._specs, arrays.get(part, {}))
        for part, variables in self._parts().items():
            for name, variable in variables.items():
                assign_array(variable, arrays[part][name])
        self._go_on(state.step)

    def _go_on(self, step: int) -> None:
        self._optimizer.iterations.assign(step)
        self._made = step

    def state(self) -> State:
        """Return a copy of the state."""
        parts = {
            part: {name: array_of(variable) for name, variable in variables.items()}
            for part, variables in self._parts().items()
        }
        return State(step=self._made, facts=self.facts, **parts)

    def _parts(self) -> dict[str, dict[str, Any]]:
        """Return the variables of each part of the state, by canonical name."""
        parts = {"parameters": self._weights, "momentum": self._momentum, "ema": self._average}
        names = [spec.name for spec in self._specs]
        return {
            part: dict(zip(names, variables, strict=True))
            for part, variables in parts.items()
            if variables is not None
        }

    def save_sharded(self, folder: Path) -> None:
        """Write the state by ``tf.train.Checkpoint``: the first host, as all have the whole."""
        values = [_values([*variables.values()]) for variables in self._parts().values()]
        finite = [tf.reduce_all(tf.math.is_finite(v)) for part in values for v in part]
        if self.hosts.any(not tf.reduce_all(tf.stack(finite))):
            raise NonFiniteError(f"the state is not finite before step {self._made}")
        if self.hosts.first:
            folder.mkdir()
            self._checkpoint().write(str(folder / _FILE))

    def load_sharded(self, folder: Path, step: int) -> None:
        """Take over what :meth:`save_sharded` has written."""
        try:
            self._checkpoint().read(str(folder / _FILE)).assert_consumed()
        except tf.errors.OpError as error:
            raise FormatError(f"{folder}: {error.message}") from None
        except (ValueError, AssertionError) as error:
            raise ParameterError(f"{folder}: of another model: {error}") from None
        self._go_on(step)

    def _checkpoint(self) -> Any:
        parts = {
            part: {name: _variable(variable) for name, variable in variables.items()}
            for part, variables in self._parts().items()
        }
        return tf.train.Checkpoint(**parts)

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        recipe = self._recipe
        classes, dtype = recipe.model.num_classes, recipe.precision.state
        assert classes is not None
        targets = soft_labels(batch, classes, recipe.train.smoothing, dtype)
        self._optimizer.learning_rate = float(numbers.rate)
        for pattern, threshold in numbers.clipping.items():
            self._thresholds[pattern].assign(float(threshold))
        # What is drawn here is a function of the step too, so that to resume is exact.
        seed = tf.constant([recipe.seed, self._made], tf.int64)
        masks = [mask for mask in batch.masks if mask is not None]
        tensors = self._prepare(self._split([batch.images, targets, *masks]), seed)
        rho = float(numbers.rho or 0)
        radius = tf.constant(rho, self._dtype)
        gradient = self._sharp(tensors, radius) if rho else self._plain(tensors)
        (loss, perturbed, norm), gradients = gradient
        loss, perturbed, norm = map(self._first, (loss, perturbed, norm))
        self._raise_if_nonfinite(norm)
        decay = None
        if numbers.ema_decay is not None:
            decay = tf.constant(float(numbers.ema_decay), self._dtype)
        try:
            units, clipped, ratio = self._update(gradients, norm, decay)
        except tf.errors.InvalidArgumentError as error:
            if NonFiniteError.__name__ not in str(error):  # of a rule with nonfinite="raise"
                raise
            raise NonFiniteError(error.message) from None
        self._made += 1
        metrics = Metrics(loss=loss, perturbed_loss=perturbed if rho else None)
        if recipe.agc is None:
            return metrics
        return replace(metrics, units=units, clipped=clipped, max_ratio=ratio)

    def _raise_if_nonfinite(self, norm: tf.Tensor) -> None:
        """Raise where SAM's rule says ``nonfinite="raise"``, for which alone the host waits."""
        sam = self._recipe.sam
        if sam and sam.rule.nonfinite == "raise" and not math.isfinite(norm):
            raise NonFiniteError(
                "the norm of an ascent gradient is not finite; sam.nonfinite=skip_step skips such steps"
            )

    def _prepared(self, arrays: Sequence[tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
        """Return what the passes take: normalised images, targets, and the masks that there are."""
        recipe, options = self._recipe, self._recipe.model.options()
        images, targets, *masks = arrays
        if images.dtype == tf.uint8:  # normalised as the core does it
            channels = options.in_channels
            places = tf.cast(images, tf.int32) * channels + tf.range(channels)
            images = tf.gather(tf.reshape(self._table, [-1]), places)
        tensors = [tf.cast(images, self._dtype), targets]
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        start, given, rates = replica * self._share, iter(masks), _drop_rates(options)
        # The model draws nothing, so that micro-batches and SAM's passes drop the same.
        for place, (name, each) in enumerate(rates._asdict().items()):
            if each is None:
                continue
            if name in recipe.train.masks:
                tensors.append(next(given))
                continue
            own = tf.random.experimental.stateless_fold_in(seed, place)
            uniform = tf.random.stateless_uniform((recipe.train.batch, len(each)), own)
            tensors.append(uniform[start : start + self._share] >= tf.constant(each))
        if self._orders is not None:
            order = tf.gather(self._orders, replica)
            tensors = [tf.gather(tensor, order) for tensor in tensors]
        return tensors

    def _plain_gradient(self, batch: list[tf.Tensor]) -> Any:
        loss, gradients = self._passes(_values(self._trained), batch, self._recipe.train.batch)
        return _over_replicas(((loss, loss, tf.zeros((), self._dtype)), gradients))

    def _sharp_gradient(self, batch: list[tf.Tensor], rho: tf.Tensor) -> Any:
        """Return the mean loss, at the weights and perturbed, a norm, and the gradients.

        The norm is finite if those of all groups are.
        """
        sam, whole = self._recipe.sam, self._recipe.train.batch
        assert sam is not None
        rule, weights = replace(sam.rule, every=1), _values(self._trained)

        def group(part: list[tf.Tensor], size: int, first: Any) -> Any:
            """Perturb a group of some size by the first of its examples here."""
            ascending = [tensor[:first] for tensor in part]
            loss, ascent = self._passes(weights, ascending, len(sam.ascent(size)))
            if sam.group == "batch":
                ascent = _over_replicas(ascent)
            moved, norm = perturbed_values(
                self._trained, ascent, self._perturbs, rule, rho, step=None
            )
            perturbed, gradients = self._passes(moved, part, size)
            return (loss, perturbed, norm), gradients

        if sam.group == "batch":
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return _over_replicas(group(batch, whole, tf.gather(self._ascents, replica)))
        size = sam.group
        zeros = (tf.zeros((), self._dtype),) * 3, [tf.zeros_like(weight) for weight in weights]
        one = partial(group, size=size, first=len(sam.ascent(size)))
        sums = _over_replicas(_summed(one, batch, size, zeros))
        return tf.nest.map_structure(lambda total: total * (size / whole), sums)

    def _updated(self, gradients: Any, norm: tf.Tensor, decay: Any) -> Any:
        """Update the weights, move the average towards them, and return AGC's telemetry."""
        sam = self._recipe.sam

        def act() -> tf.Tensor:
            self._strategy.run(self._optimizer.apply, (gradients, self._trained))
            return tf.constant(True)

        if sam and sam.rule.nonfinite == "skip_step":  # SAM-5
            tf.cond(tf.math.is_finite(norm), act, lambda: tf.constant(True))
        else:
            act()
        if self._average is not None:
            self._strategy.run(self._follow, (decay,))
        stats = self._optimizer.stats()
        return stats.units, stats.clipped, stats.max_ratio

    def _follow(self, decay: tf.Tensor) -> None:
        assert self._average is not None
        for average, weight in zip(self._average, self._weights, strict=True):
            average.assign(decay * average + (1 - decay) * tf.convert_to_tensor(weight))

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images; of equal logits, that of the lowest class counts as the largest."""
        values = self._read[weights]()
        totals = tf.zeros(4, tf.float64)
        for batch in batches:
            missing = -len(batch.labels) % len(self._devices)
            arrays = [np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in batch]
            found = self._classify(values, self._split(arrays))
            totals += sum(self._strategy.experimental_local_results(found))
        loss, *counts = self.hosts.total(totals.numpy().tolist())
        return Totals(loss, *map(int, counts))

    def _classified(self, values: list[tf.Tensor], batch: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the sum of the losses, and how many images are right, in the top five, real."""
        images, labels, weight = batch
        variables = [variable for _, variable in pairs_of(self._evaluated)]
        with keras.StatelessScope(zip(variables, values, strict=True)):
            logits = self._evaluated(images)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        real = weight > 0
        rank = tf.boolean_mask(_rank(logits, labels), real)
        hits = [rank < min(n, logits.shape[1]) for n in (1, 5)]
        sums = [tf.boolean_mask(losses, real), *hits, real]
        return tf.stack([tf.reduce_sum(tf.cast(each, tf.float64)) for each in sums])

    # --- rules that follow the numbers of the step ------------------------------------------------

    def _rule(self) -> AGC:
        rule = self._recipe.agc
        if rule is None:
            return AGC(clipping=None)
        patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
        self._thresholds = {pattern: _number(1.0) for pattern in patterns}
        clipping = {name: partial(_read, variable) for name, variable in self._thresholds.items()}
        return replace(rule, clipping=clipping)


def trainer(recipe: Recipe, launch: Launch) -> Trainer:
    """Return a training; see :meth:`agc.cli.frameworks.Framework.trainer`."""
    return Trainer(recipe, launch)


class _ReducedSGD(CoupledSGD):
    """Takes gradients that are summed over replicas."""

    nonfinite: Nonfinite = "propagate"
    """What becomes of all gradients if the norm that is limited is not finite."""

    def _clip_gradients(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Limit the norm of all gradients together, which AGC has clipped."""
        if self.global_clipnorm is None:
            return list(gradients)
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm)
        if self.nonfinite == "raise":
            what = f"{NonFiniteError.__name__}: the norm of all gradients together is not finite"
            with tf.control_dependencies([tf.debugging.Assert(finite, [what, norm])]):
                norm = tf.identity(norm)
        poison = 0.0 if self.nonfinite == "zero" else math.nan
        factor = tf.where(finite, tf.minimum(self.global_clipnorm / norm, 1.0), poison)
        return [tf.where(finite, gradient * factor, poison) for gradient in gradients]

    def _all_reduce_sum_gradients(self, grads_and_vars: Iterable[Any]) -> list[Any]:
        return list(grads_and_vars)


class _Passes:
    """Passes of a model without state, in micro-batches, over batches of any size.

    A batch is what :meth:`Trainer._prepared` returns. The forward and backward pass is traced once
    for all that use it on a device.
    """

    def __init__(
        self, model: NFNet, variables: list[Any], recipe: Recipe, microbatch: int | None
    ) -> None:
        self.model, self.variables, self.microbatch = model, variables, microbatch
        self.dtype = dtype = tf.as_dtype(recipe.precision.state)
        options, pixels = model.options, recipe.input.train_pixels
        rates = _drop_rates(options)
        self.masks = [each is not None for each in rates]
        specs = [
            tf.TensorSpec((None, pixels, pixels, options.in_channels), dtype),
            tf.TensorSpec((None, options.num_classes), dtype),
            *(tf.TensorSpec((None, len(each)), tf.bool) for each in rates if each is not None),
        ]
        values = [tf.TensorSpec(variable.shape, dtype) for variable in variables]
        signature = [values, specs, tf.TensorSpec((), dtype)]
        # Inlined, it would be optimized anew for each call.
        self.gradients = _compiled(
            self._gradients,
            input_signature=signature,
            experimental_attributes={"_noinline": True},
        )

    def __call__(self, values: list[Any], batch: Sequence[Any], examples: int) -> Any:
        """Return the sum of the losses over a number of examples, and its gradient.

        The variables read as ``values``.
        """
        divisor = tf.constant(float(examples), self.dtype)
        if self.microbatch is None:
            return self.gradients(values, list(batch), divisor)
        zeros = (tf.zeros((), self.dtype), [tf.zeros_like(value) for value in values])
        return _summed(
            lambda part: self.gradients(values, part, divisor), batch, self.microbatch, zeros
        )

    def _gradients(self, values: list[Any], batch: list[Any], examples: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            with keras.StatelessScope(zip(self.variables, values, strict=True)):
                loss = self._loss(*batch) / examples
        return loss, tape.gradient(loss, values)

    def _loss(self, images: Any, targets: Any, *masks: Any) -> Any:
        """Return the sum of the losses."""
        given = iter(masks)
        kept = core.Masks(*(next(given) if there else None for there in self.masks))
        logits = tf.cast(self.model(images, training=True, masks=kept), self.dtype)
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def _summed(
    function: Callable[[list[Any]], Any], batch: Sequence[Any], size: int, zeros: Any
) -> Any:
    """Add up what a function returns for so many examples at a time, one after the other.

    It is traced once, and the memory is that of one call.
    """
    examples = tf.shape(batch[0])[0]

    def add(start: Any, sums: Any) -> Any:
        part = [tensor[start : start + size] for tensor in batch]
        return start + size, tf.nest.map_structure(tf.add, sums, function(part))

    _, sums = tf.while_loop(
        lambda start, _: start < examples, add, (tf.constant(0), zeros), parallel_iterations=1
    )
    return sums


def _over_replicas(values: Any) -> Any:
    """Sum over all replicas, of all hosts."""
    return tf.distribute.get_replica_context().all_reduce("SUM", values)


def _variable(variable: Any) -> Any:
    """Return the variable of TensorFlow, on all devices."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _values(variables: Sequence[Any]) -> list[tf.Tensor]:
    return list(map(tf.convert_to_tensor, variables))


def _share(recipe: Recipe, replicas: int) -> int:
    """Return how many examples of a batch each replica has: whole groups of SAM."""
    group = recipe.sam.group if recipe.sam else 1
    needed = replicas * (1 if group == "batch" else group)
    if recipe.train.batch % needed:
        groups = "" if needed == replicas else f", as sam.group={group} examples stay together"
        raise ConfigError(
            f"train.batch={recipe.train.batch} must be a multiple of {needed} on {replicas} devices"
            f"{groups}; change it, or use fewer devices (CUDA_VISIBLE_DEVICES, --device)"
        )
    return recipe.train.batch // replicas


def _strategy(launch: Launch) -> tuple[Any, str]:
    """Return the devices to train on, as TensorFlow says that, and the engine's name."""
    workers = "TF_CONFIG" in os.environ
    engine, device = launch.engine, launch.device
    if engine is None and workers:
        engine = "multi-worker"
    if engine is None:
        several = device is None and len(tf.config.list_logical_devices("GPU")) > 1
        engine = "mirrored" if several else "one-device"
    if device is not None and engine != "one-device":
        chosen = "that TF_CONFIG asks for " if launch.engine is None else ""
        raise ConfigError(
            f'device={device!r}: engine="{engine}" {chosen}uses all devices; leave out the device, or '
            'choose engine="one-device"'
        )
    if engine == "multi-worker":
        if not workers:
            raise ConfigError(
                'engine="multi-worker" needs the environment variable TF_CONFIG, which names the '
                "workers and says which of them this is; see docs/launch.md"
            )
        return _multi_worker(), engine
    if engine == "one-device":
        return tf.distribute.OneDeviceStrategy(f"/device:{_device(device)}"), engine
    names = [each.name for each in tf.config.list_logical_devices("GPU")]
    names = names or [each.name for each in tf.config.list_logical_devices("CPU")]
    return _mirrored(tuple(names)), engine


@cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """Return the only strategy of this process: TensorFlow mixes up the collectives of two."""
    return tf.distribute.MirroredStrategy(list(devices))


@cache
def _multi_worker() -> Any:
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f'engine="multi-worker" of TF_CONFIG={os.environ["TF_CONFIG"]}: {error}'
        ) from None


def _device(name: str | None) -> str:
    """Return a device as TensorFlow calls it, without the host."""
    names = [str(device.name) for device in tf.config.list_logical_devices()]
    devices = [each.rpartition("device:")[2] for each in names]
    if name is None:
        return next((device for device in devices if not device.startswith("CPU")), devices[0])
    wanted = name if ":" in name else f"{name}:0"
    if wanted.upper() not in devices:
        raise ConfigError(f"device={name!r}: TensorFlow has {', '.join(devices)}")
    return wanted.upper()


def _drop_rates(options: core.Options) -> core.Masks:
    """Return how often each entry of an example's masks is False; None if nothing is dropped."""
    depth, dropout = options.stochastic_depth, options.dropout
    blocks = core.blocks(options.variant)
    features = core.features(options.variant)
    return core.Masks(
        [depth * block.stochastic_depth for block in blocks] if depth else None,
        [dropout] * features if dropout else None,
    )


def _rank(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return how many classes come before the right one; all of them if its logit is NaN."""
    own = tf.gather(logits, labels, batch_dims=1)[:, None]
    classes = tf.range(logits.shape[1])
    behind = (own > logits) | ((own == logits) & (classes >= labels[:, None]))
    return logits.shape[1] - tf.reduce_sum(tf.cast(behind, tf.int32), 1)


def _number(value: float) -> tf.Variable:
    return tf.Variable(value, trainable=False, dtype=tf.float64)


def _zeros(variable: Any) -> tf.Variable:
    return tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)


def _read(variable: tf.Variable, _: Any) -> tf.Tensor:
    return variable.read_value()
