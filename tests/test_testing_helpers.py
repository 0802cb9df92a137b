"""The testing kit's routings, payloads and comparisons."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_ep import testing

SIZES = {"num_ranks": 4, "num_tokens": 500, "num_experts": 16, "num_topk": 3}
DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int8,
    np.uint8,
    np.int32,
]
ROUTINGS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": testing.uniform_routing,
    "zipf": lambda rng, **sizes: testing.zipf_routing(rng, **sizes, exponent=0.7),
    "k_hot": lambda rng, **sizes: testing.k_hot_routing(rng, **sizes, num_hot=5),
    "with_holes": testing.routing_with_holes,
}


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings_are_distinct_valid_and_repeatable(name: str) -> None:
    routing = ROUTINGS[name](_rng(), **SIZES)
    assert (routing.shape, routing.dtype) == ((4, 500, 3), np.int32)
    assert routing.min() >= (-1 if name == "with_holes" else 0)
    assert routing.max() < 16
    ascending = np.sort(routing, axis=-1)
    assert ((ascending[..., 1:] != ascending[..., :-1]) | (ascending[..., 1:] == -1)).all()
    np.testing.assert_array_equal(routing, ROUTINGS[name](_rng(), **SIZES))
    assert (routing != ROUTINGS[name](_rng(1), **SIZES)).any()


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings_of_nothing(name: str) -> None:
    assert ROUTINGS[name](_rng(), **(SIZES | {"num_tokens": 0})).shape == (4, 0, 3)


def test_uniform_load_is_even_at_every_place() -> None:
    routing = testing.uniform_routing(_rng(), **(SIZES | {"num_tokens": 4000}))
    for k in range(3):
        load = np.bincount(routing[..., k].ravel(), minlength=16)
        np.testing.assert_allclose(load, 1000, rtol=0.15)


@pytest.mark.parametrize("exponent", [0.5, 1.5])
def test_zipf_load_follows_its_law(exponent: float) -> None:
    sizes = SIZES | {"num_tokens": 10_000, "num_topk": 1}
    routing = testing.zipf_routing(_rng(), **sizes, exponent=exponent)
    load = np.sort(np.bincount(routing.ravel(), minlength=16))[::-1]
    law = np.arange(1, 17) ** -exponent
    np.testing.assert_allclose(load / load.sum(), law / law.sum(), rtol=0.1)


def test_zipf_hot_experts_agree_on_all_ranks_and_differ_between_draws() -> None:
    sizes = SIZES | {"num_topk": 1, "num_tokens": 2000}
    hottest = []
    for seed in range(8):
        routing = testing.zipf_routing(_rng(seed), **sizes, exponent=1.5)
        modes = {int(np.bincount(ids.ravel()).argmax()) for ids in routing}
        assert len(modes) == 1
        hottest += modes
    assert len(set(hottest)) > 3


def test_k_hot_uses_exactly_the_hot_experts() -> None:
    assert np.unique(testing.k_hot_routing(_rng(), **SIZES, num_hot=5)).size == 5
    assert np.unique(testing.k_hot_routing(_rng(), **SIZES, num_hot=3)).size == 3


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_holes_have_their_share(fraction: float) -> None:
    routing = testing.routing_with_holes(_rng(), **SIZES, hole_fraction=fraction)
    assert (routing == -1).mean() == pytest.approx(fraction, abs=0.03)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (
            lambda: testing.uniform_routing(_rng(), **(SIZES | {"num_topk": 17})),
            r"num_topk must not exceed num_experts \(16\).*got 17",
        ),
        (
            lambda: testing.zipf_routing(_rng(), **SIZES, exponent=-0.5),
            r"exponent must not be negative; got -0\.5",
        ),
        (
            lambda: testing.k_hot_routing(_rng(), **SIZES, num_hot=2),
            r"num_hot must lie within num_topk \(3\) to num_experts \(16\); got 2",
        ),
        (
            lambda: testing.routing_with_holes(_rng(), **SIZES, hole_fraction=1.5),
            r"hole_fraction must lie within 0 to 1; got 1\.5",
        ),
    ],
)
def test_impossible_routings_are_refused(routing: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_origin_survives_copies_in_any_dtype(dtype: type) -> None:
    rank, token = np.arange(8)[:, None], np.arange(11)
    payload = testing.encode_origin(rank, token, num_tokens=11, hidden=6, dtype=dtype)
    assert (payload.shape, payload.dtype) == ((8, 11, 6), dtype)
    assert (payload.astype(np.float64) != 0).any(axis=-1).all()
    moved = np.concatenate([payload.reshape(88, 6)[::-1], np.zeros((2, 6), dtype)])
    ranks, tokens = testing.decode_origin(moved, num_tokens=11)
    np.testing.assert_array_equal(ranks, [*np.repeat(np.arange(8)[::-1], 11), -1, -1])
    np.testing.assert_array_equal(tokens, [*np.tile(np.arange(11)[::-1], 8), -1, -1])


def test_torn_rows_are_found() -> None:
    payload = testing.encode_origin(0, [3, 4], num_tokens=9, hidden=4, dtype=np.float32)
    payload[0, 2:] = payload[1, 2:]
    with pytest.raises(ValueError, match=r"row \[0\] starts like one of rank 0, token 3 but"):
        testing.decode_origin(payload, num_tokens=9)


def test_origins_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"room for the origin 1000 in digits of 4 bits.*got 2"):
        testing.encode_origin(0, 999, num_tokens=1000, hidden=2, dtype=ml_dtypes.float8_e4m3fn)
    testing.encode_origin(0, 999, num_tokens=1000, hidden=3, dtype=ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_counts(dtype: type) -> None:
    bits = np.frombuffer(_rng().bytes(24 * np.dtype(dtype).itemsize), np.uint8)
    array = bits.view(dtype).reshape(2, 3, 4)
    testing.assert_bitwise_equal(array, array.copy())
    for bit in range(8):
        flipped = bits.copy()
        flipped[-1] ^= 1 << bit
        with pytest.raises(AssertionError, match=r"1 of 24 elements.*\n  \[1, 2, 3\]: actual"):
            testing.assert_bitwise_equal(array, flipped.view(dtype).reshape(2, 3, 4))


def test_nan_payloads_are_told_apart() -> None:
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    testing.assert_bitwise_equal(nans[:1], nans[:1].copy())
    with pytest.raises(AssertionError, match=r"nan \(0x7fc00000\), expected nan \(0x7fc00001\)"):
        testing.assert_bitwise_equal(nans[:1], nans[1:])


def test_scalars_and_empty_arrays_compare() -> None:
    testing.assert_bitwise_equal(jnp.float32(1), np.float32(1))
    testing.assert_bitwise_equal(np.zeros((0, 3)), np.zeros((0, 3)))
    testing.assert_close_ulp(np.zeros((0, 3)), np.zeros((0, 3)), max_ulp=0)
    with pytest.raises(AssertionError, match=r"\[\]: actual 1.0 .*expected 2.0"):
        testing.assert_bitwise_equal(np.float32(1), np.float32(2))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.zeros(3, np.float32), np.zeros((3, 1), np.float32)),
        (np.zeros(3, np.float32), np.zeros(3, np.int32)),
    ],
)
def test_types_must_be_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    for compare in (testing.assert_bitwise_equal, _exactly):
        with pytest.raises(AssertionError, match=r"actual is float32\[3\], expected is "):
            compare(actual, expected)


def _exactly(actual: np.ndarray, expected: np.ndarray) -> None:
    testing.assert_close_ulp(actual, expected, max_ulp=0)


FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("start", [-1.5, 0.0, 1.0])
def test_ulps_are_counted(dtype: type, start: float) -> None:
    here = there = np.array([start], dtype)
    for distance in range(1, 5):
        there = np.nextafter(there, np.array([2.0], dtype))
        testing.assert_close_ulp(there, here, max_ulp=distance)
        testing.assert_close_ulp(here, there, max_ulp=distance)
        with pytest.raises(AssertionError, match=rf"\({distance} at worst\)"):
            testing.assert_close_ulp(there, here, max_ulp=distance - 1)


def test_ulps_across_zero_and_the_whole_range() -> None:
    tiny = np.nextafter(np.float32([0]), np.float32(1))
    testing.assert_close_ulp(np.float32([-0.0]), np.float32([0.0]), max_ulp=0)
    testing.assert_close_ulp(-tiny, tiny, max_ulp=2)
    with pytest.raises(AssertionError, match=r"\(2 at worst\)"):
        testing.assert_close_ulp(-tiny, tiny, max_ulp=1)
    largest = np.array([np.finfo(np.float64).max])
    with pytest.raises(AssertionError, match=rf"\({2 * 0x7FEFFFFFFFFFFFFF} at worst\)"):
        testing.assert_close_ulp(-largest, largest, max_ulp=2**62)


@pytest.mark.parametrize(
    ("actual", "expected"), [(np.inf, 3.4e38), (np.nan, 1.0), (-np.inf, np.inf), (1.0, np.nan)]
)
def test_special_values_equal_only_their_kind(actual: float, expected: float) -> None:
    testing.assert_close_ulp(np.float32([actual]), np.float32([actual]), max_ulp=0)
    with pytest.raises(AssertionError, match="1 of 1 elements"):
        testing.assert_close_ulp(np.float32([actual]), np.float32([expected]), max_ulp=2**31)


def test_ulps_are_for_floats() -> None:
    with pytest.raises(TypeError, match="must be floats; got int32"):
        testing.assert_close_ulp(np.zeros(1, np.int32), np.zeros(1, np.int32), max_ulp=1)
