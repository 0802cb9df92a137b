"""The plan: who sends which row where, as data."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from jax_ep._layout import Layout
from jax_ep._types import DROPPED, AxisName, Implementation, Tail


class PlanArrays(NamedTuple):
    """All that is known of one rank's plan, in the order in which it travels.

    An implementation computes it, given the choices with ``DROPPED`` in place of every index that
    is not routed; every later exchange is given all of it. Native code reads and writes the arrays
    in this order too.

    The two ``recv`` arrays list the rows this rank receives, ordered by (source rank, token, k), so
    that all rows of one token stand together. Entries past ``sum(recv_counts)`` hold anything.
    ``send_rank`` and ``send_row`` say where each of its own choices went, or are ``DROPPED``.
    """

    group_sizes: Int32[Array, "num_local_experts"]
    kept: Bool[Array, "num_tokens num_topk"]
    expert_load: Int32[Array, "num_experts"]
    recv_counts: Int32[Array, "num_ranks"]
    num_dropped: Int32[Array, ""]
    send_rank: Int32[Array, "num_tokens num_topk"]
    send_row: Int32[Array, "num_tokens num_topk"]
    recv_choice: Int32[Array, "capacity"]
    recv_row: Int32[Array, "capacity"]
    group_rows: Int32[Array, "num_local_experts"]
    fingerprint: UInt32[Array, ""]


def array_types(layout: Layout) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Returns shape and dtype of each of a plan's arrays on one rank, from their annotations."""
    return [
        (
            tuple(getattr(layout, dim) for dim in annotation.dim_str.split()),
            jnp.dtype(annotation.dtypes[0]),
        )
        for annotation in PlanArrays.__annotations__.values()
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every choice of one exchange goes, as seen from one rank.

    A pytree of arrays with static metadata. ``make_plan`` makes it; ``dispatch`` and ``combine``
    read it, wherever its axis is bound to as many ranks: under further axes it means what a loop
    over them would. Nothing in it is differentiable. Fields whose names start with an underscore
    are for the library alone; the others are for its user, and replacing one changes no exchange.

    Attributes:
      group_sizes: rows of each local expert, padding included; their sum is at most ``capacity``.
      kept: whether this choice has a row.
      expert_load: choices asked of each expert by all ranks, before dropping; equal on all ranks.
      recv_counts: rows this rank received from each rank.
      num_dropped: this rank's valid choices that got no row.
      num_invalid: this rank's indices outside ``[-1, num_experts)``.
    """

    group_sizes: Int32[Array, "num_local_experts"]
    kept: Bool[Array, "num_tokens num_topk"]
    expert_load: Int32[Array, "num_experts"]
    recv_counts: Int32[Array, "num_ranks"]
    num_dropped: Int32[Array, ""]
    num_invalid: Int32[Array, ""]
    _arrays: PlanArrays
    _layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def num_ranks(self) -> int:
        """Ranks along the expert axis."""
        return self._layout.num_ranks

    @property
    def num_experts(self) -> int:
        """Experts on all ranks together."""
        return self._layout.num_experts

    @property
    def num_local_experts(self) -> int:
        """Experts on each rank."""
        return self._layout.num_local_experts

    @property
    def num_tokens(self) -> int:
        """Tokens on each rank."""
        return self._layout.num_tokens

    @property
    def num_topk(self) -> int:
        """Choices per token."""
        return self._layout.num_topk

    @property
    def capacity(self) -> int:
        """Rows of each rank's receive buffer."""
        return self._layout.capacity

    @property
    def alignment(self) -> int:
        """Every group starts at a multiple of this many rows."""
        return self._layout.alignment

    @property
    def tail(self) -> Tail:
        """What rows past ``sum(group_sizes)`` hold."""
        return self._layout.tail

    @property
    def ranks_per_node(self) -> int:
        """How many ranks, one after the other, are on a node."""
        return self._layout.ranks_per_node

    @property
    def axis_name(self) -> AxisName:
        """The axis the ranks lie along, or None for one rank."""
        return self._layout.axis_name

    @property
    def implementation(self) -> Implementation:
        """What carries out this plan's exchanges.

        If ``make_plan`` was given none, it is what serves where the plan was traced; programs for
        devices or processes that this does not serve take the other.
        """
        return self._layout.implementation


def check_plan(plan: Plan, name: str = "plan") -> None:
    """Checks that what was given as a plan, by some name, is one.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"{name} must be a jax_ep.Plan; got {type(plan).__name__}.")


def check_arrays(plan: Plan) -> None:
    """Checks that what exchanges read of a plan has the types that ``make_plan`` gave it.

    Raises:
      TypeError: an array has another dtype.
      ValueError: an array has another shape.
    """
    types = array_types(plan._layout)
    for name, (shape, dtype), array in zip(PlanArrays._fields, types, plan._arrays, strict=True):
        if array.dtype != dtype or array.shape != shape:
            error = TypeError if array.dtype != dtype else ValueError
            raise error(
                f"plan must be as make_plan made it, for one rank: its {name} has type "
                f"{dtype.name}{list(shape)}; got {array.dtype.name}{list(array.shape)}. "
                "A plan is not for averaging, casting or reshaping."
            )


def is_received(layout: Layout, plan: PlanArrays) -> Bool[Array, "capacity"]:
    """Tells which entries of the receive lists are in use: those past them hold anything."""
    num_received = jnp.sum(plan.recv_counts, dtype=jnp.int32)
    return jnp.arange(layout.capacity, dtype=jnp.int32) < num_received


def choice_of_row(layout: Layout, plan: PlanArrays) -> Int32[Array, "capacity"]:
    """Inverts the receive lists: the choice, numbered through all ranks, of each of its rows.

    It is ``DROPPED`` for rows that hold none.
    """
    recv_row = jnp.where(is_received(layout, plan), plan.recv_row, layout.capacity)
    choice = jnp.full(layout.capacity, DROPPED, jnp.int32)
    return choice.at[recv_row].set(plan.recv_choice, mode="drop")
