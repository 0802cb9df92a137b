"""Payloads that say where they come from, so that a misrouted row names itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

_CODE_BITS = 31


def encode_origin(
    rank: ArrayLike, token: ArrayLike, *, num_tokens: int, hidden: int, dtype: DTypeLike
) -> np.ndarray:
    """Writes its own origin into each token's payload.

    The number ``1 + rank * num_tokens + token`` is written in digits as large as ``dtype``
    represents exactly, lowest first, repeated along the row. No row is all zeros, as padding is,
    and a bit copy in any dtype keeps it readable for `decode_origin`.

    Args:
      rank: integers; broadcasts with ``token``.
      token: integers within 0 to ``num_tokens - 1``.
      num_tokens: tokens of each rank.
      hidden: columns of a payload.
      dtype: any integer or float type of JAX, fp8 included.

    Returns:
      Payloads of shape ``[..., hidden]``, where ``...`` is the shape of ``rank`` and ``token``.

    Raises:
      ValueError: ``hidden`` columns of ``dtype`` cannot hold some origin.

    >>> payload = encode_origin(2, np.arange(3), num_tokens=3, hidden=4, dtype=np.float32)
    >>> payload[:, 0]
    array([7., 8., 9.], dtype=float32)
    """
    rank, token = np.broadcast_arrays(np.asarray(rank, np.int64), np.asarray(token, np.int64))
    code = 1 + rank * num_tokens + token
    bits, num_digits = _digits(dtype, hidden)
    largest = code.max(initial=0)
    if largest >> (bits * num_digits):
        raise ValueError(
            f"hidden must leave room for the origin {largest} in digits of {bits} bits "
            f"({jnp.dtype(dtype)}); got {hidden}."
        )
    shifts = bits * (np.arange(hidden) % num_digits)
    return ((code[..., None] >> shifts) & ((1 << bits) - 1)).astype(dtype)


def decode_origin(rows: ArrayLike, *, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `encode_origin` wrote.

    Args:
      rows: copies of payloads, ``[..., hidden]``, in any order; all-zero rows may be among them.
      num_tokens: as it was when they were written.

    Returns:
      ``(rank, token)`` of each row, both int64 of shape ``[...]``; -1 for rows of zeros.

    Raises:
      ValueError: the columns of some row disagree, so that it is no copy of one payload.

    >>> payload = encode_origin(2, [0, 1], num_tokens=3, hidden=8, dtype=jnp.bfloat16)
    >>> decode_origin(payload, num_tokens=3)
    (array([2, 2]), array([0, 1]))
    """
    rows = np.asarray(jax.device_get(rows))
    hidden = rows.shape[-1]
    bits, num_digits = _digits(rows.dtype, hidden)
    digits = rows[..., :num_digits].astype(np.int64)
    code = (digits << (bits * np.arange(num_digits))).sum(axis=-1)
    rank, token = np.where(code > 0, np.divmod(code - 1, num_tokens), -1)
    expected = digits[..., np.arange(hidden) % num_digits]
    torn = (rows.astype(np.float64) != expected).any(axis=-1)
    if torn.any():
        place = np.argwhere(torn)[0].tolist()
        raise ValueError(
            f"rows must be whole copies of payloads; row {place} starts like one of rank "
            f"{rank[tuple(place)]}, token {token[tuple(place)]} but goes on differently."
        )
    return rank, token


def _digits(dtype: DTypeLike, hidden: int) -> tuple[int, int]:
    """Returns the bits of one digit, and how many digits a row repeats."""
    if jnp.issubdtype(dtype, jnp.integer):
        bits = int(jnp.iinfo(dtype).bits) - 1
    else:
        bits = int(jnp.finfo(dtype).nmant) + 1
    bits = min(bits, _CODE_BITS)
    return bits, min(max(hidden, 1), -(-_CODE_BITS // bits))
