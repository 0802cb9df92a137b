"""``moe``: dispatch, SwiGLU experts and combine in one call, per shard."""

from functools import partial

import jax
from jaxtyping import Array, Float, Float32, Int32

from jax_ep import wire
from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._combine import combine
from jax_ep._dispatch import dispatch
from jax_ep._grouped_matmul import grouped_matmul
from jax_ep._make_plan import make_plan
from jax_ep._plan import Plan
from jax_ep._types import AxisName, Implementation


@jax.named_scope("jax_ep.moe")
def moe(
    x: Float[Array, "num_tokens hidden"],
    topk_idx: Int32[Array, "num_tokens num_topk"],
    topk_weights: Float32[Array, "num_tokens num_topk"],
    w_gate: Float[Array, "num_local_experts hidden ffn_hidden"],
    w_up: Float[Array, "num_local_experts hidden ffn_hidden"],
    w_down: Float[Array, "num_local_experts ffn_hidden hidden"],
    *,
    num_experts: int,
    axis_name: AxisName = None,
    capacity: int | None = None,
    alignment: int = 1,
    ranks_per_node: int = 1,
    wire_dtype: jax.typing.DTypeLike | None = None,
    wire_cotangents: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "num_tokens hidden"], Plan]:
    """Applies each token's SwiGLU experts and adds up their outputs, scaled by router weights.

    Row ``t`` of the result is the sum over kept ``k`` of ``topk_weights[t, k] * expert_e(x[t])``
    for ``e = topk_idx[t, k]``, where ``expert_e(v)`` is
    ``(silu(v @ w_gate[e]) * (v @ w_up[e])) @ w_down[e]``: https://arxiv.org/abs/2002.05202. Called
    by all ranks of the axis; communicates along it. Its cost follows the rows in use, not
    ``capacity``, but for the elementwise part.

    Args:
      x: this rank's tokens.
      topk_idx: the global expert of each choice, or ``DROPPED``; see ``make_plan``.
      topk_weights: used as given, not renormalised.
      w_gate: this rank's experts' matrices, in the dtype of ``x``.
      w_up: likewise.
      w_down: likewise.
      num_experts: experts on all ranks together.
      axis_name: the axis the ranks lie along, as for ``make_plan``; None for one rank.
      capacity: rows of this rank's receive buffer, as for ``make_plan``; None drops nothing.
      alignment: each expert's group starts at a multiple of this many rows.
      ranks_per_node: how many ranks are on a node, as for ``make_plan``.
      wire_dtype: what tokens cross as, ``"float8_e4m3fn"`` or ``"float8_e5m2"``: see
        ``wire.dispatch``; None for the dtype of ``x``.
      wire_cotangents: likewise for the cotangents of the result: see ``wire.combine``.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves.

    Returns:
      The tokens' outputs in the dtype of ``x``, zero for a token with no kept choice, and the plan,
      for ``load_metrics``. Products are summed in float32.

    Raises:
      TypeError: an argument is no array or has another dtype than asked for, or a count is no int.
      ValueError: shapes do not fit one another, ``make_plan`` refuses its arguments, or one of
        ``wire_dtype`` and ``wire_cotangents`` is out of range.
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
    check_array("w_gate", w_gate, "num_local_experts, hidden, ffn_hidden")
    plan = make_plan(
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        alignment=alignment,
        # grouped_matmul never reads past the groups.
        tail="uninitialized",
        ranks_per_node=ranks_per_node,
        implementation=implementation,
    )
    _check_weights(x, (w_gate, w_up, w_down), plan.num_local_experts)
    send, receive = dispatch, combine
    if wire_dtype is not None:
        send = partial(wire.dispatch, dtype=wire_dtype)
    if wire_cotangents is not None:
        receive = partial(wire.combine, cotangents=wire_cotangents)
    rows = send(x, plan)
    gate = grouped_matmul(rows, w_gate, plan.group_sizes)
    up = grouped_matmul(rows, w_up, plan.group_sizes)
    rows = grouped_matmul(jax.nn.silu(gate) * up, w_down, plan.group_sizes)
    return receive(rows, plan, topk_weights), plan


def _check_weights(
    x: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array], num_local_experts: int
) -> None:
    hidden, ffn_hidden = x.shape[1], weights[0].shape[2]
    inward = ((num_local_experts, hidden, ffn_hidden), "num_local_experts, hidden, ffn_hidden")
    outward = ((num_local_experts, ffn_hidden, hidden), "num_local_experts, ffn_hidden, hidden")
    names = ("w_gate", "w_up", "w_down")
    for name, weight, wanted in zip(names, weights, (inward, inward, outward), strict=True):
        check_array(name, weight, wanted[1])
        check_shape(name, weight, *wanted)
        check_dtype(name, weight, x.dtype)
