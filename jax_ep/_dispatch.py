"""``dispatch``: tokens out to the ranks of their experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from jax_ep._axes import check_use, place
from jax_ep._checks import check_array, check_shape
from jax_ep._exchange import exchange
from jax_ep._plan import Plan


def dispatch(x: Num[Array, "num_tokens hidden"], plan: Plan) -> Num[Array, "capacity hidden"]:
    """Sends each token to the ranks of its experts, grouped there by local expert.

    Row ``i`` of the result is a bit copy of the token of the choice that the plan put there; rows
    are ordered by (local expert, source rank, token, k). Communicates along the plan's axis.

    Its gradient is ``combine`` with unit weights; 1-byte floats are summed in float32 and rounded
    once.

    Args:
      x: this rank's tokens: floats of 1, 2, 4 or 8 bytes, or integers of whole bytes.
      plan: made by ``make_plan`` on the same ranks for as many tokens.

    Returns:
      This rank's rows, in the dtype of ``x``. The first ``plan.group_sizes[0]`` are for its first
      expert, and so on; padding rows are zero. Rows past ``sum(plan.group_sizes)`` are zero with
      ``tail="zero"``, and hold anything with ``tail="uninitialized"``.

    Raises:
      TypeError: ``x`` is not an array of such a dtype, or ``plan`` is not a ``Plan``.
      ValueError: ``x`` is not ``[num_tokens, hidden]`` for the plan's ``num_tokens``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1], [0], [1]]), num_experts=2)
      >>> jax_ep.dispatch(jnp.array([[10.0], [20.0], [30.0]]), plan).tolist()
      [[20.0], [10.0], [30.0]]
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a jax_ep.Plan; got {type(plan).__name__}.")
    check_array("x", x, "num_tokens, hidden")
    _check_movable(x)
    check_shape("x", x, (plan.num_tokens, x.shape[1]), "num_tokens, hidden")
    binding = check_use(plan)
    where = place(plan._layout)
    return exchange("gather_rows", plan._layout, binding, "dispatch", where, plan._route, x)


def _check_movable(x: jax.Array) -> None:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    # Types below a byte report a whole byte in NumPy, but XLA may pack them.
    bits = jnp.finfo(x.dtype).bits if is_float else jnp.iinfo(x.dtype).bits if is_integer else 0
    if bits not in (8, 16, 32, 64):
        raise TypeError(f"x must hold floats or integers of 1, 2, 4 or 8 bytes; got {x.dtype}.")
