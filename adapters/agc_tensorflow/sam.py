"""Sharpness-aware minimization for Keras models and GradientTape loops.

Each pass runs in a stateless scope of Keras, where variables read as the values that the scope
gives them and assignments are noted, not carried out. In the second pass the weights read as
``w + e``: the weights themselves are never written, so there is nothing to restore, whatever
happens in between. Of the two passes' updates of state only one's are carried out at the end, and
both passes start from the same state. The optimizer, with AGC if it is wrapped in it, sees one
gradient and the original weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import keras
import tensorflow as tf

from agc.checks import check_batch, check_batch_given, check_microbatches, check_rule, short_repr
from agc.config import SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, ParameterError
from agc.schedule import Schedule
from agc.selectors import perturbed_names
from agc_tensorflow.devices import outside_graphs
from agc_tensorflow.schedules import value_at
from agc_tensorflow.units import named_variables, refuse_keras_2, variable_key

__all__ = ["SamStats", "SharpnessAwareModel", "sam_value_and_gradients"]

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
        The model, built or not; it stays usable by itself and shares its weights. Its own
        ``compute_loss``, ``compute_metrics``, ``compile``, ``metrics``, ``test_step`` and
        ``predict_step`` are used.
    rule : SAM or dict
        The configuration (a dict as :meth:`agc.SAM.to_dict` writes it, when a saved model is
        loaded).

    Raises
    ------
    ConfigError
        If ``model`` is no Keras model, takes training steps of its own, or is sharpness-aware
        already.

    Notes
    -----
    Compile this model with any optimizer, loss and metrics; the inner model is compiled with them.
    Losses that layers add and regularisation losses are in both passes; metrics and the reported
    loss come from the clean pass; both passes are in training mode, start from the same state and
    use the same random numbers; statistics and every other state are updated once (SAM-12). The
    metric ``sharpness`` is the mean difference between the perturbed and the clean loss.
    ``nonfinite="raise"`` works only with ``run_eagerly=True``. With ``every`` above 1 the other
    steps take one pass; on several replicas they still take two, and neither ``fraction`` nor
    ``microbatches`` is possible.

    Examples
    --------
    >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = SharpnessAwareModel(inner, SAM(rho=0.05))
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    """

    def __init__(self, model: Any, rule: SAM | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = _check_model(model)
        self.rule = SAM.from_dict(rule) if isinstance(rule, dict) else rule
        check_rule(self.rule, SAM)
        self.sharpness_tracker = keras.metrics.Mean(name="sharpness")
        self._ready = False
        if model.built:
            self.built = True

    @property
    def agc_bare(self) -> Any:
        """The inner model, whose names are those of the parameters, wrapped or not."""
        return self.model

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
        model.pop("compile_config", None)  # it is this model's
        return {**super().get_config(), "model": model, "rule": self.rule.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SharpnessAwareModel:
        """Build the model from :meth:`get_config`'s data."""
        config = dict(config)
        inner = config.pop("model")
        model = keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects)
        return cls(model, **config)

    # Everything but the gradient is the inner model's own.

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the inner model, and this one with its optimizer: :meth:`keras.Model.compile`."""
        self.model.compile(*args, **options)
        self._follow()

    def get_compile_config(self) -> Any:
        """Return what the inner model is compiled with."""
        return self.model.get_compile_config()

    def compile_from_config(self, config: Any) -> None:
        """Compile as :meth:`get_compile_config` says."""
        self.model.compile_from_config(config)
        self._follow()

    def _follow(self) -> None:
        if not self.model.compiled:
            raise ConfigError(
                f"the model {self.model.name!r} has a compile of its own that does not compile it; call "
                "super().compile(optimizer, ...) there"
            )
        super().compile(
            self.model.optimizer,
            run_eagerly=self.model.run_eagerly,
            steps_per_execution=self.model.steps_per_execution,
            jit_compile=self.model.jit_compile,
            auto_scale_loss=False,
        )

    @property
    def metrics(self) -> list[Any]:
        """The inner model's metrics, and ``sharpness``."""
        return [*self.model.metrics, self.sharpness_tracker]

    def reset_metrics(self) -> None:
        """Start all metrics anew."""
        self.model.reset_metrics()
        self.sharpness_tracker.reset_state()

    def get_metrics_result(self) -> dict[str, Any]:
        """Return the inner model's results, and ``sharpness``."""
        return {**self.model.get_metrics_result(), "sharpness": self.sharpness_tracker.result()}

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the inner model's loss."""
        return self.model._compute_loss(x, y, y_pred, sample_weight, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update and return the inner model's metrics."""
        return self.model.compute_metrics(x, y, y_pred, sample_weight)

    def test_step(self, data: Any) -> Any:
        """Evaluate one batch; there is no sharpness to report."""
        return self.model.test_step(data)

    def predict_step(self, data: Any) -> Any:
        """Predict for one batch."""
        return self.model.predict_step(data)

    def _symbolic_build(self, *args: Any, **options: Any) -> None:
        # Keras calls it before it trains on several replicas.
        self.model._symbolic_build(*args, **options)
        self.built = True

    def _build_by_call(self, x: Any) -> None:
        """Build what is not built yet, as Keras does when it traces its own step."""
        if not self.built or not all(layer.built for layer in self.model._flatten_layers()):
            self.model(keras.tree.map_structure(_symbolic, x))
        self.built = True

    def train_step(self, data: Any) -> Any:
        """Take one step: called by ``fit`` and ``train_on_batch``."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        batch = keras.tree.flatten((x, y, sample_weight))
        model = self.model
        if not self._ready:
            self._build_by_call(x)
            self._outside = tuple(_outside_keras(model))
            self._ready = True
        variables = model.trainable_variables
        if not self.optimizer.built:
            with outside_graphs():  # nor inside the condition further down
                self.optimizer.build(variables)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        last: list[Any] = []

        def loss_fn(*tensors: Any) -> Any:
            xs, ys, weights = keras.tree.pack_sequence_as((x, y, sample_weight), list(tensors))
            # Keras' own step says "training" only to a model that asks.
            predicted = model(xs, training=True) if model._call_has_training_arg else model(xs)
            last[:] = xs, ys, predicted, weights, tf.shape(_first(tensors))[0]
            return self.compute_loss(xs, ys, predicted, weights, training=True)

        def report(loss: Any) -> Any:
            *given, count = last
            # Keras divides each replica's loss by their number; its own tracker undoes that as
            # well.
            model._loss_tracker.update_state(loss * replicas, sample_weight=count)
            return model.compute_metrics(*given)

        passes = LossPasses(
            loss_fn,
            variables,
            scale=self.optimizer.scale_loss,
            report=report,
            reported=lambda: model.metrics_variables,
            outside=self._outside,
        )
        step = self.optimizer.iterations
        _, gradients, stats, logs = _gradients(passes, self.rule, model, batch=batch, step=step)
        self.sharpness_tracker.update_state(stats.sharpness * replicas)
        apply(self.optimizer, gradients, variables, stats.norm, self.rule)
        return {**logs, "sharpness": self.sharpness_tracker.result()}


def sam_value_and_gradients(
    loss_fn: Loss,
    variables: Sequence[Any],
    rule: SAM,
    *,
    batch: Sequence[Any] | None = None,
    step: Any = None,
    model: Any = None,
    state: Sequence[Any] = (),
    return_stats: bool = False,
) -> Any:
    """Compute the clean loss and the sharpness-aware gradients, for loops without ``fit``.

    Parameters
    ----------
    loss_fn : callable
        Computes the loss, a scalar; with ``batch``, from the tensors it is given. Called twice;
        needs no GradientTape. Losses that layers add belong into it: ``+ sum(model.losses)``.
    variables : sequence of keras.Variable
        The weights, for example ``model.trainable_variables``. Those that are frozen are not
        perturbed.
    rule : SAM
        The configuration.
    batch : sequence of Tensor, each of shape (examples, ...), optional
        The batch; needed for ``fraction`` below 1 and ``microbatches`` above 1. The loss must be a
        mean.
    step : int or Tensor, optional
        The optimizer's step; needed if ``rho`` is a schedule or ``every`` is above 1.
    model : keras.Model, optional
        The model that the variables belong to: patterns of ``only`` and ``exclude`` are compared
        with the names in its :func:`agc_tensorflow.plan`, and its metrics are those of the clean
        pass.
    state : sequence of tf.Variable, optional
        Variables outside Keras that the loss function assigns to, such as a counter or the state of
        a ``tf.random.Generator``. Keras variables (statistics, recurrent states, seeds) need not be
        named: both passes start from the same state, and it is updated once (SAM-12).
    return_stats : bool, default False
        Whether to return :class:`SamStats` as a third item.

    Returns
    -------
    loss : Tensor
        Clean loss, at the weights.
    gradients : list of Tensor, IndexedSlices or None
        One per variable. All NaN under ``nonfinite="skip_step"`` if the ascent norm is not finite:
        do not apply them.

    Raises
    ------
    ConfigError
        If ``fraction`` or ``microbatches`` is given without a batch, a step is missing, a variable
        is not a Keras variable, the loss is not a scalar, a weight is read around Keras in the
        second pass (SAM-15), or a schedule of rho returns nonsense (inside a graph, which cannot
        raise, the gradients are NaN then).
    SelectorError
        If a pattern of ``only`` or ``exclude`` matches no parameter of the model; without a model,
        none of the variables, which are called as :func:`agc_tensorflow.plan` calls plain
        variables.
    ParameterError
        If a variable is not a parameter of the model.
    MissingGradientError
        If no perturbed variable has a gradient.
    NonFiniteError
        If ``rule.nonfinite`` is ``"raise"`` and the norm of an ascent gradient is not finite.
    """
    check_rule(rule, SAM)
    if batch is not None:
        check_batch(batch)
    if step is None and (callable(rule.rho) or rule.every != 1):
        raise ConfigError("rho is a schedule, or every is above 1: give step=optimizer.iterations")
    for variable in variables:
        if not isinstance(variable, keras.Variable):
            raise ConfigError(
                f"{short_repr(variable)} is not a Keras variable; SAM needs variables whose value can be "
                "replaced for one pass, such as model.trainable_variables"
            )
    passes = LossPasses(
        loss_fn,
        variables,
        reported=lambda: () if model is None else model.metrics_variables,
        outside=[variable for variable in state if not isinstance(variable, keras.Variable)],
    )
    named = list(variables) if model is None else model
    loss, gradients, stats, _ = _gradients(passes, rule, named, batch=batch, step=step)
    if rule.nonfinite == "skip_step":
        poison = tf.where(tf.math.is_finite(stats.norm), 0.0, float("nan"))
        gradients = [_poisoned(g, poison) for g in gradients]
    return (loss, gradients, stats) if return_stats else (loss, gradients)


# --- the stages of one step -----------------------------------------------------------------------


def _identity(value: Any) -> Any:
    return value


def _nothing(_loss: Any) -> dict[str, Any]:
    return {}


def _gradients(
    passes: LossPasses, rule: SAM, named: Any, *, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats, Any]:
    """Clean loss, gradients of the scaled loss at ``w + e``, stats, and the last clean report."""
    check_batch_given(
        rule.fraction,
        rule.microbatches,
        given=batch is not None,
        cure="give batch=(inputs, targets) and a loss function that uses the tensors it is given",
    )
    perturbs = are_perturbed(passes.variables, named, rule)
    if rule.every == 1:
        return _sharpness_aware(passes, perturbs, rule, batch, step)
    now = tf.get_static_value(tf.convert_to_tensor(step))  # None inside a graph
    if now is not None:
        if rule.perturbs(int(now)):
            return _sharpness_aware(passes, perturbs, rule, batch, step)
        return _plain(passes, perturbs, batch)
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return _choose_step(passes, perturbs, rule, batch, step)
    if rule.fraction != 1 or rule.microbatches != 1:
        raise ConfigError(
            "every above 1 with fraction or microbatches on several replicas needs run_eagerly=True"
        )
    # Replicas cannot talk inside a condition, so both passes run; the perturbation of a plain step
    # is zero.
    return _sharpness_aware(passes, perturbs, rule, batch, step)


def are_perturbed(variables: Sequence[Any], named: Any, rule: SAM) -> list[bool]:
    """Tell which variables are perturbed: what is selected and trainable now (SAM-4)."""
    names = {variable_key(v): name for name, v in named_variables(named).items()}
    selected = set(perturbed_names(names.values(), rule))
    flags = []
    for variable in variables:
        name = names.get(variable_key(variable))
        # A scale of float8 training is overwritten by its gradient: no parameter.
        scale = getattr(variable, "overwrite_with_gradient", False)
        if name is None and not scale:
            raise ParameterError(
                f"variable {variable.path!r} of shape {tuple(variable.shape)} is not a parameter of the "
                "model; give the model that the variables belong to, after it is built"
            )
        flags.append(name in selected and variable.trainable and not scale)
    return flags


@dataclass(frozen=True)
class Pass:
    """What one run of the loss gave; nothing is written yet.

    Attributes
    ----------
    weights, reported, state : lists of (variable, value)
        What the pass would have written: into the weights themselves, into metrics, and anything
        else.
    """

    loss: Any
    gradients: list[Any]
    weights: list[tuple[Any, Any]]
    reported: list[tuple[Any, Any]]
    state: list[tuple[Any, Any]]


class LossPasses:
    """Runs the loss function at the weights, or with the variables reading as other values."""

    def __init__(
        self,
        loss_fn: Loss,
        variables: Sequence[Any],
        *,
        scale: Callable[[Any], Any] = _identity,
        report: Callable[[Any], Any] = _nothing,
        reported: Callable[[], Iterable[Any]] = tuple,
        outside: Sequence[Any] = (),
    ) -> None:
        self.loss_fn, self.variables = loss_fn, list(variables)
        self.scale, self.report = scale, report
        self.reported = reported  # asked after a pass: metrics may be made in it
        self.outside = outside

    def clean(self, batch: Sequence[Any] | None) -> tuple[Pass, Any]:
        """Run at the weights; also return what is reported of it."""
        done = self.run(batch, [variable.value for variable in self.variables], moved=False)
        # A layer that writes to its own weights does so at the start of a step.
        _carry_out([*done.weights, *done.reported])
        return done, self.report(done.loss)

    def perturbed(self, batch: Sequence[Any] | None, values: list[Any]) -> Pass:
        """Run where the variables read as ``values``, from the state before the step."""
        return self.run(batch, values, moved=True)

    def run(self, batch: Sequence[Any] | None, values: list[Any], *, moved: bool) -> Pass:
        with tf.GradientTape() as tape:
            scope = _Scope(self.variables, values, tape, self.outside, moved=moved)
            with scope:
                returned = self.loss_fn() if batch is None else self.loss_fn(*batch)
                if returned is None:
                    raise ConfigError(
                        "the loss function returned None; its last line must be 'return loss'"
                    )
                loss = tf.convert_to_tensor(returned)
                if loss.shape.rank not in (0, None):
                    raise ConfigError(
                        f"the loss must be a scalar, got the shape {tuple(loss.shape)}; take its mean"
                    )
                scaled = self.scale(loss)
        updates = scope.rewind()
        sources = [scope.sources[id(variable)] for variable in self.variables]
        flat = iter(tape.gradient(scaled, [value for values in sources for value in values]))
        gradients = [_sum([next(flat) for _ in values]) for values in sources]
        reported = {id(variable) for variable in self.reported()}
        written = Pass(loss, gradients, [], [], [])
        for variable, value in updates:
            if id(variable) in scope.sources:
                written.weights.append((variable, value))
            elif id(variable) in reported:
                written.reported.append((variable, value))
            else:
                written.state.append((variable, value))
        return written


def _carry_out(updates: Iterable[tuple[Any, Any]]) -> None:
    for variable, value in updates:
        variable.assign(value)


class _Scope(keras.StatelessScope):  # type: ignore[misc]
    """Where weights read as given values, and what is assigned is noted, not carried out.

    A value that is noted cannot leave a loop or a condition of a graph. State that is used inside
    one stays in its variable, and is put back when the pass is over.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        values: Sequence[Any],
        tape: Any,
        outside: Sequence[Any],
        *,
        moved: bool,
    ) -> None:
        super().__init__(collect_losses=True)
        self.tape, self.moved = tape, moved
        self.graph = _current_graph()
        self.entered: Any = None  # the frame of whoever runs the pass
        self.weights = variables
        self.sources = {id(v): [value] for v, value in zip(variables, values, strict=True)}
        self.state_mapping = {key: values[0] for key, values in self.sources.items()}
        self.written: dict[int, Any] = {}  # variables that were assigned to
        self.before: dict[int, Any] = {}  # values of those that are written in place
        tape.watch(list(values))
        for variable in outside:
            self.written[id(variable)] = variable
            self.before[id(variable)] = tf.identity(variable)

    def __enter__(self) -> _Scope:
        self.entered = sys._getframe(1)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.entered = None
        super().__exit__(*error)

    def get_current_value(self, variable: Any) -> Any:
        """Return what a variable reads as; Keras asks for every one, those not mapped too."""
        key = id(variable)
        if key in self.sources:
            if self.moved and _escapes(self.entered):
                raise ConfigError(_AROUND.format(name=variable.path, shape=tuple(variable.shape)))
        elif key in self.state_mapping and _current_graph() is not self.graph:
            self._put_in_place(variable)
        return self.state_mapping.get(key, variable._value)

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Note an assignment; as from a variable, no gradient flows through the value."""
        variable, value = update
        key, value = id(variable), tf.stop_gradient(value)
        nested = _current_graph() is not self.graph
        self.written[key] = variable
        if key in self.sources:
            if nested:
                raise ConfigError(
                    f"{variable.path!r} of shape {tuple(variable.shape)} is assigned to inside a loop, a "
                    "condition or a tf.function by its own layer; use run_eagerly=True, or assign outside of it"
                )
            self.tape.watch(value)
            self.sources[key].append(value)
            self.state_mapping[key] = value
        elif nested or key in self.before:
            self._put_in_place(variable)
            variable._direct_assign(value)
        else:
            self.state_mapping[key] = value

    def rewind(self) -> list[tuple[Any, Any]]:
        """Put back what was written in place; return what was assigned, and the values."""
        if self.moved:
            self._check_escapes()
        updates = []
        for key, variable in self.written.items():
            if key in self.before:
                updates.append((variable, tf.identity(_in_tensorflow(variable))))
                _in_tensorflow(variable).assign(self.before[key])
            else:
                updates.append((variable, self.state_mapping[key]))
        return updates

    def _put_in_place(self, variable: Any) -> None:
        """Let the variable itself hold the state from now on, until the pass is over."""
        if id(variable) in self.before:
            return
        with tf.init_scope() if self.graph is None else self.graph.as_default():
            self.before[id(variable)] = tf.identity(variable._value)
            if id(variable) in self.state_mapping:
                variable._direct_assign(self.state_mapping.pop(id(variable)))

    def _check_escapes(self) -> None:
        seen = {variable_key(variable) for variable in self.tape.watched_variables()}
        for variable in self.weights if seen else ():
            if variable_key(variable) in seen:
                raise ConfigError(_AROUND.format(name=variable.path, shape=tuple(variable.shape)))


_AROUND: Final = (
    "{name!r} of shape {shape} is read around Keras in SAM's second pass, which would not see it perturbed or "
    "would lose its gradient: by a tf.function inside the model, tf.custom_gradient, tf.recompute_grad or "
    "keras.RematScope, or as its tf.Variable; let the layer read the Keras variable outside of those"
)


def _current_graph() -> Any:
    """Return the graph under construction, None outside of graphs."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _in_tensorflow(variable: Any) -> Any:
    """Return the tf.Variable, past any scope."""
    return variable._value if isinstance(variable, keras.Variable) else variable


def _escapes(end: Any) -> bool:
    """Tell whether a weight is read where TensorFlow would take only a tf.Variable for one.

    That is in a function with a gradient of its own (which loses that of a tensor that is no
    argument), and in somebody's tf.function (which keeps the tensor of its first call). The frame
    ``end`` and those above do not count.
    """
    frame: Any = sys._getframe(2)
    foreign = False  # seen code that is no conversion of a variable to a tensor
    while frame is not None and frame is not end:
        file = frame.f_code.co_filename
        if foreign and (
            file == _CUSTOM_GRADIENT or (file == _FUNCTION and _called_by_layer(frame))
        ):
            return True
        foreign = foreign or not file.startswith(_LIBRARIES)
        frame = frame.f_back
    return False


def _called_by_layer(frame: Any) -> bool:
    """Tell whether neither TensorFlow nor Keras' backend made the tf.function, for one call."""
    caller = frame.f_back
    while caller.f_code.co_name == "error_handler":
        caller = caller.f_back
    return not caller.f_code.co_filename.startswith(_LIBRARIES)


_CUSTOM_GRADIENT: Final = tf.custom_gradient.__code__.co_filename
_FUNCTION: Final = str(sys.modules[type(tf.function(_escapes)).__module__].__file__)
_LIBRARIES: Final = (
    str(Path(tf.__file__).parent / "_")[:-1],
    str(Path(keras.Variable.__mro__[1].__init__.__code__.co_filename).parents[1] / "_")[:-1],
)
"""TensorFlow, and the part of Keras in which variables become tensors."""


def _plain(
    passes: LossPasses, perturbs: list[bool], batch: Sequence[Any] | None
) -> tuple[Any, list[Any], SamStats, Any]:
    done, report = passes.clean(batch)
    _carry_out(done.state)
    stats = SamStats(tf.zeros((), _norm_dtype(passes.variables, perturbs)), done.loss, done.loss)
    return done.loss, done.gradients, stats, report


def _choose_step(
    passes: LossPasses, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats, Any]:
    """Choose inside a graph: of the two kinds of step, only one is carried out (SAM-11)."""
    has_gradient: list[bool] = []

    def flat(loss: Any, gradients: list[Any], stats: SamStats, report: Any) -> Any:
        # Branches return the same structure: no None, and no sparse gradient that is dense in the
        # other.
        has_gradient[:] = [gradient is not None for gradient in gradients]
        return loss, [_dense(g) for g in gradients if g is not None], stats, report

    loss, dense, stats, report = tf.cond(
        tf.equal(tf.cast(step, tf.int64) % rule.every, 0),
        lambda: flat(*_sharpness_aware(passes, perturbs, rule, batch, step)),
        lambda: flat(*_plain(passes, perturbs, batch)),
    )
    remaining = iter(dense)
    gradients = [next(remaining) if present else None for present in has_gradient]
    return loss, gradients, stats, report


def _sharpness_aware(
    passes: LossPasses, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats, Any]:
    if rule.microbatches == 1:
        return two_passes(passes, perturbs, rule, batch, step)[:4]
    assert batch is not None
    results = [
        two_passes(passes, perturbs, rule, micro, step)
        for micro in _split(batch, rule.microbatches)
    ]
    ascents = [result[4] for result in results]
    sizes = [result[5] for result in results]
    gradients = [
        _weighted([g for _, gs, *_ in results for g in [gs[i]]], sizes)
        for i in range(len(passes.variables))
    ]
    stats = [result[2] for result in results]
    loss = _weighted([micro.loss for micro in stats], ascents)
    norm = tf.reduce_max(tf.stack([micro.norm for micro in stats]))
    perturbed = _weighted([micro.perturbed_loss for micro in stats], sizes)
    return loss, gradients, SamStats(norm, loss, perturbed), results[-1][3]


def two_passes(
    passes: LossPasses, perturbs: list[bool], rule: SAM, batch: Sequence[Any] | None, step: Any
) -> tuple[Any, list[Any], SamStats, Any, Any, Any]:
    sizes: tuple[Any, Any] = (1, 1)
    first = batch
    if batch is not None:
        examples = tf.shape(_first(batch))[0]
        # ceil(fraction * examples), in float64 as the specification computes it
        ascents = tf.cast(tf.math.ceil(rule.fraction * tf.cast(examples, tf.float64)), tf.int32)
        sizes = (ascents, examples)
        if rule.fraction < 1:
            first = [None if a is None else a[:ascents] for a in batch]
    clean, report = passes.clean(first)
    ascent = clean.gradients
    if rule.scope == "global" and tf.distribute.get_strategy().num_replicas_in_sync > 1:
        # Keras divides each replica's loss by their number, so the sum is the mean.
        present = [_dense(g) for g in ascent if g is not None]
        reduced = iter(tf.distribute.get_replica_context().all_reduce("sum", present))
        ascent = [None if g is None else next(reduced) for g in ascent]
    rho = value_at("rho", rule.rho, step, _norm_dtype(passes.variables, perturbs))
    scale = passes.scale(tf.ones((), _norm_dtype(passes.variables, perturbs)))
    values, norm = perturbed_values(passes.variables, ascent, perturbs, rule, rho, step, scale)
    perturbed = passes.perturbed(batch, values)
    gradients = perturbed.gradients
    if callable(rule.rho) and not isinstance(rule.rho, Schedule):
        # Inside a graph a bad rho is NaN, which reaches no gradient that is the same everywhere.
        gradients = [_poisoned(g, 0 * rho) for g in gradients]
    # Of the passes that saw the whole batch, the first.
    _carry_out(clean.state if rule.fraction == 1 else perturbed.state)
    if rule.nonfinite == "raise":
        _raise_unless_finite(norm)
    stats = SamStats(norm, clean.loss, perturbed.loss)
    return clean.loss, gradients, stats, report, *sizes


def perturbed_values(
    variables: list[Any],
    ascent: list[Any],
    perturbs: list[bool],
    rule: SAM,
    rho: Any,
    step: Any,
    scale: Any = 1.0,
) -> tuple[list[Any], Any]:
    """Return ``w + e`` and the norm of the ascent gradient (SAM-1, SAM-2, SAM-10).

    ``scale`` is what that gradient is multiplied by, so that ``eps`` is as well.
    """
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
    dtype = _norm_dtype(variables, perturbs)
    sizes = [tf.cast(tf.abs(d), dtype) for d in directions.values()]
    largest = tf.reduce_max(tf.stack([tf.reduce_max(size) for size in sizes]))
    safe = tf.where((largest > 0) & tf.math.is_finite(largest), largest, 1)
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(size / safe)) for size in sizes])) * safe
    usable = (norm > 0) & tf.math.is_finite(norm)
    if rule.every != 1:
        usable &= tf.equal(tf.cast(step, tf.int64) % rule.every, 0)
    factor = rho / (norm + rule.eps * scale)
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


