"""The loop of a training: what is left behind, whatever happens to it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from agc.cli import checkpoint, main
from agc.cli import train as command
from agc.data import initial_values, open_source
from agc.errors import (
    AGCError,
    ConfigError,
    FormatError,
    NonFiniteError,
    ParameterError,
    SelectorError,
)
from agc.nfnet import seeded_parameters
from agc.recipe import load_recipe
from agc.training import (
    Checkpoints,
    Hosts,
    Launch,
    Metrics,
    State,
    Totals,
    Training,
    check_offered,
    read_log,
    stop_signals,
    trained_names,
)
from agc.training.initial import initial_state
from agc.training.loop import evaluation_due
from agc.weights import save
from agc.weights.folders import weights_file

CHANGES = [
    "train.batch=4",
    "train.steps=8",
    "schedule.warmup_steps=2",
    "sam.group=2",
    "sam.fraction=0.5",
    "evaluate.every_steps=3",
    "checkpoint.every_steps=4",
    "data.test.images=5",
]
RECIPE = load_recipe("conformance", CHANGES)


class Counting:
    """A trainer whose weights tell which batches it was given, and in which order.

    ``events`` maps a step to what happens in it; what that returns is the loss.
    """

    def __init__(self, events=None, hosts=None):
        self.facts, self.hosts = {"framework": "none"}, hosts or Hosts()
        self.events = events or {}

    def load(self, state):
        self.now = state

    def state(self):
        return replace(self.now, facts=self.facts)

    def save_sharded(self, folder):
        """Write this host's share of the arrays."""
        folder.mkdir(exist_ok=True)
        index, count = self.hosts.index, self.hosts.count
        for name, arrays in self.now.parts():
            np.savez(folder / f"{name}-{index}", **dict([*arrays.items()][index::count]))

    def load_sharded(self, folder, step):
        parts = {}
        for name in ("parameters", "momentum", "ema"):
            parts[name] = {}
            for file in folder.glob(f"{name}-*"):
                parts[name] |= np.load(file)
        self.now = State(step=step, **parts)

    def step(self, batch, numbers):
        step = self.now.step
        loss = self.events.get(step, lambda: None)()
        (value,) = self.hosts.total([float(batch.numbers.sum() * numbers.rate)])
        weights = dict(self.now.parameters)
        weights["head.bias"] = np.float32(0.75) * weights["head.bias"] + np.float32(value)
        self.now = replace(self.now, step=step + 1, parameters=weights)
        loss = value if loss is None else loss
        return Metrics(loss=np.float32(loss), units=8, clipped=2)

    def evaluate(self, batches, weights):
        (images,) = self.hosts.total([float(sum(batch.weight.sum() for batch in batches))])
        return Totals(float(self.now.parameters["head.bias"][0]), 1, 2, int(images))


def training(
    folder, events=None, *, recipe=RECIPE, log_every=1, sharded=False, trainer=None, **options
):
    trainer = trainer or Counting(events)
    sources = (open_source(recipe, part) for part in ("train", "test"))
    launch = Launch(log_every=log_every, sharded=sharded)
    return Training(recipe, trainer, *sources, folder, launch=launch, **options)


def stopped(folder, steps):
    """Train for so many steps, then stop."""
    run = training(folder)
    assert not run.run(lambda: run.made == steps)


def content(folder):
    """Return what a training left: its log without times, and its weights."""
    records = [r for r in read_log(folder / "log.jsonl") if r["type"] in ("step", "evaluation")]
    for record in records:
        record.pop("images_per_second", None)
    last = sorted(folder.glob("step-*"))[-1]
    return records, (last / "parameters.safetensors").read_bytes(), last.name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert training(folder, log_every=3).run()
    return content(folder)


