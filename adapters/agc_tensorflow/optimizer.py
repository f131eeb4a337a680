"""AGC in front of any Keras optimizer, in ``compile`` and ``fit``.

Keras computes an update in fixed order: drop missing gradients, unscale, accumulate,
``_clip_gradients``, weight decay, reduce across replicas, update. AGC takes the place in front of
``_clip_gradients``, so it sees the accumulated mean and the weights before their decay; the
reduction is moved in front of it (AGC-7). The inner optimizer keeps its state, its learning rate
and its counter, and the wrapper shows them as its own.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import keras
import tensorflow as tf

from agc import AGC, Plan, PlanEntry
from agc.checks import check_rule, short_repr
from agc.errors import ConfigError, FormatError, ParameterError
from agc_tensorflow.clip import clip
from agc_tensorflow.devices import outside_graphs
from agc_tensorflow.stats import IDLE, Stats
from agc_tensorflow.units import (
    Model,
    Variable,
    named_variables,
    refuse_keras_2,
    resolve,
    variable_key,
    variable_path,
)
from agc_tensorflow.views import Gradient

__all__ = ["AdaptiveGradClip"]


@keras.saving.register_keras_serializable(package="agc")
class AdaptiveGradClip(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Clip the gradients that an optimizer receives (AGC-1 to AGC-12).

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer or str
        Any optimizer. It becomes a part of this one until :meth:`detach`: use it through the
        wrapper only.
    rule : AGC
        The configuration.
    model : keras.Model, optional
        The model to train, built: its layer types settle the units, its layers' names the names of
        parameters. Without it, of the variables that the optimizer is built with, vectors are one
        unit, matrices follow the layout convention with a warning, and the rest has to be declared
        in the rule.
    name : str, optional
        The optimizer's name.

    Attributes
    ----------
    inner_optimizer : keras.optimizers.Optimizer
        The optimizer inside.
    rule : AGC
        The configuration.
    plan : Plan
        What happens to every parameter; there once the optimizer is built, or from the start with a
        model.

    Raises
    ------
    ConfigError
        If ``optimizer`` is not a Keras optimizer, is clipped by AGC already, or is one that hands
        gradients on to others, ``LossScaleOptimizer`` or ``MultiOptimizer``: wrap each optimizer
        inside it instead.
    SelectorError, AmbiguousUnitsError, ParameterError
        As :func:`agc_tensorflow.plan`; from ``build`` also if the variables are not the model's.

    Notes
    -----
    * Order: loss scale, accumulation, reduction across replicas, AGC, the inner optimizer's own
      ``clipnorm``, ``clipvalue`` or ``global_clipnorm``, weight decay, update. (AGC-7)
    * Schedules of ``clipping`` count updates: with ``gradient_accumulation_steps=4``, one for four
      batches.
    * Learning rate, weight decay, moving averages, accumulation and every other setting are those
      of the inner optimizer; reading or setting them here reaches it.
    * An optimizer that overrides ``apply_gradients``, ``apply``, ``update_step`` or
      ``_clip_gradients`` does what it does without the wrapper, and AGC too. As in Keras, ``apply``
      does not call ``apply_gradients``.
    * Row-sparse gradients stay sparse where rows are units (AGC-9), and are made dense where they
      are not.
    * A step in which no variable has a gradient is the ValueError that it is in Keras.
    * ``model.save`` keeps the configuration and the plan of every parameter, frozen ones too, by
      the names of layers, so a loaded model needs nothing else. A new number behind a layer's name
      does no harm; where it leaves doubt which parameter is which, and that matters, loading is an
      error.

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
        self._hook = ClippingHook(inner, rule)
        if model is not None:
            self._hook.take_plan_of(model)
        if inner.built:
            self._hook.build(inner._trainable_variables)
        self._hook.attach()  # when nothing can fail any more
        self.inner_optimizer = inner

    @property
    def plan(self) -> Plan:
        """What happens to every parameter; those that the optimizer lacks are marked as inactive.

        Raises
        ------
        ParameterError
            If there is no model and the optimizer is not built yet.
        """
        if self._hook.plan is None:
            raise ParameterError(
                "the optimizer is not built yet, so its parameters are unknown; give "
                "AdaptiveGradClip(..., model=model), or call build(model.trainable_variables)"
            )
        return self._hook.plan.marked(self._hook.inactive())

    def stats(self) -> Stats:
        """Return the telemetry of the last update, on the device; empty before it (AGC-11)."""
        if self._hook.table is None:
            return Stats((), tf.zeros((0, len(IDLE)), tf.float64))
        return Stats(tuple(entry.name for entry in self._hook.entries), self._hook.table)

    @outside_graphs()
    def build(self, variables: Sequence[Variable]) -> None:
        """Create the inner optimizer's state and settle what happens to every variable."""
        self._hook.build(variables)
        self.inner_optimizer.build(variables)

    def apply(
        self, grads: Sequence[Gradient], trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Clip gradients and update the variables by the inner optimizer.

        Raises
        ------
        ValueError
            If no variable has a gradient, as Keras does.
        ConfigError
            If the inner optimizer changes its variables without Keras' ``_clip_gradients``, so that
            AGC cannot act: outside graphs the step is undone. Or after :meth:`detach`.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        self._hook.watch(grads, lambda: self.inner_optimizer.apply(grads, trainable_variables))

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Gradient, Variable]], *args: Any, **kwargs: Any
    ) -> Any:
        """Clip and update, by the inner optimizer's own ``apply_gradients`` if it overrides Keras'.

        Raises
        ------
        ValueError, ConfigError
            As :meth:`apply`.
        """
        inner = self.inner_optimizer
        own = getattr(inner.apply_gradients, "__func__", inner.apply_gradients)
        if own is keras.optimizers.Optimizer.apply_gradients:
            return super().apply_gradients(grads_and_vars, *args, **kwargs)
        pairs = list(grads_and_vars)
        if not self.built:
            self.build([variable for _, variable in pairs])
        grads = [gradient for gradient, _ in pairs]
        return self._hook.watch(grads, lambda: inner.apply_gradients(pairs, *args, **kwargs))

    def detach(self) -> Any:
        """Take the inner optimizer out again: it keeps its state and no longer clips.

        A model that was compiled with the wrapper has to be compiled again, with what is returned
        here; this wrapper is of no further use.

        Returns
        -------
        keras.optimizers.Optimizer
            The inner optimizer.

        Examples
        --------
        >>> optimizer = AdaptiveGradClip(keras.optimizers.SGD(0.1, name="mine"), AGC())
        >>> optimizer.detach().name
        'mine'
        """
        self._hook.detach()
        return self.inner_optimizer

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Set final values of variables, such as moving averages, as the inner optimizer does."""
        self.inner_optimizer.finalize_variable_values(var_list)

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
        saved = self._hook.saved()
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "rule": self.rule.to_dict(),
            "plan": saved and saved.to_dict(),
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> AdaptiveGradClip:
        """Build an optimizer from :meth:`get_config`'s data; it takes its plan without a model."""
        inner = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects)
        made = cls(inner, AGC.from_dict(config["rule"]), name=config["name"])
        if config["plan"] is not None:
            made._hook.restore(_Saved.from_dict(config["plan"]))
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
"""Attributes that are read from and written to the inner optimizer."""


