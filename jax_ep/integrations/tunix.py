"""The expert-parallel body of Tunix's Qwen3 layer of experts, in the signature that Tunix's has.

``sharded_jax_ep_moe`` goes where ``MoELayer`` of ``tunix/models/qwen3/model.py`` has its
``sharded_megablox_moe``, inside that layer's ``shard_map``. It was written for google-tunix 0.1.7;
Tunix is not imported.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._layout import suggest_capacity
from jax_ep._moe import moe
from jax_ep._types import DROPPED, AxisName


def sharded_jax_ep_moe(
    inputs: Float[Array, "batch length local_hidden"],
    weights: Float[Array, "batch length num_topk"],
    indices: Int[Array, "batch length num_topk"],
    gate_w: Float[Array, "num_local_experts hidden local_ffn_hidden"],
    up_w: Float[Array, "num_local_experts hidden local_ffn_hidden"],
    down_w: Float[Array, "num_local_experts local_ffn_hidden hidden"],
    *,
    num_experts: int,
    ep_axis: AxisName,
    tp_axis: str | None,
    token_mask: Bool[Array, "batch length"] | None = None,
    capacity_factor: float | None = None,
) -> Float[Array, "batch length local_hidden"]:
    """Applies SwiGLU experts to a shard's tokens, whose width may be cut over tensor ranks.

    Tokens are made whole over ``tp_axis`` first, and their outputs are added up and cut over it
    last; what lies between is ``moe`` along ``ep_axis``, with its names for remat.

    Args:
      inputs: the shard's tokens, of each this tensor rank's part, in the dtype of the experts.
      weights: router weights, used as given, in float32.
      indices: the global expert of each choice.
      gate_w: the shard's experts' gates; over ``tp_axis`` their outputs are cut.
      up_w: likewise what is gated.
      down_w: over ``tp_axis`` their inputs are cut.
      num_experts: experts on all shards together.
      ep_axis: the mesh axis or axes that experts and tokens are cut over, Tunix's
        ``exp_weight_edf[0]``; None for none.
      tp_axis: the one that widths are cut over, Tunix's ``act_btd[-1]``; None for none.
      token_mask: which are tokens, the same on all tensor ranks; the others, such as padding, go
        nowhere and come back as zero. None for all.
      capacity_factor: rows of a shard's receive buffer, as a multiple of the mean; what finds no
        room is dropped. None drops nothing, as Tunix does.

    Returns:
      The tokens' outputs in their dtype, cut as ``inputs``.

    Raises:
      TypeError: an argument is no array, or of another dtype than is asked for.
      ValueError: shapes do not fit one another, or ``moe`` or ``suggest_capacity`` refuses them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep.integrations.tunix import sharded_jax_ep_moe
      >>> w, chosen = jnp.ones((2, 1, 1)), jnp.array([[[0], [1]]])
      >>> arrays = jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), chosen, w, w, w
      >>> mask = jnp.array([[True, False]])
      >>> out = sharded_jax_ep_moe(
      ...     *arrays, num_experts=2, ep_axis=None, tp_axis=None, token_mask=mask
      ... )
      >>> [f"{value:.3f}" for value in out.ravel().tolist()]
      ['0.731', '0.000']
    """
    check_array("inputs", inputs, "batch, length, local_hidden")
    check_array("indices", indices, "batch, length, num_topk")
    batch, length, num_topk = (*inputs.shape[:2], indices.shape[2])
    check_shape("indices", indices, (batch, length, num_topk), "batch, length, num_topk")
    check_shape("weights", weights, (batch, length, num_topk), "batch, length, num_topk")
    topk_idx = indices.astype(jnp.int32)
    if token_mask is not None:
        check_shape("token_mask", token_mask, (batch, length), "batch, length")
        check_dtype("token_mask", token_mask, jnp.bool_)
        topk_idx = jnp.where(token_mask[..., None], topk_idx, DROPPED)
    if tp_axis is not None:
        inputs = jax.lax.all_gather(inputs, tp_axis, axis=2, tiled=True)
    num_tokens, hidden = batch * length, inputs.shape[2]
    capacity = None
    if capacity_factor is not None:
        num_ranks = 1 if ep_axis is None else jax.lax.axis_size(ep_axis)
        capacity = suggest_capacity(
            num_tokens, num_topk, num_experts, num_ranks, factor=capacity_factor
        )
    out, _ = moe(
        inputs.reshape(num_tokens, hidden),
        topk_idx.reshape(num_tokens, num_topk),
        weights.reshape(num_tokens, num_topk).astype(jnp.float32),
        gate_w,
        up_w,
        down_w,
        num_experts=num_experts,
        axis_name=ep_axis,
        capacity=capacity,
    )
    out = out.reshape(batch, length, hidden)
    if tp_axis is None:
        return out
    return jax.lax.psum_scatter(out, tp_axis, scatter_dimension=2, tiled=True)