def _norm_dtype(variables: list[Any], perturbs: list[bool]) -> Any:
    """Return the dtype of the norm."""
    double = {"float64", "complex128"}
    is_double = any(p and v.dtype in double for v, p in zip(variables, perturbs, strict=True))
    return tf.float64 if is_double else tf.float32


def _scale(value: Any, rule: SAM, dtype: Any) -> Any:
    if rule.adaptive and len(value.shape) >= 2:
        return tf.cast(tf.abs(tf.cast(value, dtype)), dtype) + tf.constant(rule.eta, dtype)
    return tf.ones((), dtype)


def apply(optimizer: Any, gradients: list[Any], variables: list[Any], norm: Any, rule: SAM) -> None:
    """Let the optimizer act, unless the policy says to skip the step (SAM-5)."""
    if rule.nonfinite != "skip_step":
        optimizer.apply(gradients, variables)
        return
    poison = tf.where(tf.math.is_finite(norm), 0.0, float("nan"))
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It skips poisoned steps itself, and lowers its scale.
        optimizer.apply([_poisoned(g, poison) for g in gradients], variables)
        return
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas == 1:
        finite = tf.math.is_finite(norm)
        tf.cond(finite, lambda: _true(optimizer.apply(gradients, variables)), _true)
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
            return _true()

        tf.cond(tf.equal(first, 0.0), apply, _true)

    context.merge_call(across, args=(poison, tuple(gradients)))


