"""Grouped matrix products on CPU: loops over blocks of rows, one dense product each.

Every array leads with a stack axis, which is 1 or counts the ranks stacked on one device. The
stack is laid out as one long buffer whose groups are the groups of all ranks, so that a loop's work
is the sum over ranks and not the number of ranks times the largest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# Rows that one product takes at once. With fewer its own overhead shows; with more, rows past a
# group's end are computed in vain. Sums over rows update a whole matrix per block, so that theirs
# may be longer.
_SHORTEST, _LONGEST, _LONGEST_SUM = 32, 64, 128


class _Groups(NamedTuple):
    """Where the groups of the long buffer lie, and in which order to visit the nonempty ones."""

    starts: Int32[Array, "groups"]
    ends: Int32[Array, "groups"]
    order: Int32[Array, "groups"]
    num_groups: Int32[Array, ""]


def sum_dtype_of(rows: jax.Array) -> jnp.dtype:
    """Returns what products of ``rows`` are summed in."""
    return jnp.dtype(jnp.float64 if rows.dtype == jnp.float64 else jnp.float32)


def matmul_blocks(
    rows: Float[Array, "stack capacity depth"],
    weights: Float[Array, "weight_stack num_local_experts hidden ffn_hidden"],
    group_sizes: Int32[Array, "stack num_local_experts"],
    *,
    transpose: bool,
) -> Float[Array, "stack capacity width"]:
    """Multiplies each group's rows by its expert's matrix, or by the matrix's transpose.

    Args:
      rows: their depth is the matrices' ``hidden``, or ``ffn_hidden`` when transposed.
      weights: ``weight_stack`` is 1, for matrices that all ranks share, or the stack's size.
      group_sizes: as in ``grouped_matmul``.
      transpose: whether to contract ``ffn_hidden`` instead of ``hidden``.

    Returns:
      The products in the dtype of ``rows``, summed in at least float32; zero past the last group.
    """
    stack, capacity, depth = rows.shape
    weight_stack, num_groups, hidden, ffn_hidden = weights.shape
    dtype, sum_dtype = rows.dtype, sum_dtype_of(rows)
    flat_rows = _as_bits(rows.reshape(stack * capacity, depth))
    matrices = _as_bits(weights.reshape(weight_stack * num_groups, hidden, ffn_hidden))
    groups = _lay_out(group_sizes, capacity)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    size = _block_rows(capacity, group_sizes, _LONGEST)

    def visit(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(matrices, group % matrices.shape[0], keepdims=False)
        matrix = _from_bits(matrix, dtype).astype(sum_dtype)

        def step(at: jax.Array, mine: jax.Array, out: jax.Array) -> jax.Array:
            block = lax.dynamic_slice_in_dim(flat_rows, at, size)
            product = lax.dot_general(_from_bits(block, dtype).astype(sum_dtype), matrix, contract)
            written = lax.dynamic_slice_in_dim(out, at, size)
            # Select, not multiply: rows of no group may hold NaN.
            merged = jnp.where(mine, _as_bits(product.astype(dtype)), written)
            return lax.dynamic_update_slice_in_dim(out, merged, at, 0)

        return _for_each_block(groups, group, len(flat_rows), size, step, out)

    width = hidden if transpose else ffn_hidden
    # zeros_like, here and below, for the type's varying mesh axes: a loop's must not change.
    out = jnp.zeros_like(flat_rows, shape=(stack * capacity, width))
    out = _for_each_group(groups, visit, out)
    return _from_bits(out, dtype).reshape(stack, capacity, width)


def outer_blocks(
    rows: Float[Array, "stack capacity hidden"],
    cotangent: Float[Array, "stack capacity ffn_hidden"],
    group_sizes: Int32[Array, "stack num_local_experts"],
) -> Float[Array, "stack num_local_experts hidden ffn_hidden"]:
    """Sums the outer products ``rows[i] cotangent[i]`` over each group's rows.

    Returns:
      One matrix per group in the dtype of ``rows``, summed in at least float32; zero for an empty
      group.
    """
    stack, capacity, hidden = rows.shape
    ffn_hidden, dtype, sum_dtype = cotangent.shape[-1], rows.dtype, sum_dtype_of(rows)
    factors = [_as_bits(a.reshape(stack * capacity, a.shape[-1])) for a in (rows, cotangent)]
    groups = _lay_out(group_sizes, capacity)
    size = _block_rows(capacity, group_sizes, _LONGEST_SUM)

    def visit(group: jax.Array, out: jax.Array) -> jax.Array:
        def step(at: jax.Array, mine: jax.Array, total: jax.Array) -> jax.Array:
            slices = [lax.dynamic_slice_in_dim(a, at, size) for a in factors]
            left, right = (
                jnp.where(mine, _from_bits(factor, dtype).astype(sum_dtype), 0) for factor in slices
            )
            return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())))

        total = jnp.zeros_like(rows, shape=(hidden, ffn_hidden), dtype=sum_dtype)
        total = _for_each_block(groups, group, stack * capacity, size, step, total)
        return lax.dynamic_update_index_in_dim(out, _as_bits(total.astype(dtype)), group, 0)

    out = jnp.zeros_like(factors[0], shape=(group_sizes.size, hidden, ffn_hidden))
    out = _for_each_group(groups, visit, out)
    return _from_bits(out, dtype).reshape(*group_sizes.shape, hidden, ffn_hidden)


def _lay_out(group_sizes: jax.Array, capacity: int) -> _Groups:
    # The bound keeps sizes that overrun the buffer from reaching the next rank's rows.
    ends = jnp.minimum(jnp.cumsum(group_sizes, axis=1, dtype=jnp.int32), capacity)
    starts = jnp.pad(ends, ((0, 0), (1, 0)))[:, :-1]
    base = (jnp.arange(len(ends), dtype=jnp.int32) * capacity)[:, None]
    empty = (ends <= starts).ravel()
    order = jnp.argsort(empty, stable=True).astype(jnp.int32)
    count = jnp.sum(~empty, dtype=jnp.int32)
    return _Groups((base + starts).ravel(), (base + ends).ravel(), order, count)


def _block_rows(capacity: int, group_sizes: jax.Array, longest: int) -> int:
    """Returns a power of two near half of what a group may hold on average, within bounds."""
    half_group = capacity // (2 * group_sizes.shape[1])
    return min(capacity, max(_SHORTEST, min(longest, 1 << max(0, half_group.bit_length() - 1))))


def _for_each_group(
    groups: _Groups, visit: Callable[[jax.Array, jax.Array], jax.Array], out: jax.Array
) -> jax.Array:
    return lax.fori_loop(0, groups.num_groups, lambda i, out: visit(groups.order[i], out), out)


def _for_each_block(
    groups: _Groups,
    group: jax.Array,
    num_rows: int,
    size: int,
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    """Runs ``step`` with each block's first row and which of its rows are to be computed."""
    start, end = groups.starts[group], groups.ends[group]

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        first = start + i * size
        # At the buffer's end a slice would move up silently: move it, leave out what it repeats.
        at = jnp.minimum(first, num_rows - size)
        row = at + jnp.arange(size, dtype=jnp.int32)
        mine = ((row >= first) & (row < end))[:, None]
        return step(at, mine, carry)

    return lax.fori_loop(0, -(-(end - start) // size), body, carry)


def _as_bits(x: jax.Array) -> jax.Array:
    """Views 2-byte floats as integers.

    XLA:CPU rewrites loops that update a buffer of 2-byte floats to convert all of it at every step.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x
