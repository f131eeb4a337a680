"""Everything this project runs. ``nox -l`` lists the sessions; each has an environment of its own.

A framework's session installs that framework alone, so an adapter that secretly needs another one
fails.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["conformance"]

ROOT = Path(__file__).parent
REPORT = ROOT / "report"
PYPROJECT = nox.project.load_toml("pyproject.toml")
FRAMEWORKS = ("torch", "jax", "tensorflow")
PEERS = {"torch": ("timm", "pytorch_optimizer"), "jax": ("optax",), "tensorflow": ()}  # modules
PACKAGES = ("agc", "agc_torch", "agc_jax", "agc_tensorflow", "agc_conformance")
# Neighbours run in one process: they share what they compile.
IN_PARALLEL = ("--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal", "-p", "no:benchmark")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
# The processes of the tests share the cores: with more threads each they would wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Python compiles what is imported; pip would compile all that is installed. 0 stands for yes.
os.environ.setdefault("PIP_NO_COMPILE", "0")


def install(session: nox.Session, *extras: str, groups: tuple[str, ...] = ()) -> None:
    """Install this project with extras, and dependency groups, in one resolution."""
    requirements = [
        requirement
        for group in groups
        for requirement in nox.project.dependency_groups(PYPROJECT, group)
    ]
    session.install("-e", f".[{','.join(extras)}]" if extras else ".", *requirements)


def lowest(requirements: list[str]) -> list[str]:
    """Turn each lower bound into exactly that version; a requirement without one stays as it is."""
    return [re.sub(r">=([0-9.]+)", r"==\1", requirement) for requirement in requirements]


def install_peers(session: nox.Session) -> None:
    """Install the PyTorch peers without dependencies: timm's torchvision brings another torch."""
    session.install("--no-deps", *nox.project.dependency_groups(PYPROJECT, "peers-torch"))


def frameworks(*others: str) -> list[object]:
    """Parametrize a session by framework, with readable names."""
    return [nox.param(name, id=name, tags=[name]) for name in (*others, *FRAMEWORKS)]


@nox.session
@nox.parametrize("framework", frameworks())
def conformance(session: nox.Session, framework: str) -> None:
    """Prove every adapter equal to the reference, then write report/index.html (the main job)."""
    install(session, framework, "conformance", groups=(f"pinned-{framework}",))
    if framework == "torch":
        install_peers(session)
    REPORT.mkdir(exist_ok=True)
    session.notify("report")
    run = ("agc", "conformance", "run", *session.posargs)
    # A failed run must not leave an older result in its place.
    for stale in REPORT.glob(f"{framework}-*.jsonl"):
        stale.unlink()
    for peer in PEERS[framework]:
        target = f"report/{framework}-peer-{peer}.jsonl"
        session.run(
            *run, "--backend", f"agc_conformance.backends.peers.{peer}:backend", "--out", target
        )
    target = f"report/{framework}-cpu.jsonl"
    session.run(*run, "--backend", framework, "--device", "cpu", "--out", target, env=QUIET)


@nox.session(default=False)
def report(session: nox.Session) -> None:
    """Present the result files in report/ (runs by itself after ``conformance``)."""
    install(session, "conformance")
    session.run("agc", "conformance", "teeth", "--out", "report/teeth.jsonl")
    results = sorted(str(path) for path in REPORT.glob("*.jsonl"))
    # Results of devices that most machines lack are committed.
    committed = sorted(
        str(path)
        for pattern in ("*-cuda.jsonl", "*-aot.json")
        for path in (ROOT / "conformance" / "results").glob(pattern)
    )
    session.run("agc", "conformance", "report", *results, *committed, "--out", "report")


@nox.session(default=False)
def publish(session: nox.Session) -> None:
    """Put the matrix and the figure of the last ``conformance`` into the README."""
    install(session, "conformance")
    session.run("agc", "conformance", "publish", "report/report.json")


