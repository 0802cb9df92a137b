"""What a call of the layer is given, checked."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_ep._checks import check_array, check_known, check_shape
from jax_ep.flax._config import Config


class Inputs(NamedTuple):
    """What a call of the layer is given; all but ``x`` may be None.

    ``topk_weights`` come with ``topk_idx`` where another router has made both.
    """

    x: Float[Array, "*batch hidden"]
    token_mask: Bool[Array, "*batch"] | None = None
    topk_idx: Int32[Array, "*batch num_topk"] | None = None
    topk_weights: Float32[Array, "*batch num_topk"] | None = None
    share: Float32[Array, "num_ranks"] | None = None
    jitter_key: jax.Array | None = None


def check_inputs(config: Config, inputs: Inputs, *, has_rngs: bool) -> None:
    """Checks what a call is given.

    Raises:
      TypeError: an argument is no array of what it has to hold.
      ValueError: shapes do not fit one another or are not known, or the layer has no use for an
        argument.
    """
    x = inputs.x
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        given = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be an array [..., hidden] of floats; got {given}.")
    if x.ndim == 0 or x.shape[-1] != config.hidden:
        raise ValueError(f"x must have shape [..., hidden = {config.hidden}]; got {list(x.shape)}.")
    check_known("x", x, "..., hidden")
    if inputs.token_mask is not None:
        _check_kind("token_mask", inputs.token_mask, jnp.bool_, "booleans")
        check_shape("token_mask", inputs.token_mask, x.shape[:-1], "...")
    if inputs.topk_idx is not None:
        _check_choices(config, inputs.topk_idx, x)
    if config.router is None and (inputs.topk_idx is not None or has_rngs):
        raise ValueError(
            "topk_idx and rngs must be None where the router is a callable, which chooses by "
            "itself: give them to that; got one."
        )
    if inputs.share is not None:
        check_array("share", inputs.share, "num_ranks")
        if not config.num_spares:
            raise ValueError("share needs num_spares of 1 or more; got 0.")


def check_routed(config: Config, inputs: Inputs) -> None:
    """Checks what a router that was called returned.

    Raises:
      TypeError: it is no arrays of integers and float32.
      ValueError: they are not ``[..., num_topk]`` for ``x`` [..., hidden].
    """
    _check_choices(config, inputs.topk_idx, inputs.x)
    weights: Any = inputs.topk_weights
    _check_kind("router's topk_weights", weights, jnp.float32, "float32")
    wanted = (*inputs.x.shape[:-1], config.num_topk)
    check_shape("router's topk_weights", weights, wanted, "..., num_topk")


def _check_choices(config: Config, topk_idx: Any, x: jax.Array) -> None:
    _check_kind("topk_idx", topk_idx, jnp.integer, "integers")
    check_shape("topk_idx", topk_idx, (*x.shape[:-1], config.num_topk), "..., num_topk")


def _check_kind(name: str, value: Any, kind: Any, say: str) -> None:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        given = type(value).__name__
        raise TypeError(f"{name} must be an array of {say}, or None; got {given}.")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} must hold {say}; got {value.dtype}.")
