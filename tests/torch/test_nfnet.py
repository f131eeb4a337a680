"""The models, and what a PyTorch user expects of a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import agc_torch
from agc import AGC
from agc import nfnet as core
from agc.nfnet import Masks, seeded_batch
from tests.contract.golden import SINGLE
from tests.contract.nfnet import MASKS, NARROW, SHALLOW, NFNetContract
from tests.helpers import close, relative
from tests.torch.driver import TorchDriver, tensor

driver = TorchDriver()


class TestNFNet(NFNetContract):
    driver = driver


# Weight standardisation


def conv_and_images() -> tuple[Tensor, Tensor]:
    return TestNFNet().conv()[0], torch.randn(2, 6, 9, 12, dtype=torch.float64)


def test_second_gradient_of_the_gain_alone():
    conv, images = conv_and_images()
    conv.weight.requires_grad_(False)
    loss = conv(images).square().sum()
    (first,) = torch.autograd.grad(loss, conv.gain, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), conv.gain)
    # The loss is a quadratic polynomial of each gain.
    assert (second > 0).all()


def test_gradients_do_not_depend_on_the_memory_format():
    conv, images = conv_and_images()
    twin, _ = conv_and_images()
    twin = twin.to(memory_format=torch.channels_last)
    for each in (conv, twin):
        each(images).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, twin.weight.grad)
    torch.testing.assert_close(conv.gain.grad, twin.gain.grad)
    torch.testing.assert_close(conv.standardised(), twin.standardised())
    assert conv.standardised().is_contiguous()
    assert twin.standardised().is_contiguous(memory_format=torch.channels_last)


# Options and parameters


def test_stochastic_depth_is_drawn_in_float32():
    block = agc_torch.nfnet("tiny", stochastic_depth=0.9).stages[3][2]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in which 1 - rate + uniform is off by up to 1/256
    try:
        torch.manual_seed(0)
        drawn = block.kept(20_000, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    want = torch.floor(1 - block.drop_rate + torch.rand(20_000, 1, 1, 1))
    assert torch.equal(drawn, want.bool())


def test_factory_arguments():
    model = agc_torch.nfnet("tiny", 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = model.to_empty(device="cpu").float()
    torch.manual_seed(3)
    model.reset_parameters()
    torch.manual_seed(3)
    expected = agc_torch.nfnet("tiny", 4).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# Uses


def test_a_folded_model_is_for_inference():
    folded = driver.seeded(SHALLOW).train().fold()
    assert not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())


def test_a_twin_stays_in_its_mode_and_takes_autocast():
    model = driver.blank(NARROW)
    for training in (True, False):
        twin = model.train(training).batch_normalised()
        assert {m.training for m in twin.modules()} == {training}
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16


def test_state_dict_round_trip(tmp_path):
    model = driver.seeded(dtype="float32")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = agc_torch.nfnet("tiny")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    values = other.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# What PyTorch itself warns of while it compiles.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "variant", "masks"),
    [("aot_eager", "tiny", None), ("inductor", SHALLOW, None), ("aot_eager", SHALLOW, MASKS)],
)
def test_compile(backend, variant, masks):
    def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
        images, labels = seeded_batch(2, 32)
        model.train(masks is not None)
        logits = model(tensor(images.astype("float32")), masks=masks and Masks(*map(tensor, masks)))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        named = model.named_parameters()
        return {"logits": logits.detach()} | {name: p.grad for name, p in named}

    torch.compiler.reset()
    eager = gradients(driver.seeded(variant, "float32"))
    model = torch.compile(driver.seeded(variant, "float32"), backend=backend, fullgraph=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in gradients(model).items()}
    close(found.pop("logits"), eager.pop("logits"), SINGLE.logits)
    assert found.keys() == {spec.name for spec in core.parameters(variant)}
    for name, gradient in eager.items():
        assert relative(found[name], gradient) <= SINGLE.skip_gain
    plan = agc_torch.plan(model, AGC.profile("deepmind"))
    assert plan == agc_torch.plan(driver.seeded(variant), AGC.profile("deepmind"))
    torch.compiler.reset()
