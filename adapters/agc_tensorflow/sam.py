"""Sharpness-aware minimization for Keras models and GradientTape loops.

The second pass runs in Keras' stateless scope, where the variables read as ``w + e``: the weights themselves
are never written, so there is nothing to restore, whatever happens in between. The optimizer, with AGC if
it is wrapped in it, sees one gradient and the original weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from agc.config import SAM, Schedule, check_rule
from agc.errors import ConfigError, MissingGradientError, NonFiniteError
from agc.plan import perturbed_names
from agc_tensorflow.units import named_variables, variable_key

__all__ = [
    "SamStats",
    "SharpnessAwareModel",
    "Verification",
    "sam_value_and_gradients",
    "verify_sam",
]

Loss = Callable[..., Any]


class SamStats(NamedTuple):
    """What one step did, as tensors (SAM-12).

    Attributes
    ----------
    norm : Tensor of float32, or float64 if a perturbed variable is
        Norm of the ascent gradient (the largest, if there were several micro-batches).
    loss, perturbed_loss : Tensor
        Mean loss at ``w`` (of the examples of the ascent pass) and at ``w + e``.
    """

    norm: Any
    loss: Any
    perturbed_loss: Any

    @property
    def sharpness(self) -> Any:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss


@keras.saving.register_keras_serializable(package="agc")
class SharpnessAwareModel(keras.Model):  # type: ignore[misc]
    """A Keras model whose ``fit`` takes sharpness-aware steps.

    Parameters
    ----------
    model : keras.Model
        The model; it stays usable by itself and shares its weights.
    rule : SAM or dict
        The configuration (a dict as :meth:`agc.SAM.to_dict` writes it, when a saved model is loaded).

    Notes
    -----
    Compile this model with any optimizer, loss and metrics. Regularisation losses are in both passes;
    metrics and the reported loss come from the clean pass; both passes are in training mode and use the same
    random numbers; running statistics are updated once (SAM-12). The metric ``sharpness`` is the mean
    difference between the perturbed and the clean loss. ``nonfinite="raise"`` works only with
    ``run_eagerly=True``. With ``every`` above 1 the other steps take one pass; on several replicas they still take
    two, and neither ``fraction`` nor ``microbatches`` is possible.

    Examples
    --------
    >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = SharpnessAwareModel(inner, SAM(rho=0.05))
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    """

    def __init__(self, model: Any, rule: SAM | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(model, keras.Model):
            raise ConfigError(f"model must be a keras.Model, got {model!r}")
        self.model = model
        self.rule = SAM.from_dict(rule) if isinstance(rule, dict) else rule
        check_rule(self.rule, SAM)
        self.sharpness_tracker = keras.metrics.Mean(name="sharpness")
        if model.built:
            self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Run the inner model."""
        return self.model(inputs, training=training)

    def build(self, input_shape: Any) -> None:
        """Build the inner model."""
        if not self.model.built:
            self.model.build(input_shape)
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """Return the inner model and the rule as data."""
        model = keras.saving.serialize_keras_object(self.model)
        return {**super().get_config(), "model": model, "rule": self.rule.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SharpnessAwareModel:
        """Build the model from :meth:`get_config`'s data."""
        config = dict(config)
        inner = config.pop("model")
        model = keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects)
        return cls(model, **config)

    def train_step(self, data: Any) -> Any:
        """Take one step: called by ``fit`` and ``train_on_batch``."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        batch = keras.tree.flatten((x, y, sample_weight))
        predictions: list[Any] = []
        counts: list[Any] = []

        def loss_fn(*part: Any) -> Any:
            xs, ys, weights = keras.tree.pack_sequence_as((x, y, sample_weight), list(part))
            predicted = self(xs, training=True)
            predictions.append((xs, ys, predicted, weights))
            counts.append(tf.shape(next(a for a in part if a is not None))[0])
            return self._compute_loss(
                x=xs, y=ys, y_pred=predicted, sample_weight=weights, training=True
            )

        variables = self.trainable_variables
        if not self.optimizer.built:
            self.optimizer.build(variables)  # not inside the condition further down
        replicas = tf.distribute.get_strategy().num_replicas_in_sync

        def clean(loss: Any, passed: int) -> None:
            # Keras divides each replica's loss by their number; its own tracker undoes that as well.
            self._loss_tracker.update_state(loss * replicas, sample_weight=counts[passed])
            xs, ys, predicted, weights = predictions[passed]
            self.compute_metrics(xs, ys, predicted, weights)

        _, gradients, stats = _gradients(
            loss_fn,
            variables,
            self.rule,
            names=_names(variables, self.model),
            batch=batch,
            step=self.optimizer.iterations,
            state=[*self.non_trainable_variables],
            scale=self.optimizer.scale_loss,
            on_clean=clean,
        )
        self.sharpness_tracker.update_state(stats.sharpness * replicas)
        _apply(self.optimizer, gradients, variables, stats.norm, self.rule)
        return self.get_metrics_result()

    def test_step(self, data: Any) -> Any:
        """Evaluate one batch; there is no sharpness to report."""
        results = super().test_step(data)
        results.pop("sharpness", None)
        return results


def sam_value_and_gradients(
    loss_fn: Loss,
    variables: Sequence[Any],
    rule: SAM,
    *,
    batch: Sequence[Any] | None = None,
    step: Any = None,
    state: Sequence[Any] = (),
    return_stats: bool = False,
) -> Any:
    """Compute the clean loss and the sharpness-aware gradients, for loops without ``fit``.

    Parameters
    ----------
    loss_fn : callable
        Computes the loss, a scalar; with ``batch``, from the tensors it is given. Called twice; needs no
        GradientTape.
    variables : sequence of keras.Variable
        The weights, for example ``model.trainable_variables``.
    rule : SAM
        The configuration.
    batch : sequence of Tensor, each of shape (examples, ...), optional
        The batch; needed for ``fraction`` below 1 and ``microbatches`` above 1. The loss must be a mean.
    step : int or Tensor, optional
        The optimizer's step; needed if ``rho`` is a schedule or ``every`` is above 1.
    state : sequence of keras.Variable, optional
        ``model.non_trainable_variables``, so that running statistics are updated once and both passes use the
        same random numbers (SAM-12).
    return_stats : bool, default False
        Whether to return :class:`SamStats` as a third item.

    Returns
    -------
    loss : Tensor
        Clean loss, at the weights.
    gradients : list of Tensor, IndexedSlices or None
        One per variable. All NaN under ``nonfinite="skip_step"`` if the ascent norm is not finite: do
        not apply them.

    Raises
    ------
    ConfigError
        If ``fraction`` or ``microbatches`` is given without a batch, a step is missing, a variable is not
        a Keras variable, the loss is not a scalar, or a schedule of rho returns nonsense (inside a graph,
        which cannot raise, the gradients are NaN then).
    SelectorError
        If a pattern of ``only`` or ``exclude`` matches none of the variables, which are called as
        :func:`agc_tensorflow.plan` calls plain variables.
    MissingGradientError
        If no perturbed variable has a gradient.
    NonFiniteError
        If ``rule.nonfinite`` is ``"raise"`` and the norm of an ascent gradient is not finite.
    """
    check_rule(rule, SAM)
    if step is None and (callable(rule.rho) or rule.every != 1):
        raise ConfigError("rho is a schedule, or every is above 1: give step=optimizer.iterations")
    for variable in variables:
        if not isinstance(variable, keras.Variable):
            raise ConfigError(
                f"{variable!r} is not a Keras variable; SAM needs variables whose value can be "
                "replaced for one pass, such as model.trainable_variables"
            )
    names = _names(variables, list(variables))
    loss, gradients, stats = _gradients(
        loss_fn, variables, rule, names=names, batch=batch, step=step, state=state
    )
    if rule.nonfinite == "skip_step":
        poison = tf.where(tf.math.is_finite(stats.norm), 0.0, float("nan"))
        gradients = [_add(g, poison) for g in gradients]
    return (loss, gradients, stats) if return_stats else (loss, gradients)


# --- one step, part by part -------------------------------------------------------------------------


def _identity(value: Any) -> Any:
    return value


def _nothing(_loss: Any, _passed: int) -> None:
    return None


def _gradients(
    loss_fn: Loss,
    variables: Sequence[Any],
    rule: SAM,
    *,
    names: Sequence[str],
    batch: Sequence[Any] | None,
    step: Any,
    state: Sequence[Any] = (),
    scale: Callable[[Any], Any] = _identity,
    on_clean: Callable[[Any, int], None] = _nothing,
) -> tuple[Any, list[Any], SamStats]:
    """Clean loss, gradients of ``scale(loss)`` at ``w + e``, and stats.

    ``on_clean(loss, passed)`` is called after each clean pass, with how many passes there were before.
    """
    needs = rule.fraction != 1 or rule.microbatches != 1
    if batch is None and needs:
        raise ConfigError(
            f"fraction={rule.fraction} and microbatches={rule.microbatches} take parts of the batch: "
            "give batch=(inputs, targets) and a loss function that uses the tensors it is given"
        )
    chosen = set(perturbed_names(names, rule))
    perturbs = [name in chosen for name in names]
    passes = _Passes(loss_fn, list(variables), list(state), scale, on_clean)
    if rule.every == 1:
        return _sharpness_aware(passes, perturbs, rule, batch, step)
    now = tf.get_static_value(tf.convert_to_tensor(step))  # None inside a graph
    if now is not None:
        if rule.perturbs(int(now)):
            return _sharpness_aware(passes, perturbs, rule, batch, step)
        return _plain(passes, perturbs, batch)
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return _either(passes, perturbs, rule, batch, step)
    if needs:
        raise ConfigError(
            "every above 1 with fraction or microbatches on several replicas needs run_eagerly=True"
        )
    # Replicas cannot talk inside a condition, so both passes run; the perturbation of a plain step is zero.
    return _sharpness_aware(passes, perturbs, rule, batch, step)


class _Passes:
    """Runs the loss function at the weights, or with the variables reading as other values."""

    def __init__(
        self,
        loss_fn: Loss,
        variables: list[Any],
        state: list[Any],
        scale: Callable[[Any], Any],
        on_clean: Callable[[Any, int], None],
    ) -> None:
        self.loss_fn, self.variables, self.state = loss_fn, variables, state
        self.scale, self.on_clean = scale, on_clean
        self.count = 0

    def clean(self, batch: Sequence[Any] | None, *, keep_state: bool) -> tuple[Any, list[Any]]:
        """Gradients at the weights; updates of state are kept, or made nowhere."""
        values = [] if keep_state else [tf.convert_to_tensor(v) for v in self.variables]
        with self._scope(values, [], active=not keep_state) as sources, tf.GradientTape() as tape:
            tape.watch(sources)
            loss, scaled = self._loss(batch)
        self.on_clean(loss, self.count - 1)
        return loss, tape.gradient(scaled, sources)

    def perturbed(
        self, batch: Sequence[Any] | None, values: list[Any], state: list[Any], *, keep_state: bool
    ) -> tuple[Any, list[Any]]:
        """Gradients where the variables read as ``values`` and the state as it was before the step."""
        mapping = list(zip(self.state, state, strict=True))
        with self._scope(values, mapping, active=True) as sources, tf.GradientTape() as tape:
            tape.watch(sources)
            loss, scaled = self._loss(batch)
        if keep_state:
            for variable in self.state:
                value = self._last.get_current_value(variable)
                if value is not None:
                    variable.assign(value)
        return loss, tape.gradient(scaled, sources)

    def _loss(self, batch: Sequence[Any] | None) -> tuple[Any, Any]:
        loss = tf.convert_to_tensor(self.loss_fn() if batch is None else self.loss_fn(*batch))
        if loss.shape.rank not in (0, None):
            raise ConfigError(
                f"the loss must be a scalar, got the shape {tuple(loss.shape)}; take its mean"
            )
        self.count += 1
        return loss, self.scale(loss)

    @contextmanager
    def _scope(
        self, values: list[Any], state: list[tuple[Any, Any]], *, active: bool
    ) -> Iterator[list[Any]]:
        if not active:
            yield [variable.value for variable in self.variables]
            return
        mapping = [*zip(self.variables, values, strict=True), *state]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._last = scope
            # The scope may have cast a value: what the layers read is what is differentiated.
            yield [scope.get_current_value(variable) for variable in self.variables]


def _plain(
    passes: _Passes, perturbs: list[bool], batch: Sequence[Any] | None
) -> tuple[Any, list[Any], SamStats]:
    loss, gradients = passes.clean(batch, keep_state=True)
    return loss, gradients, SamStats(tf.zeros((), _top(passes.variables, perturbs)), loss, loss)


def _either(
    passes: _Passes, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats]:
    """Choose inside a graph: of the two kinds of step, only one is carried out (SAM-11)."""
    there: list[bool] = []

    def flat(loss: Any, gradients: list[Any], stats: SamStats) -> Any:
        # Branches return the same structure: no None, and no sparse gradient that is dense in the other.
        there[:] = [gradient is not None for gradient in gradients]
        return loss, [_dense(g) for g in gradients if g is not None], stats

    loss, dense, stats = tf.cond(
        tf.equal(tf.cast(step, tf.int64) % rule.every, 0),
        lambda: flat(*_sharpness_aware(passes, perturbs, rule, batch, step)),
        lambda: flat(*_plain(passes, perturbs, batch)),
    )
    remaining = iter(dense)
    return loss, [next(remaining) if present else None for present in there], stats


def _sharpness_aware(
    passes: _Passes, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats]:
    if rule.microbatches == 1:
        return _two_passes(passes, perturbs, rule, batch, step)[:3]
    assert batch is not None
    results = [
        _two_passes(passes, perturbs, rule, part, step) for part in _split(batch, rule.microbatches)
    ]
    ascents = [result[3] for result in results]
    sizes = [result[4] for result in results]
    gradients = [
        _weighted([g for _, gs, *_ in results for g in [gs[i]]], sizes)
        for i in range(len(passes.variables))
    ]
    stats = [result[2] for result in results]
    loss = _weighted([one.loss for one in stats], ascents)
    norm = tf.reduce_max(tf.stack([one.norm for one in stats]))
    perturbed = _weighted([one.perturbed_loss for one in stats], sizes)
    return loss, gradients, SamStats(norm, loss, perturbed)


def _two_passes(
    passes: _Passes, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats, Any, Any]:
    sizes: tuple[Any, Any] = (1, 1)
    first = batch
    if batch is not None:
        examples = tf.shape(next(a for a in batch if a is not None))[0]
        # ceil(fraction * examples), in float64 as the specification computes it
        part = tf.cast(tf.math.ceil(rule.fraction * tf.cast(examples, tf.float64)), tf.int32)
        sizes = (part, examples)
        if rule.fraction < 1:
            first = [None if a is None else a[:part] for a in batch]
    whole = rule.fraction == 1
    state = [tf.identity(tf.convert_to_tensor(v)) for v in passes.state]
    loss, ascent = passes.clean(first, keep_state=whole)
    if rule.scope == "global" and tf.distribute.get_strategy().num_replicas_in_sync > 1:
        # Keras divides each replica's loss by their number, so the sum is the mean.
        present = [_dense(g) for g in ascent if g is not None]
        reduced = iter(tf.distribute.get_replica_context().all_reduce("sum", present))
        ascent = [None if g is None else next(reduced) for g in ascent]
    values, norm = _perturbed_values(passes.variables, ascent, perturbs, rule, step)
    perturbed_loss, descent = passes.perturbed(batch, values, state, keep_state=not whole)
    if rule.nonfinite == "raise":
        _raise_unless_finite(norm)
    return loss, descent, SamStats(norm, loss, perturbed_loss), *sizes


def _perturbed_values(
    variables: list[Any], ascent: list[Any], perturbs: list[bool], rule: SAM, step: Any
) -> tuple[list[Any], Any]:
    """Return ``w + e`` and the norm of the ascent gradient (SAM-1, SAM-2, SAM-10)."""
    values = [tf.convert_to_tensor(v) for v in variables]
    directions: dict[int, Any] = {}
    for i, (value, gradient) in enumerate(zip(values, ascent, strict=True)):
        if perturbs[i] and gradient is not None:
            wide = _WIDE.get(value.dtype, tf.float32)
            directions[i] = tf.cast(_dense(gradient), wide) * _scale(value, rule, wide)
    if not directions:
        raise MissingGradientError(
            "no perturbed variable has a gradient after the first pass; only/exclude must leave "
            "variables that take part in the loss"
        )
    top = _top(variables, perturbs)
    sizes = [tf.cast(tf.abs(d), top) for d in directions.values()]
    largest = tf.reduce_max(tf.stack([tf.reduce_max(size) for size in sizes]))
    safe = tf.where((largest > 0) & tf.math.is_finite(largest), largest, 1)
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(size / safe)) for size in sizes])) * safe
    usable = (norm > 0) & tf.math.is_finite(norm)
    if rule.every != 1:
        usable &= tf.equal(tf.cast(step, tf.int64) % rule.every, 0)
    factor = _radius(rule, step, top) / (norm + rule.eps)
    out = []
    for i, value in enumerate(values):
        if i not in directions:
            out.append(value)
            continue
        wide = directions[i].dtype
        e = tf.cast(factor, wide) * directions[i] * _scale(value, rule, wide)
        e = tf.where(usable, e, tf.zeros_like(e))
        out.append(tf.cast(tf.cast(value, wide) + e, value.dtype))
    return out, norm


_WIDE = {dtype: dtype for dtype in (tf.float64, tf.complex64, tf.complex128)}
"""In what the perturbation is computed; everything else in float32."""


def _top(variables: list[Any], perturbs: list[bool]) -> Any:
    """Return the dtype of the norm."""
    double = {"float64", "complex128"}
    there = any(p and v.dtype in double for v, p in zip(variables, perturbs, strict=True))
    return tf.float64 if there else tf.float32


def _scale(value: Any, rule: SAM, dtype: Any) -> Any:
    if rule.adaptive and len(value.shape) >= 2:
        return tf.cast(tf.abs(tf.cast(value, dtype)), dtype) + tf.constant(rule.eta, dtype)
    return tf.ones((), dtype)


def _radius(rule: SAM, step: Any, dtype: Any) -> Any:
    """Rho in the given dtype; tf.cast would round a Python number to float32 first."""
    now = None if step is None else tf.get_static_value(tf.convert_to_tensor(step))
    if not callable(rule.rho) or now is not None:
        return tf.constant(rule.radius(0 if now is None else int(now)), dtype)
    if isinstance(rule.rho, Schedule):
        return _interpolate(rule.rho, tf.cast(step, dtype))
    rho = rule.rho(step)
    rho = tf.cast(rho, dtype) if tf.is_tensor(rho) else tf.constant(rho, dtype)
    return tf.where((rho > 0) & tf.math.is_finite(rho), rho, float("nan"))  # a graph cannot raise


def _interpolate(schedule: Schedule, now: Any) -> Any:
    (start, low), *rest = schedule.points
    value = tf.constant(low, now.dtype)
    for end, high in rest:
        part = tf.clip_by_value((now - start) / (end - start), 0, 1)
        value = value + (high - low) * part
        start, low = end, high
    return value


def _apply(
    optimizer: Any, gradients: list[Any], variables: list[Any], norm: Any, rule: SAM
) -> None:
    """Let the optimizer act, unless the policy says to skip the step (SAM-5)."""
    if rule.nonfinite != "skip_step":
        optimizer.apply(gradients, variables)
        return
    poison = tf.where(tf.math.is_finite(norm), 0.0, float("nan"))
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It skips poisoned steps itself, and lowers its scale.
        optimizer.apply([_add(g, poison) for g in gradients], variables)
        return
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas == 1:
        finite = tf.math.is_finite(norm)
        tf.cond(finite, lambda: _done(optimizer.apply(gradients, variables)), lambda: _done(None))
        return
    context = tf.distribute.get_replica_context()
    poison = context.all_reduce("sum", poison)  # one replica's failure is everyone's

    def across(distribution: Any, poison: Any, gradients: Any) -> None:
        (first, *_) = distribution.experimental_local_results(poison)

        # The condition stands outside the replicas: optimizers merge them inside.
        def apply() -> Any:
            distribution.extended.call_for_each_replica(
                lambda g: optimizer.apply(list(g), variables), args=(gradients,)
            )
            return _done(None)

        tf.cond(tf.equal(first, 0.0), apply, lambda: _done(None))

    context.merge_call(across, args=(poison, tuple(gradients)))


def _done(_: Any) -> Any:
    return tf.constant(True)


def _raise_unless_finite(norm: Any) -> None:
    if not tf.executing_eagerly():
        raise ConfigError(
            "nonfinite='raise' needs the value, which a graph does not have; use run_eagerly=True, or "
            "nonfinite='skip_step'"
        )
    if not bool(tf.math.is_finite(norm)):
        raise NonFiniteError(
            f"the norm of the ascent gradient is {float(norm)}; SAM(nonfinite='skip_step') skips "
            "such steps"
        )


# --- probe ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_sam` saw.

    Attributes
    ----------
    passes : int
        Different points at which the loss was evaluated.
    perturbation : float
        Distance of the last point from the weights; should be rho.
    cosine : float
        Cosine between that displacement and the gradient at the weights; should be 1 (for ASAM: above
        0).
    gradient_error : float
        Relative distance between the gradients returned and those at the last point.
    restored : bool
        Whether the variables hold, bit for bit, what they held before.
    """

    passes: int
    perturbation: float
    cosine: float
    gradient_error: float
    restored: bool

    @property
    def ok(self) -> bool:
        """Whether this was SAM: two points, moved uphill, right gradient, weights restored."""
        moved = self.passes >= 2 and self.perturbation > 0 and self.cosine > 0
        return moved and self.gradient_error < 1e-3 and self.restored


