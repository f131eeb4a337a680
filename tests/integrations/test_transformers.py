"""AGC and SAM in the Trainer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from agc import SAM
from agc.errors import ConfigError
from agc_torch.integrations.transformers import AGCCallback, SharpnessAwareTrainer
from tests.integrations.network import DATA, RULE, SHARPNESS, Network, by_hand, check_same, sgd


def train(
    folder: Path,
    steps: int,
    kind: Any = Trainer,
    callback: AGCCallback | None = None,
    resume: Path | None = None,
    sharpness: SAM | None = None,
    **options: Any,
) -> Network:
    settings = {"per_device_train_batch_size": 4, "save_steps": 4, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(settings | options),
    )
    model = Network()
    trainer = kind(
        model,
        arguments,
        train_dataset=DATA,
        optimizers=(sgd(model), None),
        callbacks=[callback] if callback else [],
        **({"sharpness": sharpness} if sharpness else {}),
    )
    limit = arguments.max_grad_norm
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    assert arguments.max_grad_norm == limit
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"restore_callback_states_from_checkpoint": True},
    ],
    ids=str,
)
def test_resumed_as_if_never_stopped(options, tmp_path):
    """The schedule goes on, and the Trainer's limit of the norm, 1, comes after AGC."""
    train(tmp_path, 4, callback=AGCCallback(RULE), **options)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["AGCCallback"]["attributes"] == {"saved_steps": 4}
    callback, resume = AGCCallback(RULE), tmp_path / "checkpoint-4"
    model = train(tmp_path, 6, callback=callback, resume=resume, **options)
    bf16 = "bf16" in options
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
    check_same(model, by_hand(max_norm=1.0, bf16=bf16), **tolerance)


def test_limits(tmp_path):
    check_same(
        train(tmp_path, 3, callback=AGCCallback(RULE, max_norm=0.1)),
        by_hand(range(3), max_norm=0.1),
    )
    with pytest.raises(ConfigError, match=r"max_norm=0.1 and the trainer's max_grad_norm=0.5"):
        train(tmp_path, 1, callback=AGCCallback(RULE, max_norm=0.1), max_grad_norm=0.5)


def test_sharpness_aware(tmp_path):
    options: dict[str, Any] = {
        "kind": SharpnessAwareTrainer,
        "sharpness": SHARPNESS,
        "max_grad_norm": 0,
    }
    train(tmp_path, 4, callback=AGCCallback(RULE), **options)
    resume = tmp_path / "checkpoint-4"
    model = train(tmp_path, 6, callback=AGCCallback(RULE), resume=resume, **options)
    check_same(model, by_hand(sharpness=SHARPNESS))
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=2, but both passes"):
        train(tmp_path, 1, gradient_accumulation_steps=2, **options)
