"""``make_plan``: from the router's choices to a plan."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int32

from jax_ep import _native
from jax_ep._axes import place, resolve_ranks
from jax_ep._checks import check_array, check_dtype, check_one_of, check_positive
from jax_ep._compat import vary_together
from jax_ep._exchange import exchange_plan
from jax_ep._layout import Layout, lossless_capacity, padding_reserve
from jax_ep._plan import Plan, PlanArrays
from jax_ep._types import DROPPED, AxisName, Binding, Implementation, Tail

_INT32_MAX = 2**31 - 1


@jax.named_scope("jax_ep.make_plan")
def make_plan(
    topk_idx: Int32[Array, "num_tokens num_topk"],
    *,
    num_experts: int,
    axis_name: AxisName = None,
    capacity: int | None = None,
    alignment: int = 1,
    tail: Tail = "zero",
    ranks_per_node: int = 1,
    implementation: Implementation | None = None,
) -> Plan:
    """Plans where every choice of every rank goes.

    Called by all ranks of the axis with their own ``topk_idx``, from all of which the plan follows.
    Each rank learns the others', ``num_tokens * num_topk`` indices of each; or, between hosts and
    if they are many, what these ask of its experts and in which rows it receives them.

    Rank ``r`` of ``R`` owns experts ``r * L`` to ``r * L + L - 1`` with ``L = num_experts / R``.
    Kept choices are laid out on the rank of their expert in the order (local expert, source rank,
    token, k). If more arrive at a rank than ``capacity - L * (alignment - 1)``, it keeps the first
    in the order (k, token, source rank): every token's first choice before anyone's second.

    Args:
      topk_idx: the global expert of each choice, or ``DROPPED`` (-1) for none. An index outside
        ``[-1, num_experts)`` is not routed either and is counted in ``num_invalid``. A token may
        name one expert twice. The same shape on every rank; values are traced, so nothing else
        checks them.
      num_experts: experts on all ranks together, a multiple of the number of ranks.
      axis_name: the axis the ranks lie along: a mesh axis or a tuple of them, major first, inside
        ``jax.shard_map``; or the ``axis_name`` of an enclosing ``jax.vmap``; or None for one rank.
      capacity: rows of this rank's receive buffer, equal on all ranks. None is enough for whatever
        the ranks send as long as each token's choices are distinct; see ``suggest_capacity`` for
        less.
      alignment: each expert's group starts at a multiple of this many rows and is filled up with
        rows of zeros.
      tail: what rows past the last group hold in ``dispatch``'s result and in ``combine``'s
        gradient. ``"zero"`` writes them all; ``"uninitialized"`` leaves them as they are, so that
        cost follows used rows: for experts that never read there, as ``grouped_matmul`` does not.
      ranks_per_node: how many ranks, one after the other, are on a node: they reach each other by a
        faster way than others. Then the partial sums of a node's ranks are added up by themselves
        in ``combine``, and a token can cross between nodes once for each node and not for each
        rank. It divides the number of ranks, and is equal on all of them.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves.

    Returns:
      The plan, for ``dispatch`` and ``combine`` on the same ranks.

    Raises:
      TypeError: ``topk_idx`` is not an int32 array, a count is not an int, or ``axis_name`` is
        neither a name nor a tuple of names.
      ValueError: ``topk_idx`` is not 2-D; ``num_experts`` is not a positive multiple of the number
        of ranks; ``capacity`` is below 1 or does not hold the padding; ``ranks_per_node`` does not
        divide the number of ranks; ``axis_name`` is not bound, or names a mix of axes; an option is
        unknown; the exchange has 2**31 or more choices or rows.
      NotImplementedError: ``implementation="native"`` where native code cannot serve. If that is
        for the devices or processes of its mesh, only the compilation of the program raises it.
      TimeoutError: from the compilation, if another process of the mesh did not compile the
        program in time, see ``set_wait_timeout``; with ``implementation="xla"`` no process waits.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> topk_idx = jnp.array([[0, 1], [1, jax_ep.DROPPED]], jnp.int32)
      >>> jax_ep.make_plan(topk_idx, num_experts=2).group_sizes.tolist()
      [1, 2]
    """
    check_array("topk_idx", topk_idx, "num_tokens, num_topk")
    check_dtype("topk_idx", topk_idx, jnp.int32)
    layout, binding = lay_out(
        topk_idx.shape,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        alignment=alignment,
        tail=tail,
        ranks_per_node=ranks_per_node,
        implementation=implementation,
    )
    where = place(layout)
    topk_idx, _ = vary_together([topk_idx, where.rank])
    routed = (topk_idx >= 0) & (topk_idx < num_experts)
    num_invalid = jnp.sum(~routed & (topk_idx != DROPPED), dtype=jnp.int32)
    topk_idx = jnp.where(routed, topk_idx, DROPPED)
    arrays = checkpoint_name(exchange_plan(layout, binding, where, topk_idx), "jax_ep.plan")
    return assemble(layout, binding, num_invalid, arrays)


def lay_out(
    shape: tuple[int, ...],
    *,
    num_experts: int,
    axis_name: AxisName,
    capacity: int | None,
    ranks_per_node: int,
    implementation: Implementation | None,
    alignment: int = 1,
    tail: Tail = "zero",
) -> tuple[Layout, Binding]:
    """Resolves what is static about a plan of so many choices, and how its axis is bound here.

    Raises:
      TypeError: as ``make_plan``.
      ValueError: likewise.
      NotImplementedError: likewise.
    """
    check_positive("alignment", alignment)
    check_one_of("tail", tail, ("zero", "uninitialized"))
    binding, num_ranks = resolve_ranks(axis_name, num_experts, ranks_per_node)
    layout = Layout(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_tokens=shape[0],
        num_topk=shape[1],
        capacity=_resolve_capacity(shape, num_experts, num_ranks, capacity, alignment),
        alignment=alignment,
        tail=tail,
        axis_name=axis_name,
        implementation="xla",
        strict=implementation is not None,
        ranks_per_node=ranks_per_node,
    )
    implementation = _resolve_implementation(implementation, layout, binding)
    return dataclasses.replace(layout, implementation=implementation), binding


def _resolve_capacity(
    shape: tuple[int, ...], num_experts: int, num_ranks: int, capacity: int | None, alignment: int
) -> int:
    num_tokens, num_topk = shape
    if capacity is None:
        capacity = lossless_capacity(num_tokens, num_topk, num_experts, num_ranks, alignment)
    check_positive("capacity", capacity)
    reserve = padding_reserve(num_experts // num_ranks, alignment)
    if capacity < reserve:
        raise ValueError(
            f"capacity must be at least num_local_experts * (alignment - 1) = {reserve}; "
            f"got {capacity}."
        )
    if max(num_ranks * num_tokens * num_topk, capacity) > _INT32_MAX:
        raise ValueError(
            "topk_idx and capacity must keep num_ranks * num_tokens * num_topk and capacity below "
            f"2**31; got {num_ranks} * {num_tokens} * {num_topk} and {capacity}."
        )
    return capacity


def _resolve_implementation(
    implementation: Implementation | None, layout: Layout, binding: Binding
) -> Implementation:
    check_one_of("implementation", implementation, (None, "xla", "native"))
    if implementation is None:
        return "native" if _native.serves(layout, binding) else "xla"
    if implementation == "native" and (reason := _native.refusal(layout, binding)):
        raise NotImplementedError(f"implementation='native' cannot serve here: {reason}")
    return implementation


def assemble(
    layout: Layout,
    binding: Binding,
    num_invalid: jax.Array,
    arrays: PlanArrays,
) -> Plan:
    """Makes a plan of its arrays."""
    load = arrays.expert_load
    if binding == "mesh":
        # Equal on all ranks already; this tells JAX's types so. Unused, XLA removes it.
        load = jax.lax.pmax(load, layout.axis_name)
    return Plan(
        group_sizes=arrays.group_sizes,
        kept=arrays.kept,
        expert_load=load,
        recv_counts=arrays.recv_counts,
        num_dropped=arrays.num_dropped,
        num_invalid=num_invalid,
        _arrays=arrays,
        _layout=layout,
    )
