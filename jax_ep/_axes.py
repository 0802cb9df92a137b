"""How the axis of an exchange is bound where a plan is made or used: ranks, groups, devices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jax_ep._checks import check_nodes, check_positive
from jax_ep._compat import bound_axes, manual_axes
from jax_ep._layout import Layout
from jax_ep._plan import Plan, check_arrays
from jax_ep._types import AxisName, Binding


class Place(NamedTuple):
    """Which part of an exchange this is: values, different on every device or vmap index."""

    rank: Int32[Array, ""]
    # Which of the groups of ranks along the other manual mesh axes.
    group: Int32[Array, ""]


def resolve_axis(axis_name: AxisName) -> tuple[Binding, int]:
    """Finds out how ``axis_name`` is bound here, and to how many ranks.

    Raises:
      TypeError: it is neither a name nor a tuple of names nor None.
      ValueError: it is not bound, or names a mix of axes.
    """
    if axis_name is None:
        return "none", 1
    names: tuple[str, ...] = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple):
        raise TypeError(f"axis_name must be a name, a tuple of names or None; got {axis_name!r}.")
    if not names:
        raise ValueError("axis_name must name an axis if it is a tuple; got ().")
    sizes = bound_axes()
    if not all(name in sizes for name in names):
        raise ValueError(
            "axis_name must name a mesh axis inside jax.shard_map, or the axis_name of an "
            f"enclosing jax.vmap; got {axis_name!r}."
        )
    num_ranks = math.prod(sizes[name] for name in names)
    manual = [name in manual_axes() for name in names]
    if all(manual):
        return "mesh", num_ranks
    if any(manual) or len(names) > 1:
        raise ValueError(
            f"axis_name must be mesh axes only, or one vmap axis; got {axis_name!r}, not all of "
            "which are mesh axes."
        )
    return "vmap", num_ranks


def resolve_ranks(
    axis_name: AxisName, num_experts: int, ranks_per_node: int
) -> tuple[Binding, int]:
    """Finds out how ``axis_name`` is bound here, and to how many ranks of experts.

    Raises:
      TypeError: it is neither a name nor a tuple of names nor None, or a count is not an int.
      ValueError: it is not bound, or names a mix of axes; a count is not positive; or experts or
        nodes are not made of whole ranks.
    """
    check_positive("num_experts", num_experts)
    binding, num_ranks = resolve_axis(axis_name)
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a multiple of the {num_ranks} ranks; got {num_experts}."
        )
    check_nodes(ranks_per_node, num_ranks)
    return binding, num_ranks


def check_use(plan: Plan) -> Binding:
    """Checks that a plan can be used here; returns how its axis is bound.

    Raises:
      TypeError: one of its arrays has another dtype than ``make_plan`` gave it.
      ValueError: one has another shape; the axis is not bound, or to another number of ranks.
    """
    check_arrays(plan)
    layout = plan._layout
    try:
        binding, num_ranks = resolve_axis(layout.axis_name)
    except ValueError as error:
        bound = ", ".join(f"{name!r} of {size}" for name, size in bound_axes().items())
        raise ValueError(
            "plan must be used where the axis it was made along is bound: axis_name "
            f"{layout.axis_name!r} of {layout.num_ranks} ranks; here are bound: {bound or 'none'}."
        ) from error
    if num_ranks != layout.num_ranks:
        raise ValueError(
            f"plan must be used along as many ranks as it was made for: axis_name "
            f"{layout.axis_name!r} had {layout.num_ranks}; got an axis of {num_ranks}."
        )
    return binding


def place(layout: Layout) -> Place:
    """Returns which rank of which group this is."""
    if layout.axis_name is None:
        return Place(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    others = tuple(name for name in manual_axes() if name not in layout.axis_names)
    group = jax.lax.axis_index(others) if others else jnp.zeros((), jnp.int32)
    return Place(rank_along(layout.axis_name), group.astype(jnp.int32))


def rank_along(axis_name: AxisName) -> Int32[Array, ""]:
    """Returns this rank's position along an axis that is bound, or 0 along none."""
    if axis_name is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(axis_name).astype(jnp.int32)


def permute(layout: Layout, x: Array, target: Sequence[int]) -> Array:
    """Sends what each rank has to the rank that ``target`` has for it.

    ``ppermute`` counts ranks as the mesh orders its axes, however these are named: other
    collectives count as the names are ordered.
    """
    names, sizes = layout.axis_names, bound_axes()
    ordered = [name for name in sizes if name in names]
    ranks = np.arange(layout.num_ranks).reshape([sizes[name] for name in names])
    index = np.argsort(ranks.transpose([names.index(name) for name in ordered]), axis=None)
    pairs = [(int(index[rank]), int(index[to])) for rank, to in enumerate(target)]
    return jax.lax.ppermute(x, tuple(ordered), pairs)


def devices_by_group(mesh: Any, layout: Layout) -> np.ndarray:
    """Returns a mesh's devices as [groups, ranks], in the order of the layout's axis names."""
    first = [mesh.axis_names.index(name) for name in layout.axis_names]
    others = [i for i in range(len(mesh.axis_names)) if i not in first]
    return mesh.devices.transpose(*others, *first).reshape(-1, layout.num_ranks)
