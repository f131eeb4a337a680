"""AGC in front of any Keras optimizer, in ``compile`` and ``fit``.

Keras computes an update in fixed order: drop missing gradients, unscale, accumulate, ``_clip_gradients``, weight
decay, reduce across replicas, update. AGC takes the place in front of ``_clip_gradients``, so it sees the
accumulated mean and the weights before their decay; the reduction is moved in front of it (AGC-7). The inner
optimizer keeps its state, its learning rate and its counter, and the wrapper shows them as its own.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import keras
import tensorflow as tf

from agc import AGC, Plan, PlanEntry
from agc.config import check_rule
from agc.errors import ConfigError, MissingGradientError, ParameterError
from agc_tensorflow.clip import IDLE, Gradient, Stats, clip
from agc_tensorflow.units import (
    Model,
    Variable,
    named_variables,
    resolve,
    variable_key,
)

__all__ = ["AdaptiveGradClip"]


@keras.saving.register_keras_serializable(package="agc")
class AdaptiveGradClip(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Clip the gradients that an optimizer receives (AGC-1 to AGC-12).

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer or str
        Any optimizer. It becomes a part of this one: use it through the wrapper only.
    rule : AGC
        The configuration.
    model : keras.Model, optional
        The model to train, built: its layer types settle the units, its layers' names the names of
        parameters. Without it, units follow the layout convention for the variables that the optimizer is
        built with, and rank 3 has to be declared in the rule.
    name : str, optional
        The optimizer's name.

    Attributes
    ----------
    inner_optimizer : keras.optimizers.Optimizer
        The optimizer inside.
    rule : AGC
        The configuration.
    plan : Plan
        What happens to every parameter; there once the optimizer is built, or from the start with a model.

    Raises
    ------
    ConfigError
        If ``optimizer`` is not a Keras optimizer, is clipped by AGC already, or is a
        ``LossScaleOptimizer``: wrap the other way round, ``LossScaleOptimizer(AdaptiveGradClip(...))``.
    SelectorError, AmbiguousUnitsError, ParameterError
        As :func:`agc_tensorflow.plan`; from ``build`` also if the variables are not the model's.

    Notes
    -----
    * Order: loss scale, accumulation, reduction across replicas, AGC, the inner optimizer's own ``clipnorm``,
      ``clipvalue`` or ``global_clipnorm``, weight decay, update. (AGC-7)
    * Schedules of ``clipping`` count updates: with ``gradient_accumulation_steps=4``, one for four batches.
    * Learning rate, weight decay, moving averages, accumulation and every other setting are those of the
      inner optimizer; reading or setting them here reaches it.
    * ``model.save`` keeps the configuration and the plan of every parameter, frozen ones too, by the paths of
      the variables, so a loaded model needs nothing else. If its layers have got other names, the order of
      the trainable variables decides.

    References
    ----------
    Brock, De, Smith, Simonyan, arXiv:2102.06171, Eq. 3.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = AdaptiveGradClip(keras.optimizers.SGD(0.1), AGC(clipping=0.01), model=model)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(tf.ones((4, 3)), 100 * tf.ones((4, 1)), verbose=0)
    >>> optimizer.stats().total().clipped
    2
    """

    def __init__(
        self,
        optimizer: Any,
        rule: AGC,
        *,
        model: Model | None = None,
        name: str | None = None,
    ) -> None:
        inner = _check_inner(optimizer)
        check_rule(rule, AGC)
        super().__init__(learning_rate=0.0, name=name)
        for state in _STATE:
            self.__dict__.pop(state, None)
        self.rule = rule
        self._seam = _Seam(inner, rule)
        self.inner_optimizer = inner
        if model is not None:
            self._seam.follow(model)
        if inner.built:
            self._seam.build(inner._trainable_variables)

    @property
    def plan(self) -> Plan:
        """What happens to every parameter.

        Raises
        ------
        ParameterError
            If there is no model and the optimizer is not built yet.
        """
        if self._seam.plan is None:
            raise ParameterError(
                "the optimizer is not built yet, so its parameters are unknown; give "
                "AdaptiveGradClip(..., model=model), or call build(model.trainable_variables)"
            )
        return self._seam.plan

    def stats(self) -> Stats:
        """Return the telemetry of the last update, on the device (AGC-11)."""
        if self._seam.table is None:
            raise ParameterError("the optimizer is not built yet, so there is no telemetry")
        return Stats(tuple(entry.name for entry in self._seam.entries), self._seam.table)

    def build(self, variables: Sequence[Variable]) -> None:
        """Create the inner optimizer's state and settle what happens to every variable."""
        self._seam.build(variables)
        self.inner_optimizer.build(variables)

    def apply(
        self, grads: Sequence[Gradient], trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Clip gradients and update the variables by the inner optimizer.

        Raises
        ------
        MissingGradientError
            If no variable has a gradient.
        ConfigError
            If the inner optimizer does not call Keras' ``_clip_gradients``, so that AGC cannot act.
        """
        grads = list(grads)
        if grads and all(gradient is None for gradient in grads):
            raise MissingGradientError(
                "no parameter has a gradient; does the loss depend on the model's variables?"
            )
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        self._seam.passed = False
        self.inner_optimizer.apply(grads, trainable_variables)
        if grads and not self._seam.passed:
            raise ConfigError(
                f"{type(self.inner_optimizer).__name__} updates its variables without Keras' "
                "_backend_apply_gradients and _clip_gradients, so AGC cannot act inside it; use "
                "agc_tensorflow.adaptive_clip_gradients in a loop of your own"
            )

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def save_own_variables(self, store: Any) -> None:
        """Save nothing: the inner optimizer, which holds all state, is saved for itself."""

    def load_own_variables(self, store: Any) -> None:
        """Load nothing; see :meth:`save_own_variables`."""

    def get_config(self) -> dict[str, Any]:
        """Return the configuration: the inner optimizer, the rule, and the plan if there is one.

        Raises
        ------
        ConfigError
            If the rule holds a callable that is not an ``agc.Schedule``.
        """
        plan = self._seam.plan
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "rule": self.rule.to_dict(),
            "plan": plan and plan.to_dict(),
            "paths": self._seam.paths,
            "order": self._seam.order(),
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> AdaptiveGradClip:
        """Build an optimizer from :meth:`get_config`'s data; it takes its plan without a model."""
        inner = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects)
        made = cls(inner, AGC.from_dict(config["rule"]), name=config["name"])
        if config["plan"] is not None:
            made._seam.restore(Plan.from_dict(config["plan"]), config["paths"], config["order"])
        return made

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("inner_optimizer")
        if inner is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STATE and "inner_optimizer" in vars(self):
            setattr(self.inner_optimizer, name, value)
        else:
            super().__setattr__(name, value)


