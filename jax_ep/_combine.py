"""``combine``: experts' rows back to their tokens, as a weighted sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ep._axes import check_use
from jax_ep._checks import check_array, check_dtype, check_shape, check_summable
from jax_ep._exchange import exchange
from jax_ep._ops import REDUCE_ROWS, REDUCE_SCALED
from jax_ep._plan import Plan, check_plan


@jax.named_scope("jax_ep.combine")
def combine(
    rows: Float[Array, "capacity hidden"],
    plan: Plan,
    topk_weights: Float32[Array, "num_tokens num_topk"] | None = None,
) -> Float[Array, "num_tokens hidden"]:
    """Brings each token's rows back and adds them up, scaled by its router weights.

    Row ``t`` of the result is the sum over kept ``k`` of
    ``topk_weights[t, k] * rows[row(t, k)]``, and zero for a token with no kept choice. Communicates
    along the plan's axis.

    For each destination rank in ascending order a partial sum is taken in float32, by
    ``fma(weight, row, sum)`` in ascending ``k``, and rounded to the dtype of ``rows``. The partial
    sums are added in float32 in ascending rank order and rounded once more; with the plan's
    ``ranks_per_node`` above 1 those of each node's ranks are, and then the nodes' sums likewise.
    (float64 rows are summed in float64.) Native code keeps to this to the last bit on every
    platform; ``"xla"`` may differ in the last place or two.

    Args:
      rows: what the experts wrote. A row that no kept choice names never reaches the result or any
        gradient, so it may hold anything, even NaN.
      plan: the plan that ``dispatch`` used.
      topk_weights: used as given, not renormalised; None means all ones.

    Returns:
      One row per token, in token order and the dtype of ``rows``.

    Raises:
      TypeError: ``rows`` is not bfloat16, float16, float32 or float64, ``topk_weights`` is not
        float32, or ``plan`` is not a ``Plan``.
      ValueError: a shape does not fit the plan.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1, 0]]), num_experts=2)
      >>> rows = jnp.array([[10.0], [20.0]])
      >>> jax_ep.combine(rows, plan, jnp.array([[0.5, 2.0]])).tolist()
      [[30.0]]
    """
    check_plan(plan)
    check_array("rows", rows, "capacity, hidden")
    check_summable("rows", rows, ": widen them")
    check_shape("rows", rows, (plan.capacity, rows.shape[1]), "capacity, hidden")
    op, payloads = REDUCE_ROWS, [rows]
    if topk_weights is not None:
        check_array("topk_weights", topk_weights, "num_tokens, num_topk")
        choices = (plan.num_tokens, plan.num_topk)
        check_shape("topk_weights", topk_weights, choices, "num_tokens, num_topk")
        check_dtype("topk_weights", topk_weights, jnp.float32)
        op, payloads = REDUCE_SCALED, [rows, topk_weights]
    [out] = exchange(op, plan, check_use(plan), "combine", payloads)
    return out
