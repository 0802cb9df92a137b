"""Routers: from logits to choices and weights, their auxiliary losses, and loss-free balancing.

Everything here is computed in float32, whatever the dtype of the logits, and apart from the means
over ``axis_name`` it is local arithmetic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Num

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._scores import check_logits
from jax_ep._topk import Router as Router
from jax_ep._topk import sigmoid_topk as sigmoid_topk
from jax_ep._topk import softmax_topk as softmax_topk
from jax_ep._types import AxisName


@jax.named_scope("jax_ep.routing.load_balance_loss")
def load_balance_loss(
    probs: Float[Array, "*tokens num_experts"],
    topk_idx: Int32[Array, "*tokens num_topk"],
    *,
    axis_name: AxisName = None,
) -> Float32[Array, ""]:
    """Measures how unevenly a router spreads its tokens; 1 when perfectly even.

    ``num_experts * sum_e f[e] * P[e]``, where ``f[e]`` is the fraction of choices that went to
    expert ``e`` and ``P[e]`` the mean of ``probs[:, e]``: equations 4 to 6 of
    https://arxiv.org/abs/2101.03961, with choices in place of tokens where ``num_topk`` is over 1.

    Args:
      probs: router probabilities, each token's summing to 1: the softmax of its logits, or sigmoid
        scores divided by their sum.
      topk_idx: what the router chose. A token with no choice in range (``DROPPED``, say, for
        padding) counts in neither ``f`` nor ``P``.
      axis_name: average ``f`` and ``P`` over the tokens of all ranks along this axis or these axes,
        so that the loss is that of all tokens together. None for this rank's tokens alone.

    Returns:
      The loss, differentiable in ``probs`` alone; 0 when no token chose anything.

    Raises:
      TypeError: ``probs`` is no array of floats, or ``topk_idx`` no array.
      ValueError: ``probs`` is a scalar, or ``probs`` and ``topk_idx`` differ in their token axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import routing
      >>> probs = jnp.array([[0.9, 0.1], [0.9, 0.1]])
      >>> round(float(routing.load_balance_loss(probs, jnp.array([[0], [0]]))), 3)
      1.8
    """
    check_logits(probs, "probs")
    _check_tokens(probs, topk_idx)
    num_experts = probs.shape[-1]
    probs = probs.reshape(-1, num_experts).astype(jnp.float32)
    topk_idx = topk_idx.reshape(-1, topk_idx.shape[-1])
    hits = jnp.sum(jax.nn.one_hot(topk_idx, num_experts, dtype=jnp.float32), axis=-2)
    is_routed = jnp.any(hits > 0, axis=-1)
    choices = _sum_over(jnp.sum(hits, axis=0), axis_name)
    prob_sum = _sum_over(jnp.sum(jnp.where(is_routed[:, None], probs, 0), axis=0), axis_name)
    num_routed = _sum_over(jnp.sum(is_routed, dtype=jnp.float32), axis_name)
    scale = num_experts / jnp.maximum(jnp.sum(choices) * num_routed, 1.0)
    return scale * jnp.sum(choices * prob_sum)


@jax.named_scope("jax_ep.routing.router_z_loss")
def router_z_loss(
    logits: Float[Array, "*tokens num_experts"],
    *,
    where: Bool[Array, "*tokens"] | None = None,
    axis_name: AxisName = None,
) -> Float32[Array, ""]:
    """Measures how large a router's logits grow, to keep them where float32 is precise.

    The mean over tokens of ``logsumexp(logits) ** 2``: equation 5 of https://arxiv.org/abs/2202.08906.

    Args:
      logits: the router's scores.
      where: the tokens that count, to leave out padding; None for all.
      axis_name: average over the tokens of all ranks along this axis or these axes. None for this
        rank's tokens alone.

    Returns:
      The loss, differentiable in ``logits``; 0 when no token counts.

    Raises:
      TypeError: ``logits`` is no array of floats, or ``where`` no array of booleans.
      ValueError: ``logits`` is a scalar, or ``where`` is not shaped as the tokens are.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import routing
      >>> round(float(routing.router_z_loss(jnp.zeros((3, 4)))), 3)  # log(4) ** 2
      1.922
    """
    check_logits(logits)
    tokens = logits.shape[:-1]
    if where is None:
        where = jnp.ones_like(logits, shape=tokens, dtype=jnp.bool_)
    check_dtype("where", where, jnp.bool_)
    check_shape("where", where, tokens, "tokens")
    squares = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    total = _sum_over(jnp.sum(jnp.where(where, squares, 0)), axis_name)
    return total / jnp.maximum(_sum_over(jnp.sum(where, dtype=jnp.float32), axis_name), 1.0)


@jax.named_scope("jax_ep.routing.update_router_bias")
def update_router_bias(
    bias: Float[Array, "num_experts"], expert_load: Num[Array, "num_experts"], rate: float
) -> Float[Array, "num_experts"]:
    """Moves the bias of ``sigmoid_topk`` one step towards an even load.

    ``bias[e] + rate * sign(mean(expert_load) - expert_load[e])``: algorithm 1 of
    https://arxiv.org/abs/2408.15664, which DeepSeek-V3 trains with.

    Args:
      bias: the bias that the load came from.
      expert_load: choices per expert over the whole batch: ``plan.expert_load``, summed over the
        mesh's other axes.
      rate: size of the step, 0.001 in DeepSeek-V3.

    Returns:
      The new bias, in the dtype of the old one.

    Raises:
      TypeError: ``bias`` or ``expert_load`` is no array.
      ValueError: they are not both ``[num_experts]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import routing
      >>> load = jnp.array([9, 3, 0])
      >>> routing.update_router_bias(jnp.zeros(3), load, 0.5).tolist()
      [-0.5, 0.5, 0.5]
    """
    check_array("bias", bias, "num_experts")
    check_array("expert_load", expert_load, "num_experts")
    check_shape("expert_load", expert_load, bias.shape, "num_experts")
    load = expert_load.astype(jnp.float32)
    step = rate * jnp.sign(jnp.mean(load) - load)
    return (bias.astype(jnp.float32) + step).astype(bias.dtype)


def _sum_over(x: jax.Array, axis_name: AxisName) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _check_tokens(probs: jax.Array, topk_idx: jax.Array) -> None:
    if not hasattr(topk_idx, "dtype"):
        raise TypeError(
            f"topk_idx must be an array [tokens, num_topk]; got {type(topk_idx).__name__}."
        )
    if topk_idx.shape[:-1] != probs.shape[:-1]:
        raise ValueError(
            "topk_idx must have the token axes of probs; got shapes "
            f"{list(topk_idx.shape)} and {list(probs.shape)}."
        )