def _true(_: Any = None) -> Any:
    """Return what both branches of a condition have to return, whatever was done: one tensor."""
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


# --- helpers --------------------------------------------------------------------------------------


def _check_model(model: Any) -> Any:
    """Return the model if sharpness-aware steps can take the place of its own."""
    refuse_keras_2(model)
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model must be a keras.Model, got {short_repr(model)}")
    if isinstance(model, SharpnessAwareModel):
        raise ConfigError(
            f"the model {model.name!r} is sharpness-aware already; wrap its inner model, model.model"
        )
    for method in ("train_step", "make_train_function"):
        own = getattr(getattr(model, method), "__func__", None)
        if own is not getattr(keras.Model, method):
            raise ConfigError(
                f"the model {model.name!r} has a {method} of its own, whose place SharpnessAwareModel would take; "
                "call agc_tensorflow.sam_value_and_gradients in it instead of a GradientTape, or override "
                "compute_loss and compute_metrics"
            )
    return model


def _symbolic(tensor: Any) -> Any:
    if tensor is None:
        return None
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.KerasTensor(tensor.shape, dtype, sparse=isinstance(tensor, tf.SparseTensor))


def _outside_keras(model: Any) -> list[Any]:
    """Return TensorFlow's variables that layers may assign to: counters, random generators."""
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return []  # replicas cannot put back what only some of them may assign
    held = [value for layer in model._flatten_layers() for value in vars(layer).values()]
    states = [v.state if isinstance(v, tf.random.Generator) else v for v in held]
    distinct = {id(v): v for v in states if isinstance(v, tf.Variable)}
    return [v for v in distinct.values() if not (v.trainable and v.dtype.is_floating)]


