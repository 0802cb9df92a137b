"""Tunix's Qwen3 layer of experts by this library's exchange.

``install`` has ``MoELayer`` of ``tunix/models/qwen3/model.py`` go this way. What it computes on a
shard is ``sharded_jax_ep_moe``, in the signature of Tunix's ``sharded_megablox_moe``. Both were
written for google-tunix 0.1.7; only ``install`` imports Tunix.
"""

import functools
import importlib
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._layout import suggest_capacity
from jax_ep._moe import moe
from jax_ep._types import DROPPED, AxisName
from jax_ep.integrations._replace import check_like, own, put, put_back

MADE_FOR: Final = "0.1.7"
"""The version of google-tunix that this module was written for and is tested with."""

_MODEL = "tunix.models.qwen3.model"


def install(*, capacity_factor: float | None = None) -> None:
    """Has Tunix's Qwen3 layers of experts exchange tokens by this library, on CPUs too.

    To be called before the model is compiled, in every process; called again, it replaces what it
    has put there. Layers go Tunix's own way still where no mesh is in context or
    ``use_megablox=False``.

    Args:
      capacity_factor: as for ``sharded_jax_ep_moe``.

    Raises:
      ImportError: Tunix, or what it imports, is not there.
      NotImplementedError: Tunix's layer takes other arguments than in the version that this module
        was made for. (Of another version that takes the same, a warning tells.)
    """
    model = importlib.import_module(_MODEL)
    original = own(model.MoELayer, "__call__")
    check_like("Tunix", "google-tunix", MADE_FOR, original, ["self", "x", "use_megablox"])

    @functools.wraps(original)
    def call(self: Any, x: jax.Array, use_megablox: bool = True) -> jax.Array:
        mesh = model.pxla.thread_resources.env.physical_mesh
        if not use_megablox or mesh.empty:
            return original(self, x, use_megablox)
        return _apply(self, mesh, capacity_factor, x)

    put(model.MoELayer, "__call__", call)


def uninstall() -> None:
    """Puts Tunix's own method back, if ``install`` has taken it out."""
    put_back(importlib.import_module(_MODEL).MoELayer, "__call__")


def _apply(
    layer: Any, mesh: jax.sharding.Mesh, capacity_factor: float | None, x: jax.Array
) -> jax.Array:
    """Routes as Tunix's ``MoELayer`` does, and applies its experts along its own specs."""
    scores = jax.nn.softmax(layer.router(x).astype(jnp.float32), axis=-1)
    weights, indices = jax.lax.top_k(scores, layer.experts_per_tok)
    weights = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(layer.dtype)
    specs = layer.shd_config
    tokens, routing = P(*specs.act_btd), P(*specs.act_btd[:-1], None)
    inward, outward = P(*specs.exp_weight_edf), P(*specs.exp_weight_efd)

    def present(axis: str | None) -> str | None:
        return axis if axis in mesh.axis_names else None

    body = functools.partial(
        sharded_jax_ep_moe,
        num_experts=layer.num_experts,
        ep_axis=present(specs.exp_weight_edf[0]),
        tp_axis=present(specs.act_btd[-1]),
        capacity_factor=capacity_factor,
    )
    experts = (layer.gate_proj, layer.up_proj, layer.down_proj)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tokens, routing, routing, inward, inward, outward),
        out_specs=tokens,
        check_vma=False,  # as Tunix has it
    )(x, weights, indices, *(param[...].astype(layer.dtype) for param in experts))


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
