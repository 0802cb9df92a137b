"""Text from a trained model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32, Key


@partial(jax.jit, static_argnames=("graph", "num_bytes"))
def continue_text(
    graph: nnx.GraphDef,
    state: nnx.State,
    prompts: Int32[Array, "batch length"],
    key: Key[Array, ""],
    *,
    num_bytes: int,
    temperature: float = 0.7,
) -> Int32[Array, "batch num_bytes"]:
    """Draws the bytes that follow each prompt, one after the other.

    The model always reads as many bytes as the prompt has: there is nothing to pad, so
    nothing but text takes room at the experts.
    """
    model = nnx.merge(graph, state)

    def extend(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window)[:, -1]
        drawn = jax.random.categorical(key, logits / temperature)
        drawn = drawn.astype(jnp.int32)
        return jnp.concatenate([window[:, 1:], drawn[:, None]], axis=1), drawn

    _, drawn = jax.lax.scan(extend, prompts, jax.random.split(key, num_bytes))
    return drawn.T
