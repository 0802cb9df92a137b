"""Prompts read at once, then a token after the other, with keys and values kept of all before."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key

from moe_lm import meshes
from moe_lm.model import VOCAB, Attention, Config, Heads, Transformer

END = ord("\n")
"""The byte that ends a sequence."""

_TEMPERATURE = 0.7

State: TypeAlias = Any


class Cache(NamedTuple):
    """What one layer's attention reads of the tokens so far: [batch, max_length, heads, width]."""

    keys: Heads
    values: Heads


class Sequences(NamedTuple):
    """Sequences that grow by a token a step, all as long.

    Attributes:
      tokens: prompts and what was written; all ``END`` behind it.
      length: how many of each sequence's tokens are there. The last has not been read yet.
      has_ended: which sequences have written ``END``.
      caches: what was read, layer by layer.
    """

    tokens: Int32[Array, "batch max_length"]
    length: Int32[Array, ""]
    has_ended: Bool[Array, "batch"]
    caches: tuple[Cache, ...]


def init_state(config: Config, mesh: jax.sharding.Mesh, *, seed: int) -> tuple[nnx.GraphDef, State]:
    """Makes a model on the mesh in context, with random parameters wherever experts are."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    # Before training it is zero, and all bytes are as likely, whatever the experts do.
    draw = nnx.initializers.normal(config.hidden**-0.5)
    model.unembedding[...] = draw(jax.random.key(seed + 1), (config.hidden, VOCAB))
    graph, state = nnx.split(model)
    return graph, meshes.place_state(state, mesh)


@partial(jax.jit, static_argnames=("graph", "max_length"))
def prefill(
    graph: nnx.GraphDef,
    state: State,
    prompts: Int32[Array, "batch length"],
    key: Key[Array, ""],
    *,
    max_length: int,
) -> Sequences:
    """Reads prompts, and draws the first token that follows each.

    Args:
      graph: the model's structure.
      state: its state.
      prompts: one on each row, all as long, and shorter than ``max_length``.
      key: draws what is written: the same in ``step`` and ``decode``.
      max_length: the most tokens of a sequence, its prompt included.
    """
    model = nnx.merge(graph, state)
    batch, length = prompts.shape
    room = jnp.zeros((batch, max_length, *model.blocks[0].attention.qkv.shape[2:]))
    sequences = Sequences(
        tokens=jnp.pad(prompts, ((0, 0), (0, max_length - length)), constant_values=END),
        length=jnp.int32(length),
        has_ended=jnp.zeros(batch, jnp.bool_),
        caches=(Cache(room, room),) * len(model.blocks),
    )
    logits, caches = _read(model, sequences, num_tokens=length)
    return _write(sequences._replace(caches=caches), logits, key)


@partial(jax.jit, static_argnames="graph", donate_argnames="sequences")
def step(graph: nnx.GraphDef, state: State, sequences: Sequences, key: Key[Array, ""]) -> Sequences:
    """Writes one token more to each sequence that has not ended. It overwrites its argument."""
    return _step(nnx.merge(graph, state), sequences, key)


@partial(jax.jit, static_argnames="graph", donate_argnames="sequences")
def decode(
    graph: nnx.GraphDef, state: State, sequences: Sequences, key: Key[Array, ""]
) -> Sequences:
    """Writes until all sequences have ended or have no room. It overwrites its argument."""
    model = nnx.merge(graph, state)

    def goes_on(sequences: Sequences) -> jax.Array:
        has_room = sequences.length < sequences.tokens.shape[1]
        return has_room & ~jnp.all(sequences.has_ended)

    return jax.lax.while_loop(goes_on, lambda sequences: _step(model, sequences, key), sequences)


def num_written(sequences: Sequences, prompt_length: int) -> int:
    """Counts the tokens written, with each sequence's ``END``."""
    is_text = sequences.tokens[:, prompt_length:] != END
    return int(jnp.sum(is_text) + jnp.sum(sequences.has_ended))


def _step(model: Transformer, sequences: Sequences, key: jax.Array) -> Sequences:
    logits, caches = _read(model, sequences, num_tokens=1)
    return _write(sequences._replace(caches=caches), logits, key)


def _read(
    model: Transformer, sequences: Sequences, *, num_tokens: int
) -> tuple[Float[Array, "batch vocab"], tuple[Cache, ...]]:
    """Reads each sequence's last tokens; returns the logits of the next, and the caches with them.

    A sequence that has ended sends nothing to experts, and takes no room there.
    """
    start = sequences.length - num_tokens
    tokens = jax.lax.dynamic_slice_in_dim(sequences.tokens, start, num_tokens, axis=1)
    token_mask = jnp.broadcast_to(~sequences.has_ended[:, None], tokens.shape)
    x, caches = model.embedding[...][tokens], []
    for block, old in zip(model.blocks, sequences.caches, strict=True):
        read, cache = _attend(block.attention, block.attention_norm(x), old, start)
        x += read
        x += block.moe(block.moe_norm(x), token_mask=token_mask)
        caches.append(cache)
    return model.norm(x[:, -1]) @ model.unembedding[...], tuple(caches)


def _attend(
    attention: Attention, x: Float[Array, "batch length hidden"], cache: Cache, start: jax.Array
) -> tuple[Float[Array, "batch length hidden"], Cache]:
    """Puts tokens from position ``start`` on into the cache, and has them read it up to each."""
    q, *new = attention.project(x, start)
    cache = Cache(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, more, start, axis=1)
            for old, more in zip(cache, new, strict=True)
        )
    )
    positions = start + jnp.arange(x.shape[1])
    is_seen = jnp.arange(cache.keys.shape[1]) <= positions[:, None]
    read = jax.nn.dot_product_attention(q, *cache, mask=is_seen[None, None])
    return attention.merge(read), cache


def _write(sequences: Sequences, logits: Float[Array, "batch vocab"], key: jax.Array) -> Sequences:
    """Draws the next token of each sequence that has not ended."""
    key = jax.random.fold_in(key, sequences.length)
    drawn = jax.random.categorical(key, logits / _TEMPERATURE).astype(jnp.int32)
    drawn = jnp.where(sequences.has_ended, END, drawn)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        sequences.tokens, drawn[:, None], sequences.length, axis=1
    )
    return sequences._replace(
        tokens=tokens,
        length=sequences.length + 1,
        has_ended=sequences.has_ended | (drawn == END),
    )
