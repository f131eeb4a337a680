"""Accelerate, and the Trainer of transformers, in one of two processes with half of each batch.

Started by torchrun; each process ends as one process with the whole batch does.
"""

import sys
from dataclasses import replace
from pathlib import Path

import accelerate
from torch import nn

import agc_torch
from agc_torch.integrations.transformers import AGCCallback, SharpnessAwareTrainer
from tests.integrations.network import RULE, SHARPNESS, Network, X, Y, by_hand, check_same, sgd
from tests.integrations.test_transformers import train


def accelerated() -> nn.Module:
    accelerator = accelerate.Accelerator(cpu=True)
    network = Network()
    model, optimizer = accelerator.prepare(network, sgd(network))
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    handle = agc_torch.attach(optimizer, model, RULE)
    rank = accelerator.process_index
    for _ in range(6):
        accelerator.backward(model(X.chunk(2)[rank], Y.chunk(2)[rank])["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert handle.steps == 6
    return network


def main(folder: Path) -> None:
    check_same(accelerated(), by_hand())
    half = {"per_device_train_batch_size": 2}
    model = train(folder / "plain", 6, callback=AGCCallback(RULE), **half)
    check_same(model, by_hand(max_norm=1.0))
    sharpness = replace(SHARPNESS, scope="global")
    callback = AGCCallback(RULE)
    model = train(
        folder / "sam", 6, SharpnessAwareTrainer, callback=callback, sharpness=sharpness, **half
    )
    check_same(model, by_hand(max_norm=1.0, sharpness=sharpness))
    print("the same as in one process")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
