"""Grouped matrix products where the platform has fast ones: by ``jax.lax.ragged_dot``."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep._row_blocks import sum_dtype_of

_SUM_OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
)


def ragged_matmul(
    rows: Float[Array, "stack capacity depth"],
    weights: Float[Array, "weight_stack num_local_experts hidden ffn_hidden"],
    group_sizes: Int32[Array, "stack num_local_experts"],
    *,
    transpose: bool,
) -> Float[Array, "stack capacity width"]:
    """Does as ``matmul_blocks`` does, by ``jax.lax.ragged_dot``."""

    def one(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
        matrices = weights.swapaxes(1, 2) if transpose else weights
        products = lax.ragged_dot(
            _zero_tail(rows, group_sizes),
            matrices,
            group_sizes,
            preferred_element_type=sum_dtype_of(rows),
        )
        return _zero_tail(products.astype(rows.dtype), group_sizes)

    if len(rows) == 1:
        return one(rows[0], weights[0], group_sizes[0])[None]
    # ragged_dot cannot be mapped over some operands only.
    weights = jnp.broadcast_to(weights, (len(rows), *weights.shape[1:]))
    return jax.vmap(one)(rows, weights, group_sizes)


def ragged_outer(
    rows: Float[Array, "stack capacity hidden"],
    cotangent: Float[Array, "stack capacity ffn_hidden"],
    group_sizes: Int32[Array, "stack num_local_experts"],
) -> Float[Array, "stack num_local_experts hidden ffn_hidden"]:
    """Does as ``outer_blocks`` does, by ``jax.lax.ragged_dot_general``."""

    def one(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(
            _zero_tail(rows, group_sizes),
            _zero_tail(cotangent, group_sizes),
            group_sizes,
            _SUM_OVER_ROWS,
            preferred_element_type=sum_dtype_of(rows),
        ).astype(rows.dtype)

    if len(rows) == 1:
        return one(rows[0], cotangent[0], group_sizes[0])[None]
    return jax.vmap(one)(rows, cotangent, group_sizes)


def _zero_tail(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    # What ragged_dot does with rows of no group is not documented.
    used = jnp.arange(len(rows), dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(used[:, None], rows, 0)
