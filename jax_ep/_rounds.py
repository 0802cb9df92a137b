"""The exchange in rounds: ranks anywhere, whose rows XLA's ``all_to_all`` carries.

Each pair of ranks has room for some rows on the wire. A token crosses it once for each rank on
which it has choices, together with the numbers of their rows there; native code on both sides packs
and unpacks. On the way back a rank adds up what it has of a token, and the token's rank adds up
these partial sums. Where a pair has more to send than there is room, all go on for as many rounds
as the fullest pair needs: nothing is lost, and no buffer grows with the number of ranks.

A *slot* is a place on the wire in one round, numbered ``rank * room + place``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Num

from jax_ep import _foreign
from jax_ep._axes import Place
from jax_ep._call import Call, Operands
from jax_ep._compat import result_type
from jax_ep._layout import Layout
from jax_ep._ops import GATHER_ROWS, GATHER_SCALED, PLAN, REDUCE_ROWS, REDUCE_SCALED, ROW_DOTS, Op
from jax_ep._types import DROPPED
from jax_ep._xla import gather_choices, position_among_equals, swap_slices

ROOM_FACTOR = 1.25
"""How much more room a pair of ranks has than it needs if all experts are as popular."""

T = TypeVar("T")


def onto(op: Op) -> tuple[str, ...]:
    """Names what handlers take beside the plan: rows that stay where nothing is written."""
    return ("onto",) if op in (GATHER_ROWS, GATHER_SCALED) else ()


def told_of_plan(op: Op) -> tuple[str, ...]:
    """Names what handlers are told of a plan."""
    lists = ("send_rank", "send_row") if op.takes_plan else ()
    return lists + (("group_sizes", "group_rows") if onto(op) else ())


def run(fabric: _foreign.Target, call: Call, operands: Operands) -> list[Array]:
    """Runs an op for the rank of this device."""
    if call.op is PLAN:
        gathered = gather_choices(call.layout, *operands.payloads)
        return _foreign.run(fabric, call, operands._replace(payloads=(gathered,)))
    wire = _Wire.of(fabric, call, operands)
    match call.op.name:
        case "gather_rows":
            return _gather(wire, operands.payloads, None)
        case "gather_scaled":
            x, weights = operands.payloads
            return _gather(wire, [x], weights)
        case "reduce_rows":
            return _reduce(wire, operands.payloads, None)
        case "reduce_scaled":
            rows, weights = operands.payloads
            return _reduce(wire, [rows], weights)
        case _:
            assert call.op is ROW_DOTS
            return _row_dots(wire, *operands.payloads)


def room_of(layout: Layout) -> int:
    """Returns how many rows a rank can send to each rank in one round."""
    ranks, _ = layout.ranks_of_a_token
    wanted = math.ceil(ROOM_FACTOR * layout.num_tokens * ranks / layout.num_ranks)
    return max(1, min(wanted, layout.num_tokens))


class _Send(NamedTuple):
    """Where some tokens' choices have their rows, as local handlers take it."""

    send_rank: Int32[Array, "tokens topk"]
    send_row: Int32[Array, "tokens topk"]

    @classmethod
    def to(cls, row: Int32[Array, "tokens topk"]) -> "_Send":
        """Makes it of rows on this rank, or ``DROPPED``."""
        return cls(jnp.where(row == DROPPED, row, 0), row)


