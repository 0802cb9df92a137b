"""One expert layer in several ways: how fast each is, and what memory it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jax_ep.flax import MoE
from jax_ep.testing import slots_moe
from moe_lm.model import Config, make_moe
from moe_lm.routed import route, shared_expert
from moe_lm.timing import median_seconds

_REPEATS = 3
_DENSE = "dense"  # It drops nothing, and takes long.
Layer = Callable[[nnx.State, jax.Array], tuple[jax.Array, jax.Array]]


class Speed(NamedTuple):
    """What forward and backward through the layer take.

    Attributes:
      tokens_per_s: of all devices.
      device_bytes: of each device: what the compiled program is given, what it returns, and what it
        needs between.
      dropped: which part of the choices got no row.
    """

    tokens_per_s: float
    device_bytes: int
    dropped: float


def compare(
    config: Config, moe: MoE, x: Float[Array, "batch length hidden"], mesh: jax.sharding.Mesh
) -> dict[str, Speed]:
    """Compiles and times the layer in every way that serves here, in turns.

    Args:
      config: the model's, of which no experts are lent here.
      moe: the layer.
      x: what it is given.
      mesh: the mesh in context.

    Returns:
      How each way fares, by name. All have room for as many choices; what they drop may differ.
    """
    state = nnx.state(moe)
    programs, calls = {}, {}
    for name, layer in layers(config, mesh).items():
        try:
            program = jax.jit(_both_ways(layer)).lower(state, x).compile()
        except NotImplementedError:  # Native code cannot serve here.
            continue
        programs[name], calls[name] = program, (lambda program=program: program(state, x))
    seconds = median_seconds(calls, _REPEATS)
    dropped = {name: float(call()[-1]) for name, call in calls.items() if name != _DENSE}
    num_tokens = x.size // config.hidden
    return {
        name: Speed(num_tokens / seconds[name], _device_bytes(program), dropped.get(name, 0.0))
        for name, program in programs.items()
    }


def layers(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Layer]:
    """Returns every way, by name: from state and tokens to outputs and the dropped part."""

    def made(implementation: Any) -> Layer:
        changed = dataclasses.replace(config, implementation=implementation, num_spares=0)
        graph = nnx.graphdef(make_moe(changed, rngs=nnx.Rngs(0)))

        def layer(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, aux = nnx.merge(graph, state).apply_with_aux(x)
            return out, jnp.mean(aux["dropped_by_choice"])

        return layer

    graph = nnx.graphdef(make_moe(dataclasses.replace(config, num_spares=0), rngs=nnx.Rngs(0)))

    def by_slots(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _by_slots(config, nnx.merge(graph, state), x, mesh)

    return {
        "jax_ep, native": made("native"),
        "jax_ep, xla": made("xla"),
        "all_to_all": by_slots,
        _DENSE: made("dense"),
    }


def _by_slots(
    config: Config, moe: MoE, x: jax.Array, mesh: jax.sharding.Mesh
) -> tuple[jax.Array, jax.Array]:
    """As many slots for each expert from each device, by XLA's ``all_to_all``."""
    num_tokens = x.size // config.hidden // mesh.size
    num_slots = num_tokens
    if config.capacity_factor is not None:
        fair = num_tokens * config.num_topk / config.num_experts
        num_slots = min(num_tokens, math.ceil(config.capacity_factor * fair))
    routed = route(moe, x)
    tokens, experts = P(mesh.axis_names), P("expert")

    def shard(x: jax.Array, topk_idx: jax.Array, *rest: jax.Array) -> Any:
        return slots_moe(
            x,
            topk_idx,
            *rest,
            num_experts=config.num_experts,
            num_slots=num_slots,
            axis_name="expert",
        )

    flat = (a.reshape(-1, a.shape[-1]) for a in (x, routed.topk_idx, routed.topk_weights))
    weights = (moe.w_gate[...], moe.w_up[...], moe.w_down[...])
    in_specs = (tokens,) * 3 + (experts,) * 3
    result = jax.shard_map(shard, in_specs=in_specs, out_specs=tokens)(*flat, *weights)
    out = result.out.reshape(x.shape)
    if config.shared_hidden is not None:
        out += shared_expert(moe, x)
    return out, 1 - jnp.mean(result.kept, dtype=jnp.float32)


def _both_ways(layer: Layer) -> Callable[[nnx.State, jax.Array], Any]:
    def step(state: nnx.State, x: jax.Array) -> tuple[Any, ...]:
        out, pull, dropped = jax.vjp(layer, state, x, has_aux=True)
        return out, *pull(out), dropped

    return step


def _device_bytes(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
