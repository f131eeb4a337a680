"""Optional packages: imported when a feature needs them; an error names their extra."""

from __future__ import annotations

import importlib
from typing import Any

from agc.errors import MissingPackageError

__all__ = ["missing", "need"]


def need(package: str, what: str, extra: str = "weights") -> Any:
    """Import an optional package.

    Raises
    ------
    MissingPackageError
        If it is not installed; the message says what needs it, and names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs {package.partition('.')[0]}, which cannot be imported ({error}); "
            f'try: pip install "agc-sam[{extra}]"'
        ) from error


def missing(what: str, cause: ImportError, extra: str) -> MissingPackageError:
    """Return the error for something that cannot be imported; it names the extra."""
    if not isinstance(cause, ModuleNotFoundError):  # says itself what to do, as an adapter's does
        return MissingPackageError(f"{what} cannot be imported: {cause}")
    return MissingPackageError(
        f"{what} needs packages that are not installed ({cause}); "
        f'try: pip install "agc-sam[{extra}]"'
    )
