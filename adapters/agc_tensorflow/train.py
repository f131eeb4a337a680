"""The step of ``agc train`` in TensorFlow; the loop around it is :mod:`agc.training`.

A step is three compiled functions, each traced once: the batch as the model takes it, its gradient,
and the update. Numbers that change with the step are arguments of theirs, or variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from agc import AGC, SAM
from agc import nfnet as core
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.errors import ConfigError, NonFiniteError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Sharpness, Weights
from agc.training import Hosts, Launch, Metrics, State, Totals, ascent_first, check_offered
from agc_tensorflow.nfnet import NFNet
from agc_tensorflow.recipe import sgd_nfnet
from agc_tensorflow.sam import LossPasses, Pass, apply, are_perturbed, two_passes
from agc_tensorflow.weights import array_of, assign_array, pairs_of

__all__ = ["Trainer", "trainer"]

_compiled: Callable[..., Any] = partial(tf.function, autograph=False)


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is a GPU if None and there is one.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model cannot do, or there is no such device.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        _check(recipe, launch)
        self._recipe = recipe
        self._device = _device(launch.device)
        self.hosts = Hosts()
        self.facts: Mapping[str, Any] = {
            "framework": "tensorflow",
            "tensorflow": str(tf.__version__),
            "keras": str(keras.__version__),
            "device": self._device,
        }
        self._thresholds: dict[str, tf.Variable] = {}
        self._first = ascent_first(recipe)
        self._made = 0
        with tf.device(self._device):
            self._build(recipe, launch)
        self._prepare = _compiled(self._prepared)
        self._plain = _compiled(self._plain_gradient)
        self._sharp = _compiled(self._sharp_gradient)
        self._update = _compiled(self._updated)
        self._classify = _compiled(self._classified)

    def _build(self, recipe: Recipe, launch: Launch) -> None:
        options = recipe.model.options()
        low = recipe.precision.compute == "bfloat16"
        self._model = NFNet(options, dtype="mixed_bfloat16" if low else "float32")
        self._evaluated = NFNet(options, dtype="float32") if low else self._model
        self._specs, weights = zip(*pairs_of(self._model), strict=True)
        self._weights = list(weights)
        self._average = [_zeros(v) for v in self._weights] if recipe.ema else None
        self._optimizer = sgd_nfnet(
            self._model,
            0.0,
            momentum=recipe.optimizer.momentum,
            weight_decay=recipe.optimizer.weight_decay,
            rule=self._rule(),
        )
        self._optimizer.build(self._weights)
        self._momentum = self._optimizer.inner_optimizer.buffers or list(map(_zeros, weights))
        self._radius = _number(1.0)
        self._sam = self._sharpness(recipe.sam) if recipe.sam else None
        self._perturbs: list[bool] = []
        if self._sam:
            self._perturbs = are_perturbed(self._weights, self._model, self._sam)
        self._table = tf.constant(normalisation_table(recipe.input.mean, recipe.input.std))
        self._passes = _Passes(self._model, self._weights, recipe, launch.microbatch)

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        parts = [(self._weights, state.parameters), (self._momentum, state.momentum)]
        if self._average is not None:
            parts.append((self._average, state.ema or {}))
        for _, arrays in parts:
            core.check_arrays(self._specs, arrays)
        for variables, arrays in parts:
            for spec, variable in zip(self._specs, variables, strict=True):
                assign_array(variable, arrays[spec.name])
        self._optimizer.iterations.assign(state.step)
        self._made = state.step

    def state(self) -> State:
        """Return a copy of the state."""
        return State(
            step=self._made,
            parameters=self._arrays(self._weights),
            momentum=self._arrays(self._momentum),
            ema=None if self._average is None else self._arrays(self._average),
            facts=self.facts,
        )

    def _arrays(self, variables: Sequence[Any]) -> dict[str, Any]:
        pairs = zip(self._specs, variables, strict=True)
        return {spec.name: array_of(variable) for spec, variable in pairs}

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        recipe = self._recipe
        assert recipe.model.num_classes is not None
        targets = soft_labels(batch, recipe.model.num_classes, recipe.train.smoothing)
        perturbs = bool(float(numbers.rho or 0))
        with tf.device(self._device):
            self._optimizer.learning_rate = float(numbers.rate)
            for pattern, threshold in numbers.clipping.items():
                self._thresholds[pattern].assign(float(threshold))
            if perturbs:
                self._radius.assign(float(numbers.rho or 0))
            # What is drawn here is a function of the step too, so that to resume is exact.
            seed = tf.constant([recipe.seed, self._made], tf.int64)
            masks = [None if mask is None else tf.constant(mask) for mask in batch.masks]
            tensors = self._prepare(tf.constant(batch.images), tf.constant(targets), masks, seed)
            loss, perturbed, norm, gradients = (self._sharp if perturbs else self._plain)(tensors)
            decay = None if numbers.ema_decay is None else tf.constant(numbers.ema_decay)
            try:
                units, clipped, ratio = self._update(gradients, norm, decay)
            except tf.errors.InvalidArgumentError as error:
                if NonFiniteError.__name__ not in str(error):  # of a rule with nonfinite="raise"
                    raise
                raise NonFiniteError(error.message) from None
        self._made += 1
        metrics = Metrics(loss=loss, perturbed_loss=perturbed if perturbs else None)
        if recipe.agc is None:
            return metrics
        return replace(metrics, units=units, clipped=clipped, max_ratio=ratio)

    def _prepared(
        self, images: tf.Tensor, targets: tf.Tensor, masks: Sequence[Any], seed: tf.Tensor
    ) -> list[tf.Tensor]:
        """Return what the passes take: normalised images, targets, and the masks that there are."""
        options = self._recipe.model.options()
        if images.dtype == tf.uint8:  # normalised as the core does it
            channels = options.in_channels
            places = tf.cast(images, tf.int32) * channels + tf.range(channels)
            images = tf.gather(tf.reshape(self._table, [-1]), places)
        tensors = [images, targets]
        # The model draws nothing, so that micro-batches and SAM's passes drop the same.
        for place, (mask, rates) in enumerate(zip(masks, _drop_rates(options), strict=True)):
            if rates is None:
                continue
            if mask is None:
                own = tf.random.experimental.stateless_fold_in(seed, place)
                uniform = tf.random.stateless_uniform((images.shape[0], len(rates)), own)
                mask = uniform >= tf.constant(rates)
            tensors.append(mask)
        if self._first is not None:
            tensors = [tf.gather(tensor, self._first) for tensor in tensors]
        return tensors

    def _plain_gradient(self, batch: list[tf.Tensor]) -> Any:
        done, _ = self._passes.clean(batch)
        return done.loss, done.loss, tf.zeros(()), done.gradients

    def _sharp_gradient(self, batch: list[tf.Tensor]) -> Any:
        """Return the mean loss, at the weights and perturbed, a norm, and the gradients.

        The norm is finite if those of all groups are.
        """
        rule, step = self._sam, self._optimizer.iterations
        assert rule is not None
        assert self._recipe.sam is not None

        def group(part: list[tf.Tensor]) -> Any:
            loss, gradients, stats, *_ = two_passes(self._passes, self._perturbs, rule, part, step)
            return loss, stats.perturbed_loss, stats.norm, gradients

        size = self._recipe.sam.group
        if size == "batch":
            return group(batch)
        zeros = (tf.zeros(()), tf.zeros(()), tf.zeros(()), list(map(tf.zeros_like, self._weights)))
        sums = _summed(group, batch, size, zeros)
        return tf.nest.map_structure(lambda total: total * (size / self._recipe.train.batch), sums)

    def _updated(self, gradients: list[tf.Tensor], norm: tf.Tensor, decay: Any) -> Any:
        """Update the weights, move the average towards them, and return AGC's telemetry."""
        if self._sam is None:
            self._optimizer.apply(gradients, self._weights)
        else:
            apply(self._optimizer, gradients, self._weights, norm, self._sam)
        if self._average is not None:
            for average, weight in zip(self._average, self._weights, strict=True):
                average.assign(decay * average + (1 - decay) * tf.convert_to_tensor(weight))
        stats = self._optimizer.stats()
        return stats.units, stats.clipped, stats.max_ratio

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images; of equal logits, that of the lowest class counts as the largest."""
        variables = self._average if weights == "ema" else self._weights
        assert variables is not None
        with tf.device(self._device):
            values = [tf.convert_to_tensor(variable) for variable in variables]
            totals = (tf.zeros((), tf.float64), tf.zeros(3, tf.int64))
            for batch in batches:
                found = self._classify(values, *map(tf.constant, batch))
                totals = tf.nest.map_structure(tf.add, totals, found)
        loss, counts = (total.numpy() for total in totals)
        return Totals(float(loss), *map(int, counts))

    def _classified(
        self, values: list[tf.Tensor], images: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the sum of the losses, and how many images are right, in the top five, real."""
        variables = [variable for _, variable in pairs_of(self._evaluated)]
        with keras.StatelessScope(zip(variables, values, strict=True)):
            logits = self._evaluated(images)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        real = weight > 0
        rank = tf.boolean_mask(_rank(logits, labels), real)
        hits = [rank < min(n, logits.shape[1]) for n in (1, 5)]
        counts = [tf.math.count_nonzero(each) for each in (*hits, real)]
        return tf.reduce_sum(tf.cast(tf.boolean_mask(losses, real), tf.float64)), tf.stack(counts)

    # --- rules that follow the numbers of the step ------------------------------------------------

    def _rule(self) -> AGC:
        rule = self._recipe.agc
        if rule is None:
            return AGC(clipping=None)
        patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
        self._thresholds = {pattern: _number(1.0) for pattern in patterns}
        clipping = {name: partial(_read, variable) for name, variable in self._thresholds.items()}
        return replace(rule, clipping=clipping)

    def _sharpness(self, sam: Sharpness) -> SAM:
        """Return the rule of a step that perturbs one group."""
        return replace(sam.rule, rho=partial(_read, self._radius), every=1)