_STATE: Final = frozenset(
    {
        "_iterations",
        "_learning_rate",
        "_tracker",
        "_trainable_variables",
        "_trainable_variables_indices",
        "_variables",
        "built",
        "clipnorm",
        "clipvalue",
        "ema_momentum",
        "ema_overwrite_frequency",
        "global_clipnorm",
        "gradient_accumulation_steps",
        "loss_scale_factor",
        "use_ema",
        "weight_decay",
    }
)
"""What an optimizer keeps about itself: here the inner one's, so that methods inherited from Keras see it."""


class _Seam:
    """The place inside the inner optimizer where AGC acts; a plain object, which Keras does not track."""

    def __init__(self, inner: Any, rule: AGC) -> None:
        self.inner = inner
        self.rule = rule
        self.plan: Plan | None = None
        self.entries: list[PlanEntry] = []  # in the order of the optimizer's variables
        self.paths: dict[str, str] = {}  # of variables, to the names in the plan
        self.table: tf.Variable | None = None
        self.passed = False
        self._of_model: dict[object, PlanEntry] | None = None
        self._model: weakref.ref[Any] | None = None
        self._variables: list[Variable] = []
        self._places: dict[object, int] = {}  # of the variables
        self._current: list[int] = []  # places of the gradients under way
        self._inner_apply = inner._backend_apply_gradients
        self._inner_clip = inner._clip_gradients
        self._reduce = inner._all_reduce_sum_gradients
        inner._backend_apply_gradients = self.apply
        inner._clip_gradients = self.clip
        inner._all_reduce_sum_gradients = list  # they are reduced before they are clipped

    def follow(self, model: Model) -> None:
        """Take the plan of a model."""
        named = named_variables(model)
        self.plan, entries = resolve(list(named.values()), self.rule, model=model)
        keys = [variable_key(variable) for variable in named.values()]
        self._of_model = dict(zip(keys, entries, strict=True))
        self.paths = _paths(named.values(), entries)
        if isinstance(model, keras.Layer):
            self._model = weakref.ref(model)
        trainable = getattr(model, "trainable_variables", named.values())
        self.entries = [
            self._of_model[key] for key in map(variable_key, trainable) if key in self._of_model
        ]

    def order(self) -> list[str]:
        """Return the names of what is trainable now, as an optimizer is going to be built with."""
        model = self._model() if self._model else None
        if model is not None and self._of_model is not None:
            found = map(self._of_model.get, map(variable_key, model.trainable_variables))
            return [entry.name for entry in found if entry is not None]
        if not self._variables:
            return [entry.name for entry in self.entries]
        pairs = zip(self._variables, self.entries, strict=True)
        return [entry.name for variable, entry in pairs if variable.trainable]

    def restore(self, plan: Plan, paths: dict[str, str], order: list[str]) -> None:
        """Take a saved plan, the paths of its variables, and the order in which the optimizer had them."""
        self.plan = plan
        self.paths = paths
        self.entries = [plan[name] for name in order]

    def build(self, variables: Sequence[Variable]) -> None:
        """Pair the optimizer's variables with their entries and make room for telemetry."""
        if self.table is not None:
            return
        variables = [v for v in variables if not getattr(v, "overwrite_with_gradient", False)]
        if self._of_model is not None:
            self.entries = [self._entry(variable) for variable in variables]
        elif self.plan is not None:
            self.entries = self._restored(variables, self.plan)
        else:
            self.plan, self.entries = resolve(variables, self.rule)
            self.paths = _paths(variables, self.entries)
        self._variables = variables
        self._places = {variable_key(v): place for place, v in enumerate(variables)}
        with tf.init_scope():
            self.table = tf.Variable(
                tf.constant([IDLE] * len(variables), tf.float64, (len(variables), len(IDLE))),
                trainable=False,
                name="agc_stats",
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )

    def apply(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> None:
        """Stand in for ``_backend_apply_gradients``: note which variables the gradients belong to."""
        self._current = [self._places[variable_key(variable)] for variable in variables]
        self._inner_apply(gradients, variables)
        # Outside graphs, a batch that is only accumulated does not come to be clipped.
        self.passed = self.passed or bool(self.inner.gradient_accumulation_steps)

    def clip(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Stand in for ``_clip_gradients``: reduce, clip by AGC, then as the inner optimizer does."""
        assert self.table is not None
        self.passed = True
        current = [self._variables[place] for place in self._current]
        every: list[Gradient] = [None] * len(self._variables)
        for place, (gradient, _) in zip(
            self._current, self._reduce(list(zip(gradients, current, strict=True))), strict=True
        ):
            every[place] = gradient
        clipped, stats = clip(
            every, self._variables, self.entries, self.rule, step=self.inner.iterations
        )
        self.table.assign(stats.table)
        done: list[Gradient] = self._inner_clip([clipped[place] for place in self._current])
        return done

    def _restored(self, variables: Sequence[Variable], plan: Plan) -> list[PlanEntry]:
        """Pair variables with the entries of a saved plan."""
        names = [self.paths.get(_path(variable)) for variable in variables]
        found = [plan[name] for name in names if name is not None]
        entries = (
            found if len(found) == len(names) else self.entries
        )  # layers are renamed: by position
        shapes = [tuple(variable.shape) for variable in variables]
        wanted = [entry.shape for entry in entries]
        if shapes != wanted:
            raise ParameterError(
                f"the saved plan is for {len(wanted)} variables of shapes {wanted}, the optimizer is built "
                f"with {len(shapes)} of shapes {shapes}; make a new AdaptiveGradClip(..., model=model)"
            )
        return entries

    def _entry(self, variable: Variable) -> PlanEntry:
        assert self._of_model is not None
        entry = self._of_model.get(variable_key(variable))
        if entry is None:
            name = getattr(variable, "path", variable.name)
            raise ParameterError(
                f"variable {name!r} of shape {tuple(variable.shape)} is not a parameter of the model that "
                "AdaptiveGradClip was given; give the model that is trained, after it is built"
            )
        return entry


def _check_inner(optimizer: Any) -> Any:
    """Return the optimizer to wrap if AGC can act inside it."""
    inner = keras.optimizers.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise ConfigError(
            f"optimizer must be a keras.optimizers.Optimizer or its name, got {optimizer!r}"
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            "a LossScaleOptimizer unscales gradients before its inner optimizer sees them; wrap the other "
            "way round: LossScaleOptimizer(AdaptiveGradClip(inner, rule))"
        )
    if isinstance(inner, AdaptiveGradClip) or isinstance(
        getattr(inner._clip_gradients, "__self__", None), _Seam
    ):
        raise ConfigError(
            f"{inner.name!r} is clipped by AGC already; give each AdaptiveGradClip an optimizer of its own"
        )
    return inner


def _paths(variables: Iterable[Variable], entries: Sequence[PlanEntry]) -> dict[str, str]:
    """Return the entries' names by the variables' paths, without paths that several variables have."""
    pairs = [(_path(v), entry.name) for v, entry in zip(variables, entries, strict=True)]
    counts = Counter(path for path, _ in pairs)
    return {path: name for path, name in pairs if counts[path] == 1}


def _path(variable: Variable) -> str:
    return str(getattr(variable, "path", variable.name))
