"""The layer's parameters: their names, shapes and shardings, and how each device gets its own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_ep._compat import vary_over
from jax_ep.experts import Dims, Experts
from jax_ep.flax._config import Config

Weights = dict[str, jax.Array]

SHARED = "shared_"


def dims_of(config: Config) -> dict[str, tuple[str | int, ...]]:
    """Returns the axes of each trained parameter, by what they count.

    A network's ``"hidden"`` is what crosses to experts; that of all others is the model's.
    """
    router = config.router
    dims: dict[str, tuple[str | int, ...]] = {}
    if router is not None:
        dims["router_kernel"] = ("hidden", "num_choosable")
        if router.has_logit_bias:
            dims["router_logit_bias"] = ("num_choosable",)
    own: Dims = config.experts.dims
    if config.latent_hidden is not None:
        dims["latent_in"] = ("hidden", "latent_hidden")
        dims["latent_out"] = ("latent_hidden", "hidden")
    renamed = {"hidden": "expert_hidden"}
    for name, axes in own.items():
        dims[name] = ("num_experts", *(renamed.get(str(axis), axis) for axis in axes))
    if config.shared_hidden is not None:
        renamed = {"ffn_hidden": "shared_hidden"}
        for name, axes in own.items():
            dims[SHARED + name] = tuple(renamed.get(str(axis), axis) for axis in axes)
        if config.gate_shared:
            dims["shared_gate_kernel"] = ("hidden", 1)
    return dims


def shape_of(config: Config, dims: tuple[str | int, ...]) -> tuple[int, ...]:
    """Returns a parameter's shape."""
    return tuple(dim if isinstance(dim, int) else getattr(config, dim) for dim in dims)


def specs_of(config: Config) -> dict[str, P]:
    """Returns how each trained parameter is stored: experts by rank, and cut where it is said."""
    return {name: _spec(config, name, dims) for name, dims in dims_of(config).items()}


def _spec(config: Config, name: str, dims: tuple[str | int, ...]) -> P:
    if not _is_of_network(config, name):
        return P()
    over: dict[str | int, Any] = {
        "num_experts": config.expert_axes or None,
        "ffn_hidden": config.tensor_axis,
        "shared_hidden": config.tensor_axis,
        "hidden": config.fsdp_axes or None,
        "expert_hidden": config.fsdp_axes or None,
    }
    return P(*(over.get(dim) for dim in dims))


def default_init(dims: tuple[str | int, ...]) -> jax.nn.initializers.Initializer:
    """Returns LeCun's normal initializer of each expert's matrices; biases begin as zero.

    A matrix goes from the first axis to the last; what is between counts further ones.
    """
    batch = tuple(
        i
        for i, dim in enumerate(dims)
        if dim == "num_experts" or (isinstance(dim, int) and i + 1 < len(dims))
    )
    matrix = [i for i in range(len(dims)) if i not in batch]
    if len(matrix) < 2:
        return jax.nn.initializers.zeros
    return jax.nn.initializers.lecun_normal(
        in_axis=matrix[0], out_axis=matrix[-1], batch_axis=batch
    )


def on_this_device(config: Config, axes: tuple[str, ...], weights: Weights) -> Weights:
    """Returns what a shard computes with: parameters stored in parts are gathered, in their dtype.

    Over ``tensor_axis`` each device keeps its part; what has none there counts once, on the first.
    """
    if not axes:
        return weights
    mine, all_dims = dict(weights), dims_of(config)
    for name in weights.keys() & all_dims.keys():
        if not _is_of_network(config, name):
            continue
        dims = all_dims[name]
        if config.fsdp_axes:
            for i in (i for i, dim in enumerate(dims) if dim in ("hidden", "expert_hidden")):
                mine[name] = jax.lax.all_gather(mine[name], config.fsdp_axes, axis=i, tiled=True)
        if config.tensor_axis is not None and not {"ffn_hidden", "shared_hidden"} & set(dims):
            is_first = jax.lax.axis_index(config.tensor_axis) == 0
            weight = vary_over(mine[name], frozenset([config.tensor_axis]))
            mine[name] = jnp.where(is_first, weight, jnp.zeros_like(weight))
    return mine


def _is_of_network(config: Config, name: str) -> bool:
    return name in config.experts.dims or (
        name.startswith(SHARED) and name.removeprefix(SHARED) in config.experts.dims
    )


def with_dims(experts: Any) -> Experts:
    """Returns a network, checked to say what its parameters are.

    Raises:
      TypeError: it has no ``dims`` of names and tuples.
      ValueError: an axis is neither a size nor one that the layer knows.
    """
    dims = getattr(experts, "dims", None)
    if not isinstance(dims, Mapping):
        raise TypeError(
            "experts must be a name, or have `dims` beside its call, which say what parameters the "
            f"layer is to make: see jax_ep.experts.Experts; got {experts!r}."
        )
    for name, axes in dims.items():
        for axis in axes:
            if not isinstance(axis, int) and axis not in ("hidden", "ffn_hidden"):
                raise ValueError(
                    f"dims[{name!r}] must consist of 'hidden', 'ffn_hidden' and sizes; got {axes}."
                )
    return experts