def trainer(recipe: Recipe, launch: Launch) -> Trainer:
    """Return a training; see :meth:`agc.cli.frameworks.Framework.trainer`."""
    return Trainer(recipe, launch)


class _Passes(LossPasses):
    """Passes of a model without state, in micro-batches, over batches of any size.

    A batch is what :meth:`Trainer._prepared` returns. The forward and backward pass is traced once
    for all that use it.
    """

    def __init__(
        self, model: NFNet, weights: list[Any], recipe: Recipe, microbatch: int | None
    ) -> None:
        super().__init__(self._loss, weights)
        self.model, self.microbatch = model, microbatch
        options, pixels = model.options, recipe.input.train_pixels
        rates = _drop_rates(options)
        self.masks = [each is not None for each in rates]
        specs = [
            tf.TensorSpec((None, pixels, pixels, options.in_channels)),
            tf.TensorSpec((None, options.num_classes)),
            *(tf.TensorSpec((None, len(each)), tf.bool) for each in rates if each is not None),
        ]
        values = [tf.TensorSpec(weight.shape) for weight in weights]
        signature = [values, specs, tf.TensorSpec(())]
        # Inlined, it would be optimized anew for each call.
        self.gradients = _compiled(
            self._gradients,
            input_signature=signature,
            experimental_attributes={"_noinline": True},
        )

    def run(self, batch: Sequence[Any] | None, values: list[Any], *, moved: bool) -> Pass:  # noqa: ARG002
        """Return the mean loss and its gradient where the variables read as values."""
        assert batch is not None
        examples = tf.cast(tf.shape(batch[0])[0], tf.float32)
        if self.microbatch is None:
            loss, gradients = self.gradients(values, list(batch), examples)
        else:
            zeros = (tf.zeros(()), [tf.zeros_like(value) for value in values])
            loss, gradients = _summed(
                lambda part: self.gradients(values, part, examples), batch, self.microbatch, zeros
            )
        return Pass(loss, gradients, [], [], [])

    def _gradients(self, values: list[Any], batch: list[Any], examples: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(values)
            with keras.StatelessScope(zip(self.variables, values, strict=True)):
                loss = self._loss(*batch) / examples
        return loss, tape.gradient(loss, values)

    def _loss(self, images: Any, targets: Any, *masks: Any) -> Any:
        """Return the sum of the losses."""
        given = iter(masks)
        kept = core.Masks(*(next(given) if there else None for there in self.masks))
        logits = tf.cast(self.model(images, training=True, masks=kept), tf.float32)
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


def _check(recipe: Recipe, launch: Launch) -> None:
    check_offered(recipe, launch, "TensorFlow")
    if recipe.sam and recipe.sam.rule.nonfinite == "raise":
        raise ConfigError(
            'sam.nonfinite="raise" needs the value, which a graph of TensorFlow does not have; '
            "set sam.nonfinite=skip_step"
        )


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
