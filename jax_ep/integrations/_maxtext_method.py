"""What stands in for the method ``sparse_matmul`` of MaxText's ``RoutedMoE``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from maxtext.layers import moe  # pyright: ignore[reportMissingImports]

from jax_ep._combine import combine
from jax_ep._dispatch import dispatch
from jax_ep._make_plan import make_plan
from jax_ep._rows import dispatch_weighed
from jax_ep._types import Implementation
from jax_ep.integrations._maxtext_config import Places, check_served, find_places
from jax_ep.integrations._maxtext_products import Product, add_bias, find_product, plain


def sparse_matmul(
    layer: Any,
    inputs: jax.Array,
    gate_logits: jax.Array,
    pre_bias_logits: jax.Array | None,
    w0_kernel: jax.Array,
    w1_kernel: jax.Array,
    wo_kernel: jax.Array,
    w0_bias: jax.Array | None,
    w1_bias: jax.Array | None,
    wo_bias: jax.Array | None,
    input_ids: jax.Array | None = None,
    forced_routed_experts: jax.Array | None = None,
    *,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Routes tokens, applies their experts and adds up; arrays are global.

    Args:
      layer: MaxText's ``RoutedMoE``.
      inputs: [batch, length, hidden]. All that belongs to tokens leads with batch and length.
      gate_logits: the router's scores, with its bias where it has one.
      pre_bias_logits: those without it, of the families that choose and weigh by different ones.
      w0_kernel: the experts' gates, [num_experts, hidden, ffn_hidden].
      w1_kernel: likewise what is gated.
      wo_kernel: [num_experts, ffn_hidden, hidden].
      w0_bias: [num_experts, ffn_hidden], or None for experts without biases, as the next two.
      w1_bias: likewise.
      wo_bias: [num_experts, hidden].
      input_ids: the tokens' ids, by which some layers choose.
      forced_routed_experts: choices made elsewhere; what is no expert's index goes nowhere.
      implementation: what carries the exchange, as for ``make_plan``.

    Returns:
      The tokens' outputs; the loss of balance and the update of the router's bias, or None where
      the configuration does not ask for them.

    Raises:
      NotImplementedError: the configuration asks for what is not served.
    """
    kernels = (w0_kernel, w1_kernel, wo_kernel)
    check_served(layer.config)
    product = find_product(layer, kernels)
    places = find_places(layer, batch=inputs.shape[0])

    def place(array: Any, spec: P) -> Any:
        return None if array is None else layer._maybe_shard_with_pspec(array, spec)

    # So that each rank routes its own tokens.
    gate_logits, pre_bias_logits, forced_routed_experts = (
        place(array, places.tokens)
        for array in (gate_logits, pre_bias_logits, forced_routed_experts)
    )
    weights, topk_idx = layer.get_topk(
        gate_logits, pre_bias_logits, layer.rngs, input_ids, forced_routed_experts
    )
    biases = (w0_bias, w1_bias, wo_bias) if layer.config.mlp_bias else ()
    arrays = (inputs, topk_idx.astype(jnp.int32), weights, *kernels, *biases)
    specs = (*[places.tokens] * 3, *places.weights[: len(kernels) + len(biases)])
    is_distinct = not (
        forced_routed_experts is not None
        or layer.is_hash_routing
        or layer.config.use_random_routing
    )
    out, has_overflow, load_ratios = jax.shard_map(
        partial(_apply_experts, layer, places, product, is_distinct, implementation),
        mesh=layer.mesh,
        in_specs=specs,
        out_specs=(places.out, places.shards, places.shards),
        check_vma=layer.config.check_vma,
    )(*map(place, arrays, specs))
    _log(layer, has_overflow, load_ratios)
    scores = gate_logits if pre_bias_logits is None else pre_bias_logits
    return out, _balance_loss(layer, topk_idx, scores), _bias_updates(layer, topk_idx)


