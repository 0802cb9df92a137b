"""What a layer's router and its shared expert make of tokens, asked outside of the layer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from jax_ep.flax import MoE


class Routed(NamedTuple):
    """Choices, their weights, and the probabilities of all experts."""

    topk_idx: Int32[Array, "*batch num_topk"]
    topk_weights: Float32[Array, "*batch num_topk"]
    probs: Float32[Array, "*batch num_experts"]


def route(
    moe: MoE,
    x: Float[Array, "*batch hidden"],
    *,
    topk_idx: Int[Array, "*batch num_topk"] | None = None,
) -> Routed:
    """Asks the layer's own router; choices that are given are only weighed."""
    router = moe.config.router
    assert router is not None
    logits = jnp.matmul(x, moe.router_kernel[...], precision=jax.lax.Precision.HIGHEST)
    bias = moe.router_bias[...] if router.has_bias else None
    chosen = router.choose(logits, moe.config.num_topk, bias=bias, topk_idx=topk_idx)
    return Routed(*chosen, router.probs(logits))


def shared_expert(moe: MoE, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """Applies the SwiGLU expert that all tokens go to; the layer makes its parameters by name."""
    w_gate, w_up, w_down = (
        getattr(moe, f"shared_{name}")[...] for name in ("w_gate", "w_up", "w_down")
    )
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down
