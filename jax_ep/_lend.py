"""Which rank lends which of its experts to which, so that none has more rows than its share."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jax_ep._compat import vary_together

# Parts that a whole share is counted in: integers add up alike on every machine.
_PARTS = 1024


class Loans(NamedTuple):
    """What each spare slot of each rank holds; those in use come first on every rank.

    Attributes:
      expert: the expert whose copy it holds, ``num_experts`` if none.
      rows: how many of that expert's choices go there.
      left: how many choices of each expert stay with its owner.
    """

    expert: Int32[Array, "num_ranks num_spares"]
    rows: Int32[Array, "num_ranks num_spares"]
    left: Int32[Array, "num_experts"]


def most_rows(
    expert_load: Int32[Array, "num_experts"],
    num_ranks: int,
    ranks_per_node: int,
    slack: float,
    share: Float32[Array, "num_ranks"] | None,
) -> Int32[Array, "num_ranks"]:
    """Returns what each rank may have at most: its share of all rows, or of its node's if more.

    All of it is exact, or rounded once as IEEE has it, so that ranks on machines of several kinds
    agree.
    """
    num_nodes = num_ranks // ranks_per_node
    by_node = jnp.sum(expert_load.reshape(num_nodes, -1), axis=1, dtype=jnp.int32)
    parts = jnp.full((num_nodes, ranks_per_node), _PARTS, jnp.int32)
    if share is not None:
        counted = jnp.clip(jnp.nan_to_num(share), 0, 2**10) * _PARTS
        parts = jnp.round(counted).astype(jnp.int32).reshape(parts.shape)
    of_all = _shares(jnp.sum(by_node, dtype=jnp.int32)[None], parts.reshape(1, -1))
    most = jnp.maximum(of_all.reshape(parts.shape), _shares(by_node, parts))
    more = jnp.floor(most.astype(jnp.float32) * jnp.float32(slack)).astype(jnp.int32)
    return (most + more).reshape(num_ranks)


def _shares(
    rows: Int32[Array, "pools"], parts: Int32[Array, "pools ranks"]
) -> Int32[Array, "pools ranks"]:
    """Deals out the rows of each pool by parts, rounded up; alike if all have none."""
    all_parts = jnp.sum(parts, axis=1, keepdims=True)
    parts = jnp.where(all_parts > 0, parts, 1)
    even = jnp.all(parts == parts[:, :1], axis=1)
    ratio = parts.astype(jnp.float32) / jnp.sum(parts, axis=1, keepdims=True).astype(jnp.float32)
    dealt = jnp.ceil(rows[:, None].astype(jnp.float32) * ratio).astype(jnp.int32)
    # Of many rows float32 loses some: whoever takes any takes them.
    takers = jnp.sum(parts > 0, axis=1)
    missing = jnp.maximum(rows - jnp.sum(dealt, axis=1, dtype=jnp.int32), 0)
    dealt += jnp.where(parts > 0, (-(-missing // takers))[:, None], 0)
    return jnp.where(even[:, None], (-(-rows // parts.shape[1]))[:, None], dealt)


def lend(
    expert_load: Int32[Array, "num_experts"],
    most: Int32[Array, "num_ranks"],
    *,
    num_spares: int,
    ranks_per_node: int,
) -> Loans:
    """Has ranks with too many rows lend experts to ranks of their node that have room.

    Again and again the rank with the most room borrows the largest expert of a rank with too many
    rows, and takes as much of it as it has room for: of the fullest whose expert fills it, or if
    none does, of the one whose expert is the largest. It takes no less if the lender has less than
    that too much: the lender then has room in turn. So whoever borrows an expert that is large
    enough is done, and if all are, every rank borrows once.

    Args:
      expert_load: choices of each expert, by all ranks together.
      most: what each rank may have.
      num_spares: experts that each rank can borrow.
      ranks_per_node: experts go to ranks of the owner's node alone; all ranks are one node if it
        is their number.

    Returns:
      The loans. What does not fit within ``num_spares`` stays with its owner.
    """
    num_ranks, num_experts = len(most), len(expert_load)
    nodes = (num_ranks // ranks_per_node, ranks_per_node)
    load = expert_load.reshape(*nodes, num_experts // num_ranks)
    expert, rows, left = jax.vmap(partial(_lend_in_node, num_spares))(load, most.reshape(nodes))
    first = jnp.arange(nodes[0], dtype=jnp.int32)[:, None, None] * load[0].size
    expert = jnp.where(rows > 0, expert + first, num_experts)
    spares = (num_ranks, num_spares)
    return Loans(expert.reshape(spares), rows.reshape(spares), left.reshape(num_experts))


def _lend_in_node(
    num_spares: int,
    load: Int32[Array, "ranks num_local_experts"],
    most: Int32[Array, "ranks"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_ranks, num_local_experts = load.shape
    unused = jnp.zeros((num_ranks, num_spares), jnp.int32)
    state = [load, jnp.sum(load, axis=1, dtype=jnp.int32), most, unused[:, 0], unused, unused]
    load, has, most, num_used, expert, rows = vary_together(state)

    def step(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, has, num_used, expert, rows = state
        over, largest = has - most, jnp.max(left, axis=1)
        room = jnp.where(num_used < num_spares, -over, 0)
        taker = jnp.argmax(room)
        fills = (over > 0) & (largest >= room[taker])
        most_over = jnp.argmax(jnp.where(fills, over, 0))
        lender = jnp.argmax(jnp.where(over > 0, largest, 0))
        lender = jnp.where(jnp.any(fills), most_over, lender)
        which = jnp.argmax(left[lender])
        taken = jnp.minimum(left[lender, which], room[taker])
        taken = jnp.where(over[lender] > 0, jnp.maximum(taken, 0), 0)
        slot = taker, jnp.minimum(num_used[taker], num_spares - 1)
        lent = (lender * num_local_experts + which).astype(jnp.int32)
        return (
            left.at[lender, which].add(-taken),
            has.at[lender].add(-taken).at[taker].add(taken),
            num_used.at[taker].add((taken > 0).astype(jnp.int32)),
            expert.at[slot].set(jnp.where(taken > 0, lent, expert[slot])),
            rows.at[slot].set(jnp.where(taken > 0, taken, rows[slot])),
        )

    steps = num_ranks * num_spares
    left, _, _, expert, rows = jax.lax.fori_loop(
        0, steps, step, (load, has, num_used, expert, rows)
    )
    return expert, rows, left
