"""Recipes: what is refused and how, round trips, ids, the published numbers, the command."""

import hashlib
import json
import re
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from agc import AGC, SAM, Schedule
from agc.cli import main
from agc.errors import ConfigError, FormatError
from agc.nfnet import VARIANTS, options
from agc.recipe import Recipe, load_recipe, numbers, shipped_recipes, to_toml
from agc.recipe.files import flat
from agc.recipe.tables import Sharpness
from agc.schedule import WarmupCosine, WarmupDecay
from tests.core import data_hashes

IMAGENET = [f"nfnet-f{n}" for n in range(7)]


def test_shipped():
    others = ["conformance", "digits-mini", "fashion-mini", "jft-finetune", "nf-resnet-ablation"]
    assert shipped_recipes() == sorted([*IMAGENET, *others])


# --- published facts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "name"), [*enumerate(IMAGENET)])
def test_nfnet(level, name):
    """The table of DeepMind's variants and the lengths that follow from it."""
    recipe = load_recipe(name)
    variant = VARIANTS[f"F{level}"]
    assert recipe.model.options().variant is variant
    assert recipe.model.dropout == variant.dropout
    assert recipe.model.stochastic_depth == 0.25
    pixels = (recipe.input.train_pixels, recipe.input.test_pixels)
    assert pixels == (variant.train_pixels, variant.test_pixels)
    assert recipe.augment.randaugment.magnitude == (5, 10, 10, 15, 15, 15, 15)[level]
    assert recipe.steps == 112_602 == 1_281_167 * 360 // 4096
    assert Fraction(recipe.warmup) == Fraction(5 * 1_281_167, 4096)
    assert recipe.peak == 1.6
    assert recipe.agc == AGC.profile("deepmind")
    assert (recipe.sam is not None) == (name == "nfnet-f6")


def test_rate_of_nfnets():
    """Values of DeepMind's schedule, computed from its formula elsewhere."""
    rate = numbers(load_recipe("nfnet-f0")).rate
    assert rate.shape == (112_602,)
    assert rate.dtype == np.float32
    published = {0: 0, 1: 0.00102306725, 781: 0.7990155, 1563: 1.5990541, 56301: 0.8176978}
    for step, value in published.items():
        assert rate[step] == pytest.approx(value, rel=1e-7)
    assert rate.argmax() == 1564
    assert rate[-1] == pytest.approx(3.2e-10, rel=1e-2)


def test_unpublished_values_are_marked():
    for name, keys in {
        "jft-finetune": {"agc.clipping", "sam.fraction", "input.train_pixels"},
        "nf-resnet-ablation": {"model.dropout", "optimizer.weight_decay"},
        "nfnet-f6": {"sam.rho"},
    }.items():
        notes = load_recipe(name).notes
        assert all("not published" in notes[key] for key in keys)
    model = load_recipe("nf-resnet-ablation", ["model.variant=nf-resnet-200"]).model
    assert model.options() == options("NF-ResNet-200", stochastic_depth=0.0)


def test_the_documentation_shows_a_recipe(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    (block,) = re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(block, encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.model.dropout == VARIANTS["F1"].dropout
    assert recipe.notes == {"sam.rho": "my choice"}


# --- numbers of a step ----------------------------------------------------------------------------


def test_schedules_do_not_jump():
    rate = WarmupCosine(peak=2.0, steps=10, warmup=4.0, end=0.5)
    assert [rate(step) for step in (0, 2, 4, 7, 10, 11)] == [0, 1, 2, 1.25, 0.5, 0.5]
    assert WarmupCosine(peak=1.0, steps=3)(0) == 1
    decay = WarmupDecay(decay=0.9)
    assert [decay(step) for step in (0, 1, 79, 80, 81, 1000)] == [
        0.1, 2 / 11, 80 / 89, 0.9, 0.9, 0.9
    ]  # fmt: skip
    assert WarmupDecay(decay=0.9, warmup=False)(0) == 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peak": -1, "steps": 3}, "peak must be"),
        ({"peak": 1, "steps": 0}, "steps must be"),
        ({"peak": 1, "steps": 3, "warmup": 4}, "warmup must be a number from 0 to the 3 steps"),
        ({"peak": 1, "steps": 3, "end": -1}, "end must be"),
    ],
)
def test_bad_schedules(values, message):
    with pytest.raises(ConfigError, match=message):
        WarmupCosine(**values)
    with pytest.raises(ConfigError, match=r"decay must be a number in \[0, 1\)"):
        WarmupDecay(decay=1.0)


