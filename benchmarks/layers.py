"""The same expert layer in several ways: what one rank computes, given its tokens and choices.

All return the outputs and the fraction of this rank's choices that were dropped. SwiGLU experts
take what the exchange brings in the form that suits them best: grouped where rows are grouped, a
batch of dense products where every expert has as many slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from baselines import all_gather_reduce_scatter
from programs import AXIS
from shapes import Shape

import jax_ep
from jax_ep.testing import slots_moe

Weights = tuple[jax.Array, jax.Array, jax.Array]
Layer = Callable[..., tuple[jax.Array, jax.Array]]


class Way(NamedTuple):
    """A way to compute the layer.

    Attributes:
      layer: ``(x, topk_idx, topk_weights, weights)`` of one rank to outputs and dropped fraction.
      drops: whether it drops where routing is skewed.
      whole: whether it is one of all ranks: then XLA's partitioner cuts it up.
    """

    layer: Layer
    drops: bool = False
    whole: bool = False


def ways(shape: Shape) -> dict[str, Way]:
    """Returns every way to compute the layer, by name."""
    slots = -(-2 * shape.num_tokens * shape.num_topk // shape.num_experts)
    even = shape.num_tokens * shape.num_topk

    def exchange(implementation: Any, **options: Any) -> Callable[..., tuple[jax.Array, Any]]:
        return partial(
            jax_ep.moe,
            num_experts=shape.num_experts,
            axis_name=AXIS,
            implementation=implementation,
            **options,
        )

    return {
        "native": Way(partial(by_exchange, exchange("native"))),
        "native, balanced": Way(
            partial(by_exchange, exchange("native", capacity=even, balance=jax_ep.Balance()))
        ),
        "xla": Way(partial(by_exchange, exchange("xla"))),
        "all_gather": Way(partial(by_all_gather, shape)),
        "all_to_all, no drops": Way(partial(by_slots, shape, shape.num_tokens)),
        "all_to_all, factor 2": Way(partial(by_slots, shape, slots), drops=True),
        "einsum (GSPMD), factor 2": Way(partial(by_einsum, shape, slots), drops=True, whole=True),
        "dense": Way(partial(densely, shape), whole=True),
    }


def by_exchange(
    moe: Callable[..., tuple[jax.Array, jax_ep.Plan]],
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    weights: Weights,
) -> tuple[jax.Array, jax.Array]:
    """``jax_ep.moe``."""
    out, plan = moe(x, topk_idx, topk_weights, *weights)
    return out, plan.num_dropped / topk_idx.size


def by_all_gather(
    shape: Shape, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, weights: Weights
) -> tuple[jax.Array, jax.Array]:
    """All tokens to all ranks, and the ranks' sums scattered back."""

    def experts(rows: jax.Array, local_expert: jax.Array) -> jax.Array:
        num_local = shape.num_local_experts
        sizes = jnp.zeros_like(local_expert, shape=num_local).at[local_expert].add(1, mode="drop")
        gate, up = (jax_ep.grouped_matmul(rows, w, sizes) for w in weights[:2])
        return jax_ep.grouped_matmul(jax.nn.silu(gate) * up, weights[2], sizes)

    # A rank's experts may be asked for all choices there are.
    most = shape.num_ranks * shape.num_tokens * min(shape.num_topk, shape.num_local_experts)
    result = all_gather_reduce_scatter(
        x,
        topk_idx,
        topk_weights,
        experts,
        num_experts=shape.num_experts,
        capacity=most,
        axis_name=AXIS,
    )
    return result.out, jnp.mean(~result.kept, dtype=jnp.float32)


def by_slots(
    shape: Shape,
    num_slots: int,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    weights: Weights,
) -> tuple[jax.Array, jax.Array]:
    """As many slots for each expert from each rank, by ``all_to_all``."""
    result = slots_moe(
        x,
        topk_idx,
        topk_weights,
        *weights,
        num_experts=shape.num_experts,
        num_slots=num_slots,
        axis_name=AXIS,
    )
    return result.out, jnp.mean(~result.kept, dtype=jnp.float32)


def by_einsum(
    shape: Shape,
    num_slots: int,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    weights: Weights,
) -> tuple[jax.Array, jax.Array]:
    """GShard's one-hot products, https://arxiv.org/abs/2006.16668, on global arrays [R, T, ...]."""
    hits = jax.nn.one_hot(topk_idx, shape.num_experts, dtype=jnp.float32)  # [R, T, K, E]
    by_k = jnp.moveaxis(hits, 2, 1).reshape(len(hits), -1, shape.num_experts)
    position = (jnp.cumsum(by_k, axis=1) - by_k).reshape(
        len(hits), shape.num_topk, -1, shape.num_experts
    )
    position = jnp.sum(jnp.moveaxis(position, 1, 2) * hits, axis=-1).astype(jnp.int32)
    slot = jax.nn.one_hot(position, num_slots, dtype=jnp.float32)  # zero where there is none left
    goes = jnp.einsum("rtke,rtks->rtes", hits, slot)
    comes = jnp.einsum("rtke,rtks,rtk->rtes", hits, slot, topk_weights)
    rows = _sharded(jnp.einsum("rtes,rth->ersh", goes, x))
    w_gate, w_up, w_down = (w.reshape(-1, *w.shape[2:]) for w in weights)
    gate, up = (jnp.einsum("ersh,ehf->ersf", rows, w) for w in (w_gate, w_up))
    rows = _sharded(jnp.einsum("ersf,efh->ersh", jax.nn.silu(gate) * up, w_down))
    out = _sharded(jnp.einsum("rtes,ersh->rth", comes, rows))
    kept = jnp.sum(goes, axis=(1, 2, 3)) / (shape.num_tokens * shape.num_topk)
    return out, 1 - kept


def densely(
    shape: Shape, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, weights: Weights
) -> tuple[jax.Array, jax.Array]:
    """Every expert on every token, on global arrays [R, T, ...]."""
    hits = jax.nn.one_hot(topk_idx, shape.num_experts, dtype=jnp.float32)
    share = jnp.einsum("rtke,rtk->rte", hits, topk_weights)
    w_gate, w_up, w_down = (w.reshape(-1, *w.shape[2:]) for w in weights)
    gate, up = (jnp.einsum("rth,ehf->rtef", x, w) for w in (w_gate, w_up))
    rows = jax.nn.silu(gate) * up * share[..., None]
    return jnp.einsum("rtef,efh->rth", rows, w_down), jnp.zeros(len(x))


def _sharded(array: jax.Array) -> jax.Array:
    """Has XLA cut up the first axis: experts, or the ranks that tokens are of."""
    return jax.lax.with_sharding_constraint(array, jax.sharding.PartitionSpec(AXIS))
