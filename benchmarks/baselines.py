"""What one writes in pure JAX instead of this library: three exchanges to compare with.

Each is what one rank does inside ``shard_map``: choices in, experts applied, weighted sums out. All
use the plainest formulation that XLA:CPU runs well: rows are gathered by index, never scattered or
multiplied with one-hot matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
from shapes import Shape

from jax_ep.testing import SlotsResult, slots_all_to_all
from jax_ep.testing._slots import Experts, from_bits, to_bits

Baseline = Callable[[Array, Array, Array, Experts], SlotsResult]


def baselines(shape: Shape, axis_name: str) -> dict[str, Baseline]:
    """Returns the three baselines for a shape, by name."""
    factor_two = math.ceil(2 * shape.num_tokens * shape.num_topk / shape.num_experts)
    # Choices of a token are distinct, so no expert gets more from a rank than it has tokens. As
    # num_topk >= num_local_experts in every shape here, slots by rank would be as many.
    no_drop = shape.num_tokens
    all_to_all = functools.partial(
        slots_all_to_all, num_experts=shape.num_experts, axis_name=axis_name
    )
    return {
        "all_to_all, factor 2": functools.partial(all_to_all, num_slots=factor_two),
        "all_to_all, no drops": functools.partial(all_to_all, num_slots=no_drop),
        "all_gather": functools.partial(
            all_gather_reduce_scatter,
            num_experts=shape.num_experts,
            capacity=shape.capacity,
            axis_name=axis_name,
        ),
    }


def all_gather_reduce_scatter(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    experts: Experts,
    *,
    num_experts: int,
    capacity: int,
    axis_name: str,
) -> SlotsResult:
    """Gives every rank all tokens; each adds up what its experts make of theirs.

    The rows of a rank are sorted by expert and cut off at ``capacity``.
    """
    num_tokens, num_topk = topk_idx.shape
    num_local_experts = num_experts // jax.lax.axis_size(axis_name)
    tokens = from_bits(jax.lax.all_gather(to_bits(x), axis_name, tiled=True), x.dtype)
    weights = jax.lax.all_gather(topk_weights, axis_name, tiled=True).reshape(-1)
    local = jax.lax.all_gather(topk_idx, axis_name, tiled=True).reshape(-1)
    local = local - jax.lax.axis_index(axis_name).astype(jnp.int32) * num_local_experts
    local = jnp.where((local >= 0) & (local < num_local_experts), local, num_local_experts)

    choice = jnp.argsort(local, stable=True)[:capacity].astype(jnp.int32)
    token, here = choice // num_topk, local[choice] < num_local_experts
    rows = experts(tokens[token], local[choice])
    scale = jnp.where(here, weights[choice], 0)
    partial = jnp.zeros_like(tokens, dtype=jnp.float32)
    partial = partial.at[token].add(scale[:, None] * rows.astype(jnp.float32))
    out = jax.lax.psum_scatter(partial.astype(x.dtype), axis_name, tiled=True)

    hits = jnp.zeros_like(local).at[choice].set(here.astype(jnp.int32), unique_indices=True)
    hits = jax.lax.psum_scatter(hits, axis_name, tiled=True)
    return SlotsResult(out, hits.reshape(num_tokens, num_topk) > 0)
