"""Where experts are: ``Placement``, and ``place``, which finds the slot of each choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Num

from jax_ep._axes import rank_along, resolve_axis
from jax_ep._checks import check_array, check_dtype, check_nodes, check_positive
from jax_ep._numbered import number_choices
from jax_ep._types import AxisName


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Which expert is in each slot: several slots may hold copies of one.

    A slot is a place for the weights of one expert. Rank ``r`` of ``R`` has the slots ``r * S`` to
    ``r * S + S - 1`` with ``S = num_slots / R``. A pytree of arrays alone, equal on all ranks: a
    program takes it as an argument, and another placement of as many slots needs no new program.
    ``eplb`` makes it from loads, ``Placement.of`` from what is in each slot.

    Attributes:
      slot_experts: the expert in each slot.
      copies: the slots by what they hold: those of expert 0, ascending, then those of expert 1, and
        so on.
      first_copy: where in ``copies`` those of each expert begin.
      num_copies: how many slots hold each expert, at least 1.
    """

    slot_experts: Int32[Array | np.ndarray, "num_slots"]
    copies: Int32[Array | np.ndarray, "num_slots"]
    first_copy: Int32[Array | np.ndarray, "num_experts"]
    num_copies: Int32[Array | np.ndarray, "num_experts"]

    @classmethod
    def of(cls, slot_experts: Num[np.ndarray, "num_slots"], num_experts: int) -> "Placement":
        """Makes a placement on the host, of what is in each slot.

        Args:
          slot_experts: the expert in each slot. ``np.arange(num_experts)`` for one slot each, in
            order, as if nothing were placed.
          num_experts: how many experts there are.

        Returns:
          The placement, in NumPy arrays.

        Raises:
          TypeError: ``slot_experts`` does not hold integers, or ``num_experts`` is not an int.
          ValueError: ``slot_experts`` is not 1-D, holds something outside ``[0, num_experts)`` or
            misses an expert, or ``num_experts`` is below 1.

        Example:
          >>> import jax_ep
          >>> placement = jax_ep.Placement.of([0, 1, 2, 0], num_experts=3)
          >>> placement.copies.tolist(), placement.num_copies.tolist()
          ([0, 3, 1, 2], [2, 1, 1])
        """
        check_positive("num_experts", num_experts)
        experts = np.asarray(slot_experts)
        if not np.issubdtype(experts.dtype, np.integer):
            raise TypeError(f"slot_experts must hold integers; got {experts.dtype}.")
        if experts.ndim != 1:
            raise ValueError(
                f"slot_experts must have shape [num_slots]; got {list(experts.shape)}."
            )
        outside = experts[(experts < 0) | (experts >= num_experts)]
        if outside.size:
            raise ValueError(
                f"slot_experts must lie within 0 to {num_experts - 1}; got {outside[0]}."
            )
        num_copies = np.bincount(experts, minlength=num_experts)
        if not num_copies.all():
            missing = int(np.argmin(num_copies))
            raise ValueError(f"slot_experts must hold each expert; got none of expert {missing}.")
        return cls(
            slot_experts=experts.astype(np.int32),
            copies=np.argsort(experts, kind="stable").astype(np.int32),
            first_copy=(np.cumsum(num_copies) - num_copies).astype(np.int32),
            num_copies=num_copies.astype(np.int32),
        )

    @property
    def num_slots(self) -> int:
        """Slots on all ranks together."""
        return self.slot_experts.shape[-1]

    @property
    def num_experts(self) -> int:
        """Experts, each of which is in one slot or more."""
        return self.num_copies.shape[-1]

    def fold(self, load: Num[Array, "num_slots"]) -> Num[Array, "num_experts"]:
        """Adds up for each expert what is known of its slots.

        So the ``expert_load`` of a plan over slots becomes that of experts, which ``eplb`` and
        ``Rebalancer`` take.

        Args:
          load: a number for each slot, traced or not.

        Returns:
          Their sums, in the dtype of ``load``.

        Raises:
          TypeError: ``load`` is no array.
          ValueError: it is not ``[num_slots]``.

        Example:
          >>> import jax.numpy as jnp, jax_ep
          >>> jax_ep.Placement.of([0, 1, 2, 0], 3).fold(jnp.array([5, 6, 7, 8])).tolist()
          [13, 6, 7]
        """
        check_array("load", load, "num_slots")
        if load.shape[0] != self.num_slots:
            raise ValueError(
                f"load must have shape [num_slots] = [{self.num_slots}]; got {list(load.shape)}."
            )
        return jax.ops.segment_sum(load, self.slot_experts, self.num_experts)


