"""The MoE layer as a function of global arrays, and as what each shard of them does."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Num

from jax_ep.flax._config import Config, token_axes
from jax_ep.flax._inputs import Inputs
from jax_ep.flax._out_sharding import check_out_sharding
from jax_ep.flax._parameters import Weights
from jax_ep.flax._placement import check_placement
from jax_ep.flax._shard import TokenArrays, apply_shard
from jax_ep.flax._storage import specs_of

Aux = dict[str, Num[Array, "..."]]


def apply(
    config: Config, weights: Weights, inputs: Inputs
) -> tuple[Float[Array, "*batch hidden"], Aux]:
    """Applies the layer over the mesh in context; returns the output and the auxiliary scalars.

    Raises:
      ValueError: the mesh does not suit the layer, as ``token_axes`` and ``check_out_sharding``
        say, or not its arrays, as ``check_placement`` says.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = token_axes(config, mesh)
    check_out_sharding(config, mesh)
    check_placement(mesh, weights, inputs.x)
    return _apply(config, axes, weights, inputs)


# Compiled even where the caller is not: run operation by operation, a shard_map is very slow.
@partial(jax.jit, static_argnums=(0, 1))
def _apply(
    config: Config, axes: tuple[str, ...], weights: Weights, inputs: Inputs
) -> tuple[jax.Array, Aux]:
    over_mesh: Callable[..., Any] = partial(_over_mesh, config, axes)
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name in types if types[name] == AxisType.Explicit)
    if explicit:
        # Flattening and padding tokens has no one sharding: XLA chooses on the way in, and the
        # result goes back to where x was.
        out_sharding = (jax.typeof(inputs.x).sharding.spec, P())
        over_mesh = jax.sharding.auto_axes(over_mesh, axes=explicit, out_sharding=out_sharding)
    return over_mesh(weights, inputs)


def _over_mesh(
    config: Config, axes: tuple[str, ...], weights: Weights, inputs: Inputs
) -> tuple[jax.Array, Aux]:
    """Shards the tokens over all axes but the tensor axis, and the experts over theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = _flatten(config, inputs)
    num_tokens, num_parts = len(tokens.x), math.prod(mesh.shape[name] for name in axes)
    num_parts *= config.chunks
    num_padding = max(1, -(-num_tokens // num_parts)) * num_parts - num_tokens
    tokens = jax.tree.map(lambda a: _pad(a, num_padding), tokens)
    shard = partial(apply_shard, config, axes)
    if axes:
        specs = specs_of(config)
        in_specs = ({name: specs.get(name, P()) for name in weights}, P(axes), P())
        shard = jax.shard_map(shard, in_specs=in_specs, out_specs=(P(axes), P()))
    out, aux = shard(weights, tokens, inputs.share)
    return out[:num_tokens].reshape(inputs.x.shape), aux


def _flatten(config: Config, inputs: Inputs) -> TokenArrays:
    """Returns what there is of each token, by one axis of tokens."""
    x = inputs.x.reshape(-1, config.hidden)
    is_token = jnp.ones(len(x), jnp.bool_)
    if inputs.token_mask is not None:
        is_token = inputs.token_mask.reshape(-1)
        # What is no token may hold anything, even NaN, and would reach the router's gradient.
        x = jnp.where(is_token[:, None], x, jnp.zeros((), x.dtype))
    noise = None
    if inputs.jitter_key is not None and config.router is not None:
        jitter = config.router.jitter
        # Drawn for all tokens at once: no mesh changes it.
        noise = jax.random.uniform(inputs.jitter_key, x.shape, jnp.float32, 1 - jitter, 1 + jitter)
    topk_idx, topk_weights = (
        None if a is None else a.reshape(-1, config.num_topk)
        for a in (inputs.topk_idx, inputs.topk_weights)
    )
    return TokenArrays(x, is_token, topk_idx, topk_weights, noise)


def _pad(array: jax.Array, num_padding: int) -> jax.Array:
    return jnp.pad(array, ((0, num_padding), *((0, 0) for _ in array.shape[1:])))
