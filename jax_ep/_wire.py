"""What crosses between ranks in a round, and where on the wire: see ``_rounds``.

A *slot* is a place on the wire in one round: there are ``room`` of them for each rank, the *block*
of that rank. A choice's *place* is the number of its token among those that go to the same rank.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Num

from jax_ep._call import Call, Operands
from jax_ep._compat import bound_axes
from jax_ep._layout import Layout
from jax_ep._plan import PlanArrays, is_received
from jax_ep._types import DROPPED
from jax_ep._xla import position_among_equals, swap_slices

ROOM_FACTOR = 1.25
"""How much more room a pair of ranks has than it needs if all experts are as popular."""


def room_of(layout: Layout) -> int:
    """Returns how many rows a rank can send to each rank in one round."""
    ranks, _ = layout.ranks_of_a_token
    wanted = math.ceil(ROOM_FACTOR * layout.num_tokens * ranks / layout.num_ranks)
    return max(1, min(wanted, layout.num_tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Wire:
    """One rank's side of an exchange in rounds.

    Rows travel in one array of all slots, by one ``all_to_all``; or in a *piece* for each rank, by
    one permutation each, in the order of their distance: this rank's own first. XLA:CPU cuts up the
    former and puts it together again, which takes three times as long. But a permutation has all
    groups of a mesh wait for each other, and these may go different ways: in a conditional, and in
    the number of their rounds.

    Attributes:
      layout: the exchange's geometry.
      plan: the plan of this rank.
      here: this rank.
      rank: where each choice of this rank's tokens goes, or ``DROPPED``.
      place: the place of each choice, through all rounds.
      is_first: whether it is the first of its token that goes there.
      fullest: the most tokens that any rank of the group sends to any.
      room: how many a rank can send to each in one round.
      num_pieces: in how many pieces rows travel, one or as many as there are ranks.
    """

    layout: Layout
    plan: PlanArrays
    here: Int32[Array, ""]
    rank: Int32[Array, "num_tokens num_topk"]
    place: Int32[Array, "num_tokens num_topk"]
    is_first: Bool[Array, "num_tokens num_topk"]
    fullest: Int32[Array, ""]
    room: int
    num_pieces: int

    @classmethod
    def of(cls, call: Call, operands: Operands) -> "Wire":
        """Finds out where this rank's tokens go, and asks how much any has to send to any."""
        layout, plan = call.layout, operands.plan
        assert plan is not None
        is_sent = (plan.send_rank >= 0) & (plan.send_rank < layout.num_ranks)
        is_sent &= (plan.send_row >= 0) & (plan.send_row < layout.capacity)
        rank = jnp.where(is_sent, plan.send_rank, DROPPED)
        first = jnp.argmax(rank[:, :, None] == rank[:, None, :], axis=2).astype(jnp.int32)
        is_first = is_sent & (first == jnp.arange(layout.num_topk, dtype=jnp.int32))
        keys = jnp.where(is_first, rank, layout.num_ranks)
        place = position_among_equals(keys.reshape(-1), layout.num_ranks + 1).reshape(rank.shape)
        place = jnp.take_along_axis(place, first, axis=1)
        is_alone = math.prod(bound_axes().values()) == layout.num_ranks
        fullest = jnp.max(jnp.where(is_first, place, 0)) + 1
        return cls(
            layout=layout,
            plan=plan,
            here=operands.where.rank,
            rank=rank,
            place=place,
            is_first=is_first,
            fullest=jax.lax.pmax(fullest, layout.axis_name),
            room=room_of(layout),
            num_pieces=layout.num_ranks if call.platform == "cpu" and is_alone else 1,
        )

    @property
    def num_rounds(self) -> Int32[Array, ""]:
        """How many rounds the fullest pair of the group needs."""
        return (self.fullest + self.room - 1) // self.room

    @property
    def num_slots(self) -> int:
        """Places on the wire in one round."""
        return self.layout.num_ranks * self.room

    def halved(self) -> "Wire":
        """Has rounds of half the size."""
        return dataclasses.replace(self, room=(self.room + 1) // 2)

    def places(self, number: Any) -> Int32[Array, "num_tokens num_topk"]:
        """Returns each choice's place in a round, or ``DROPPED`` if it has none there."""
        return self._in_round(self.place - number * self.room, self.rank != DROPPED)

    def slots(self, number: Any) -> Int32[Array, "num_tokens num_topk"]:
        """Returns each choice's slot in a round, or ``DROPPED``."""
        return self._slot(
            self._nearest_first(self.rank, self.rank - self.here), self.places(number)
        )

    def once(self, of_choice: Array) -> Array:
        """Leaves out all but the first choice of a token for each rank."""
        return jnp.where(self.is_first, of_choice, DROPPED)

    def rows_of_slots(self, number: Any) -> Int32[Array, "num_slots num_topk"]:
        """Returns the rows, here, of the choices that come in each slot, or ``DROPPED``."""
        plan, num_tokens, num_topk = self.plan, self.layout.num_tokens, self.layout.num_topk
        token = plan.recv_choice // num_topk  # of all ranks' tokens
        source = token // num_tokens
        is_new = jnp.append(True, token[1:] != token[:-1])  # the list is in order of choices
        ordinal = jnp.cumsum(is_new, dtype=jnp.int32)
        first_of_source = jnp.cumsum(plan.recv_counts, dtype=jnp.int32) - plan.recv_counts
        place = ordinal - ordinal.at[first_of_source].get(mode="clip")[source]
        place = self._in_round(place - number * self.room, is_received(self.layout, plan))
        slot = self._slot(self._nearest_first(source, self.here - source), place)
        return _scatter(slot, plan.recv_choice % num_topk, plan.recv_row, self.num_slots, num_topk)

    def by_slot(self, slot: Array, value: Array) -> Int32[Array, "num_slots 1"]:
        """Returns a number that each slot's choice has, as a list of one choice a slot."""
        return _scatter(slot, jnp.zeros_like(slot), value, self.num_slots, 1)

    def rows_of_sums(self) -> tuple[int, Int32[Array, "num_tokens num_topk"]]:
        """Returns how many partial sums there can be, and a row among these for each."""
        num_tokens, num_topk = self.rank.shape
        width = min(num_topk, self.layout.num_ranks)
        own = self.rank if width < num_topk else jnp.arange(num_topk, dtype=jnp.int32)
        row = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] * width + own
        return num_tokens * width, self.once(row)

    def tell(self, number: Any, values: Array) -> Num[Array, "num_slots num_topk"]:
        """Takes a number of each choice of a round to its rank: there, one for each slot and k."""
        k = jnp.broadcast_to(jnp.arange(values.shape[1], dtype=jnp.int32), values.shape)
        slot = self._slot(self.rank, self.places(number))
        wire = _scatter(slot, k, values, self.num_slots, values.shape[1])
        return self._reorder(self._swap(wire))

    def hear(self, number: Any, answers: Array, others: Array) -> Num[Array, "num_tokens num_topk"]:
        """Brings back a number for each choice of a round; the others keep theirs."""
        slot = self._slot(self.rank, self.places(number))
        flat = self._swap(self._reorder(answers)).reshape(-1)
        at = slot * self.layout.num_topk + jnp.arange(self.layout.num_topk, dtype=jnp.int32)
        return jnp.where(slot == DROPPED, others, flat.at[at].get(mode="clip"))

    def carry(self, pieces: Sequence[Array]) -> list[Array]:
        """Sends each rank its rows; returns those that all ranks sent here."""
        return self._move(pieces, 1)

    def carry_back(self, pieces: Sequence[Array]) -> list[Array]:
        """Sends rows back to where their slots came from."""
        return self._move(pieces, -1)

    def _move(self, pieces: Sequence[Array], sign: int) -> list[Array]:
        if len(pieces) == 1:
            return [self._swap(pieces[0])]
        num_ranks, axis_name = self.layout.num_ranks, self.layout.axis_name
        moved = list(pieces)
        for distance in range(1, num_ranks):
            pairs = [(r, (r + sign * distance) % num_ranks) for r in range(num_ranks)]
            moved[distance] = jax.lax.ppermute(pieces[distance], axis_name, pairs)
        return moved

    def _swap(self, wire: Num[Array, "num_slots width"]) -> Num[Array, "num_slots width"]:
        parts = wire.reshape(self.layout.num_ranks, self.room, *wire.shape[1:])
        return swap_slices(self.layout, parts).reshape(wire.shape)

    def _in_round(self, place: Array, exists: Array) -> Array:
        return jnp.where(exists & (place >= 0) & (place < self.room), place, DROPPED)

    def _slot(self, block: Array, place: Array) -> Array:
        return jnp.where(place == DROPPED, DROPPED, block * self.room + place)

    def _nearest_first(self, rank: Array, distance: Array) -> Array:
        """Returns the block of a rank."""
        return rank if self.num_pieces == 1 else distance % self.layout.num_ranks

    def _reorder(self, by_rank: Array) -> Array:
        """Brings blocks that are in the order of ranks into that of slots here, or back."""
        if self.num_pieces == 1:
            return by_rank
        num_ranks = self.layout.num_ranks
        blocks = by_rank.reshape(num_ranks, -1)
        # What comes from a rank at some distance is in the block of that distance.
        order = (self.here - jnp.arange(num_ranks, dtype=jnp.int32)) % num_ranks
        return blocks[order].reshape(by_rank.shape)


def _scatter(slot: Array, k: Array, values: Array, num_slots: int, num_topk: int) -> Array:
    """Puts values at (slot, k), and ``DROPPED`` where there is none; leaves out dropped slots."""
    at = jnp.where(slot == DROPPED, num_slots * num_topk, slot * num_topk + k)
    wire = jnp.full_like(values, DROPPED, shape=num_slots * num_topk)
    return wire.at[at].set(values, mode="drop").reshape(num_slots, num_topk)