def test_numbers_are_those_of_the_rules():
    recipe = load_recipe("conformance")
    table = numbers(recipe)
    rule = recipe.sam.rule
    for step in range(recipe.steps):
        row = table.at(step)
        expected = rule.radius(step) if step % 2 == 0 else 0
        assert row.rho == np.float32(expected)
        assert row.clipping == {"*": np.float32(recipe.agc.clipping(step))}
        assert row.ema_decay == np.float32(min(0.9, (1 + step) / (10 + step)))
        assert row.rate.shape == ()
    hashes = {
        name: hashlib.sha256(array.tobytes()).hexdigest()[:16]
        for name, array in {
            "rate": table.rate,
            "clipping": table.clipping["*"],
            "rho": table.rho,
            "ema_decay": table.ema_decay,
        }.items()
    }
    assert hashes == NUMBERS


def test_what_is_absent_has_no_numbers():
    table = numbers(load_recipe("nf-resnet-ablation", ["train.epochs=6"]))
    assert table.rho is table.ema_decay is None
    assert table.at(3).rho is None
    changes = ['agc.clipping={"stem.*" = 0.02, "*" = 0.01}', "train.epochs=6"]
    clipping = numbers(load_recipe("nfnet-f0", changes)).clipping
    assert [(pattern, array[5]) for pattern, array in clipping.items()] == [
        ("stem.*", np.float32(0.02)),
        ("*", np.float32(0.01)),
    ]


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_round_trips(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert dict(again.notes) == dict(recipe.notes)
    assert hash(again) == hash(recipe)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert again.id == recipe.id == hashlib.sha256(recipe.canonical().encode()).hexdigest()
    assert list(json.loads(recipe.canonical())) == sorted(json.loads(recipe.canonical()))


def test_ids():
    """If they change, runs that were begun before cannot resume."""
    assert {name: load_recipe(name).id[:16] for name in shipped_recipes()} == IDS


@pytest.mark.parametrize(
    ("name", "key", "value", "change"),
    [
        ("conformance", "agc.clipping", {"*": 0.02}, 'agc.clipping={"*"=0.02}'),
        ("conformance", "agc.clipping", {"*": 0.02}, 'agc.clipping."*"=0.02'),
        ("conformance", "sam.rho", {"@schedule": [[0, 0.1]]}, 'sam.rho={"@schedule"=[[0, 0.1]]}'),
        ("base", "agc.clipping", {"@schedule": [[0, 1.0]]}, 'agc.clipping={"@schedule"=[[0, 1]]}'),
        ("base", "agc.clipping", {"b*": 0.1, "*": 0.2}, 'agc.clipping={"b*"=0.1, "*"=0.2}'),
        ("base", "agc.units", {"c": "n d -> n"}, 'agc.units={c="n d -> n"}'),
    ],
)
def test_tables_that_are_values_are_replaced_whole(tmp_path, name, key, value, change):
    (tmp_path / "base.toml").write_text(
        'base="digits-mini"\nagc.clipping={"*"=0.01}\nagc.units={b="n d -> n"}\n'
    )
    base = str(tmp_path / "base.toml") if name == "base" else name
    recipe = load_recipe(base, [change])
    table, _, field = key.partition(".")
    assert list(recipe.to_dict()[table][field].items()) == list(value.items())
    before, after = flat(load_recipe(base)), flat(recipe)
    rest = [{k: v for k, v in each.items() if not k.startswith(key)} for each in (before, after)]
    assert rest[0] == rest[1]


def test_a_change_without_a_value_takes_a_key_out():
    plain = load_recipe("digits-mini")
    recipe = load_recipe("digits-mini", ["agc=", "ema=", "train.epochs=", "train.steps=70"])
    assert (recipe.agc, recipe.ema, recipe.steps) == (None, None, 70)
    assert recipe.schedule == plain.schedule
    with pytest.raises(ConfigError, match="epochs or steps must be given"):
        load_recipe("digits-mini", ["train.epochs="])
    assert load_recipe("digits-mini", ["sam=", "train.smoothing="]).id == plain.id
    for unknown in ("trian=", "train.epoch="):
        with pytest.raises(ConfigError, match=f"unknown key {unknown[:-1]}"):
            load_recipe("digits-mini", [unknown])


def test_tables_of_a_recipe_are_merged_key_by_key():
    changes = ["data.train.split=mine", 'notes."train.batch"=a', 'notes."train.epochs"=b']
    recipe = load_recipe("digits-mini", changes)
    assert recipe.data.train.kind == "digits"
    assert recipe.notes == {"train.batch": "a", "train.epochs": "b"}


def test_a_default_that_is_written_changes_nothing_and_a_note_neither():
    plain = load_recipe("fashion-mini")
    said = load_recipe("fashion-mini", ["train.smoothing=0.1", 'notes."train.batch"=any'])
    assert said.id == plain.id
    assert load_recipe("fashion-mini", ["train.batch=64"]).id != plain.id


def test_what_is_absent_is_no_part_of_the_id():
    plain, limited = (load_recipe("fashion-mini", [f"optimizer.max_norm={n}"]) for n in ("", 1))
    assert plain.optimizer.max_norm is None
    assert plain.id == IDS["fashion-mini"] + plain.id[16:] != limited.id
    assert "max_norm" not in plain.canonical()
    assert Recipe.from_dict(limited.to_dict()).optimizer.max_norm == 1.0


def test_the_order_of_patterns_is_part_of_the_id():
    first, second = '"stem.*" = 0.02', '"*" = 0.01'
    ids = {
        load_recipe("fashion-mini", [f"agc.clipping={{{a}, {b}}}"]).id
        for a, b in ((first, second), (second, first))
    }
    assert len(ids) == 2


def test_from_python():
    recipe = replace(load_recipe("fashion-mini"), sam=Sharpness(rule=SAM(fraction=0.5), group=64))
    assert recipe.to_dict()["sam"]["group"] == 64
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ConfigError, match=r"use agc\.Schedule"):
        replace(recipe, agc=AGC(clipping=lambda step: 0.1))
    replace(recipe, agc=AGC(clipping=Schedule([(0, 0.1)])))
    with pytest.raises(ConfigError, match="sam must be of the class Sharpness, got SAM"):
        replace(recipe, sam=SAM())
    with pytest.raises(ConfigError, match=r"input\.crop must be of the class Crop, got None"):
        replace(recipe, input=replace(recipe.input, crop=None))
    with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM"):
        Sharpness(rule=AGC())