@nox.session
@nox.parametrize("framework", frameworks("core"))
def tests(session: nox.Session, framework: str) -> None:
    """Unit and integration tests, each framework alone."""
    if framework == "core":
        install(session, "conformance", "weights", groups=("test",))
        folders = ("tests/core", "tests/conformance")
        session.run("pytest", *IN_PARALLEL, *folders, *session.posargs, env=ONE_THREAD)
        return
    groups = ("test", f"pinned-{framework}", f"test-{framework}")
    install(session, framework, "conformance", "weights", groups=groups)
    if framework == "torch":
        install_peers(session)
    run = ("pytest", *IN_PARALLEL, f"tests/{framework}", *session.posargs)
    env = QUIET | ONE_THREAD
    if framework != "jax":
        session.run(*run, env=env)
        return
    # What JAX compiled in one process, no other compiles again, nor the next run.
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(session.virtualenv.location) / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # XLA reads its flags once a process. Kernels that compile in less time are not what users run,
    # so tests of accuracy do without.
    sooner = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
    statuses = (0, 5) if session.posargs else (0,)  # 5: all that is asked for is in the other run
    session.run(*run, "-m", "not quick", env=env, success_codes=statuses)
    session.run(*run, "-m", "quick", env=env | sooner, success_codes=statuses)


