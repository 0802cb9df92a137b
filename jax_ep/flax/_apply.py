"""The MoE layer as a function of global arrays, and as what each shard of them does."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Num

from jax_ep import routing
from jax_ep._balance import Balance
from jax_ep._fp8 import encoded_bytes
from jax_ep._layout import suggest_capacity
from jax_ep._metrics import count_choices, load_metrics, max_over_mean, rank_load
from jax_ep._moe import moe
from jax_ep._plan import Plan
from jax_ep._types import DROPPED
from jax_ep.flax._config import Config, Weights, mesh_axes
from jax_ep.flax._placement import check_placement

Aux = dict[str, Num[Array, "..."]]


def apply(
    config: Config,
    weights: Weights,
    x: Float[Array, "*batch hidden"],
    token_mask: Bool[Array, "*batch"] | None,
) -> tuple[Float[Array, "*batch hidden"], Aux]:
    """Applies the layer over the mesh in context; returns the output and the auxiliary scalars.

    Raises:
      ValueError: the mesh does not suit the layer, as ``mesh_axes`` says, or not its arrays, as
        ``check_placement`` says.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = mesh_axes(config, mesh)
    check_placement(mesh, weights, x)
    return _apply(config, axes, weights, x, token_mask)


# Compiled even where the caller is not: run operation by operation, a shard_map is very slow.
@partial(jax.jit, static_argnums=(0, 1))
def _apply(
    config: Config,
    axes: tuple[str, ...],
    weights: Weights,
    x: jax.Array,
    token_mask: jax.Array | None,
) -> tuple[jax.Array, Aux]:
    over_mesh: Callable[..., Any] = partial(_over_mesh, config, axes)
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name in axes if types[name] == AxisType.Explicit)
    if explicit:
        # Flattening and padding tokens has no one sharding: XLA chooses on the way in, and the
        # result goes back to where x was.
        out_sharding = (jax.typeof(x).sharding.spec, P())
        over_mesh = jax.sharding.auto_axes(over_mesh, axes=explicit, out_sharding=out_sharding)
    return over_mesh(weights, x, token_mask)