def verify_sam(
    gradients_of: Callable[[Loss], Sequence[Any]], loss_fn: Loss, variables: Sequence[Any]
) -> Verification:
    """Tell whether gradients really are taken at the perturbed weights (SAM-14).

    Parameters
    ----------
    gradients_of : callable
        Computes the gradients under test from a loss function, for example
        ``lambda f: sam_value_and_gradients(f, variables, SAM())[1]``. Runs eagerly.
    loss_fn : callable
        ``loss_fn()``, a scalar; deterministic.
    variables : sequence of keras.Variable
        The weights.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    visited: list[Any] = []

    def watched() -> Any:
        visited.append(_flatten([tf.convert_to_tensor(v) for v in variables]))
        return loss_fn()

    before = [tf.identity(tf.convert_to_tensor(v)) for v in variables]
    start = _flatten(before)
    found = _flatten([_dense(g) for g in gradients_of(watched)])
    after = _flatten([tf.convert_to_tensor(v) for v in variables])

    def gradient_at(values: list[Any]) -> Any:
        passes = _Passes(loss_fn, list(variables), [], _identity, _nothing)
        return _flatten(
            [_dense(g) for g in passes.perturbed(None, values, [], keep_state=False)[1]]
        )

    last = max(visited, key=lambda point: float(tf.norm(point - start)), default=start)
    pieces, offset = [], 0
    for value in before:
        size = int(tf.size(value))
        parts = []
        for _ in range(1 + value.dtype.is_complex):
            parts.append(tf.reshape(last[offset : offset + size], value.shape))
            offset += size
        whole = tf.complex(*parts) if value.dtype.is_complex else parts[0]
        pieces.append(tf.cast(whole, value.dtype))
    uphill, wanted = gradient_at(before), gradient_at(pieces)
    moved = last - start
    length = float(tf.norm(moved) * tf.norm(uphill))
    return Verification(
        passes=len({point.numpy().tobytes() for point in visited}),
        perturbation=float(tf.norm(moved)),
        cosine=float(tf.tensordot(moved, uphill, 1)) / length if length else 0.0,
        gradient_error=float(tf.norm(found - wanted) / tf.norm(wanted)),
        restored=bool(tf.reduce_all(after == start)),
    )


# --- helpers ----------------------------------------------------------------------------------------


def _flatten(tensors: Sequence[Any]) -> Any:
    parts = [
        part
        for t in tensors
        for part in ([tf.math.real(t), tf.math.imag(t)] if t.dtype.is_complex else [t])
    ]
    return tf.concat([tf.reshape(tf.cast(part, tf.float64), [-1]) for part in parts], 0)


def _names(variables: Sequence[Any], model: Any) -> list[str]:
    """Call variables as AGC does."""
    names = {variable_key(variable): name for name, variable in named_variables(model).items()}
    return [names.get(variable_key(variable), variable.path) for variable in variables]


def _dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)


def _add(gradient: Any, poison: Any) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values + tf.cast(poison, gradient.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient + tf.cast(poison, gradient.dtype)


def _split(batch: Sequence[Any], parts: int) -> list[list[Any]]:
    """Split along the first axis into contiguous parts whose sizes differ by at most one (SAM-8)."""
    size = next(a for a in batch if a is not None).shape[0]
    if size is not None and size < parts:
        raise ConfigError(f"microbatches={parts} is more than the {size} examples")
    pieces: list[list[Any]] = []
    examples = tf.shape(next(a for a in batch if a is not None))[0]
    base, longer = examples // parts, examples % parts
    for i in range(parts):
        low = i * base + tf.minimum(i, longer)
        high = (i + 1) * base + tf.minimum(i + 1, longer)
        pieces.append([None if a is None else a[low:high] for a in batch])
    return pieces


def _weighted(values: Sequence[Any], counts: Sequence[Any]) -> Any:
    """Mean weighted by example count; None only where every value is None."""
    total = tf.add_n([tf.cast(count, tf.float64) for count in counts])
    present = [
        _dense(value) * tf.cast(tf.cast(count, tf.float64) / total, value.dtype)
        for value, count in zip(values, counts, strict=True)
        if value is not None
    ]
    return tf.add_n(present) if present else None
