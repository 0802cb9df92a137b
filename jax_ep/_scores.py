"""What a router's logits are turned into, to choose by and to weigh by."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._checks import check_positive

Score: TypeAlias = Literal["softmax", "sigmoid", "sqrt_softplus"]

SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")


def scores_of(
    logits: Float[Array, "*tokens num_experts"], score: Score
) -> Float32[Array, "*tokens num_experts"]:
    """Returns all experts' scores."""
    logits = logits.astype(jnp.float32)
    match score:
        case "softmax":
            return jax.nn.softmax(logits, axis=-1)
        case "sigmoid":
            return jax.nn.sigmoid(logits)
        case "sqrt_softplus":
            return jnp.sqrt(jax.nn.softplus(logits))


def log_scores(
    logits: Float[Array, "*tokens num_experts"], score: Score, *, normalize: bool = True
) -> Float32[Array, "*tokens num_experts"]:
    """Returns the logarithms of all experts' scores, exact where the scores underflow.

    Without ``normalize`` a token's may all be off by the same number, which is less work.
    """
    logits = logits.astype(jnp.float32)
    match score:
        case "softmax":
            return jax.nn.log_softmax(logits, axis=-1) if normalize else logits
        case "sigmoid":
            return jax.nn.log_sigmoid(logits)
        case "sqrt_softplus":
            # log(softplus(x)) is x where e**x is all that softplus has left.
            small = logits < -15
            inner = jnp.log(jax.nn.softplus(jnp.where(small, 0.0, logits)))
            return 0.5 * jnp.where(small, logits, inner)


def choose(
    biased: Float32[Array, "*tokens num_experts"],
    num_topk: int,
    num_groups: int,
    topk_groups: int,
) -> Int32[Array, "*tokens num_topk"]:
    """Returns the experts of the largest values in the best groups, of equal ones the first.

    A group's value is the sum of its two largest.
    """
    if num_groups != topk_groups:
        grouped = biased.reshape(*biased.shape[:-1], num_groups, -1)
        best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, group_idx = jax.lax.top_k(jnp.sum(best_two, axis=-1), topk_groups)
        keep = jnp.any(jax.nn.one_hot(group_idx, num_groups, dtype=jnp.bool_), axis=-2)
        biased = jnp.where(keep[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return jax.lax.top_k(biased, num_topk)[1]


def weigh(
    log_score: Float32[Array, "*tokens num_experts"],
    topk_idx: Int32[Array, "*tokens num_topk"],
    *,
    renormalize: bool,
    scale: float,
) -> Float32[Array, "*tokens num_topk"]:
    """Returns the scores of the chosen experts, or their shares of the sum of these, times scale.

    What is no expert is weighed by zero.
    """
    is_expert = (topk_idx >= 0) & (topk_idx < log_score.shape[-1])
    chosen = jnp.take_along_axis(log_score, jnp.where(is_expert, topk_idx, 0), axis=-1)
    if renormalize:
        # A softmax of logarithms divides scores by their sum even where they underflow to zero.
        least = jnp.finfo(jnp.float32).min
        weights = jax.nn.softmax(jnp.where(is_expert, chosen, least), axis=-1)
    else:
        weights = jnp.exp(chosen)
    return scale * jnp.where(is_expert, weights, 0.0)


def check_logits(logits: Any, name: str = "logits") -> None:
    """Checks scores of a router.

    Raises:
      TypeError: they are no array of floats.
      ValueError: they are a scalar.
    """
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        given = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"{name} must be an array [tokens, num_experts] of floats; got {given}.")
    if logits.ndim < 1:
        raise ValueError(f"{name} must have shape [tokens, num_experts]; got [].")


def check_topk(num_topk: int, num_groups: int, topk_groups: int, num_experts: int) -> None:
    """Checks that there is enough to choose from.

    Raises:
      TypeError: a count is no int.
      ValueError: ``num_groups`` does not divide the experts, or a count is below 1 or above what
        there is to choose from.
    """
    check_positive("num_groups", num_groups)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts; got {num_groups}.")
    _check_at_most("topk_groups", topk_groups, "num_groups", num_groups)
    of = "num_experts" if num_groups == 1 else "the experts of topk_groups groups"
    _check_at_most("num_topk", num_topk, of, num_experts // num_groups * topk_groups)


def _check_at_most(name: str, count: int, of_name: str, limit: int) -> None:
    check_positive(name, count)
    if count > limit:
        raise ValueError(f"{name} must be at most {of_name} = {limit}; got {count}.")