def _over_mesh(
    config: Config,
    axes: tuple[str, ...],
    weights: Weights,
    x: jax.Array,
    token_mask: jax.Array | None,
) -> tuple[jax.Array, Aux]:
    """Shards the tokens over all axes and the experts over theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = x.reshape(-1, config.hidden)
    is_token = jnp.ones(tokens.shape[0], jnp.bool_)
    if token_mask is not None:
        is_token = token_mask.reshape(-1)
        # What is no token may hold anything, even NaN, and would reach the router's gradient.
        tokens = jnp.where(is_token[:, None], tokens, jnp.zeros((), tokens.dtype))
    num_tokens, num_parts = tokens.shape[0], math.prod(mesh.shape[name] for name in axes)
    num_parts *= config.chunks
    num_padding = max(1, -(-num_tokens // num_parts)) * num_parts - num_tokens
    tokens = jnp.pad(tokens, ((0, num_padding), (0, 0)))
    is_token = jnp.pad(is_token, (0, num_padding))
    shard = partial(_shard, config, axes)
    if axes:
        specs: tuple[Any, ...] = (P(), P(), *(config.expert_spec,) * 3)
        in_specs = (Weights(*specs), P(axes), P(axes))
        shard = jax.shard_map(shard, in_specs=in_specs, out_specs=(P(axes), P()))
    out, aux = shard(weights, tokens, is_token)
    return out[:num_tokens].reshape(x.shape), aux


def _shard(
    config: Config, axes: tuple[str, ...], weights: Weights, x: jax.Array, is_token: jax.Array
) -> tuple[jax.Array, Aux]:
    """Does one shard's part."""
    logits = jnp.matmul(
        x.astype(jnp.float32),
        weights.router_kernel.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    topk_idx, topk_weights, probs = _route(config, logits, weights.router_bias)
    topk_idx = jnp.where(is_token[:, None], topk_idx, DROPPED)
    dtype = x.dtype if config.dtype is None else config.dtype
    experts = (weights.w_gate, weights.w_up, weights.w_down)
    out, plan = moe(
        x.astype(dtype),
        topk_idx,
        topk_weights,
        *(matrices.astype(dtype) for matrices in experts),
        num_experts=config.num_experts,
        axis_name=config.expert_axes if axes and config.expert_axes else None,
        capacity=_capacity(config, axes, x.shape[0] // config.chunks),
        ranks_per_node=config.ranks_per_node if axes else 1,
        balance=Balance(config.num_spares, config.slack) if _is_balanced(config, axes) else None,
        chunks=config.chunks,
        unroll_chunks=config.unroll_chunks,
        wire_dtype=config.wire_dtype,
        wire_cotangents=config.wire_cotangents,
        implementation=config.implementation,
    )
    over = axes or None
    return out, {
        "load_balance_loss": routing.load_balance_loss(probs, topk_idx, axis_name=over),
        "router_z_loss": routing.router_z_loss(logits, where=is_token, axis_name=over),
        **_global_metrics(config, axes, plan, topk_idx, dtype),
    }


def _is_balanced(config: Config, axes: tuple[str, ...]) -> bool:
    """Tells whether experts are lent: where there is one rank, nobody could borrow any."""
    return config.num_spares > 0 and bool(axes) and bool(config.expert_axes)


def _route(
    config: Config, logits: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the choices, their weights and each token's probabilities of all experts."""
    if bias is None:
        return *routing.softmax_topk(logits, config.num_topk), jax.nn.softmax(logits, axis=-1)
    # Scores divided by their sum, even where they underflow.
    probs = jax.nn.softmax(jax.nn.log_sigmoid(logits), axis=-1)
    return *routing.sigmoid_topk(logits, bias, config.num_topk), probs


def _capacity(config: Config, axes: tuple[str, ...], num_tokens: int) -> int | None:
    if config.capacity_factor is None:
        return None
    num_ranks = math.prod(jax.lax.axis_size(name) for name in config.expert_axes if axes)
    return suggest_capacity(
        num_tokens, config.num_topk, config.num_experts, num_ranks, factor=config.capacity_factor
    )


def _global_metrics(
    config: Config,
    axes: tuple[str, ...],
    plan: Plan,
    topk_idx: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> Aux:
    """Brings ``load_metrics`` of all shards together."""
    width, element = config.hidden, dtype
    if config.wire_dtype is not None:
        width, element = encoded_bytes(config.hidden), jnp.uint8
    summed = ("recv_rows", "logical_bytes", "wire_bytes", "node_wire_bytes")

    def sums(plan: Plan) -> Aux:
        local = load_metrics(plan, hidden=width, dtype=element)
        of_plan = {"load": plan.expert_load, "dropped": plan.num_dropped}
        return {name: local[name] for name in summed} | of_plan

    totals = sums(plan) if config.chunks == 1 else _sum_first(jax.vmap(sums)(plan))
    load = totals.pop("load")
    totals = jax.lax.psum(totals, axes) if axes else totals
    # The load counts all ranks of the expert axis already.
    others = tuple(name for name in axes if name not in config.expert_axes)
    load = jax.lax.psum(load, others) if others else load
    expert_load = load
    if plan.num_experts != config.num_experts:  # A plan of slots, which are not experts.
        expert_load = count_choices(topk_idx, config.num_experts, axis_name=axes)
    num_choices = jnp.maximum(jnp.sum(expert_load), 1).astype(jnp.float32)
    return {
        "expert_load": expert_load,
        "expert_load_max_over_mean": max_over_mean(expert_load),
        "rank_load_max_over_mean": max_over_mean(rank_load(load, plan.num_ranks)),
        "dropped_fraction": totals.pop("dropped").astype(jnp.float32) / num_choices,
        **totals,
    }


def _sum_first(sums: Aux) -> Aux:
    """Adds up along the first axis, in the dtypes there are."""
    return {name: jnp.sum(value, axis=0, dtype=value.dtype) for name, value in sums.items()}