def _apply_experts(
    layer: Any,
    places: Places,
    product: Product | None,
    is_distinct: bool,
    implementation: Implementation | None,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    *weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies the experts to one shard's tokens; weights are its experts', as ``places`` has them.

    Returns:
      Outputs, [batch, length, hidden] of this shard; whether a choice of its tokens found no room,
      [1]; and the greatest load of its ranks, as a multiple of the mean, [1].
    """
    batch, length, hidden = x.shape
    topk_idx = topk_idx.reshape(batch * length, -1)
    weighing = topk_weights.reshape(batch * length, -1).astype(jnp.float32)
    plan = make_plan(
        topk_idx,
        num_experts=layer.num_experts,
        axis_name=places.experts or None,
        capacity=_capacity(layer, topk_idx.size, is_distinct),
        # A scale of a whole buffer would be one of what nobody has written.
        tail="zero" if product else "uninitialized",
        implementation=implementation,
    )
    plan = _named(plan, "moe_x_sorted", "moe_routing_maps")
    x = x.reshape(batch * length, hidden)
    if layer.config.decoder_block == moe.ctypes.DecoderBlockType.LLAMA4:
        rows, outward = dispatch_weighed(x, plan, jax.nn.sigmoid(weighing)), None
    else:
        rows, outward = dispatch(x, plan), weighing
    rows = _named(rows, "moe_x_sorted")
    rows = _feed_forward(layer, places, product, rows, plan.group_sizes, weights)
    out = combine(rows, plan, outward).reshape(batch, length, -1)
    loads = jnp.sum(plan.expert_load.reshape(plan.num_ranks, -1), axis=1)
    ratio = jnp.max(loads).astype(jnp.float32) / topk_idx.size
    return out, plan.num_dropped[None] > 0, ratio[None]


def _feed_forward(
    layer: Any,
    places: Places,
    product: Product | None,
    rows: jax.Array,
    group_sizes: jax.Array,
    weights: tuple[jax.Array, ...],
) -> jax.Array:
    """Applies each group's expert to its rows; of the results' width a tensor rank has its part."""
    kernels, biases = weights[:3], weights[3:]
    if product and layer.config.prefuse_moe_weights:
        # In one, as gradients of both then share their scales.
        both = product(rows, jnp.concatenate(kernels[:2], axis=-1), group_sizes, "wi")
        inner = jnp.split(both, 2, axis=-1)
    else:
        inner = [(product or plain)(rows, kernel, group_sizes, "wi") for kernel in kernels[:2]]
    if biases:
        inner = [add_bias(out, bias, group_sizes) for out, bias in zip(inner, biases, strict=False)]
    gate, up = _named(inner[0], "mlpwi_0", "moe_mlpwi_0"), _named(inner[1], "moe_mlpwi_1")
    out = layer.apply_ffn_activation(gate, up)
    out = (product or plain)(out, kernels[2], group_sizes, "wo")
    if places.tensor:
        out = jax.lax.psum_scatter(out, places.tensor, scatter_dimension=1, tiled=True)
    if biases:
        out = add_bias(out, biases[2], group_sizes)
    return _named(out, "mlpwo", "moe_mlpwo")


def _named(value: Any, *names: str) -> Any:
    """Gives a value the names by which MaxText's remat policies keep it."""
    for name in names:
        value = checkpoint_name(value, name)
    return value


def _capacity(layer: Any, num_choices: int, is_distinct: bool) -> int | None:
    """Returns the rows of a rank's buffer: the mean times a factor, or what holds anything.

    Args:
      layer: has the factor, and says whether to do without it.
      num_choices: those of one rank.
      is_distinct: whether a token's choices are.
    """
    most = num_choices * layer.get_expert_parallelism_size()
    factor = layer.get_ragged_buffer_factor()
    if getattr(layer, "force_dropless", False) or factor <= 0:
        return None if is_distinct else max(most, 1)
    return max(min(int(num_choices * factor), most), 1)


def _log(layer: Any, has_overflow: jax.Array, load_ratios: jax.Array) -> None:
    """Hands out what MaxText's training loop collects, of all shards."""
    config, load_ratio = layer.config, jnp.max(load_ratios)
    if getattr(layer, "force_dropless", False):
        has_overflow = jnp.zeros_like(has_overflow)
    layer.sow(nnx.Intermediate, "moe_has_overflow", has_overflow)
    if config.log_required_ragged_buffer_factor:
        layer.sow(nnx.Intermediate, "moe_required_rbf", load_ratio)
    if config.moe_log_max_load_ratio:
        layer.sow(nnx.Intermediate, "moe_max_load_ratio", load_ratio)


def _balance_loss(layer: Any, topk_idx: jax.Array, scores: jax.Array) -> jax.Array | None:
    """Returns the loss of balance over the whole batch, by MaxText's formula."""
    if layer.config.load_balance_loss_weight <= 0 or layer.is_hash_routing:
        return None
    if moe.uses_megatron_seq_aux_loss(layer.config):
        return layer.megatron_seq_aux_loss(scores)
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(layer.dtype)
    return layer.load_balance_loss(topk_idx, probabilities)


def _bias_updates(layer: Any, topk_idx: jax.Array) -> jax.Array | None:
    """Returns what to add to the router's bias, or of which counts it is to be made."""
    if not layer.should_update_load_balance():
        return None
    counts = moe.calculate_expert_counts(topk_idx, layer.num_experts)
    if layer.config.gradient_accumulation_steps > 1:
        return counts  # summed over micro-batches first
    rate = layer.config.routed_bias_update_rate
    return moe.load_balance_updates_from_counts(counts, layer.num_experts, rate)
