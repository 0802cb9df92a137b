"""Everything that differs between JAX versions or is not in JAX's public API."""

from collections.abc import Sequence
from typing import Any

import jax
import jaxlib.version
from jax._src import distributed


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the manual mesh axes along which JAX's type of ``x`` says that it varies."""
    # There is no public spelling of this part of an array's type yet.
    return frozenset(jax.typeof(x).mat.varying)


def vary_together(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts arrays so that each varies along every manual mesh axis that any of them does."""
    axes = frozenset[str]().union(*(varying_axes(a) for a in arrays))
    return [vary_over(a, axes) for a in arrays]


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Casts ``x`` to vary along ``axes`` too; its transpose sums over the axes it adds."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def manual_axes() -> tuple[str, ...]:
    """Returns the mesh axes that the enclosing ``shard_map`` made manual, in mesh order."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.axis_names if name in mesh.manual_axes)


def distributed_client() -> Any:
    """Returns the client of the key-value store of JAX's distributed runtime, or None."""
    return distributed.global_state.client


def ffi_minor_version() -> int:
    """Returns the minor version of the XLA FFI that the installed jaxlib runs."""
    installed = tuple(int(part) for part in jaxlib.version.__version__.split(".")[:3])
    if installed >= (0, 12, 0):
        return 5
    return 4 if installed >= (0, 11, 1) else 3


def result_type(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array) -> Any:
    """Returns the type of a foreign call's result that varies along the same axes as ``like``."""
    # A plain ShapeDtypeStruct would be typed as replicated inside shard_map.
    whole = jax.sharding.PartitionSpec(*(None,) * len(shape))
    sharding = jax.sharding.NamedSharding(jax.typeof(like).sharding.mesh, whole)
    return jax.typeof(like).update(shape=shape, dtype=jax.numpy.dtype(dtype), sharding=sharding)
