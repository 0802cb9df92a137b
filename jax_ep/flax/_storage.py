"""Where parameters are stored, and how each device gets what it computes with."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_ep._compat import vary_over
from jax_ep._types import names_of
from jax_ep.flax._config import Config
from jax_ep.flax._parameters import Weights, dims_of, is_of_network


def specs_of(config: Config) -> dict[str, P]:
    """Returns how each trained parameter is stored: as ``out_sharding`` says, or the axes."""
    told = dict(config.out_sharding)
    stored = {
        name: stored_over(told[name], len(dims)) if name in told else _by_axes(config, name)
        for name, dims in dims_of(config).items()
    }
    # With an entry for each axis: in a scan, Flax takes the one of layers off even from P().
    return {name: P(*(axes or None for axes in cut)) for name, cut in stored.items()}


def _by_axes(config: Config, name: str) -> list[tuple[str, ...]]:
    """Returns over which mesh axes a parameter is stored that ``out_sharding`` does not name."""
    cut, dims = computed_over(config, name), dims_of(config)[name]
    hidden = [i for i, dim in enumerate(dims) if dim in ("hidden", "expert_hidden")]
    if config.fsdp_axes and hidden and is_of_network(config, name):
        # Where there are two of that width, the first: a mesh axis can cut one alone.
        cut[hidden[0]] = config.fsdp_axes
    return cut


def computed_over(config: Config, name: str) -> list[tuple[str, ...]]:
    """Returns the mesh axes over which the layer computes with parts of each of the axes."""
    dims = dims_of(config)[name]
    if not is_of_network(config, name):
        return [()] * len(dims)
    tensor = names_of(config.tensor_axis)
    over = {"num_experts": config.expert_axes, "ffn_hidden": tensor, "shared_hidden": tensor}
    return [over.get(str(dim), ()) for dim in dims]


def stored_over(spec: P, num_dims: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes over which each of a parameter's axes is stored, major first."""
    return [names_of(entry) for entry in (*spec, *[None] * (num_dims - len(spec)))]


def on_this_device(config: Config, axes: tuple[str, ...], weights: Weights) -> Weights:
    """Returns what a shard computes with: parameters stored in parts are gathered, in their dtype.

    Over ``tensor_axis`` each device keeps its part; what has none there counts once, on the first.
    """
    if not axes:
        return weights
    mine, specs = dict(weights), specs_of(config)
    for name, dims in dims_of(config).items():
        computed = computed_over(config, name)
        stored = stored_over(specs[name], len(dims))
        for i, (kept, cut) in enumerate(zip(stored, computed, strict=True)):
            mine[name] = _gather(config, name, mine[name], kept[len(cut) :], i)
            mine[name] = _take(mine[name], cut[len(kept) :], i)
        tensor = names_of(config.tensor_axis)
        if tensor and is_of_network(config, name) and tensor not in computed:
            is_first = jax.lax.axis_index(tensor) == 0
            weight = vary_over(mine[name], frozenset(tensor))
            mine[name] = jnp.where(is_first, weight, jnp.zeros_like(weight))
    return mine


def _gather(
    config: Config, name: str, part: jax.Array, axes: tuple[str, ...], dim: int
) -> jax.Array:
    """Gathers a parameter over mesh axes, minor last; the gradient's sum is scattered likewise."""
    if not name.startswith("router_"):
        return jax.lax.all_gather(part, axes, axis=dim, tiled=True) if axes else part
    for axis in reversed(axes):
        # Devices along the tensor axis route the same tokens: each has all of the gradient.
        to = "invarying" if axis == config.tensor_axis else "varying"
        part = jax.lax.all_gather(part, axis, axis=dim, tiled=True, to=to)
    return part


def _take(whole: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Takes a device's part of what is the same along mesh axes."""
    if not axes:
        return whole
    size = whole.shape[dim] // math.prod(jax.lax.axis_size(axis) for axis in axes)
    whole = vary_over(whole, frozenset(axes))
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axes) * size, size, dim)
