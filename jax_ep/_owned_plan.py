"""The plan of many ranks, without any of them seeing all choices: the same bits as from all.

A rank *owns* the decisions about its rows. Others ask it for rows by telling how many choices they
have for each of its experts; if that is more than it has, it finds out with them which one is the
first in the order (k, token, source rank) that it drops; and it tells where the rows of each source
begin. A source then numbers its own choices, and tells the owner of each where it has its row. So
what a rank does, sends and holds does not grow with the choices of all, but with its own.
"""

import dataclasses
import math
import zlib
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from jax_ep._call import Call, Operands, all_gather
from jax_ep._compat import result_type
from jax_ep._layout import Layout, fullest_of
from jax_ep._library import register_handlers
from jax_ep._plan import PlanArrays
from jax_ep._types import DROPPED
from jax_ep._xla import swap_slices

FROM_CHOICES = 2**21
"""From how many choices of all ranks on it takes less time than to gather and read them all.

On CPUs to read so many takes a rank 10 ms, and the collectives that there are more as long.
"""

_BLOCK = 64
"""Tokens that are told of together where a rank looks for the first choice that it drops."""

_KEEP_ALL = np.iinfo(np.int32).max
_PAIRS_ROOM = 1.25

_SIZES = ("num_experts", "num_ranks", "num_tokens", "num_topk")
_TOLD = ("rank", "topk_idx", "cutoffs")

COUNT: Final = "jax_ep_count_choices"
PLACE: Final = "jax_ep_place_choices"
SIGNATURES: Final = {
    COUNT: {
        "operands": [*_TOLD],
        "results": ["kept", "asked_by_k", "fingerprint"],
        "attributes": sorted(_SIZES),
    },
    PLACE: {
        "operands": [*_TOLD, "first_rows"],
        "results": ["kept", "send_rank", "send_row", "place", "num_dropped"],
        "attributes": sorted(_SIZES),
    },
}
"""What the library for CPUs should say of its handlers."""


class _Counts(NamedTuple):
    """What a source counts of its choices: see ``ffi/cpu/own_choices.h``."""

    kept: Int32[Array, "num_ranks num_local_experts"]
    asked_by_k: Int32[Array, "num_ranks num_topk"]
    fingerprint: UInt32[Array, ""]


class _Placed(NamedTuple):
    kept: Bool[Array, "num_tokens num_topk"]
    send_rank: Int32[Array, "num_tokens num_topk"]
    send_row: Int32[Array, "num_tokens num_topk"]
    place: Int32[Array, "num_tokens num_topk"]
    num_dropped: Int32[Array, ""]


