"""DeepMind's optimizer, from PyTorch's own parts."""

from __future__ import annotations

import torch

import agc_torch
from agc import nfnet as core
from tests.contract.recipe import RecipeContract
from tests.torch.driver import TorchDriver


class TestRecipe(RecipeContract):
    driver = TorchDriver()


def test_groups():
    model = agc_torch.nfnet("tiny")
    model.stem.requires_grad_(False)
    optimizer = agc_torch.sgd_nfnet(model, lr=0.1, weight_decay=3e-5, max_norm=2.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    specs = [s for s in core.parameters("tiny") if not s.name.startswith("stem.")]
    assert decayed == {spec.name for spec in specs if spec.decays}
    assert others == {spec.name for spec in specs if not spec.decays}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3e-5, 0]
    assert all(group["nesterov"] for group in optimizer.param_groups)
    assert type(optimizer) is torch.optim.SGD
    assert agc_torch.attached(optimizer).max_norm == 2.0
