"""tokamax' grouped product between the exchanges, where this library has its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tokamax  # pyright: ignore[reportMissingImports]
from flax import nnx

import jax_ep.flax


class TokamaxExperts:
    """SwiGLU experts whose products are ``tokamax.ragged_dot``."""

    @property
    def dims(self):
        inward = ("hidden", "ffn_hidden")
        return {"w_gate": inward, "w_up": inward, "w_down": inward[::-1]}

    def __call__(self, rows, group_sizes, w_gate, w_up, w_down):
        gate, up = (tokamax.ragged_dot(rows, w, group_sizes) for w in (w_gate, w_up))
        return tokamax.ragged_dot(jax.nn.silu(gate) * up, w_down, group_sizes)


def test_a_layer_with_its_products():
    """Forward and backward as with ours, on a mesh where rows are left over."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (64, 16))
    results = []
    with jax.set_mesh(mesh):
        for experts in ("swiglu", TokamaxExperts()):
            layer = jax_ep.flax.MoE(16, 24, 16, 2, experts=experts, rngs=nnx.Rngs(0))
            graph, state = nnx.split(layer)

            def loss(state, x, graph=graph):
                return jnp.sum(nnx.merge(graph, state)(x) ** 2)

            value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
            results.append((value, *jax.tree.leaves(grads)))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
