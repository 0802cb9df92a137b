"""Which slot each choice goes to, where experts are lent: its expert's own, or that of a copy."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_ep._lend import Loans
from jax_ep._numbered import Numbered
from jax_ep._types import DROPPED


class _Places(NamedTuple):
    """Where choices can go: each expert's own place first, then the spare slots, [places]."""

    expert: Int32[Array, "places"]
    rank: Int32[Array, "places"]
    slot: Int32[Array, "places"]


def slots_of(
    choices: Numbered,
    counts: Int32[Array, "num_ranks num_experts"],
    rank: Int32[Array, ""],
    loans: Loans,
) -> Int32[Array, "num_tokens num_topk"]:
    """Returns the slot of each of a rank's choices, as ``balance`` documents it.

    Args:
      choices: the rank's.
      counts: how often each rank asks each expert.
      rank: which rank this is.
      loans: equal on all ranks.

    Returns:
      Slots; anything for a choice that names no expert.
    """
    places = _lay_out(counts, loans)
    takes = jnp.zeros_like(counts)
    num_experts = counts.shape[1]
    # No rank borrows an expert twice, so rank and expert tell a place.
    rows = jnp.concatenate([loans.left, loans.rows.ravel()])
    takes = takes.at[places.rank, places.expert].set(rows, mode="drop")
    stays = jnp.minimum(counts, takes)

    here = jnp.where(places.rank == rank, places.expert, num_experts)
    slot_here = jnp.full_like(counts, DROPPED, shape=num_experts)
    slot_here = slot_here.at[here].set(places.slot, mode="drop")

    # What does not stay, and what room there is for it, by expert, and then by rank and by place.
    leaves, room = counts - stays, takes - stays
    earlier = (jnp.arange(len(counts), dtype=jnp.int32) < rank)[:, None]
    before = jnp.sum(jnp.where(earlier, leaves, 0), axis=0, dtype=jnp.int32)
    leaving = jnp.sum(leaves, axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(leaving, dtype=jnp.int32) - leaving + before
    order = jnp.argsort(places.expert, stable=True)
    rooms = room.at[places.rank, places.expert].get(mode="fill", fill_value=0)
    ends = jnp.cumsum(rooms[order], dtype=jnp.int32)

    over = choices.ordinal - stays[rank, choices.expert]
    place = jnp.searchsorted(ends, starts[choices.expert] + over, side="right")
    slot_there = places.slot[order[place]]
    return jnp.where(over < 0, slot_here[choices.expert], slot_there)


def _lay_out(counts: Int32[Array, "num_ranks num_experts"], loans: Loans) -> _Places:
    num_ranks, num_experts = counts.shape
    num_local_experts, num_spares = num_experts // num_ranks, loans.expert.shape[1]
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    owner, ranks = experts // num_local_experts, jnp.arange(num_ranks, dtype=jnp.int32)
    num_local_slots = num_local_experts + num_spares
    own = owner * num_local_slots + experts % num_local_experts
    spare = jnp.arange(num_local_experts, num_local_slots, dtype=jnp.int32)
    spare = ranks[:, None] * num_local_slots + spare
    return _Places(
        expert=jnp.concatenate([experts, loans.expert.ravel()]),
        rank=jnp.concatenate([owner, jnp.repeat(ranks, num_spares)]),
        slot=jnp.concatenate([own, spare.ravel()]),
    )
