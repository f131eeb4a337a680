"""Telemetry: what one clipping did, on the device until somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agc import Plan, reference
from agc.errors import ParameterError, ShapeError

__all__ = ["PerParameter", "Stats", "no_stats"]


class PerParameter(NamedTuple):
    """The numbers of every parameter, in the plan's order: arrays of shape ``(parameters,)``.

    Attributes
    ----------
    units : array of int32
        Units looked at; 0 for a parameter that was not clipped or had no gradient.
    clipped : array of int32
        Units whose gradient was scaled down.
    nonfinite : array of int32
        Units that fell under the non-finite policy (AGC-4), or whose schedule returned nonsense
        (AGC-10).
    max_ratio : array of float
        Largest ``norm(G_i) / max(norm(W_i), eps)`` of the finite units; 0 if there are none.
    min_scale : array of float
        Smallest factor applied to a finite unit; 1 if none was clipped.
    """

    units: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    max_ratio: jax.Array
    min_scale: jax.Array


class Stats(NamedTuple):
    """What one clipping did (AGC-11): five scalars on the device, and the same per parameter.

    :meth:`total` and :meth:`parameters` bring the numbers to the host; nothing else waits for the
    device.

    Attributes
    ----------
    units, clipped, nonfinite, max_ratio, min_scale : scalar array
        Over all parameters, as in :class:`PerParameter`.
    columns : PerParameter
        The same numbers of every parameter.
    """

    units: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    max_ratio: jax.Array
    min_scale: jax.Array
    columns: PerParameter

    @classmethod
    def of(cls, columns: PerParameter) -> Stats:
        """Add the totals to the numbers of the parameters."""
        return cls(
            units=jnp.sum(columns.units, dtype=np.int32),
            clipped=jnp.sum(columns.clipped, dtype=np.int32),
            nonfinite=jnp.sum(columns.nonfinite, dtype=np.int32),
            max_ratio=jnp.max(columns.max_ratio, initial=0),
            min_scale=jnp.min(columns.min_scale, initial=1),
            columns=columns,
        )

    def total(self) -> reference.Stats:
        """Return the numbers of all parameters together.

        Raises
        ------
        ShapeError
            If these are the numbers of several models, as ``vmap`` and ``pmap`` return them.
        """
        self._check_single()
        return _read(self[:5])

    def _check_single(self) -> None:
        shape = np.shape(self.units)
        if shape:
            raise ShapeError(
                f"this is telemetry of the shape {shape}, of several models or devices; take that of one: "
                "jax.tree.map(lambda numbers: numbers[0], stats)"
            )

    def parameters(self, plan: Plan) -> dict[str, reference.Stats]:
        """Return the numbers of every parameter that AGC acts on and that had a gradient.

        Parameters
        ----------
        plan : Plan
            The plan of the parameters, which has their names:
            ``agc_jax.plan(params, rule, units=units)``.

        Raises
        ------
        ParameterError
            If the plan has another number of parameters.
        ShapeError
            As :meth:`total`.
        """
        self._check_single()
        count = len(self.columns.units)
        if len(plan) != count:
            raise ParameterError(
                f"the plan has {len(plan)} parameters, the telemetry {count}; give the plan of those that "
                "AGC was given, which behind optax.masked or optax.partition are a part of the model's"
            )
        rows = zip(*(np.asarray(column).tolist() for column in self.columns), strict=True)
        return {
            entry.name: reference.Stats(*row)
            for entry, row in zip(plan, rows, strict=True)
            if row[0]
        }

    def to_dict(
        self, prefix: str = "agc/", *, plan: Plan | None = None, parameters: bool = True
    ) -> dict[str, float]:
        """Return the numbers as flat floats for a logger, the same keys in every framework.

        Parameters
        ----------
        prefix : str
            What every key starts with.
        plan : Plan, optional
            As in :meth:`parameters`, which it takes to name the parameters.
        parameters : bool
            Whether the numbers of every parameter are among them, if there is a plan.

        Returns
        -------
        dict of str to float
            As :func:`agc.reference.to_floats`.
        """
        named = self.parameters(plan) if plan and parameters else {}
        return reference.to_floats(self.total(), named, prefix)


@partial(jax.jit, static_argnums=0)
def no_stats(parameters: int) -> Stats:
    """Return the numbers before anything was clipped, every one in a buffer of its own."""
    count = jnp.zeros(parameters, np.int32)
    none = jnp.zeros(parameters, float)
    return Stats.of(PerParameter(count, count, count, none, none + 1))


for _type in (PerParameter, Stats):
    jax.export.register_namedtuple_serialization(_type, serialized_name=f"agc_jax.{_type.__name__}")


def _read(row: Sequence[Any]) -> reference.Stats:
    units, clipped, nonfinite, max_ratio, min_scale = row
    return reference.Stats(
        int(units), int(clipped), int(nonfinite), float(max_ratio), float(min_scale)
    )