def test_log(uninterrupted):
    records, _, last = uninterrupted
    order = [(record["type"], record["step"]) for record in records]
    steps = [("step", n) for n in range(8)]
    evaluations = {n: 2 * [("evaluation", n)] for n in (3, 6, 8)}  # raw and average
    expected = [*steps[:3], *evaluations[3], *steps[3:6], *evaluations[6]]
    assert order == [*expected, *steps[6:], *evaluations[8]]
    assert last == "step-000008"
    step, evaluation = records[0], records[-1]
    assert step.keys() == {"type", "step", "loss", "rate", "rho", "ema_decay", "clipped"}
    assert step["clipped"] == 0.25
    assert [record["rate"] for record in records[:2]] == [0, float(np.float32(0.00625))]
    assert evaluation["images"] == 5
    assert (evaluation["top1"], evaluation["top5"]) == (0.2, 0.4)


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_stopped_and_resumed(tmp_path, uninterrupted, steps):
    """The folder is the same as without a stop; an evaluation that was skipped is made up for."""
    stopped(tmp_path, steps)
    assert content(tmp_path)[2] == f"step-{steps:06d}"
    assert read_log(tmp_path / "log.jsonl")[-1]["reason"] == "stopped"
    second = training(tmp_path, resume=True)
    assert second.made == steps
    assert second.run()
    assert content(tmp_path) == uninterrupted
    ends = [r["reason"] for r in read_log(tmp_path / "log.jsonl") if r["type"] == "end"]
    assert ends == ["stopped", "finished"]


def test_finished(tmp_path, uninterrupted):
    """There is nothing left to do, and nothing is done twice."""
    for _ in range(2):
        assert training(tmp_path, resume=True).run()
        assert content(tmp_path) == uninterrupted


def test_killed(tmp_path, uninterrupted):
    """What no checkpoint has is dropped from the log, and so is half a line."""

    def kill():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, {6: kill}).run()
    log = tmp_path / "log.jsonl"
    assert read_log(log)[-1]["step"] == 6
    with log.open("a") as file:
        file.write('{"type": "st')
    assert training(tmp_path, resume=True).run()
    assert content(tmp_path) == uninterrupted


def test_killed_before_the_first_checkpoint(tmp_path, uninterrupted):
    stopped(tmp_path, 1)
    for path in tmp_path.glob("step-*/*"):
        path.unlink()
    for path in tmp_path.glob("step-*"):
        path.rmdir()
    assert training(tmp_path).run()
    assert content(tmp_path) == uninterrupted


def test_stopped_in_an_evaluation(tmp_path, uninterrupted):
    """It is not logged, and made anew."""
    first = training(tmp_path)
    answers = iter([False, True, True])  # after the step; then before a batch and behind the last
    assert not first.run(lambda: first.made == 3 and next(answers))
    records = read_log(tmp_path / "log.jsonl")
    assert [record["type"] for record in records] == ["start", *3 * ["step"], "end"]
    assert training(tmp_path, resume=True).run()
    assert content(tmp_path) == uninterrupted


class Rounds:
    """Two hosts in two threads that add up numbers when both of them have come."""

    def __init__(self):
        self.barrier, self.numbers = threading.Barrier(2, timeout=20), [[], []]

    def host(self, index):
        def total(numbers):
            self.numbers[index] = numbers
            self.barrier.wait()
            sums = [sum(pair) for pair in zip(*self.numbers, strict=True)]
            self.barrier.wait()
            return sums

        return Hosts(index, 2, total)


def on_two_hosts(folder, *, events=(None, None), stop=lambda run: False, **options):
    """Train on two hosts; return what each returned or raised."""
    rounds = Rounds()

    def on_host(index):
        try:
            trainer = Counting(events[index], rounds.host(index))
            run = training(folder[index], trainer=trainer, log_every=3, **options)
            return run.run(lambda: stop(run)), run.made
        except (AGCError, OSError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on_host, range(2)))


def test_hosts(tmp_path, uninterrupted):
    """Two hosts stop together if one is told to, and leave behind what one host leaves."""
    folders = [tmp_path] * 2
    told = on_two_hosts(folders, stop=lambda run: run.made >= 2 and not run._hosts.first)
    assert told == [(False, 3)] * 2  # where they log, and then evaluate
    assert on_two_hosts(folders, resume=True) == [(True, 8)] * 2
    assert content(tmp_path) == uninterrupted
    ends = [r["step"] for r in read_log(tmp_path / "log.jsonl") if r["type"] == "end"]
    assert ends == [3, 8]


def test_hosts_that_cannot_go_on(tmp_path, monkeypatch):
    """What one host alone sees ends all of them."""
    errors = on_two_hosts([tmp_path] * 2, events=[{2: lambda: math.nan}] * 2)
    assert [str(error) for error in errors] == ["the loss is nan at step 2; no checkpoint yet"] * 2
    (tmp_path / "a").mkdir()
    stopped(tmp_path / "a", 2)
    for error in on_two_hosts([tmp_path / "a", tmp_path / "b"], resume=True):
        assert "the hosts see different checkpoints" in str(error)
    monkeypatch.setattr(Checkpoints, "save", lambda *_: os.close(-1))
    full, other = on_two_hosts([tmp_path] * 2)
    assert isinstance(full, OSError)
    assert str(other) == "another host wrote no checkpoint of step 4"


