"""One step of training, compiled for a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from jax_ep import routing
from moe_lm import meshes
from moe_lm.model import Config, Transformer

_BALANCE_LOSS = 0.01
BIAS_RATE = 0.01

State: TypeAlias = Any
Tokens: TypeAlias = Int32[Array, "batch length"]


class Metrics(NamedTuple):
    """What one step reports; all but the loss are before the step's update, for each layer."""

    loss: Float32[Array, ""]  # bits per byte
    expert_load: Int32[Array, "num_layers num_experts"]
    max_over_mean: Float32[Array, "num_layers"]
    busiest_rank: Float32[Array, "num_layers"]  # rows of the busiest device, over the mean
    dropped: Float32[Array, "num_layers"]  # fraction of the choices


def init_state(
    config: Config, mesh: jax.sharding.Mesh, *, learning_rate: float, num_steps: int, seed: int
) -> tuple[nnx.GraphDef, State]:
    """Makes a model and its optimizer on the mesh in context: experts sharded, the rest copied."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(20, num_steps // 10), num_steps, 0.05 * learning_rate
    )
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    graph, state = nnx.split((model, nnx.Optimizer(model, chain, wrt=nnx.Param)))
    return graph, meshes.place_state(state, mesh)


def balanced(config: Config, graph: nnx.GraphDef, state: State) -> tuple[Config, nnx.GraphDef]:
    """Has devices borrow each other's busy experts for each step; returns the model of that kind.

    They have room for their fair share alone: nothing is dropped where that evens all loads.
    """
    config = dataclasses.replace(config, num_spares=2, capacity_factor=1.0)
    model, optimizer = nnx.merge(graph, state)
    for block in model.blocks:
        changes = {"num_spares": config.num_spares, "capacity_factor": config.capacity_factor}
        block.moe.config = dataclasses.replace(block.moe.config, **changes)
    return config, nnx.graphdef((model, optimizer))


def compile_step(
    graph: nnx.GraphDef, state: State, config: Config
) -> Callable[[State, Tokens], tuple[State, Metrics]]:
    """Returns the training step. It overwrites the state it is given."""
    # Where XLA is left to choose, the second step's state is placed unlike the first one's, and
    # the step is compiled twice.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = partial(_step, graph, config)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _step(
    graph: nnx.GraphDef, config: Config, state: State, tokens: Tokens
) -> tuple[State, Metrics]:
    model, optimizer = nnx.merge(graph, state)
    grad_fn = nnx.value_and_grad(partial(loss_and_metrics, config), has_aux=True)
    (_, metrics), grads = grad_fn(model, tokens)
    optimizer.update(model, grads)
    if config.router == "sigmoid":
        for block, load in zip(model.blocks, metrics.expert_load, strict=True):
            bias = block.moe.router_bias
            bias[...] = routing.update_router_bias(bias[...], load, BIAS_RATE)
    return nnx.state((model, optimizer)), metrics


def loss_and_metrics(
    config: Config, model: Transformer, tokens: Tokens
) -> tuple[Float32[Array, ""], Metrics]:
    """Returns what training minimises, and the metrics, of one batch.

    Every byte but the first of each window is predicted from those before it.
    """
    logits, sown = nnx.capture(model, nnx.Intermediate)(tokens[:, :-1])
    loss = _bits_per_byte(logits, tokens[:, 1:])

    def each_layer(name: str) -> jax.Array:
        layers: list[Any] = [sown["blocks"][i]["moe"] for i in range(config.num_layers)]
        return jnp.stack([layer[name][0] for layer in layers])

    metrics = Metrics(
        loss,
        each_layer("expert_load"),
        each_layer("expert_load_max_over_mean"),
        each_layer("rank_load_max_over_mean"),
        each_layer("dropped_fraction"),
    )
    # A sigmoid router is balanced by its bias instead.
    weight = _BALANCE_LOSS if config.router == "softmax" else 0.0
    return loss + weight * jnp.sum(each_layer("load_balance_loss")), metrics


@partial(jax.jit, static_argnums=0)
def evaluate(
    graph: nnx.GraphDef, state: State, tokens: Tokens
) -> tuple[Float32[Array, ""], list[Float32[Array, "batch length hidden"]]]:
    """Returns bits per byte of one batch, and what each layer's experts were given."""
    logits, moe_inputs = nnx.merge(graph, state).logits_and_moe_inputs(tokens[:, :-1])
    return _bits_per_byte(logits, tokens[:, 1:]), moe_inputs


def choices(
    model: Transformer, moe_input: Float32[Array, "batch length hidden"]
) -> Int32[np.ndarray, "tokens num_topk"]:
    """Returns which experts the first layer's router chooses."""
    moe = model.blocks[0].moe
    logits = moe_input.reshape(-1, moe.config.hidden) @ moe.router_kernel[...]
    router = moe.config.router
    assert router is not None
    bias = moe.router_bias[...] if router.has_bias else None
    return np.asarray(router.choose(logits, moe.config.num_topk, bias=bias)[0])


def _bits_per_byte(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses) / math.log(2)


def put_batch(tokens: Int32[np.ndarray, "batch length"], mesh: jax.sharding.Mesh) -> Tokens:
    """Spreads a batch's sequences over all devices."""
    return jax.device_put(tokens, NamedSharding(mesh, P(mesh.axis_names)))
