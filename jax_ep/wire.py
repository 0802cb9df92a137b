"""Tokens cross between ranks as 8-bit floats with scales: half the bytes of bfloat16.

``encode`` and ``decode`` are local arithmetic, for experts that compute with what crosses.
``dispatch`` encodes, sends and decodes; ``combine`` has the cotangents of its result cross so. The
other two ways, the result of ``combine`` and the gradient of ``dispatch``, are sums: these stay in
the dtype of the rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ep._checks import check_array, check_dtype, check_one_of, check_positive, check_shape
from jax_ep._encoded import encode_alone, reduce_to_encoded, send_encoded
from jax_ep._encoding import Encoding
from jax_ep._fp8 import BLOCK, DTYPES, decode_rows, num_blocks
from jax_ep._plan import Plan, check_plan
from jax_ep._types import Implementation

_WIDE_DTYPES = ("bfloat16", "float16", "float32")


@jax.named_scope("jax_ep.wire.encode")
def encode(
    x: Float[Array, "*lead hidden"],
    dtype: jax.typing.DTypeLike = "float8_e4m3fn",
    *,
    block: int = BLOCK,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*lead hidden"], Float32[Array, "*lead num_blocks"]]:
    """Quantises rows to 8-bit floats, with one scale for each block of a row.

    With ``a`` the largest finite ``|x|`` of a block and ``m`` the largest finite number of
    ``dtype``, its scale is ``max(a, m * 2**-100) / m``, and the block becomes ``x * (1 / scale)``:
    all in float32, each step rounded once, and in the end to ``dtype``: to nearest, ties to even.
    No step overflows, and zeros stay zeros. These are the same bits on every platform, but for the
    signs of NaNs. Local arithmetic: no communication. Send both results in one exchange,
    ``jax_ep.dispatch(wire.encode(x), plan)``, for experts that compute with them; otherwise use
    ``wire.dispatch``.

    Args:
      x: bfloat16, float16 or float32. What is not finite does not count for a scale, and spoils
        none of its neighbours: it stays what it is, where ``dtype`` has it, and else becomes NaN.
      dtype: ``"float8_e4m3fn"``, with 4 significant bits, or ``"float8_e5m2"``, with 3 and a larger
        range within a block.
      block: how many neighbours share a scale; the last block of a row may be shorter.
      power_of_two: whether to round scales up to a power of two, so that to scale is exact. Next to
        the largest in the dtype of ``x``, numbers may then be decoded as infinities.
      implementation: ``"xla"``, ``"native"``, or None for native code where it serves. Either gives
        the same bits.

    Returns:
      The rows in ``dtype``, and the scales, one for each block.

    Raises:
      TypeError: ``x`` has another dtype or is no array, ``block`` is no int, or the call is
        differentiated.
      ValueError: ``x`` has no axis, or ``dtype``, ``block`` or ``implementation`` is out of range.
      NotImplementedError: ``implementation="native"`` where native code cannot serve.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import wire
      >>> rows, scales = wire.encode(jnp.array([[1.0, -896.0, 0.3]]))
      >>> rows.tolist(), scales.tolist()
      ([[0.5, -448.0, 0.15625]], [[2.0]])
    """
    encoding = _encoding("dtype", dtype, block, power_of_two, implementation)
    _check_wide("x", x)
    return encode_alone(encoding, x)


@jax.named_scope("jax_ep.wire.decode")
def decode(
    rows: Float[Array, "*lead hidden"],
    scales: Float32[Array, "*lead num_blocks"],
    dtype: jax.typing.DTypeLike,
    *,
    block: int = BLOCK,
) -> Float[Array, "*lead hidden"]:
    """Widens rows that ``encode`` made: each float times its block's scale.

    The product is taken in float32, and rounded once to ``dtype``. Local arithmetic: no
    communication.

    Args:
      rows: what ``encode`` returned, or rows of it that were dispatched.
      scales: likewise.
      dtype: bfloat16, float16 or float32.
      block: as given to ``encode``.

    Returns:
      The rows in ``dtype``. Before that last rounding they differ from what was encoded by less
      than a 16th of it with ``"float8_e4m3fn"``, an 8th with ``"float8_e5m2"``; small numbers by
      hardly more than ``2**-10`` times the scale, or ``2**-17`` times.

    Raises:
      TypeError: an argument has another dtype or is no array, or ``block`` is no int.
      ValueError: ``dtype`` or ``block`` is out of range, or there are not as many scales as blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep import wire
      >>> wire.decode(*wire.encode(jnp.array([[1.0, -896.0, 0.3]])), "float32").tolist()
      [[1.0, -896.0, 0.3125]]
    """
    check_one_of("dtype", jnp.dtype(dtype).name, _WIDE_DTYPES)
    _check_floats("rows", rows, DTYPES)
    check_positive("block", block)
    wanted = (*rows.shape[:-1], num_blocks(rows.shape[-1], block))
    check_array("scales", scales, ", ".join(["..."] * (rows.ndim - 1) + ["num_blocks"]))
    check_shape("scales", scales, wanted, "..., num_blocks")
    check_dtype("scales", scales, jnp.float32)
    return decode_rows(rows, scales, jnp.dtype(dtype), block=block)


@jax.named_scope("jax_ep.wire.dispatch")
def dispatch(
    x: Float[Array, "num_tokens hidden"],
    plan: Plan,
    dtype: jax.typing.DTypeLike = "float8_e4m3fn",
    *,
    block: int = BLOCK,
    power_of_two: bool = False,
) -> Float[Array, "capacity hidden"]:
    """Sends each token to the ranks of its experts as 8-bit floats, and widens it there.

    Row by row it is ``decode(*encode(x))`` of what ``jax_ep.dispatch`` returns. Rows and scales go
    in one exchange. Communicates along the plan's axis.

    Its derivatives are those of ``jax_ep.dispatch``, to any order, as if nothing had been rounded
    (straight through). The gradient is a sum of cotangents, which cross in the dtype of ``x``:
    nothing is encoded on that way, see ``combine``.

    Args:
      x: this rank's tokens: bfloat16, float16 or float32, finite or not, as for ``encode``.
      plan: made by ``make_plan`` on the same ranks for as many tokens.
      dtype: what crosses, as for ``encode``.
      block: as for ``encode``.
      power_of_two: as for ``encode``.

    Returns:
      This rank's rows in the dtype of ``x``, laid out as by ``jax_ep.dispatch``.

    Raises:
      TypeError: ``x`` has another dtype or is no array, ``plan`` is not a ``Plan``, or ``block`` is
        no int.
      ValueError: ``x`` does not fit the plan, or ``dtype`` or ``block`` is out of range.

    Example:
      >>> import jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1], [0], [1]]), num_experts=2)
      >>> x = jnp.array([[1.0, 448.0], [0.3, -896.0], [0.0, 0.0]])
      >>> jax_ep.wire.dispatch(x, plan).tolist()
      [[0.3125, -896.0], [1.0, 448.0], [0.0, 0.0]]
    """
    check_plan(plan)
    encoding = _encoding("dtype", dtype, block, power_of_two, _demanded(plan))
    check_array("x", x, "num_tokens, hidden")
    check_shape("x", x, (plan.num_tokens, x.shape[1]), "num_tokens, hidden")
    _check_wide("x", x)
    rows, _ = send_encoded(encoding, "dispatch", x, (), plan)
    return rows


@jax.named_scope("jax_ep.wire.combine")
def combine(
    rows: Float[Array, "capacity hidden"],
    plan: Plan,
    topk_weights: Float32[Array, "num_tokens num_topk"] | None = None,
    *,
    cotangents: jax.typing.DTypeLike = "float8_e4m3fn",
    block: int = BLOCK,
    power_of_two: bool = False,
) -> Float[Array, "num_tokens hidden"]:
    """Does as ``jax_ep.combine``, but has the cotangents of its result cross as 8-bit floats.

    What comes back is the same to the bit: partial sums, in the dtype of ``rows``. In reverse each
    token's cotangent goes to the ranks of its experts, as the token itself did, and is encoded
    for that; with ``d`` its decoded value in float32, the gradients are
    ``drows[row(t, k)] = topk_weights[t, k] * d[t]``, and ``rows[row(t, k)] . d[t]`` for the weight.
    The latter is computed where the rows are, so that they need not cross again.

    Args:
      rows: as for ``jax_ep.combine``, but not float64.
      plan: the plan that ``dispatch`` used.
      topk_weights: as for ``jax_ep.combine``.
      cotangents: what crosses in reverse, as ``dtype`` for ``encode``.
      block: as for ``encode``.
      power_of_two: as for ``encode``.

    Returns:
      What ``jax_ep.combine`` does. It has gradients, with derivatives of any order; forward mode
      reaches through these, but not through the call itself.

    Raises:
      TypeError: as for ``jax_ep.combine``, or ``rows`` is float64, or ``block`` is no int.
      ValueError: a shape does not fit the plan, or ``cotangents`` or ``block`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jax_ep
      >>> plan = jax_ep.make_plan(jnp.array([[1, 0]]), num_experts=2)
      >>> rows = jnp.array([[10.0, 0.0], [20.0, 0.0]])
      >>> out, pull = jax.vjp(lambda rows: jax_ep.wire.combine(rows, plan), rows)
      >>> out.tolist(), pull(jnp.array([[0.3, 896.0]]))[0].tolist()
      ([[30.0, 0.0]], [[0.3125, 896.0], [0.3125, 896.0]])
    """
    check_plan(plan)
    encoding = _encoding("cotangents", cotangents, block, power_of_two, _demanded(plan))
    _check_wide("rows", rows)
    return reduce_to_encoded(encoding, rows, topk_weights, plan)


def _encoding(
    name: str, dtype: Any, block: int, power_of_two: bool, implementation: Implementation | None
) -> Encoding:
    check_one_of(name, jnp.dtype(dtype).name, DTYPES)
    check_positive("block", block)
    check_one_of("implementation", implementation, (None, "xla", "native"))
    return Encoding(jnp.dtype(dtype), block, power_of_two, implementation)


def _demanded(plan: Plan) -> Implementation | None:
    """Returns what has to carry out a plan's exchanges, if anything."""
    return plan.implementation if plan._layout.strict else None


def _check_wide(name: str, x: Any) -> None:
    _check_floats(name, x, _WIDE_DTYPES)


def _check_floats(name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    """Checks that it is an array of rows, of one of these dtypes."""
    check_array(name, x, ", ".join(["..."] * (getattr(x, "ndim", 1) - 1) + ["hidden"]))
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {dtypes}; got {x.dtype}.")
