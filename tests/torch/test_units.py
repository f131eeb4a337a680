"""Units by layer type, the registry, and the plan made from a model."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import agc_torch
from agc import AGC, SAM, Units
from agc.errors import (
    AmbiguousUnitsError,
    ParameterError,
    SelectorError,
    UnitsWarning,
)
from tests.contract.units import UnitsContract
from tests.helpers import script_of_models
from tests.torch.driver import TorchDriver

RULE = AGC()

TABLE = {  # the suite asks for the others
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), {"weight": 6, "bias": 1}),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), {"weight": 9}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {
            "in_proj_weight": 24,
            "in_proj_bias": 1,
            "bias_k": 1,
            "bias_v": 1,
            "out_proj.weight": 8,
            "out_proj.bias": 1,
        },
    ),
    "attention of three widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=5, bias=False),
        {"q_proj_weight": 8, "k_proj_weight": 8, "v_proj_weight": 8, "out_proj.weight": 8},
    ),
    "lstm with projection": (
        lambda: nn.LSTM(4, 6, proj_size=3),
        {
            "weight_ih_l0": 24,
            "weight_hh_l0": 24,
            "bias_ih_l0": 1,
            "bias_hh_l0": 1,
            "weight_hr_l0": 3,
        },
    ),
    "rnn cell": (
        lambda: nn.RNNCell(4, 6),
        {"weight_ih": 6, "weight_hh": 6, "bias_ih": 1, "bias_hh": 1},
    ),
    "layer norm": (lambda: nn.LayerNorm([3, 4]), {"weight": 1, "bias": 1}),
    "rms norm": (lambda: nn.RMSNorm([3, 4]), {"weight": 1}),
}


@pytest.mark.parametrize("name", TABLE)
def test_units_of_every_layer(name):
    build, expected = TABLE[name]
    made = agc_torch.plan(build(), RULE)
    assert {entry.name: entry.count for entry in made} == expected


def test_transposed_convolution_splits_its_groups():
    entry = agc_torch.plan(nn.ConvTranspose2d(4, 6, 3, groups=2), RULE)["weight"]
    assert entry.shape == (4, 3, 3, 3)
    assert entry.axes.view == (2, 2, 3, 3, 3)
    assert entry.axes.keep == (0, 2)


def test_lazy_layers_need_one_batch():
    model = nn.Sequential(nn.LazyConv2d(6, 3))
    with pytest.raises(ParameterError, match=r"'0\.weight' is not initialised.*run the model once"):
        agc_torch.plan(model, RULE)
    model(torch.zeros(1, 4, 5, 5))
    assert agc_torch.plan(model, RULE)["0.weight"].count == 6


def test_gain_of_a_scaled_convolution_is_one_unit():
    class ScaledConv2d(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 6, 3)
            self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))

    counts = {entry.name: entry.count for entry in agc_torch.plan(ScaledConv2d(), RULE)}
    assert counts == {"weight": 6, "bias": 1, "gain": 1}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 5))


class TestUnits(UnitsContract):
    driver = TorchDriver()
    unknown = "'table' of Own with"

    @pytest.fixture(autouse=True)
    def seed(self):
        torch.manual_seed(0)

    def test_registering_reaches_models_whose_plan_is_remembered(self, registry):
        model = Dense()
        model.kernel.grad = torch.ones(3, 5)
        with pytest.warns(UnitsWarning, match=r"'kernel' \(3, 5\) as 'o i -> o'"):
            assert agc_torch.adaptive_clip_grad_(model, RULE).units == 3  # taken as out-first
        agc_torch.register_units(Dense, {"kernel": "i o -> o"})
        assert agc_torch.adaptive_clip_grad_(model, RULE).units == 5

    def test_parameters_in_lists_and_dictionaries_belong_to_the_layer(self, registry):
        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = nn.ParameterList(nn.Parameter(torch.zeros(3, 5)) for _ in range(2))
                self.more = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3, 5))})

        agc_torch.register_units(Heads, {"weights.*": "i o -> o", "more.a": "o i -> o"})
        assert counts(nn.Sequential(Heads())) == {"0.weights.0": 5, "0.weights.1": 5, "0.more.a": 3}


@pytest.mark.parametrize(
    "given", [dict, lambda named: named.items(), lambda named: iter(named.items())]
)
def test_plain_tensors_follow_the_convention(given):
    named = {"a/w": torch.zeros(6, 4), "a/b": torch.zeros(6), "k": torch.zeros(6, 4, 3, 3)}
    with pytest.warns(UnitsWarning, match=r"'a\.w' .*'k' .*Give the module instead of its tensors"):
        made = agc_torch.plan(given(named), RULE)
    assert {e.name: e.count for e in made} == {"a.w": 6, "a.b": 1, "k": 6}
    assert [e.source for e in made] == ["layout", "vector", "layout"]
    with pytest.raises(AmbiguousUnitsError, match=r"'c' with shape .*Give the module instead"):
        agc_torch.plan({"c": torch.zeros(6, 4, 3)}, RULE)


def test_two_tensors_of_one_name():
    pairs = [("a.w", torch.zeros(2)), ("a/w", torch.zeros(3))]
    with pytest.raises(ParameterError, match=r"two parameters are called 'a\.w'"):
        agc_torch.plan(pairs, RULE)


def test_tied_weights_appear_once_under_their_first_name():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    assert [entry.name for entry in agc_torch.plan(model, RULE)] == ["0.weight"]
    message = "Tied parameters go by their first name: '1.weight' is '0.weight'$"
    with pytest.raises(SelectorError, match=message):
        agc_torch.plan(model, AGC(exclude=["1.*"]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SelectorError, match=message):
        agc_torch.SharpnessAware(model, SAM(exclude=["1.*"])).step(optimizer, lambda: None)


def counts(model: nn.Module) -> dict[str, int]:
    return {entry.name: entry.count for entry in agc_torch.plan(model, RULE)}


def test_weight_norm():
    layer = parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    assert layer.parametrizations.weight.original0.shape == (6, 1, 1)
    assert counts(layer) == {
        "bias": 1,
        "parametrizations.weight.original0": 1,  # a gain: one vector
        "parametrizations.weight.original1": 6,
    }


def test_spectral_norm_is_looked_at_without_a_power_iteration():
    model = nn.Sequential(parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3, groups=2)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert counts(model) == {"0.bias": 1, "0.parametrizations.weight.original": 6}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Outer(nn.Module):
    def forward(self, left, right):
        return torch.cat((left, right), 1)

    def right_inverse(self, weight):
        return weight[:, :1], weight[:, 1:]


def test_parametrised_tensors_of_another_shape_are_not_guessed():
    layer = nn.Conv1d(4, 6, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", Outer())
    assert layer.weight.shape == (6, 4, 3)
    with pytest.raises(AmbiguousUnitsError, match=r"weight\.original1' of ParametrizedConv1d"):
        agc_torch.plan(layer, RULE)


OLD_STYLE = {
    "weight norm": (torch.nn.utils.weight_norm, {"weight_g": 1, "weight_v": 6}),
    "spectral norm": (torch.nn.utils.spectral_norm, {"weight_orig": 6}),
    "pruning": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), {"weight_orig": 6}),
}


@pytest.mark.parametrize("name", OLD_STYLE)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_moved_aside_by_older_utilities(name):
    wrap, expected = OLD_STYLE[name]
    assert counts(wrap(nn.ConvTranspose1d(4, 6, 3, bias=False))) == expected


def test_units_says_what_the_layer_types_say():
    found = agc_torch.units(nn.Sequential(nn.Linear(4, 6), TorchDriver().own_layer((2, 3, 4))()))
    assert found == {"0.weight": Units("o i -> o"), "0.bias": None, "1.table": None}


def test_frozen_and_empty_parameters_are_in_the_plan():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(1, 3, bias=False)).requires_grad_(False)
    model[1].weight = nn.Parameter(torch.zeros(3, 0))
    assert counts(model) == {"0.weight": 6, "0.bias": 1, "1.weight": 0}


def test_stacked_parameters_are_at_least_warned_of():
    """``stack_module_state`` leaves no module: the member axis passes for the outputs."""
    stacked, _ = torch.func.stack_module_state([nn.Conv2d(2, 3, 3) for _ in range(4)])
    with pytest.warns(UnitsWarning, match=r"'weight' \(4, 3, 2, 3, 3\).*Give the module instead"):
        agc_torch.plan(stacked, AGC(units={"bias": "e o -> e"}))
    made = agc_torch.plan(stacked, AGC(units={"weight": "e o i ... -> e o", "bias": "e o -> e"}))
    assert {entry.name: entry.count for entry in made} == {"weight": 12, "bias": 4}


def named(path: str, kind: type[nn.Module] = nn.Module) -> type[nn.Module]:
    """Return a class that calls itself by the dotted name of one that is not installed."""
    module, _, name = path.rpartition(".")
    return type(name, (kind,), {"__module__": module, "__qualname__": name})


def layer(path: str, **shapes: tuple[int, ...]) -> nn.Module:
    made = named(path)()
    for name, shape in shapes.items():
        holder, _, key = name.rpartition("__")
        if holder:
            made.add_module(holder, nn.ParameterDict({key: nn.Parameter(torch.zeros(shape))}))
        else:
            made.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return made


PACKAGES = {
    "dense, out last": (
        layer("transformers.pytorch_utils.Conv1D", weight=(4, 6), bias=(6,)),
        {"weight": 6, "bias": 1},
    ),
    "experts": (
        layer("transformers.models.any.X", gate_up_proj=(4, 10, 6), down_proj=(4, 6, 5)),
        {"gate_up_proj": 40, "down_proj": 24},
    ),
    "experts stored in first": (
        layer(
            "transformers.models.any.X",
            gate_up_proj=(4, 6, 10),
            gate_up_proj_bias=(4, 10),
            down_proj=(4, 5, 6),
            down_proj_bias=(4, 6),
        ),
        {"gate_up_proj": 40, "gate_up_proj_bias": 4, "down_proj": 24, "down_proj_bias": 4},
    ),
    "router": (layer("transformers.models.any.Router", weight=(4, 6)), {"weight": 4}),
    "positions": (layer("transformers.models.any.V", pos=(1, 9, 6), cls=(1, 1, 6)), {"pos": 9, "cls": 1}),
    "snake": (layer("transformers.models.any.Snake", alpha=(1, 6, 1)), {"alpha": 1}),
    "picture, channels last": (layer("timm.models.any.V", pos_embed=(1, 3, 4, 6)), {"pos_embed": 12}),
    "picture, channels first": (
        layer("timm.models.pit.PoolingVisionTransformer", pos_embed=(1, 6, 3, 4), cls=(1, 2, 6)),
        {"pos_embed": 12, "cls": 2},
    ),
    "blocks": (layer("timm.models.nest.Nest", pos_embed=(1, 4, 9, 6)), {"pos_embed": 36}),
    "relative bias": (layer("timm.layers.any.B", relative_position_bias_table=(25, 2)), {"relative_position_bias_table": 25}),
    "attention bias": (layer("timm.models.any.A", attention_biases=(2, 25)), {"attention_biases": 25}),
    "LoRA of an embedding": (
        layer("peft.tuners.lora.layer.Embedding", lora_embedding_A__a=(2, 9), lora_embedding_B__a=(6, 2)),
        {"lora_embedding_A.a": 9, "lora_embedding_B.a": 6},
    ),
    "IA3": (layer("peft.tuners.ia3.layer.Linear", ia3_l__a=(8, 1)), {"ia3_l.a": 1}),
    "LoHa": (
        layer("peft.tuners.loha.layer.Linear", hada_w1_a__x=(6, 2), hada_w1_b__x=(2, 5)),
        {"hada_w1_a.x": 6, "hada_w1_b.x": 2},
    ),
    "LoHa with a core": (
        layer("peft.tuners.loha.layer.Conv2d", hada_t1__x=(2, 2, 3, 3), hada_w1_a__x=(2, 6), hada_w1_b__x=(2, 5)),
        {"hada_t1.x": 2, "hada_w1_a.x": 6, "hada_w1_b.x": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_layers_of_packages_that_are_not_imported(name):
    model, expected = PACKAGES[name]
    made = agc_torch.plan(nn.Sequential(model), RULE)
    assert {entry.name.removeprefix("0."): entry.count for entry in made} == expected
    assert {entry.source for entry in made} <= {"layer", "vector"}


def test_square_experts_that_fit_both_ways_are_not_guessed():
    model = layer("transformers.models.any.X", up_proj=(4, 6, 6), down_proj=(4, 6, 6))
    with pytest.raises(AmbiguousUnitsError, match=r"'up_proj' of X .* and of 1 more"):
        agc_torch.plan(model, RULE)
    model.is_transposed = True
    made = agc_torch.plan(model, RULE)
    assert made["up_proj"].units == Units("e i o -> e o")


@pytest.fixture
def classifier() -> nn.Module:
    model = nn.Module()
    model.body, model.classifier = nn.Linear(4, 6), nn.Linear(6, 3)
    return model


@pytest.mark.parametrize("config", ["pretrained_cfg", "default_cfg"])
@pytest.mark.parametrize("head", ["classifier", ("classifier",)])
def test_head_as_timm_declares_it(classifier, config, head):
    setattr(classifier, config, {"classifier": head})
    made = agc_torch.plan(classifier, AGC.profile("paper"))
    assert [e.name for e in made if e.excluded] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("head", [None, "fc", ("classifier", "body"), ()])
def test_no_head_where_timm_declares_none_or_several(classifier, head):
    classifier.pretrained_cfg = {"classifier": head}
    with pytest.raises(SelectorError, match="needs the name of the classifier layer"):
        agc_torch.plan(classifier, AGC.profile("paper"))


def fabric(module: nn.Module) -> nn.Module:
    """Wrap a module as Lightning Fabric does."""
    wrapper = named("lightning.fabric.wrappers._FabricModule")()
    wrapper._forward_module, wrapper._original_module = module, module
    return wrapper


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": lambda module: checkpoint_wrapper(module),
    "fabric": fabric,
    "fabric over compiled": lambda module: fabric(torch.compile(module, backend="eager")),
}


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_are_those_of_the_bare_model(name, where):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3)))

    model = build()
    if where == "inside":
        model[1] = WRAPPERS[name](model[1])
    else:
        model = WRAPPERS[name](model)
    assert agc_torch.plan(model, RULE) == agc_torch.plan(build(), RULE)


@pytest.mark.parametrize("child", ["module", "_forward_module", "_original_module", "_orig_mod"])
def test_children_that_are_called_like_a_wrappers(child):
    model = nn.Module()
    model.add_module(child, nn.Linear(4, 3))
    model.add_module("other", nn.Linear(3, 2))
    assert next(e.name for e in agc_torch.plan(model, RULE)) == f"{child}.weight"


def test_an_only_child_called_module_keeps_its_prefix():
    model = nn.Module()
    model.module = nn.Linear(4, 3)
    assert [e.name for e in agc_torch.plan(model, RULE)] == ["module.weight", "module.bias"]


def test_frozen_parameters_are_marked_and_a_remembered_plan_notices():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert agc_torch.plan(model, RULE).count == 6 + 1 + 3 + 1
    resolve = importlib.import_module("agc_torch.units").resolve
    assert resolve(model, RULE)[0] is resolve(model, RULE)[0]
    model[0].requires_grad_(False)
    made = resolve(model, RULE)[0]
    assert [entry.inactive for entry in made] == ["frozen", "frozen", None, None]
    assert made.count == 3 + 1


# Units judged by what each weight feeds


@pytest.fixture(scope="module")
def judge():
    return script_of_models("torch")


ARCHITECTURES = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 1, "reg_tokens": 3},  # tokens and positions
    "beit_base_patch16_224": {
        "img_size": 64,
        "depth": 1,
        "embed_dim": 24,
        "num_heads": 3,
    },  # indexed
    "pit_ti_224": {"img_size": 64},  # positions of a picture, channels first
    "resnet10t": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_units_are_what_feeds_one_output(judge, name):
    judge.timm_models()  # makes timm importable
    import timm

    model = timm.create_model(name, **ARCHITECTURES[name])
    size = ARCHITECTURES[name].get("img_size", 64)
    found = judge.examine(model, torch.randn(1, 3, size, size))
    assert judge.is_right(found), found
    assert found["judged"] > 5
    head = model.pretrained_cfg["classifier"]
    made = agc_torch.plan(model, AGC.profile("paper"))
    assert [e.name for e in made if e.excluded] == [f"{head}.weight", f"{head}.bias"]


class OutLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 6))
        self.table = nn.Parameter(torch.zeros(6, 9))
        self.spare = nn.Parameter(torch.zeros(6, 9))

    def forward(self, x):
        return (x @ self.kernel + self.table[:, torch.tensor([3, 7])].T).relu()


def test_a_wrong_plan_is_noticed(judge):
    found = judge.examine(OutLast(), torch.randn(2, 4))
    assert found["layout"] == ["kernel", "table", "spare"]
    assert found["wrong"] == {
        "kernel": "(4, 6) o i -> o, one output: (4, 1)",
        "table": "(6, 9) o i -> o, one output: (6, 1)",
    }
    assert found["unused"] == ["spare"]
    assert not judge.is_right(found)
