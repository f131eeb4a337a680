"""Plans: proposals, rank rules and documents; the suite's level 0 has what rules select."""

import json
import pickle

import numpy as np
import pytest

from agc import AGC, SAM, Plan, Schedule, Units
from agc.errors import (
    AmbiguousUnitsError,
    ConfigError,
    FormatError,
    SelectorError,
    ShapeError,
    UnitsError,
    UnitsWarning,
)
from agc.plan import WHOLE, Parameter, make_plan
from agc.selectors import perturbed_names

DENSE = Units("o i -> o")


def model(**changes):
    """A small model, stored out-first."""
    parameters = {
        "stem.weight": Parameter("stem.weight", (8, 3, 3, 3), Units("o i ... -> o"), "out-first"),
        "stem.bias": Parameter("stem.bias", (8,), None, "out-first"),
        "fc.weight": Parameter("fc.weight", (10, 8), DENSE, "out-first"),
        "fc.bias": Parameter("fc.bias", (10,), None, "out-first"),
    }
    return list((parameters | changes).values())


def ambiguous(shape, **fields):
    return Parameter("pos", shape, **fields)


@pytest.mark.parametrize("rule", [AGC(exclude=["pos"]), AGC(clipping={"pos": None, "*": 0.01})])
def test_no_warning_of_what_is_not_clipped(rule):
    assert make_plan([ambiguous((5, 4), layout="out-first")], rule)["pos"].source == "layout"


def test_one_warning_lists_all_and_begins_with_the_cure():
    parameters = [Parameter(f"layers.{i}", (5, 4), layout="out-first") for i in range(10)]
    with pytest.warns(UnitsWarning) as caught:
        make_plan(parameters, AGC(), cure="give the model")
    (warning,) = caught
    assert "units of 10 parameter(s)" in str(warning.message)
    assert "'layers.7' (5, 4) as 'o i -> o' and 2 more. Give the model" in str(warning.message)


def test_a_name_makes_a_vector_more_units():
    dense = ambiguous((1, 7), units=Units("i o -> o"), source="name")
    plan = make_plan([dense], AGC())
    assert (plan["pos"].count, plan["pos"].source) == (7, "name")


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 4, 3), "out-first"),
        ((5, 4, 3), "out-last"),
        ((5, 4), None),
        ((3, 3, 4, 5), "out-last"),
        ((3, 3, 3, 4, 5), "out-last"),
        ((2, 2, 1, 1, 1, 1), "out-first"),
    ],
)
def test_ambiguous_shapes_are_errors_that_say_the_way_out(shape, layout):
    with pytest.raises(AmbiguousUnitsError) as caught:
        make_plan([ambiguous(shape, layout=layout, owner="PositionTable")], AGC())
    message = str(caught.value)
    assert "'pos' of PositionTable" in message
    assert str(shape) in message
    assert "AGC(units={\n        'pos': '" in message


def pasted(message):
    """The declaration that an error proposes, as Python reads it."""
    code = message[message.index("AGC(units=") : message.index("})") + 2]
    return eval(code, {"AGC": AGC})  # what a user would paste


def test_all_undecided_parameters_in_one_error_with_a_declaration_to_paste():
    parameters = [
        *(Parameter(f"blocks.{i}.temperature", (4, 3, 2), owner="Mixer") for i in range(12)),
        Parameter("pos_embed", (1, 9, 4), owner="Net"),
        Parameter("odd[0]", (4, 3, 2), layout="out-last"),
        Parameter("head.weight", (5, 4), DENSE),
    ]
    with pytest.raises(AmbiguousUnitsError) as caught:
        make_plan(parameters, AGC(), cure="give the model: model=model")
    message = str(caught.value)
    assert "'blocks.0.temperature' of Mixer with shape (4, 3, 2) and of 13 more" in message
    assert "Give the model: model=model; or declare them" in message
    rule = pasted(message)
    assert dict(rule.units.items()) == {
        "blocks.*.temperature": Units("a b c -> a"),
        "pos_embed": Units("one n d -> n"),
        "odd[0]": Units("a b c -> c"),
    }
    plan = make_plan(parameters, rule)
    assert [entry.count for entry in plan] == [4] * 12 + [9, 2, 5]


