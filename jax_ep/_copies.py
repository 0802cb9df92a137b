"""The plan by which lent experts come to who borrows them: all ranks know it, so none asks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_ep._axes import place
from jax_ep._layout import Layout
from jax_ep._lend import Loans
from jax_ep._make_plan import assemble, lay_out
from jax_ep._plan import Plan, PlanArrays
from jax_ep._types import DROPPED, AxisName, Implementation


def plan_copies(
    loans: Loans,
    *,
    axis_name: AxisName,
    ranks_together: int,
    ranks_per_node: int,
    implementation: Implementation | None,
) -> Plan:
    """Returns the plan in which experts are the tokens, and spare slots the experts.

    A token's ``k``-th choice is the slot, if any, of the ``k``-th rank of its node: no rank borrows
    an expert twice. It is what ``make_plan`` would return, without a word between ranks.

    Args:
      loans: equal on all ranks.
      axis_name: as for ``make_plan``.
      ranks_together: to how many ranks, one after the other, experts are lent among themselves.
      ranks_per_node: as for ``make_plan``.
      implementation: likewise.

    Raises:
      NotImplementedError: as ``make_plan``.
    """
    num_ranks, num_spares = loans.expert.shape
    layout, binding = lay_out(
        (len(loans.left) // num_ranks, ranks_together),
        num_experts=num_ranks * num_spares,
        axis_name=axis_name,
        capacity=num_spares,
        ranks_per_node=ranks_per_node,
        implementation=implementation,
    )
    arrays = _arrays(layout, loans, place(layout).rank)
    return assemble(layout, binding, jnp.zeros_like(arrays.num_dropped), arrays)


def _arrays(layout: Layout, loans: Loans, rank: Int32[Array, ""]) -> PlanArrays:
    num_local, together = layout.num_tokens, layout.num_topk
    num_experts, num_spares = layout.num_ranks * num_local, layout.capacity
    first = rank // together * together
    slot = jnp.arange(num_spares, dtype=jnp.int32)

    # What is lent from here: each spare slot of the node that has an expert of this rank.
    lent = jax.lax.dynamic_slice_in_dim(loans.expert, first, together) - rank * num_local
    token = jnp.where((lent >= 0) & (lent < num_local), lent, num_local)
    taker = jnp.arange(together, dtype=jnp.int32)[:, None]
    nowhere = jnp.full_like(loans.expert, DROPPED, shape=(num_local, together))
    send_row = nowhere.at[token, taker].set(jnp.broadcast_to(slot, token.shape), mode="drop")
    send_rank = jnp.where(send_row == DROPPED, DROPPED, first + taker[:, 0])

    # What is borrowed here, by whose it is: a row for each slot, and those in use come first.
    borrowed = loans.expert[rank]
    is_used = borrowed < num_experts
    owner = jnp.where(is_used, borrowed // num_local, layout.num_ranks)
    order = jnp.argsort(borrowed, stable=True).astype(jnp.int32)
    choice = borrowed * together + (rank - first)
    used = is_used.astype(jnp.int32)
    counts = jnp.zeros_like(used, shape=layout.num_ranks).at[owner].add(1, mode="drop")
    return PlanArrays(
        group_sizes=used,
        kept=send_row != DROPPED,
        expert_load=(loans.rows > 0).astype(jnp.int32).ravel(),
        recv_counts=counts,
        num_dropped=jnp.zeros_like(rank),
        send_rank=send_rank,
        send_row=send_row,
        recv_choice=choice[order],
        recv_row=order,
        group_rows=used,
        fingerprint=_print_of(loans),
    )


def _print_of(loans: Loans) -> jax.Array:
    """Tells loans apart, so that ranks whose plans are not of the same step find out."""
    place = jnp.arange(1, loans.expert.size + 1, dtype=jnp.uint32)
    mixed = (loans.expert.ravel().astype(jnp.uint32) + 1) * place * jnp.uint32(2654435761)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
