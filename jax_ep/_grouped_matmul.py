"""``grouped_matmul``: each expert's matrix times its own rows."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int32

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._compat import vary_together
from jax_ep._row_blocks import matmul_blocks, outer_blocks, sum_dtype_of

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_SUM_OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
)


def grouped_matmul(
    rows: Float[Array, "capacity hidden"],
    weights: Float[Array, "num_local_experts hidden ffn_hidden"],
    group_sizes: Int32[Array, "num_local_experts"],
) -> Float[Array, "capacity ffn_hidden"]:
    """Multiplies each group of rows by its expert's matrix.

    Row ``i`` of the result is ``rows[i] @ weights[g]``, where ``g`` is the group that holds row
    ``i``: the first ``group_sizes[0]`` rows are group 0, the next ``group_sizes[1]`` group 1, and
    so on. Local arithmetic: no communication. Differentiable once in ``rows`` and ``weights``.

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
    return _grouped_matmul(rows, weights, group_sizes)


def _check(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> None:
    check_array("rows", rows, "capacity, hidden")
    check_array("weights", weights, "num_local_experts, hidden, ffn_hidden")
    check_array("group_sizes", group_sizes, "num_local_experts")
    if rows.dtype.name not in _DTYPES:
        raise TypeError(f"rows must have one of the dtypes {_DTYPES}; got {rows.dtype}.")
    check_dtype("weights", weights, rows.dtype)
    check_dtype("group_sizes", group_sizes, jnp.int32)
    if weights.shape[1] != rows.shape[1]:
        raise ValueError(
            f"weights must have the hidden = {rows.shape[1]} of rows as their second axis; "
            f"got shape {list(weights.shape)}."
        )
    check_shape("group_sizes", group_sizes, weights.shape[:1], "num_local_experts")


@jax.custom_vjp
def _grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _times(rows[None], weights[None], group_sizes[None])[0]


def _forward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, group_sizes = (residual[None] for residual in residuals)
    drows = _times_transposed(cotangent[None], weights, group_sizes)
    return drows[0], _outer(rows, cotangent[None], group_sizes)[0], None


_grouped_matmul.defvjp(_forward, _backward)


def _foldable(blocks: Callable[..., jax.Array], ragged: Callable[..., jax.Array], share: bool):
    """Chooses by platform, and makes ``vmap`` fold its axis into the leading stack axis.

    Left to itself, ``vmap`` would run every rank's loop for as long as the longest one's and turn
    slices into gathers. With ``share``, a second operand that is the same for all stays one copy.
    """

    @custom_vmap
    def call(rows: jax.Array, other: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return lax.platform_dependent(rows, other, group_sizes, cpu=blocks, default=ragged)

    @call.def_vmap
    def _fold_vmap(
        size: int, batched: list[bool], rows: jax.Array, other: jax.Array, group_sizes: jax.Array
    ) -> tuple[jax.Array, bool]:
        stack = rows.shape[int(batched[0])]
        fold = partial(_fold, size=size, stack=stack)
        keep = share and not batched[1] and other.shape[0] == 1
        result = call(
            fold(rows, batched[0]),
            other if keep else fold(other, batched[1]),
            fold(group_sizes, batched[2]),
        )
        return result.reshape(size, stack, *result.shape[1:]), True

    return call


def _fold(x: jax.Array, is_batched: bool, *, size: int, stack: int) -> jax.Array:
    x = x if is_batched else x[None]
    return jnp.broadcast_to(x, (size, stack, *x.shape[2:])).reshape(size * stack, *x.shape[2:])


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


_times = _foldable(
    partial(matmul_blocks, transpose=False), partial(ragged_matmul, transpose=False), share=True
)
_times_transposed = _foldable(
    partial(matmul_blocks, transpose=True), partial(ragged_matmul, transpose=True), share=True
)
_outer = _foldable(outer_blocks, ragged_outer, share=False)
