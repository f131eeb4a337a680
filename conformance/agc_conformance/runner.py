"""Running: one vector after the other, in one backend, on one device."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

import agc.errors
from agc.backend import Backend, Layer, Optimizer, Outcome, Problem, Unavailable, Unsupported
from agc.config import AGC, SAM
from agc.errors import AGCError, ConfigError, UnitsWarning
from agc.plan import Parameter, Plan, make_plan
from agc.reference import RowSparse, Stats
from agc.selectors import perturbed_names
from agc.units import Units
from agc_conformance.bind import Bound, bind, decode_rule
from agc_conformance.compare import (
    Verdict,
    accumulation_dtype,
    compare_gradient,
    compare_stats,
    compare_weights,
)
from agc_conformance.data import decode_numbers, decode_values, dtype_of
from agc_conformance.records import ResultRecord, Role, Status, make_result
from agc_conformance.reference_backend import ReferenceBackend
from agc_conformance.sharpness.problems import sam_rule
from agc_conformance.sharpness.run import ask_sharpness
from agc_conformance.vectors import Vector

__all__ = [
    "CORE",
    "Core",
    "backend_names",
    "cases",
    "describe",
    "load_backend",
    "role_of",
    "run_case",
]

Array = npt.NDArray[Any]


class Core:
    """The part of the library that level 0 asks; a class, so that it can be made wrong on purpose."""

    def config(self, data: Mapping[str, Any]) -> AGC:
        """Build a configuration from data."""
        return AGC.from_dict(data)

    def units(self, pattern: str, sizes: Mapping[str, int]) -> Units:
        """Parse a units pattern."""
        return Units(pattern, **sizes)

    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        """Make a plan."""
        return make_plan(parameters, rule, head=head)

    def sam(self, data: Mapping[str, Any]) -> SAM:
        """Build a configuration of SAM from data."""
        return sam_rule(data)

    def perturbed(self, names: Sequence[str], rule: SAM) -> Sequence[str]:
        """Select what SAM perturbs."""
        return perturbed_names(names, rule)


CORE: Final = Core()
LAYOUTS: Final[tuple[str, ...]] = ("torch", "flax", "keras")


def backend_names() -> list[str]:
    """Names of the backends that are registered, the reference first."""
    return ["reference", *sorted(point.name for point in entry_points(group="agc.backends"))]


def load_backend(spec: str, device: str) -> Backend:
    """Build a backend.

    Parameters
    ----------
    spec : str
        A registered name, ``package.module:object`` or ``path/to/file.py:object``. The object is called with
        ``device=device``, unless it is a backend already.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"tpu"``.

    Raises
    ------
    Unavailable
        If a package or the device is not there.
    ConfigError
        If there is no such backend, or it is none, or raises something else.
    """
    found = ReferenceBackend if spec == "reference" else _find(spec)
    if not isinstance(found, type) and hasattr(found, "clip"):  # it has been made already
        backend, there = found, getattr(found, "device", device)
        if isinstance(there, str) and there != device:
            raise Unavailable(f"{spec} is made for {there}, not for {device}")
    else:
        with _loading(spec, f"called with device={device!r}"):
            backend = found(device=device)
    _check(spec, backend)
    return cast(Backend, backend)


def _find(spec: str) -> Any:
    """Import what is to be a backend, or makes one."""
    where, colon, name = spec.rpartition(":")
    if colon:
        with _loading(spec, "imported"):
            module = (
                _from_file(spec, Path(where)) if where.endswith(".py") else _import(spec, where)
            )
        if not hasattr(module, name):
            raise ConfigError(f"--backend {spec}: {where} has no {name!r}")
        return getattr(module, name)
    found = [p for p in entry_points(group="agc.backends") if p.name == spec]
    if not found:
        raise ConfigError(
            f"--backend {spec}: not registered; there are {', '.join(backend_names())}, "
            "or name your own as package.module:object"
        )
    with _loading(spec, "imported"):
        return found[0].load()


@contextmanager
def _loading(spec: str, when: str) -> Iterator[None]:
    """Say in one line what somebody else's code raises."""
    try:
        yield
    except (Unavailable, _Misnamed):
        raise
    except ImportError as error:
        raise Unavailable(f"cannot import: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--backend {spec}: {when}, it raises {describe(error)}") from error


class _Misnamed(ConfigError):
    """A backend's name leads nowhere."""


