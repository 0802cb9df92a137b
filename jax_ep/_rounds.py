"""The exchange in rounds: ranks anywhere, whose rows XLA's collectives carry.

Each pair of ranks has room for some rows on the wire. A token crosses it once for each rank on
which it has choices; native code packs and unpacks. On the way back a rank adds up what it has of a
token, and the token's rank adds up these partial sums. Where a pair has more to send than there is
room, all go on for as many rounds as the fullest pair needs: nothing is lost, and no buffer grows
with the number of ranks.

Where ranks are on nodes, a token crosses between nodes once for each node, and is spread there; see
``_nodes``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_ep._call import Call, Operands
from jax_ep._local import Send
from jax_ep._nodes import Carrier, Node
from jax_ep._ops import GATHER_ROWS, GATHER_SCALED, PLAN, REDUCE_ROWS, REDUCE_SCALED
from jax_ep._receivers import Rank, Receiver, Sent, Work
from jax_ep._types import DROPPED
from jax_ep._wire import Wire

T = TypeVar("T")


def run(local: Work, call: Call, operands: Operands, within_nodes: Carrier | None) -> list[Array]:
    """Runs an op for the rank of this device.

    Args:
      local: does this rank's own part.
      call: the exchange.
      operands: what it is given.
      within_nodes: carries exchanges within nodes, if there are nodes and something that can.
    """
    if call.op is PLAN:
        return local.plan(call, operands)
    wire = Wire.of(call, operands, 1 if within_nodes is None else call.layout.ranks_per_node)
    receiver: Receiver
    if within_nodes is None:
        receiver = Rank.of(local, call, operands)
    else:
        receiver = Node.of(within_nodes, call.within_nodes(), operands)
    exchange = _Exchange(local, wire, receiver)
    if call.op is GATHER_ROWS:
        return exchange.gather(operands.payloads, None)
    if call.op is REDUCE_ROWS:
        return exchange.reduce(operands.payloads, None)
    first, second = operands.payloads
    if call.op is GATHER_SCALED:
        return exchange.gather([first], second)
    if call.op is REDUCE_SCALED:
        return exchange.reduce([first], second)
    return exchange.row_dots(first, second)


class _Exchange(NamedTuple):
    """What a rank does with its own tokens, the wire, and what is done on its other side."""

    local: Work
    wire: Wire
    receiver: Receiver

    def gather(self, xs: Sequence[Array], weights: Array | None) -> list[Array]:
        """Sends tokens out; each round writes its rows onto those of the rounds before."""

        def fill(wire: Wire, number: Any, below: Sequence[Array | None]) -> list[Array]:
            tokens = [
                Sent(self._send(wire, number, x), x.dtype, onto)
                for x, onto in zip(xs, below, strict=True)
            ]
            return self.receiver.gather(wire, number, tokens, weights)

        return _further_rounds(self.wire, fill, fill(self.wire, 0, [None] * len(xs)))

    def reduce(self, rowss: Sequence[Array], weights: Array | None) -> list[Array]:
        """Brings partial sums back, and adds them up when all of a token's are there."""

        def partials(wire: Wire, number: Any) -> list[list[Array]]:
            sums = self.receiver.partial_sums(wire, number, rowss, weights)
            return [wire.carry_back(pieces) for pieces in sums]

        def at_once() -> list[Array]:
            wire = self.wire
            slots = wire.places(0) if wire.num_pieces > 1 else wire.slots(0)
            return self._add_up(wire.once(slots), partials(wire, 0), rowss)

        def one_by_one() -> list[Array]:
            # What is kept takes as much as a round: so these are half as large.
            half = self.wire.halved()
            num_kept, kept = half.rows_of_sums()

            def keep(wire: Wire, number: Any, below: Sequence[Array | None]) -> list[Array]:
                to = Send.to(wire.by_slot(wire.once(wire.slots(number)), kept))
                return [
                    self.local.gather(pieces, to, pieces[0].dtype, num_rows=num_kept, onto=onto)
                    for pieces, onto in zip(partials(wire, number), below, strict=True)
                ]

            sums = _further_rounds(half, keep, keep(half, 0, [None] * len(rowss)))
            return self._add_up(kept, [[rows] for rows in sums], rowss)

        return jax.lax.cond(self.wire.num_rounds == 1, at_once, one_by_one)

    def row_dots(self, rows: Array, dout: Array) -> list[Array]:
        """Sends tokens' rows of ``dout`` to where the experts' are, and brings products back."""

        def multiply(wire: Wire, number: Any, before: Array) -> Array:
            dots = self.receiver.dots(wire, number, rows, self._send(wire, number, dout))
            return wire.hear(number, dots, before)

        zeros = jnp.zeros_like(self.wire.peer, dtype=jnp.float32)
        return [_further_rounds(self.wire, multiply, multiply(self.wire, 0, zeros))]

    def _send(self, wire: Wire, number: Any, x: Array) -> list[Array]:
        """Sends tokens through a round's slots; returns those that came."""
        to = Send.to(wire.once(wire.slots(number)))
        pieces = self.local.pack(x, to, num_rows=wire.num_slots, num_pieces=wire.num_pieces)
        return wire.carry(pieces)

    def _add_up(
        self, row: Array, sums: Sequence[Sequence[Array]], rowss: Sequence[Array]
    ) -> list[Array]:
        """Adds up each token's partial sums: of ranks, node by node, or those of nodes."""
        wire = self.wire
        of = Send(jnp.where(row == DROPPED, row, wire.peer), row)
        per_node = wire.layout.ranks_per_node // wire.ranks_per_peer
        return [
            self.local.add_up(
                pieces,
                of,
                rows.dtype,
                here=wire.here,
                num_ranks=wire.num_peers,
                ranks_per_node=per_node,
            )
            for pieces, rows in zip(sums, rowss, strict=True)
        ]


def _further_rounds(wire: Wire, step: Callable[[Wire, Any, T], T], first: T) -> T:
    """Takes what the first round gave through the others, of which there are none as a rule."""
    others = wire.after_the_first()

    def body(state: tuple[Array, T]) -> tuple[Array, T]:
        number, carried = state
        return number + 1, step(others, number, carried)

    start = (jnp.zeros_like(others.num_rounds), first)
    return jax.lax.while_loop(lambda state: state[0] < others.num_rounds, body, start)[1]
