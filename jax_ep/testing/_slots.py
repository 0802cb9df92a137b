"""What one writes in pure JAX instead of this library: slots, and ``all_to_all`` of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_ep._axes import resolve_ranks
from jax_ep._checks import check_positive

Experts = Callable[[Float[Array, "rows hidden"], Int32[Array, "rows"]], Float[Array, "rows hidden"]]
"""Maps rows, given the local expert of each, to rows."""


class SlotsResult(NamedTuple):
    """The weighed sums, and which choices they are of."""

    out: Float[Array, "num_tokens hidden"]
    kept: Bool[Array, "num_tokens num_topk"]


def slots_all_to_all(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    experts: Experts,
    *,
    num_experts: int,
    num_slots: int,
    axis_name: str,
) -> SlotsResult:
    """Sends every expert as many slots from every rank; a choice that finds none is dropped.

    GShard's layout, https://arxiv.org/abs/2006.16668, by XLA's ``all_to_all``: for tests and
    benchmarks to compare with. First choices get slots before second ones. Rows are gathered by
    index, never scattered or multiplied with one-hot matrices, which is what XLA:CPU runs well.
    They reach the experts in the order (source rank, local expert, slot); empty slots hold zeros.

    Args:
      x: tokens of this rank.
      topk_idx: its choices, all of them experts: nothing checks it.
      topk_weights: their weights.
      experts: what is done with ``num_ranks * num_local_experts * num_slots`` rows.
      num_experts: experts on all ranks together.
      num_slots: rows that each rank may send to each expert; ``num_tokens`` drop nothing.
      axis_name: the axis of ranks, of a ``shard_map`` or a ``vmap``.

    Returns:
      The sums, in float32 and rounded once, and which choices had slots.

    Raises:
      TypeError: a count is no int.
      ValueError: a count is below 1, the axis is not bound, or ranks do not divide ``num_experts``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_ep.testing import slots_all_to_all
      >>> def layer(x, topk_idx):
      ...     weights, double = jnp.ones(topk_idx.shape), lambda rows, _: 2 * rows
      ...     return slots_all_to_all(
      ...         x, topk_idx, weights, double, num_experts=2, num_slots=1, axis_name="expert"
      ...     )
      >>> topk_idx = jnp.array([[[0], [1]], [[1], [1]]])
      >>> result = jax.vmap(layer, axis_name="expert")(jnp.ones((2, 2, 8)), topk_idx)
      >>> result.out[..., 0].tolist(), result.kept[..., 0].tolist()
      ([[2.0, 2.0], [2.0, 0.0]], [[True, True], [True, False]])
    """
    check_positive("num_slots", num_slots)
    _, num_ranks = resolve_ranks(axis_name, num_experts, 1)
    num_tokens, num_topk = topk_idx.shape
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
    return SlotsResult(out.astype(x.dtype), kept.reshape(num_topk, num_tokens).T)


def slots_moe(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    *weights: Float[Array, "num_local_experts ..."],
    num_experts: int,
    num_slots: int,
    axis_name: str,
) -> SlotsResult:
    """Does with ``slots_all_to_all`` what ``jax_ep.moe`` does with its own exchange: a layer.

    As every expert has as many slots, SwiGLU experts are batches of dense products.

    Args:
      x: tokens of this rank.
      topk_idx: its choices, all of them experts: nothing checks it.
      topk_weights: their weights.
      *weights: ``w_gate``, ``w_up`` and ``w_down`` of this rank's experts, as ``jax_ep.moe`` has
        them.
      num_experts: experts on all ranks together.
      num_slots: rows that each rank may send to each expert.
      axis_name: the axis of ranks.

    Returns:
      The outputs, and which choices had slots.

    Raises:
      TypeError: a count is no int.
      ValueError: a count is below 1, the axis is not bound, or ranks do not divide ``num_experts``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functools import partial
      >>> from jax_ep.testing import slots_moe
      >>> layer = partial(slots_moe, num_experts=4, num_slots=3, axis_name="expert")
      >>> x, topk_idx = jnp.ones((2, 3, 8)), jnp.zeros((2, 3, 1), jnp.int32)
      >>> w_in, w_out = jnp.ones((2, 2, 8, 16)), jnp.ones((2, 2, 16, 8))
      >>> sums = jax.vmap(layer, axis_name="expert")
      >>> result = sums(x, topk_idx, jnp.ones((2, 3, 1)), w_in, w_in, w_out)
      >>> result.out.shape, bool(result.kept.all())
      ((2, 3, 8), True)
    """
    swiglu = partial(_swiglu, num_slots=num_slots, weights=weights)
    return slots_all_to_all(
        x,
        topk_idx,
        topk_weights,
        swiglu,
        num_experts=num_experts,
        num_slots=num_slots,
        axis_name=axis_name,
    )


def _swiglu(
    rows: jax.Array, _: jax.Array, *, num_slots: int, weights: tuple[jax.Array, ...]
) -> jax.Array:
    w_gate, w_up, w_down = weights
    slots = rows.reshape(-1, len(w_gate), num_slots, rows.shape[1])
    gate, up = (jnp.einsum("rlsh,lhf->rlsf", slots, w) for w in (w_gate, w_up))
    return jnp.einsum("rlsf,lfh->rlsh", jax.nn.silu(gate) * up, w_down).reshape(rows.shape)


def _all_to_all(rows: Float[Array, "rows hidden"], axis_name: str) -> Float[Array, "rows hidden"]:
    received = jax.lax.all_to_all(to_bits(rows), axis_name, 0, 0, tiled=True)
    return from_bits(received, rows.dtype)


def to_bits(rows: Array) -> Array:
    """Shows 2-byte floats as integers: XLA:CPU widens bfloat16 to float32 to move it."""
    return jax.lax.bitcast_convert_type(rows, jnp.uint16) if rows.dtype.itemsize == 2 else rows


def from_bits(bits: Array, dtype: jnp.dtype) -> Array:
    """Shows them as floats again."""
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _position_among_equals(keys: Int32[Array, "choices"], num_keys: int) -> Int32[Array, "choices"]:
    """Counts for each element the equal ones before it."""
    order = jnp.argsort(keys, stable=True)
    counts = jnp.zeros_like(keys, shape=num_keys).at[keys].add(1)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    position = jnp.arange(keys.size, dtype=jnp.int32) - first[keys[order]]
    return jnp.zeros_like(position).at[order].set(position, unique_indices=True)