def test_sharded_checkpoints(tmp_path, uninterrupted, monkeypatch, capsys):
    """Hosts write them together; another number of hosts goes on from them, or makes them portable.

    What was not written by all hosts is never taken.
    """
    folders, step = [tmp_path] * 2, tmp_path / "step-000003"
    on_two_hosts(folders, sharded=True, stop=lambda run: run.made == 3)
    assert sorted(path.name for path in step.iterdir()) == ["sharded", "state.json"]
    assert len(list((step / "sharded").iterdir())) == 6
    with pytest.raises(FormatError, match=f"agc checkpoint export {tmp_path} 3"):
        weights_file(tmp_path, None)
    other = Counting()
    other.facts = {"framework": "other"}
    with pytest.raises(FormatError, match="written by none, not other: a sharded checkpoint"):
        training(tmp_path, trainer=other, resume=True)

    def fail(self, folder):
        if not self.hosts.first:
            os.close(-1)

    with monkeypatch.context() as broken:
        broken.setattr(Counting, "save_sharded", fail)
        mine, _ = on_two_hosts(folders, sharded=True, resume=True)
        assert str(mine) == "another host wrote no checkpoint of step 4"
    assert sorted(tmp_path.glob("step-*")) == [step]

    monkeypatch.setattr(checkpoint, "load_framework", lambda *_: Counting())
    monkeypatch.setattr(Counting, "trainer", lambda self, *_: self, raising=False)
    for said in ("portable now", "portable already"):
        assert main(["checkpoint", "export", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out
    on_two_hosts(folders, sharded=True, resume=True, stop=lambda run: run.made == 6)
    assert (tmp_path / "step-000006" / "sharded").is_dir()
    assert training(tmp_path, sharded=True, resume=True).run()
    assert content(tmp_path) == uninterrupted


def test_signals(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    events = {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with stop_signals() as stop:
        assert not stop()
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert not training(tmp_path, events).run(stop)
        assert stop()
        # The next one is for whoever had them before.
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert content(tmp_path)[2] == "step-000003"
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite(tmp_path, loss):
    """It is found although numbers are read later, and the last finite checkpoint stays."""
    stray = training(tmp_path, {5: lambda: loss}, log_every=3)
    with pytest.raises(
        NonFiniteError, match=f"the loss is {loss} at step 5; the checkpoint of step 4 is kept"
    ):
        stray.run()
    assert content(tmp_path)[2] == "step-000004"
    *_, last, end = read_log(tmp_path / "log.jsonl")
    assert (last["step"], last["loss"], end["reason"]) == (5, None, "diverged")


def test_norms_that_are_not_finite(tmp_path):
    """A rule may refuse them within the step; the steps before it are logged."""

    def refuse():
        raise NonFiniteError("a norm is nan")

    message = "step 5: a norm is nan; the checkpoint of step 4 is kept"
    with pytest.raises(NonFiniteError, match=message):
        training(tmp_path, {5: refuse}, log_every=3).run()
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")[-2:]] == [4, 5]


def test_weights_that_are_not_finite(tmp_path):
    class Stray(Counting):
        def state(self):
            bias = np.full(10, np.nan, np.float32)
            return replace(super().state(), parameters={**self.now.parameters, "head.bias": bias})

    with pytest.raises(
        NonFiniteError, match=r"'head.bias' is not finite before step 4; no checkpoint yet"
    ):
        training(tmp_path, trainer=Stray()).run()
    assert not list(tmp_path.glob("step-*"))


def test_reports(tmp_path):
    seen = []
    training(tmp_path, report=seen.append).run()
    assert json.loads(json.dumps(seen)) == read_log(tmp_path / "log.jsonl")
    assert seen[0]["recipe_id"] == RECIPE.id
    assert seen[0]["framework"] == "none"


def test_checkpoints_know_the_last_evaluation(tmp_path):
    stopped(tmp_path, 4)
    facts = json.loads((tmp_path / "step-000004" / "state.json").read_text())["facts"]
    assert facts["framework"] == "none"
    assert facts["evaluation"]["ema"]["step"] == 3


def test_evaluations_by_epoch():
    recipe = load_recipe("conformance", [*CHANGES, "train.steps=40", "data.train.images=50"])
    by_epoch = replace(recipe, evaluate=replace(recipe.evaluate, every_steps=None, every_epochs=1))
    # 12.5 steps each, and the end
    assert [n for n in range(41) if evaluation_due(by_epoch, n)] == [13, 25, 38, 40]
    assert [n for n in range(41) if evaluation_due(recipe, n)] == [*range(3, 40, 3), 40]


# --- what is refused ------------------------------------------------------------------------------


def test_folders(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "none" / "run"):
        with pytest.raises(ConfigError, match="checkpoints cannot be written to"):
            training(folder)
    run = tmp_path / "run"
    stopped(run, 1)
    with pytest.raises(ConfigError, match=r"run has a checkpoint of step 1: .*--resume"):
        training(run)
    (run / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FormatError, match=r"log\.jsonl: line 1 is not of a log"):
        training(run, resume=True)


def test_other_recipes(tmp_path):
    stopped(tmp_path, 5)
    changed = load_recipe("conformance", [*CHANGES, "train.smoothing=0.2"])
    with pytest.raises(FormatError, match=f"is of the recipe {RECIPE.id[:12]}, not of"):
        training(tmp_path, recipe=changed, resume=True)
    assert training(tmp_path, recipe=changed, resume=True, allow_changed=True).made == 5
    shorter = load_recipe("conformance", [*CHANGES, "train.steps=4"])
    with pytest.raises(ConfigError, match="step 5, and the recipe has 4 steps"):
        training(tmp_path, recipe=shorter, resume=True, allow_changed=True)
    larger = load_recipe("conformance", [*CHANGES, "model.variant=tiny"])
    with pytest.raises(ParameterError, match="stages"):
        training(tmp_path, recipe=larger, resume=True, allow_changed=True)


@pytest.mark.parametrize("head", ["keep", "new"])
def test_beginning_from_a_file(tmp_path, head):
    recipe = load_recipe("conformance", [*CHANGES, "model.init=file", f"model.head={head}"])
    wanted, drawn = recipe.model.options(), initial_values(recipe)
    classes = wanted.num_classes if head == "keep" else 7
    file, values = tmp_path / "x", seeded_parameters(wanted.variant, classes)
    values = {name: value.astype("float16") for name, value in values.items()}
    given = replace(wanted, num_classes=classes, dropout=0.0)
    save(file, given, values, "timm")
    state = initial_state(recipe, file)
    assert list(state.parameters) == list(drawn)
    for name, value in state.parameters.items():
        anew = head == "new" and name.startswith("head.")
        expected = drawn[name] if anew else values[name].astype("float32")
        assert (value.dtype, value.shape) == ("float32", expected.shape)
        np.testing.assert_array_equal(value, expected)
    assert state.ema == state.parameters
    assert not any(value.any() for value in state.momentum.values())
    save(file, replace(given, activation="silu"), values)
    with pytest.raises(ConfigError, match=r"activation='silu'; set model\.activation=\"silu\""):
        initial_state(recipe, file)
    others = seeded_parameters(wanted.variant, 9)
    save(file, replace(given, num_classes=9), others)
    if head == "new":
        assert initial_state(recipe, file).parameters["head.bias"].shape == (wanted.num_classes,)
    else:
        with pytest.raises(ParameterError, match=r'head\.bias.*classes set model\.head="new"'):
            initial_state(recipe, file)


def test_beginning_in_float64(tmp_path):
    """What is drawn is widened; a file of float64 keeps its numbers."""
    drawn = initial_state(RECIPE)
    wide = initial_state(load_recipe("conformance", [*CHANGES, "precision.compute=float64"]))
    for (part, arrays), (_, narrow) in zip(wide.parts(), drawn.parts(), strict=True):
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, narrow[name].astype("float64"), part, strict=True)
    values = {name: array / 3 for name, array in wide.parameters.items()}
    save(tmp_path / "x", RECIPE.model.options(), values)
    changes = [*CHANGES, "model.init=file", "precision.compute=float64"]
    begun = initial_state(load_recipe("conformance", changes), tmp_path / "x")
    for name, array in begun.parameters.items():
        np.testing.assert_array_equal(array, values[name], name, strict=True)


def test_trained_names():
    recipe = load_recipe("conformance", CHANGES)
    assert trained_names(recipe) == tuple(initial_values(recipe))
    chosen = load_recipe("conformance", [*CHANGES, 'train.only=["@head", "stem.conv0.*"]'])
    names = ["stem.conv0.weight", "stem.conv0.gain", "stem.conv0.bias", "head.weight", "head.bias"]
    assert sorted(trained_names(chosen)) == sorted(names)
    wrong = load_recipe("conformance", [*CHANGES, 'train.only=["fc.*"]'])
    with pytest.raises(SelectorError, match=r"train\.only: the pattern 'fc\.\*' matches no para"):
        trained_names(wrong)


def test_launches():
    for name in ("microbatch", "threads", "log_every"):
        with pytest.raises(ConfigError, match=f"{name} must be an integer >= 1"):
            Launch(**{name: 0})
    message = "microbatch=3 does not divide train.batch=4"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Launch(microbatch=3).check(RECIPE)
    with pytest.raises(ConfigError, match=r'model\.init="random": give a file'):
        Launch(init=Path("x")).check(RECIPE)
    with pytest.raises(ConfigError, match=r'model\.init="file": give a file of weights \(--init'):
        Launch().check(load_recipe("conformance", [*CHANGES, "model.init=file"]))
    for told in ({"processes": 2}, {"coordinator": "a:1", "processes": 2}, {"process": 0}):
        with pytest.raises(ConfigError, match="give all three, or none to have them found"):
            Launch(**told)
    with pytest.raises(ConfigError, match="process must be less than processes=2, got 2"):
        Launch(coordinator="a:1", processes=2, process=2)
    with pytest.raises(ConfigError, match="Keras learns of other processes from what launches it"):
        check_offered(Launch(processes=1), "Keras")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def agc_train(tmp_path, monkeypatch):
    """Return a function that runs ``agc train`` with a framework that counts."""

    def run(*options, events=None, framework=None):
        framework = framework or SimpleNamespace(trainer=lambda *_: Counting(events))
        monkeypatch.setattr(command, "load_framework", lambda *_: framework)
        changes = [f"--set={change}" for change in CHANGES]
        folder = ["--framework=torch", f"--out={tmp_path}"]
        return main(["train", "conformance", *folder, *changes, *options])

    return run


def test_command(tmp_path, agc_train, uninterrupted, capsys):
    """SIGTERM stops it with a status of its own, and ``--resume`` goes on."""
    events = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    assert agc_train(events=events) == command.STOPPED == 75
    assert "stopped and saved after 5 steps; --resume goes on" in capsys.readouterr().out
    assert agc_train() == 2
    assert "has a checkpoint of step 5" in capsys.readouterr().err
    assert agc_train("--resume") == 0
    assert content(tmp_path) == uninterrupted
    said = capsys.readouterr().out
    assert "step 8, ema weights: top-1 20.00%, top-5 40.00%, loss" in said
    assert f"trained for 8 steps: {tmp_path}" in said


def test_command_that_begins_from_a_file(tmp_path, agc_train):
    save(tmp_path / "x", RECIPE.model.options(), initial_values(RECIPE))
    command = ["--set=model.init=file", f"--init={tmp_path / 'x'}"]
    assert agc_train(*command, events={4: lambda: os.kill(os.getpid(), signal.SIGTERM)}) == 75
    assert agc_train(*command, "--resume") == 0
    said = [record["init"] for record in read_log(tmp_path / "log.jsonl") if "init" in record]
    assert said[0] == said[1]
    assert said[0]["file"] == str(tmp_path / "x")
    facts = json.loads((tmp_path / "step-000008" / "state.json").read_text())["facts"]
    assert facts["init"] == said[0]


def test_command_of_another_recipe(agc_train, capsys):
    assert agc_train(events={4: lambda: os.kill(os.getpid(), signal.SIGTERM)}) == 75
    changed = ("--resume", "--set=train.smoothing=0.2")
    assert agc_train(*changed) == 2
    assert "allow the change (--allow-changed)" in capsys.readouterr().err
    assert agc_train(*changed, "--allow-changed") == 0


def test_command_that_fails(agc_train, capsys):
    assert agc_train(events={5: lambda: math.nan}) == 1
    said = capsys.readouterr().err
    assert said == "agc: the loss is nan at step 5; the checkpoint of step 4 is kept\n"
    assert agc_train(framework=SimpleNamespace()) == 2
    assert "agc train is not offered in torch as yet" in capsys.readouterr().err
    assert agc_train("--microbatch=3") == 2
    assert "microbatch=3 does not divide train.batch=4" in capsys.readouterr().err
