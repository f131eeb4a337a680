"""DeepMind's optimizer, from PyTorch's own parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import agc_torch
from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, SelectorError
from agc_conformance.nfnets.golden import LIMITS, OPTIMIZER, SMOOTHING


def norm(tensors):
    return math.sqrt(sum(float(tensor.detach().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_golden_steps(options):
    model = agc_torch.nfnet("tiny", dtype=torch.float64).eval()
    agc_torch.from_neutral(model, core.seeded_parameters("tiny"))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    images, labels = core.seeded_batch(2, 32)
    optimizer = agc_torch.sgd_nfnet(model, lr=0.1, **options)
    clipped = []
    for golden in OPTIMIZER:
        optimizer.zero_grad()
        logits = model(torch.tensor(images).permute(0, 3, 1, 2))
        loss = F.cross_entropy(logits, torch.tensor(labels), label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        clipped.append(agc_torch.attached(optimizer).stats().total())
        assert abs(loss.item() - golden.loss) <= LIMITS["float64"].loss
        assert norm(model.parameters()) == pytest.approx(golden.parameter_norm, abs=1e-11)
        assert model.stages[0][0].skip_gain.item() == pytest.approx(golden.skip_gain, abs=1e-12)
        assert norm([model.head.bias]) == pytest.approx(golden.head_bias_norm, rel=1e-12)
        moved = [p.detach() - q for p, q in zip(model.parameters(), start, strict=True)]
        assert norm(moved) == pytest.approx(golden.distance, rel=1e-12)
    assert (clipped[0].clipped, clipped[0].units) == (254, 4855)


def test_groups():
    model = agc_torch.nfnet("tiny")
    model.stem.requires_grad_(False)
    optimizer = agc_torch.sgd_nfnet(model, lr=0.1, weight_decay=3e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    specs = [s for s in core.parameters("tiny") if not s.name.startswith("stem.")]
    assert decayed == {spec.name for spec in specs if spec.decays}
    assert others == {spec.name for spec in specs if not spec.decays}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3e-5, 0]
    assert all(group["nesterov"] for group in optimizer.param_groups)
    assert type(optimizer) is torch.optim.SGD


def test_other_rules_and_models():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(SelectorError, match="does not declare one"):
        agc_torch.sgd_nfnet(model, lr=0.1)
    optimizer = agc_torch.sgd_nfnet(model, 0.1, momentum=0.0, rule=AGC(clipping=0.1))
    handle = agc_torch.attached(optimizer)
    assert handle.plan["0.weight"].threshold() == 0.1
    assert not any(group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}])
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} must be a number"):
        agc_torch.sgd_nfnet(agc_torch.nfnet("tiny"), 0.1, **options)
