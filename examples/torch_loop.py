"""A loop of your own in PyTorch: loss scaling, accumulation, AGC, a global norm, a schedule."""

import torch

import agc_torch
from agc import AGC, Schedule

torch.manual_seed(0)
model = torch.nn.Sequential()
model.add_module("body", torch.nn.Linear(8, 64))
model.add_module("relu", torch.nn.ReLU())
model.add_module("head", torch.nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scaler = torch.amp.GradScaler("cpu")

rule = AGC(clipping=Schedule([(0, 0.04), (20, 0.02)]), exclude=["head.*"])
handle = agc_torch.attach(optimizer, model, rule, max_norm=1.0)  # AGC, then the global norm
print(handle.plan)

x = torch.randn(256, 8)
y = x[:, :3].argmax(1)
MICROBATCHES = 4

for step in range(40):
    optimizer.zero_grad()
    for images, labels in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels) / MICROBATCHES
        scaler.scale(loss).backward()  # gradients are added up; AGC sees their mean
    scaler.step(optimizer)  # unscales; AGC acts in optimizer.step()
    scaler.update()
    if step % 10 == 0:
        clipped = handle.stats().to_dict(parameters=False)["agc/clipped_fraction"]
        print(f"step {step}: loss {loss.item() * MICROBATCHES:.4f}, clipped {clipped:.1%}")

checkpoint = {
    "model": model.state_dict(),
    "optimizer": optimizer.state_dict(),
    "agc": handle.state_dict(),  # where the schedule is
}
torch.save(checkpoint, "checkpoint.pt")
handle.load_state_dict(torch.load("checkpoint.pt")["agc"])
assert handle.steps == 40