def place(
    topk_idx: Int32[Array, "num_tokens num_topk"],
    placement: Placement,
    *,
    axis_name: AxisName = None,
    ranks_per_node: int = 1,
) -> Int32[Array, "num_tokens num_topk"]:
    """Turns choices of experts into choices of slots, for a plan with as many experts as slots.

    Local arithmetic: no communication, and the same on every run. Of several copies of an expert a
    rank takes those on itself, else those on its node, else all; and of those it takes one after
    the other, from its ``rank``-th on, as its choices of the expert come in the order (token, k).
    So no copy gets more than one choice more of a rank than another that this rank takes.

    It takes the near ones only if all ranks, or nodes, that have any have as many: else a copy that
    is alone there would be chosen more often than one beside another. Then all copies of an expert
    are chosen as often, up to what does not divide, if all ranks choose it as often. A rank that
    has a copy and chooses the expert more often than others do keeps this to itself: that copy is
    chosen more often.

    Args:
      topk_idx: the expert of each choice, or ``DROPPED``.
      placement: equal on all ranks.
      axis_name: the axis the ranks lie along, as for ``make_plan``; None for one rank.
      ranks_per_node: how many ranks, one after the other, are on a node.

    Returns:
      The slot of each choice. ``DROPPED`` and other negative indices stay as they are, and those of
      ``num_experts`` and more are made ``num_slots`` or more, so that ``make_plan`` counts as
      invalid what is.

    Raises:
      TypeError: ``topk_idx`` is not an int32 array, ``placement`` is not a ``Placement``,
        ``ranks_per_node`` is not an int, or ``axis_name`` is neither a name nor a tuple of names.
      ValueError: ``topk_idx`` is not 2-D, the number of slots is no multiple of that of ranks,
        ``ranks_per_node`` does not divide the number of ranks, or ``axis_name`` is not bound.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> placement = jax_ep.Placement.of([0, 1, 2, 0], num_experts=3)
      >>> jax_ep.place(jnp.array([[0, 2], [0, 1], [0, jax_ep.DROPPED]]), placement).tolist()
      [[0, 2], [3, 1], [0, -1]]
    """
    check_array("topk_idx", topk_idx, "num_tokens, num_topk")
    check_dtype("topk_idx", topk_idx, jnp.int32)
    num_ranks = check_spread(placement, axis_name)
    check_nodes(ranks_per_node, num_ranks)
    rank = rank_along(axis_name)
    choices = number_choices(topk_idx, placement.num_experts, None)
    first, count = jnp.asarray(placement.first_copy), jnp.asarray(placement.num_copies)
    for ranks in (ranks_per_node, 1):
        slots = ranks * (placement.num_slots // num_ranks)
        first, count = _prefer(placement, slots, rank // ranks, first, count)
    copy = (rank + choices.ordinal) % count[choices.expert]
    slot = jnp.asarray(placement.copies)[first[choices.expert] + copy]
    # An index past the experts must not become one of the slots, which are more.
    invalid = jnp.where(topk_idx < 0, topk_idx, jnp.maximum(topk_idx, placement.num_slots))
    return jnp.where(choices.is_routed, slot, invalid)


def check_spread(placement: Placement, axis_name: AxisName) -> int:
    """Checks that a placement's slots divide among an axis's ranks; returns how many these are.

    Raises:
      TypeError: it is no placement, or ``axis_name`` is neither a name nor a tuple of names.
      ValueError: they do not divide, or ``axis_name`` is not bound.
    """
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be a jax_ep.Placement; got {type(placement).__name__}.")
    _, num_ranks = resolve_axis(axis_name)
    check_array("placement", placement.slot_experts, "num_slots")
    if placement.num_slots % num_ranks:
        raise ValueError(
            f"placement must have a multiple of {num_ranks} slots, as there are as many ranks; got "
            f"{placement.num_slots}."
        )
    return num_ranks


def _prefer(
    placement: Placement,
    slots_together: int,
    here: Int32[Array, ""],
    first: Int32[Array, "num_experts"],
    count: Int32[Array, "num_experts"],
) -> tuple[Int32[Array, "num_experts"], Int32[Array, "num_experts"]]:
    """Narrows copies to those here, where there are any and all places that have any have as many.

    Places are so many slots together; first and count say which copies of each expert to take, as
    positions in ``copies``.
    """
    expert = jnp.asarray(placement.slot_experts)[placement.copies]
    where = jnp.asarray(placement.copies) // slots_together

    def total(of_copies: jax.Array) -> Int32[Array, "num_experts"]:
        return jax.ops.segment_sum(
            of_copies.astype(jnp.int32), expert, placement.num_experts, indices_are_sorted=True
        )

    # Those of one expert are in order, so those of one place stand together.
    position = jnp.arange(placement.num_slots, dtype=jnp.int32) - placement.first_copy[expert]
    begins = (position == 0) | (where != jnp.roll(where, 1))
    each = jnp.maximum(jnp.asarray(placement.num_copies) // total(begins), 1)
    is_even = total(begins != (position % each[expert] == 0)) == 0
    count_here = total(where == here)
    takes_these = is_even & (count_here > 0)
    return (
        jnp.where(takes_these, placement.first_copy + total(where < here), first),
        jnp.where(takes_these, count_here, count),
    )
