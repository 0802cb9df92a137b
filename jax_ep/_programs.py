"""Programs of all ranks, made of what one of them does: for checks and benchmarks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "expert"


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of ranks, one on each device."""
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def over_ranks(per_rank: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles what one rank does into a program of all, on arrays with a leading axis of ranks."""

    def block(*args: Any) -> Any:
        out = per_rank(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    spec = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))


def put(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts each rank's part on its device; each process its own."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