def _import(spec: str, where: str) -> Any:
    if not all(part.isidentifier() for part in where.split(".")):
        raise _Misnamed(
            f"--backend {spec}: {where!r} is no module; give package.module:object or path/to/file.py:object"
        )
    try:
        return import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(error.name + ".")):
            raise _Misnamed(f"--backend {spec}: there is no module {error.name!r}") from None
        raise


def _from_file(spec: str, path: Path) -> Any:
    found = spec_from_file_location(path.stem, path)
    if not path.is_file() or found is None or found.loader is None:
        raise _Misnamed(f"--backend {spec}: there is no such Python file")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _check(spec: str, backend: Any) -> None:
    """Raise unless an object has what the suite asks for before the first vector."""
    missing = [n for n in vars(Backend) if not n.startswith("_") and not hasattr(backend, n)]
    if missing:
        raise ConfigError(
            f"--backend {spec}: {type(backend).__name__} has no {', '.join(missing)}; "
            "derive it from agc.backend.Backend"
        )
    with _loading(spec, "asked for its versions and device"):
        backend.versions()
        backend.device_name()
    if backend.layout not in LAYOUTS:
        raise ConfigError(
            f"--backend {spec}: layout must be one of {', '.join(LAYOUTS)}, got {backend.layout!r}"
        )


def role_of(backend: Backend) -> Role:
    """Return ``"subject"`` for code that is only looked at, else ``"backend"``."""
    return cast(Role, getattr(backend, "role", "backend"))


def cases(
    vectors: Sequence[Vector], *, select: str | None = None, full: bool = False, core: bool = True
) -> list[tuple[Vector, str]]:
    """Return the vectors and dtypes to run.

    Parameters
    ----------
    vectors : sequence of Vector
        All vectors.
    select : str, optional
        Glob on ids, clauses or flags.
    full : bool, default False
        Also the dtypes that say little new.
    core : bool, default True
        Also vectors that ask the core of this library and no backend.
    """

    def chosen(vector: Vector) -> bool:
        names = (vector.id, vector.clause, *vector.flags)
        return select is None or any(fnmatchcase(name, select) for name in names)

    return [
        (vector, dtype)
        for vector in vectors
        if chosen(vector) and (core or not vector.asks_core)
        for dtype in vector.dtypes(full=full)
    ]


def run_case(backend: Backend, vector: Vector, dtype: str) -> ResultRecord:
    """Run one vector in one dtype. Whatever the backend raises becomes a record."""
    start = time.perf_counter()
    verdict = Verdict()
    status: Status = "passed"
    try:
        verdict = _run(backend, vector, dtype)
        if verdict.problem:
            status = "failed"
    except Unsupported as reason:
        status, verdict.problem = "unsupported", str(reason)
    except (Exception, SystemExit) as error:
        status, verdict.problem = "error", describe(error)
    return make_result(
        vector.id,
        clause=vector.clause,
        level=vector.level,
        flags=vector.flags,
        dtype=dtype,
        status=status,
        max_ulp=verdict.max_ulp,
        histogram=verdict.histogram,
        detail=verdict.problem[:600],
        seconds=time.perf_counter() - start,
    )


