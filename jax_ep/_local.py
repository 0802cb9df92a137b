"""Native code's part between the collectives of rounds: what a rank does on its own device.

Arrays may come and go in pieces of equal size, see ``_wire``. What goes to the wire is returned as
integers, which XLA moves as they are, and what comes from there may be such: XLA may widen floats
to move them, which changes some NaNs, and has to copy what it is to call something else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Num

from jax_ep import _foreign, _owned_plan
from jax_ep._axes import Place
from jax_ep._call import Call, Operands
from jax_ep._compat import result_type
from jax_ep._layout import Layout
from jax_ep._ops import (
    GATHER_ROWS,
    GATHER_SCALED,
    REDUCE_ROWS,
    REDUCE_SCALED,
    ROW_DOTS,
    ArrayType,
    Op,
)
from jax_ep._types import DROPPED
from jax_ep._xla import gather_choices


class Send(NamedTuple):
    """Where some tokens' choices have their rows: of which rank, if that matters, and which."""

    send_rank: Int32[Array, "tokens topk"]
    send_row: Int32[Array, "tokens topk"]

    @classmethod
    def to(cls, row: Int32[Array, "tokens topk"]) -> "Send":
        """Makes it of rows, or ``DROPPED``, of which nobody needs to know the rank."""
        return cls(jnp.where(row == DROPPED, row, 0), row)


class Groups(NamedTuple):
    """Which rows are to be zero: all but the first of each group."""

    group_sizes: Int32[Array, "groups"]
    group_rows: Int32[Array, "groups"]


_GATHERS = (GATHER_ROWS, GATHER_SCALED)
_ARRAYS: dict[Op, tuple[tuple[str, ...], tuple[str, ...]]] = {
    GATHER_ROWS: (("*x",), ("*rows",)),
    GATHER_SCALED: (("weights", "*x"), ("*rows",)),
    REDUCE_ROWS: (("*rows",), ("*out",)),
    REDUCE_SCALED: (("weights", "*rows"), ("*out",)),
    ROW_DOTS: (("rows", "*dout"), ("dots",)),
}


def onto(op: Op) -> tuple[str, ...]:
    """Names what handlers take before the plan: rows that stay where nothing is written."""
    return ("onto",) if op in _GATHERS else ()


def told_of_plan(op: Op) -> tuple[str, ...]:
    """Names what handlers are told of a plan."""
    lists = Send._fields if op.takes_plan else ()
    return lists + (Groups._fields if op in _GATHERS else ())


def payloads(op: Op) -> tuple[str, ...]:
    """Names what handlers take after the plan, where ``*`` stands for pieces."""
    return _ARRAYS[op][0] if op.takes_plan else op.payloads


