"""PyTorch's own loader over the project's batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from agc.data import Batches, digest, open_source
from agc.recipe import load_recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    """In order, bit for bit, from any step on, in worker processes too."""
    recipe = load_recipe("conformance", ["train.steps=8"])
    batches = Batches(recipe, open_source(recipe, "train"))
    steps = range(3, 8)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    for step, batch in zip(steps, loader, strict=True):
        assert isinstance(batch.images, torch.Tensor)
        arrays = [None if tensor is None else tensor.numpy() for tensor in batch]
        assert digest(type(batches[step])(*arrays)) == digest(batches[step])
        np.testing.assert_array_equal(batch.numbers[0], 32 * step)
