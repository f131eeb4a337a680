"""AGC and SAM in Lightning; what was clipped goes to the loggers, steps into the checkpoint."""

import lightning as L
import torch

from agc import AGC, SAM
from agc_torch.integrations.lightning import AGCCallback, SAMCallback


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 64)
        self.head = torch.nn.Linear(64, 3)

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.body(x).relu()), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


L.seed_everything(0)
x = torch.randn(256, 8)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
module = Classifier()
before = torch.nn.functional.cross_entropy(module.head(module.body(x).relu()), data.tensors[1])
trainer = L.Trainer(
    max_epochs=4,
    accelerator="cpu",
    callbacks=[SAMCallback(SAM(rho=0.05)), AGCCallback(AGC(exclude=["head.*"]))],
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=64))
after = torch.nn.functional.cross_entropy(module.head(module.body(x).relu()), data.tensors[1])
print(f"loss {before:.4f} -> {after:.4f}")
assert after < before
