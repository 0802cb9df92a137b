"""An expert layer's inputs under skewed routing, its programs, and whether they are right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import routing_steps
from jax.sharding import Mesh
from programs import over_ranks, put
from shapes import Shape

ROUTINGS = {"uniform": 0.0, "Zipf 0.3": 0.3, "Zipf 0.65": 0.65, "Zipf 1.0": 1.0}
BURSTS = "Zipf 0.65 with bursts"


def draw(shape: Shape, routing: str, seed: int = 0) -> np.ndarray:
    """Draws all ranks' choices of one step."""
    rng = np.random.default_rng(seed)
    exponent = ROUTINGS.get(routing, 0.65)
    if routing == BURSTS:
        *_, log = routing_steps.popularities(rng, 20, shape.num_experts, exponent)
    else:
        log = -exponent * np.log(rng.permutation(shape.num_experts) + 1)
    num_tokens = shape.num_ranks * shape.num_tokens
    drawn = routing_steps.choices(rng, log, num_tokens, shape.num_topk)
    return drawn.reshape(shape.num_ranks, shape.num_tokens, shape.num_topk)


def make_arrays(shape: Shape, topk_idx: np.ndarray, ffn_hidden: int) -> tuple[Any, ...]:
    """Returns tokens, choices, weights and experts of all ranks."""
    rng = np.random.default_rng(1)
    inward = (shape.num_ranks, shape.num_local_experts, shape.hidden, ffn_hidden)
    outward = (*inward[:2], ffn_hidden, shape.hidden)
    experts = [
        rng.standard_normal(size, np.float32) / size[2] ** 0.5 for size in (inward, inward, outward)
    ]
    x = rng.standard_normal((*topk_idx.shape[:2], shape.hidden), np.float32)
    return x, topk_idx, np.full(topk_idx.shape, 1 / shape.num_topk, np.float32), tuple(experts)


def place(mesh: Mesh, arrays: Any) -> Any:
    """Puts each rank's part of all arrays on its device."""
    return jax.tree.map(lambda a: put(a, mesh), arrays)


def compile_way(way: layers.Way, mesh: Mesh, arrays: Any) -> Any:
    """Compiles forward and backward; returns what calls it on arrays of all ranks."""

    def step(x, topk_idx, topk_weights, weights):
        def forward(x, topk_weights, weights):
            return way.layer(x, topk_idx, topk_weights, weights)

        out, pull, dropped = jax.vjp(forward, x, topk_weights, weights, has_aux=True)
        return out, pull(out), dropped

    program = jax.jit(step) if way.whole else over_ranks(step, mesh)
    with jax.set_mesh(mesh):
        return program.lower(*arrays).compile()


def check(shape: Shape, name: str, result: Any, want: Any) -> None:
    """Compares outputs and gradients with the dense ones, where nothing was dropped."""
    for got, exact in zip(jax.tree.leaves(result[:2]), jax.tree.leaves(want[:2]), strict=True):
        scale = float(jnp.max(jnp.abs(exact)))
        np.testing.assert_allclose(
            got, np.reshape(exact, got.shape), atol=2e-4 * scale, err_msg=f"{shape.name} {name}"
        )
