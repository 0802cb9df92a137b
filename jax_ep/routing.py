"""Routers: from logits to choices and weights, their auxiliary losses, and loss-free balancing.

Everything here is computed in float32, whatever the dtype of the logits, and apart from the means
over ``axis_name`` it is local arithmetic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Num

from jax_ep._checks import check_array, check_dtype, check_positive, check_shape
from jax_ep._types import AxisName


@jax.named_scope("jax_ep.routing.softmax_topk")
def softmax_topk(
    logits: Float[Array, "*tokens num_experts"], num_topk: int, *, renormalize: bool = True
) -> tuple[Int32[Array, "*tokens num_topk"], Float32[Array, "*tokens num_topk"]]:
    """Chooses the experts of the largest logits and weighs them by their softmax.

    The weight of expert ``e`` is ``softmax(logits)[e]`` over all experts; with ``renormalize`` it
    is divided by the sum of the chosen ones' weights, as in https://arxiv.org/abs/2401.04088.

    Args:
      logits: the router's scores; at least as many experts as ``num_topk``.
      num_topk: choices per token.
      renormalize: whether the weights of each token sum to 1.

    Returns:
      The chosen experts by descending logit, of equal ones the lowest index first, and their
      weights, differentiable in ``logits``.

    Raises:
      TypeError: ``logits`` is no array of floats, or ``num_topk`` is not an int.
      ValueError: ``logits`` is a scalar, or ``num_topk`` is below 1 or above the number of experts.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import routing
      >>> topk_idx, topk_weights = routing.softmax_topk(jnp.log(jnp.array([[1.0, 2.0, 6.0]])), 2)
      >>> topk_idx.tolist(), [f"{w:.2f}" for w in topk_weights[0].tolist()]
      ([[2, 1]], ['0.75', '0.25'])
    """
    _check_logits(logits)
    _check_count("num_topk", num_topk, "num_experts", logits.shape[-1])
    logits = logits.astype(jnp.float32)
    chosen_logits, topk_idx = jax.lax.top_k(logits, num_topk)
    if renormalize:
        return topk_idx, jax.nn.softmax(chosen_logits, axis=-1)
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return topk_idx, jnp.exp(chosen_logits - log_total)


@jax.named_scope("jax_ep.routing.sigmoid_topk")
def sigmoid_topk(
    logits: Float[Array, "*tokens num_experts"],
    bias: Float[Array, "num_experts"],
    num_topk: int,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Int32[Array, "*tokens num_topk"], Float32[Array, "*tokens num_topk"]]:
    """Chooses experts by sigmoid score plus bias, in the best groups, and weighs by score alone.

    The score of expert ``e`` is ``sigmoid(logits)[e]``. Experts are ``num_groups`` groups of
    neighbours; a group's value is the sum of its two largest ``score + bias``, and only the
    ``topk_groups`` best groups are chosen from. The weight of a chosen expert is its score divided
    by the sum of the chosen ones' scores, times ``scale``. As in DeepSeek-V3, section 2.1.2:
    https://arxiv.org/abs/2412.19437.

    Args:
      logits: the router's scores before the sigmoid.
      bias: added to the scores for choosing only, so it has no gradient; ``update_router_bias``
        trains it.
      num_topk: choices per token, at most the experts of ``topk_groups`` groups.
      num_groups: groups that the experts are divided into; 1 for no groups.
      topk_groups: groups that one token may choose from.
      scale: what each token's weights sum to.

    Returns:
      The chosen experts by descending ``score + bias``, of equal ones the lowest index first, and
      their weights, differentiable in ``logits``.

    Raises:
      TypeError: ``logits`` or ``bias`` is no array, ``logits`` holds no floats, or a count is no
        int.
      ValueError: ``logits`` is a scalar; ``bias`` is not ``[num_experts]``; ``num_groups`` does not
        divide the number of experts; or a count is below 1 or above what there is to choose from.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import routing
      >>> logits, bias = jnp.array([[2.0, 0.0, 0.0, 2.0]]), jnp.array([0.0, 0.0, 0.9, 0.0])
      >>> topk_idx, topk_weights = routing.sigmoid_topk(logits, bias, 2, num_groups=2)
      >>> topk_idx.tolist(), [f"{w:.2f}" for w in topk_weights[0].tolist()]
      ([[2, 3]], ['0.36', '0.64'])
    """
    _check_logits(logits)
    num_experts = logits.shape[-1]
    check_array("bias", bias, "num_experts")
    check_shape("bias", bias, (num_experts,), "num_experts")
    check_positive("num_groups", num_groups)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts; got {num_groups}.")
    _check_count("topk_groups", topk_groups, "num_groups", num_groups)
    eligible = num_experts // num_groups * topk_groups
    _check_count("num_topk", num_topk, "the experts of topk_groups groups", eligible)
    logits = logits.astype(jnp.float32)
    biased = jax.lax.stop_gradient(jax.nn.sigmoid(logits) + bias.astype(jnp.float32))
    _, topk_idx = jax.lax.top_k(_mask_groups(biased, num_groups, topk_groups), num_topk)
    chosen_logits = jnp.take_along_axis(logits, topk_idx, axis=-1)
    # A softmax of log scores divides the scores by their sum even where they underflow to zero.
    return topk_idx, scale * jax.nn.softmax(jax.nn.log_sigmoid(chosen_logits), axis=-1)


def _mask_groups(biased: jax.Array, num_groups: int, topk_groups: int) -> jax.Array:
    """Puts ``-inf`` in place of the values of all but the best groups."""
    if num_groups == topk_groups:
        return biased
    grouped = biased.reshape(*biased.shape[:-1], num_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, group_idx = jax.lax.top_k(jnp.sum(best_two, axis=-1), topk_groups)
    keep = jnp.any(jax.nn.one_hot(group_idx, num_groups, dtype=jnp.bool_), axis=-2)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(biased.shape)


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
    _check_logits(probs, "probs")
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
    _check_logits(logits)
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


def _check_logits(logits: jax.Array, name: str = "logits") -> None:
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        given = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"{name} must be an array [tokens, num_experts] of floats; got {given}.")
    if logits.ndim < 1:
        raise ValueError(f"{name} must have shape [tokens, num_experts]; got [].")


def _check_count(name: str, count: int, of_name: str, limit: int) -> None:
    check_positive(name, count)
    if count > limit:
        raise ValueError(f"{name} must be at most {of_name} = {limit}; got {count}.")


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
