"""Import what needs torchvision where it has no build for PyTorch.

timm's models import it, but do not use it. Of torchvision itself, what is Python and Pillow works.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["import_timm", "timm_model", "torchvision_part"]


class _Anything(type):
    """A class whose every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: the module needs no code."""


def import_timm() -> Any:
    """Return the package, with or without torchvision."""
    if find_spec("torchvision") is None:
        sys.meta_path.insert(0, _Finder())
    else:
        torchvision_part("ops")
    import timm

    return timm


def torchvision_part(name: str) -> Any:
    """Return a module of torchvision, whose own operators need not be there."""
    try:
        return import_module(f"torchvision.{name}")
    except RuntimeError:  # what describes the operators does not find them
        describes = "torchvision._meta_registrations"
        sys.modules[describes] = ModuleType(describes)
        return import_module(f"torchvision.{name}")


def timm_model(name: str) -> Any:
    """Return an untrained model of timm."""
    return import_timm().create_model(name)
