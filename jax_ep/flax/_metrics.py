"""Load metrics of a whole layer: those of all shards, brought together."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._fp8 import encoded_bytes
from jax_ep._metrics import count_choices, load_metrics, max_over_mean, rank_load
from jax_ep._plan import Plan
from jax_ep.flax._config import Config


def global_metrics(
    config: Config,
    axes: tuple[str, ...],
    plan: Plan,
    topk_idx: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> dict[str, Any]:
    """Brings ``load_metrics`` of all shards together.

    Args:
      config: the layer.
      axes: the mesh axes that tokens are sharded over.
      plan: the shard's, or those of its chunks.
      topk_idx: what its tokens chose.
      dtype: of what crosses.

    Returns:
      Scalars, loads and drops, equal on all shards.
    """
    width, element = config.expert_hidden, dtype
    if config.wire_dtype is not None:
        width, element = encoded_bytes(width), jnp.uint8
    summed = ("recv_rows", "logical_bytes", "wire_bytes", "node_wire_bytes")

    def sums(plan: Plan) -> dict[str, Any]:
        local = load_metrics(plan, hidden=width, dtype=element)
        of_plan = {"load": plan.expert_load, "dropped": plan.num_dropped}
        return {name: local[name] for name in summed} | of_plan

    totals = sums(plan) if config.chunks == 1 else _sum_first(jax.vmap(sums)(plan))
    totals["kept"] = jnp.sum(plan.kept.reshape(topk_idx.shape), axis=0, dtype=jnp.int32)
    is_valid = (topk_idx >= 0) & (topk_idx < config.num_experts)
    totals["valid"] = jnp.sum(is_valid, axis=0, dtype=jnp.int32)
    load = totals.pop("load")
    totals = jax.lax.psum(totals, axes) if axes else totals
    # The load counts all ranks of the expert axis already.
    others = tuple(name for name in axes if name not in config.expert_axes)
    load = jax.lax.psum(load, others) if others else load
    expert_load = load
    if plan.num_experts != config.num_experts:  # A plan of slots, which are not experts.
        expert_load = count_choices(topk_idx, config.num_experts, axis_name=axes)
    max_over = max_over_mean(expert_load)
    num_choices = jnp.maximum(jnp.sum(expert_load), 1).astype(jnp.float32)
    if config.num_zero_experts:
        expert_load = count_choices(topk_idx, config.num_choosable, axis_name=axes or None)
    load_of_ranks = rank_load(load, plan.num_ranks)
    kept, valid = (totals.pop(name).astype(jnp.float32) for name in ("kept", "valid"))
    return {
        "expert_load": expert_load,
        "rank_load": load_of_ranks,
        "dropped_by_choice": (valid - kept) / jnp.maximum(valid, 1),
        "expert_load_max_over_mean": max_over,
        "rank_load_max_over_mean": max_over_mean(load_of_ranks),
        "dropped_fraction": totals.pop("dropped").astype(jnp.float32) / num_choices,
        **totals,
    }


def _sum_first(sums: dict[str, Any]) -> dict[str, Any]:
    """Adds up along the first axis, in the dtypes there are."""
    return {name: jnp.sum(value, axis=0, dtype=value.dtype) for name, value in sums.items()}
