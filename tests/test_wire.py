"""``wire.encode`` and ``wire.decode`` against NumPy's answers, to the bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import wire_oracle
from exchanges import same_bits, same_numbers

from jax_ep import _encoding, wire

WIDE = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]
each_dtype = pytest.mark.parametrize("dtype", wire_oracle.DTYPES)
each_wide = pytest.mark.parametrize("wide", WIDE, ids=str)
each_scaling = pytest.mark.parametrize("power_of_two", [False, True], ids=["free", "power_of_two"])


def spread(wide: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draws numbers of all sizes, so that blocks have small ones and subnormal results too."""
    rng = np.random.default_rng(seed)
    limit = 12 if wide == np.float16 else 60
    sizes = rng.uniform(-limit, limit, (*shape[:-1], 1)) + rng.uniform(-20, 3, shape)
    return (rng.normal(size=shape) * np.exp2(sizes)).astype(wide)


def check(
    implementation: str, x: np.ndarray, dtype: str, block: int = 128, power_of_two: bool = False
) -> None:
    how = {"block": block, "power_of_two": power_of_two}
    encode = jax.jit(lambda x: wire.encode(x, dtype, **how, implementation=implementation))
    rows, scales = encode(x)
    want_rows, want_scales = wire_oracle.encode(x, dtype, **how)
    same_bits(np.asarray(scales), want_scales, "scales")
    same_codes(rows, want_rows)
    got = jax.jit(lambda r, s: wire.decode(r, s, x.dtype, block=block))(want_rows, want_scales)
    same_bits(np.asarray(got), wire_oracle.decode(want_rows, want_scales, x.dtype, block), "wide")


def same_codes(got: jax.Array, want: np.ndarray) -> None:
    """Compares bits, but those of NaNs."""
    assert got.dtype == want.dtype
    is_nan = np.isnan(want.astype(np.float32))
    got_codes, want_codes = (
        np.where(is_nan & np.isnan(x.astype(np.float32)), 0, x.view(np.uint8))
        for x in (np.asarray(got), want)
    )
    np.testing.assert_array_equal(got_codes, want_codes)


@each_dtype
@each_wide
@each_scaling
def test_numbers_of_all_sizes(
    implementation: str, dtype: str, wide: np.dtype, power_of_two: bool
) -> None:
    check(implementation, spread(wide, (64, 512)), dtype, power_of_two=power_of_two)


@each_dtype
@pytest.mark.parametrize("hidden", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize("block", [1, 32, 128])
def test_widths_that_blocks_do_not_divide(
    implementation: str, dtype: str, hidden: int, block: int
) -> None:
    check(implementation, spread(WIDE[0], (3, hidden)), dtype, block)


@each_dtype
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)])
def test_any_axes_before_the_last(implementation: str, dtype: str, lead: tuple[int, ...]) -> None:
    check(implementation, spread(WIDE[2], (*lead, 200)), dtype)


@each_dtype
def test_ties_and_their_neighbours(implementation: str, dtype: str) -> None:
    """With a scale of 1, all middles of two numbers, and the floats on either side of these."""
    numbers = wire_oracle.magnitudes(np.dtype(getattr(ml_dtypes, dtype)))
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    near = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))]
    )
    near = np.concatenate([near, -near, [numbers[-1], 0.0, -0.0]]).astype(np.float32)[None]
    rows, scales = wire.encode(near, dtype, block=near.size, implementation=implementation)
    assert scales.tolist() == [[1.0]]
    same_codes(rows, wire_oracle.nearest(near, rows.dtype))


@each_dtype
@each_scaling
def test_every_size_of_a_scale(implementation: str, dtype: str, power_of_two: bool) -> None:
    """Scales are rounded once, also where a compiler would multiply with an inverse."""
    rng = np.random.default_rng(1)
    digits = np.concatenate([[0, 1, 2, 2**23 - 1], rng.integers(0, 2**23, 60)]).astype(np.uint32)
    largest = ((np.arange(255, dtype=np.uint32)[:, None] << 23) | digits).view(np.float32)
    check(
        implementation,
        largest[..., None] * np.float32([1.0, -0.71]),
        dtype,
        power_of_two=power_of_two,
    )
    _, scales = wire.encode(
        largest[..., None], dtype, power_of_two=power_of_two, implementation=implementation
    )
    assert np.isfinite(scales).all()
    assert np.min(scales) == 2.0**-100


@each_dtype
def test_xla_rounds_so_where_it_optimises(dtype: str) -> None:
    """Other tests have it leave programs as they are. Here it divides by its inverses."""
    x = spread(WIDE[2], (256, 512))
    options = {"xla_backend_optimization_level": 3}

    def compiled(f):
        return jax.jit(f).lower(x).compile(options)(x)

    rows, scales = compiled(lambda x: wire.encode(x, dtype, implementation="xla"))
    want_rows, want_scales = wire_oracle.encode(x, dtype)
    same_bits(np.asarray(scales), want_scales, "scales")
    same_codes(rows, want_rows)


