"""What belongs to each row that a rank receives: its expert, its token, and its weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._axes import check_use
from jax_ep._checks import check_array, check_dtype, check_shape, check_summable
from jax_ep._exchange import exchange
from jax_ep._ops import GATHER_SCALED
from jax_ep._plan import Plan, check_plan, choice_of_row
from jax_ep._types import DROPPED


class RowSources(NamedTuple):
    """Which choice each row is for; all three are ``DROPPED`` where a row holds no token.

    Attributes:
      rank: the rank that sent it.
      token: the token there.
      k: which of the token's choices.
    """

    rank: Int32[Array, "capacity"]
    token: Int32[Array, "capacity"]
    k: Int32[Array, "capacity"]


@jax.named_scope("jax_ep.row_experts")
def row_experts(plan: Plan) -> Int32[Array, "capacity"]:
    """Returns the local expert of each row, for what differs by expert and not by group.

    Row ``i`` belongs to expert ``row_experts(plan)[i]`` of this rank's ``num_local_experts``. No
    communication.

    Args:
      plan: made by ``make_plan``.

    Returns:
      An index for each row of ``dispatch``'s result, ``DROPPED`` (-1) for rows that hold no token:
      padding, and those past the last group. Mind that -1 as an index means the last one: of such
      rows nobody reads what becomes of them, but a gradient may go where it should not.

    Raises:
      TypeError: ``plan`` is not a ``Plan``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1, 0], [1, 0], [1, -1]]), num_experts=2, alignment=4)
      >>> jax_ep.row_experts(plan).tolist()
      [0, 0, -1, -1, 1, 1, 1, -1, -1, -1, -1, -1]
    """
    check_plan(plan)
    sizes, rows = plan._arrays.group_sizes, plan._arrays.group_rows
    experts = jnp.arange(plan.num_local_experts, dtype=jnp.int32)
    # Behind the last group it goes on with some expert, whose rows have ended.
    expert = jnp.repeat(experts, sizes, total_repeat_length=plan.capacity)
    start = (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)[expert]
    row = jnp.arange(plan.capacity, dtype=jnp.int32)
    return jnp.where(row - start < rows[expert], expert, DROPPED)


@jax.named_scope("jax_ep.row_sources")
def row_sources(plan: Plan) -> RowSources:
    """Returns which choice of which token of which rank each row is for.

    No communication. What belongs to a token, such as its position, is sent along by ``dispatch``
    of a pytree, at no wait more; this is for what follows from where it came.

    Args:
      plan: made by ``make_plan``.

    Returns:
      Three indices for each row of ``dispatch``'s result.

    Raises:
      TypeError: ``plan`` is not a ``Plan``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1, 0], [1, -1]]), num_experts=2)
      >>> jax_ep.row_sources(plan).token.tolist()
      [0, 0, 1, -1]
    """
    check_plan(plan)
    choice = choice_of_row(plan._layout, plan._arrays)
    topk, tokens = max(plan.num_topk, 1), max(plan.num_tokens, 1)
    indices = choice // (topk * tokens), choice // topk % tokens, choice % topk
    return RowSources(*(jnp.where(choice == DROPPED, DROPPED, index) for index in indices))


@jax.named_scope("jax_ep.row_weights")
def row_weights(
    topk_weights: Float32[Array, "num_tokens num_topk"], plan: Plan
) -> Float32[Array, "capacity"]:
    """Sends each choice's router weight to its row, for experts that scale what they are given.

    Row ``i`` of the result is ``topk_weights[t, k]`` of the choice whose row is ``i``. Communicates
    along the plan's axis. Its gradient brings each row's cotangent back to its choice.

    Args:
      topk_weights: as for ``combine``, which then takes none.
      plan: made by ``make_plan`` on the same ranks.

    Returns:
      One number per row; rows without a token are as in ``dispatch``'s result.

    Raises:
      TypeError: ``topk_weights`` is not a float32 array, or ``plan`` is not a ``Plan``.
      ValueError: ``topk_weights`` is not ``[num_tokens, num_topk]``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1, 0], [1, -1]]), num_experts=2)
      >>> jax_ep.row_weights(jnp.array([[0.75, 0.25], [1.0, 0.0]]), plan).tolist()
      [0.25, 0.75, 1.0, 0.0]
    """
    check_plan(plan)
    ones = jnp.ones((plan.num_tokens, 1), jnp.float32)
    return dispatch_weighed(ones, plan, topk_weights, call="row_weights")[:, 0]


def dispatch_weighed(
    x: Float[Array, "num_tokens hidden"],
    plan: Plan,
    topk_weights: Float32[Array, "num_tokens num_topk"],
    *,
    call: str = "dispatch",
) -> Float[Array, "capacity hidden"]:
    """Does as ``dispatch``, but multiplies each row by its choice's router weight on the way.

    Products are formed in float32 and rounded once, to the dtype of ``x``.

    Raises:
      TypeError: ``topk_weights`` is not a float32 array, or ``x`` holds no floats of 2 to 8 bytes.
      ValueError: ``topk_weights`` is not ``[num_tokens, num_topk]``, or ``x`` has other tokens.
    """
    check_array("x", x, "num_tokens, hidden")
    check_shape("x", x, (plan.num_tokens, x.shape[1]), "num_tokens, hidden")
    check_summable("x", x)
    check_array("topk_weights", topk_weights, "num_tokens, num_topk")
    choices = (plan.num_tokens, plan.num_topk)
    check_shape("topk_weights", topk_weights, choices, "num_tokens, num_topk")
    check_dtype("topk_weights", topk_weights, jnp.float32)
    [rows] = exchange(GATHER_SCALED, plan, check_use(plan), call, [x, topk_weights])
    return rows
