"""What crosses between ranks in a round, and where on the wire: see ``_rounds``.

A rank sends to *peers*: to all ranks of its group; or, on two levels, to one rank of each node, its
own node's included, that stands there where it stands itself. A *slot* is a place on the wire in
one round: there are ``room`` of them for each peer, the *block* of that peer. A choice's *place* is
the number of its token among those that go to the same peer.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Num

from jax_ep._axes import permute
from jax_ep._call import Call, Operands
from jax_ep._compat import bound_axes
from jax_ep._layout import Layout, fullest_of
from jax_ep._types import DROPPED
from jax_ep._xla import position_among_equals, swap_slices

ROOM_FACTOR = 1.25
"""How much more room a pair of ranks has than it needs if all experts are as popular."""

CHANCE_FACTOR = 1.0
"""How much of the excess that chance gives the fullest pair, likewise, there is room for."""

FURTHER_ROUNDS = 4
"""By how much smaller rounds are after the first: what they carry is the excess of some pairs."""

FEW_ROWS = 64
"""So few are sent as fast as fewer: rounds do not become smaller than this."""


def room_of(layout: Layout, ranks_per_peer: int = 1) -> int:
    """Returns how many rows a rank can send to each peer in the first round."""
    num_peers = layout.num_ranks // ranks_per_peer
    chance = layout.chance_to_reach(layout.num_experts // num_peers)
    mean = layout.num_tokens * chance
    fullest = fullest_of(layout.num_tokens, chance, layout.num_ranks * num_peers)
    by_chance = mean + CHANCE_FACTOR * (fullest - mean)
    # A node has many experts: some of them will be popular, and others not.
    wanted = max(by_chance, ROOM_FACTOR * mean if ranks_per_peer == 1 else 0)
    return max(1, min(math.ceil(wanted), layout.num_tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Wire:
    """One rank's side of an exchange in rounds.

    Rows travel in one array of all slots, by one ``all_to_all``; or in a *piece* for each peer, by
    one permutation each, in the order of their distance: this rank's own first. XLA:CPU cuts up the
    former and puts it together again, which takes three times as long. But a permutation has all
    groups of a mesh wait for each other, and these may go different ways: in a conditional, and in
    the number of their rounds.

    Attributes:
      layout: the exchange's geometry.
      ranks_per_peer: how many ranks a peer receives for.
      here: the number of this rank's node, or of this rank, among its peers.
      peer: to which peer each choice of this rank's tokens goes, or ``DROPPED``.
      place: the place of each choice, through all rounds.
      is_first: whether it is the first of its token that goes there.
      fullest: the most tokens that any rank of the group sends to any peer, or all there is room
        for.
      room: how many a rank can send to each in one round.
      start: the place with which these rounds begin.
      num_pieces: in how many pieces rows travel, one or as many as there are peers.
    """

    layout: Layout
    ranks_per_peer: int
    here: Int32[Array, ""]
    peer: Int32[Array, "num_tokens num_topk"]
    place: Int32[Array, "num_tokens num_topk"]
    is_first: Bool[Array, "num_tokens num_topk"]
    fullest: Int32[Array, ""]
    room: int
    start: int
    num_pieces: int

    @classmethod
    def of(cls, call: Call, operands: Operands, ranks_per_peer: int = 1) -> "Wire":
        """Finds out where this rank's tokens go, and asks how much any has to send to any.

        Where a round has room for all tokens, nobody needs to ask.
        """
        layout, plan = call.layout, operands.plan
        assert plan is not None
        num_peers = layout.num_ranks // ranks_per_peer
        is_sent = (plan.send_rank >= 0) & (plan.send_rank < layout.num_ranks)
        is_sent &= (plan.send_row >= 0) & (plan.send_row < layout.capacity)
        peer = jnp.where(is_sent, plan.send_rank // ranks_per_peer, DROPPED)
        first = jnp.argmax(peer[:, :, None] == peer[:, None, :], axis=2).astype(jnp.int32)
        is_first = is_sent & (first == jnp.arange(layout.num_topk, dtype=jnp.int32))
        keys = jnp.where(is_first, peer, num_peers)
        place = position_among_equals(keys.reshape(-1), num_peers + 1).reshape(peer.shape)
        place = jnp.take_along_axis(place, first, axis=1)
        is_alone = math.prod(bound_axes().values()) == layout.num_ranks
        room = room_of(layout, ranks_per_peer)
        fullest = jnp.full_like(operands.where.rank, room)
        if room < layout.num_tokens:
            fullest = jnp.max(jnp.where(is_first, place, 0)) + 1
            fullest = jax.lax.pmax(fullest, layout.axis_name)
        return cls(
            layout=layout,
            ranks_per_peer=ranks_per_peer,
            here=operands.where.rank // ranks_per_peer,
            peer=peer,
            place=place,
            is_first=is_first,
            fullest=fullest,
            room=room,
            start=0,
            num_pieces=num_peers if call.platform == "cpu" and is_alone else 1,
        )

    @property
    def num_peers(self) -> int:
        """How many peers each rank has, its own included."""
        return self.layout.num_ranks // self.ranks_per_peer

    @property
    def num_rounds(self) -> Int32[Array, ""]:
        """How many rounds of this size the fullest pair of the group needs; it may be below 0."""
        return (self.fullest - self.start + self.room - 1) // self.room

    @property
    def num_slots(self) -> int:
        """Places on the wire in one round."""
        return self.num_peers * self.room

    def halved(self) -> "Wire":
        """Has rounds of half the size."""
        return dataclasses.replace(self, room=(self.room + 1) // 2)

    def after_the_first(self) -> "Wire":
        """Has the rounds that come after the first of these, which are smaller."""
        room = max(min(self.room, FEW_ROWS), -(-self.room // FURTHER_ROUNDS))
        return dataclasses.replace(self, room=room, start=self.start + self.room)

    def slots(self, number: Any) -> Int32[Array, "num_tokens num_topk"]:
        """Returns each choice's slot in a round, or ``DROPPED``."""
        return self._slot(self.block_of(self.peer, self.peer - self.here), self.places(number))

    def places(self, number: Any) -> Int32[Array, "num_tokens num_topk"]:
        """Returns each choice's place in a round, or ``DROPPED`` if it has none there."""
        return self.in_round(number, self.place, self.peer != DROPPED)

    def slots_from(self, peer: Array, number: Any, place: Array, exists: Array) -> Array:
        """Returns the slots here of what comes from peers, by its place through all rounds."""
        block = self.block_of(peer, self.here - peer)
        return self._slot(block, self.in_round(number, place, exists))

    def once(self, of_choice: Array) -> Array:
        """Leaves out all but the first choice of a token for each peer."""
        return jnp.where(self.is_first, of_choice, DROPPED)

    def scatter(self, slot: Array, k: Array, values: Array, num_topk: int) -> Array:
        """Puts values at (slot, k), and ``DROPPED`` where there is none."""
        size = self.num_slots * num_topk
        at = jnp.where(slot == DROPPED, size, slot * num_topk + k)
        more = values.shape[slot.ndim :]
        wire = jnp.full_like(values, DROPPED, shape=(size, *more)).at[at].set(values, mode="drop")
        return wire.reshape(self.num_slots, num_topk, *more)

    def by_slot(self, slot: Array, value: Array) -> Int32[Array, "num_slots 1"]:
        """Returns a number that each slot's choice has, as a list of one choice a slot."""
        return self.scatter(slot, jnp.zeros_like(slot), value, 1)

    def rows_of_sums(self) -> tuple[int, Int32[Array, "num_tokens num_topk"]]:
        """Returns how many partial sums there can be, and a row among these for each."""
        num_tokens, num_topk = self.peer.shape
        width = min(num_topk, self.num_peers)
        own = self.peer if width < num_topk else jnp.arange(num_topk, dtype=jnp.int32)
        row = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] * width + own
        return num_tokens * width, self.once(row)

    def tell(
        self, number: Any, *values: Num[Array, "num_tokens num_topk"]
    ) -> list[Num[Array, "num_slots num_topk"]]:
        """Takes numbers of 4 bytes of each choice of a round to its peer, all at once.

        Returns:
          What was told here of each slot and k; -1, as a float NaN, of what is not there.
        """
        words = jnp.stack([jax.lax.bitcast_convert_type(v, jnp.int32) for v in values], axis=2)
        k = jnp.broadcast_to(jnp.arange(words.shape[1], dtype=jnp.int32), words.shape[:2])
        slot = self._slot(self.peer, self.places(number))
        wire = self._reorder(self._swap(self.scatter(slot, k, words, words.shape[1])))
        heard = jnp.unstack(wire, axis=2)
        return [
            jax.lax.bitcast_convert_type(w, v.dtype) for w, v in zip(heard, values, strict=True)
        ]

    def hear(self, number: Any, answers: Array, others: Array) -> Num[Array, "num_tokens num_topk"]:
        """Brings back a number for each choice of a round; the others keep theirs."""
        slot = self._slot(self.peer, self.places(number))
        flat = self._swap(self._reorder(answers)).reshape(-1)
        at = slot * self.layout.num_topk + jnp.arange(self.layout.num_topk, dtype=jnp.int32)
        return jnp.where(slot == DROPPED, others, flat.at[at].get(mode="clip"))

    def carry(self, pieces: Sequence[Array]) -> list[Array]:
        """Sends each peer its rows; returns those that all peers sent here."""
        return self._move(pieces, 1)

    def carry_back(self, pieces: Sequence[Array]) -> list[Array]:
        """Sends rows back to where their slots came from."""
        return self._move(pieces, -1)

    def _move(self, pieces: Sequence[Array], sign: int) -> list[Array]:
        if len(pieces) == 1:
            return [self._swap(pieces[0])]
        num_ranks, moved = self.layout.num_ranks, list(pieces)
        for distance in range(1, self.num_peers):
            by = sign * distance * self.ranks_per_peer
            target = [(rank + by) % num_ranks for rank in range(num_ranks)]
            moved[distance] = permute(self.layout, pieces[distance], target)
        return moved

    def _swap(self, wire: Num[Array, "num_slots ..."]) -> Num[Array, "num_slots ..."]:
        parts = wire.reshape(self.num_peers, self.room, *wire.shape[1:])
        return swap_slices(self.layout, parts, self._peers).reshape(wire.shape)

    @property
    def _peers(self) -> list[list[int]] | None:
        """The ranks that are each other's peers, if these are not all."""
        return None if self.ranks_per_peer == 1 else self.layout.across_nodes

    def in_round(self, number: Any, place: Array, exists: Array) -> Array:
        """Returns places in a round of what has these through all, or ``DROPPED``."""
        place = place - (self.start + number * self.room)
        return jnp.where(exists & (place >= 0) & (place < self.room), place, DROPPED)

    def _slot(self, block: Array, place: Array) -> Array:
        return jnp.where(place == DROPPED, DROPPED, block * self.room + place)

    def block_of(self, peer: Array, distance: Array) -> Array:
        """Returns the block of a peer."""
        return peer if self.num_pieces == 1 else distance % self.num_peers

    def _reorder(self, by_peer: Array) -> Array:
        """Brings blocks that are in the order of peers into that of slots here, or back."""
        if self.num_pieces == 1:
            return by_peer
        blocks = by_peer.reshape(self.num_peers, -1)
        # What comes from a peer at some distance is in the block of that distance.
        order = (self.here - jnp.arange(self.num_peers, dtype=jnp.int32)) % self.num_peers
        return blocks[order].reshape(by_peer.shape)
