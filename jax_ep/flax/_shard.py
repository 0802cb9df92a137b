"""What each shard of an MoE layer does with its tokens."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_ep import routing
from jax_ep._balance import Balance
from jax_ep._compat import vary_over
from jax_ep._layout import suggest_capacity
from jax_ep._moe import moe
from jax_ep._plan import Plan
from jax_ep._types import DROPPED
from jax_ep.flax._config import Config
from jax_ep.flax._metrics import global_metrics
from jax_ep.flax._parameters import SHARED, Weights
from jax_ep.flax._storage import on_this_device


class TokenArrays(NamedTuple):
    """What there is of each token of a shard.

    Attributes:
      x: the token.
      is_token: whether it is one, and not padding.
      topk_idx: its choices, if they are made already.
      topk_weights: their weights, likewise.
      noise: what the router's view of the token is multiplied by, if by anything.
    """

    x: Float[Array, "num_tokens hidden"]
    is_token: Bool[Array, "num_tokens"]
    topk_idx: Int32[Array, "num_tokens num_topk"] | None
    topk_weights: Float32[Array, "num_tokens num_topk"] | None
    noise: Float32[Array, "num_tokens hidden"] | None


def apply_shard(
    config: Config,
    axes: tuple[str, ...],
    weights: Weights,
    tokens: TokenArrays,
    share: Float32[Array, "num_ranks"] | None,
) -> tuple[Float[Array, "num_tokens hidden"], dict[str, Any]]:
    """Routes a shard's tokens, has experts applied, and adds what is done with all tokens.

    Args:
      config: the layer.
      axes: the mesh axes that tokens are sharded over.
      weights: the shard's part of the parameters.
      tokens: the shard's.
      share: for ``balance``, if any.

    Returns:
      The tokens' outputs, and scalars that are equal on all shards.
    """
    weights = on_this_device(config, axes, weights)
    topk_idx, topk_weights, aux = _route(config, axes, weights, tokens)
    topk_idx = jnp.where(tokens.is_token[:, None], topk_idx, DROPPED)
    dtype = tokens.x.dtype if config.dtype is None else config.dtype
    x, tensor = tokens.x.astype(dtype), config.tensor_axis if axes else None
    given_back = None
    if config.num_zero_experts:
        kept = jnp.where(topk_idx >= config.num_experts, topk_weights, 0.0)
        given_back = x * jnp.sum(kept, axis=1, keepdims=True).astype(dtype)
    if tensor is not None:
        # Of these, too, each device has a part of the gradient, which is added up once a token.
        x, topk_weights = (vary_over(a, frozenset([tensor])) for a in (x, topk_weights))
    weights = {name: _cast(weight, dtype) for name, weight in weights.items()}
    out, plan = _experts(config, axes, weights, x, (topk_idx, topk_weights), share)
    if config.shared_hidden is not None:
        out += _shared(config, weights, x)
    if tensor is not None:
        out = jax.lax.psum(out, tensor)
    if given_back is not None:
        out += given_back
    return out, {**aux, **global_metrics(config, axes, plan, topk_idx, dtype)}


def _route(
    config: Config, axes: tuple[str, ...], weights: Weights, tokens: TokenArrays
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Returns the choices, their weights, and the router's losses if it is one that is known."""
    if config.router is None:
        assert tokens.topk_idx is not None
        assert tokens.topk_weights is not None
        return tokens.topk_idx, tokens.topk_weights, {}
    dtype = config.router.dtype
    seen = tokens.x.astype(dtype)
    if tokens.noise is not None:
        seen *= tokens.noise.astype(dtype)
    kernel = weights["router_kernel"].astype(dtype)
    logits = jnp.matmul(seen, kernel, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)
    if config.router.has_logit_bias:
        logits += weights["router_logit_bias"].astype(jnp.float32)
    topk_idx, topk_weights = config.router.choose(
        logits, config.num_topk, bias=weights.get("router_bias"), topk_idx=tokens.topk_idx
    )
    chosen = jnp.where(tokens.is_token[:, None], topk_idx, DROPPED)
    over = axes or None
    probs = config.router.probs(logits)
    losses = {
        "load_balance_loss": routing.load_balance_loss(probs, chosen, axis_name=over),
        "router_z_loss": routing.router_z_loss(logits, where=tokens.is_token, axis_name=over),
    }
    return topk_idx, topk_weights, losses


def _experts(
    config: Config,
    axes: tuple[str, ...],
    weights: Weights,
    x: jax.Array,
    routed: tuple[jax.Array, jax.Array],
    share: jax.Array | None,
) -> tuple[jax.Array, Plan]:
    """Has experts applied by the exchange, to tokens as wide as experts are."""
    topk_idx, topk_weights = routed
    if config.num_zero_experts:
        topk_idx = jnp.where(topk_idx < config.num_experts, topk_idx, DROPPED)
    if config.latent_hidden is not None:
        x = x @ weights["latent_in"]
    balance = Balance(config.num_spares, config.slack, share)
    out, plan = moe(
        x,
        topk_idx,
        topk_weights,
        *(weights[name] for name in config.experts.dims),
        num_experts=config.num_experts,
        experts=config.experts,
        weigh=config.weigh,
        axis_name=config.expert_axes if axes and config.expert_axes else None,
        capacity=_capacity(config, axes, len(x) // config.chunks),
        ranks_per_node=config.ranks_per_node if axes else 1,
        balance=balance if _is_balanced(config, axes) else None,
        chunks=config.chunks,
        unroll_chunks=config.unroll_chunks,
        wire_dtype=config.wire_dtype,
        wire_cotangents=config.wire_cotangents,
        implementation=config.implementation,
    )
    return (out if config.latent_hidden is None else out @ weights["latent_out"]), plan


def _shared(config: Config, weights: Weights, x: jax.Array) -> jax.Array:
    """Applies the shared expert: to all tokens, as one group, so beside the exchange."""
    mine = (weights[SHARED + name][None] for name in config.experts.dims)
    out = config.experts(x, jnp.full(1, len(x), jnp.int32), *mine)
    if config.gate_shared:
        out *= jax.nn.sigmoid(x @ weights["shared_gate_kernel"])
    return out


def _cast(weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return weight.astype(dtype) if jnp.issubdtype(weight.dtype, jnp.floating) else weight


def _is_balanced(config: Config, axes: tuple[str, ...]) -> bool:
    """Tells whether experts are lent: where there is one rank, nobody could borrow any."""
    return config.num_spares > 0 and bool(axes) and bool(config.expert_axes)


def _capacity(config: Config, axes: tuple[str, ...], num_tokens: int) -> int | None:
    if config.capacity_factor is None:
        return None
    num_ranks = math.prod(jax.lax.axis_size(name) for name in config.expert_axes if axes)
    return suggest_capacity(
        num_tokens, config.num_topk, config.num_experts, num_ranks, factor=config.capacity_factor
    )
