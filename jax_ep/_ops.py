"""The ops that exchanges consist of: what each takes and returns, and how it is differentiated.

Besides the plan there are five. With ``w`` the weights and ``row`` as the plan has it:

* ``gather_rows(x)[row(t, k)] = x[t]``
* ``gather_scaled(x, w)[row(t, k)] = w[t, k] * x[t]``
* ``reduce_rows(rows)[t] = sum over k of rows[row(t, k)]``
* ``reduce_scaled(rows, w)[t] = sum over k of w[t, k] * rows[row(t, k)]``
* ``row_dots(rows, dout)[t, k] = rows[row(t, k)] . dout[t]``

``gather_rows`` and ``reduce_rows`` take any number of arrays at once, each by itself, and give as
many back: they are linear in all of them together. The others are linear in each of their two. The
derivatives of all five are these five again, to any order.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp

from jax_ep._layout import Layout
from jax_ep._plan import PlanArrays, array_types

ArrayType = tuple[tuple[int, ...], Any]
"""Shape on one rank, and dtype."""


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One op, as every implementation and fabric knows it.

    Attributes:
      name: its name, with which those of its native handlers begin.
      payloads: what it takes besides the plan, in order; ``*`` stands for one or more of a kind.
      results: what it returns, likewise.
      result_types: their types on one rank, given the types of its payloads.
      options: what it is told besides the geometry of the exchange, as native code is told it.
    """

    name: str
    payloads: tuple[str, ...]
    results: tuple[str, ...]
    result_types: Callable[[Layout, Sequence[Any]], list[ArrayType]]
    options: Mapping[str, Callable[[Layout], int]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name

    @property
    def takes_plan(self) -> bool:
        """Whether a plan comes before its payloads: always, but for the op that makes it."""
        return self is not PLAN

    @property
    def is_joint(self) -> bool:
        """Whether it is linear in all its payloads together, and not in each by itself."""
        return self.payloads[0].startswith("*")


def _rows_types(layout: Layout, payloads: Sequence[Any]) -> list[ArrayType]:
    return [((layout.capacity, p.shape[-1]), p.dtype) for p in payloads]


def _token_types(layout: Layout, payloads: Sequence[Any]) -> list[ArrayType]:
    return [((layout.num_tokens, p.shape[-1]), p.dtype) for p in payloads]


_RANKS_PER_NODE = {"ranks_per_node": lambda layout: layout.ranks_per_node}
_ZERO_TAIL = {"zero_tail": lambda layout: int(layout.tail == "zero")}

PLAN: Final = Op(
    name="plan",
    payloads=("topk_idx",),
    results=PlanArrays._fields,
    result_types=lambda layout, _: list(array_types(layout)),
    options={"alignment": lambda layout: layout.alignment},
)
GATHER_ROWS: Final = Op(
    name="gather_rows",
    payloads=("*x",),
    results=("*rows",),
    result_types=_rows_types,
    options=_ZERO_TAIL,
)
GATHER_SCALED: Final = Op(
    name="gather_scaled",
    payloads=("x", "weights"),
    results=("rows",),
    result_types=lambda layout, payloads: _rows_types(layout, payloads[:1]),
    options=_ZERO_TAIL,
)
REDUCE_ROWS: Final = Op(
    name="reduce_rows",
    payloads=("*rows",),
    results=("*out",),
    result_types=_token_types,
    options=_RANKS_PER_NODE,
)
REDUCE_SCALED: Final = Op(
    name="reduce_scaled",
    payloads=("rows", "weights"),
    results=("out",),
    result_types=lambda layout, payloads: _token_types(layout, payloads[:1]),
    options=_RANKS_PER_NODE,
)
ROW_DOTS: Final = Op(
    name="row_dots",
    payloads=("rows", "dout"),
    results=("dots",),
    result_types=lambda layout, _: [((layout.num_tokens, layout.num_topk), jnp.float32)],
)

OPS: Final = (PLAN, GATHER_ROWS, GATHER_SCALED, REDUCE_ROWS, REDUCE_SCALED, ROW_DOTS)


def transposed(
    op: Op, linear: int, cotangents: list[jax.Array], other: jax.Array | None
) -> tuple[Op, list[jax.Array]]:
    """Returns the op, with its payloads, that carries cotangents back to what an op is linear in.

    Args:
      op: the op whose results the cotangents are of.
      linear: which of its payloads to go back to, if it is linear in each by itself.
      cotangents: of its result, or of several if it is joint: those to go back from.
      other: its other payload, if it is linear in each by itself.
    """
    match op.name, linear:
        case "gather_rows", _:
            return REDUCE_ROWS, cotangents
        case "reduce_rows", _:
            return GATHER_ROWS, cotangents
    assert other is not None
    [cotangent] = cotangents
    match op.name, linear:
        case "gather_scaled", 0:
            return REDUCE_SCALED, [cotangent, other]
        case "reduce_scaled", 0:
            return GATHER_SCALED, [cotangent, other]
        case "gather_scaled", 1:
            return ROW_DOTS, [cotangent, other]
        case "reduce_scaled", 1:
            return ROW_DOTS, [other, cotangent]
        case "row_dots", 0:
            return GATHER_SCALED, [other, cotangent]
        case _:
            assert (op, linear) == (ROW_DOTS, 1)
            return REDUCE_SCALED, [other, cotangent]
