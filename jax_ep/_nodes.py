"""Rounds on two levels: what comes to a node comes to one of its ranks, and is spread there.

That rank stands on its node where the sender stands on its own. The node's ranks then exchange
among themselves, by a fabric that they can use, what has come to each of them: to this exchange the
slots of a rank are its tokens. On the way back it adds up what the node has of a token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_ep._axes import Place
from jax_ep._call import Call, Operands, all_gather
from jax_ep._layout import Layout
from jax_ep._local import Send
from jax_ep._ops import GATHER_ROWS, GATHER_SCALED, REDUCE_ROWS, REDUCE_SCALED, ROW_DOTS, Op
from jax_ep._plan import PlanArrays, array_types, is_received
from jax_ep._receivers import Pieces, Received, Sent
from jax_ep._types import DROPPED
from jax_ep._wire import Wire
from jax_ep._xla import from_bits, to_bits

Carrier: TypeAlias = Callable[[Call, Operands], list[Array]]
"""What carries an exchange: a fabric."""


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A receiver that is one of the ranks of a node.

    Attributes:
      carry: carries exchanges within nodes.
      call: such an exchange, of as many tokens as a rank has.
      where: this rank among those of its node.
      plan: this rank's.
      send: where its choices have their rows, by the rank's place on its node.
      received: what it receives; a peer is the node that sends.
      source: to which place on the node each entry comes.
    """

    carry: Carrier
    call: Call
    where: Place
    plan: PlanArrays
    send: Send
    received: Received
    source: Int32[Array, "capacity"]

    @classmethod
    def of(cls, carry: Carrier, call: Call, operands: Operands) -> "Node":
        """Finds the places of what comes to the node.

        Args:
          carry: carries exchanges within nodes.
          call: the exchange within nodes, ``Call.within_nodes`` of the one at hand.
          operands: those of the exchange at hand.
        """
        plan, where = operands.plan, operands.where
        assert plan is not None
        inner, num_nodes = call.layout, call.num_parts
        per_node, num_topk = inner.num_ranks, inner.num_topk
        token = plan.recv_choice // num_topk
        source = jnp.clip(token // inner.num_tokens, 0, per_node * num_nodes - 1)
        token = token % inner.num_tokens
        # Else one rank alone would meet with an error, and not come to the next collective.
        is_sound = (plan.recv_choice >= 0) & (plan.recv_choice < num_nodes * inner.num_choices)
        is_sound &= (plan.recv_row >= 0) & (plan.recv_row < inner.capacity)
        exists = is_received(inner, plan) & is_sound
        places = _places_in_node(call, source, token, exists)
        return cls(
            carry=carry,
            call=call,
            where=Place(where.rank % per_node, where.group * num_nodes + where.rank // per_node),
            plan=plan,
            send=Send(
                jnp.where(plan.send_row == DROPPED, DROPPED, plan.send_rank % per_node),
                plan.send_row,
            ),
            received=Received(
                source // per_node,
                places[source, token],
                plan.recv_choice % num_topk,
                plan.recv_row,
                exists,
            ),
            source=source % per_node,
        )

    def gather(
        self,
        wire: Wire,
        number: Any,
        tokens: Sequence[Sent],
        weights: Array | None,
    ) -> list[Array]:
        """Has each rank take its tokens from where they have come to."""
        op = GATHER_ROWS if weights is None else GATHER_SCALED
        told = [] if weights is None else wire.tell(number, weights)
        payloads = [*(_joined(x.pieces, x.dtype) for x in tokens), *told]
        rows = self._run(wire, number, op, payloads)
        slot, it = self.received.slots(wire, number), self.received
        at = jnp.where(slot == DROPPED, wire.layout.capacity, it.row)
        is_new = jnp.zeros_like(it.exists).at[at].set(True, mode="drop")[:, None]
        return [
            new
            if x.onto is None
            else from_bits(jnp.where(is_new, to_bits(new), to_bits(x.onto)), x.dtype)
            for new, x in zip(rows, tokens, strict=True)
        ]

    def partial_sums(
        self, wire: Wire, number: Any, rowss: Sequence[Array], weights: Array | None
    ) -> list[list[Array]]:
        """Adds up each token's rows on each rank, and these sums in the order of ranks."""
        op = REDUCE_ROWS if weights is None else REDUCE_SCALED
        told = wire.tell(number, *self.send, *([] if weights is None else [weights]))
        sums = self._run(wire, number, op, [*rowss, *told[2:]], Send(*told[:2]))
        return [_parted(s, wire.num_pieces) for s in sums]

    def dots(self, wire: Wire, number: Any, rows: Array, sent: Pieces) -> Array:
        """Multiplies rows with the tokens that have come to the node."""
        send = Send(*wire.tell(number, *self.send))
        payloads = [rows, _joined(sent, rows.dtype)]
        [dots] = self._run(wire, number, ROW_DOTS, payloads, send)
        return dots

    def _run(
        self,
        wire: Wire,
        number: Any,
        op: Op,
        payloads: Sequence[Array],
        send: Send | None = None,
    ) -> list[Array]:
        """Runs an op within the node; tokens go nowhere if nobody asks where they go."""
        inner = self.call.layout
        tail = inner.tail if wire.start == 0 else "uninitialized"
        layout = dataclasses.replace(inner, num_tokens=wire.num_slots, tail=tail)
        call = dataclasses.replace(self.call, op=op, layout=layout)
        plan = _nothing(layout, self.plan)._replace(**self._receives(wire, number))
        if send is not None:
            plan = plan._replace(**send._asdict())
        return self.carry(call, Operands(self.where, plan, tuple(payloads)))

    def _receives(self, wire: Wire, number: Any) -> dict[str, Array]:
        """Lists what this rank takes from the node in a round, by the rank where it has come to."""
        inner, it = self.call.layout, self.received
        slot = it.slots(wire, number)
        is_there = slot != DROPPED
        counts = jnp.zeros_like(slot, shape=(self.call.num_parts, inner.num_ranks))
        counts = counts.at[it.peer, self.source].add(is_there.astype(jnp.int32))
        # Entries are in the order of all ranks: node by node.
        before = jnp.cumsum(counts, dtype=jnp.int32).reshape(counts.shape) - counts
        start = jnp.cumsum(counts.T, dtype=jnp.int32).reshape(counts.T.shape).T - counts
        ordinal = jnp.cumsum(is_there, dtype=jnp.int32) - 1
        index = ordinal + (start - before)[it.peer, self.source]
        index = jnp.where(is_there, index, inner.capacity)

        def listed(values: Array) -> Array:
            return jnp.full_like(values, DROPPED).at[index].set(values, mode="drop")

        token = self.source * wire.num_slots + slot
        return {
            "recv_counts": jnp.sum(counts, axis=0, dtype=jnp.int32),
            "recv_choice": listed(token * inner.num_topk + it.k),
            "recv_row": listed(it.row),
            "group_sizes": self.plan.group_sizes,
            "group_rows": self.plan.group_rows,
        }


def _places_in_node(
    call: Call, source: Array, token: Array, exists: Array
) -> Int32[Array, "num_ranks num_tokens"]:
    """Numbers each rank's tokens among those that come to this node: its ranks tell each other."""
    inner = call.layout
    num_ranks = inner.num_ranks * call.num_parts
    padded = -(-inner.num_tokens // 8) * 8
    comes = jnp.zeros_like(exists, shape=(num_ranks, padded))
    comes = comes.at[jnp.where(exists, source, num_ranks), token].set(True, mode="drop")
    bits = jnp.packbits(comes, axis=1)
    bits = jnp.bitwise_or.reduce(all_gather(call, bits), axis=0)
    comes = jnp.unpackbits(bits, axis=1)
    return jnp.cumsum(comes, axis=1, dtype=jnp.int32) - 1


def _nothing(layout: Layout, like: PlanArrays) -> PlanArrays:
    """Returns a plan in which nothing is sent, by ranks that have made another one together."""
    none = {
        name: jnp.zeros_like(like.fingerprint, shape=shape, dtype=dtype)
        for name, (shape, dtype) in zip(PlanArrays._fields, array_types(layout), strict=True)
    }
    nowhere = {name: none[name] + DROPPED for name in ("send_rank", "send_row")}
    return PlanArrays(**none | nowhere | {"fingerprint": like.fingerprint})


def _joined(pieces: Pieces, dtype: Any) -> Array:
    """Joins pieces of the wire, which are in the order of slots."""
    whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
    return from_bits(whole, dtype)


def _parted(rows: Array, num_pieces: int) -> list[Array]:
    """Parts rows for the wire."""
    return [to_bits(piece) for piece in jnp.split(rows, num_pieces)]
