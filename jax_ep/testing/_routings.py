"""Random routings: what routers of all tempers would ask for, on every rank at once."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

Routing = Int32[np.ndarray, "num_ranks num_tokens num_topk"]

_DROPPED = -1


def uniform_routing(
    rng: np.random.Generator,
    *,
    num_ranks: int,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
) -> Routing:
    """Draws each token's experts with equal chances.

    Args:
      rng: where the randomness comes from; equal states give equal routings.
      num_ranks: length of the expert axis.
      num_tokens: tokens of each rank.
      num_experts: experts of all ranks together.
      num_topk: choices of each token, all distinct.

    Returns:
      The ``topk_idx`` of every rank.

    Raises:
      ValueError: ``num_topk`` exceeds ``num_experts``.

    >>> routing = uniform_routing(
    ...     np.random.default_rng(0), num_ranks=4, num_tokens=16, num_experts=8, num_topk=2
    ... )
    >>> routing.shape, routing.dtype
    ((4, 16, 2), dtype('int32'))
    """
    return _draw(rng, np.zeros(num_experts), (num_ranks, num_tokens), num_topk)


def zipf_routing(
    rng: np.random.Generator,
    *,
    num_ranks: int,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    exponent: float,
) -> Routing:
    """Draws each token's experts with chances that follow Zipf's law.

    The ``i``-th most popular expert (from 1) has weight ``i ** -exponent``; a token draws its
    experts one after the other without replacement. Which expert is how popular is random too,
    and the same on every rank, so that hot experts fall on random ranks. Measured routers look
    like exponents of 0.2 to 0.7; 0 is uniform.

    Args:
      rng: where the randomness comes from; equal states give equal routings.
      num_ranks: length of the expert axis.
      num_tokens: tokens of each rank.
      num_experts: experts of all ranks together.
      num_topk: choices of each token, all distinct, the first drawn first.
      exponent: the skew; not negative.

    Returns:
      The ``topk_idx`` of every rank.

    Raises:
      ValueError: ``num_topk`` exceeds ``num_experts``, or ``exponent`` is negative.

    >>> rng = np.random.default_rng(0)
    >>> routing = zipf_routing(
    ...     rng, num_ranks=4, num_tokens=1000, num_experts=64, num_topk=1, exponent=1.0
    ... )
    >>> load = np.bincount(routing.ravel(), minlength=64)
    >>> bool(load.max() > 8 * load.mean())
    True
    """
    if exponent < 0:
        raise ValueError(f"exponent must not be negative; got {exponent}.")
    popularity = rng.permutation(num_experts) + 1
    return _draw(rng, -exponent * np.log(popularity), (num_ranks, num_tokens), num_topk)


def k_hot_routing(
    rng: np.random.Generator,
    *,
    num_ranks: int,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    num_hot: int,
) -> Routing:
    """Sends all tokens to a few hot experts, drawn once and the same on every rank.

    With ``num_hot == num_topk`` every token asks for the same experts; most ranks of a long
    expert axis then receive nothing.

    Args:
      rng: where the randomness comes from; equal states give equal routings.
      num_ranks: length of the expert axis.
      num_tokens: tokens of each rank.
      num_experts: experts of all ranks together.
      num_topk: choices of each token, all distinct.
      num_hot: how many experts get any token, with equal chances.

    Returns:
      The ``topk_idx`` of every rank.

    Raises:
      ValueError: ``num_hot`` is not within ``num_topk`` to ``num_experts``.

    >>> rng = np.random.default_rng(0)
    >>> routing = k_hot_routing(
    ...     rng, num_ranks=4, num_tokens=100, num_experts=64, num_topk=2, num_hot=3
    ... )
    >>> np.unique(routing).size
    3
    """
    if not num_topk <= num_hot <= num_experts:
        raise ValueError(
            f"num_hot must lie within num_topk ({num_topk}) to num_experts ({num_experts}); "
            f"got {num_hot}."
        )
    hot = rng.choice(num_experts, size=num_hot, replace=False).astype(np.int32)
    return hot[_draw(rng, np.zeros(num_hot), (num_ranks, num_tokens), num_topk)]


def routing_with_holes(
    rng: np.random.Generator,
    *,
    num_ranks: int,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    hole_fraction: float = 0.25,
) -> Routing:
    """Draws a uniform routing in which some choices go nowhere.

    Each choice by itself is replaced by -1 (``jax_ep.DROPPED``) with probability
    ``hole_fraction``, so that holes come at any place of a token, and some tokens keep nothing.

    Args:
      rng: where the randomness comes from; equal states give equal routings.
      num_ranks: length of the expert axis.
      num_tokens: tokens of each rank.
      num_experts: experts of all ranks together.
      num_topk: choices of each token; those that are no holes are distinct.
      hole_fraction: from 0 (no holes) to 1 (nothing else).

    Returns:
      The ``topk_idx`` of every rank.

    Raises:
      ValueError: ``num_topk`` exceeds ``num_experts``, or ``hole_fraction`` is outside 0 to 1.

    >>> rng = np.random.default_rng(0)
    >>> routing = routing_with_holes(rng, num_ranks=2, num_tokens=4, num_experts=8, num_topk=2)
    >>> int((routing == -1).sum())
    2
    """
    if not 0 <= hole_fraction <= 1:
        raise ValueError(f"hole_fraction must lie within 0 to 1; got {hole_fraction}.")
    routing = _draw(rng, np.zeros(num_experts), (num_ranks, num_tokens), num_topk)
    routing[rng.random(routing.shape) < hole_fraction] = _DROPPED
    return routing


def _draw(
    rng: np.random.Generator, log_weights: np.ndarray, shape: tuple[int, int], num_topk: int
) -> Routing:
    """Draws from weighted experts without replacement, for each token."""
    num_ranks, num_tokens = shape
    num_experts = log_weights.size
    if num_topk > num_experts:
        raise ValueError(
            f"num_topk must not exceed num_experts ({num_experts}), as a token's choices are "
            f"distinct; got {num_topk}."
        )
    routing = np.empty((num_ranks, num_tokens, num_topk), np.int32)
    for rank in range(num_ranks):
        # The largest of weights perturbed by Gumbel noise are such a draw, in order
        # (https://arxiv.org/abs/1903.06059).
        keys = log_weights + rng.gumbel(size=(num_tokens, num_experts))
        routing[rank] = np.argsort(-keys, axis=-1)[:, :num_topk]
    return routing
