"""AGC in the Trainer of transformers; its own clipping by global norm moves behind AGC."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from agc import AGC
from agc_torch.integrations.transformers import AGCCallback

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)
tokens = torch.arange(32) % 64
data = [{"input_ids": tokens + shift, "labels": tokens + shift} for shift in range(32)]

clip = AGCCallback(AGC(clipping=0.005))  # Adam wants a smaller threshold than SGD
trainer = Trainer(
    model,
    TrainingArguments(
        "out", max_steps=6, per_device_train_batch_size=8, report_to=[], use_cpu=True
    ),
    train_dataset=data,
    callbacks=[clip],
)
result = trainer.train()
print(f"loss {result.training_loss:.4f}")
assert torch.isfinite(torch.tensor(result.training_loss))