@nox.session(default=False)
@nox.parametrize("framework", frameworks("core"))
def minimum(session: nox.Session, framework: str) -> None:
    """Run the tests with the lowest versions that pyproject.toml declares."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    if framework == "core":
        declared = [
            *PYPROJECT["project"]["dependencies"],
            *extras["conformance"],
            *extras["weights"],
        ]
        declared += nox.project.dependency_groups(PYPROJECT, "test")
        folders = ["tests/core", "tests/conformance"]
    else:
        declared = [*extras[framework]]
        declared += nox.project.dependency_groups(PYPROJECT, f"test-{framework}")
        folders = [f"tests/{framework}"]
    others = nox.project.dependency_groups(PYPROJECT, "test") if framework != "core" else ()
    session.install("-e", ".[conformance,weights]", *lowest(declared), *others)
    if framework == "torch":
        install_peers(session)
    # Old releases use deprecated features of even older ones.
    deprecations = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    quiet = [f"-Wdefault::{category}" for category in deprecations]
    session.run("pytest", *IN_PARALLEL, *quiet, *folders, *session.posargs, env=QUIET)


@nox.session(default=False)
@nox.parametrize("framework", frameworks("core"))
def newest(session: nox.Session, framework: str) -> None:
    """Run the tests with the newest versions available; to be looked at before a release."""
    extra = () if framework == "core" else (framework,)
    groups = ("test", *(f"test-{name}" for name in extra))
    install(session, *extra, "conformance", "weights", groups=groups)
    folders = (f"tests/{framework}",) if extra else ("tests/core", "tests/conformance")
    session.run("pytest", *IN_PARALLEL, *folders, *session.posargs, env=QUIET)


@nox.session(default=False)
@nox.parametrize("framework", [nox.param(name, id=name) for name in ("torch", "tensorflow")])
def models(session: nox.Session, framework: str) -> None:
    """Plan third-party models, judge each unit by the outputs it feeds, and write docs/models."""
    groups = (f"pinned-{framework}", f"models-{framework}")
    install(session, framework, "conformance", groups=groups)
    if framework == "torch":
        install_peers(session)
    else:
        alone = nox.project.dependency_groups(PYPROJECT, "models-tensorflow-alone")
        session.install("--no-deps", *alone)
    name = "keras" if framework == "tensorflow" else framework
    session.run("python", f"docs/models/{name}.py", "--out", f"docs/models/{name}.json", env=QUIET)


@nox.session(default=False)
def integrations(session: nox.Session) -> None:
    """Run AGC and SAM in other people's trainers, and loggers offline: the real packages."""
    groups = ("test", "pinned-torch", "integrations")
    install(session, "torch", "conformance", "weights", groups=groups)
    install_peers(session)
    # Trainers warn of many things: unused cores, folders that exist, functions of older releases.
    environment = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    session.run("pytest", "-Wdefault", "tests/integrations", *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's formatter and linter; and which package may import which, by import-linter."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    sources = os.pathsep.join(str(ROOT / folder) for folder in (".", "adapters", "conformance"))
    session.run("lint-imports", env={"PYTHONPATH": sources})


@nox.session
def typing(session: nox.Session) -> None:
    """Types: mypy, strict."""
    install(session, "conformance", groups=("typing",))
    session.run("mypy", *session.posargs)


@nox.session
def teeth(session: nox.Session) -> None:
    """Let wrong implementations loose on the vectors: each must be caught."""
    install(session, "conformance")
    session.run("agc", "conformance", "teeth", *session.posargs)


@nox.session(default=False)
def triton(session: nox.Session) -> None:
    """Run AGC's GPU kernels in Triton's interpreter, and compile them for GPUs; none is needed."""
    install(session, "torch", "conformance", groups=("test", "pinned-torch", "triton"))
    cache = {"TRITON_CACHE_DIR": session.create_tmp()}
    interpreted = {**cache, "TRITON_INTERPRET": "1"}
    tests = ("tests/triton/test_interpreted.py", "tests/triton/test_processes.py")
    session.run("pytest", *tests, *session.posargs, env=interpreted)
    session.run("pytest", "tests/triton/test_compiled.py", *session.posargs, env=cache)


@nox.session(default=False)
def conformance_tpu(session: nox.Session) -> None:
    """Compile AGC's JAX programs for TPUs, on a machine that need not have one."""
    install(session, "jax", "conformance", groups=("pinned-jax", "tpu"))
    out = "conformance/results/tpu-aot.json"
    session.run("python", "-m", "agc_conformance.compiled", "tpu", "--out", out, env=QUIET)


@nox.session(default=False)
def conformance_gpu(session: nox.Session) -> None:
    """Compile AGC's JAX programs for a GPU, on a machine that need not have one."""
    install(session, "jax", "conformance", groups=("pinned-jax", "gpu"))
    out = "conformance/results/gpu-aot.json"
    session.run("python", "-m", "agc_conformance.compiled", "gpu", "--out", out, env=QUIET)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Speed, side by side with the peers, in one environment and one run."""
    pinned = tuple(f"pinned-{framework}" for framework in FRAMEWORKS)
    install(session, *FRAMEWORKS, "conformance", groups=("test", "bench", *pinned))
    install_peers(session)
    # Its Python part does without the operators, which are of another build of PyTorch.
    session.install("--no-deps", *nox.project.dependency_groups(PYPROJECT, "peers-data"))
    session.run("python", "-m", "benchmarks", *session.posargs, env=QUIET)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation as HTML in docs/_build."""
    install(session, groups=("docs",))
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build")


@nox.session
def build(session: nox.Session) -> None:
    """Sdist, then wheel, then a clean environment that imports it from another folder."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        # Without flags, ``build`` makes the wheel from the sdist, as a user's machine would.
        session.run("python", "-m", "build", "--outdir", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        (sdist,) = Path(folder).glob("*.tar.gz")
        session.log(f"{sdist.name} and {wheel.name}")
        session.install("--force-reinstall", f"{wheel}[conformance]")
        session.chdir(folder)
        session.run("agc", "--version")
        run = ("run", "--backend", "reference", "--no-train", "--no-models", "--out", "r.jsonl")
        session.run("agc", "conformance", *run)
        session.run("agc", "conformance", "report", "r.jsonl", "--out", "report")
        session.run("python", "-c", CHECK_WHEEL, *PACKAGES)


CHECK_WHEEL = """
import importlib.metadata, importlib.util, pathlib, re, sys
page = importlib.metadata.metadata("agc-sam").get_payload()
assert "specified once" in page and not re.search(r"\\]\\((?!https?:|#)|<!--", page), page
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not in the wheel"
    folder = pathlib.Path(spec.origin).parent
    assert "site-packages" in folder.parts, f"{name} was imported from {folder}"
    assert (folder / "py.typed").exists(), f"{name} has no py.typed"
    if name == "agc_conformance":
        assert list(folder.glob("vectors/v1/*.json")), "no vectors in the wheel"
print("the wheel holds", *sys.argv[1:])
"""
