"""Finding and building a backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final, cast

from agc.errors import ConfigError
from agc_conformance.backend import Backend, Unavailable
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.records import Role, describe
from agc_conformance.verdict import LIMITS

__all__ = ["backend_names", "load_backend", "role_of"]

LAYOUTS: Final[tuple[str, ...]] = ("torch", "flax", "keras")


def backend_names() -> list[str]:
    """Return the names of the registered backends, the reference first."""
    return ["reference", *sorted({point.name for point in entry_points(group="agc.backends")})]


def load_backend(spec: str, device: str) -> Backend:
    """Build a backend.

    Parameters
    ----------
    spec : str
        A registered name, ``package.module:object`` or ``path/to/file.py:object``. The object is
        called with ``device=device``, unless it is a backend already.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"tpu"``.

    Raises
    ------
    Unavailable
        If a package is not installed, or the machine does not have the device.
    ConfigError
        If there is no such backend, if the object is not a backend, or if building it raises
        anything else.
    """
    target = ReferenceBackend if spec == "reference" else _find(spec)
    if not isinstance(target, type) and hasattr(target, "clip"):  # an instance of a backend
        backend, made_for = target, getattr(target, "device", device)
        if isinstance(made_for, str) and made_for != device:
            raise Unavailable(f"{spec} is made for {made_for}, not for {device}")
    else:
        with _loading(spec, f"called with device={device!r}"):
            backend = target(device=device)
    _check(spec, backend)
    return cast(Backend, backend)


def _find(spec: str) -> Any:
    """Import the backend, or the callable that builds it."""
    where, colon, name = spec.rpartition(":")
    if colon:
        with _loading(spec, "imported"):
            module = (
                _from_file(spec, Path(where)) if where.endswith(".py") else _import(spec, where)
            )
        if not hasattr(module, name):
            raise ConfigError(f"--backend {spec}: {where} has no {name!r}")
        return getattr(module, name)
    if spec.endswith(".py"):
        raise ConfigError(f"--backend {spec}: name the backend in the file too: {spec}:object")
    points = [p for p in entry_points(group="agc.backends") if p.name == spec]
    if not points:
        raise ConfigError(
            f"--backend {spec}: not registered; there are {', '.join(backend_names())}, "
            "or name your own as package.module:object or path/to/file.py:object"
        )
    if len({point.value for point in points}) > 1:
        values = " and ".join(f"{p.value} (of {p.dist.name if p.dist else '?'})" for p in points)
        raise ConfigError(f"--backend {spec}: several are registered: {values}; give one of these")
    with _loading(spec, "imported"):
        return points[0].load()


@contextmanager
def _loading(spec: str, when: str) -> Iterator[None]:
    """Turn an exception of third-party code into a one-line error."""
    try:
        yield
    except (Unavailable, _Misnamed):
        raise
    except ImportError as error:
        raise Unavailable(f"cannot import: {error}") from error
    except (Exception, SystemExit) as error:
        called = isinstance(error, TypeError) and when.startswith("called")
        hint = "; give a class of backends, which accepts device=, or an instance" if called else ""
        raise ConfigError(f"--backend {spec}: {when}, it raises {describe(error)}{hint}") from error


class _Misnamed(ConfigError):
    """A backend's name refers to nothing."""


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
    file = spec_from_file_location(path.stem, path)
    if not path.is_file() or file is None or file.loader is None:
        raise _Misnamed(f"--backend {spec}: there is no such Python file")
    module = module_from_spec(file)
    file.loader.exec_module(module)
    return module


def _check(spec: str, backend: Any) -> None:
    """Raise unless an object has everything that the suite needs before the first vector."""
    missing = [n for n in vars(Backend) if not n.startswith("_") and not hasattr(backend, n)]
    if missing:
        raise ConfigError(
            f"--backend {spec}: {type(backend).__name__} has no {', '.join(missing)}; "
            "derive it from agc_conformance.backend.Backend"
        )
    with _loading(spec, "asked for its versions and device"):
        versions, device = backend.versions(), backend.device_name()
    named = {"name": backend.name, "device_name()": device}
    for what, value in named.items():
        if not isinstance(value, str):
            raise ConfigError(f"--backend {spec}: {what} must be a str, got {value!r}")
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise ConfigError(
            f"--backend {spec}: versions() must be a dict of package to version, both str, "
            f"got {versions!r}"
        )
    if backend.layout not in LAYOUTS:
        raise ConfigError(
            f"--backend {spec}: layout must be one of {', '.join(LAYOUTS)}, got {backend.layout!r}"
        )
    unknown = sorted(set(backend.dtypes) - LIMITS.keys())
    if unknown or isinstance(backend.dtypes, str):
        raise ConfigError(
            f"--backend {spec}: dtypes must be a set of {', '.join(LIMITS)}, got {backend.dtypes!r}"
        )
    lost = [path for path in backend.paths if not hasattr(backend, f"scenario_{path}")]
    if lost:
        raise ConfigError(
            f"--backend {spec}: paths must be a tuple of scenarios, got {backend.paths!r}; "
            f"there is no method scenario_{lost[0]}"
        )


def role_of(backend: Backend) -> Role:
    """Return ``"subject"`` for code that need not conform, else ``"backend"``."""
    return cast(Role, getattr(backend, "role", "backend"))
