"""The exchange in pure JAX: the readable specification, and what serves where no native code does.

Each function is what one rank does. ``layout.axis_name`` names mesh axes inside ``shard_map``, or
the axis that ``run`` maps over.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float32, Int32, Num

from jax_ep._call import Call, Operands
from jax_ep._layout import Layout
from jax_ep._plan import PlanArrays, choice_of_row, is_received
from jax_ep._types import DROPPED

_STACK_AXIS = "jax_ep_rank"
_DOT_LANES = 64


def run(call: Call, operands: Operands) -> list[Array]:
    """Runs an op for the rank of this device, or for all ranks of a leading axis at once."""
    f, layout = _OPS[call.op.name], call.layout
    first = operands.plan or operands.where.rank
    if call.binding == "mesh":
        return f(layout, first, *operands.payloads)
    layout = dataclasses.replace(layout, axis_name=_STACK_AXIS)
    stacked = jax.vmap(lambda *xs: f(layout, *xs), axis_name=_STACK_AXIS)
    if call.binding == "stacked":
        return stacked(first, *operands.payloads)
    out = stacked(*jax.tree.map(lambda x: x[None], (first, *operands.payloads)))
    return [x[0] for x in out]


def plan(
    layout: Layout,
    rank: Int32[Array, ""],
    topk_idx: Int32[Array, "num_tokens num_topk"],
) -> list[Array]:
    """Gathers the choices of all ranks and computes this rank's plan from them."""
    expert = gather_choices(layout, topk_idx)
    kept, row = _place(layout, expert)
    dest = jnp.where(kept, expert // layout.num_local_experts, DROPPED)

    here = dest == rank
    recv_choice = jnp.flatnonzero(here, size=layout.capacity, fill_value=DROPPED).astype(jnp.int32)
    # What is not received has index -1, the last element, and gets a row that is not there.
    recv_row = jnp.append(row.reshape(-1), jnp.int32(layout.capacity))[recv_choice]
    group_rows = jax.lax.dynamic_index_in_dim(
        _group_rows(layout, expert, kept), rank, keepdims=False
    )
    mine = jax.lax.dynamic_index_in_dim(kept, rank, keepdims=False)
    plan = PlanArrays(
        group_sizes=_round_up(group_rows, layout.alignment),
        kept=mine,
        expert_load=_count(expert.reshape(-1), layout.num_experts),
        recv_counts=jnp.sum(here, axis=(1, 2), dtype=jnp.int32),
        num_dropped=jnp.sum((topk_idx != DROPPED) & ~mine, dtype=jnp.int32),
        send_rank=jax.lax.dynamic_index_in_dim(dest, rank, keepdims=False),
        send_row=jnp.where(mine, jax.lax.dynamic_index_in_dim(row, rank, keepdims=False), DROPPED),
        recv_choice=recv_choice,
        recv_row=recv_row,
        group_rows=group_rows,
        # Only the native rendezvous compares fingerprints; collectives cannot mix up two calls.
        fingerprint=jnp.zeros_like(rank, dtype=jnp.uint32),
    )
    return list(plan)


def gather_choices(
    layout: Layout, topk_idx: Int32[Array, "num_tokens num_topk"]
) -> Int32[Array, "num_ranks num_tokens num_topk"]:
    """Gathers the choices of all ranks, in 2 bytes each if that is enough; once for each node."""
    wire_dtype = jnp.int16 if layout.num_experts <= jnp.iinfo(jnp.int16).max else jnp.int32
    wire = topk_idx.astype(wire_dtype)
    if layout.ranks_per_node == 1 or layout.axis_name == _STACK_AXIS:
        return _all_gather(layout, wire).astype(jnp.int32)
    for groups in (layout.across_nodes, layout.nodes):
        wire = jax.lax.all_gather(wire, layout.axis_name, axis_index_groups=groups)
    return jnp.swapaxes(wire, 0, 1).reshape(layout.num_ranks, *topk_idx.shape).astype(jnp.int32)


def gather_rows(
    layout: Layout, plan: PlanArrays, *xs: Num[Array, "num_tokens hidden"]
) -> list[Num[Array, "capacity hidden"]]:
    """Fills this rank's rows with their tokens."""
    choice = choice_of_row(layout, plan)
    return [_gather(layout, choice, x) for x in xs]


def gather_scaled(
    layout: Layout,
    plan: PlanArrays,
    x: Num[Array, "num_tokens hidden"],
    weights: Float32[Array, "num_tokens num_topk"],
) -> list[Num[Array, "capacity hidden"]]:
    """Fills this rank's rows with their tokens, scaled by ``weights``."""
    choice = choice_of_row(layout, plan)
    dtype = sum_dtype(x)
    rows = _gather(layout, choice, x).astype(dtype)
    scale = _all_gather(layout, weights).reshape(-1)[:, None].astype(dtype)
    return [mask(choice, _take(scale, choice) * rows).astype(x.dtype)]


def reduce_rows(
    layout: Layout, plan: PlanArrays, *xs: Num[Array, "capacity hidden"]
) -> list[Num[Array, "num_tokens hidden"]]:
    """Adds up each token's rows."""
    row = _row_of_choice(layout, plan)
    return [_reduce(layout, row, rows, None) for rows in xs]


def reduce_scaled(
    layout: Layout,
    plan: PlanArrays,
    rows: Num[Array, "capacity hidden"],
    weights: Float32[Array, "num_tokens num_topk"],
) -> list[Num[Array, "num_tokens hidden"]]:
    """Adds up each token's rows, scaled by ``weights``."""
    row = _row_of_choice(layout, plan)
    return [_reduce(layout, row, rows, _all_gather(layout, weights))]


def row_dots(
    layout: Layout,
    plan: PlanArrays,
    rows: Num[Array, "capacity hidden"],
    dout: Num[Array, "num_tokens hidden"],
) -> list[Float32[Array, "num_tokens num_topk"]]:
    """Computes the product of each choice's row with its token's row of ``dout``."""
    dtype = sum_dtype(rows)
    row = _row_of_choice(layout, plan)
    dout = _all_gather(layout, dout).astype(dtype)
    dots = [dot(pick(rows, r).astype(dtype), mask(r, dout)) for r in jnp.unstack(row, axis=2)]
    dots = jnp.stack(dots, axis=-1).astype(jnp.float32)
    # Each choice has its row on one rank; the others contribute exact zeros.
    return [swap_slices(layout, dots).sum(axis=0)]


_OPS: dict[str, Callable[..., list[Array]]] = {
    f.__name__: f for f in (plan, gather_rows, gather_scaled, reduce_rows, reduce_scaled, row_dots)
}


def _gather(layout: Layout, choice: Array, x: Array) -> Array:
    """Takes a choice's token for each row, zeros where there is none, and no bit changed."""
    bits = _all_gather(layout, to_bits(x))
    bits = bits.reshape(layout.num_ranks * layout.num_tokens, *x.shape[1:])
    return from_bits(mask(choice, _take(bits, choice // layout.num_topk)), x.dtype)


def _reduce(layout: Layout, row: Array, rows: Array, weights: Array | None) -> Array:
    """Adds up rows: a partial sum per destination rank, then over ranks."""
    dtype = sum_dtype(rows)
    partial = jnp.zeros((layout.num_ranks, layout.num_tokens, rows.shape[1]), dtype)
    for k in range(layout.num_topk):
        picked = pick(rows, row[:, :, k]).astype(dtype)
        if weights is not None:
            # The product too: the weight of a choice without a row may be NaN.
            picked = mask(row[:, :, k], weights[:, :, k, None].astype(dtype) * picked)
        partial += picked
    partial = swap_slices(layout, partial.astype(rows.dtype))
    if layout.ranks_per_node > 1:
        by_node = partial.reshape(layout.num_nodes, layout.ranks_per_node, *partial.shape[1:])
        partial = jax.lax.map(_add_up, by_node)
    return _add_up(partial)


def _add_up(parts: Array) -> Array:
    """Adds up what lies along the leading axis, in order, and rounds once."""
    dtype = sum_dtype(parts)
    total, _ = jax.lax.scan(
        lambda total, part: (total + part.astype(dtype), None),
        jnp.zeros_like(parts[0], dtype),
        parts,
    )
    return total.astype(parts.dtype)


def _place(layout: Layout, expert: Array) -> tuple[Array, Array]:
    """Decides for every choice [R, T, K] whether it is kept, and its row on its expert's rank."""
    num_experts, num_ranks = layout.num_experts, layout.num_ranks
    routed = expert != DROPPED
    dest = jnp.where(routed, expert // layout.num_local_experts, num_ranks)
    arrival = position_among_equals(dest.transpose(2, 1, 0).reshape(-1), num_ranks + 1)
    arrival = arrival.reshape(dest.shape[::-1]).transpose(2, 1, 0)
    kept = routed & (arrival < layout.budget)

    sizes = _round_up(_group_rows(layout, expert, kept), layout.alignment)
    starts = (jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes).reshape(-1)
    group = jnp.where(kept, expert, num_experts).reshape(-1)
    row = starts.at[group].get(mode="fill", fill_value=0)
    row = row + position_among_equals(group, num_experts + 1)
    return kept, row.reshape(expert.shape)


def _group_rows(layout: Layout, expert: Array, kept: Array) -> Array:
    """Counts the kept choices of each expert, as [num_ranks, num_local_experts]."""
    counts = _count(jnp.where(kept, expert, DROPPED).reshape(-1), layout.num_experts)
    return counts.reshape(layout.num_ranks, layout.num_local_experts)


def position_among_equals(keys: Array, num_keys: int) -> Array:
    """Returns for each element how many equal ones stand before it."""
    order = jnp.argsort(keys, stable=True)
    counts = _count(keys, num_keys)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    position = jnp.arange(keys.size, dtype=jnp.int32) - first[keys[order]]
    return jnp.zeros_like(position).at[order].set(position, unique_indices=True)


def _count(keys: Array, num_keys: int) -> Array:
    """Counts each key in ``[0, num_keys)``; leaves out negative ones."""
    keys = jnp.where(keys < 0, num_keys, keys)
    return jnp.zeros_like(keys, shape=num_keys).at[keys].add(1, mode="drop")


def _round_up(sizes: Array, alignment: int) -> Array:
    return (sizes + (alignment - 1)) // alignment * alignment


def _row_of_choice(layout: Layout, plan: PlanArrays) -> Array:
    """Inverts them the other way: this rank's row for each choice [R, T, K], or ``DROPPED``."""
    shape = (layout.num_ranks, layout.num_tokens, layout.num_topk)
    size = layout.num_choices
    choice = jnp.where(is_received(layout, plan), plan.recv_choice, size)
    row = jnp.full_like(plan.recv_row, DROPPED, shape=size)
    return row.at[choice].set(plan.recv_row, mode="drop").reshape(shape)


def _all_gather(layout: Layout, x: Array) -> Array:
    """Stacks what all ranks have, on each of them."""
    if layout.axis_name != _STACK_AXIS:
        return jax.lax.all_gather(x, layout.axis_name)
    # JAX's own collectives over a vmap axis do not work inside a shard_map.
    gather = custom_vmap(lambda x: jnp.broadcast_to(x, (layout.num_ranks, *x.shape)))
    gather.def_vmap(lambda size, _, x: (jnp.broadcast_to(x, (size, *x.shape)), True))
    return gather(x)


def swap_slices(layout: Layout, x: Array, groups: list[list[int]] | None = None) -> Array:
    """Sends slice ``r`` of the leading axis to rank ``r``, and stacks what comes from each.

    Among groups of ranks, if there are such, ``r`` counts those of a group.
    """
    if layout.axis_name != _STACK_AXIS:
        bits = jax.lax.all_to_all(to_bits(x), layout.axis_name, 0, 0, axis_index_groups=groups)
        return from_bits(bits, x.dtype)
    swap = custom_vmap(lambda x: x)
    swap.def_vmap(lambda _size, _, x: (jnp.swapaxes(x, 0, 1), True))
    return swap(x)


def to_bits(x: Array) -> Array:
    """Views numbers as integers: XLA may widen floats to move them, which changes some NaNs."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def from_bits(bits: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _take(values: Array, idx: Array) -> Array:
    """Takes rows by index, whatever there is where the index is ``DROPPED``."""
    if values.shape[0] == 0:
        return jnp.zeros_like(values, shape=(*idx.shape, *values.shape[1:]))
    return values[idx]


def pick(rows: Array, row: Array) -> Array:
    """Takes rows by index, zero where the index is ``DROPPED``."""
    # Mask what is read, not the product: an unused row may hold NaN.
    return mask(row, _take(rows, row))


def mask(row: Array, values: Array) -> Array:
    return jnp.where((row != DROPPED)[..., None], values, jnp.zeros((), values.dtype))


def dot(a: Array, b: Array) -> Array:
    """Multiplies and sums the last axis in an order that does not depend on how XLA compiles it."""
    missing = -a.shape[-1] % _DOT_LANES
    a, b = (jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, missing)]) for v in (a, b))
    shape = (*a.shape[:-1], a.shape[-1] // _DOT_LANES, _DOT_LANES)
    steps = [jnp.moveaxis(v.reshape(shape), -2, 0) for v in (a, b)]
    lanes = jnp.zeros_like(a, shape=(*a.shape[:-1], _DOT_LANES))
    lanes, _ = jax.lax.scan(lambda lanes, ab: (lanes + ab[0] * ab[1], None), lanes, tuple(steps))
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def sum_dtype(x: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
