"""A complete third-party backend: somebody's own AGC in NumPy, put to the test."""

import numpy as np

from agc.plan import Parameter, make_plan
from agc.reference import RowSparse
from agc_conformance.backend import Backend, Outcome, Problem, Unsupported


class MyBackend(Backend):
    """Hands every parameter to the code under test."""

    name = "mine"
    layout = "torch"  # arrays arrive as PyTorch stores them; or "flax", "keras"
    dtypes = frozenset({"float32", "float64"})

    def clip(self, problem: Problem) -> Outcome:
        """Clip the gradients of a problem."""
        rule, clipped = problem.declared_rule, dict(problem.gradients)
        if rule.nonfinite != "propagate" or any(isinstance(g, RowSparse) for g in clipped.values()):
            raise Unsupported("no other policy, no sparse gradients")  # reported, never passed
        for entry in make_plan(
            [Parameter(n, w.shape) for n, w in problem.parameters.items()], rule
        ):
            g, threshold = clipped[entry.name], entry.threshold(problem.step)
            if g is not None and threshold is not None:  # neither excluded nor switched off
                w = problem.parameters[entry.name]
                clipped[entry.name] = my_agc(g, w, entry.axes, threshold, rule.eps)
        return Outcome(clipped)


@np.errstate(all="ignore")
def my_agc(g, w, axes, clipping, eps):
    """Clip one gradient: the code under test."""
    wide = [array.reshape(axes.view).astype(float) for array in (g, w)]
    g_norm, w_norm = (np.sqrt((x**2).sum(axes.reduce, keepdims=True)) for x in wide)
    limit = clipping * np.maximum(w_norm, eps)
    scale = np.where(g_norm > limit, limit / g_norm, 1) + 0 * (g_norm + w_norm)  # NaN spreads
    return (wide[0] * scale).reshape(g.shape).astype(g.dtype)
