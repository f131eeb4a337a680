"""AGC and SAM in the ``Trainer`` of Hugging Face's transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from agc import AGC, SAM
from agc.errors import ConfigError
from agc_torch.integrations.limits import global_norm
from agc_torch.optimizer import Handle, attach
from agc_torch.sam import SharpnessAware

__all__ = ["AGCCallback", "SharpnessAwareTrainer"]

_log = logging.getLogger(__name__)


class AGCCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """AGC inside every optimizer step of a ``Trainer``.

    The step count is in ``trainer_state.json``, so schedules go on after
    ``train(resume_from_checkpoint=...)``. ``max_grad_norm``, which is 1 unless it is set, would
    limit the global norm before AGC: it is limited after AGC instead (AGC-7).

    Parameters
    ----------
    rule : AGC
        The configuration, or what its ``to_dict`` returns.
    max_norm : float, optional
        As in :func:`agc_torch.attach`, in place of the Trainer's ``max_grad_norm``.

    Attributes
    ----------
    handle : Handle, optional
        What is attached while the Trainer trains: the plan and the telemetry.

    Examples
    --------
    >>> trainer = Trainer(model, args, callbacks=[AGCCallback(AGC())])  # doctest: +SKIP
    """

    def __init__(self, rule: AGC | Mapping[str, Any], *, max_norm: float | None = None) -> None:
        self.rule = AGC.from_dict(rule) if isinstance(rule, Mapping) else rule
        self.max_norm = max_norm
        self.handle: Handle | None = None
        self._trainers_limit: float | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach AGC, and take over the limit of the global norm.

        Raises
        ------
        ConfigError
            If both ``max_norm`` and the Trainer's ``max_grad_norm``, other than its default, are
            given.
        ParameterError
            As :func:`agc_torch.attach`.
        """
        self._detach(args)  # of a run that failed
        limit = args.max_grad_norm
        default = type(args).__dataclass_fields__["max_grad_norm"].default
        if self.max_norm is not None and limit == default:
            limit = None
        max_norm = global_norm(self.max_norm, "max_grad_norm", limit)
        self.handle = attach(optimizer, model, self.rule, max_norm=max_norm)
        self._trainers_limit, args.max_grad_norm = args.max_grad_norm, 0.0
        if max_norm is not None:
            _log.info("the global norm is limited to %s after AGC, not before it", max_norm)
        # A checkpoint from before the callback has no count of its own.
        saved = state.stateful_callbacks.get(type(self).__name__)
        steps = saved["attributes"]["saved_steps"] if saved else state.global_step
        self.handle.load_state_dict({"steps": steps})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Detach AGC, and give the Trainer its limit back."""
        self._detach(args)

    def _detach(self, args: Any) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle, args.max_grad_norm = None, self._trainers_limit

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` keeps: the step count, and the arguments."""
        try:
            arguments = {"rule": self.rule.to_dict(), "max_norm": self.max_norm}
        except ConfigError:  # a schedule that is a function; only the callback's user has it
            arguments = {}
        steps = 0 if self.handle is None else self.handle.steps
        return {"args": arguments, "attributes": {"saved_steps": steps}}


class SharpnessAwareTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose gradients are sharpness-aware.

    Schedules of rho and ``every`` go by the Trainer's own ``global_step``, so nothing else is
    saved.

    Parameters
    ----------
    *args, **options
        As for ``Trainer``.
    sharpness : SAM
        The configuration.

    Attributes
    ----------
    sam : SharpnessAware
        Its ``stats()`` are those of the last step.

    Raises
    ------
    ConfigError
        If the Trainer accumulates gradients: both passes have to see the whole batch. Or if the
        rule has ``fraction`` or ``microbatches``.
    SelectorError, ParameterError
        As :class:`agc_torch.SharpnessAware`.
    """

    def __init__(self, *args: Any, sharpness: SAM, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sam = SharpnessAware(self.model, sharpness)
        parts = self.args.gradient_accumulation_steps
        if parts != 1:
            raise ConfigError(
                f"gradient_accumulation_steps={parts}, but both passes of SAM have to see the whole batch; use "
                "a larger per_device_train_batch_size, or a loop of your own with SharpnessAware.step"
            )

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Run the Trainer's own step twice: at the weights, and at the perturbed weights."""
        one_pass = super().training_step
        self.sam.load_state_dict({"version": 1, "count": self.state.global_step})
        return self.sam.gradients(self.optimizer, lambda: one_pass(*args, **options))
