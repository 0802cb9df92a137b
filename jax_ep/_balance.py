"""``balance``: choices go to copies of busy experts, so that no rank has more than its share."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Num, PyTree

from jax_ep._axes import rank_along, resolve_ranks
from jax_ep._checks import (
    check_array,
    check_dtype,
    check_leading_axis,
    check_positive,
    check_shape,
)
from jax_ep._copies import plan_copies
from jax_ep._dispatch import dispatch
from jax_ep._lend import lend, most_rows
from jax_ep._lent_slots import slots_of
from jax_ep._numbered import number_choices
from jax_ep._plan import Plan, check_plan
from jax_ep._types import DROPPED, AxisName, Implementation


class Balance(NamedTuple):
    """What ``moe`` passes on to ``balance``; see there.

    Attributes:
      num_spares: experts that each rank can borrow.
      slack: how much more than its share a rank may have.
      share: how much of the mean each rank takes.
    """

    num_spares: int = 2
    slack: float = 0.0
    share: Float32[Array, "num_ranks"] | None = None


@jax.named_scope("jax_ep.balance")
def balance(
    topk_idx: Int32[Array, "num_tokens num_topk"],
    *,
    num_experts: int,
    axis_name: AxisName = None,
    num_spares: int = 2,
    slack: float = 0.0,
    share: Float32[Array, "num_ranks"] | None = None,
    ranks_per_node: int = 1,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "num_tokens num_topk"], Plan]:
    """Spreads choices over copies of busy experts, so that all ranks have as much to do.

    Called by all ranks of the axis, which tell each other how often they ask each expert. From that
    alone it follows which rank borrows which expert for this step, and which choices go to the
    copy. Each rank has ``S = L + num_spares`` slots: slot ``r * S + j`` is expert ``r * L + j`` for
    ``j < L``, and after those come the experts that rank ``r`` borrows. So ::

        slots, copies = balance(topk_idx, num_experts=E, axis_name="expert")
        weights = with_copies(weights, copies)
        plan = make_plan(slots, num_experts=E + R * num_spares, axis_name="expert", capacity=T * K)

    computes what the experts would without, and its gradients, while the busiest rank has no more
    rows than the mean, as a rule: where an overfull rank has nothing but many small experts,
    ``num_spares`` may not do. What is left over stays with its owner, and counts in the plan's
    ``num_dropped`` if there is no room for it.

    Of each expert's choices, ordered by (source rank, token, k), a rank's own are the first to go
    to that rank, if it has the expert or a copy; the others fill the owner and then the copies, in
    the order of their slots.

    Args:
      topk_idx: the global expert of each choice, or ``DROPPED``, as for ``make_plan``.
      num_experts: experts on all ranks together, a multiple of the number of ranks.
      axis_name: the axis the ranks lie along, as for ``make_plan``.
      num_spares: experts that each rank can borrow, the same on all ranks.
      slack: how much more than its share a rank may have: 0.1 for a tenth. The more, the fewer
        experts are borrowed. A static number, the same on all ranks.
      share: how much of the mean load each rank takes, in proportion to the others: 0.7 for a slow
        one, 0 for one that is to compute nothing. Values from 0 to 1024 count in 1024ths, and are
        the same on all ranks; others count as the nearer of these. They are data: another value
        compiles nothing. None for ranks that take all the same.
      ranks_per_node: with more than 1, as for ``make_plan``, experts are lent to ranks of the same
        node alone: a node's ranks have the same share, but not each node.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves.

    Returns:
      The slot of each choice, for ``make_plan`` in place of ``topk_idx``, ``DROPPED`` where that
      is, and out of range where that is; and the plan by which experts come to who borrows them,
      for ``with_copies``.

    Raises:
      TypeError: an array has another dtype than asked for, a count is no int, or ``slack`` no
        number.
      ValueError: ``topk_idx`` or ``share`` has another shape; ``slack`` is negative or not finite;
        or ``make_plan`` refuses an argument.
      NotImplementedError: ``implementation="native"`` where native code cannot serve. On GPUs it
        serves up to 64 ranks, or that many in a node.

    Example:
      >>> import jax, jax.numpy as jnp, jax_ep
      >>> topk_idx = jnp.array([[[0], [0]], [[0], [0]]])  # two ranks ask expert 0 of 2
      >>> balance = lambda idx: jax_ep.balance(
      ...     idx, num_experts=2, axis_name="expert", num_spares=1
      ... )[0]
      >>> jax.vmap(balance, axis_name="expert")(topk_idx)[..., 0].tolist()
      [[0, 0], [3, 3]]
    """
    check_array("topk_idx", topk_idx, "num_tokens, num_topk")
    check_dtype("topk_idx", topk_idx, jnp.int32)
    check_positive("num_spares", num_spares)
    check_slack(slack)
    _, num_ranks = resolve_ranks(axis_name, num_experts, ranks_per_node)
    ranks_together = ranks_per_node if ranks_per_node > 1 else num_ranks
    if share is not None:
        _check_share(share, num_ranks)
    choices = number_choices(topk_idx, num_experts, implementation)
    counts = choices.counts[None]
    if axis_name is not None:
        counts = jax.lax.all_gather(choices.counts, axis_name)
    load = jnp.sum(counts, axis=0, dtype=jnp.int32)
    most = most_rows(load, num_ranks, ranks_together, slack, share)
    loans = lend(load, most, num_spares=num_spares, ranks_per_node=ranks_together)
    slots = slots_of(choices, counts, rank_along(axis_name), loans)
    # What names no expert must name no slot either.
    none = jnp.where(topk_idx == DROPPED, DROPPED, num_experts + num_ranks * num_spares)
    copies = plan_copies(
        loans,
        axis_name=axis_name,
        ranks_together=ranks_together,
        ranks_per_node=ranks_per_node,
        implementation=implementation,
    )
    return jnp.where(choices.is_routed, slots, none), copies


@jax.named_scope("jax_ep.with_copies")
def with_copies(
    weights: PyTree[Num[Array, "num_local_experts ..."]], copies: Plan
) -> PyTree[Num[Array, "num_slots ..."]]:
    """Appends the experts that this rank borrows to its own.

    Entry ``j`` of the result belongs to this rank's slot ``j`` of ``balance``. Communicates along
    the axis, once for all of ``weights``. Its gradient brings what the copies get back to the
    experts' owners, and adds it up there as ``combine`` does.

    Args:
      weights: this rank's experts' parameters, or a pytree of such arrays.
      copies: what ``balance`` returned besides the slots.

    Returns:
      ``weights`` with ``num_spares`` entries more, zero where nothing is borrowed.

    Raises:
      TypeError: ``weights`` holds something else than arrays, or ``copies`` is not a ``Plan``.
      ValueError: ``weights`` holds an array whose first axis is not ``num_local_experts``.

    Example:
      >>> import jax, jax.numpy as jnp, jax_ep
      >>> def both(topk_idx, weights):
      ...     slots, copies = jax_ep.balance(
      ...         topk_idx, num_experts=2, axis_name="expert", num_spares=1
      ...     )
      ...     return jax_ep.with_copies(weights, copies)
      >>> topk_idx = jnp.array([[[0], [0]], [[0], [0]]])
      >>> weights = jnp.array([[10.0], [20.0]])
      >>> jax.vmap(both, axis_name="expert")(topk_idx, weights).tolist()
      [[10.0, 0.0], [20.0, 10.0]]
    """
    check_plan(copies, "copies")
    for path, leaf in jax.tree.leaves_with_path(weights):
        name = f"weights{jax.tree_util.keystr(path)}"
        check_leading_axis(name, leaf, copies.num_tokens, "num_local_experts")
    borrowed = dispatch(weights, copies)
    return jax.tree.map(lambda mine, more: jnp.concatenate([mine, more]), weights, borrowed)


def check_slack(slack: float) -> None:
    """Checks a slack.

    Raises:
      TypeError: it is no number.
      ValueError: it is negative or not finite.
    """
    if isinstance(slack, bool) or not isinstance(slack, int | float):
        raise TypeError(f"slack must be a number; got {slack!r} of type {type(slack).__name__}.")
    if not (slack >= 0 and math.isfinite(slack)):
        raise ValueError(f"slack must be finite and at least 0; got {slack}.")


def _check_share(share: jax.Array, num_ranks: int) -> None:
    check_array("share", share, "num_ranks")
    check_shape("share", share, (num_ranks,), "num_ranks")
    check_dtype("share", share, jnp.float32)
