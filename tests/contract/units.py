"""Units that a model settles: the table of layer types, the head, and the examples of the docs."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agc import AGC, Plan, Units
from agc.errors import AmbiguousUnitsError, SelectorError, UnitsError
from tests.contract import Contract


class UnitsContract(Contract):
    """Units of parameters.

    Attributes
    ----------
    unknown : str
        How an error calls the weight of a layer that is not in the table.
    """

    unknown: str

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"module": self.documented()}

    def documented(self) -> list[str]:
        """Return the modules of the adapter that have examples."""
        package = Path(str(self.driver.adapter.__file__)).parent
        texts = {path.stem: path.read_text(encoding="utf-8") for path in package.glob("*.py")}
        return sorted(name for name, text in texts.items() if ">>> " in text)

    @pytest.fixture
    def registry(self, monkeypatch):
        """Forget what a test registers."""
        table = importlib.import_module(f"{self.driver.adapter.__name__}.layers").TABLE
        monkeypatch.setattr(table, "_by_class", dict(table._by_class))

    def plan(self, model: Any, **options: Any) -> Plan:
        return self.driver.adapter.plan(model, AGC(**options))

    def excluded(self, model: Any, profile: str) -> list[str]:
        plan = self.driver.adapter.plan(model, AGC.profile(profile))
        return [entry.name for entry in plan if entry.excluded]

    def test_an_own_layer_is_registered(self, registry):
        register, own = self.driver.adapter.register_units, self.driver.own_layer((2, 3, 4))

        class Heir(own):
            kept = "b"

        def counts() -> list[int]:
            return [self.plan(layer())["table"].count for layer in (own, Heir)]

        with pytest.raises(AmbiguousUnitsError, match=rf"{self.unknown}.* shape \(2, 3, 4\)"):
            counts()
        assert self.plan(own(), exclude=["table"])["table"].excluded
        assert dict(self.driver.adapter.units(own())) == {"table": None}
        register(own, {"tab*": Units("a b c -> a c")})
        assert counts() == [8, 8]
        register(Heir, lambda layer: {"table": f"a b c -> {layer.kept}"})
        assert counts() == [8, 3]
        register(f"{Heir.__module__}.{Heir.__qualname__}", {"table": "... ->"})
        assert counts() == [8, 1]

    def test_registered_units_that_do_not_fit_name_the_parameter(self, registry):
        own = self.driver.own_layer((2, 3))
        self.driver.adapter.register_units(own, {"table": "a b c -> a"})
        with pytest.raises(UnitsError, match=r"parameter 'table'.*\(2, 3\)"):
            self.plan(own())

    def test_the_head_that_a_model_declares(self):
        model = self.driver.two_layers()
        with pytest.raises(SelectorError, match="needs the name of the classifier layer"):
            self.excluded(model, "paper")
        last = list(self.plan(model))[2:]
        model.agc_head = last[0].name.rpartition(".")[0]
        assert self.excluded(model, "paper") == [entry.name for entry in last]
        (weight,) = (entry.name for entry in last if len(entry.shape) == 2)
        assert self.excluded(model, "deepmind") == [weight]

    def test_examples_in_docstrings(self, module, registry):
        name = self.driver.adapter.__name__ + ("" if module == "__init__" else f".{module}")
        examples = doctest.testmod(importlib.import_module(name))
        assert examples.attempted > 0
        assert examples.failed == 0
