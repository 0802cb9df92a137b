"""``to_slots`` and ``from_slots``: what belongs to experts, moved to their slots and back."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, PyTree

from jax_ep._axes import rank_along
from jax_ep._checks import check_leading_axis, check_one_of
from jax_ep._compat import vary_together
from jax_ep._dispatch import dispatch
from jax_ep._make_plan import make_plan
from jax_ep._placement import Placement, check_spread
from jax_ep._plan import Plan
from jax_ep._types import DROPPED, AxisName, Implementation


def to_slots(
    tree: PyTree[Num[Array, "num_local_experts ..."]],
    placement: Placement,
    *,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> PyTree[Num[Array, "num_local_slots ..."]]:
    """Copies what belongs to experts, such as weights, to the slots that hold them.

    Called by all ranks of the axis with the parts of their own experts, ``num_experts / num_ranks``
    in order; communicates along it. It is a ``dispatch`` in which experts are the tokens and slots
    the experts, so each rank receives what is in its slots and nothing else, and the gradient of an
    expert is the sum of its copies': in float32, in ascending order of ranks, rounded once.

    Args:
      tree: arrays ``[num_local_experts, ...]`` of any dtype that ``dispatch`` takes.
      placement: equal on all ranks.
      axis_name: the axis the ranks lie along, as for ``make_plan``; None for one rank.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves. ``"xla"``
        gathers all experts on each rank.

    Returns:
      Arrays ``[num_slots / num_ranks, ...]``: bit copies, in the order of this rank's slots.

    Raises:
      TypeError: ``tree`` holds something else than such arrays or nothing, ``placement`` is not a
        ``Placement``, or ``axis_name`` is neither a name nor a tuple of names.
      ValueError: an array has another first axis; the number of slots or of experts is no multiple
        of that of ranks; or ``axis_name`` is not bound.
      NotImplementedError: ``implementation="native"`` where native code cannot serve.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> placement = jax_ep.Placement.of([1, 0, 2, 0], num_experts=3)
      >>> jax_ep.to_slots(jnp.array([10.0, 20.0, 30.0]), placement).tolist()
      [20.0, 10.0, 30.0, 10.0]
    """
    num_ranks = _check_spread(placement, axis_name)
    _check_tree(tree, placement.num_experts // num_ranks, "num_local_experts")
    return dispatch(tree, _plan_to_slots(placement, axis_name, implementation))


def from_slots(
    tree: PyTree[Num[Array, "num_local_slots ..."]],
    placement: Placement,
    *,
    axis_name: AxisName = None,
    copies: Literal["first", "sum"] = "first",
    implementation: Implementation | None = None,
) -> PyTree[Num[Array, "num_local_experts ..."]]:
    """Brings what is in slots back to the order of experts: the inverse of ``to_slots``.

    Called by all ranks of the axis; communicates along it. From one placement to another go
    ``to_slots(from_slots(tree, old), new)``; a checkpoint in the order of experts outlives both.

    Args:
      tree: arrays ``[num_local_slots, ...]``, in the order of this rank's slots.
      placement: by which they are there.
      axis_name: the axis the ranks lie along, as for ``make_plan``; None for one rank.
      copies: ``"first"`` takes each expert from the first slot that holds it: for weights and what
        an optimizer knows of them, of which all copies are equal. ``"sum"`` adds up all copies,
        as the gradient of ``to_slots`` does: for gradients, of which each copy has a part.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves.

    Returns:
      Arrays ``[num_local_experts, ...]``: this rank's own experts, in order.

    Raises:
      TypeError: ``tree`` holds something else than such arrays or nothing, or no floats where they
        are to be added up; ``placement`` is not a ``Placement``; or ``axis_name`` is neither a name
        nor a tuple of names.
      ValueError: an array has another first axis; ``copies`` is unknown; the number of slots or of
        experts is no multiple of that of ranks; or ``axis_name`` is not bound.
      NotImplementedError: ``implementation="native"`` where native code cannot serve.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> placement = jax_ep.Placement.of([1, 0, 2, 0], num_experts=3)
      >>> grads = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> jax_ep.from_slots(grads, placement, copies="sum").tolist()
      [6.0, 1.0, 3.0]
    """
    check_one_of("copies", copies, ("first", "sum"))
    num_ranks = _check_spread(placement, axis_name)
    _check_tree(tree, placement.num_slots // num_ranks, "num_local_slots")
    if copies == "first":
        return dispatch(tree, _plan_from_slots(placement, axis_name, implementation))
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = f"tree{jax.tree_util.keystr(path)}"
            raise TypeError(f"{name} must hold floats to be added up; got {leaf.dtype}.")
    return _sum_copies(tree, _plan_to_slots(placement, axis_name, implementation))


def _sum_copies(tree: PyTree[Any], plan: Plan) -> PyTree[Any]:
    leaves, structure = jax.tree.flatten(tree)
    # What varies less than the plan would be one array of all ranks, and summed over these.
    [_, *leaves] = vary_together([plan.num_dropped, *leaves])
    experts = [jnp.zeros((plan.num_tokens, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    [_, *experts] = vary_together([leaves[0], *experts])
    _, pull = jax.vjp(partial(dispatch, plan=plan), experts)
    [summed] = pull(leaves)
    return jax.tree.unflatten(structure, summed)


def _check_spread(placement: Placement, axis_name: AxisName) -> int:
    num_ranks = check_spread(placement, axis_name)
    if placement.num_experts % num_ranks:
        raise ValueError(
            f"placement must have a multiple of {num_ranks} experts, as there are as many ranks; "
            f"got {placement.num_experts}."
        )
    return num_ranks


def _check_tree(tree: PyTree[Any], size: int, dim: str) -> None:
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise TypeError(f"tree must hold at least one array; got {tree!r}.")
    for path, leaf in leaves:
        check_leading_axis(f"tree{jax.tree_util.keystr(path)}", leaf, size, dim)


def _plan_to_slots(
    placement: Placement, axis_name: AxisName, implementation: Implementation | None
) -> Plan:
    """Plans an exchange in which each of this rank's experts chooses all slots that hold it."""
    num_ranks = check_spread(placement, axis_name)
    num_local = placement.num_experts // num_ranks
    own = rank_along(axis_name) * num_local + jnp.arange(num_local, dtype=jnp.int32)
    # Any placement of as many slots has to fit: one expert may have all that others leave.
    copy = jnp.arange(placement.num_slots - placement.num_experts + 1, dtype=jnp.int32)
    at = jnp.asarray(placement.first_copy)[own][:, None] + copy
    slots = jnp.asarray(placement.copies)[jnp.minimum(at, placement.num_slots - 1)]
    is_copy = copy < jnp.asarray(placement.num_copies)[own][:, None]
    return make_plan(
        jnp.where(is_copy, slots, DROPPED),
        num_experts=placement.num_slots,
        axis_name=axis_name,
        capacity=placement.num_slots // num_ranks,
        implementation=implementation,
    )


def _plan_from_slots(
    placement: Placement, axis_name: AxisName, implementation: Implementation | None
) -> Plan:
    """Plans an exchange in which the first slot of each expert chooses it, and others nothing."""
    num_ranks = check_spread(placement, axis_name)
    num_local = placement.num_slots // num_ranks
    own = rank_along(axis_name) * num_local + jnp.arange(num_local, dtype=jnp.int32)
    expert = jnp.asarray(placement.slot_experts)[own]
    is_first = jnp.asarray(placement.copies)[jnp.asarray(placement.first_copy)[expert]] == own
    return make_plan(
        jnp.where(is_first, expert, DROPPED)[:, None],
        num_experts=placement.num_experts,
        axis_name=axis_name,
        capacity=placement.num_experts // num_ranks,
        implementation=implementation,
    )
