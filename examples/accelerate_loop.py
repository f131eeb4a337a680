"""AGC in Accelerate: attach after prepare, in place of clip_grad_norm_."""

import accelerate
import torch

import agc_torch
from agc import AGC

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(256, 8)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
loader = torch.utils.data.DataLoader(data, batch_size=32)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

handle = agc_torch.attach(optimizer, model, AGC(clipping=0.005, exclude=["2.*"]), max_norm=1.0)
accelerator.register_for_checkpointing(handle)  # save_state and load_state keep the step

losses = []
for _ in range(8):
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()  # of the last micro-batch: AGC clips the mean
            optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {handle.steps} steps")
accelerator.save_state("state")
assert handle.steps == 32
assert losses[-1] < losses[0]
