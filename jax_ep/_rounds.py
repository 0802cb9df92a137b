"""The exchange in rounds: ranks anywhere, whose rows XLA's collectives carry.

Each pair of ranks has room for some rows on the wire. A token crosses it once for each rank on
which it has choices; native code packs and unpacks. On the way back a rank adds up what it has of a
token, and the token's rank adds up these partial sums. Where a pair has more to send than there is
room, all go on for as many rounds as the fullest pair needs: nothing is lost, and no buffer grows
with the number of ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_ep import _foreign
from jax_ep._call import Call, Operands
from jax_ep._local import Groups, Local, Send
from jax_ep._ops import GATHER_ROWS, GATHER_SCALED, PLAN, REDUCE_ROWS, REDUCE_SCALED
from jax_ep._types import DROPPED
from jax_ep._wire import Wire
from jax_ep._xla import gather_choices

T = TypeVar("T")


def run(fabric: _foreign.Target, call: Call, operands: Operands) -> list[Array]:
    """Runs an op for the rank of this device."""
    if call.op is PLAN:
        gathered = gather_choices(call.layout, *operands.payloads)
        return _foreign.run(fabric, call, operands._replace(payloads=(gathered,)))
    local = Local(fabric, call, operands.where)
    wire = Wire.of(call, operands)
    if call.op is GATHER_ROWS:
        return _gather(local, wire, operands.payloads, None)
    if call.op is REDUCE_ROWS:
        return _reduce(local, wire, operands.payloads, None)
    first, second = operands.payloads
    if call.op is GATHER_SCALED:
        return _gather(local, wire, [first], second)
    if call.op is REDUCE_SCALED:
        return _reduce(local, wire, [first], second)
    return _row_dots(local, wire, first, second)


def _gather(local: Local, wire: Wire, xs: Sequence[Array], weights: Array | None) -> list[Array]:
    """Sends tokens out; each round writes its rows onto those of the rounds before."""
    groups = Groups(wire.plan.group_sizes, wire.plan.group_rows)

    def fill(number: Any, below: Sequence[Array | None]) -> list[Array]:
        to = Send.to(wire.rows_of_slots(number))
        scale = None if weights is None else wire.tell(number, weights)
        return [
            local.gather(
                _send(local, wire, number, x),
                to,
                x.dtype,
                num_rows=wire.layout.capacity,
                groups=groups if onto is None else None,
                onto=onto,
                weights=scale,
            )
            for x, onto in zip(xs, below, strict=True)
        ]

    return _further_rounds(wire, fill, fill(0, [None] * len(xs)))


def _reduce(local: Local, wire: Wire, rowss: Sequence[Array], weights: Array | None) -> list[Array]:
    """Brings partial sums back, and adds them up when all of a token's are there."""

    def partials(wire: Wire, number: Any) -> list[list[Array]]:
        to = Send.to(wire.rows_of_slots(number))
        scale = None if weights is None else wire.tell(number, weights)
        return [
            wire.carry_back(local.partial_sums(rows, to, num_pieces=wire.num_pieces, weights=scale))
            for rows in rowss
        ]

    def add_up(row: Array, sums: Sequence[Sequence[Array]]) -> list[Array]:
        of = Send(jnp.where(row == DROPPED, row, wire.rank), row)
        num_ranks = wire.layout.num_ranks
        return [
            local.add_up(pieces, of, rows.dtype, num_ranks=num_ranks)
            for pieces, rows in zip(sums, rowss, strict=True)
        ]

    def at_once() -> list[Array]:
        slots = wire.places(0) if wire.num_pieces > 1 else wire.slots(0)
        return add_up(wire.once(slots), partials(wire, 0))

    def one_by_one() -> list[Array]:
        # What is kept takes as much as a round: so these are half as large.
        half = wire.halved()
        num_kept, kept = wire.rows_of_sums()

        def keep(number: Any, below: Sequence[Array | None]) -> list[Array]:
            to = Send.to(half.by_slot(half.once(half.slots(number)), kept))
            return [
                local.gather(pieces, to, pieces[0].dtype, num_rows=num_kept, onto=onto)
                for pieces, onto in zip(partials(half, number), below, strict=True)
            ]

        sums = _further_rounds(half, keep, keep(0, [None] * len(rowss)))
        return add_up(kept, [[rows] for rows in sums])

    return jax.lax.cond(wire.num_rounds == 1, at_once, one_by_one)


def _row_dots(local: Local, wire: Wire, rows: Array, dout: Array) -> list[Array]:
    """Sends tokens' rows of ``dout`` to where the experts' are, and brings products back."""

    def multiply(number: Any, before: Array) -> Array:
        to = Send.to(wire.rows_of_slots(number))
        dots = local.dots(rows, _send(local, wire, number, dout), to)
        return wire.hear(number, dots, before)

    zeros = jnp.zeros_like(wire.rank, dtype=jnp.float32)
    return [_further_rounds(wire, multiply, multiply(0, zeros))]


def _send(local: Local, wire: Wire, number: Any, x: Array) -> list[Array]:
    """Sends tokens through a round's slots; returns those that came."""
    to = Send.to(wire.once(wire.slots(number)))
    return wire.carry(local.pack(x, to, num_rows=wire.num_slots, num_pieces=wire.num_pieces))


def _further_rounds(wire: Wire, step: Callable[[Any, T], T], first: T) -> T:
    """Takes what the first round gave through the others, of which there are none as a rule."""

    def body(state: tuple[Array, T]) -> tuple[Array, T]:
        number, carried = state
        return number + 1, step(number, carried)

    start = (jnp.ones_like(wire.num_rounds), first)
    return jax.lax.while_loop(lambda state: state[0] < wire.num_rounds, body, start)[1]
