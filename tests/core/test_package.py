import re
import subprocess
import sys

import pytest

import agc

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
