"""A byte-level transformer whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_ep.flax import MoE
from jax_ep.routing import Router
from moe_lm.dense import DenseMoE

VOCAB = 256

Heads: TypeAlias = Float[Array, "batch length heads width"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What fixes the shapes of a model and the way of its tokens."""

    num_layers: int = 2
    hidden: int = 128
    num_heads: int = 4
    ffn_hidden: int = 128
    num_experts: int = 16
    num_topk: int = 2
    router: Router = dataclasses.field(default_factory=Router)
    shared_hidden: int | None = None
    capacity_factor: float | None = None
    num_spares: int = 0
    axis_name: str | None = "expert"
    implementation: Literal["native", "xla", "dense"] | None = None
    wire: Literal["float8_e4m3fn", "float8_e5m2"] | None = None


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, hidden: int, num_heads: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(hidden**-0.5)
        self.qkv = nnx.Param(init(rngs.params(), (hidden, 3, num_heads, hidden // num_heads)))
        self.out = nnx.Param(init(rngs.params(), (hidden, hidden)))

    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length hidden"]:
        """Lets every position read itself and those before it."""
        q, k, v = self.project(x)
        return self.merge(jax.nn.dot_product_attention(q, k, v, is_causal=True))

    def project(
        self, x: Float[Array, "batch length hidden"], start: Int32[Array, ""] | int = 0
    ) -> tuple[Heads, Heads, Heads]:
        """Returns queries, keys and values of positions from number ``start`` on."""
        q, k, v = jnp.moveaxis(jnp.einsum("blh,hsnd->blsnd", x, self.qkv[...]), 2, 0)
        return rotate(q, start), rotate(k, start), v

    def merge(self, read: Heads) -> Float[Array, "batch length hidden"]:
        """Returns what all heads have read together."""
        return read.reshape(*read.shape[:2], -1) @ self.out[...]


def rotate(x: Heads, start: Int32[Array, ""] | int = 0) -> Heads:
    """Turns pairs of features by angles that grow with the position: https://arxiv.org/abs/2104.09864.

    The first position in ``x`` is number ``start``.
    """
    half = x.shape[-1] // 2
    rates = 1000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
    angles = positions[:, None, None] * rates
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Block(nnx.Module):
    """Attention, then experts, each added to what it reads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.attention = Attention(config.hidden, config.num_heads, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.moe = make_moe(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"]]:
        """Returns the block's output, and what its experts were given."""
        x = x + self.attention(self.attention_norm(x))
        moe_input = self.moe_norm(x)
        return x + self.moe(moe_input), moe_input


def make_moe(config: Config, *, rngs: nnx.Rngs) -> MoE:
    """Makes one layer of experts: by the exchange, or dense to compare it with."""
    sizes = (config.hidden, config.ffn_hidden, config.num_experts, config.num_topk)
    network: Any = {"router": config.router, "shared_hidden": config.shared_hidden}
    if config.implementation == "dense":
        return DenseMoE(*sizes, **network, axis_name=config.axis_name, rngs=rngs)
    return MoE(
        *sizes,
        **network,
        capacity_factor=config.capacity_factor,
        num_spares=config.num_spares,
        axis_name=config.axis_name,
        implementation=config.implementation,
        wire_dtype=config.wire,
        wire_cotangents=config.wire,
        rngs=rngs,
    )


class Transformer(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(1.0)
        self.embedding = nnx.Param(init(rngs.params(), (VOCAB, config.hidden)))
        self.blocks = nnx.List(Block(config, rngs=rngs) for _ in range(config.num_layers))
        self.norm = nnx.RMSNorm(config.hidden, rngs=rngs)
        self.unembedding = nnx.Param(jnp.zeros((config.hidden, VOCAB)))

    def __call__(self, tokens: Int32[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Returns the logits of the byte after each position."""
        return self.logits_and_moe_inputs(tokens)[0]

    def logits_and_moe_inputs(
        self, tokens: Int32[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length vocab"], list[Float[Array, "batch length hidden"]]]:
        """Returns the logits, and what each layer's experts were given."""
        x, moe_inputs = self.embedding[...][tokens], []
        for block in self.blocks:
            x, moe_input = block(x)
            moe_inputs.append(moe_input)
        return self.norm(x) @ self.unembedding[...], moe_inputs
