"""A layer in whole numbers, whose dense formula every implementation meets bit for bit.

All sums are far below 2**24, so no order of adding them rounds, and a single wrong row shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exchanges import same_bits
from implementations import Row
from strategies import Shape

import jax_ep

SHAPE = Shape(num_tokens=4, num_topk=2, hidden=3, capacity=9)
R = SHAPE.num_ranks
MOST_TURNS = 300
Program = Callable[..., Any]


def make_plan(row: Row, topk_idx: jax.Array, shape: Shape = SHAPE) -> jax_ep.Plan:
    return row.make_plan(
        topk_idx,
        num_experts=shape.num_experts,
        capacity=shape.capacity,
        alignment=shape.alignment,
        tail=shape.tail,
        ranks_per_node=shape.ranks_per_node,
    )


def layer(plan: jax_ep.Plan, x: jax.Array, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies each row by its expert's number: ``scale`` [L] are those of this rank."""
    rows = jax_ep.dispatch(x, plan)
    per_row = jnp.repeat(scale, plan.group_sizes, total_repeat_length=rows.shape[0])
    return jax_ep.combine(per_row[:, None] * rows, plan, weights)


def forward_and_back(plan: jax_ep.Plan, x, weights, scale, dout) -> dict[str, jax.Array]:
    """Returns a layer's result and the gradients that come back to this rank."""
    out, pull = jax.vjp(lambda x, w, s: layer(plan, x, w, s), x, weights, scale)
    return {"out": out, **dict(zip(("dx", "dweights", "dscale"), pull(dout), strict=True))}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """One problem of all ranks, [R, ...] each, or several with further axes in between."""

    topk_idx: np.ndarray
    x: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    dout: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, shape: Shape = SHAPE) -> Numbers:
        def whole(*dims: int) -> np.ndarray:
            return rng.integers(-8, 9, dims).astype(np.float32)

        r, t, k = shape.topk_shape
        return cls(
            topk_idx=rng.integers(-1, shape.num_experts, (r, t, k), np.int32),
            x=whole(r, t, shape.hidden),
            weights=whole(r, t, k),
            scale=whole(r, shape.num_local_experts),
            dout=whole(r, t, shape.hidden),
        )

    @property
    def args(self) -> tuple[np.ndarray, ...]:
        return self.topk_idx, self.x, self.weights, self.scale, self.dout

    def expect(self, shape: Shape = SHAPE) -> dict[str, np.ndarray]:
        """Computes what ``forward_and_back`` gives, from the dense formula."""
        kept = shape.plan(self.topk_idx).kept
        scale = self.scale.reshape(-1)[np.where(kept, self.topk_idx, 0)]
        weights = np.where(kept, self.weights, 0)
        factor = (weights * scale).sum(axis=2, keepdims=True)
        dots = (self.x * self.dout).sum(axis=2, keepdims=True)
        dscale = np.zeros(shape.num_experts, np.float32)
        np.add.at(dscale, self.topk_idx[kept], (weights * dots)[kept])
        return {
            "out": factor * self.x,
            "dx": factor * self.dout,
            "dweights": np.where(kept, scale * dots, 0),
            "dscale": dscale.reshape(self.scale.shape),
        }


def stack(items: list[Any], axis: int) -> Any:
    """Stacks equal trees of arrays along a new axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays, axis), *items)


def draw_many(
    rng: np.random.Generator, count: int, axis: int = 1
) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
    """Draws problems, stacked with their answers behind the axis of ranks or elsewhere."""
    numbers = [Numbers.draw(rng) for _ in range(count)]
    return (
        stack([n.args for n in numbers], axis),
        stack([n.expect() for n in numbers], axis),
    )


def same(got: dict[str, Any], want: dict[str, np.ndarray]) -> None:
    """Asserts equal values to the bit, but for the signs of zeros."""
    assert got.keys() == want.keys()
    for name, values in want.items():
        zero = np.float32(0)
        same_bits(np.asarray(got[name]) + zero, values.astype(np.float32) + zero, name)


def inside(row: Row, make: Program, use: Program, num_ranks: int) -> Program:
    """Every rank makes a batch of plans in one vmap, and uses it in another."""

    def per_rank(topk_idx, *args):
        return jax.vmap(use)(jax.vmap(make)(topk_idx), *args)

    return row.over_ranks(per_rank, num_ranks)


def outside(row: Row, make: Program, use: Program, num_ranks: int) -> Program:
    """Plans of a batch of whole groups leave their vmap, and enter another."""
    plan = row.over_ranks(make, num_ranks)
    run = row.over_ranks(use, num_ranks)

    def all_groups(topk_idx, *args):
        plans = jax.vmap(plan, in_axes=1)(topk_idx)
        return jax.vmap(run, in_axes=(0, *(1,) * len(args)), out_axes=1)(plans, *args)

    return all_groups


def made_inside_used_outside(row: Row, make: Program, use: Program, num_ranks: int) -> Program:
    plan = row.over_ranks(jax.vmap(make), num_ranks)
    run = jax.vmap(row.over_ranks(use, num_ranks), in_axes=1, out_axes=1)
    return lambda topk_idx, *args: run(plan(topk_idx), *args)


def made_outside_used_inside(row: Row, make: Program, use: Program, num_ranks: int) -> Program:
    plan = jax.vmap(row.over_ranks(make, num_ranks), 1, 1)
    run = row.over_ranks(jax.vmap(use), num_ranks)
    return lambda topk_idx, *args: run(plan(topk_idx), *args)


PLACES = [inside, outside, made_inside_used_outside, made_outside_used_inside]
