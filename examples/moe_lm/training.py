"""One step of training, compiled for a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

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
from moe_lm.metrics import Metrics
from moe_lm.model import Config, Transformer
from moe_lm.routed import route

_BALANCE_LOSS = 0.01
BIAS_RATE = 0.01

State: TypeAlias = Any
Tokens: TypeAlias = Int32[Array, "batch length"]


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
    graph: nnx.GraphDef, state: State, config: Config, *, accumulate: int = 1
) -> Callable[[State, Tokens], tuple[State, Metrics]]:
    """Returns the training step. It overwrites the state it is given.

    Args:
      graph: the structure of model and optimizer.
      state: their state.
      config: the model's.
      accumulate: into how many parts a batch is cut, one computed after the other. A capacity is
        one for the choices of a part, and a loss that evens loads looks at a part; all else is as
        if the batch were whole.
    """
    # Where XLA is left to choose, the second step's state is placed unlike the first one's, and
    # the step is compiled twice.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = partial(_step, graph, config, accumulate)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _step(
    graph: nnx.GraphDef, config: Config, accumulate: int, state: State, tokens: Tokens
) -> tuple[State, Metrics]:
    model, optimizer = nnx.merge(graph, state)
    grads, metrics = gradients(config, accumulate, model, tokens)
    optimizer.update(model, grads)
    if config.router.has_bias:
        for block, load in zip(model.blocks, metrics.expert_load, strict=True):
            bias = block.moe.router_bias
            bias[...] = routing.update_router_bias(bias[...], load, BIAS_RATE)
    return nnx.state((model, optimizer)), metrics


def gradients(
    config: Config, accumulate: int, model: Transformer, tokens: Tokens
) -> tuple[State, Metrics]:
    """Returns the mean of the parts' gradients, and what the whole batch has to report."""
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def loss(params: State, tokens: Tokens) -> tuple[jax.Array, Metrics]:
        return loss_and_metrics(config, nnx.merge(graph, params, others), tokens)

    grad_fn = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return grad_fn(params, tokens)

    def add(total: State, part: Tokens) -> tuple[State, Metrics]:
        grads, metrics = grad_fn(params, part)
        return jax.tree.map(jnp.add, total, grads), metrics

    # Each part has some sequences of every device, so none has to move.
    parts = tokens.reshape(-1, accumulate, tokens.shape[1]).swapaxes(0, 1)
    total, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    metrics = Metrics(
        jnp.mean(each.loss),
        jnp.sum(each.expert_load, axis=0),
        jnp.sum(each.rank_load, axis=0),
        jnp.mean(each.dropped_by_choice, axis=0),
    )
    return jax.tree.map(lambda grad: grad / accumulate, total), metrics


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
        each_layer("rank_load"),
        each_layer("dropped_by_choice"),
    )
    # A router that has a bias is balanced by it instead.
    weight = 0.0 if config.router.has_bias else _BALANCE_LOSS
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
    return np.asarray(route(moe, moe_input.reshape(-1, moe.config.hidden)).topk_idx)


def _bits_per_byte(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses) / math.log(2)


def put_batch(tokens: Int32[np.ndarray, "batch length"], mesh: jax.sharding.Mesh) -> Tokens:
    """Spreads a batch's sequences over all devices."""
    return jax.device_put(tokens, NamedSharding(mesh, P(mesh.axis_names)))
