"""``grouped_matmul``: each expert's matrix times its own rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_ep._checks import check_array, check_dtype, check_shape, check_summable
from jax_ep._compat import vary_together
from jax_ep._grouped_products import grouped_product


@jax.named_scope("jax_ep.grouped_matmul")
def grouped_matmul(
    rows: Float[Array, "capacity hidden"],
    weights: Float[Array, "num_local_experts hidden ffn_hidden"],
    group_sizes: Int32[Array, "num_local_experts"],
) -> Float[Array, "capacity ffn_hidden"]:
    """Multiplies each group of rows by its expert's matrix.

    Row ``i`` of the result is ``rows[i] @ weights[g]``, where ``g`` is the group that holds row
    ``i``: the first ``group_sizes[0]`` rows are group 0, the next ``group_sizes[1]`` group 1, and
    so on. Local arithmetic: no communication. Differentiable in ``rows`` and ``weights`` to any
    order, forward and in reverse.

    On CPU the cost follows the rows that the groups hold, and not ``capacity``. Elsewhere this is
    ``jax.lax.ragged_dot``.

    Args:
      rows: what ``dispatch`` returned. Rows past the last group never reach the result or a
        gradient, so they may hold anything, even NaN.
      weights: one matrix per local expert, in the dtype of ``rows``.
      group_sizes: rows of each group, ``plan.group_sizes``; their sum must be at most ``capacity``.
        Values are traced: nothing checks them.

    Returns:
      The products in the dtype of ``rows``, summed in float32 (float64 for float64). Rows past the
      last group are zero, in the result and in the gradient of ``rows``; the gradient of an empty
      group's matrix is zero.

    Raises:
      TypeError: an argument is no array; ``rows`` is not bfloat16, float16, float32 or float64;
        ``weights`` has another dtype than ``rows``; or ``group_sizes`` is not int32.
      ValueError: an argument has another number of axes, or the shapes do not fit one another.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> rows = jnp.array([[1.0], [2.0], [3.0], [jnp.nan]])
      >>> weights = jnp.array([[[10.0]], [[100.0]]])
      >>> jax_ep.grouped_matmul(rows, weights, jnp.array([1, 2])).ravel().tolist()
      [10.0, 200.0, 300.0, 0.0]
    """
    _check(rows, weights, group_sizes)
    rows, weights, group_sizes = vary_together([rows, weights, group_sizes])
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros_like(rows, shape=(rows.shape[0], weights.shape[2]))
    return grouped_product("result", rows[None], weights[None], group_sizes[None])[0]


def _check(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> None:
    check_array("rows", rows, "capacity, hidden")
    check_array("weights", weights, "num_local_experts, hidden, ffn_hidden")
    check_array("group_sizes", group_sizes, "num_local_experts")
    check_summable("rows", rows)
    check_dtype("weights", weights, rows.dtype)
    check_dtype("group_sizes", group_sizes, jnp.int32)
    if weights.shape[1] != rows.shape[1]:
        raise ValueError(
            f"weights must have the hidden = {rows.shape[1]} of rows as their second axis; "
            f"got shape {list(weights.shape)}."
        )
    check_shape("group_sizes", group_sizes, weights.shape[:1], "num_local_experts")