@each_dtype
@each_wide
def test_what_is_not_finite_spoils_no_neighbour(
    implementation: str, dtype: str, wide: np.dtype
) -> None:
    x = spread(wide, (8, 300))
    spoilt = x.copy()
    spoilt[:, 5], spoilt[:, 130], spoilt[:, 131], spoilt[:, 299] = np.nan, np.inf, -np.inf, np.nan
    x[:, [5, 130, 131, 299]] = 0
    check(implementation, spoilt, dtype)
    rows, scales = wire.encode(spoilt, dtype)
    want_rows, want_scales = wire.encode(x, dtype)
    np.testing.assert_array_equal(scales, want_scales)
    got = np.asarray(wire.decode(rows, scales, "float32"))
    want = np.asarray(wire.decode(want_rows, want_scales, "float32")).copy()
    infinity = np.inf if dtype == "float8_e5m2" else np.nan
    want[:, [5, 299]], want[:, 130], want[:, 131] = np.nan, infinity, -infinity
    np.testing.assert_array_equal(got, want)


@each_dtype
def test_rows_of_zeros(implementation: str, dtype: str) -> None:
    zeros = np.array([[0.0, -0.0, 0.0]], np.float32)
    rows, scales = wire.encode(zeros, dtype, implementation=implementation)
    assert np.asarray(scales).tolist() == [[2.0**-100]]
    assert np.asarray(rows).view(np.uint8).tolist() == [[0, 128, 0]]


@pytest.mark.parametrize(
    ("dtype", "digits", "least"), [("float8_e4m3fn", 4, -10), ("float8_e5m2", 3, -17)]
)
@each_scaling
def test_how_far_off_it_is(dtype: str, digits: int, least: int, power_of_two: bool) -> None:
    x = spread(WIDE[2], (64, 1024))
    rows, scales = wire.encode(x, dtype, power_of_two=power_of_two)
    error = np.abs(np.asarray(wire.decode(rows, scales, "float32")).astype(np.float64) - x)
    scale = np.repeat(np.asarray(scales, np.float64), 128, axis=-1)
    bound = np.maximum(np.abs(x.astype(np.float64)) * 2.0**-digits, scale * 2.0**least * 1.001)
    assert np.all(error <= bound)
    assert np.any(error > 0.9 * bound)


def test_it_takes_half_the_bytes_of_bfloat16() -> None:
    x = jnp.ones((4, 7168), jnp.bfloat16)
    encoded = jax.eval_shape(wire.encode, x)
    assert sum(e.size * e.dtype.itemsize for e in encoded) <= 0.52 * x.nbytes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: wire.encode(x.astype(np.int32)), TypeError, "x must have one of .* got int32"),
        (lambda x: wire.encode(x, block=0), ValueError, "block must be at least 1; got 0"),
        (lambda x: wire.encode(x, block=1.5), TypeError, "block must be an int; got 1.5"),
        (lambda x: wire.encode(x, "float16"), ValueError, "dtype must be one of .* got 'float16'"),
        (
            lambda x: wire.encode(x, implementation="nccl"),
            ValueError,
            "implementation must be one of .* got 'nccl'",
        ),
        (lambda x: wire.encode("text"), TypeError, "x must be an array .* got str"),
        (lambda x: wire.encode(x[0, 0]), ValueError, r"x must have shape \[hidden\]; got \[\]"),
        (lambda x: jax.grad(lambda x: wire.encode(x)[1].sum())(x), TypeError, "no derivative"),
        (lambda x: wire.decode(x, x, "float32"), TypeError, "rows must have one of .* got float32"),
        (
            lambda x: wire.decode(*wire.encode(x), "float64"),
            ValueError,
            "dtype must be one of .* got 'float64'",
        ),
        (
            lambda x: wire.decode(*wire.encode(x), "float32", block=2),
            ValueError,
            r"scales must have shape \[..., num_blocks\] = \[3, 3\]; got \[3, 1\]",
        ),
        (
            lambda x: wire.decode(wire.encode(x)[0], x[:, :1].astype(np.float16), "float32"),
            TypeError,
            "scales must have dtype float32; got float16",
        ),
    ],
    ids=range(12),
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(np.ones((3, 5), np.float32))


def test_who_encodes(implementation: str) -> None:
    """Native code where it serves; in a batch, too, by one call."""
    x = spread(WIDE[2], (3, 4, 200))
    encode = functools.partial(wire.encode, implementation=implementation)
    batched = jax.jit(jax.vmap(encode, in_axes=1))
    calls = batched.lower(x).as_text().count("@jax_ep_encode_rows")
    assert calls == (implementation == "native")
    for got, want in zip(batched(x), encode(x.swapaxes(0, 1)), strict=True):
        np.testing.assert_array_equal(got, want)


@each_dtype
@each_wide
def test_every_code_is_decoded(dtype: str, wide: np.dtype) -> None:
    rows = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).reshape(2, 128)
    scales = np.array([[0.3], [2.0**-100]], np.float32)
    want = wire_oracle.decode(rows, scales, wide)
    got = np.asarray(jax.jit(lambda r, s: wire.decode(r, s, wide))(rows, scales))
    same_numbers(got, want, "wide")


def test_native_code_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_encoding, "platform_problem", lambda _: "it is not built")
    x = np.ones((2, 3), np.float32)
    with pytest.raises(NotImplementedError, match="'native' cannot serve here: it is not built"):
        wire.encode(x, implementation="native", block=7)
    assert "jax_ep" not in jax.jit(lambda x: wire.encode(x, block=7)).lower(x).as_text()


def test_a_stopped_gradient_may_be_encoded() -> None:
    x = jnp.ones((2, 3))
    assert not jax.grad(lambda x: wire.encode(jax.lax.stop_gradient(x))[1].sum())(x).any()