class _Groups(NamedTuple):
    """Which rows are to be zero, as local handlers take it."""

    group_sizes: Int32[Array, "groups"]
    group_rows: Int32[Array, "groups"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Wire:
    """One rank's side of an exchange.

    Attributes:
      fabric: whose handlers to call.
      call: the exchange.
      operands: what it was given.
      rank: where each choice of this rank's tokens goes, or ``DROPPED``.
      place: the place of its token among those that go there, through all rounds.
      is_first: whether it is the first of its token that goes there.
      fullest: the most tokens that any rank of the group sends to any.
      room: how many a rank can send to each in one round.
    """

    fabric: _foreign.Target
    call: Call
    operands: Operands
    rank: Int32[Array, "num_tokens num_topk"]
    place: Int32[Array, "num_tokens num_topk"]
    is_first: Bool[Array, "num_tokens num_topk"]
    fullest: Int32[Array, ""]
    room: int

    @classmethod
    def of(cls, fabric: _foreign.Target, call: Call, operands: Operands) -> "_Wire":
        layout, plan = call.layout, operands.plan
        assert plan is not None
        is_sent = (plan.send_rank >= 0) & (plan.send_rank < layout.num_ranks)
        is_sent &= (plan.send_row >= 0) & (plan.send_row < layout.capacity)
        rank = jnp.where(is_sent, plan.send_rank, DROPPED)
        alike = rank[:, :, None] == rank[:, None, :]
        first = jnp.argmax(alike, axis=2).astype(jnp.int32)
        is_first = is_sent & (first == jnp.arange(layout.num_topk, dtype=jnp.int32))
        keys = jnp.where(is_first, rank, layout.num_ranks)
        place = position_among_equals(keys.reshape(-1), layout.num_ranks + 1).reshape(rank.shape)
        place = jnp.take_along_axis(place, first, axis=1)
        fullest = jnp.max(jnp.where(is_first, place, 0)) + 1
        fullest = jax.lax.pmax(fullest, layout.axis_name)
        room = room_of(layout)
        return cls(fabric, call, operands, rank, place, is_first, fullest, room)

    @property
    def layout(self) -> Layout:
        """The exchange's geometry."""
        return self.call.layout

    @property
    def num_rounds(self) -> Int32[Array, ""]:
        """How many rounds the fullest pair of the group needs."""
        return (self.fullest + self.room - 1) // self.room

    def halved(self) -> "_Wire":
        """Has rounds of half the size."""
        return dataclasses.replace(self, room=(self.room + 1) // 2)

    @property
    def num_slots(self) -> int:
        """Places on the wire in one round."""
        return self.layout.num_ranks * self.room

    def slots(self, number: Any) -> Int32[Array, "num_tokens num_topk"]:
        """Returns the slot of each choice in a round, or ``DROPPED`` if it has none there."""
        place = self.place - number * self.room
        is_in = (self.rank != DROPPED) & (place >= 0) & (place < self.room)
        return jnp.where(is_in, self.rank * self.room + place, DROPPED)

    def tell(self, slots: Array, values: Array, nothing: Any) -> Num[Array, "num_slots num_topk"]:
        """Takes a number of each choice to its rank: there, one for each slot and k."""
        num_topk = self.layout.num_topk
        wire = jnp.full_like(values, nothing, shape=self.num_slots * num_topk)
        wire = wire.at[self._at(slots)].set(values, mode="drop", unique_indices=True)
        return self.swap(wire.reshape(self.num_slots, num_topk))

    def hear(self, slots: Array, answers: Array, others: Array) -> Num[Array, "tokens topk"]:
        """Brings back a number for each choice, where it has a slot."""
        flat = self.swap(answers).reshape(-1)
        return jnp.where(slots == DROPPED, others, flat.at[self._at(slots)].get(mode="clip"))

    def _at(self, slots: Array) -> Int32[Array, "num_tokens num_topk"]:
        num_topk = self.layout.num_topk
        at = slots * num_topk + jnp.arange(num_topk, dtype=jnp.int32)
        # Where there is none, beyond the end, and each elsewhere.
        beyond = self.num_slots * num_topk + jnp.arange(slots.size, dtype=jnp.int32)
        return jnp.where(slots == DROPPED, beyond.reshape(slots.shape), at)

    def swap(self, wire: Num[Array, "num_slots width"]) -> Num[Array, "num_slots width"]:
        """Sends each rank its slots; returns those that all ranks sent here, by rank."""
        parts = wire.reshape(self.layout.num_ranks, self.room, *wire.shape[1:])
        return swap_slices(self.layout, parts).reshape(wire.shape)

    def send(self, slots: Array, x: Num[Array, "num_tokens hidden"]) -> Num[Array, "slots hidden"]:
        """Sends tokens through their slots; returns those that came."""
        to = _Send.to(jnp.where(self.is_first, slots, DROPPED))
        return self.swap(self.gather(x, to, num_rows=self.num_slots))

    def gather(
        self,
        x: Num[Array, "tokens hidden"],
        to: _Send,
        *,
        num_rows: int,
        groups: _Groups | None = None,
        onto: Num[Array, "rows hidden"] | None = None,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> Num[Array, "rows hidden"]:
        """Copies tokens of one device to its rows: onto what is there, or else onto anything."""
        op = GATHER_ROWS if weights is None else GATHER_SCALED
        tail = "uninitialized"
        if groups is None:
            groups = _Groups(*[jnp.zeros(1, jnp.int32)] * 2)
        elif onto is None:
            tail = self.layout.tail
        layout = self._local(to, num_rows, num_experts=groups.group_sizes.size, tail=tail)
        under = jnp.zeros((0, x.shape[1]), x.dtype) if onto is None else onto
        payloads = [x] if weights is None else [x, weights]
        aliases = {} if onto is None else {len(Place._fields): 0}
        return self._invoke(op, layout, [under, *to, *groups], payloads, aliases)

    def reduce(
        self,
        rows: Num[Array, "rows hidden"],
        to: _Send,
        *,
        num_ranks: int = 1,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> Num[Array, "tokens hidden"]:
        """Adds up tokens' rows that are all on one device, by the ranks that they are of."""
        op = REDUCE_ROWS if weights is None else REDUCE_SCALED
        layout = self._local(to, rows.shape[0], num_ranks=num_ranks)
        payloads = [rows] if weights is None else [rows, weights]
        return self._invoke(op, layout, list(to), payloads)

    def dots(
        self, rows: Num[Array, "rows hidden"], dout: Num[Array, "tokens hidden"], to: _Send
    ) -> Float32[Array, "tokens topk"]:
        """Multiplies rows with their tokens' rows of ``dout``, all on one device."""
        return self._invoke(ROW_DOTS, self._local(to, rows.shape[0]), list(to), [rows, dout])

    def _local(self, to: _Send, num_rows: int, **changes: Any) -> Layout:
        num_tokens, num_topk = to.send_row.shape
        sizes = {"num_tokens": num_tokens, "num_topk": num_topk, "capacity": num_rows}
        local = {"num_ranks": 1, "num_experts": 1} | sizes | changes
        return dataclasses.replace(self.layout, **local)

    def _invoke(
        self,
        op: Op,
        layout: Layout,
        told: Sequence[Array],
        payloads: Sequence[Array],
        aliases: dict[int, int] | None = None,
    ) -> Array:
        [(shape, dtype)] = op.result_types(layout, payloads[:1])
        call = dataclasses.replace(self.call, op=op, layout=layout)
        [result] = _foreign.invoke(
            self.fabric,
            call,
            [*self.operands.where, *told, *payloads],
            [result_type(shape, dtype, payloads[0])],
            {},
            input_output_aliases=aliases,
        )
        return result


def _gather(wire: _Wire, xs: Sequence[Array], weights: Array | None) -> list[Array]:
    """Sends tokens out; each round writes its rows onto those of the rounds before."""
    plan, capacity = wire.operands.plan, wire.layout.capacity
    assert plan is not None
    groups = _Groups(plan.group_sizes, plan.group_rows)

    def fill(number: Any, below: Sequence[Array | None]) -> list[Array]:
        slots = wire.slots(number)
        to = _Send.to(wire.tell(slots, plan.send_row, DROPPED))
        scale = None if weights is None else wire.tell(slots, weights, 0)
        return [
            wire.gather(
                wire.send(slots, x), to, num_rows=capacity, groups=groups, onto=rows, weights=scale
            )
            for x, rows in zip(xs, below, strict=True)
        ]

    return _further_rounds(wire, fill, fill(0, [None] * len(xs)))


def _reduce(wire: _Wire, rowss: Sequence[Array], weights: Array | None) -> list[Array]:
    """Brings partial sums back, and adds them up when all of a token's are there."""
    plan, layout = wire.operands.plan, wire.layout
    assert plan is not None
    num_tokens, num_topk, num_ranks = layout.num_tokens, layout.num_topk, layout.num_ranks

    def partials(wire: _Wire, number: Any) -> tuple[Array, list[Array]]:
        slots = wire.slots(number)
        to = _Send.to(wire.tell(slots, plan.send_row, DROPPED))
        scale = None if weights is None else wire.tell(slots, weights, 0)
        sums = [wire.swap(wire.reduce(rows, to, weights=scale)) for rows in rowss]
        return jnp.where(wire.is_first, slots, DROPPED), sums

    def add_up(row: Array, sums: Sequence[Array]) -> list[Array]:
        of = _Send(jnp.where(row == DROPPED, row, wire.rank), row)
        return [wire.reduce(rows, of, num_ranks=num_ranks) for rows in sums]

    def at_once() -> list[Array]:
        return add_up(*partials(wire, 0))

    def one_by_one() -> list[Array]:
        # What is kept takes as much as a round: so these are half as large.
        half = wire.halved()
        width = min(num_topk, num_ranks)
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] * width
        own = wire.rank if width < num_topk else jnp.arange(num_topk, dtype=jnp.int32)
        kept = jnp.where(wire.is_first, tokens + own, DROPPED)

        def keep(number: Any, below: Sequence[Array | None]) -> list[Array]:
            slots, sums = partials(half, number)
            row = jnp.full_like(kept, DROPPED, shape=half.num_slots)
            beyond = jnp.where(slots == DROPPED, half.num_slots, slots)
            to = _Send.to(row.at[beyond].set(kept, mode="drop")[:, None])
            return [
                wire.gather(rows, to, num_rows=num_tokens * width, onto=onto)
                for rows, onto in zip(sums, below, strict=True)
            ]

        return add_up(kept, _further_rounds(half, keep, keep(0, [None] * len(rowss))))

    return jax.lax.cond(wire.num_rounds == 1, at_once, one_by_one)


def _row_dots(wire: _Wire, rows: Array, dout: Array) -> list[Array]:
    """Sends tokens' rows of ``dout`` to where the experts' are, and brings products back."""
    plan = wire.operands.plan
    assert plan is not None

    def multiply(number: Any, before: list[Array]) -> list[Array]:
        slots = wire.slots(number)
        to = _Send.to(wire.tell(slots, plan.send_row, DROPPED))
        return [wire.hear(slots, wire.dots(rows, wire.send(slots, dout), to), *before)]

    zeros = jnp.zeros_like(plan.send_row, dtype=jnp.float32)
    return _further_rounds(wire, multiply, multiply(0, [zeros]))


def _further_rounds(wire: _Wire, step: Callable[[Any, T], T], first: T) -> T:
    """Takes what the first round gave through the others, of which there are none as a rule."""

    def body(state: tuple[Array, T]) -> tuple[Array, T]:
        number, carried = state
        return number + 1, step(number, carried)

    start = (jnp.ones_like(wire.num_rounds), first)
    return jax.lax.while_loop(lambda state: state[0] < wire.num_rounds, body, start)[1]
