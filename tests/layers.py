"""A small expert layer through the library, and the same layer without any exchange."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import strategies
from implementations import Row
from jax.sharding import NamedSharding, PartitionSpec
from strategies import Shape

import jax_ep

SHAPE = Shape(capacity=20)


def experts(rows: jax.Array, group_sizes: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies ``tanh(scale[expert] * row)``: not linear, and different for every expert."""
    per_row = jnp.repeat(scale, group_sizes, total_repeat_length=rows.shape[0])
    return jnp.tanh(per_row[:, None] * rows)


def layer(
    make_plan: Callable[..., jax_ep.Plan],
    x: jax.Array,
    topk_idx: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Computes one rank's layer; ``scale`` [L] belongs to its experts."""
    plan = make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)
    rows = experts(jax_ep.dispatch(x, plan), plan.group_sizes, scale)
    return jax_ep.combine(rows, plan, weights)


def make_plan(row: Row, topk_idx: jax.Array) -> jax_ep.Plan:
    return row.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)


def outside(f, row: Row):
    """Compiles ``f`` of all ranks with its gradients, taken outside the ranks."""

    def run(x, topk_idx, weights, scale, dout):
        all_ranks = row.over_ranks(f, SHAPE.num_ranks)
        out, pull = jax.vjp(lambda x, w, s: all_ranks(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return jax.jit(run)


def inside(f, row: Row):
    """Compiles ``f`` of all ranks with its gradients, taken on every rank."""

    def run(x, topk_idx, weights, scale, dout):
        out, pull = jax.vjp(lambda x, w, s: f(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return row.jit(run, SHAPE.num_ranks)


def dense(x, topk_idx, weights, scale, kept) -> jax.Array:
    """Computes the layer of all ranks [R, T, H] from the dense formula; ``scale`` is [R, L]."""
    per_choice = scale.reshape(-1)[jnp.where(kept, topk_idx, 0)]
    tokens = jnp.tanh(per_choice[..., None] * x[:, :, None])
    return jnp.sum(jnp.where(kept, weights, 0.0)[..., None] * tokens, axis=2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of a layer for all ranks, with what it must give and its gradients."""

    x: np.ndarray
    topk_idx: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    dout: np.ndarray

    @classmethod
    def of(cls, seed: int, shape: Shape = SHAPE) -> Problem:
        rng = np.random.default_rng(seed)
        shift = np.int32(seed % shape.num_experts)
        topk_idx = strategies.distinct(shape)
        topk_idx = np.where(topk_idx < 0, topk_idx, (topk_idx + shift) % shape.num_experts)
        width = (*topk_idx.shape[:2], shape.hidden)
        return cls(
            x=rng.normal(size=width).astype(np.float32),
            topk_idx=topk_idx.astype(np.int32),
            weights=rng.normal(size=topk_idx.shape).astype(np.float32),
            scale=rng.normal(size=(shape.num_ranks, shape.num_local_experts)).astype(np.float32),
            dout=rng.normal(size=width).astype(np.float32),
        )

    @property
    def args(self) -> tuple[np.ndarray, ...]:
        return self.x, self.topk_idx, self.weights, self.scale

    def expect(self) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the result, and its gradients in x, weights and scale weighed by ``dout``."""
        kept = SHAPE.plan(self.topk_idx).kept
        return reference(
            _dense_of, (self.x, self.weights, self.scale), self.dout, self.topk_idx, kept
        )


def _dense_of(x, weights, scale, topk_idx, kept):
    return dense(x, topk_idx, weights, scale, kept)


def reference(
    f: Callable[..., jax.Array],
    primals: tuple[np.ndarray, ...],
    dout: np.ndarray,
    *rest: np.ndarray,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns ``f(*primals, *rest)`` and its gradients in the primals, weighed by ``dout``."""
    return _value_and_pulled(f, primals, dout, rest)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_pulled(f, primals, dout, rest):
    out, pull = jax.vjp(lambda *p: f(*p, *rest), *primals)
    return out, pull(dout)


def whole(a: jax.Array) -> jax.Array:
    """Returns a global array as each process can read it."""
    if getattr(a, "is_fully_addressable", True):
        return a
    assert isinstance(a.sharding, NamedSharding)
    everywhere = NamedSharding(a.sharding.mesh, PartitionSpec())
    return jax.jit(lambda a: a, out_shardings=everywhere)(a)


def close(got: object, want: object) -> None:
    """Asserts that trees of arrays agree to float32's accuracy."""

    def check(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(whole(a), b, rtol=2e-5, atol=2e-5)

    jax.tree.map(check, got, want)
