"""Other implementations: as subjects of the suite, and as what the profiles reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from agc import AGC, SAM, Units
from agc.plan import Parameter, make_plan
from agc.reference import adaptive_clip, clip_units
from agc_conformance.backend import (
    Backend,
    Examples,
    Optimizer,
    Problem,
    SharpnessProblem,
    SharpnessTask,
    Unavailable,
    Unsupported,
)
from agc_conformance.runner import run_case
from agc_conformance.vectors import load_vectors
from tests.contract import Parametrized
from tests.helpers import Array, draw


def problem(w: Any, g: Any, units: str = "... ->", **rule: Any) -> Problem:
    return Problem(AGC(**rule), {"p": w}, {"p": g}, {"p": Units(units)})


def sharp(**rule: Any) -> SharpnessProblem:
    """Weights 3 and 4, both attracted by 0: the ascent gradient is (3, 4), of norm 5."""
    examples = Examples({"p": np.ones((2, 2))}, {"p": np.zeros((2, 2))})
    return SharpnessProblem(SAM(**rule), {"p": np.array([3.0, 4.0])}, examples)


class PeersContract(Parametrized):
    """Peers run on problems, and the layers that they get wrong show up as wrong.

    Attributes
    ----------
    peers : dict of str to type
        By name.
    layers : dict of str to (shape, units, names of peers)
        Layers, and who clips them as Eq. 3 says.
    vectors : dict of str to dict of str to str
        By vector and peer, what the suite says of it.
    sharpness : dict of str to dict of str to str
        By clause and case, what the suite says of ``sam``; misses are why the clauses are there.
    sam : type
        The peer that has SAM.
    unsupported : list of (dict, str)
        Options that ``sam`` lacks, and how they are named.
    digits : float
        Relative error of what ``sam`` computes.
    framework : str
    """

    peers: Mapping[str, Callable[..., Backend]]
    layers: Mapping[str, tuple[tuple[int, ...], str, set[str]]]
    vectors: Mapping[str, Mapping[str, str]]
    sharpness: Mapping[str, Mapping[str, str]]
    sam: Callable[[], Backend]
    unsupported: ClassVar[list[tuple[dict[str, Any], str]]]
    digits: float
    framework: str

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {
            "peer": self.peers,
            "layer": self.layers,
            "vector": self.vectors,
            "clause": self.sharpness,
        }

    @pytest.fixture
    def subject(self, peer: str) -> Backend:
        return self.peers[peer]()

    def test_which_layers_are_clipped_as_in_equation_3(self, peer, subject, layer):
        shape, units, right = self.layers[layer]
        w, g = draw(shape)
        got = subject.clip(problem(w, g, units)).gradients["p"]
        want = clip_units(g, w, Units(units)).gradient
        assert np.allclose(got, want, rtol=1e-12) == (peer in right)
        assert not np.array_equal(want, g)

    def test_the_suite_sees_what_a_peer_gets_wrong(self, peer, subject, vector):
        (found,) = [each for each in load_vectors() if each.id == vector]
        assert run_case(subject, found, "float32")["status"] == self.vectors[vector][peer]

    @pytest.mark.parametrize(
        "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
    )
    def test_dtypes_go_through(self, subject, dtype):
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        w, g = (np.array([[1.0, 2.0], [0.5, 4.0]]).astype(kind) * kind.type(k) for k in (1, 0.5))
        got = subject.clip(problem(w, g)).gradients["p"]
        assert got.dtype == kind
        assert np.allclose(got.astype(complex), 0.01 * w.astype(complex), rtol=0.01)
        assert dtype in subject.dtypes

    def test_a_parameter_without_a_gradient_is_left_alone(self, subject):
        w, g = draw((3, 2))
        both = Problem(AGC(), {"a": w, "b": w}, {"a": g, "b": None})
        gradients = subject.clip(both).gradients
        assert gradients["b"] is None
        assert gradients["a"].shape == (3, 2)

    def test_what_was_handed_over_is_not_changed(self, subject):
        w, g = draw((3, 2))
        before = w.copy(), g.copy()
        subject.clip(problem(w, g))
        np.testing.assert_array_equal((w, g), before)

    def test_an_option_that_a_peer_lacks_is_unsupported(self, peer, subject):
        message = f"{peer} has no argument for nonfinite='zero'"
        with pytest.raises(Unsupported, match=message):
            subject.clip(problem(*draw((3, 2)), nonfinite="zero"))

    def test_which_clauses_of_sam_it_meets(self, clause):
        vectors = {vector.id: vector for vector in load_vectors() if vector.clause == clause}
        found = {}
        for case in self.sharpness[clause]:
            name, _, dtype = case.partition(":")
            found[case] = run_case(self.sam(), vectors[name], dtype)["status"]
        assert found == self.sharpness[clause]

    def test_the_gradient_of_sam_is_that_at_the_perturbed_weights(self):
        outcome = self.sam().sharpen(sharp(rho=0.5))
        np.testing.assert_allclose(outcome.gradients["p"], [3.3, 4.4], rtol=self.digits)
        np.testing.assert_array_equal(outcome.weights["p"], [3, 4])
        assert outcome.loss is None

    def test_sam_goes_on_from_a_checkpoint(self):
        question, sgd = sharp(rho=0.5), Optimizer(lr=0.1, momentum=0.5)
        run, batches = self.sam().sharpness_trajectory, [question.examples] * 4
        straight = run(SharpnessTask(question, sgd, batches))
        resumed = run(SharpnessTask(question, sgd, batches, restart=2))
        np.testing.assert_array_equal([w["p"] for w in straight], [w["p"] for w in resumed])
        first = 3 - 0.1 * 3.3
        np.testing.assert_allclose(straight[0]["p"], [first, first * 4 / 3], rtol=self.digits)
        with pytest.raises(Unsupported, match="decoupled"):
            run(SharpnessTask(question, Optimizer(lr=1, decoupled=True), batches))

    def test_an_option_of_sam_that_is_missing_is_unsupported(self):
        peer = self.sam()
        for rule, option in self.unsupported:
            with pytest.raises(Unsupported, match=f"{peer.name} has no argument for {option}"):
                peer.sharpen(sharp(**rule))

    def test_peers_say_what_they_are(self, peer, subject):
        assert subject.role == "subject"
        assert {peer, self.framework} <= set(subject.versions())
        with pytest.raises(Unavailable, match="CPU only"):
            self.peers[peer]("cuda")


def by_profile(
    name: str, w: Any, g: Any, *, layout: Any, units: Units | None = None, **changes: Any
) -> Any:
    rule = AGC.profile(name, **changes)
    plan = make_plan([Parameter("p", w.shape, units, layout)], rule)
    return adaptive_clip({"p": w}, {"p": g}, plan, rule).gradients["p"]


def assert_close(got: Any, want: Any) -> None:
    """Compare with the reference in units in the last place, up to the rounding of the package
    itself.

    In float64 the reference rounds as well.
    """
    spacing = np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    assert np.max(np.abs(got - want) / spacing) <= (16 if got.dtype == np.float64 else 8)


class ProfilesContract(Parametrized):
    """Profiles against the code they reproduce, over shapes on which implementations disagree.

    The published code is run as it is; the profile is run by the reference.

    Attributes
    ----------
    packages : dict of str to function
        ``(w, g, clipping, eps) -> clipped g``, by the profile's name.
    shapes : dict of str to tuple of int
        Weights of layers, as the framework stores them.
    plain : dict of str to (shape, permutation)
        Layers whose output is on the axis where the framework has it, and how they get to
        ``other``.
    layout, other : str
        Whether the framework has the output first or last, and the opposite.
    """

    packages: Mapping[str, Callable[..., Array]]
    shapes: Mapping[str, tuple[int, ...]]
    plain: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    layout: str
    other: str

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"package": self.packages, "shape": self.shapes, "layer": self.plain}

    def profile(self, name: str, w: Any, g: Any, **changes: Any) -> Any:
        return by_profile(name, w, g, layout=self.layout, **changes)

    def one_unit(self, values: list[float]) -> Array:
        """Return these numbers as the weights of one unit."""
        return np.array([values] if self.layout == "out-first" else [[v] for v in values])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
    def test_the_profile_equals_the_package(self, package, shape, dtype):
        changed = set()
        for seed in range(6):
            w, g = draw(self.shapes[shape], seed, dtype, small=True)
            want = self.profile(package, w, g)
            got = self.packages[package](w, g)
            assert got.dtype == dtype
            assert_close(got, want)
            changed |= set((want != g).ravel().tolist())
        assert True in changed, "nothing was clipped, so nothing was tested"

    def test_zero_weights_and_zero_gradients_too(self, package):
        w, g = draw((5, 6), small=True)
        for axis in (0, 1):
            v, h = (np.moveaxis(array.copy(), axis, 0) for array in (w, g))
            v[1], h[2], v[3], h[3] = 0, 0, 0, 0
            v, h = (np.moveaxis(array, 0, axis) for array in (v, h))
            assert_close(self.packages[package](v, h), self.profile(package, v, h))

    @pytest.mark.parametrize("norm", [2e-8, 3e-7, 9e-7, 1.1e-6], ids="{:g}".format)
    def test_the_second_epsilon_where_it_can_be_reached(self, package, norm):
        # clipping * eps = 1e-8 is below the 1e-6 in the division: these units shrink by too much.
        w, g = self.one_unit([0.0] * 4), self.one_unit([norm / 2] * 4)
        want = self.profile(package, w, g, clipping=1e-3, eps=1e-5)
        assert_close(self.packages[package](w, g, clipping=1e-3, eps=1e-5), want)
        assert np.linalg.norm(want) / 1e-8 == pytest.approx(min(1.0, norm / 1e-6))

    def test_a_run_moves_to_a_stack_that_stores_the_output_elsewhere(self, package, layer):
        shape, moved = self.plain[layer]
        w, g = draw(shape, 1, small=True)
        g = 10 * g
        want = by_profile(
            package,
            w.transpose(moved),
            g.transpose(moved),
            units=Units("o i ... -> o" if self.other == "out-first" else "... i o -> o"),
            layout=self.other,
        )
        assert_close(self.packages[package](w, g).transpose(moved), want)
        assert not np.array_equal(want, g.transpose(moved))