class ClippingHook:
    """AGC inside the inner optimizer; a plain object, which Keras does not track."""

    def __init__(self, inner: Any, rule: AGC) -> None:
        self.inner = inner
        self.rule = rule
        self.plan: Plan | None = None
        self.entries: list[PlanEntry] = []  # in the order of the optimizer's variables
        self.table: tf.Variable | None = None
        self.attached = False
        self._restored: _Saved | None = None
        self._named: dict[str, Variable] = {}  # of the plan, as far as they are known
        self._entry_of_variable: dict[object, PlanEntry] | None = None
        self._model: weakref.ref[Any] | None = None
        self._root = ""
        self._variables: list[Variable] = []
        self._places: dict[object, int] = {}  # of the variables
        self._current: list[int] = []  # places of the gradients under way
        self._reached = False  # in this step
        self._reached_once = False  # in some step
        self._inner_apply = inner._backend_apply_gradients
        self._inner_clip = inner._clip_gradients
        self._reduce = inner._all_reduce_sum_gradients

    def attach(self) -> None:
        """Stand in for three methods of the inner optimizer."""
        self.inner._backend_apply_gradients = self.apply
        self.inner._clip_gradients = self.clip
        self.inner._all_reduce_sum_gradients = list  # they are reduced before they are clipped
        self.attached = True

    def detach(self) -> None:
        """Give the inner optimizer its own methods back."""
        if self.attached:
            self.inner._backend_apply_gradients = self._inner_apply
            self.inner._clip_gradients = self._inner_clip
            self.inner._all_reduce_sum_gradients = self._reduce
            self.attached = False

    def take_plan_of(self, model: Model) -> None:
        """Take the plan of a model."""
        self._named = named_variables(model)
        self.plan, entries = resolve(list(self._named.values()), self.rule, model=model)
        keys = map(variable_key, self._named.values())
        self._entry_of_variable = dict(zip(keys, entries, strict=True))
        if isinstance(model, keras.Layer):
            self._model = weakref.ref(model)
            self._root = model.name

    def inactive(self) -> Callable[[str], str | None]:
        """Return a function that says why a parameter has no gradient now; None if it has one."""
        frozen = {name for name, variable in self._named.items() if not variable.trainable}
        built = {entry.name for entry in self.entries} if self.table is not None else None

        def reason(name: str) -> str | None:
            if name in frozen:
                return "frozen"
            return "not in the optimizer" if built is not None and name not in built else None

        return reason

    def saved(self) -> _Saved | None:
        """Return what has to be kept so that a loaded optimizer finds its plan again."""
        if self.plan is None or not self._named:
            return self._restored
        paths = {name: variable_path(variable) for name, variable in self._named.items()}
        trainable = [name for name, variable in self._named.items() if variable.trainable]
        model = self._model() if self._model else None
        if model is not None and self._entry_of_variable is not None:
            entries = map(self._entry_of_variable.get, map(variable_key, model.trainable_variables))
            trainable = [entry.name for entry in entries if entry is not None]
        built = [entry.name for entry in self.entries]
        return _Saved(self.plan, self._root, paths, trainable, built)

    def restore(self, saved: _Saved) -> None:
        """Take a saved plan."""
        self.plan = saved.plan
        self._restored = saved

    def build(self, variables: Sequence[Variable]) -> None:
        """Pair the optimizer's variables with their entries and make room for telemetry."""
        if self.table is not None:
            return
        variables = [v for v in variables if not getattr(v, "overwrite_with_gradient", False)]
        if self._entry_of_variable is not None:
            self.entries = [self._entry(variable) for variable in variables]
        elif self._restored is not None:
            self.entries = self._restored.pair(variables)
            self._named = {e.name: v for e, v in zip(self.entries, variables, strict=True)}
        else:
            self.plan, self.entries = resolve(variables, self.rule)
            self._named = {e.name: v for e, v in zip(self.entries, variables, strict=True)}
            self._root = _common_root(map(variable_path, variables))
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

    def watch(self, gradients: Sequence[Gradient], step: Callable[[], Any]) -> Any:
        """Let the inner optimizer take a step, and refuse it if it goes past AGC."""
        if not self.attached:
            raise ConfigError(
                f"{self.inner.name!r} was detached from this AdaptiveGradClip; use it by itself, or make a new "
                "AdaptiveGradClip(optimizer, rule, model=model), and compile the model again"
            )
        self._reached = False
        eager = tf.executing_eagerly()
        state = [] if self._reached_once or not eager else [*self._variables, *self.inner.variables]
        before = [(variable, tf.identity(_tensor(variable))) for variable in state]
        result = step()
        self._reached_once = self._reached_once or self._reached
        count = len(self._variables)
        if not self._reached_once and (_undo(before, count) if eager else count and gradients):
            raise ConfigError(
                f"{type(self.inner).__name__} updates its variables without Keras' "
                "_backend_apply_gradients and _clip_gradients, so AGC cannot act inside it; wrap an optimizer "
                "that it has inside, or use agc_tensorflow.adaptive_clip_gradients in a loop of your own"
            )
        return result

    def apply(self, gradients: Sequence[Gradient], variables: Sequence[Variable]) -> None:
        """Stand in for ``_backend_apply_gradients``: note whose gradients these are."""
        self.build(self.inner._trainable_variables)  # if the optimizer is used without the wrapper
        self._current = [self._places[variable_key(variable)] for variable in variables]
        self._inner_apply(gradients, variables)

    def clip(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Stand in for ``_clip_gradients``: reduce, clip by AGC, then call the inner one."""
        assert self.table is not None
        self._reached = True
        current = [self._variables[place] for place in self._current]
        every: list[Gradient] = [None] * len(self._variables)
        for place, (gradient, _) in zip(
            self._current, self._reduce(list(zip(gradients, current, strict=True))), strict=True
        ):
            every[place] = gradient
        clipped, stats = clip(
            every,
            self._variables,
            self.entries,
            self.rule,
            step=self.inner.iterations,
            densify=True,
        )
        self.table.assign(stats.table)
        done: list[Gradient] = self._inner_clip([clipped[place] for place in self._current])
        return done

    def _entry(self, variable: Variable) -> PlanEntry:
        assert self._entry_of_variable is not None
        entry = self._entry_of_variable.get(variable_key(variable))
        if entry is not None:
            return entry
        what = f"variable {variable_path(variable)!r} of shape {tuple(variable.shape)}"
        model = self._model() if self._model else None
        if model is not None and variable_key(variable) in map(
            variable_key, named_variables(model).values()
        ):
            raise ParameterError(
                f"{what} was made after AdaptiveGradClip, as enable_lora and new layers do; make the "
                "AdaptiveGradClip(optimizer, rule, model=model) after it, and compile the model again"
            )
        raise ParameterError(
            f"{what} is not a parameter of the model that AdaptiveGradClip was given; give the model that is "
            "trained, after it is built"
        )


@dataclass(frozen=True)
class _Saved:
    """A plan, and by which names its parameters are found again in a loaded model.

    Attributes
    ----------
    plan : Plan
        All parameters.
    root : str
        The model's own name, which Keras writes in front of a variable's path or leaves out.
    paths : dict of str to str
        Name in the plan to the variable's path.
    trainable : list of str
        The parameters that were trainable when the optimizer was saved, in their order.
    built : list of str
        The parameters that it was built with, in their order.
    """

    plan: Plan
    root: str
    paths: dict[str, str]
    trainable: list[str] = field(default_factory=list)
    built: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data; a path stands without the model's own name in front."""
        paths = {name: _without(path, self.root) for name, path in self.paths.items()}
        own = {"root": self.root, "trainable": self.trainable, "built": self.built}
        return {**own, "paths": paths, "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> _Saved:
        """Read :meth:`to_dict`'s data.

        Raises
        ------
        FormatError
            If it is not that.
        """
        missing = {"plan", "paths", "root", "trainable", "built"} - set(data)
        if missing:
            raise FormatError(
                f"the saved plan of AdaptiveGradClip is of another version or damaged: {sorted(missing)[0]!r} is "
                "missing; load the model with compile=False, and compile it with a new AdaptiveGradClip"
            )
        plan, paths = Plan.from_dict(data["plan"]), dict(data["paths"])
        return cls(plan, data["root"], paths, list(data["trainable"]), list(data["built"]))

    def pair(self, variables: Sequence[Variable]) -> list[PlanEntry]:
        """Return the entries of variables; refuse what is left in doubt, if it matters.

        Raises
        ------
        ParameterError
            If it cannot be told which parameters the variables are.
        """
        paths = [variable_path(variable) for variable in variables]
        rootless = [_without(path, self.root) for path in paths]
        fitting = self._fitting([self._pair(rootless), self._pair(paths)], variables)
        fitting = fitting or self._fitting(
            [*self._in_order(rootless), *self._in_order(paths)], variables
        )
        if len(fitting) != 1:
            given = ", ".join(
                f"{path} {tuple(variable.shape)}"
                for path, variable in zip(paths[:8], variables[:8], strict=True)
            )
            raise ParameterError(
                f"the saved plan is for {len(self.plan)} variables, and it cannot be told for certain which of "
                f"them are the {len(paths)} that the optimizer is built with ({given}): layers have other "
                "names, or others are trainable; load the model with compile=False, and compile it with a new "
                "AdaptiveGradClip(..., model=model)"
            )
        return [self.plan[name] for name in fitting[0]]

    def _fitting(
        self, ways: Sequence[list[str] | None], variables: Sequence[Variable]
    ) -> list[list[str]]:
        """Return the ways to name the variables in which all shapes agree, each once."""
        return [
            names
            for number, names in enumerate(ways)
            if names is not None
            and names not in ways[:number]
            and all(
                self.plan[name].shape == tuple(variable.shape)
                for name, variable in zip(names, variables, strict=True)
            )
        ]

    def _in_order(self, paths: list[str]) -> list[list[str]]:
        """Pair by order where a path lacks models that the saved one has in front of the layer.

        Keras writes a ``Sequential`` inside a model there when it is made, not when it is loaded.
        """
        return [
            names
            for names in (self.trainable, self.built)
            if len(names) == len(paths)
            and all(map(_is_shortened, paths, (self.paths[name] for name in names)))
            and any(
                path.count("/") < self.paths[name].count("/")
                for path, name in zip(paths, names, strict=True)
            )
        ]

    def _pair(self, paths: list[str]) -> list[str] | None:
        """Return the names in the plan of variables with these paths, or None."""
        names: list[str | None] = [None] * len(paths)
        for stem in {_unnumbered(path) for path in paths}:
            places = [place for place, path in enumerate(paths) if _unnumbered(path) == stem]
            alike = [name for name, path in self.paths.items() if _unnumbered(path) == stem]
            paired = self._among(alike, [paths[place] for place in places])
            if paired is None:
                return None
            for place, name in zip(places, paired, strict=True):
                names[place] = name
        return [name for name in names if name is not None]

    def _among(self, alike: list[str], paths: list[str]) -> list[str] | None:
        """Pair paths with names whose paths differ from each other in numbers only."""
        sets = [
            alike,
            [name for name in self.trainable if name in alike],
            [name for name in self.built if name in alike],
        ]
        for names in sets:
            if sorted(self.paths[name] for name in names) == sorted(paths):
                left = list(names)
                return [_take(left, self.paths, path) for path in paths]
        # Numbers change with the layers made before, their order does not.
        if len(alike) == len(paths):
            return alike
        decisions = {(e.units, e.clipping, e.excluded) for e in (self.plan[name] for name in alike)}
        if len(decisions) == 1:
            return next((names for names in sets if len(names) == len(paths)), None)
        return None


def _take(names: list[str], paths: Mapping[str, str], path: str) -> str:
    """Remove the first name with this path from a list and return it."""
    return names.pop([paths[name] for name in names].index(path))


def _without(path: str, root: str) -> str:
    """Return a path without the model's own name in front, whatever number that has got."""
    first, _, rest = path.partition("/")
    return rest if rest and root and _unnumbered(first) == _unnumbered(root) else path


def _unnumbered(path: str) -> str:
    """Return a path without the numbers that Keras puts behind names."""
    return re.sub(r"_\d+(?=/|$)", "", path)


def _is_shortened(path: str, saved: str) -> bool:
    """Tell whether a path is a saved one without some of the names in front of the layer's."""
    parts, whole = (_unnumbered(each).split("/") for each in (path, saved))
    left = iter(whole)
    return parts[-2:] == whole[-2:] and all(part in left for part in parts)


def _common_root(paths: Iterable[str]) -> str:
    """Return the first name that all paths share, as a Sequential model's; "" if none."""
    parts = [path.split("/") for path in paths]
    shared = len({part[0] for part in parts}) == 1 and all(len(part) > 2 for part in parts)
    return parts[0][0] if shared else ""


def _tensor(variable: Variable) -> tf.Tensor:
    return tf.convert_to_tensor(
        variable.value if isinstance(variable, keras.Variable) else variable
    )


def _undo(before: Sequence[tuple[Variable, tf.Tensor]], weights: int) -> bool:
    """Tell whether one of the first variables has changed; if so, set all of them back."""
    bits = [(_tensor(v).numpy().tobytes(), old.numpy().tobytes()) for v, old in before[:weights]]
    changed = any(now != old for now, old in bits)
    if changed:
        for variable, old in before:
            variable.assign(old)
    return changed


def _check_inner(optimizer: Any) -> Any:
    """Return the optimizer to wrap if AGC can act inside it."""
    refuse_keras_2(optimizer)
    inner = keras.optimizers.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise ConfigError(
            f"optimizer must be a keras.optimizers.Optimizer or its name, got {short_repr(optimizer)}"
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            "a LossScaleOptimizer unscales gradients before its inner optimizer sees them; wrap the other "
            "way round: LossScaleOptimizer(AdaptiveGradClip(inner, rule))"
        )
    if hasattr(inner, "optimizers"):
        raise ConfigError(
            f"a {type(inner).__name__} hands gradients on to the optimizers inside it, so AGC cannot act in "
            "it; wrap each optimizer inside: MultiOptimizer(OptimizerMap(AdaptiveGradClip(inner, rule, "
            "model=model), {...}))"
        )
    if isinstance(inner, AdaptiveGradClip) or isinstance(
        getattr(inner._clip_gradients, "__self__", None), ClippingHook
    ):
        raise ConfigError(
            f"{inner.name!r} is clipped by AGC already; give each AdaptiveGradClip an optimizer of its own, or "
            "take this one out first by detach()"
        )
    return inner
