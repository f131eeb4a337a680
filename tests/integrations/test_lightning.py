"""AGC and SAM in Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import agc_torch
from agc.errors import ConfigError
from agc_torch.integrations.lightning import AGCCallback, SAMCallback
from tests.integrations.network import RULE, SHARPNESS, Network, X, Y, by_hand, check_same, sgd


class Automatic(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.network(*batch)["loss"]

    def configure_optimizers(self) -> Any:
        return sgd(self)


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sam = agc_torch.SharpnessAware(self.network, SHARPNESS)

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.network(*batch)["loss"]
            self.manual_backward(loss)
            return loss

        self.sam.step(optimizer, closure)


RULE_IN_MODULE = type(RULE).from_dict(RULE.to_dict() | {"exclude": ["network.head.bias"]})


def fit(
    folder: Path,
    steps: int,
    callbacks: list[Any],
    model: L.LightningModule | None = None,
    resume: Path | None = None,
    parts: int = 1,
    devices: int = 1,
    **options: Any,
) -> tuple[L.Trainer, Network]:
    model = model or Automatic()
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=devices,
        **({"logger": False, "accumulate_grad_batches": parts} | options),
    )
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), 4 // parts // devices
    )
    trainer.fit(model, batches, ckpt_path=resume)
    return trainer, model.network


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.3}],
    ids=str,
)
def test_resumed_as_if_never_stopped(options, tmp_path):
    trainer, _ = fit(tmp_path, 4, [AGCCallback(RULE_IN_MODULE)], **options)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    callback = AGCCallback(RULE_IN_MODULE)
    trainer, network = fit(tmp_path, 6, [callback], resume=tmp_path / "saved.ckpt", **options)
    assert callback.state_dict() == {"optimizers": [{"steps": 6}]}
    assert trainer.gradient_clip_val == options.get("gradient_clip_val")
    bf16 = "precision" in options
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
    limit = options.get("gradient_clip_val")
    check_same(network, by_hand(max_norm=limit, bf16=bf16), **tolerance)


def test_accumulated(tmp_path):
    """In one go: with accumulation Lightning does not resume where it stopped, AGC or not."""
    check_same(fit(tmp_path, 6, [AGCCallback(RULE_IN_MODULE)], parts=2)[1], by_hand())


def test_data_parallel(tmp_path):
    parallel = {"devices": 2, "strategy": "ddp_spawn"}
    check_same(fit(tmp_path, 6, [AGCCallback(RULE_IN_MODULE)], **parallel)[1], by_hand())


def test_limits(tmp_path):
    with pytest.raises(ConfigError, match=r"max_norm=1.0 and the trainer's gradient_clip_val=0.3"):
        fit(tmp_path, 1, [AGCCallback(RULE_IN_MODULE, max_norm=1.0)], gradient_clip_val=0.3)
    by_value = {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"}
    with pytest.raises(ConfigError, match=r"would clip elements to 0.3 before AGC"):
        fit(tmp_path, 1, [AGCCallback(RULE_IN_MODULE)], **by_value)


def test_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, 2, [AGCCallback(RULE_IN_MODULE)], logger=logger, log_every_n_steps=1)
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "agc/clipped_fraction" in header
    assert "agc/network.stem.weight/clipped_fraction" in header
    assert len(rows) == 2


def test_sharpness_aware(tmp_path):
    def callbacks() -> list[Any]:
        return [SAMCallback(SHARPNESS), AGCCallback(RULE_IN_MODULE)]

    trainer, _ = fit(tmp_path, 4, callbacks())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    _, network = fit(tmp_path, 6, callbacks(), resume=tmp_path / "saved.ckpt")
    check_same(network, by_hand(sharpness=SHARPNESS))
    _, network = fit(tmp_path, 6, [AGCCallback(RULE_IN_MODULE)], Manual())
    check_same(network, by_hand(sharpness=SHARPNESS))
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2, but both passes"):
        fit(tmp_path, 1, callbacks(), parts=2)
    with pytest.raises(ConfigError, match="SAMCallback is for automatic optimization"):
        fit(tmp_path, 1, callbacks(), Manual())