def test_a_proposed_pattern_means_undecided_parameters_only():
    """A neighbour that is settled is not declared anew by a pattern that happens to match it."""
    parameters = [
        Parameter("blocks.0.table", (4, 3, 2)),
        Parameter("blocks.1.table", (4, 3, 2)),
        Parameter("blocks.2.table", (4, 3), DENSE),
    ]
    with pytest.raises(AmbiguousUnitsError) as caught:
        make_plan(parameters, AGC())
    rule = pasted(str(caught.value))
    assert list(rule.units) == ["blocks.0.table", "blocks.1.table"]
    assert [entry.count for entry in make_plan(parameters, rule)] == [4, 4, 4]


@pytest.mark.parametrize(
    "rule",
    [
        AGC(exclude=["pos"]),
        AGC(clipping=None),
        AGC(granularity="tensor"),
        AGC(units={"pos": "... ->"}),
    ],
    ids=["excluded", "off", "tensor", "declared"],
)
def test_ambiguity_does_not_matter_where_units_do_not(rule):
    assert make_plan([ambiguous((5, 4, 3))], rule)["pos"].units == WHOLE


def test_a_shape_that_is_none_names_the_parameter():
    with pytest.raises(ShapeError, match=r"parameter 'pos': a shape .* got \(-1, 3\)"):
        make_plan([ambiguous((-1, 3), layout="out-first")], AGC())


class TestSelectors:
    def test_patterns_match_whole_names(self):
        with pytest.raises(
            SelectorError, match=r"pattern 'fc' matches no parameter, but 'fc\.\*' does;"
        ):
            make_plan(model(), AGC(exclude=["fc"]))

    def test_a_parameters_name_is_a_pattern_that_means_it_alone(self):
        """Brackets in a name are no glob, and the way out that an error shows works."""
        parameters = [Parameter(name, (5, 4, 3)) for name in ("d.a[0]", "d.a0")]
        with pytest.raises(AmbiguousUnitsError, match=r"'d\.a\[0\]': 'a b c -> a',"):
            make_plan(parameters, AGC())
        units = {"d.a[0]": "a b c -> a", "*": "a b c -> b"}
        assert [entry.count for entry in make_plan(parameters, AGC(units=units))] == [5, 4]
        plan = make_plan(parameters, AGC(units={"*": "... ->"}, exclude=["d/a[0]"]))
        assert [entry.excluded for entry in plan] == [True, False]
        clipping = {"d.a[0]": 0.5, "*": 0.25}
        plan = make_plan(parameters, AGC(units={"*": "... ->"}, clipping=clipping))
        assert [entry.clipping for entry in plan] == [0.5, 0.25]
        names = [parameter.name for parameter in parameters]
        assert perturbed_names(names, SAM(only=["d.a[0]"])) == ("d.a[0]",)
        assert perturbed_names(names, SAM(exclude=["d.a[0]"])) == ("d.a0",)

    def test_a_head_with_brackets(self):
        parameters = [Parameter("d[0].bias", (5,)), Parameter("d0.bias", (5,))]
        plan = make_plan(parameters, AGC(exclude=["@head"], head="d[0]"))
        assert [entry.excluded for entry in plan] == [True, False]

    def test_a_head_without_a_matrix(self):
        parameters = [Parameter("fc.bias", (5,)), Parameter("w", (5,))]
        with pytest.raises(SelectorError, match=r"'@head\.weight' matches no .* only fc\.bias"):
            make_plan(parameters, AGC.profile("deepmind", head="fc"))

    def test_a_head_that_is_not_there(self):
        with pytest.raises(SelectorError, match=r"'nothere\.\*' matches no parameter"):
            make_plan(model(), AGC.profile("paper", head="nothere"))


class TestThresholds:
    def test_schedule_and_callable(self):
        plan = make_plan(model(), AGC(clipping=Schedule([(0, 0.1), (10, 0.2)])))
        assert plan["fc.bias"].threshold(5) == pytest.approx(0.15)
        plan = make_plan(model(), AGC(clipping=lambda step: 1.0 / (1 + step)))
        assert plan["fc.bias"].threshold(3) == 0.25

    @pytest.mark.parametrize(
        "value", [0.0, -1.0, float("nan"), float("inf"), None, "0.1", True, 10**400, 1j, [0.1]]
    )
    def test_schedule_must_return_positive_numbers(self, value):
        plan = make_plan(model(), AGC(clipping=lambda step: value))
        with pytest.raises(
            ConfigError, match=r"clipping of 'fc.bias': the schedule returned .* at step 3; it must"
        ):
            plan["fc.bias"].threshold(3)

    @pytest.mark.parametrize("step", ["a", -1, 0.5, None, True])
    def test_steps_are_integers_from_0_on(self, step):
        plan = make_plan(model(), AGC(clipping=Schedule([(0, 0.1), (10, 0.2)])))
        with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
            plan["fc.bias"].threshold(step)
        assert plan["fc.bias"].threshold(np.int64(10)) == 0.2


