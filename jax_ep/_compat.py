"""Everything that differs between JAX versions or is not in JAX's public API."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jaxlib.version
from jax._src import compute_on, core, dispatch, distributed, source_info_util
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad


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


def bound_axes() -> dict[str, int]:
    """Returns the axes that are bound here, of meshes and of ``vmap``, with their sizes."""
    return dict(core.get_axis_env().axis_sizes)


def trace_platform() -> str:
    """Returns the platform that what is traced here will most likely run on."""
    # Inside shard_map only the mesh knows; elsewhere it is where arrays come to be.
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return (
        default if isinstance(default, str) else getattr(default, "platform", jax.default_backend())
    )


def local_gpus() -> list[Any]:
    """Returns the GPUs of this process, of whatever make; none where JAX runs without any."""
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:
        return []


def debug_nans() -> bool:
    """Tells whether JAX looks for NaNs in every result."""
    return jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]


def zero_tangent(x: jax.Array) -> Any:
    """Returns the symbolic zero that is the tangent of what does not depend on anything."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def concrete_mesh(ctx: Any) -> Any | None:
    """Returns the mesh, with its devices, that a primitive is lowered for, or None.

    A program to be exported has none: it may be loaded for other devices. Nor has a ``shard_map``
    over an abstract mesh. One that ``jax.set_mesh`` has set may be another of the same shape when
    the program runs, as JAX shares lowered programs between those.
    """
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    for_export = ctx.module_context.lowering_parameters.for_export
    return mesh if isinstance(mesh, jax.sharding.Mesh) and not for_export else None


def lowered_scopes(ctx: Any) -> list[str]:
    """Returns the names of the scopes that a primitive is lowered in, outermost first."""
    return [at.name for at in ctx.name_stack.stack if isinstance(at, source_info_util.Scope)]


def run_primitive(primitive: Primitive, *operands: jax.Array, **params: Any) -> Any:
    """Compiles and runs a primitive by itself, for where nothing traces it."""
    # Under jax_debug_nans a plain jax.jit of it would look for the NaN within, without an end.
    return dispatch.apply_primitive(primitive, *operands, **params)


def distributed_client() -> Any:
    """Returns the client of the key-value store of JAX's distributed runtime, or None."""
    return distributed.global_state.client


def ffi_minor_version() -> int:
    """Returns the minor version of the XLA FFI that the installed jaxlib runs."""
    installed = tuple(int(part) for part in jaxlib.version.__version__.split(".")[:3])
    if installed >= (0, 12, 0):
        return 5
    return 4 if installed >= (0, 11, 1) else 3


def result_type(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: Any) -> Any:
    """Returns the type of a result that varies along the same mesh axes as a value or type."""
    # A plain ShapeDtypeStruct would be typed as replicated inside shard_map.
    kind = like if isinstance(like, core.ShapedArray) else jax.typeof(like)
    whole = jax.sharding.PartitionSpec(*(None,) * len(shape))
    sharding = jax.sharding.NamedSharding(kind.sharding.mesh, whole)
    return kind.update(shape=shape, dtype=jax.numpy.dtype(dtype), sharding=sharding)


def beside_compute() -> AbstractContextManager[Any]:
    """Has what is traced within go on the stream of collectives, on GPUs; elsewhere it is none."""
    return compute_on.extend_compute_type("gpu_stream:collective")
