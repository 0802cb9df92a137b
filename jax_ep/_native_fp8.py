"""Native code's part in encoding rows: what ``_fp8`` says, by a handler that knows of no ranks."""

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jax_ep._compat import result_type
from jax_ep._fp8 import num_blocks
from jax_ep._library import register_handlers
from jax_ep._types import Platform

TARGET: Final = "jax_ep_encode_rows"

SIGNATURE: Final = {
    "operands": ["x"],
    "results": ["rows", "scales"],
    "attributes": ["block", "power_of_two"],
}
"""What the library should say of it."""


def encode_rows(
    platform: Platform,
    x: Float[Array, "*lead hidden"],
    dtype: jnp.dtype,
    *,
    block: int,
    power_of_two: bool,
) -> tuple[Float[Array, "*lead hidden"], Float32[Array, "*lead num_blocks"]]:
    """Quantises rows as ``wire.encode`` says."""
    register_handlers(platform)
    count = (*x.shape[:-1], num_blocks(x.shape[-1], block))
    results = [result_type(x.shape, dtype, x), result_type(count, jnp.float32, x)]
    encode = jax.ffi.ffi_call(TARGET, results)
    rows, scales = encode(x, block=np.int64(block), power_of_two=np.int64(power_of_two))
    return rows, scales
