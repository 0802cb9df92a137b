"""What the parts of an expert layer cost, each compiled and timed on its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import jax_ep
from jax_ep import wire
from jax_ep.flax import MoE
from moe_lm.model import Config, Transformer
from moe_lm.routed import route

Call = Callable[[], Any]


def time_layers(
    config: Config,
    model: Transformer,
    moe_inputs: Sequence[Float[Array, "batch length hidden"]],
    mesh: jax.sharding.Mesh,
    *,
    repeats: int = 10,
) -> dict[str, float]:
    """Times each part of the expert layers, forward and backward, with what they were given.

    Args:
      config: the model's; not with the dense implementation, which has no such parts.
      model: the model whose routing to use.
      moe_inputs: what each layer's experts are given.
      mesh: the mesh in context.
      repeats: calls of each part; the parts take turns.

    Returns:
      Seconds by part, the median for each layer and their sum over layers.
    """
    parts = _make_parts(config, mesh, moe_inputs[0].size // config.hidden)
    totals: dict[str, float] = {}
    for block, x in zip(model.blocks, moe_inputs, strict=True):
        calls = _bind(config, parts, block.moe, x.reshape(-1, config.hidden))
        for name, seconds in median_seconds(calls, repeats).items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals


def _make_parts(
    config: Config, mesh: jax.sharding.Mesh, num_tokens: int
) -> dict[str, Callable[..., Any]]:
    """Compiles the parts. Arrays of one rank each have a leading axis of one per shard."""
    num_ranks = mesh.shape["expert"]
    capacity = None
    if config.capacity_factor is not None:
        capacity = jax_ep.suggest_capacity(
            num_tokens // mesh.size,
            config.num_topk,
            config.num_experts,
            num_ranks,
            factor=config.capacity_factor,
        )
    assert config.implementation != "dense"
    make_plan = partial(
        jax_ep.make_plan,
        num_experts=config.num_experts + num_ranks * config.num_spares,
        axis_name="expert",
        capacity=capacity,
        tail="uninitialized",
        implementation=config.implementation,
    )
    tokens, experts = P(mesh.axis_names), P("expert")

    def compile_part(part: Callable[..., Any], *in_specs: Any, out_specs: Any = tokens):
        return jax.jit(jax.shard_map(part, in_specs=in_specs, out_specs=out_specs))

    own = (experts, experts, experts)
    # What is borrowed differs along the data axis, too.
    weights = (tokens, tokens, tokens) if config.num_spares else own
    return {
        "balance": compile_part(
            partial(_balance, config), tokens, own, out_specs=(tokens, weights, own)
        ),
        "plan": compile_part(lambda topk_idx: _stack(make_plan(topk_idx)), tokens),
        "dispatch": compile_part(partial(_dispatch, config.wire), tokens, tokens),
        "experts": compile_part(
            _experts, tokens, tokens, weights, out_specs=(tokens, tokens, weights)
        ),
        "combine": compile_part(partial(_combine, config.wire), tokens, tokens, tokens),
    }


def _bind(
    config: Config, parts: dict[str, Callable[..., Any]], moe: MoE, x: jax.Array
) -> dict[str, Call]:
    """Gives each part what it gets in the model."""
    topk_idx, topk_weights, _ = route(moe, x)
    weights = (moe.w_gate[...], moe.w_up[...], moe.w_down[...])
    calls = {}
    if config.num_spares:
        choices, own = topk_idx, weights
        calls["balance"] = lambda: parts["balance"](choices, own)
        topk_idx, weights, _ = parts["balance"](choices, own)
    plan = parts["plan"](topk_idx)
    rows = parts["dispatch"](x, plan)[0]
    outputs = parts["experts"](rows, plan, weights)[0]
    return calls | {
        "plan": lambda: parts["plan"](topk_idx),
        "dispatch": lambda: parts["dispatch"](x, plan),
        "experts": lambda: parts["experts"](rows, plan, weights),
        "combine": lambda: parts["combine"](outputs, plan, topk_weights),
    }


def _stack(plan: jax_ep.Plan) -> jax_ep.Plan:
    return jax.tree.map(lambda array: array[None], plan)


def _unstack(plan: jax_ep.Plan) -> jax_ep.Plan:
    return jax.tree.map(lambda array: array[0], plan)


def _balance(
    config: Config, topk_idx: jax.Array, weights: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    assert config.implementation != "dense"
    slots, copies = jax_ep.balance(
        topk_idx,
        num_experts=config.num_experts,
        axis_name="expert",
        num_spares=config.num_spares,
        implementation=config.implementation,
    )
    every, pull = jax.vjp(partial(jax_ep.with_copies, copies=copies), weights)
    return slots, every, *pull(every)


def _dispatch(dtype: str | None, x: jax.Array, plan: jax_ep.Plan) -> tuple[jax.Array, ...]:
    send = jax_ep.dispatch if dtype is None else partial(wire.dispatch, dtype=dtype)
    rows, pull = jax.vjp(partial(send, plan=_unstack(plan)), x)
    return rows, *pull(rows)


def _experts(rows: jax.Array, plan: jax_ep.Plan, weights: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    group_sizes = _unstack(plan).group_sizes

    def swiglu(rows: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        gate, up = (jax_ep.grouped_matmul(rows, w, group_sizes) for w in weights[:2])
        return jax_ep.grouped_matmul(jax.nn.silu(gate) * up, weights[2], group_sizes)

    outputs, pull = jax.vjp(swiglu, rows, weights)
    return outputs, *pull(outputs)


def _combine(
    cotangents: str | None, outputs: jax.Array, plan: jax_ep.Plan, topk_weights: jax.Array
) -> tuple[jax.Array, ...]:
    add = jax_ep.combine if cotangents is None else partial(wire.combine, cotangents=cotangents)
    plan = _unstack(plan)
    out, pull = jax.vjp(lambda rows, weights: add(rows, plan, weights), outputs, topk_weights)
    return out, *pull(out)


def median_seconds(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Returns how long each call takes, in the median; the calls take turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
