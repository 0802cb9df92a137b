"""What crosses the wire as 8-bit floats, in NumPy: the nearest of all numbers that there are.

It shares no code with the library. Numbers are found by searching the list of all that the dtype
has, and not by working on bits.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

DTYPES = ("float8_e4m3fn", "float8_e5m2")


@functools.cache
def magnitudes(dtype: np.dtype) -> np.ndarray:
    """Lists the finite numbers that are not negative, ascending: the code of each is its index."""
    numbers = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float64)
    return numbers[np.isfinite(numbers)]


def nearest(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds float32 to the nearest number, of two to the one with an even code."""
    numbers, size = magnitudes(dtype), np.abs(x.astype(np.float64))
    middles = (numbers[1:] + numbers[:-1]) / 2
    code = np.searchsorted(middles, np.where(np.isnan(size), 0, size), side="left")
    is_tie = size == middles[np.minimum(code, len(middles) - 1)]
    code += is_tie & (code % 2 == 1)
    infinity, nan = np.array([np.inf, np.nan]).astype(dtype).view(np.uint8)
    code = np.where(np.isinf(x), infinity, code)
    code = np.where(np.isnan(x), nan, code)
    return (code + np.where(np.signbit(x), 128, 0)).astype(np.uint8).view(dtype)


def encode(
    x: np.ndarray, dtype: str, block: int = 128, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes rows [..., H] block by block, as they come."""
    to = np.dtype(getattr(ml_dtypes, dtype))
    most = np.float32(magnitudes(to)[-1])
    rows, scales = np.empty(x.shape, to), []
    for begin in range(0, x.shape[-1], block):
        some = x[..., begin : begin + block].astype(np.float32)
        largest = np.abs(np.where(np.isfinite(some), some, 0)).max(axis=-1, keepdims=True)
        scale = np.maximum(largest, most * np.float32(2.0**-100)) / most
        assert scale.dtype == np.float32
        if power_of_two:
            scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        rows[..., begin : begin + block] = nearest(some * (np.float32(1) / scale), to)
        scales.append(scale[..., 0])
    return rows, np.stack(scales, axis=-1) if scales else np.zeros((*x.shape[:-1], 0), np.float32)


def decode(rows: np.ndarray, scales: np.ndarray, dtype: np.dtype, block: int = 128) -> np.ndarray:
    """Widens rows [..., H]."""
    each = np.repeat(scales, block, axis=-1)[..., : rows.shape[-1]]
    with np.errstate(over="ignore"):  # Numbers next to the largest may be rounded past it.
        return (rows.astype(np.float32) * each).astype(dtype)
