"""Exchanges in which rows cross as 8-bit floats with scales, and how they are differentiated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._axes import check_use
from jax_ep._combine import combine
from jax_ep._encoding import Encoding, encode
from jax_ep._exchange import exchange
from jax_ep._fp8 import decode_rows
from jax_ep._ops import GATHER_ROWS
from jax_ep._plan import Plan
from jax_ep._rows import row_sources


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def encode_alone(encoding: Encoding, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes rows; refuses to be differentiated."""
    return encode(encoding, x)


@encode_alone.defjvp
def _refuse_to_derive(*_: Any) -> Any:
    raise TypeError(
        "encode has no derivative, as 8-bit floats cannot carry one: differentiate wire.dispatch, "
        "or stop the gradient of x."
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def send_encoded(
    encoding: Encoding, call: str, x: jax.Array, beside: tuple[jax.Array, ...], plan: Plan
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sends tokens encoded, and what belongs to them as it is, in one exchange.

    Args:
      encoding: how.
      call: the public function that wants it, for errors.
      x: this rank's tokens.
      beside: what else goes to the ranks of its tokens.
      plan: where everything goes.

    Returns:
      The rows, decoded to the dtype of ``x``, and those of what went beside them.
    """
    payloads = [*encode(encoding, x), *beside]
    rows, scales, *others = exchange(GATHER_ROWS, plan, check_use(plan), call, payloads)
    return decode_rows(rows, scales, x.dtype, block=encoding.block), tuple(others)


@send_encoded.defjvp
def _derive(encoding: Encoding, call: str, primals: Any, tangents: Any) -> Any:
    x, beside, plan = primals
    moving = [tangents[0], *tangents[1]]
    rows, *others = exchange(GATHER_ROWS, plan, check_use(plan), call, moving)
    return send_encoded(encoding, call, x, beside, plan), (rows, tuple(others))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reduce_to_encoded(
    encoding: Encoding, rows: jax.Array, topk_weights: jax.Array | None, plan: Plan
) -> jax.Array:
    """Does as ``combine``; the cotangents of its result cross encoded."""
    del encoding
    return combine(rows, plan, topk_weights)


def _forward(
    encoding: Encoding, rows: jax.Array, topk_weights: jax.Array | None, plan: Plan
) -> tuple[jax.Array, Any]:
    del encoding
    out = combine(rows, plan, topk_weights)
    return out, (None if topk_weights is None else (rows, topk_weights), plan)


def _backward(encoding: Encoding, kept: Any, dout: jax.Array) -> Any:
    scaled, plan = kept
    call = "combine (gradient)"
    if scaled is None:
        drows, _ = send_encoded(encoding, call, dout, (), plan)
        return drows, None, None
    rows, topk_weights = scaled
    wide, (of_token,) = send_encoded(
        encoding, call, dout.astype(jnp.float32), (topk_weights,), plan
    )
    k = row_sources(plan).k[:, None]
    is_own = k == jnp.arange(plan.num_topk, dtype=jnp.int32)
    weights = jnp.sum(jnp.where(is_own, of_token, 0), axis=1, keepdims=True)
    dots = jnp.sum(rows.astype(jnp.float32) * wide, axis=1, keepdims=True)
    # Each token and k has one row: nothing is added up but zeros.
    dweights = combine(jnp.where(is_own, dots, 0), plan)
    return (weights * wide).astype(rows.dtype), dweights, None


reduce_to_encoded.defvjp(_forward, _backward)
