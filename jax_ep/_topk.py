"""Choosing experts and weighing them: ``softmax_topk``, ``sigmoid_topk`` and ``Router``."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._checks import check_array, check_one_of, check_positive, check_shape
from jax_ep._scores import (
    SCORES,
    Score,
    check_logits,
    check_topk,
    choose,
    log_scores,
    scores_of,
    weigh,
)


@dataclasses.dataclass(frozen=True)
class Router:
    """How experts are chosen and weighed, by their logits; ``flax.MoE`` takes one.

    The scores of a token are a function of its logits. The experts with the largest score plus
    bias are chosen, of the best groups only if there are groups, and weighed by score alone.
    ``Router()`` is ``softmax_topk``, and ``Router("sigmoid", has_bias=True)`` is ``sigmoid_topk``,
    which have the formulas.

    Attributes:
      score: ``"softmax"`` over all experts, ``"sigmoid"``, or ``"sqrt_softplus"``, the square root
        of ``log(1 + exp(logit))``.
      has_bias: whether a bias is added to scores for choosing only; ``update_router_bias`` trains
        it.
      has_logit_bias: whether the layer adds a trained bias to logits.
      num_groups: groups of neighbours that experts are divided into; 1 for no groups.
      topk_groups: groups that one token may choose from, those with the largest sum of two.
      renormalize: whether the scores of a token's choices are divided by their sum.
      scale: what weights are multiplied by.
      jitter: the layer multiplies what its router sees by numbers between ``1 - jitter`` and ``1 +
        jitter`` where a call is given ``rngs``: https://arxiv.org/abs/2101.03961.
      dtype: what the layer computes logits in; everything behind them is float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep.routing import Router
      >>> topk_idx, topk_weights = Router("sigmoid", scale=2.5).choose(jnp.zeros((1, 4)), 2)
      >>> topk_idx.tolist(), topk_weights.tolist()
      ([[0, 1]], [[1.25, 1.25]])
    """

    score: Score = "softmax"
    has_bias: bool = False
    has_logit_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0
    jitter: float = 0.0
    dtype: jax.typing.DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks what can be checked before there are logits.

        Raises:
          TypeError: a count is no int.
          ValueError: an option is out of range.
        """
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be one of floats; got {self.dtype}.")
        check_one_of("score", self.score, SCORES)
        check_positive("num_groups", self.num_groups)
        check_positive("topk_groups", self.topk_groups)
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite; got {self.scale}.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1; got {self.jitter}.")

    def choose(
        self,
        logits: Float[Array, "*tokens num_experts"],
        num_topk: int,
        *,
        bias: Float[Array, "num_experts"] | None = None,
        topk_idx: Int32[Array, "*tokens num_topk"] | None = None,
    ) -> tuple[Int32[Array, "*tokens num_topk"], Float32[Array, "*tokens num_topk"]]:
        """Chooses experts and weighs them.

        Args:
          logits: the router's scores before ``score``.
          num_topk: choices per token, at most the experts of ``topk_groups`` groups.
          bias: for choosing only, so it has no gradient; to be given if ``has_bias``.
          topk_idx: choices that were made already, and are only weighed; None to choose.

        Returns:
          The chosen experts by descending score plus bias, of equal ones the lowest index first,
          or ``topk_idx`` as it is; and their weights, differentiable in ``logits``, zero for what
          is no expert.

        Raises:
          TypeError: ``logits``, ``bias`` or ``topk_idx`` is no array of numbers as asked for, or a
            count is no int.
          ValueError: shapes do not fit one another, ``bias`` is given or missing against
            ``has_bias``, or a count is out of range.
        """
        check_logits(logits)
        num_experts = logits.shape[-1]
        check_topk(num_topk, self.num_groups, self.topk_groups, num_experts)
        if (bias is not None) != self.has_bias:
            raise ValueError(
                f"bias must be {'given' if self.has_bias else 'None'} with has_bias="
                f"{self.has_bias}; got {'None' if bias is None else 'one'}."
            )
        if topk_idx is None:
            topk_idx = self._chosen(logits, num_topk, bias)
        elif not hasattr(topk_idx, "dtype") or not jnp.issubdtype(topk_idx.dtype, jnp.integer):
            raise TypeError(f"topk_idx must be an array of integers, or None; got {topk_idx!r}.")
        else:
            wanted = (*logits.shape[:-1], num_topk)
            check_shape("topk_idx", topk_idx, wanted, "tokens, num_topk")
        log_score = log_scores(logits, self.score, normalize=not self.renormalize)
        weights = weigh(log_score, topk_idx, renormalize=self.renormalize, scale=self.scale)
        return topk_idx.astype(jnp.int32), weights

    def _chosen(
        self,
        logits: jax.Array,
        num_topk: int,
        bias: jax.Array | None,
    ) -> jax.Array:
        if bias is None and self.num_groups == self.topk_groups:
            # In the order of logits, which scores may round to equal numbers.
            return choose(logits.astype(jnp.float32), num_topk, 1, 1)
        scores = scores_of(logits, self.score)
        if bias is not None:
            check_array("bias", bias, "num_experts")
            check_shape("bias", bias, (logits.shape[-1],), "num_experts")
            scores += bias.astype(jnp.float32)
        return choose(jax.lax.stop_gradient(scores), num_topk, self.num_groups, self.topk_groups)

    def probs(
        self, logits: Float[Array, "*tokens num_experts"]
    ) -> Float32[Array, "*tokens num_experts"]:
        """Returns each token's scores of all experts, divided by their sum.

        Args:
          logits: the router's scores before ``score``.

        Returns:
          What ``load_balance_loss`` takes, exact even where scores underflow.

        Raises:
          TypeError: ``logits`` is no array of floats.
          ValueError: ``logits`` is a scalar.
        """
        check_logits(logits)
        return jax.nn.softmax(log_scores(logits, self.score, normalize=False), axis=-1)


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
    return Router(renormalize=renormalize).choose(logits, num_topk)


@jax.named_scope("jax_ep.routing.sigmoid_topk")
def sigmoid_topk(
    logits: Float[Array, "*tokens num_experts"],
    bias: Float[Array, "num_experts"],
    num_topk: int,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Int32[Array, "*tokens num_topk"], Float32[Array, "*tokens num_topk"]]:
    """Chooses experts by sigmoid score plus bias, in the best groups, and weighs by score alone.

    The score of expert ``e`` is ``sigmoid(logits)[e]``. Experts are ``num_groups`` groups of
    neighbours; a group's value is the sum of its two largest ``score + bias``, and only the
    ``topk_groups`` best groups are chosen from. The weight of a chosen expert is its score, with
    ``renormalize`` divided by the sum of the chosen ones' scores, times ``scale``. As in
    DeepSeek-V3, section 2.1.2: https://arxiv.org/abs/2412.19437.

    Args:
      logits: the router's scores before the sigmoid.
      bias: added to the scores for choosing only, so it has no gradient; ``update_router_bias``
        trains it.
      num_topk: choices per token, at most the experts of ``topk_groups`` groups.
      num_groups: groups that the experts are divided into; 1 for no groups.
      topk_groups: groups that one token may choose from.
      renormalize: whether a token's weights sum to ``scale``.
      scale: what weights are multiplied by.

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
    check_array("bias", bias, "num_experts")
    router = Router(
        "sigmoid",
        has_bias=True,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        scale=scale,
    )
    return router.choose(logits, num_topk, bias=bias)
