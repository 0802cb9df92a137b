"""``load_metrics``: a plan in a few numbers for a training log."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Num

from jax_ep._axes import check_use, place
from jax_ep._checks import check_array, check_positive
from jax_ep._plan import Plan, check_plan
from jax_ep._types import DROPPED, AxisName


@jax.named_scope("jax_ep.load_metrics")
def load_metrics(
    plan: Plan, *, hidden: int, dtype: jax.typing.DTypeLike
) -> dict[str, Num[Array, ""]]:
    """Sums up how even a plan is, what it dropped and what its exchange moves.

    Local arithmetic: no communication, but called where the plan's axis is bound. The first two
    describe all ranks of that axis and are equal on them; the others describe this rank, so average
    or add them up as the log needs.

    Args:
      plan: made by ``make_plan``.
      hidden: width of the rows that the plan moves.
      dtype: their dtype.

    Returns:
      Scalars by name, float32 except for ``recv_rows``:

      * ``expert_load_max_over_mean``: choices asked of the busiest expert over the mean, before
        dropping; 0 when nothing was routed.
      * ``rank_load_max_over_mean``: likewise for the experts of each rank together.
      * ``dropped_fraction``: share of this rank's valid choices that got no row; 0 without any.
      * ``recv_rows``: int32, rows this rank receives, without padding.
      * ``logical_bytes``: what one ``dispatch`` sends from this rank if every kept choice counts.
      * ``wire_bytes``: what leaves this rank for another one, each token once per such rank.
        ``combine`` brings as many bytes back.
      * ``node_wire_bytes``: what leaves this rank's node, each token once per other node, if the
        plan was made with ``ranks_per_node``; with one rank a node, the same.

    Raises:
      TypeError: ``plan`` is not a ``Plan``, or ``hidden`` is not an int.
      ValueError: ``hidden`` is below 1, or the plan's axis is not bound to its ranks.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[0, 1], [0, 2]]), num_experts=4, capacity=3)
      >>> metrics = jax_ep.load_metrics(plan, hidden=8, dtype=jnp.bfloat16)
      >>> {name: float(value) for name, value in metrics.items()}
      {'expert_load_max_over_mean': 2.0, 'rank_load_max_over_mean': 1.0,
       'dropped_fraction': 0.25, 'recv_rows': 3.0, 'logical_bytes': 48.0, 'wire_bytes': 0.0,
       'node_wire_bytes': 0.0}
    """
    check_plan(plan)
    check_positive("hidden", hidden)
    check_use(plan)
    # Bytes in float32: they pass the largest int32 soon.
    row_bytes = float(hidden * jnp.dtype(dtype).itemsize)
    num_kept = jnp.sum(plan.kept, dtype=jnp.float32)
    num_dropped = plan.num_dropped.astype(jnp.float32)
    return {
        "expert_load_max_over_mean": max_over_mean(plan.expert_load),
        "rank_load_max_over_mean": max_over_mean(rank_load(plan.expert_load, plan.num_ranks)),
        "dropped_fraction": num_dropped / jnp.maximum(num_kept + num_dropped, 1),
        "recv_rows": jnp.sum(plan.recv_counts, dtype=jnp.int32),
        "logical_bytes": row_bytes * num_kept,
        "wire_bytes": row_bytes * _count_wire_rows(plan, 1),
        "node_wire_bytes": row_bytes * _count_wire_rows(plan, plan.ranks_per_node),
    }


def count_choices(
    topk_idx: Int32[Array, "num_tokens num_topk"], num_experts: int, *, axis_name: AxisName = None
) -> Int32[Array, "num_experts"]:
    """Counts how often each expert was chosen: ``expert_load`` where a plan is one of slots.

    Args:
      topk_idx: what the router chose. What is not in range does not count.
      num_experts: experts on all ranks together.
      axis_name: add up the tokens of all ranks along this axis or these axes; None for this
        rank's alone.

    Returns:
      Choices of each expert.

    Raises:
      TypeError: ``topk_idx`` is no array.
      ValueError: ``topk_idx`` is not ``[num_tokens, num_topk]``.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> jax_ep.count_choices(jnp.array([[0, 2], [2, -1]]), 3).tolist()
      [1, 0, 2]
    """
    check_array("topk_idx", topk_idx, "num_tokens, num_topk")
    experts = jnp.where(topk_idx < 0, num_experts, topk_idx).ravel()  # -1 would be the last one
    counts = jnp.zeros_like(experts, shape=num_experts).at[experts].add(1, mode="drop")
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


def max_over_mean(load: Num[Array, "owners"]) -> Num[Array, ""]:
    """Returns the largest load over the mean one in float32, or 0 without any load."""
    load = load.astype(jnp.float32)
    total = jnp.sum(load)
    return jnp.where(total > 0, jnp.max(load) * load.size / jnp.maximum(total, 1), 0.0)


def rank_load(expert_load: Num[Array, "num_experts"], num_ranks: int) -> Num[Array, "num_ranks"]:
    """Returns the load of each rank's experts together."""
    return jnp.sum(expert_load.reshape(num_ranks, -1), axis=1)


def _count_wire_rows(plan: Plan, together: int) -> Float32[Array, ""]:
    """Counts this rank's tokens once for each other place that has a kept choice of theirs.

    A place is so many ranks together, one after the other.
    """
    send_rank = plan._arrays.send_rank
    target = jnp.where(send_rank == DROPPED, DROPPED, send_rank // together)
    here = place(plan._layout).rank // together
    # Side by side in order, a place that a token goes to twice repeats its left neighbour.
    targets = jnp.sort(jnp.where(target == here, DROPPED, target), axis=1)
    repeats = jnp.pad(targets[:, 1:] == targets[:, :-1], ((0, 0), (1, 0)))
    return jnp.sum((targets != DROPPED) & ~repeats, dtype=jnp.int32).astype(jnp.float32)
