"""Comparisons by bits and by units in the last place, whatever the dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

_SHOWN_MISMATCHES = 5


def assert_bitwise_equal(actual: ArrayLike, expected: ArrayLike) -> None:
    """Asserts that two arrays have one shape, one dtype and the same bits.

    Unlike an equality of values this tells -0.0 from 0.0, and takes a NaN for equal to
    one of the same sign and payload.

    Args:
      actual: what was computed; a NumPy or JAX array of any dtype, fp8 included.
      expected: what it should be.

    Raises:
      AssertionError: they differ; the message shows the first places with values and bits.

    >>> assert_bitwise_equal(np.float32([1.0, np.nan]), np.float32([1.0, np.nan]))
    >>> assert_bitwise_equal(np.float32([0.0]), np.float32([-0.0]))
    Traceback (most recent call last):
    AssertionError: Not bitwise equal: 1 of 1 elements of float32[1] differ.
      [0]: actual 0.0 (0x00000000), expected -0.0 (0x80000000)
    """
    __tracebackhide__ = True
    actual, expected = _same_type(actual, expected)
    differs = (_bytes(actual) != _bytes(expected)).any(axis=-1)
    if differs.any():
        raise AssertionError(_describe("Not bitwise equal", actual, expected, differs))


def assert_close_ulp(actual: ArrayLike, expected: ArrayLike, *, max_ulp: int) -> None:
    """Asserts that no element is more than some units in the last place away.

    The distance of two numbers is how many numbers of their dtype one passes on the way from
    the one to the other. Zeros of both signs are one number; NaNs equal each other; an
    infinity equals only itself.

    Args:
      actual: what was computed; a NumPy or JAX array of any float dtype, fp8 included.
      expected: what it should be, of the same shape and dtype.
      max_ulp: the largest distance that passes; 0 asks for equal values.

    Raises:
      AssertionError: shapes, dtypes or elements differ; the message shows the first places.
      TypeError: the arrays are not floats.

    >>> one = np.float32([1.0])
    >>> assert_close_ulp(np.nextafter(one, np.float32(2.0)), one, max_ulp=1)
    >>> assert_close_ulp(one + np.float32(1e-6), one, max_ulp=1)
    Traceback (most recent call last):
    AssertionError: More than 1 ULP apart (8 at worst): 1 of 1 elements of float32[1] differ.
      [0]: actual 1.0000009536743164 (0x3f800008), expected 1.0 (0x3f800000)
    """
    __tracebackhide__ = True
    actual, expected = _same_type(actual, expected)
    if not jnp.issubdtype(actual.dtype, jnp.floating):
        raise TypeError(f"actual and expected must be floats; got {actual.dtype}.")
    distance = _ulp_distance(actual, expected)
    both_nan = np.isnan(actual) & np.isnan(expected)
    special = ~(np.isfinite(actual) & np.isfinite(expected))
    differs = np.where(special, (actual != expected) & ~both_nan, distance > max_ulp)
    if differs.any():
        worst = distance[differs].max()
        what = f"More than {max_ulp} ULP apart ({worst} at worst)"
        raise AssertionError(_describe(what, actual, expected, differs))


def _same_type(actual: ArrayLike, expected: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    __tracebackhide__ = True
    actual, expected = np.asarray(jax.device_get(actual)), np.asarray(jax.device_get(expected))
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise AssertionError(
            f"Not of one type: actual is {_type(actual)}, expected is {_type(expected)}."
        )
    return actual, expected


def _type(x: np.ndarray) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _bytes(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of each element along a new last axis."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(*x.shape, x.dtype.itemsize)


def _ulp_distance(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    a, b = _order(actual), _order(expected)
    # As unsigned numbers, since opposite signs may be further apart than int64 reaches.
    return np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)


def _order(x: np.ndarray) -> np.ndarray:
    """Maps floats to integers in the same order, neighbours to neighbours."""
    bits = x.view(f"int{8 * x.dtype.itemsize}").astype(np.int64)
    sign = np.int64(-1) << (8 * x.dtype.itemsize - 1)
    return np.where(bits < 0, sign - bits, bits)


def _describe(what: str, actual: np.ndarray, expected: np.ndarray, differs: np.ndarray) -> str:
    places = [
        f"  {list(place)}: actual {actual[place]} (0x{_hex(actual[place])}), "
        f"expected {expected[place]} (0x{_hex(expected[place])})"
        for place in map(tuple, np.argwhere(differs)[:_SHOWN_MISMATCHES].tolist())
    ]
    head = f"{what}: {differs.sum()} of {differs.size} elements of {_type(actual)} differ."
    return "\n".join([head, *places])


def _hex(element: ArrayLike) -> str:
    return np.asarray(element).tobytes()[::-1].hex()  # most significant byte first
