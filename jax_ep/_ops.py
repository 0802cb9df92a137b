"""The ops that exchanges consist of: what each takes and returns, and how it is differentiated.

Besides the plan there are three, each linear in each of its two payloads; their derivatives are
these three again, to any order. With ``w`` the weights, or ones, and ``row`` as the plan has it:

* ``gather_rows(x, w)[row(t, k)] = w[t, k] * x[t]``
* ``reduce_rows(rows, w)[t] = sum over k of w[t, k] * rows[row(t, k)]``
* ``row_dots(rows, dout)[t, k] = rows[row(t, k)] . dout[t]``
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jax_ep._layout import Layout

Op: TypeAlias = Literal["plan", "gather_rows", "reduce_rows", "row_dots"]
OPS: tuple[Op, ...] = ("plan", "gather_rows", "reduce_rows", "row_dots")

Shape: TypeAlias = tuple[int, ...]


def result_shapes(op: Op, layout: Layout, payload: Any) -> list[tuple[Shape, Any]]:
    """Returns shape and dtype of an op's results on one rank, given its first payload's type."""
    choices, capacity = (layout.num_tokens, layout.num_topk), (layout.capacity,)
    per_rank, local = (layout.num_ranks,), (layout.num_local_experts,)
    hidden = payload.shape[-1:]
    match op:
        case "plan":  # As PlanArrays.
            return [
                (local, jnp.int32),
                (choices, jnp.bool_),
                ((layout.num_experts,), jnp.int32),
                (per_rank, jnp.int32),
                ((), jnp.int32),
                (choices, jnp.int32),
                (capacity, jnp.int32),
                (capacity, jnp.int32),
                (local, jnp.int32),
                ((), jnp.uint32),
            ]
        case "gather_rows":
            return [((*capacity, *hidden), payload.dtype)]
        case "reduce_rows":
            return [((layout.num_tokens, *hidden), payload.dtype)]
        case "row_dots":
            return [(choices, jnp.float32)]


def transposed(
    op: Op, linear: int, cotangent: jax.Array, other: jax.Array | None
) -> tuple[Op, jax.Array, jax.Array | None]:
    """Returns the op, with its payloads, that carries a cotangent back to one of the payloads.

    Args:
      op: the op whose result the cotangent is of.
      linear: which of its payloads to go back to, 0 or 1.
      cotangent: of its result.
      other: its other payload, or None where it had but one.
    """
    match op, linear:
        case "gather_rows", 0:
            return "reduce_rows", cotangent, other
        case "reduce_rows", 0:
            return "gather_rows", cotangent, other
        case "gather_rows", 1:
            assert other is not None
            return "row_dots", cotangent, other
        case "reduce_rows", 1:
            assert other is not None
            return "row_dots", other, cotangent
        case "row_dots", 0:
            assert other is not None
            return "gather_rows", other, cotangent
        case _:
            assert (op, linear) == ("row_dots", 1)
            assert other is not None
            return "reduce_rows", other, cotangent
