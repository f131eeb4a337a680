"""The training recipe of NFNets, from optax's own parts."""

from __future__ import annotations

import jax
import optax

from agc import AGC
from agc.nfnet import MOMENTUM, WEIGHT_DECAY, check_recipe, decays
from agc_jax.optimizer import adaptive_grad_clip
from agc_jax.units import PyTree, units

__all__ = ["sgd_nfnet"]


def sgd_nfnet(
    model: PyTree,
    lr: optax.ScalarOrSchedule,
    *,
    momentum: float = MOMENTUM,
    weight_decay: float = WEIGHT_DECAY,
    rule: AGC | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return DeepMind's optimizer for NFNets: AGC, weight decay, ``optax.sgd`` (AGC-7).

    In each step, gradients are clipped, then weight decay is added to those of matrices and kernels
    (not of gains and biases), then comes Nesterov's momentum, whose trace does not contain the
    learning rate.

    Parameters
    ----------
    model : nnx.Module
        An NFNet, or any model that declares its classifier by ``agc_head``. Shapes are enough
        (``nnx.eval_shape``). Where the rule names no head, a tree of parameters does as well.
    lr : float, scalar array or optax schedule
        Learning rate; the recipe has 0.1 for each 256 images of a batch.
    momentum : float
        0 switches momentum off.
    weight_decay : float
        Coupled, as in the paper. Parameters of rank 0 and 1 are not decayed.
    rule : AGC, optional
        ``AGC.profile("deepmind")`` if None: clipping 0.01, and all but the classifier's weight is
        clipped.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        For the model's parameters: ``nnx.Optimizer(model, tx, wrt=nnx.Param)``.
        :func:`agc_jax.stats` finds the telemetry in its state.

    Raises
    ------
    SelectorError
        By ``init``, if the model does not declare its classifier.
    ConfigError
        If ``momentum`` or ``weight_decay`` is not allowed.

    Examples
    --------
    >>> import agc_jax
    >>> from flax import nnx
    >>> model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, sgd_nfnet(model, lr=0.1), wrt=nnx.Param)
    >>> agc_jax.plan(model, AGC.profile("deepmind")).count
    4855
    """
    check_recipe(momentum, weight_decay)
    rule = AGC.profile("deepmind") if rule is None else rule
    return optax.chain(
        adaptive_grad_clip(rule, units=units(model)), *after_clipping(lr, momentum, weight_decay)
    )


def after_clipping(
    lr: optax.ScalarOrSchedule, momentum: float = MOMENTUM, weight_decay: float = WEIGHT_DECAY
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Return what follows in the chain: weight decay and momentum."""
    return (
        optax.add_decayed_weights(weight_decay, mask=_decays),
        optax.sgd(lr, momentum or None, nesterov=momentum > 0),
    )


def _decays(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: decays(leaf.ndim), params)
