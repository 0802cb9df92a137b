"""The compiled programs that benchmarks time: exchanges over one device per rank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from baselines import Baseline
from jax.sharding import Mesh
from shapes import Shape

import jax_ep
import jax_ep.testing
from jax_ep import _programs
from jax_ep._programs import AXIS as AXIS
from jax_ep._programs import over_ranks as over_ranks
from jax_ep._programs import put as put

Implementation = Literal["xla", "native"]
Tail = Literal["zero", "uninitialized"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an exchange is given, on all ranks: NumPy or JAX arrays [R, T, ...]."""

    x: Any
    topk_idx: Any
    topk_weights: Any

    def on(self, mesh: Mesh) -> Inputs:
        """Puts each rank's part on its device."""
        return Inputs(*(put(array, mesh) for array in self.as_tuple()))

    def as_tuple(self) -> tuple[Any, Any, Any]:
        return self.x, self.topk_idx, self.topk_weights


def make_inputs(shape: Shape, zipf_exponent: float, *, seed: int = 0) -> Inputs:
    """Draws tokens, weights that sum to 1, and choices as skewed as Zipf's law with an exponent."""
    rng = np.random.default_rng(seed)
    topk_idx = jax_ep.testing.zipf_routing(
        rng,
        num_ranks=shape.num_ranks,
        num_tokens=shape.num_tokens,
        num_experts=shape.num_experts,
        num_topk=shape.num_topk,
        exponent=zipf_exponent,
    )
    weights = rng.random(topk_idx.shape, np.float32)
    tokens = rng.standard_normal((*topk_idx.shape[:2], shape.hidden), np.float32)
    return Inputs(
        tokens.astype(shape.dtype), topk_idx, weights / weights.sum(axis=-1, keepdims=True)
    )


def make_mesh(num_ranks: int) -> Mesh:
    return _programs.make_mesh(jax.devices()[:num_ranks])


def planner(
    shape: Shape, implementation: Implementation, tail: Tail, ranks_per_node: int = 1
) -> Callable[[jax.Array], jax_ep.Plan]:
    """Returns ``make_plan`` of one rank."""
    return functools.partial(
        jax_ep.make_plan,
        num_experts=shape.num_experts,
        axis_name=AXIS,
        capacity=shape.capacity,
        tail=tail,
        ranks_per_node=ranks_per_node,
        implementation=implementation,
    )


def exchange(make_plan: Callable[[jax.Array], jax_ep.Plan]) -> Callable[..., jax.Array]:
    """Returns plan, dispatch and combine of one rank, with experts that do nothing."""

    def per_rank(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        plan = make_plan(topk_idx)
        rows = jax_ep.dispatch(x, plan)
        # Rows are there for experts to read: without any, XLA could skip making them.
        rows = jax.lax.optimization_barrier(rows)
        return jax_ep.combine(rows, plan, topk_weights)

    return per_rank


def baseline_exchange(baseline: Baseline) -> Callable[..., jax.Array]:
    """Returns a baseline of one rank, with experts that do nothing."""

    def per_rank(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        result = baseline(
            x, topk_idx, topk_weights, lambda rows, _: jax.lax.optimization_barrier(rows)
        )
        return result.out

    return per_rank


def baseline_with_experts(baseline: Baseline, shape: Shape) -> Callable[..., Any]:
    """Returns a baseline of one rank with experts that differ, and which choices it kept.

    Each expert scales rows by ``expert_scale``.
    """

    def per_rank(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> Any:
        first = jax.lax.axis_index(AXIS) * shape.num_local_experts

        def experts(rows: jax.Array, local_expert: jax.Array) -> jax.Array:
            scale = expert_scale(first + local_expert)
            return (scale[:, None] * rows.astype(jnp.float32)).astype(rows.dtype)

        return baseline(x, topk_idx, topk_weights, experts)

    return per_rank


def expert_scale(expert: Any) -> Any:
    """Returns a factor that tells experts apart and that every float dtype holds exactly."""
    return 0.5 + 0.25 * (expert % 4)
