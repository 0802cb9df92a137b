"""A rank's choices, numbered among those of the same expert."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jax_ep._make_plan import make_plan
from jax_ep._types import Implementation


class Numbered(NamedTuple):
    """One rank's choices.

    Attributes:
      is_routed: whether a choice names an expert.
      expert: which it names, 0 where it names none.
      ordinal: how many choices of that expert come before it, by (token, k); anything where it
        names none.
      counts: how often the rank chooses each expert.
    """

    is_routed: Bool[Array, "num_tokens num_topk"]
    expert: Int32[Array, "num_tokens num_topk"]
    ordinal: Int32[Array, "num_tokens num_topk"]
    counts: Int32[Array, "num_experts"]


def number_choices(
    topk_idx: Int32[Array, "num_tokens num_topk"],
    num_experts: int,
    implementation: Implementation | None,
) -> Numbered:
    """Numbers a rank's choices: a plan of it alone lays them out in that order, and counts them."""
    plan = make_plan(
        topk_idx,
        num_experts=num_experts,
        capacity=max(1, topk_idx.size),
        implementation=implementation,
    )
    expert = jnp.where(plan.kept, topk_idx, 0)
    counts = plan.expert_load
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return Numbered(plan.kept, expert, plan._arrays.send_row - first[expert], counts)