class TestRankRules:
    """The published guesses, on the shapes where they are known to differ."""

    @pytest.mark.parametrize(
        ("rule", "shape", "reduce"),
        [
            ("optax", (1, 5), (0, 1)),
            ("optax", (6, 5), (0,)),
            ("optax", (3, 4, 5), (0,)),
            ("optax", (3, 3, 4, 5), (0, 1, 2)),
            ("optax", (3, 3, 3, 4, 5), (0, 1, 2, 3)),
            ("optax", (1, 1, 7), (0, 1, 2)),
            ("deepmind", (1, 1, 1, 5), (0, 1, 2, 3)),
            ("timm", (1, 5), (1,)),
            ("timm", (4, 5, 3, 3), (1, 2, 3)),
            ("timm", (2, 3, 4), (1, 2)),
            ("pytorch_optimizer", (2, 3, 4), (1,)),
            ("pytorch_optimizer", (2, 3, 4, 5), (1, 2, 3)),
        ],
    )
    def test_native_layout(self, rule, shape, reduce):
        plan = make_plan([ambiguous(shape)], AGC(unit_rule=rule))
        assert plan["pos"].axes.reduce == reduce

    @pytest.mark.parametrize("rule", ["optax", "deepmind"])
    def test_undefined_ranks_raise(self, rule):
        with pytest.raises(
            UnitsError, match=f"parameter 'pos': the unit rule '{rule}' is not defined"
        ):
            make_plan([ambiguous((2,) * 6)], AGC(unit_rule=rule))

    def test_ported_to_the_other_layout(self):
        """optax reduces only the kernel axis of a 1-D convolution; so it does when ported."""
        conv = Parameter("w", (5, 4, 3), Units("o i ... -> o"), "out-first")
        assert make_plan([conv], AGC(unit_rule="optax"))["w"].axes.reduce == (2,)
        conv = Parameter("w", (3, 4, 5), Units("... i o -> o"), "out-last")
        assert make_plan([conv], AGC(unit_rule="timm"))["w"].axes.reduce == (0, 1)
        transposed = Parameter("w", (4, 5, 3), Units("i o ... -> o"), "out-first")
        assert make_plan([transposed], AGC(unit_rule="optax"))["w"].axes.reduce == (0,)


