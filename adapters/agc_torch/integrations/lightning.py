"""AGC and SAM in Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from agc import AGC, SAM
from agc.errors import ConfigError
from agc_torch.integrations.limits import global_norm
from agc_torch.optimizer import Handle, attach
from agc_torch.sam import SharpnessAware

__all__ = ["AGCCallback", "SAMCallback"]


class AGCCallback(Callback):  # type: ignore[misc]
    """AGC inside every step of every optimizer, in automatic and manual optimization.

    The step counts are in the checkpoint, so schedules go on after ``fit(ckpt_path=...)``.
    ``gradient_clip_val`` would limit the global norm before AGC: it is limited after AGC instead
    (AGC-7).

    Parameters
    ----------
    rule : AGC
        The configuration.
    max_norm : float, optional
        As in :func:`agc_torch.attach`, for each optimizer.
    log : bool
        Send ``stats().to_dict()`` to the Trainer's loggers, every ``log_every_n_steps`` steps.

    Attributes
    ----------
    handles : list of Handle
        What is attached during ``fit``, one for each optimizer: plans and telemetry.

    Examples
    --------
    >>> trainer = Trainer(callbacks=[AGCCallback(AGC())])  # doctest: +SKIP
    """

    def __init__(self, rule: AGC, *, max_norm: float | None = None, log: bool = True) -> None:
        self.rule, self.max_norm, self.log = rule, max_norm, log
        self.handles: list[Handle] = []
        self._states: list[dict[str, Any]] = []
        self._trainers_limit: float | None = None
        self._logged = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach AGC, and take over the limit of the global norm.

        Raises
        ------
        ConfigError
            If gradients are to be clipped by value, or both ``max_norm`` and ``gradient_clip_val``
            are given.
        ParameterError
            As :func:`agc_torch.attach`.
        """
        limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if limit and algorithm == "value":
            raise ConfigError(
                f"gradient_clip_algorithm='value' would clip elements to {limit} before AGC, which turns "
                "gradients; leave gradient_clip_val out"
            )
        max_norm = global_norm(self.max_norm, "gradient_clip_val", limit)
        for optimizer in trainer.optimizers:
            self.handles.append(attach(optimizer, pl_module, self.rule, max_norm=max_norm))
        self._trainers_limit, trainer.gradient_clip_val = limit, None
        self._restore()

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log what the last step clipped."""
        step = trainer.global_step
        # A step has several batches if gradients are accumulated.
        if not self.log or step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        for number, handle in enumerate(self.handles if trainer.loggers else ()):
            prefix = "agc/" if len(self.handles) == 1 else f"agc/{number}/"
            metrics = handle.stats().to_dict(prefix)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Detach AGC, and give the Trainer its limit back."""
        self._states = [handle.state_dict() for handle in self.handles]
        for handle in self.handles:
            handle.remove()
        if self.handles:
            self.handles, trainer.gradient_clip_val = [], self._trainers_limit

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Detach AGC."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step count of each optimizer."""
        if self.handles:
            self._states = [handle.state_dict() for handle in self.handles]
        return {"optimizers": self._states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the step counts of a checkpoint."""
        self._states = list(state_dict["optimizers"])
        self._restore()  # some strategies load after the start of fit

    def _restore(self) -> None:
        for handle, state in zip(self.handles, self._states, strict=False):
            handle.load_state_dict(state)


class SAMCallback(Callback):  # type: ignore[misc]
    """Sharpness-aware gradients in automatic optimization.

    ``training_step`` runs twice in each step. What it logs is of both passes; ``sam.stats()`` has
    the clean loss and the perturbed one. In manual optimization call
    :meth:`agc_torch.SharpnessAware.step` with ``self.optimizers()`` instead.

    Parameters
    ----------
    rule : SAM
        The configuration.

    Attributes
    ----------
    sam : SharpnessAware, optional
        There from the start of ``fit``.
    """

    def __init__(self, rule: SAM) -> None:
        self.rule = rule
        self.sam: SharpnessAware | None = None
        self._state: Mapping[str, Any] = {"version": 1, "count": 0}
        self._optimizer_step: Callable[..., None] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the two passes in front of the module's ``optimizer_step``.

        Raises
        ------
        ConfigError
            In manual optimization, if gradients are accumulated, or if the rule has ``fraction`` or
            ``microbatches``.
        SelectorError, ParameterError
            As :class:`agc_torch.SharpnessAware`.
        """
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "SAMCallback is for automatic optimization; in manual optimization call "
                "SharpnessAware(self, rule).step(self.optimizers(), closure) in training_step"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}, but both passes of SAM have to see "
                "the whole batch; use a larger batch, or manual optimization with a closure that goes over "
                "the micro-batches"
            )
        self.sam = SharpnessAware(pl_module, self.rule)
        self.sam.load_state_dict(self._state)
        self._optimizer_step = pl_module.optimizer_step
        pl_module.optimizer_step = self._step

    def _step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any]) -> None:
        def both_passes() -> Tensor:
            assert self.sam is not None
            return self.sam.gradients(optimizer, closure)

        assert self._optimizer_step is not None
        self._optimizer_step(epoch, batch_idx, optimizer, both_passes)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Take the two passes out again."""
        if vars(pl_module).get("optimizer_step") == self._step:
            del pl_module.optimizer_step

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Take the two passes out again."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step count."""
        return dict(self._state if self.sam is None else self.sam.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the step count of a checkpoint."""
        self._state = dict(state_dict)
        if self.sam is not None:
            self.sam.load_state_dict(self._state)
