"""The training recipe of NFNets, from Keras' own parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from agc import AGC
from agc.nfnet import MOMENTUM, WEIGHT_DECAY, check_recipe, decays
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.units import Model, Variable

__all__ = ["CoupledSGD", "sgd_nfnet"]


def sgd_nfnet(
    model: Model,
    lr: Any,
    *,
    momentum: float = MOMENTUM,
    weight_decay: float = WEIGHT_DECAY,
    rule: AGC | None = None,
    **options: Any,
) -> AdaptiveGradClip:
    """Return DeepMind's optimizer for NFNets: :class:`CoupledSGD` with AGC in front of it (AGC-7).

    In each step, gradients are clipped, then weight decay is added to those of matrices and kernels
    (not of gains and biases), then comes Nesterov's momentum, whose buffer does not contain the
    learning rate.

    Parameters
    ----------
    model : keras.Model
        An NFNet, or any built model that declares its classifier by ``agc_head``.
    lr : float or keras.optimizers.schedules.LearningRateSchedule
        Learning rate, Keras' ``learning_rate``; the recipe has 0.1 for each 256 images of a batch.
    momentum : float
        0 switches momentum off.
    weight_decay : float
        Coupled, as in the paper. Parameters of rank 0 and 1 are not decayed.
    rule : AGC, optional
        ``AGC.profile("deepmind")`` if None: clipping 0.01, and all but the classifier's weight is
        clipped.
    **options
        Of any Keras optimizer, such as ``use_ema=True``.

    Returns
    -------
    AdaptiveGradClip
        For ``compile``; it has the plan and the telemetry.

    Raises
    ------
    SelectorError
        If the model does not declare its classifier.
    ConfigError
        If ``momentum`` or ``weight_decay`` is not allowed.
    ParameterError
        If the model is not built.

    Examples
    --------
    >>> from agc_tensorflow import nfnet
    >>> sgd_nfnet(nfnet("tiny"), lr=0.1).plan.count
    4855
    """
    inner = CoupledSGD(lr, momentum=momentum, weight_decay=weight_decay, **options)
    return AdaptiveGradClip(inner, AGC.profile("deepmind") if rule is None else rule, model=model)


@keras.saving.register_keras_serializable(package="agc")
class CoupledSGD(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Gradient descent with coupled weight decay, and momentum without the learning rate.

    ``keras.optimizers.SGD`` is another optimizer: its velocity contains the learning rate of every
    step it remembers, which is different as soon as that changes, and its weight decay is
    decoupled.

    Parameters
    ----------
    learning_rate : float or keras.optimizers.schedules.LearningRateSchedule
        Learning rate.
    momentum : float
        In [0, 1); 0 switches momentum off.
    nesterov : bool
        Whether the step looks ahead.
    weight_decay : float
        At least 0; multiplies matrices and kernels (rank 2 and above) and is added to their
        gradients.
    **options
        Of any Keras optimizer.

    Raises
    ------
    ConfigError
        If ``momentum`` or ``weight_decay`` is not allowed.

    Notes
    -----
    .. math:: B \leftarrow \mu B + G + \omega W, \qquad W \leftarrow W - \eta (G + \omega W + \mu B)

    References
    ----------
    Sutskever et al., ICML 2013; as in DeepMind's code for arXiv:2102.06171.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        name: str = "CoupledSGD",
        **options: Any,
    ) -> None:
        check_recipe(momentum, weight_decay)
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **options)
        self.momentum = momentum
        self.nesterov = nesterov

    def build(self, variables: Sequence[Variable]) -> None:
        """Create a buffer for every variable, if there is momentum."""
        if self.built:
            return
        super().build(variables)
        wanted = variables if self.momentum else ()
        self.buffers = [self.add_variable_from_reference(v, name="momentum") for v in wanted]

    def update_step(self, gradient: Any, variable: Variable, learning_rate: Any) -> None:
        """Update one variable."""
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        if self.weight_decay and decays(len(variable.shape)) and self._use_weight_decay(variable):
            gradient += self.weight_decay * tf.convert_to_tensor(variable)
        step = gradient
        if self.momentum:
            buffer = self.buffers[self._get_variable_index(variable)]
            moved = self.momentum * tf.convert_to_tensor(buffer) + gradient
            self.assign(buffer, moved)
            step = gradient + self.momentum * moved if self.nesterov else moved
        self.assign_sub(variable, tf.cast(learning_rate, variable.dtype) * step)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration."""
        own = {"momentum": self.momentum, "nesterov": self.nesterov}
        return {**super().get_config(), **own}

    def _apply_weight_decay(self, variables: Sequence[Variable]) -> None:
        """Leave out Keras' decoupled weight decay."""
