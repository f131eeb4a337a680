"""The processes and devices of ``agc train``: who they are, and which of them has what.

A mesh has one axis. Examples are split along it; parameters are whole on every device, or split as
well (``sharded``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from agc.errors import ConfigError
from agc.training import Hosts, Launch

__all__ = ["DATA", "EVERYWHERE", "SPLIT", "Devices", "Named", "join", "mesh"]

Tree = Any
Named = dict[str, jax.Array]
"""Arrays by canonical name."""

DATA: Final = "data"
"""The axis of a mesh."""
EVERYWHERE: Final = PartitionSpec()
SPLIT: Final = PartitionSpec(DATA)


def join(launch: Launch) -> Hosts:
    """Join the other processes, if there are any, which JAX finds in a cluster by itself."""
    if not jax.distributed.is_initialized():
        _initialize(launch)
    if jax.process_count() == 1:
        return Hosts()
    return Hosts(jax.process_index(), jax.process_count(), _total)


def _initialize(launch: Launch) -> None:
    """Call what joins processes, and raise ConfigError unless this one is alone or joined."""
    # A task of Slurm that is alone would be given one GPU of several.
    tasks = int(os.environ.get("SLURM_NTASKS", "0"))
    if launch.coordinator is None and (launch.processes == 1 or tasks == 1):
        return
    try:
        jax.distributed.initialize(launch.coordinator, launch.processes, launch.process)
    except Exception as error:  # a cluster's client has its own
        alone = isinstance(error, ValueError)  # no cluster was found
        used = "must be called before" in str(error)  # by whoever used JAX in this process before
        if launch.coordinator or tasks > 1 or not (alone or used):
            raise ConfigError(
                f"JAX cannot join the other processes: {error}; processes=1 (--processes 1) trains "
                "without them"
            ) from None


def _total(numbers: list[float]) -> list[float]:
    """Sum numbers over all processes, as float64, which JAX has not, in two halves."""
    halves = multihost_utils.process_allgather(np.array(numbers, np.float64).view(np.uint32))
    rows = np.ascontiguousarray(halves).view(np.float64)
    return [float(total) for total in rows.sum(0)]


def mesh(name: str | None, parts: int) -> Mesh:
    """Return the devices of all processes, process by process, as many of each.

    Parameters
    ----------
    name : str, optional
        Of one device of each process; all of JAX's first platform if None.
    parts : int
        What a process has to spread: the number of its devices divides it.
    """
    platform, _, number = (name or "").partition(":")
    by_process: dict[int, list[Any]] = {}
    try:
        for device in jax.devices(platform or None):
            by_process.setdefault(device.process_index, []).append(device)
        if name:
            place = int(number or 0)
            by_process = {process: [own[place]] for process, own in by_process.items()}
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"device={name!r}: JAX cannot use it: {error}") from None
    most = min(map(len, by_process.values()))
    count = next(count for count in range(most, 0, -1) if count == 1 or parts % count == 0)
    chosen = [device for _, own in sorted(by_process.items()) for device in own[:count]]
    return Mesh(np.array(chosen), (DATA,), axis_types=(AxisType.Auto,))


@dataclass(frozen=True)
class Devices:
    """The devices of a training, and which of them has what."""

    mesh: Mesh
    sharded: bool
    """Whether each has a part of every parameter, and not all of it."""
    dtype: str
    """Of the parameters."""

    @property
    def count(self) -> int:
        """How many there are, on all hosts."""
        return len(self.mesh.devices)

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return how a parameter is split: along the largest axis that is as many equal parts.

        Of equal axes it is the last, which is that of the outputs: a unit of AGC stays whole.
        """
        axes = [axis for axis, size in enumerate(shape) if size % self.count == 0]
        if not self.sharded or not axes:
            return EVERYWHERE
        axis = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[None] * axis, DATA)

    def sharding(self, shape: tuple[int, ...] = ()) -> NamedSharding:
        """Return where the parts of a parameter are; of a scalar, everywhere."""
        return NamedSharding(self.mesh, self.spec(shape))

    def placed(self, arrays: Mapping[str, Any]) -> Named:
        """Return copies of arrays on the devices, which may be donated."""
        return {
            name: jax.make_array_from_callback(
                np.shape(array),
                self.sharding(np.shape(array)),
                lambda index, array=array: np.array(array[index], self.dtype),
            )
            for name, array in arrays.items()
        }

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return arrays as :meth:`placed` would place them, without numbers."""
        return {
            name: jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.sharding(shape))
            for name, shape in shapes.items()
        }

    def whole(self, arrays: Named) -> dict[str, Any]:
        """Return copies on the host, the same on each."""
        if self.sharded and jax.process_count() > 1:
            arrays = jax.jit(lambda tree: tree, out_shardings=self.sharding())(arrays)
        return {name: np.array(array, order="C") for name, array in arrays.items()}

    def kept(self, arrays: Tree) -> Tree:
        """Say to the compiler where what a step returns has to be."""
        return jax.tree.map(
            lambda leaf: lax.with_sharding_constraint(leaf, self.sharding(leaf.shape)), arrays
        )

    def examples(self, rows: Tree) -> Tree:
        """Return the whole batch, of which these rows are this host's."""
        split, hosts = NamedSharding(self.mesh, SPLIT), jax.process_count()

        def place(leaf: Any) -> jax.Array:
            shape = (hosts * len(leaf), *leaf.shape[1:])
            return jax.make_array_from_process_local_data(split, leaf, shape)

        return jax.tree.map(place, rows)

    def mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """Return a function that each device computes of its own examples."""
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def mean(self, gradient: jax.Array) -> jax.Array:
        """Return a device's part of the mean over devices, inside of :meth:`mapped`."""
        spec = self.spec(gradient.shape)
        if DATA not in spec:
            return lax.pmean(gradient, DATA)
        axis = spec.index(DATA)
        part = lax.psum_scatter(gradient, DATA, scatter_dimension=axis, tiled=True)
        return part / self.count
