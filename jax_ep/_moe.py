"""``moe``: dispatch, experts and combine in one call, per shard."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32, Num

from jax_ep import _balance, wire
from jax_ep._axes import resolve_ranks
from jax_ep._balance import Balance, with_copies
from jax_ep._checks import check_array, check_leading_axis, check_one_of, check_positive
from jax_ep._combine import combine
from jax_ep._compat import beside_compute
from jax_ep._dispatch import dispatch
from jax_ep._make_plan import make_plan
from jax_ep._named_experts import ExpertsName, check_weights, resolve_experts
from jax_ep._plan import Plan
from jax_ep._rows import dispatch_weighed
from jax_ep._types import AxisName, Implementation

Weigh: TypeAlias = Literal["output", "input"]


@jax.named_scope("jax_ep.moe")
def moe(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    *weights: Num[Array, "num_local_experts ..."],
    num_experts: int,
    experts: ExpertsName | Callable[..., jax.Array] = "swiglu",
    weigh: Weigh = "output",
    axis_name: AxisName = None,
    capacity: int | None = None,
    alignment: int = 1,
    ranks_per_node: int = 1,
    balance: Balance | None = None,
    chunks: int = 1,
    unroll_chunks: bool = False,
    wire_dtype: jax.typing.DTypeLike | None = None,
    wire_cotangents: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "num_tokens hidden"], Plan]:
    """Applies each token's experts and adds up their outputs, scaled by router weights.

    Row ``t`` of the result is the sum over kept ``k`` of ``topk_weights[t, k] * expert_e(x[t])``
    for ``e = topk_idx[t, k]``, where ``expert_e(v)`` is, unless ``experts`` says otherwise,
    ``(silu(v @ w_gate[e]) * (v @ w_up[e])) @ w_down[e]``: https://arxiv.org/abs/2002.05202. Called
    by all ranks of the axis; communicates along it. Its cost follows the rows in use, not
    ``capacity``, but for the elementwise part.

    Under ``jax.checkpoint`` with ``jax.checkpoint_policies.save_only_these_names("jax_ep.plan",
    "jax_ep.rows", "jax_ep.out")`` a gradient repeats the experts' products but no exchange; with
    ``"jax_ep.hidden"`` too, the last product alone.

    Args:
      x: this rank's tokens.
      topk_idx: the global expert of each choice, or ``DROPPED``; see ``make_plan``.
      topk_weights: used as given, not renormalised.
      *weights: this rank's experts' parameters, what ``experts`` takes: by default ``w_gate`` and
        ``w_up`` [num_local_experts, hidden, ffn_hidden] and ``w_down`` [num_local_experts,
        ffn_hidden, hidden], in the dtype of ``x``.
      num_experts: experts on all ranks together.
      experts: the expert network: ``"swiglu"``, ``"geglu"``, ``"clamped_swiglu"`` or ``"relu2"``,
        see ``jax_ep.experts``; or a callable ``(rows, group_sizes, *weights)`` that returns a row
        for each row, of any width: ``group_sizes`` as in a plan, and rows past the last group hold
        anything, and nobody reads what becomes of them.
      weigh: whether router weights scale what experts return, ``"output"``, or what they are given,
        ``"input"``: then the sum is of ``expert_e(topk_weights[t, k] * x[t])``.
      axis_name: the axis the ranks lie along, as for ``make_plan``; None for one rank.
      capacity: rows of this rank's receive buffer, as for ``make_plan``, if there are several
        chunks for each of them; None drops nothing.
      alignment: each expert's group starts at a multiple of this many rows.
      ranks_per_node: how many ranks are on a node, as for ``make_plan``.
      balance: has ranks borrow busy experts, so that all have as much to do: ``jax_ep.Balance()``
        or one with other options, see ``balance``. The results are those without it, to rounding,
        and with ``capacity=num_tokens * num_topk`` there is room for all that it spread evenly.
        None leaves each choice with the expert's owner.
      chunks: into how many equal parts to cut the tokens, which then go one after the other: for
        less memory, as buffers are those of one part and a gradient computes each part again.
        Where nothing is dropped the result is the same, bit for bit. ``balance`` evens all tokens
        together: a chunk may need more room than its share.
      unroll_chunks: do without a loop over chunks, and keep what gradients need: for time, as a
        part's exchange and another's experts do not depend on each other. On GPUs exchanges are
        put on the stream of collectives, beside which XLA computes; on CPUs nothing is gained.
      wire_dtype: what tokens cross as, ``"float8_e4m3fn"`` or ``"float8_e5m2"``: see
        ``wire.dispatch``; None for the dtype of ``x``.
      wire_cotangents: likewise for the cotangents of the result: see ``wire.combine``.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves.

    Returns:
      The tokens' outputs in the dtype of ``x``, zero for a token with no kept choice, and the plan,
      for ``load_metrics``. Products are summed in float32. With ``balance`` the plan is one of
      slots: ``count_choices`` counts what was asked of experts. With several chunks
      the plan's arrays have a leading axis of chunks: ``jax.vmap`` goes through it.

    Raises:
      TypeError: an argument is no array or has another dtype than asked for, a count is no int,
        ``experts`` takes another number of weights, or ``balance`` is no ``Balance``.
      ValueError: shapes do not fit one another, ``make_plan`` or ``balance`` refuses its arguments,
        an option is out of range, ``wire_dtype`` is given with ``weigh="input"``, or ``chunks``
        does not divide ``num_tokens``.
      NotImplementedError: ``implementation="native"`` where native code cannot serve.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> x, w = jnp.array([[1.0], [2.0]]), jnp.array([[[1.0]], [[2.0]]])
      >>> topk_idx, topk_weights = jnp.array([[0], [1]]), jnp.ones((2, 1))
      >>> out, plan = jax_ep.moe(x, topk_idx, topk_weights, w, w, w, num_experts=2)
      >>> plan.group_sizes.tolist(), [f"{value:.3f}" for value in out[:, 0].tolist()]
      ([1, 1], ['0.731', '31.424'])
    """
    check_array("x", x, "num_tokens, hidden")
    network = resolve_experts(experts)
    _, num_ranks = resolve_ranks(axis_name, num_experts, ranks_per_node)
    check_weights(network, weights, x, num_experts // num_ranks)
    send, receive = _exchanges(weigh, wire_dtype, wire_cotangents)
    if balance is not None and not isinstance(balance, Balance):
        raise TypeError(f"balance must be a jax_ep.Balance or None; got {balance!r}.")
    if balance is not None:
        topk_idx, copies = _balance.balance(
            topk_idx,
            num_experts=num_experts,
            axis_name=axis_name,
            ranks_per_node=ranks_per_node,
            implementation=implementation,
            **balance._asdict(),
        )
        weights = with_copies(weights, copies)
        num_experts += copies.num_experts

    def apply(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple[Any, Plan]:
        plan = make_plan(
            topk_idx,
            num_experts=num_experts,
            axis_name=axis_name,
            capacity=capacity,
            alignment=alignment,
            # Experts never read past the groups.
            tail="uninitialized",
            ranks_per_node=ranks_per_node,
            implementation=implementation,
        )
        with stream():
            rows = checkpoint_name(send(x, plan, topk_weights), "jax_ep.rows")
        rows = network(rows, plan.group_sizes, *weights)
        with stream():
            return checkpoint_name(receive(rows, plan, topk_weights), "jax_ep.out"), plan

    stream = beside_compute if unroll_chunks and chunks > 1 else contextlib.nullcontext
    return _in_chunks(apply, chunks, unroll_chunks, (x, topk_idx, topk_weights))


def _in_chunks(
    apply: Callable[..., tuple[Any, Plan]], chunks: int, unroll: bool, tokens: tuple[Any, ...]
) -> tuple[Any, Plan]:
    """Applies a layer to all tokens at once, or to one chunk of them after the other."""
    check_positive("chunks", chunks)
    if chunks == 1:
        return apply(*tokens)
    num_tokens = len(tokens[0])
    for name, array in zip(("x", "topk_idx", "topk_weights"), tokens, strict=True):
        check_leading_axis(name, array, num_tokens, "num_tokens")
    if num_tokens % chunks:
        raise ValueError(f"chunks must divide the {num_tokens} tokens of x; got {chunks}.")
    cut = [jnp.reshape(a, (chunks, num_tokens // chunks, *a.shape[1:])) for a in tokens]
    if unroll:
        done = [apply(*(a[i] for a in cut)) for i in range(chunks)]
        out, plan = jax.tree.map(lambda *parts: jnp.stack(parts), *done)
    else:
        # Without a checkpoint a gradient's loop would keep what all parts computed.
        out, plan = jax.lax.map(lambda part: jax.checkpoint(apply)(*part), tuple(cut))
    return out.reshape(num_tokens, *out.shape[2:]), plan


def _exchanges(
    weigh: Weigh,
    wire_dtype: jax.typing.DTypeLike | None,
    wire_cotangents: jax.typing.DTypeLike | None,
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns what brings tokens to experts, given their weights, and what brings rows back."""
    check_one_of("weigh", weigh, ("output", "input"))
    receive = combine
    if wire_cotangents is not None:
        receive = partial(wire.combine, cotangents=wire_cotangents)
    if weigh == "input":
        if wire_dtype is not None:
            raise ValueError(
                "wire_dtype must be None with weigh='input', which sends weighed tokens; got "
                f"{wire_dtype!r}."
            )
        return dispatch_weighed, lambda rows, plan, _: receive(rows, plan)
    send = dispatch if wire_dtype is None else partial(wire.dispatch, dtype=wire_dtype)
    return lambda x, plan, _: send(x, plan), receive
