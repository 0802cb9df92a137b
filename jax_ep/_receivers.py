"""What is done, in rounds, where rows have come to: by a rank for itself, or as in ``_nodes``.

A receiver takes tokens from the wire to their rows, and brings what is made of rows to where it
goes back from.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jax_ep._call import Call, Operands
from jax_ep._local import Groups, Local, Send
from jax_ep._packed import Packed
from jax_ep._plan import PlanArrays, is_received
from jax_ep._wire import Wire

Pieces: TypeAlias = Sequence[Array]

Work: TypeAlias = Local | Packed
"""What does a rank's own part."""


class Sent(NamedTuple):
    """Tokens that have come over the wire."""

    pieces: Pieces
    dtype: Any
    onto: Array | None
    """The rows of the rounds before, or None in the first."""


class Receiver(Protocol):
    """What is done on the other side of the wire; each method is for one round."""

    def gather(
        self,
        wire: Wire,
        number: Any,
        tokens: Sequence[Sent],
        weights: Array | None,
    ) -> list[Array]:
        """Copies tokens from the wire to their rows.

        Args:
          wire: where on the wire everything is.
          number: of the round.
          tokens: arrays of them.
          weights: of this rank's own choices, by which rows are to be scaled, if by any.
        """
        ...

    def partial_sums(
        self, wire: Wire, number: Any, rowss: Sequence[Array], weights: Array | None
    ) -> list[list[Array]]:
        """Adds up each token's rows, scaled by weights if there are any, for the wire."""
        ...

    def dots(self, wire: Wire, number: Any, rows: Array, sent: Pieces) -> Array:
        """Multiplies rows with their tokens' rows from the wire, for each slot and k."""
        ...


class Received(NamedTuple):
    """A plan's list of what this rank receives, and the place of each entry's token."""

    peer: Int32[Array, "capacity"]
    place: Int32[Array, "capacity"]
    k: Int32[Array, "capacity"]
    row: Int32[Array, "capacity"]
    exists: Bool[Array, "capacity"]

    def slots(self, wire: Wire, number: Any) -> Int32[Array, "capacity"]:
        """Returns the slot of each entry in a round, or ``DROPPED``."""
        return wire.slots_from(self.peer, number, self.place, self.exists)


@dataclasses.dataclass(frozen=True, eq=False)
class Rank:
    """A rank that does it by itself."""

    local: Work
    plan: PlanArrays
    received: Received

    @classmethod
    def of(cls, local: Work, call: Call, operands: Operands) -> "Rank":
        """Finds the places of what comes: tokens are counted as they stand in the list."""
        layout, plan = call.layout, operands.plan
        assert plan is not None
        token = plan.recv_choice // layout.num_topk  # of all ranks' tokens
        source = token // layout.num_tokens
        is_new = jnp.append(True, token[1:] != token[:-1])  # the list is in order of choices
        ordinal = jnp.cumsum(is_new, dtype=jnp.int32)
        first_of_source = jnp.cumsum(plan.recv_counts, dtype=jnp.int32) - plan.recv_counts
        place = ordinal - ordinal.at[first_of_source].get(mode="clip")[source]
        k = plan.recv_choice % layout.num_topk
        exists = is_received(layout, plan)
        return cls(local, plan, Received(source, place, k, plan.recv_row, exists))

    def gather(
        self,
        wire: Wire,
        number: Any,
        tokens: Sequence[Sent],
        weights: Array | None,
    ) -> list[Array]:
        """Copies tokens from the wire to their rows, onto those that are there."""
        to, scale = self._to(wire, number), self._scale(wire, number, weights)
        groups = Groups(self.plan.group_sizes, self.plan.group_rows)
        return [
            self.local.gather(
                x.pieces,
                to,
                x.dtype,
                num_rows=wire.layout.capacity,
                groups=groups if x.onto is None else None,
                onto=x.onto,
                weights=scale,
            )
            for x in tokens
        ]

    def partial_sums(
        self, wire: Wire, number: Any, rowss: Sequence[Array], weights: Array | None
    ) -> list[list[Array]]:
        """Adds up each token's rows here."""
        to, scale = self._to(wire, number), self._scale(wire, number, weights)
        pieces = wire.num_pieces
        return [
            self.local.partial_sums(rows, to, num_pieces=pieces, weights=scale) for rows in rowss
        ]

    def dots(self, wire: Wire, number: Any, rows: Array, sent: Pieces) -> Array:
        """Multiplies what is here."""
        return self.local.dots(rows, sent, self._to(wire, number))

    def _to(self, wire: Wire, number: Any) -> Send:
        topk, it = wire.layout.num_topk, self.received
        return Send.to(wire.scatter(it.slots(wire, number), it.k, it.row, topk))

    def _scale(self, wire: Wire, number: Any, weights: Array | None) -> Array | None:
        return None if weights is None else wire.tell(number, weights)[0]
