"""What MaxText's sparse path multiplies rows by experts with, where it quantises.

Which of its products that is, and by which rule it quantises, MaxText decides: megablox takes the
dtypes of AQT or of fp8, or Qwix's rule for ``gmm``; ``jax.lax.ragged_dot`` is intercepted by Qwix
where there is a rule for it, and AQT and fp8 leave it as it is. Called between our exchanges, each
sees the rows of a rank's own experts, as it does between MaxText's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from maxtext.layers import moe  # pyright: ignore[reportMissingImports]
from maxtext.utils import max_utils  # pyright: ignore[reportMissingImports]

from jax_ep import experts
from jax_ep._grouped_matmul import grouped_matmul
from jax_ep.integrations._maxtext_config import not_served, tile_sizes

Product = Callable[[jax.Array, jax.Array, jax.Array, str], jax.Array]
"""Of rows, experts' matrices, group sizes, and whose tiles it has, "wi" or "wo"."""

_quantizations = moe.quantizations

# Qwix would take the products inside of ours for the layer's own, and quantise them by other rules.
_grouped_matmul = _quantizations.without_qwix_interception(grouped_matmul)
add_bias = _quantizations.without_qwix_interception(experts.add_bias)


def find_product(layer: Any, kernels: tuple[object, ...]) -> Product | None:
    """Returns what MaxText would multiply with where that quantises, or None.

    Args:
      layer: MaxText's ``RoutedMoE``.
      kernels: the experts' matrices.

    Raises:
      NotImplementedError: it would with what is not served.
    """
    config, op = layer.config, "gmm" if _has_kernels(layer) else "ragged_dot"
    rule = moe.qpl.get_current_rule(op) if config.use_qwix_quantization else None
    dtypes = _dtypes(layer.quant) if op == "gmm" else (None, None)
    is_quantised = any(dtypes) or getattr(rule, "weight_qtype", None) is not None
    reasons = {
        "weights that are packed": not all(isinstance(kernel, jax.Array) for kernel in kernels),
        "use_tokamax_gmm, which is for TPUs alone": is_quantised and config.use_tokamax_gmm,
    }
    if asked := [reason for reason, is_asked in reasons.items() if is_asked]:
        what = f"quantised products of {asked[0]}; got quantization={config.quantization!r}"
        raise NotImplementedError(not_served(what))
    if not is_quantised:
        return None
    return partial(_megablox, layer, dtypes) if op == "gmm" else partial(_ragged_dot, layer)


def _has_kernels(layer: Any) -> bool:
    """Says whether MaxText multiplies with kernels, which quantise by themselves."""
    return layer.config.megablox or layer.config.use_tokamax_gmm


def _dtypes(quant: Any) -> tuple[Any, Any]:
    """Returns what AQT or fp8 have rows and experts quantised to, as MaxText asks them.

    Raises:
      NotImplementedError: it is another kind of quantisation.
    """
    if quant is None or isinstance(quant, _quantizations.ServeFp8WeightQuantization):
        return None, None
    if (dtype := getattr(quant, "quantize_dtype", None)) is not None:
        return dtype, dtype
    forward = getattr(getattr(quant, "quant_dg", None), "fwd", None)
    if forward is None:
        what = f"quantised products by {type(quant).__name__} with what it has for quant_dg"
        raise NotImplementedError(not_served(what))
    sides = forward.dg_quantizer.lhs, forward.dg_quantizer.rhs
    return tuple(side.numerics.get_dtype() for side in sides)


def _megablox(
    layer: Any,
    dtypes: tuple[Any, Any],
    rows: jax.Array,
    kernel: jax.Array,
    group_sizes: jax.Array,
    whose: str,
) -> jax.Array:
    """Multiplies with megablox, which quantises by the dtypes or by Qwix's rule."""
    config = layer.config
    tiles = tile_sizes(config, whose, is_eval=max_utils.is_eval(config))
    # MaxText pads for both products by this one.
    padded, _ = max_utils.maybe_pad(rows, tile_sizes(config, "wi", max_utils.is_eval(config))[0])
    varying = [
        tuple(sorted(jax.typeof(array).manual_axis_type.varying)) for array in (rows, kernel)
    ]
    out = moe.mblx.gmm(
        lhs=padded.astype(layer.dtype),
        rhs=kernel.astype(layer.dtype),
        group_sizes=group_sizes,
        preferred_element_type=layer.dtype,
        tiling=tiles,
        group_offset=0,
        lhs_quantize_dtype=dtypes[0],
        rhs_quantize_dtype=dtypes[1],
        use_qwix_quantization=config.use_qwix_quantization,
        lhs_vma_axes=varying[0],
        rhs_vma_axes=varying[1],
        interpret=layer.mesh.devices.flat[0].platform != "tpu",
    )
    return _used(out[: len(rows)], group_sizes)


def _ragged_dot(
    layer: Any, rows: jax.Array, kernel: jax.Array, group_sizes: jax.Array, whose: str
) -> jax.Array:
    """Multiplies with what Qwix intercepts, by the name that it knows."""
    del whose  # XLA tiles it.
    out = jax.lax.ragged_dot(
        lhs=rows.astype(layer.dtype),
        rhs=kernel.astype(layer.dtype),
        group_sizes=group_sizes,
        preferred_element_type=layer.dtype,
    )
    return _used(out, group_sizes)


def _used(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeroes rows of no group: kernels leave them unwritten, and scales are of all rows."""
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), rows, 0)


def plain(rows: jax.Array, kernel: jax.Array, group_sizes: jax.Array, whose: str) -> jax.Array:
    """Multiplies without quantising."""
    del whose
    return _grouped_matmul(rows, kernel, group_sizes)
