"""AGC for a model of timm, as ``--clip-mode agc --clip-grad 0.01`` but by layers and names."""

import timm
import torch

from agc_torch.integrations.timm import attach_agc

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, num_classes=3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
handle = attach_agc(optimizer, model, 0.01)
print(handle.plan)  # the classifier is excluded

images = torch.randn(32, 3, 16, 16)
labels = images.mean((2, 3)).argmax(1)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < losses[0]
