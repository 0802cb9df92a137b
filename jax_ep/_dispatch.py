"""``dispatch``: tokens out to the ranks of their experts."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, PyTree

from jax_ep._axes import check_use
from jax_ep._checks import check_leading_axis
from jax_ep._exchange import exchange
from jax_ep._ops import GATHER_ROWS
from jax_ep._plan import Plan, check_plan


@jax.named_scope("jax_ep.dispatch")
def dispatch(
    x: PyTree[Num[Array, "num_tokens ..."]], plan: Plan
) -> PyTree[Num[Array, "capacity ..."]]:
    """Sends each token to the ranks of its experts, grouped there by local expert.

    Row ``i`` of the result is a bit copy of the token of the choice that the plan put there; rows
    are ordered by (local expert, source rank, token, k). Communicates along the plan's axis.

    What belongs to the tokens travels with them: the leaves of a pytree, such as quantised tokens
    with their scales, positions or segment ids, go together in one exchange, and cost one wait.

    Its gradient is ``combine`` with unit weights, for all leaves that have one; 1-byte floats are
    summed in float32 and rounded once.

    Args:
      x: this rank's tokens ``[num_tokens, ...]``, or a pytree of such arrays: floats of 1, 2, 4 or
        8 bytes, or integers of whole bytes. As a rule ``[num_tokens, hidden]``.
      plan: made by ``make_plan`` on the same ranks for as many tokens.

    Returns:
      This rank's rows ``[capacity, ...]``, in the structure and the dtypes of ``x``. The first
      ``plan.group_sizes[0]`` are for its first expert, and so on; padding rows are zero. Rows past
      ``sum(plan.group_sizes)`` are zero with ``tail="zero"``, and hold anything with
      ``tail="uninitialized"``.

    Raises:
      TypeError: ``x`` holds something else than arrays of such dtypes, or ``plan`` is not a
        ``Plan``.
      ValueError: ``x`` holds an array that is not ``[num_tokens, ...]`` for the plan's
        ``num_tokens``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1], [0], [1]]), num_experts=2)
      >>> jax_ep.dispatch(jnp.array([[10.0], [20.0], [30.0]]), plan).tolist()
      [[20.0], [10.0], [30.0]]
      >>> rows = jax_ep.dispatch({"x": jnp.ones((3, 8)), "position": jnp.arange(3)}, plan)
      >>> rows["position"].tolist()
      [1, 0, 2]
    """
    check_plan(plan)
    paths, structure = jax.tree.flatten_with_path(x)
    if not paths:
        raise TypeError(f"x must hold at least one array; got {x!r}.")
    for path, leaf in paths:
        name = f"x{jax.tree_util.keystr(path)}"
        check_leading_axis(name, leaf, plan.num_tokens, "num_tokens")
        _check_movable(name, leaf)
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    # An exchange moves rows of one axis.
    flat = [leaf.reshape(plan.num_tokens, math.prod(leaf.shape[1:])) for leaf in leaves]
    rows = exchange(GATHER_ROWS, plan, check_use(plan), "dispatch", flat)
    rows = [
        row.reshape(plan.capacity, *leaf.shape[1:]) for row, leaf in zip(rows, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, rows)


def _check_movable(name: str, x: jax.Array) -> None:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    # Types below a byte report a whole byte in NumPy, but XLA may pack them.
    bits = jnp.finfo(x.dtype).bits if is_float else jnp.iinfo(x.dtype).bits if is_integer else 0
    if bits not in (8, 16, 32, 64):
        raise TypeError(
            f"{name} must hold floats or integers of 1, 2, 4 or 8 bytes; got {x.dtype}."
        )
