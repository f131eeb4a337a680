"""Configurations: what is refused, and round trips; the suite's level 0 has more of both."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from agc import AGC, SAM, Schedule, Units
from agc.errors import AGCError, ConfigError, UnitsError
from agc.profiles import PROFILES

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("rule", "field"), [(AGC, "clipping"), (SAM, "rho")])
def test_a_class_is_not_a_schedule(rule, field):
    with pytest.raises(
        ConfigError, match=f"{field} is the class Schedule; give a number or an ins"
    ):
        rule(**{field: Schedule})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clipping": [0.01]}, r"clipping must be a finite number > 0 \(None switches"),
        ({"clipping": 10**400}, "clipping must be a finite number > 0 .*beyond float64"),
        ({"clipping": {"stem.*": 0, "*": 0.01}}, r"clipping\['stem.\*'\] must be a finite number"),
        ({"clipping": {"@schedule": 0.1}}, "clipping: the pattern '@schedule' is reserved"),
        *(({"eps": value}, "eps must be a finite number >= 0") for value in (INF, None, "0")),
        *(({"div_eps": value}, "div_eps must be a finite number >= 0") for value in (-1e-3, NAN)),
        ({"unit_rule": "guess"}, "unit_rule must be one of 'declared'"),
        ({"exclude": 3}, "exclude must be a list"),
        ({"units": "o i -> o"}, "units must map name patterns"),
        ({"head": ""}, "head needs non-empty strings"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        AGC(**fields)


@pytest.mark.parametrize("value", ["o i", 3])
def test_bad_units_are_named(value):
    with pytest.raises(
        UnitsError, match=r"^units\['a'\]: (units pattern: '->' is miss|a units pat)"
    ):
        AGC(units={"*": "... ->", "a": value})


def test_one_pattern_may_be_given_as_text():
    assert AGC(exclude="head.*") == AGC(exclude=["head.*"])


@pytest.mark.parametrize(
    "rule",
    [
        AGC(),
        AGC(clipping=None),
        AGC(clipping={"stem.*": 0.02, "neck.*": None, "*": Schedule([(0, 0.04), (10, 0.01)])}),
        AGC(clipping=Schedule([(5, 0.5)])),
        AGC(units={"pos": "n d -> n", "up": Units("(g i) o -> g o", g=2)}, exclude=["a", "b.*"]),
        *map(AGC.profile, PROFILES),
    ],
)
def test_round_trips(rule):
    data = json.loads(json.dumps(rule.to_dict()))
    again = AGC.from_dict(data)
    assert again == rule
    assert hash(again) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert dataclasses.replace(rule) == rule


def test_order_of_patterns_is_part_of_the_value():
    assert AGC(clipping={"a": 0.1, "*": 0.2}) != AGC(clipping={"*": 0.2, "a": 0.1})


def test_numpy_numbers_become_pythons():
    assert json.dumps(AGC(clipping=np.float32(0.5)).to_dict()["clipping"]) == "0.5"
    schedule = Schedule([(np.int64(0), 0.5), (np.int64(2), np.float32(0.25))])
    assert json.dumps(schedule.points) == "[[0, 0.5], [2, 0.25]]"
    assert json.dumps(SAM(every=np.int64(2)).to_dict()["every"]) == "2"


def test_a_callable_cannot_be_written():
    with pytest.raises(ConfigError, match=r"use agc\.Schedule"):
        AGC(clipping=lambda step: 0.01).to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({1: 2, "a": 3}, "unknown AGC field 'a'; the fields are clipping, eps"),
        ([], "is a mapping, got list"),
        ({"eps": -1}, "eps must be"),
    ],
)
def test_from_dict_refuses(data, message):
    with pytest.raises(ConfigError, match=message):
        AGC.from_dict(data)


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AGC().eps = 1.0
    with pytest.raises(TypeError):
        AGC(clipping={"*": 0.1}).clipping["*"] = 0.2


class TestSchedule:
    def test_straight_lines_between_points(self):
        schedule = Schedule([(10, 1.0), (20, 2.0), (30, 1.0)])
        values = [schedule(step) for step in (0, 10, 15, 20, 25, 30, 99)]
        assert values == [1.0, 1.0, 1.5, 2.0, 1.5, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([(-1, 1.0)], "ascending integers"),
            ([(0.5, 1.0)], "ascending integers"),
            ([(0, NAN)], "Schedule value"),
            ([1, 2], "pairs"),
        ],
    )
    def test_bad_points(self, points, message):
        with pytest.raises(ConfigError, match=message):
            Schedule(points)


class TestProfiles:
    def test_fields_can_be_changed(self):
        rule = AGC.profile("paper", head="fc", clipping=0.02)
        assert (rule.head, rule.clipping, rule.exclude) == ("fc", 0.02, ("@head",))

    def test_unknown_name(self):
        with pytest.raises(
            ConfigError, match="unknown profile 'nfnet'; the profiles are paper, deep"
        ):
            AGC.profile("nfnet")
        for rule in (AGC, SAM):
            with pytest.raises(ConfigError, match=r"unknown profile \[\]; the profiles are"):
                rule.profile([])

    def test_unknown_field(self):
        with pytest.raises(ConfigError, match="clip"):
            AGC.profile("paper", clip=1)


class TestSam:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"fraction": NAN}, "fraction must be a number above 0 and at most 1, got nan"),
            ({"every": 1.5}, "every must be an integer >= 1, got 1.5"),
            ({"only": [""]}, "only needs non-empty strings"),
        ],
    )
    def test_bad_fields_are_named(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            SAM(**fields)

    def test_a_schedule_that_returns_nonsense(self):
        with pytest.raises(ConfigError, match=r"rho: the schedule returned -0\.9 at step 1"):
            SAM(rho=lambda step: 0.1 - step).radius(1)
        with pytest.raises(ConfigError, match="rho: the schedule returned None at step 0"):
            SAM(rho=lambda step: None).radius(0)

    @pytest.mark.parametrize(
        "rule",
        [
            SAM(),
            SAM(rho=Schedule([(0, 0.2), (10, 0.05)]), fraction=0.2, only=["a.*"], every=2),
            SAM(adaptive=True, rho=0.5, microbatches=4, scope="global", nonfinite="raise"),
        ],
    )
    def test_round_trips(self, rule):
        assert SAM.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert hash(SAM.from_dict(rule.to_dict())) == hash(rule)


def test_every_error_has_one_base():
    import agc.errors

    for name in agc.errors.__all__:
        base = UserWarning if name.endswith("Warning") else AGCError
        assert issubclass(getattr(agc.errors, name), base)


@pytest.mark.parametrize(("cls", "field"), [(AGC, "clipping"), (SAM, "rho")])
def test_fields_without_a_name(cls, field):
    with pytest.raises(ConfigError, match=rf"by name, such as {cls.__name__}\({field}=0\.05\)"):
        cls(0.05)


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (AGC, "clip", "did you mean clipping?"),
        (AGC, "clip_factor", "did you mean clipping?"),
        (AGC, "agc_eps", "did you mean eps?"),
        (AGC, "non_finite", "did you mean nonfinite?"),
        (AGC, "zzz", "the fields are clipping, eps"),
        (SAM, "adaptativ", "did you mean adaptive?"),
        (SAM, "clip", "the fields are rho"),
    ],
)
def test_fields_by_another_name(cls, name, hint):
    for make in (lambda: cls(**{name: 0.1}), lambda: cls.from_dict({name: 0.1})):
        with pytest.raises(ConfigError, match=f"unknown {cls.__name__} field '{name}'") as caught:
            make()
        assert hint in str(caught.value)
