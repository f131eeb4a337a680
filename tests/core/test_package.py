import argparse
import re
import subprocess
import sys

import pytest

import agc


def commands(parser):
    """Yield a parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)


FRAMEWORKS = ["torch", "jax", "tensorflow", "keras", "optax", "flax"]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_loads_no_framework():
    """Not even where all of them are installed."""
    loaded = python(
        "import sys, agc.cli.checkpoint, agc.cli.classify, agc.cli.convert, agc.cli.demo, agc.cli.plot;"
        "import agc.cli.reproduce, agc.cli.train, agc.data, agc.layer_table, agc.plan, agc.recipe;"
        "import agc.reference.nfnet, agc.training;"
        "print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert "numpy" in loaded
    assert not set(loaded) & {*FRAMEWORKS, "agc_torch", "agc_jax", "agc_tensorflow"}


@pytest.mark.parametrize("name", agc.__all__)
def test_public_names_exist(name):
    assert getattr(agc, name)


def test_command_line_knows_its_version():
    command = [sys.executable, "-m", "agc", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"agc-sam {agc.__version__}"


def test_command_line_needs_a_command(capsys):
    from agc.cli import main

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "required: COMMAND" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    names = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert names == [
        "checkpoint",
        "classify",
        "conformance",
        "convert",
        "demo",
        "plot",
        "recipe",
        "reproduce",
        "train",
    ]


def test_every_option_has_help_that_a_terminal_shows(monkeypatch):
    from agc.cli import main

    class Seen(Exception):
        pass

    def seen(parser, _):
        raise Seen(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", seen)
    with pytest.raises(Seen) as caught:
        main([])
    found = list(commands(caught.value.args[0]))
    assert len(found) > 15
    for command in found:
        actions = [a for a in command._actions if not isinstance(a, argparse._SubParsersAction)]
        texts = [command.description or "", *(a.help or "missing: ``" for a in actions)]
        assert not [text for text in texts if "``" in text], command.prog


def test_command_without_its_packages_says_what_to_install(capsys, monkeypatch):
    from agc.cli import main

    monkeypatch.setitem(sys.modules, "agc_conformance.cli", None)
    assert main(["conformance", "run", "--backend", "x"]) == 2
    assert 'pip install "agc-sam[conformance]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--framework", "torch"],
        ["--out=x.svg", "-v", "rest"],
        ["--help"],
        ["--", "-x"],
    ],
)
def test_whatever_is_given_to_a_command_without_its_packages(capsys, monkeypatch, given):
    from agc.cli import main

    monkeypatch.setitem(sys.modules, "agc.cli.demo", None)
    assert main(["demo", *given]) == 2
    err = capsys.readouterr().err
    assert "'agc demo' needs packages that are not installed" in err
    assert 'pip install "agc-sam[demo]"' in err