def test_ascent():
    """20 % of a batch: by groups, and of every host when all share a perturbation."""
    sam = Sharpness(rule=SAM(fraction=0.2), group=8)
    assert sam.ascent(24) == (0, 1, 8, 9, 16, 17)
    assert Sharpness(rule=SAM(fraction=0.2), group=32).ascent(64) == (*range(7), *range(32, 39))
    assert Sharpness(rule=SAM(fraction=0.2)).ascent(30) == (0, 5, 10, 15, 20, 25)
    places = Sharpness(rule=SAM(fraction=0.3)).ascent(64)
    assert len(set(places)) == 20
    assert [sum(place // 16 == host for place in places) for host in range(4)] == [5] * 4
    assert Sharpness(rule=SAM()).ascent(8) == tuple(range(8))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # keys
        ("trian.batch=3", r"^nfnet-f6: unknown key trian; did you mean train\?"),
        ("train.batchsize=3", r"unknown key train\.batchsize; did you mean train\.batch\?"),
        ("smoothing=0", r"unknown key smoothing; did you mean train\.smoothing\?"),
        ("input.crop.areas=3", r"unknown key input\.crop\.areas; did you mean input\.crop\.area\?"),
        ("agc.clip=3", r"unknown key agc\.clip; did you mean agc\.clipping\?"),
        ("sam.roh=3", r"unknown key sam\.roh; did you mean sam\.rho\?"),
        ("ema.zzzz=3", r"unknown key ema\.zzzz; the keys are ema\.decay, ema\.warmup"),
        # types
        ("train=3", "train must be a table, got 3"),
        ("input.crop=3", r"input\.crop must be a table, got 3"),
        ("agc=true", "agc must be a table, got True"),
        ("notes=3", "notes must be a table"),
        ("seed=text", "seed must be an integer >= 0, got 'text'"),
        ("seed=-1", "seed must be an integer >= 0"),
        ("seed=9223372036854775808", r"seed must be less than 2\^63"),
        ("schema=2", "schema must be 1 for this release, got 2"),
        ("schema=true", "schema must be 1"),
        ("schema=1.0", "schema must be 1"),
        ("model.variant=F9", "model: unknown NFNet variant 'F9'"),
        ("model.variant=3", "unknown NFNet variant 3"),
        ("model.activation=[1]", "unknown activation"),
        ("model.ws_eps=[1]", "ws_eps must be"),
        ("model.num_classes=0", r"model\.num_classes must be an integer >= 1"),
        ("model.dropout=1", r"model\.dropout must be a rate"),
        ("model.init=url", r"model\.init must be one of 'random', 'file', got 'url'"),
        ("model.head=new", r'model\.head = "new" replaces the classifier of a file: give init'),
        ("data.train.images=0", r"data\.train\.images must be an integer >= 1, got 0"),
        ("data.train.kind=zip", r"data\.train\.kind must be one of 'idx', 'folder'"),
        ("data.test.split=''", r"data\.test\.split must be a non-empty string"),
        ("input.crop.area=3", r"input\.crop\.area must be a list of numbers, got 3"),
        ("input.crop.area=[0.5]", r"input\.crop\.area must be two numbers"),
        ("input.crop.area=[0.5,0.1]", r"input\.crop\.area must ascend within"),
        ("input.crop.aspect=[0,1]", r"input\.crop\.aspect must be two ascending numbers > 0"),
        ("input.crop.margin=-1", r"input\.crop\.margin must be an integer >= 0"),
        ("input.crop.covered=2", r"input\.crop\.covered must be a number in \(0, 1\]"),
        ("input.flip=1", r"input\.flip must be True or False, got 1"),
        ("input.train_pixels=30", r"input\.train_pixels must be a multiple of the stem's stride 4"),
        ("input.std=[1,1,0]", r"input\.std\[2\] must be a finite number > 0"),
        ("input.evaluation=crop", r'input\.evaluation must be "squash\+N"'),
        ("input.evaluation=3", r'input\.evaluation must be "squash\+N"'),
        ("augment.mixup.alpha=2", r"augment\.mixup\.alpha must be a number from 0\.05 to 1"),
        ("augment.mixup.share=0.4", r"augment\.mixup\.share and cutmix\.share must sum to 1"),
        ("augment.randaugment.magnitude=21", r"augment\.randaugment\.magnitude must be"),
        ("augment.randaugment.flavour=timm", r"randaugment\.flavour must be one of 'deepmind'"),
        ("train.batch=1.5", r"train\.batch must be an integer >= 1, got 1\.5"),
        ("train.steps=10", r"train\.epochs or steps must be given, and not both"),
        ("train.smoothing=1", r"train\.smoothing must be a number in \[0, 1\)"),
        ("train.masks=dropout", r"train\.masks must be a list"),
        ("train.masks=['noise']", r"train\.masks must be one of 'stochastic_depth', 'dropout'"),
        ("train.only=['']", r"train\.only needs non-empty strings"),
        ("optimizer.rate.peak=1", r"optimizer\.rate\.peak must be given, or else base and per"),
        ("optimizer.momentum=1", r"optimizer\.momentum must be a number in \[0, 1\)"),
        ("optimizer.weight_decay=nan", r"optimizer\.weight_decay must be a finite number >= 0"),
        ("optimizer.max_norm=0", r"optimizer\.max_norm must be a finite number > 0, got 0"),
        ("optimizer.max_norm=inf", r"optimizer\.max_norm must be a finite number > 0, got inf"),
        ("schedule.warmup_steps=1", r"schedule\.warmup_epochs and warmup_steps cannot both"),
        ("agc.clipping=0", r"agc\.clipping must be a finite number > 0"),
        ("agc.profile=mine", "agc: unknown profile 'mine'"),
        ("sam.scope=global", r"sam\.scope is decided by group; leave it out"),
        ("sam.group=all", r'sam\.group must be an integer or "batch", got \'all\''),
        ("ema.decay=1", r"ema\.decay must be a number in \[0, 1\)"),
        ("ema.warmup=0", r"ema\.warmup must be True or False"),
        ("precision.compute=float16", r"precision\.compute must be one of 'float32', 'bfloat16'"),
        ("evaluate.weights=[]", r'evaluate\.weights must name "raw", "ema" or both'),
        ("evaluate.weights=raw", r"evaluate\.weights must be a list"),
        ("checkpoint.keep=0", r"checkpoint\.keep must be an integer >= 1"),
        # two tables that do not fit
        ("model.in_channels=1", r"input\.mean must have a number for each of model\.in_channels=1"),
        ("train.epochs=0.001", r"train: 0\.001 epochs of 1281167 images are less than one step"),
        ("schedule.warmup_epochs=400", "schedule: the warm-up of .* is longer than the training"),
        ("schedule.end=2", r"schedule\.end=2\.0 is above the peak 1\.6"),
        ("train.batch=100", r"sam\.group=32 does not divide train\.batch=100"),
        ("sam.fraction=0.01", r"sam\.fraction=0\.01 of 32 examples is less than one"),
        ("precision.compute=float32", r'standardise="bfloat16" needs precision\.compute'),
        ("precision.compute=float64", r'standardise="bfloat16" needs precision\.compute'),
        ("precision.standardise=float64", r"precision\.standardise must be"),
        ('notes."train.batches"=x', r"notes: there is no key 'train\.batches'"),
        ('notes."train.batch"="""a\\nb"""', r"notes: 'train\.batch' must have one line of text"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("nfnet-f6", [change])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nf-resnet-ablation", "evaluate.weights=['ema']", r'"ema", but there is no table \[ema\]'),
        ("nf-resnet-ablation", "model.variant=NF-ResNet-9", "unknown NFNet variant"),
    ],
)
def test_mistakes_in_other_recipes(name, change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, [change])


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(
        ConfigError, match=r"no recipe 'mine'; give the path .* conformance, digits"
    ):
        load_recipe("mine")
    with pytest.raises(FormatError, match=r"mine\.toml: cannot be read as a recipe"):
        load_recipe(path)
    path.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="cannot be read as a recipe"):
        load_recipe(path)
    path.write_text("a = \n")
    with pytest.raises(FormatError, match=r"is not TOML: Invalid value .at line 1"):
        load_recipe(path)
    path.write_text('schema = 1\n[model]\nvariant = "F0"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: data is missing"):
        load_recipe(path)
    path.write_text('base = "nf-resnet-ablation"\n[model]\nvariant = "NF-ResNet-101"\n')
    assert load_recipe(path).train == load_recipe("nf-resnet-ablation").train
    (tmp_path / "other.toml").write_text('base = "mine.toml"\ntrain.batch = 256\n')
    assert load_recipe(tmp_path / "other.toml").peak == 0.1
    path.write_text('base = "mine.toml"\n')
    with pytest.raises(ConfigError, match="base must name a recipe that does not lead back"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"'train' is no change of a key, such as train\.steps"):
        load_recipe("nfnet-f0", ["train"])


@pytest.mark.parametrize(
    ("table", "name"),
    [
        *product(["model"], ["num_classes", "dropout", "stochastic_depth", "activation"]),
        *product(["input"], ["train_pixels", "test_pixels"]),
    ],
)
def test_nothing_is_assumed_about_models_without_defaults(table, name):
    tables = load_recipe("nf-resnet-ablation").to_dict()
    del tables[table][name], tables["notes"]
    with pytest.raises(ConfigError, match=rf"{table}\.{name} must be given: NF-ResNet-50"):
        Recipe.from_dict(tables)


# --- the command ----------------------------------------------------------------------------------


def test_show(capsys, tmp_path):
    assert main(["recipe", "show", "nfnet-f6", "--set", "train.epochs=90"]) == 0
    text = capsys.readouterr().out
    assert "\n# 28150 steps, 312.785 an epoch; warm-up of 1563.92 steps to the rate 1.6\n" in text
    assert 'sam.rho = 0.05\nnotes."sam.rho" = "not published for this training' in text
    path = tmp_path / "mine.toml"
    path.write_text(text)
    recipe = load_recipe("nfnet-f6", ["train.epochs=90"])
    assert load_recipe(path) == recipe
    assert text.startswith(f"# id {recipe.id}\n")
    assert main(["recipe", "show", str(path), "--json"]) == 0
    assert hashlib.sha256(capsys.readouterr().out.strip().encode()).hexdigest() == recipe.id


def test_check(capsys):
    assert main(["recipe", "check", "nf-resnet-ablation"]) == 0
    assert "model.dropout: not published\n" in capsys.readouterr().out
    assert main(["recipe", "check", "nfnet-f0", "--set", "train.batch=0"]) == 2
    assert capsys.readouterr().err == (
        "agc: nfnet-f0: train.batch must be an integer >= 1, got 0\n"
    )


def test_check_opens_the_images(capsys, tmp_path):
    assert main(["recipe", "check", "conformance", "--data", str(tmp_path)]) == 0
    hashes = json.loads(data_hashes.FILE.read_text(encoding="utf-8"))["conformance"]
    assert f"first batch: SHA-256 {hashes['step 0']}\n" in capsys.readouterr().out
    assert main(["recipe", "check", "fashion-mini", "--data", str(tmp_path)]) == 2
    assert "there is neither train-images-idx3-ubyte nor" in capsys.readouterr().err


def test_diff(capsys):
    assert main(["recipe", "diff", "nfnet-f0", "nfnet-f0"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["recipe", "diff", "nfnet-f3", "nfnet-f4"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "model.variant: F3 -> F4",
        "model.dropout: 0.4 -> 0.5",
        "input.train_pixels: 320 -> 384",
        "input.test_pixels: 416 -> 512",
    ]
    assert main(["recipe", "diff", "nfnet-f6", "nfnet-f5"]) == 1
    assert "sam.rho: 0.05 -> absent" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["recipe", "--help"])
    text = capsys.readouterr().out
    assert "agc recipe diff nfnet-f0 mine.toml" in text
    assert "nf-resnet-ablation" in text


# Measured once; each is a promise to whoever has a checkpoint or a log.
IDS = {
    "conformance": "fb923296e2958dc6",
    "digits-mini": "cd19c8d99d264e7b",
    "fashion-mini": "3e2574ca113a6014",
    "jft-finetune": "05f8cf44fe4be14a",
    "nf-resnet-ablation": "5cf991a8bbb55bb1",
    "nfnet-f0": "f38d7eb8596a0606",
    "nfnet-f1": "e735eaa51461a30b",
    "nfnet-f2": "3e02547bf6564f6b",
    "nfnet-f3": "2c0378217046bfd4",
    "nfnet-f4": "07771332c2110d94",
    "nfnet-f5": "1b0b6ea0cd77f1d7",
    "nfnet-f6": "75bbaa475ee535d2",
}
NUMBERS = {
    "rate": "488d0c49ab33a7f6",
    "clipping": "2a19b5401f6a8cd9",
    "rho": "ddea10a4bc6cf6b4",
    "ema_decay": "4a5137ceacd1383f",
}
