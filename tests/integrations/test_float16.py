"""Loss scaling in other people's trainers: AGC sees unscaled gradients, and a skipped step is none.

A CPU has GradScaler as a GPU has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import lightning as L  # noqa: N812
import pytest
import torch
import transformers
from lightning.fabric.plugins import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import agc_torch
from agc import AGC, SAM
from agc_torch.integrations import lightning
from agc_torch.integrations import transformers as hugging_face
from tests.integrations.network import DATA, RULE, Network, X, Y, by_hand, check_same, sgd

SHARPNESS = SAM(rho=0.1)
LIMIT = 0.3
STEPS = 7
SCALE = 4096.0


class Overflowing(Network):
    """A network whose third loss is infinite."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        loss = super().forward(x, labels)["loss"]
        return {"loss": loss * torch.inf if self.calls == 3 else loss}


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def one_step(sam: Any, optimizer: Any, closure: Callable[[], Tensor]) -> None:
    if sam:
        sam.step(optimizer, closure)
    else:
        closure()
        optimizer.step()


class Module(L.LightningModule):
    def __init__(self, network: Network, fused: bool, sharpness: SAM | None, manual: bool) -> None:
        super().__init__()
        self.network, self.fused = network, fused
        self.automatic_optimization = not manual
        self.sam = sharpness and agc_torch.SharpnessAware(network, sharpness)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.network(*batch)["loss"]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.network(*batch)["loss"]
            self.manual_backward(loss)
            return loss

        one_step(self.sam, optimizer, closure)
        return None

    def configure_optimizers(self) -> Any:
        return sgd(self, fused=self.fused)


def in_lightning(
    network: Network, folder: Path, fused: bool, sharpness: SAM | None, manual: bool = False
) -> torch.amp.GradScaler:
    rule = AGC.from_dict(RULE.to_dict() | {"exclude": ["network.head.bias"]})
    callbacks: list[Any] = [lightning.AGCCallback(rule, max_norm=LIMIT)]
    if sharpness and not manual:
        callbacks.append(lightning.SAMCallback(sharpness))
    scaler = new_scaler()
    trainer = L.Trainer(
        max_epochs=STEPS,
        callbacks=callbacks,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4)
    trainer.fit(Module(network, fused, sharpness, manual), batches)
    return scaler


def in_lightning_by_hand(*args: Any) -> torch.amp.GradScaler:
    return in_lightning(*args, manual=True)


def loop(
    model: Any, optimizer: Any, sharpness: SAM | None, backward: Callable[[Tensor], Any]
) -> None:
    handle = agc_torch.attach(optimizer, model, RULE, max_norm=LIMIT)
    sam = sharpness and agc_torch.SharpnessAware(model, sharpness)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(X, Y)["loss"]
        backward(loss)
        return loss

    for _ in range(STEPS):
        one_step(sam, optimizer, closure)
    assert handle.steps == STEPS - 1


def in_fabric(
    network: Network, folder: Path, fused: bool, sharpness: SAM | None
) -> torch.amp.GradScaler:
    scaler = new_scaler()
    precision = FabricPrecision("16-mixed", "cpu", scaler)
    fabric = L.Fabric(accelerator="cpu", plugins=[precision])
    model, optimizer = fabric.setup(network, sgd(network, fused=fused))
    loop(model, optimizer, sharpness, fabric.backward)
    return scaler


def in_accelerate(
    network: Network, folder: Path, fused: bool, sharpness: SAM | None
) -> torch.amp.GradScaler:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler = new_scaler()  # mixed_precision="fp16" asks for a GPU
    model, optimizer = accelerator.prepare(network, sgd(network, fused=fused))
    loop(model, optimizer, sharpness, accelerator.backward)
    return scaler


def in_transformers(
    network: Network, folder: Path, fused: bool, sharpness: SAM | None
) -> torch.amp.GradScaler:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        max_grad_norm=LIMIT,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    kind: Any = hugging_face.SharpnessAwareTrainer if sharpness else transformers.Trainer
    trainer = kind(
        network,
        arguments,
        train_dataset=DATA,
        optimizers=(sgd(network, fused=fused), None),
        callbacks=[hugging_face.AGCCallback(RULE)],
        **({"sharpness": sharpness} if sharpness else {}),
    )
    trainer.accelerator.scaler = scaler = new_scaler()  # fp16=True asks for a GPU
    trainer.train()
    return scaler


TRAINERS = (in_lightning, in_lightning_by_hand, in_fabric, in_accelerate, in_transformers)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("sharpness", [None, SHARPNESS], ids=["agc", "agc and sam"])
@pytest.mark.parametrize("train", TRAINERS, ids=lambda train: train.__name__)
def test_a_skipped_step_is_none(train, sharpness, fused, tmp_path):
    """The scale is halved at the overflow; all other steps are those of float32."""
    network = Overflowing()
    scaler = train(network, tmp_path, fused, sharpness)
    assert scaler.get_scale() == SCALE / 2
    assert network.calls == STEPS * (2 if sharpness else 1)
    autocast = train in (in_lightning, in_lightning_by_hand, in_fabric)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
    want = by_hand(range(STEPS - 1), max_norm=LIMIT, sharpness=sharpness)
    check_same(network, want, **tolerance)