def plan(call: Call, operands: Operands) -> list[Array]:
    """Makes this rank's plan, together with the others."""
    layout = call.layout
    [topk_idx] = operands.payloads
    own = _Own(layout, operands.where.rank, topk_idx)
    local = layout.num_local_experts
    unlimited = jnp.full_like(topk_idx, _KEEP_ALL, shape=layout.num_ranks)
    mine = own.count(unlimited)
    heard = swap_slices(layout, jnp.concatenate([mine.kept, mine.asked_by_k], axis=1))
    asked, asked_by_k = heard[:, :local], heard[:, local:]
    print_ = jax.lax.bitcast_convert_type(mine.fingerprint, jnp.int32)
    most = jnp.max(jnp.sum(asked, axis=1, dtype=jnp.int32))
    told = jnp.append(jnp.sum(asked, axis=0, dtype=jnp.int32), jnp.stack([most, print_]))
    told = all_gather(call, told)
    load, prints = told[:, :local], jax.lax.bitcast_convert_type(told[:, -1], jnp.uint32)

    def cut() -> tuple[Array, Array]:
        cutoffs = _find_cutoffs(call, own, jnp.sum(asked_by_k, axis=0, dtype=jnp.int32))
        return cutoffs, swap_slices(layout, own.count(cutoffs).kept)

    is_too_much = jnp.any(jnp.sum(load, axis=1) > layout.budget)
    cutoffs, kept = jax.lax.cond(is_too_much, cut, lambda: (unlimited, asked))
    group_rows = jnp.sum(kept, axis=0, dtype=jnp.int32)
    group_sizes = -(-group_rows // layout.alignment) * layout.alignment
    first = _before(group_sizes) + _before(kept)
    placed = own.place(cutoffs, swap_slices(layout, first).reshape(-1))
    recv_counts = jnp.sum(kept, axis=1, dtype=jnp.int32)
    recv_choice, recv_row = _tell_receivers(layout, placed, recv_counts, jnp.max(told[:, local]))
    arrays = PlanArrays(
        group_sizes=group_sizes,
        kept=placed.kept,
        expert_load=load.reshape(-1),
        recv_counts=recv_counts,
        num_dropped=placed.num_dropped,
        send_rank=placed.send_rank,
        send_row=placed.send_row,
        recv_choice=recv_choice,
        recv_row=recv_row,
        group_rows=group_rows,
        fingerprint=jnp.sum(prints, dtype=jnp.uint32) ^ _print_of(layout),
    )
    return list(arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class _Own:
    """This rank's choices, which native code reads."""

    layout: Layout
    rank: Int32[Array, ""]
    topk_idx: Int32[Array, "num_tokens num_topk"]

    def count(self, cutoffs: Int32[Array, "num_ranks"]) -> _Counts:
        """Counts choices for each expert, those before their rank's cutoff, and others."""
        layout = self.layout
        types = [
            ((layout.num_ranks, layout.num_local_experts), jnp.int32),
            ((layout.num_ranks, layout.num_topk), jnp.int32),
            ((), jnp.uint32),
        ]
        return _Counts(*self._invoke(COUNT, types, cutoffs))

    def place(
        self, cutoffs: Int32[Array, "num_ranks"], first_rows: Int32[Array, "num_experts"]
    ) -> _Placed:
        """Gives choices their rows, one after the other from the first of their expert on."""
        shape = self.topk_idx.shape
        types = [(shape, jnp.bool_), *[(shape, jnp.int32)] * 3, ((), jnp.int32)]
        return _Placed(*self._invoke(PLACE, types, cutoffs, first_rows))

    def _invoke(self, target: str, types: Any, *more: Array) -> list[Array]:
        register_handlers("cpu")
        results = [result_type(shape, dtype, self.topk_idx) for shape, dtype in types]
        sizes = {name: np.int64(getattr(self.layout, name)) for name in _SIZES}
        return list(jax.ffi.ffi_call(target, results)(self.rank, self.topk_idx, *more, **sizes))


def _find_cutoffs(
    call: Call, own: _Own, asked_by_k: Int32[Array, "num_topk"]
) -> Int32[Array, "num_ranks"]:
    """Finds, for each rank, the place of the first choice that it drops.

    Three times an owner asks the sources for a finer count of what it is asked for: first it knows
    at which k its rows run out, then in which block of tokens, then at which token of which source.
    """
    layout = call.layout
    num_tokens, num_ranks = layout.num_tokens, layout.num_ranks
    k, left = _where_it_ends(asked_by_k, jnp.full_like(own.rank, layout.budget))
    is_at_k = _chosen(own, all_gather(call, k))  # [T, K], of this rank's choices
    rank = jnp.where(is_at_k, own.topk_idx // layout.num_local_experts, num_ranks)
    token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], rank.shape)
    counts = jnp.zeros_like(own.topk_idx, shape=(num_ranks, -(-num_tokens // _BLOCK)))
    counts = counts.at[rank, token // _BLOCK].add(1, mode="drop")
    counts = jnp.sum(swap_slices(layout, counts), axis=0, dtype=jnp.int32)
    block, left = _where_it_ends(counts, left)
    is_there = jnp.append(all_gather(call, block), -1)[rank] == token // _BLOCK
    flags = jnp.zeros_like(own.topk_idx, shape=(num_ranks, _BLOCK), dtype=jnp.bool_)
    flags = flags.at[jnp.where(is_there, rank, num_ranks), token % _BLOCK].set(True, mode="drop")
    bits = swap_slices(layout, jnp.packbits(flags, axis=1))
    ordered = jnp.unpackbits(bits, axis=1).T.reshape(-1)  # by (token, source)
    last, _ = _where_it_ends(ordered.astype(jnp.int32), left)
    token = block * _BLOCK + last // num_ranks
    cutoff = (k * num_tokens + token) * num_ranks + last % num_ranks
    is_enough = jnp.sum(asked_by_k) <= layout.budget
    return all_gather(call, jnp.where(is_enough, _KEEP_ALL, cutoff))


def _chosen(own: _Own, k_of_rank: Int32[Array, "num_ranks"]) -> Bool[Array, "num_tokens num_topk"]:
    """Tells which choices stand at the k that their rank asks about."""
    is_routed = own.topk_idx != DROPPED
    k = k_of_rank[jnp.where(is_routed, own.topk_idx, 0) // own.layout.num_local_experts]
    return is_routed & (k == jnp.arange(own.layout.num_topk, dtype=jnp.int32))


def _where_it_ends(counts: Int32[Array, "n"], most: Array) -> tuple[Array, Array]:
    """Returns at which of some counts their sum passes a number, and what is left before that."""
    sums = jnp.cumsum(counts, dtype=jnp.int32)
    at = jnp.sum(sums <= most, dtype=jnp.int32)
    before = jnp.where(at > 0, sums[jnp.maximum(at - 1, 0)], 0)
    return at, most - before


def _tell_receivers(
    layout: Layout, placed: _Placed, recv_counts: Array, fullest: Array
) -> tuple[Int32[Array, "capacity"], Int32[Array, "capacity"]]:
    """Has each source tell a rank which of its choices it receives, and in which rows."""
    num_ranks, room = layout.num_ranks, _room_of(layout)
    choices = jnp.arange(placed.place.size, dtype=jnp.int32).reshape(placed.place.shape)
    words = jnp.stack([choices, placed.send_row], axis=2)
    first_entry = _before(recv_counts)
    source = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]

    def tell(number: Any, lists: Array) -> Array:
        place = placed.place - number * room
        is_there = (placed.place != DROPPED) & (place >= 0) & (place < room)
        at = jnp.where(is_there, placed.send_rank * room + place, num_ranks * room)
        wire = jnp.zeros_like(words, shape=(num_ranks * room, 2)).at[at].set(words, mode="drop")
        came = swap_slices(layout, wire.reshape(num_ranks, room, 2))
        came = came.at[:, :, 0].add(source * placed.place.size)
        entry = number * room + jnp.arange(room, dtype=jnp.int32)
        is_used = entry < recv_counts[:, None]
        to = jnp.where(is_used, first_entry[:, None] + entry, layout.capacity)
        return lists.at[to].set(came, mode="drop")

    lists = tell(0, jnp.zeros_like(words, shape=(layout.capacity, 2)))
    rounds = (fullest + room - 1) // room
    start = (jnp.ones_like(rounds), lists)
    lists = jax.lax.while_loop(
        lambda state: state[0] < rounds,
        lambda state: (state[0] + 1, tell(*state)),
        start,
    )[1]
    return lists[:, 0], lists[:, 1]


def _room_of(layout: Layout) -> int:
    """Returns how many of a rank's choices it can tell each rank of in one round."""
    choices, num_ranks = layout.num_tokens * layout.num_topk, layout.num_ranks
    by_chance = fullest_of(choices, 1 / num_ranks, num_ranks**2)
    wanted = max(by_chance, _PAIRS_ROOM * choices / num_ranks)
    return max(1, min(math.ceil(wanted), choices))


def _print_of(layout: Layout) -> np.uint32:
    """Tells plans of the same choices apart that lay them out differently."""
    return np.uint32(zlib.crc32(repr((layout.capacity, layout.alignment)).encode()))


def _before(counts: Array) -> Array:
    """Adds up what stands before each, along the leading axis."""
    return jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
