"""What importing an adapter needs and loads, and what it offers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from tests.contract import Contract

FRAMEWORKS = {"torch", "jax", "flax", "optax", "haiku", "equinox", "tensorflow", "keras"}
ADAPTERS = {"agc_torch", "agc_jax", "agc_tensorflow"}
SHARED = {
    *("NFNet", "SamStats", "Stats", "Verification", "from_neutral", "nfnet", "plan"),
    *("register_units", "sgd_nfnet", "to_neutral", "units", "verify_sam"),
}
LOAD = """
import importlib, sys
needed, *modules = sys.argv[1:]
for name in needed.split():
    importlib.import_module(name)  # and what it loads where that is installed
before = {*sys.modules}
for name in modules:
    importlib.import_module(name)
    print(*{module.partition(".")[0] for module in {*sys.modules} - before})
"""
LOAD_WITHOUT = """
import importlib, sys
sys.modules[sys.argv[1]] = None  # what an absent package looks like
importlib.import_module(sys.argv[2])
"""


class PackageContract(Contract):
    """A package.

    Attributes
    ----------
    needed : tuple of str
        Packages that it cannot be imported without.
    """

    needed: tuple[str, ...]

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"package": self.needed, "public": self.driver.adapter.__all__}

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_no_other_framework_is_loaded(self):
        adapter = self.driver.adapter.__name__
        backend = f"agc_conformance.backends.{adapter.removeprefix('agc_')}.backend"
        done = self.python(LOAD, " ".join(self.needed), adapter, backend)
        assert done.returncode == 0, done.stderr
        by_adapter, by_backend = (set(line.split()) for line in done.stdout.splitlines())
        others = FRAMEWORKS.difference(self.needed) | ADAPTERS - {adapter}
        assert adapter in by_adapter
        assert not by_adapter & {*others, "agc_conformance"}
        assert not by_backend & others

    def test_a_missing_package_names_the_extra(self, package):
        adapter = self.driver.adapter.__name__
        extra = adapter.removeprefix("agc_")
        for module in (adapter, f"agc_conformance.backends.{extra}.backend"):
            done = self.python(LOAD_WITHOUT, package, module)
            assert done.returncode == 1
            *_, message = done.stderr.splitlines()
            assert message.startswith(f"ImportError: {adapter} needs ")
            assert f'pip install "agc-sam[{extra}]"' in message

    def test_public_names_are_documented(self, public):
        assert getattr(self.driver.adapter, public).__doc__

    def test_what_every_adapter_offers(self):
        assert set(self.driver.adapter.__all__) >= SHARED
