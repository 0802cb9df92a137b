"""What one writes in pure JAX instead of this library: three exchanges to compare with.

Each is what one rank does inside ``shard_map``: choices in, experts applied, weighted sums out. All
use the plainest formulation that XLA:CPU runs well: rows are gathered by index, never scattered or
multiplied with one-hot matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32
from shapes import Shape

Experts = Callable[[Float[Array, "rows hidden"], Int32[Array, "rows"]], Float[Array, "rows hidden"]]
"""Maps rows, given the local expert of each, to rows."""


class Result(NamedTuple):
    """The weighted sums, and which choices they are of."""

    out: Float[Array, "num_tokens hidden"]
    kept: Bool[Array, "num_tokens num_topk"]


Baseline = Callable[[Array, Array, Array, Experts], Result]


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


def slots_all_to_all(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    experts: Experts,
    *,
    num_experts: int,
    num_slots: int,
    axis_name: str,
) -> Result:
    """Sends every expert the same number of slots from every rank; what finds none is dropped.

    GShard's layout (https://arxiv.org/abs/2006.16668). First choices get slots before second ones.
    Rows reach the experts in the order of their source ranks: a pass that groups them is spared.
    """
    num_tokens, num_topk = topk_idx.shape
    num_ranks = jax.lax.axis_size(axis_name)
    expert = topk_idx.T.reshape(-1)
    position = _position_among_equals(expert, num_experts)
    kept = position < num_slots
    slot = jnp.where(kept, expert * num_slots + position, num_experts * num_slots)
    token = jnp.tile(jnp.arange(num_tokens, dtype=jnp.int32), num_topk)
    source = jnp.full_like(expert, num_tokens, shape=num_experts * num_slots)
    source = source.at[slot].set(token, mode="drop", unique_indices=True)

    sent = x.at[source].get(mode="fill", fill_value=0)
    rows = _all_to_all(sent, axis_name)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    rows = experts(rows, index // num_slots % (num_experts // num_ranks))
    back = _all_to_all(rows, axis_name)

    picked = back.at[slot.reshape(num_topk, num_tokens)].get(mode="fill", fill_value=0)
    out = jnp.einsum("kth,tk->th", picked.astype(jnp.float32), topk_weights)
    return Result(out.astype(x.dtype), kept.reshape(num_topk, num_tokens).T)


def all_gather_reduce_scatter(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    experts: Experts,
    *,
    num_experts: int,
    capacity: int,
    axis_name: str,
) -> Result:
    """Gives every rank all tokens; each adds up what its experts make of theirs.

    The rows of a rank are sorted by expert and cut off at ``capacity``.
    """
    num_tokens, num_topk = topk_idx.shape
    num_local_experts = num_experts // jax.lax.axis_size(axis_name)
    tokens = _from_bits(jax.lax.all_gather(_to_bits(x), axis_name, tiled=True), x.dtype)
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
    return Result(out, hits.reshape(num_tokens, num_topk) > 0)


def _all_to_all(rows: Float[Array, "rows hidden"], axis_name: str) -> Float[Array, "rows hidden"]:
    received = jax.lax.all_to_all(_to_bits(rows), axis_name, 0, 0, tiled=True)
    return _from_bits(received, rows.dtype)


def _to_bits(rows: Array) -> Array:
    """Shows 2-byte floats as integers: XLA:CPU widens bfloat16 to float32 to move it."""
    return jax.lax.bitcast_convert_type(rows, jnp.uint16) if rows.dtype.itemsize == 2 else rows


def _from_bits(bits: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _position_among_equals(keys: Int32[Array, "choices"], num_keys: int) -> Int32[Array, "choices"]:
    """Counts for each element the equal ones before it."""
    order = jnp.argsort(keys, stable=True)
    counts = jnp.zeros_like(keys, shape=num_keys).at[keys].add(1)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    position = jnp.arange(keys.size, dtype=jnp.int32) - first[keys[order]]
    return jnp.zeros_like(position).at[order].set(position, unique_indices=True)