def _first(batch: Sequence[Any]) -> Any:
    return next(tensor for tensor in batch if tensor is not None)


def _sum(gradients: list[Any]) -> Any:
    """Add gradients, one as it is; None only if all are."""
    present = [gradient for gradient in gradients if gradient is not None]
    if len(present) > 1:
        return tf.add_n([_dense(gradient) for gradient in present])
    return present[0] if present else None


def _dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)


def _poisoned(gradient: Any, poison: Any) -> Any:
    """Return a gradient plus 0, or plus NaN."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values + tf.cast(poison, gradient.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient + tf.cast(poison, gradient.dtype)


def _split(batch: Sequence[Any], count: int) -> list[list[Any]]:
    """Split into micro-batches of neighbours whose sizes differ by at most one (SAM-8)."""
    size = _first(batch).shape[0]
    if size is not None:
        check_microbatches(count, size)
    microbatches: list[list[Any]] = []
    examples = tf.shape(_first(batch))[0]
    base, longer = examples // count, examples % count
    for i in range(count):
        low = i * base + tf.minimum(i, longer)
        high = (i + 1) * base + tf.minimum(i + 1, longer)
        microbatches.append([None if a is None else a[low:high] for a in batch])
    return microbatches


def _weighted(values: Sequence[Any], counts: Sequence[Any]) -> Any:
    """Mean weighted by example count; None only where every value is None."""
    total = tf.add_n([tf.cast(count, tf.float64) for count in counts])
    present = [
        _dense(value) * tf.cast(tf.cast(count, tf.float64) / total, value.dtype)
        for value, count in zip(values, counts, strict=True)
        if value is not None
    ]
    return tf.add_n(present) if present else None