class TestDocument:
    def plan(self):
        rule = AGC(clipping={"fc.*": Schedule([(0, 0.1)]), "*": 0.01}, exclude=["stem.bias"])
        return make_plan(model(), rule)

    def test_round_trips(self):
        plan = self.plan()
        assert Plan.from_json(plan.to_json()) == plan
        assert hash(Plan.from_json(plan.to_json())) == hash(plan)
        assert pickle.loads(pickle.dumps(plan)) == plan

    def test_a_parameter_without_a_name_round_trips(self):
        """A tree that is one array has it."""
        plan = make_plan([Parameter("", (3,))], AGC())
        assert Plan.from_json(plan.to_json()) == plan

    def test_plans_differ_when_anything_does(self):
        assert make_plan(model(), AGC()) != make_plan(model(), AGC(clipping=0.02))
        assert make_plan(model(), AGC()) != make_plan(model(), AGC(exclude=["fc.bias"]))

    def test_table(self):
        text = str(self.plan())
        lines = text.splitlines()
        assert lines[0].split() == ["parameter", "shape", "units", "source", "count", "clipping"]
        assert lines[2].split() == [
            *("stem.weight", "8x3x3x3", "o", "i", "...", "->", "o", "layer", "8", "0.01"),
        ]
        assert lines[3].endswith("excluded")
        assert lines[4].endswith("schedule")
        assert lines[-1] == "4 parameters, 3 clipped, 19 units"

    def test_inactive_parameters_are_marked_and_not_counted(self):
        frozen = Parameter("stem.bias", (8,), inactive="frozen")
        plan = make_plan(model(**{"stem.bias": frozen}), AGC())
        assert str(plan).splitlines()[3].endswith("1  frozen")
        assert str(plan).splitlines()[-1] == "4 parameters, 3 clipped, 19 units"
        assert plan["stem.bias"].clipped, "it is clipped as soon as it has a gradient"
        assert plan == make_plan(model(), AGC())
        head = plan.marked(lambda name: None if name.startswith("fc") else "not in the optimizer")
        assert str(head).count("not in the optimizer") == 2
        assert (head.count, str(head).splitlines()[-1]) == (11, "4 parameters, 2 clipped, 11 units")

    def test_sources_survive_a_round_trip(self):
        plan = self.plan()
        back = Plan.from_json(plan.to_json())
        assert [entry.source for entry in back] == [entry.source for entry in plan]
        assert {entry.source for entry in plan} == {"layer", "vector"}
        unsettled = make_plan([ambiguous((5, 4, 3))], AGC(exclude=["pos"]))
        assert unsettled["pos"].source == "none"

    def test_decisions_do_not_depend_on_the_layout(self):
        last = make_plan([Parameter("w", (3, 3, 4, 5), Units("... i o -> o"))], AGC())
        first = make_plan([Parameter("w", (5, 4, 3, 3), Units("o i ... -> o"))], AGC())
        assert last != first
        assert last.decisions() == first.decisions() == {"w": (5, 0.01, False)}

    def test_empty_parameters_are_planned_and_left_alone(self):
        plan = make_plan([Parameter("w", (0, 4), DENSE)], AGC())
        assert (plan.count, plan["w"].clipped) == (0, False)
        assert "empty" in str(plan)

    def test_unknown_name(self):
        with pytest.raises(KeyError):
            self.plan()["nothere"]
        assert "nothere" not in self.plan()
        assert "fc.bias" in self.plan()
        assert "fc/bias" in self.plan()
        assert 3 not in self.plan()

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: d.update(format="x"), "not an AGC plan"),
            (lambda d: d.update(version=99), "of version 99, this library reads 1"),
            (lambda d: d["parameters"][1].pop("shape"), "entry 1 is damaged"),
            (lambda d: d["parameters"][0].update(count=7), "says 7 units, but"),
            (lambda d: d["parameters"][0].update(units="o -> x"), "entry 0 is damaged"),
            (lambda d: d.pop("parameters"), "'parameters' must be a list, got None"),
            (lambda d: d.update(parameters="ab"), "'parameters' must be a list, got 'ab'"),
            (lambda d: d.update(version=True), "of version True"),
            (lambda d: d["parameters"].insert(1, "ab"), "entry 1 is damaged: it must be a mapping"),
            (lambda d: d["parameters"].append(d["parameters"][1]), "two parameters are .*'st"),
            (
                lambda d: d["parameters"][2].update(clipping=-1),
                "entry 2 .*: clipping must be a fin",
            ),
        ],
    )
    def test_damaged_documents(self, damage, message):
        data = json.loads(self.plan().to_json())
        damage(data)
        with pytest.raises(FormatError, match=message):
            Plan.from_dict(data)

    @pytest.mark.parametrize(
        ("field", "value", "wanted"),
        [
            ("name", None, "a string, got None"),
            ("shape", [2.7, 3], r"a list of integers >= 0, got \[2.7, 3\]"),
            ("shape", "23", "a list of integers >= 0, got '23'"),
            ("shape", [-2, 3], r"a list of integers >= 0, got \[-2, 3\]"),
            ("shape", [True, 3], r"a list of integers >= 0, got \[True, 3\]"),
            ("count", 2.9, "an integer >= 0, got 2.9"),
            ("count", -2, "an integer >= 0, got -2"),
            ("count", True, "an integer >= 0, got True"),
            ("excluded", "false", "true or false, got 'false'"),
            ("excluded", 0, "true or false, got 0"),
            ("source", "guess", "one of rule, layer, name, vector, layout, none, got 'guess'"),
            ("units", None, "a string, got None"),
            ("clipping", "0.1", "a number, null or a schedule, got '0.1'"),
        ],
    )
    def test_fields_of_another_kind_are_named(self, field, value, wanted):
        data = json.loads(self.plan().to_json())
        data["parameters"][1][field] = value
        with pytest.raises(FormatError, match=f"entry 1 is damaged: '{field}' must be {wanted}"):
            Plan.from_dict(data)

    @pytest.mark.parametrize("text", ["", "[1, 2", "nonsense", "[" * 100_000])
    def test_not_json(self, text):
        with pytest.raises(FormatError, match="not JSON, or is truncated"):
            Plan.from_json(text)
        with pytest.raises(FormatError, match="not an AGC plan"):
            Plan.from_json("[]")