def describe(error: BaseException) -> str:
    """Return one line about an exception: its type, its first line, and where it comes from."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"


def _run(backend: Backend, vector: Vector, dtype: str) -> Verdict:
    core: Core = getattr(backend, "core", CORE)
    ask: dict[str, Callable[[], Verdict]] = {
        "config": lambda: _config(core.config, vector),
        "sam-config": lambda: _config(core.sam, vector),
        "sam-select": lambda: _select(core, vector),
        "units": lambda: _units(core, vector),
        "plan": lambda: _plan(core, vector),
        "layer": lambda: _layer(backend, vector),
    }
    if vector.kind in ask:
        return _refusal(vector, ask[vector.kind])
    missing = sorted(set(dtype.split("/")) - set(backend.dtypes))
    if missing:
        raise Unsupported(f"the backend does not take {', '.join(missing)}")
    if vector.kind.startswith("sharp"):
        return _refusal(vector, lambda: ask_sharpness(backend, vector, dtype))
    bound = bind(vector, backend.layout, dtype)
    if vector.kind == "trajectory":
        return _trajectory(backend, bound)
    return _refusal(vector, lambda: _clip(backend, bound))


def _refusal(vector: Vector, ask: Callable[[], Verdict]) -> Verdict:
    """Ask, and expect the error that the vector wants if it wants one."""
    wanted = vector.data["expect"].get("error")
    if wanted is None:
        return ask()
    try:
        ask()
    except getattr(agc.errors, wanted) as error:
        lost = [part for part in vector.data["expect"]["message"] if part not in str(error)]
        return Verdict(f"the message {str(error)!r} does not name {lost}" if lost else "")
    except AGCError as error:
        return Verdict(f"{wanted} was expected, not {type(error).__name__}: {error}")
    return Verdict(f"{wanted} was expected; nothing was raised")


def _config(read: Callable[[Mapping[str, Any]], AGC | SAM], vector: Vector) -> Verdict:
    rule = read(decode_rule(vector.data["rule"]))
    want = vector.data["expect"].get("rule")
    if want is None:
        return Verdict()
    have = rule.to_dict()
    if have != want:
        return Verdict(f"read as {have}, not {want}")
    again = read(have)
    if again != rule or hash(again) != hash(rule):
        return Verdict(f"{rule} became {again} on a round trip through a dict")
    return Verdict()


def _select(core: Core, vector: Vector) -> Verdict:
    data, want = vector.data, vector.data["expect"]
    have = list(core.perturbed(data["names"], sam_rule(data["rule"])))
    return Verdict("" if have == want.get("names", have) else f"perturbs {have}, not {want}")


def _units(core: Core, vector: Vector) -> Verdict:
    data, want = vector.data, vector.data["expect"]
    axes = core.units(data["pattern"], data["sizes"]).bind(tuple(data["shape"]))
    have = {
        "view": list(axes.view),
        "reduce": list(axes.reduce),
        "keep": list(axes.keep),
        "count": axes.count,
    }
    return Verdict("" if "error" in want or have == want else f"bound as {have}, not {want}")


def _plan(core: Core, vector: Vector) -> Verdict:
    data, want = vector.data, vector.data["expect"]
    parameters = [
        Parameter(
            p["name"],
            tuple(p["shape"]),
            Units(p["units"]) if "units" in p else None,
            p.get("layout"),
        )
        for p in data["parameters"]
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnitsWarning)
        plan = core.plan(parameters, AGC.from_dict(data["rule"]), data["head"])
    have = {e.name: [e.count, e.clipping, e.excluded, e.source] for e in plan}
    if have != want.get("entries", have):
        return Verdict(f"planned {have}, not {want}")
    said = " ".join(str(warning.message) for warning in caught)
    missing = [name for name in want.get("warned", ()) if repr(name) not in said]
    if missing or (caught and not want.get("warned")):
        return Verdict(
            f"the warning about units should name {missing or 'nothing'}, it says: {said!r}"
        )
    return Verdict()


def _layer(backend: Backend, vector: Vector) -> Verdict:
    layer = Layer(vector.data["layer"]["kind"], vector.data["layer"]["sizes"])
    plan = backend.layer_plan(layer, AGC.from_dict(vector.data["rule"]))
    weights = [entry for entry in plan if not entry.units.whole]
    elements = sum(int(np.prod(entry.shape)) for entry in weights)
    have, want = [elements, sum(e.count for e in weights)], vector.data["expect"]["totals"]
    if have in want:
        return Verdict()
    table = "; ".join(f"{e.name} {list(e.shape)} {e.units} ({e.count})" for e in plan)
    return Verdict(f"{have[0]} elements in {have[1]} units, not {want}: {table}")


def _clip(backend: Backend, bound: Bound) -> Verdict:
    vector, problem = bound.vector, bound.problem
    effective = dict(problem.gradients)
    if vector.kind == "scenario":
        settings = dict(vector.data["settings"])
        if "micro" in settings:
            settings["micro"] = [
                {name: bound.stored(name, data, bound.dtype) for name, data in one.items()}
                for one in settings["micro"]
            ]
        if "scale" in settings:
            effective = {
                name: None if value is None else value / np.asarray(settings["scale"], value.dtype)
                for name, value in problem.gradients.items()
                if not isinstance(value, RowSparse)
            }
        outcome = backend.scenario(vector.data["scenario"], _copy(problem), settings)
    else:
        outcome = backend.clip(_copy(problem))
    if "error" in vector.data["expect"]:
        return Verdict()
    return _compare(bound, effective, outcome)


def _copy(problem: Problem) -> Problem:
    """Copy the arrays, so that a backend that clips in place cannot change what it is compared with."""
    return replace(
        problem,
        parameters={name: value.copy() for name, value in problem.parameters.items()},
        gradients={
            name: replace(value, indices=value.indices.copy(), values=value.values.copy())
            if isinstance(value, RowSparse)
            else None
            if value is None
            else value.copy()
            for name, value in problem.gradients.items()
        },
    )


def _compare(bound: Bound, effective: Mapping[str, Any], outcome: Outcome) -> Verdict:
    verdict = Verdict()
    expect = bound.vector.data["expect"]
    nonfinite = bound.problem.rule.nonfinite
    strange = sorted(set(outcome.gradients) - set(expect["gradients"]))
    if strange:
        return Verdict(f"gradients came back for {strange}, which are no parameters")
    for name, expected in expect["gradients"].items():
        got, was = outcome.gradients.get(name), effective[name]
        if expected == "absent":
            if got is not None:
                verdict.add(Verdict(f"{name}: had no gradient, and one came back"))
            continue
        if got is None:
            verdict.add(Verdict(f"{name}: no gradient came back"))
            continue
        if isinstance(was, RowSparse):
            verdict.add(_compare_sparse(name, got, was, expected, bound.dtype, nonfinite))
            continue
        if isinstance(got, RowSparse):
            verdict.add(Verdict(f"{name}: a dense gradient came back sparse"))
            continue
        verdict.add(
            compare_gradient(
                name,
                bound.canonical(name, np.asarray(got)),
                bound.canonical(name, was),
                expected,
                dtype=bound.dtype,
                nonfinite=nonfinite,
            )
        )
    for name, expected in expect.get("stats", {}).items():
        if outcome.stats is None:
            if bound.vector.clause == "AGC-11" and not verdict.problem:
                raise Unsupported("no telemetry")
            break
        found: Stats | None = outcome.stats.get(name)
        near = _near(expect["gradients"][name], bound.dtype)
        verdict.add(compare_stats(name, found, expected, near, dtype=bound.dtype))
    return verdict


def _near(expected: Mapping[str, Any], dtype: str) -> int:
    """Units whose norm is so close to the limit that either decision is right."""
    norm, limit = (decode_numbers(expected[key]) for key in ("gradient_norm", "limit"))
    with np.errstate(invalid="ignore"):
        close = np.abs(norm - limit) <= 4 * float(np.finfo(accumulation_dtype(dtype)).eps) * limit
    return int(close.sum())


def _compare_sparse(
    name: str,
    got: Any,
    was: RowSparse,
    expected: Mapping[str, Any] | str,
    dtype: str,
    nonfinite: str,
) -> Verdict:
    if not isinstance(got, RowSparse):
        return Verdict(f"{name}: a row-sparse gradient came back dense")
    if tuple(got.shape) != tuple(was.shape):
        return Verdict(f"{name}: came back with shape {got.shape}, not {was.shape}")
    if got.values.dtype != dtype_of(dtype):
        return Verdict(f"{name}: the gradient came back in {got.values.dtype}, not {dtype}")
    have, want = got.coalesce(), was.coalesce()
    if have.indices.tolist() != want.indices.tolist():
        return Verdict(
            f"{name}: rows {have.indices.tolist()} came back, not {want.indices.tolist()}"
        )
    return compare_gradient(
        name, have.values, want.values, expected, dtype=dtype, nonfinite=nonfinite
    )


def _trajectory(backend: Backend, bound: Bound) -> Verdict:
    data = bound.vector.data
    gradients = [
        {name: bound.stored(name, value, bound.dtype) for name, value in one.items()}
        for one in data["gradients"]
    ]
    got = backend.trajectory(_copy(bound.problem), Optimizer(**data["optimizer"]), gradients)
    want = data["expect"]["weights"]
    if len(got) != len(want):
        return Verdict(f"{len(got)} steps came back, not {len(want)}")
    verdict = Verdict()
    for p in data["parameters"]:
        name, shape = p["name"], tuple(p["axes"].values())
        missing = [step for step, weights in enumerate(got) if name not in weights]
        if missing:
            return Verdict(f"{name}: no weights came back at step {missing[0]}")
        verdict.add(
            compare_weights(
                name,
                [bound.canonical(name, np.asarray(weights[name])) for weights in got],
                [decode_values(weights[name], shape) for weights in want],
                decode_values(p["weight"], shape),
                dtype=bound.dtype,
            )
        )
    return verdict
