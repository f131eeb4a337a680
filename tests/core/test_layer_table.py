"""A table of layer types, looked up along the class hierarchy by dotted class name."""

import pytest

from agc import Units
from agc.errors import ParameterError, UnitsError
from agc.layer_table import LayerTable, class_path, first_match

HERE = __name__


class Dense:
    outputs = 3


class Sub(Dense):
    pass


class Other:
    pass


@pytest.fixture
def table():
    return LayerTable({"kernel": "i o -> o"})


def test_a_class_speaks_for_its_subclasses_until_they_speak_themselves(table):
    table.register(Dense, {"kernel": "i o -> o"})
    assert table.of(Sub()) == table.of(Dense()) == {"kernel": Units("i o -> o")}
    table.register(Sub, {"bias": "... ->"})
    assert table.of(Sub()) == {"bias": Units("... ->")}
    assert table.of(Other()) == {}


def test_a_class_by_its_dotted_name_is_the_same_row(table):
    table.register(f"{HERE}.Dense", {"kernel": "i o -> o"})
    assert list(table.of(Dense())) == ["kernel"]
    table.register(Dense, {"weight": "o i -> o"})
    assert list(table.of(Dense())) == ["weight"]
    assert class_path(Dense) == f"{HERE}.Dense"


def test_a_glob_speaks_for_names_that_no_class_of_its_own_speaks_for(table):
    table.register(f"{HERE}.*", {"kernel": "o i -> o", "table": "v d -> v"})
    table.register(Dense, {"kernel": "i o -> o"})
    assert table.of(Dense()) == {"kernel": Units("i o -> o"), "table": Units("v d -> v")}
    assert table.of(Other())["kernel"] == Units("o i -> o")


def test_the_first_of_several_globs_decides(table):
    table.register(f"{HERE}.*er", {"kernel": "i o -> o"})
    table.register(f"{HERE}.*", {"kernel": "o i -> o"})
    assert table.of(Other()) == {"kernel": Units("i o -> o")}
    assert table.of(Dense()) == {"kernel": Units("o i -> o")}


def test_a_rule_may_be_a_function_of_the_layer(table):
    table.register(Dense, lambda layer: {"kernel": f"(g={layer.outputs} i) o -> g o"})
    assert table.of(Sub()) == {"kernel": Units("(g i) o -> g o", g=3)}


def test_objects_of_a_class_of_the_adapter_are_kept():
    class Expected:
        pass

    expected = Expected()
    table = LayerTable({"kernel": "i o -> o"}, keep=Expected)
    table.register(Dense, lambda layer: {"kernel": expected, "bias": "... ->"})
    assert table.of(Dense()) == {"kernel": expected, "bias": Units("... ->")}


def test_changes_are_counted(table):
    before = table.changes
    table.register(Dense, {"kernel": "i o -> o"})
    assert table.changes == before + 1


def test_what_is_no_rule_is_refused(table):
    with pytest.raises(ParameterError, match=r"such as \{'kernel': 'i o -> o'\}, or a function"):
        table.register(Dense, "i o -> o")
    with pytest.raises(UnitsError, match="'->' is missing"):
        table.register(Dense, {"kernel": "i o"})
    assert table.changes == 0


def test_the_first_glob_that_matches_decides():
    rows = {"lora_?": 1, "*": 2}
    assert (first_match(rows, "lora_a"), first_match(rows, "bias")) == (1, 2)
    assert first_match({"kernel": 1}, "bias") is None