def results(op: Op) -> tuple[str, ...]:
    """Names what handlers return, likewise."""
    return _ARRAYS[op][1] if op.takes_plan else op.results


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
    """Calls the handlers of a fabric for the rank of this device."""

    fabric: _foreign.Target
    call: Call
    where: Place

    def plan(self, call: Call, operands: Operands) -> list[Array]:
        """Makes this rank's plan: from all choices; or, if these are many, from its own."""
        many = call.layout.num_choices >= _owned_plan.FROM_CHOICES
        if self.fabric.platform == "cpu" and many:
            return _owned_plan.plan(call, operands)
        gathered = gather_choices(call.layout, *operands.payloads)
        return _foreign.run(self.fabric, call, operands._replace(payloads=(gathered,)))

    def pack(
        self, x: Num[Array, "tokens hidden"], to: Send, *, num_rows: int, num_pieces: int
    ) -> list[Num[Array, "rows hidden"]]:
        """Copies tokens to rows on the wire, and leaves the others as they happen to be."""
        types = [((num_rows // num_pieces, x.shape[1]), _bits(x.dtype))] * num_pieces
        return self._gather([x], to, types)

    def gather(
        self,
        x: Sequence[Num[Array, "tokens hidden"]],
        to: Send,
        dtype: Any,
        *,
        num_rows: int,
        groups: Groups | None = None,
        onto: Num[Array, "rows hidden"] | None = None,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> Num[Array, "rows hidden"]:
        """Copies tokens from the wire to rows.

        Args:
          x: pieces of tokens.
          to: where they go.
          dtype: what they are.
          num_rows: how many rows there are.
          groups: what to zero; None for nothing.
          onto: rows that stay where no token goes; None if those may hold anything.
          weights: what to scale rows by, if by anything.
        """
        types = [((num_rows, x[0].shape[1]), dtype)]
        [rows] = self._gather(x, to, types, groups=groups, onto=onto, weights=weights)
        return rows

    def _gather(
        self,
        x: Sequence[Array],
        to: Send,
        types: Sequence[ArrayType],
        *,
        groups: Groups | None = None,
        onto: Array | None = None,
        weights: Array | None = None,
    ) -> list[Array]:
        op = GATHER_ROWS if weights is None else GATHER_SCALED
        tail = "uninitialized" if groups is None else self.call.layout.tail
        groups = groups or Groups(*[jnp.zeros(1, jnp.int32)] * 2)
        (piece_rows, hidden), dtype = types[0]
        sizes = {"num_experts": groups.group_sizes.size, "tail": tail}
        layout = self._layout(to, piece_rows * len(types), **sizes)
        below = jnp.zeros((0, hidden), dtype) if onto is None else onto
        told = [below, *to, *groups, *([] if weights is None else [weights])]
        aliases = {} if onto is None else {len(Place._fields): 0}
        return self._invoke(op, layout, told, x, types, input_output_aliases=aliases)

    def partial_sums(
        self,
        rows: Num[Array, "rows hidden"],
        to: Send,
        *,
        num_pieces: int,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> list[Num[Array, "tokens hidden"]]:
        """Adds up each token's rows, scaled by weights if there are any, for the wire."""
        return self._reduce([rows], to, _bits(rows.dtype), num_pieces=num_pieces, weights=weights)

    def add_up(
        self,
        rows: Sequence[Num[Array, "rows hidden"]],
        to: Send,
        dtype: Any,
        *,
        here: Int32[Array, ""],
        num_ranks: int,
        ranks_per_node: int,
    ) -> Num[Array, "tokens hidden"]:
        """Adds up each token's partial sums from the wire, in the order of their ranks.

        Args:
          rows: all of them; or a piece of each rank's, this one's first, then the next one's.
          to: which belong to which token: the row in its rank's piece, if there are such.
          dtype: what they are.
          here: which of these this one is.
          num_ranks: how many ranks they are of.
          ranks_per_node: how many of these are on a node.
        """
        among = dataclasses.replace(self, where=self.where._replace(rank=here))
        [sums] = among._reduce(rows, to, dtype, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
        return sums

    def _reduce(
        self,
        rows: Sequence[Array],
        to: Send,
        dtype: Any,
        *,
        num_ranks: int = 1,
        ranks_per_node: int = 1,
        num_pieces: int = 1,
        weights: Array | None = None,
    ) -> list[Array]:
        op = REDUCE_ROWS if weights is None else REDUCE_SCALED
        ranks = {"num_ranks": num_ranks, "num_experts": num_ranks, "ranks_per_node": ranks_per_node}
        layout = self._layout(to, rows[0].shape[0], **ranks)
        told = [*to, *([] if weights is None else [weights])]
        shape = (layout.num_tokens // num_pieces, rows[0].shape[1])
        return self._invoke(op, layout, told, rows, [(shape, dtype)] * num_pieces)

    def dots(
        self,
        rows: Num[Array, "rows hidden"],
        dout: Sequence[Num[Array, "tokens hidden"]],
        to: Send,
    ) -> Float32[Array, "tokens topk"]:
        """Multiplies rows with their tokens' rows of ``dout``, which come from the wire."""
        layout = self._layout(to, rows.shape[0])
        [dots] = self._invoke(
            ROW_DOTS, layout, [*to, rows], dout, [(to.send_row.shape, jnp.float32)]
        )
        return dots

    def _layout(self, to: Send, num_rows: int, **changes: Any) -> Layout:
        num_tokens, num_topk = to.send_row.shape
        sizes = {"num_tokens": num_tokens, "num_topk": num_topk, "capacity": num_rows}
        return dataclasses.replace(
            self.call.layout,
            **{"num_ranks": 1, "num_experts": 1, "ranks_per_node": 1} | sizes | changes,
        )

    def _invoke(
        self,
        op: Op,
        layout: Layout,
        told: Sequence[Array],
        pieces: Sequence[Array],
        types: Sequence[ArrayType],
        **options: Any,
    ) -> list[Array]:
        call = dataclasses.replace(self.call, op=op, layout=layout)
        results = [result_type(shape, dtype, pieces[0]) for shape, dtype in types]
        operands = [*self.where, *told, *pieces]
        return _foreign.invoke(self.fabric, call, operands, results, {}, **options)


def _bits(dtype: Any) -> str:
    return f"uint{8 * jnp.dtype(dtype).itemsize}"
