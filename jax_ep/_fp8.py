"""How rows are quantised, in pure JAX: one scale for each block of a row, and floats of 8 bits.

Only operations that every compiler of XLA's rounds alike: it divides by multiplying with inverses,
so quotients are finished in integers; and the roundings are additions to the bits of floats.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

DTYPES = ("float8_e4m3fn", "float8_e5m2")

BLOCK = 128
"""How many neighbours share a scale, unless told otherwise."""

LEAST_SCALE = 2.0**-100
"""Below it floats that some hardware flushes to zero would begin to tell."""

_INFINITY = 0x7F800000


def num_blocks(hidden: int, block: int) -> int:
    """Returns how many blocks make up a row."""
    return -(-hidden // block)


def encoded_bytes(hidden: int) -> int:
    """Returns how many bytes a row takes with its scales, in blocks of the usual length."""
    return hidden + 4 * num_blocks(hidden, BLOCK)


def encode_rows(
    x: Float[Array, "*lead hidden"], dtype: jnp.dtype, *, block: int, power_of_two: bool
) -> tuple[Float[Array, "*lead hidden"], Float32[Array, "*lead num_blocks"]]:
    """Quantises rows as ``wire.encode`` says."""
    wide = _cut(x.astype(jnp.float32), block)
    magnitude = _bits(wide) & 0x7FFFFFFF
    largest = jnp.max(jnp.where(magnitude < _INFINITY, magnitude, 0), axis=-1, initial=0)
    max_finite = np.float32(jnp.finfo(dtype).max)
    largest = jnp.maximum(_float(largest), max_finite * np.float32(LEAST_SCALE))
    scales = _divide(largest, jnp.full_like(largest, max_finite))
    if power_of_two:
        scales = _float((_bits(scales) + 0x7FFFFF) & _INFINITY)
    inverses = _divide(jnp.ones_like(scales), scales)
    rows = _round(wide * inverses[..., None], dtype)
    return _join(rows, x.shape), scales


def decode_rows(
    rows: Float[Array, "*lead hidden"],
    scales: Float32[Array, "*lead num_blocks"],
    dtype: jnp.dtype,
    *,
    block: int,
) -> Float[Array, "*lead hidden"]:
    """Widens rows as ``wire.decode`` says."""
    wide = _cut(rows.astype(jnp.float32), block) * scales[..., None]
    return _join(wide.astype(dtype), rows.shape)


def _cut(wide: Float32[Array, "*lead hidden"], block: int) -> Float32[Array, "*lead blocks block"]:
    """Cuts rows into blocks, the last one filled up with zeros."""
    *lead, hidden = wide.shape
    count = num_blocks(hidden, block)
    if padding := count * block - hidden:
        wide = jnp.pad(wide, [*[(0, 0)] * len(lead), (0, padding)])
    return wide.reshape(*lead, count, block)


def _join(blocks: Float[Array, "*lead blocks block"], shape: tuple[int, ...]) -> jax.Array:
    """Makes rows of blocks again, without what the last one was filled up with."""
    *lead, count, block = blocks.shape
    return blocks.reshape(*lead, count * block)[..., : shape[-1]]


def _divide(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Divides positive normal numbers, rounding once, where the quotient is normal too."""
    (digits_a, exponent_a), (digits_b, exponent_b) = _parts(a), _parts(b)
    is_less = (digits_a < digits_b).astype(jnp.int32)
    shift = 23 + is_less  # so that the quotient has 24 digits as well
    quotient = digits_a.astype(jnp.float32) / digits_b.astype(jnp.float32)
    near = (quotient * _float((shift + 127) << 23)).astype(jnp.int32)
    # Both overflow, by as much: what is left of the dividend is small.
    left = (digits_a << shift) - near * digits_b
    digits = near + (2 * left + digits_b) // (2 * digits_b)
    # The first digit is not stored: it adds one to the exponent.
    return _float(((exponent_a - exponent_b + 126 - is_less) << 23) + digits)


def _parts(x: Float32[Array, "..."]) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """Returns the 24 binary digits of positive normal numbers, and their stored exponents."""
    bits = _bits(x)
    return (bits & 0x7FFFFF) | 0x800000, bits >> 23


def _round(x: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Rounds to 8 bits, to nearest, ties to even; what does not overflow, or is no number."""
    info = jnp.finfo(dtype)
    infinity, nan = np.asarray([np.inf, np.nan], dtype).view(np.uint8).tolist()
    surplus = 23 - info.nmant
    first_normal = int(info.minexp) + 127
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    is_odd = (magnitude >> surplus) & 1
    normal = (magnitude + (1 << (surplus - 1)) - 1 + is_odd) >> surplus
    normal -= (first_normal - 1) << info.nmant
    # Adding this aligns a subnormal's last place with float32's, rounding on the way.
    aligner = np.float32(2.0 ** (surplus + int(info.minexp)))
    subnormal = _bits(_float(magnitude) + aligner) - int(aligner.view(np.int32))
    finite = jnp.where(magnitude < first_normal << 23, subnormal, normal)
    special = jnp.where(magnitude > _INFINITY, nan, infinity)
    code = jnp.where(magnitude < _INFINITY, finite, special) | ((bits >> 24) & 0x80)
    return lax.bitcast_convert_type(code.astype(jnp.uint8), dtype)


def _bits(x: jax.Array) -> Int32[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> Float32[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)
