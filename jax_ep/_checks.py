"""Static checks of arguments: each error names argument, requirement and what was given."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

_SUMMABLE = ("bfloat16", "float16", "float32", "float64")


def check_positive(name: str, value: int) -> None:
    """Checks that a static count is an integer of at least 1.

    Raises:
      TypeError: ``value`` is not an int.
      ValueError: ``value`` is below 1.
    """
    check_count(name, value, 1)


def check_count(name: str, value: int, least: int) -> None:
    """Checks that a static count is an integer, and not too small.

    Raises:
      TypeError: ``value`` is not an int.
      ValueError: ``value`` is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def check_nodes(ranks_per_node: int, num_ranks: int) -> None:
    """Checks that ranks make whole nodes.

    Raises:
      TypeError: ``ranks_per_node`` is not an int.
      ValueError: it is below 1, or does not divide the ranks.
    """
    check_positive("ranks_per_node", ranks_per_node)
    if num_ranks % ranks_per_node:
        raise ValueError(f"ranks_per_node must divide the {num_ranks} ranks; got {ranks_per_node}.")


def check_seconds(name: str, value: object, least: float) -> None:
    """Checks that a time is a real number of seconds, finite and at least ``least``.

    Raises:
      TypeError: ``value`` is a bool or no real number.
      ValueError: it is too small or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a real number; got {value!r} of type {type(value).__name__}."
        )
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not least <= seconds < math.inf:
        raise ValueError(f"{name} must be finite and at least {least:g}; got {value!r}.")


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Checks that a static option is one of the values it may take.

    Raises:
      ValueError: it is not.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")


def check_array(name: str, value: Any, dims: str) -> None:
    """Checks that ``value`` is an array with as many axes as ``dims`` names.

    Raises:
      TypeError: it has no shape or dtype.
      ValueError: it has another number of axes, or the size of one is not known.
    """
    _check_is_array(name, value, dims)
    if value.ndim != len(dims.split(", ")):
        raise ValueError(f"{name} must have shape [{dims}]; got {list(value.shape)}.")
    check_known(name, value, dims)


def check_leading_axis(name: str, value: Any, size: int, dim: str) -> None:
    """Checks that ``value`` is an array whose first axis has a size that it must have.

    Raises:
      TypeError: it has no shape or dtype.
      ValueError: it has no axis, or one of another size, or the size of one is not known.
    """
    dims = f"{dim}, ..."
    _check_is_array(name, value, dims)
    if value.ndim == 0 or value.shape[0] != size:
        raise ValueError(
            f"{name} must have shape [{dims}] = [{size}, ...]; got {list(value.shape)}."
        )
    check_known(name, value, dims)


def _check_is_array(name: str, value: Any, dims: str) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array [{dims}]; got {type(value).__name__}.")


def check_known(name: str, value: Any, dims: str) -> None:
    """Checks that all sizes of an array are numbers.

    Raises:
      ValueError: one is a symbol.
    """
    if not all(isinstance(size, int) for size in value.shape):
        raise ValueError(
            f"{name} must have shape [{dims}] of known sizes; got {list(value.shape)}, which has "
            "symbols of jax.export."
        )


def check_summable(name: str, value: jax.Array, hint: str = "") -> None:
    """Checks that an array holds floats that the library multiplies and adds up.

    Raises:
      TypeError: its dtype is none of these.
    """
    if value.dtype.name not in _SUMMABLE:
        raise TypeError(f"{name} must have one of the dtypes {_SUMMABLE}{hint}; got {value.dtype}.")


def check_dtype(name: str, value: jax.Array, dtype: jax.typing.DTypeLike) -> None:
    """Checks an array's dtype.

    Raises:
      TypeError: it is another one.
    """
    if value.dtype != jnp.dtype(dtype):
        raise TypeError(f"{name} must have dtype {jnp.dtype(dtype).name}; got {value.dtype}.")


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...], dims: str) -> None:
    """Checks an array's shape against what the plan was made for.

    Raises:
      ValueError: it is another one.
    """
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape [{dims}] = {list(shape)}; got {list(value.shape)}."
        )
