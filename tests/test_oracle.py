"""The oracle against examples worked by hand and against exact arithmetic."""

from __future__ import annotations

import fractions

import ml_dtypes
import numpy as np
import oracle

# Two ranks, three tokens, two choices, four experts: rank 0 owns 0 and 1, rank 1 owns 2 and 3.
TOPK_IDX = np.array(
    [
        [[0, 2], [1, 0], [-1, 3]],
        [[1, 2], [0, 9], [0, 1]],
    ],
    np.int32,
)


def test_rows_are_ordered_by_expert_source_token_and_k() -> None:
    plan = oracle.plan(TOPK_IDX, 4)

    assert plan.capacity == 2 * 3 * 2
    assert plan.group_sizes.tolist() == [[4, 3], [2, 1]]
    assert plan.origin[0, :7].tolist() == [
        [0, 0, 0],
        [0, 1, 1],
        [1, 1, 0],
        [1, 2, 0],
        [0, 1, 0],
        [1, 0, 0],
        [1, 2, 1],
    ]
    assert plan.origin[1, :3].tolist() == [[0, 0, 1], [1, 0, 1], [0, 2, 1]]
    assert plan.named.sum(axis=1).tolist() == [7, 3]
    assert plan.row.tolist() == [
        [[0, 0], [4, 1], [-1, 2]],
        [[5, 1], [2, -1], [3, 6]],
    ]
    assert plan.to_rank.tolist() == [
        [[0, 1], [0, 0], [-1, 1]],
        [[0, 1], [0, -1], [0, 0]],
    ]


def test_counts() -> None:
    plan = oracle.plan(TOPK_IDX, 4)

    assert plan.expert_load.tolist() == [4, 3, 2, 1]
    assert plan.recv_counts.tolist() == [[3, 4], [2, 1]]
    assert plan.num_dropped.tolist() == [0, 0]
    assert plan.num_invalid.tolist() == [0, 1]
    assert plan.kept.tolist() == [
        [[True, True], [True, True], [False, True]],
        [[True, True], [True, False], [True, True]],
    ]


def test_overflow_keeps_first_choices_then_earlier_tokens_then_lower_ranks() -> None:
    """Rank 0 is asked for 7 rows and has 3.

    In the order of the rule (k, token, source) the first are (0, 0, 0), (0, 0, 1) and (0, 1, 0),
    that is tokens 0 and 1 of rank 0 and token 0 of rank 1.
    """
    plan = oracle.plan(TOPK_IDX, 4, capacity=3)

    assert plan.origin[0].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert plan.origin[1].tolist() == [[0, 0, 1], [1, 0, 1], [0, 2, 1]]
    assert plan.group_sizes.tolist() == [[1, 2], [2, 1]]
    assert plan.num_dropped.tolist() == [1, 3]
    assert plan.expert_load.tolist() == [4, 3, 2, 1]


def test_alignment_pads_every_group_and_costs_capacity() -> None:
    """A capacity of 8 less 2 experts' padding of up to 2 rows leaves 4 of rank 0's 7 choices."""
    plan = oracle.plan(TOPK_IDX, 4, capacity=8, alignment=3)

    assert plan.group_sizes.tolist() == [[3, 3], [3, 3]]
    assert plan.origin[0, :, 0].tolist() == [0, 1, -1, 0, 1, -1, -1, -1]
    assert plan.origin[1, :, 0].tolist() == [0, 1, -1, 0, -1, -1, -1, -1]
    assert plan.used[0].tolist() == [True] * 6 + [False] * 2
    assert oracle.plan(TOPK_IDX, 4, alignment=3).capacity == 12 + 2 * 2


def test_no_tokens_still_make_one_row() -> None:
    plan = oracle.plan(np.zeros((2, 0, 2), np.int32), 4)

    assert plan.capacity == 1
    assert plan.group_sizes.tolist() == [[0, 0], [0, 0]]


def test_dispatch_and_its_gradient() -> None:
    plan = oracle.plan(TOPK_IDX, 4)
    x = np.array([[[1], [2], [3]], [[4], [5], [6]]], np.float32)

    rows = oracle.dispatch(x, plan)

    assert rows[0, :, 0].tolist() == [1, 2, 5, 6, 2, 4, 6, 0, 0, 0, 0, 0]
    assert rows[1, :4, 0].tolist() == [1, 4, 3, 0]
    assert oracle.dispatch_grad(rows, plan)[..., 0].tolist() == [[2, 4, 3], [8, 5, 12]]


def test_combine_weighs_and_leaves_out_what_is_not_kept() -> None:
    plan = oracle.plan(TOPK_IDX, 4)
    rows = np.full((2, 12, 1), np.nan, np.float32)
    rows[0, :7, 0] = [1, 2, 3, 4, 5, 6, 7]
    rows[1, :3, 0] = [10, 20, 30]
    weights = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]], np.float32)

    out = oracle.combine(rows, plan, weights)

    assert out[..., 0].tolist() == [
        [1 * 1 + 2 * 10, 3 * 5 + 4 * 2, 6 * 30],
        [7 * 6 + 8 * 20, 9 * 3, 11 * 4 + 12 * 7],
    ]


def test_combine_rounds_each_ranks_part_to_the_dtype_of_the_rows() -> None:
    """Two of the choices are on rank 0 and one is on rank 1.

    In bfloat16, 256 + 1 is a tie that goes to 256, so the part of rank 0 loses its 1; a single sum
    of all three would give 260.
    """
    topk_idx = np.array([[[0, 1, 2]], [[-1, -1, -1]]], np.int32)
    plan = oracle.plan(topk_idx, 4)
    rows = np.zeros((2, plan.capacity, 1), ml_dtypes.bfloat16)
    rows[0, :2, 0] = [256, 1]
    rows[1, 0, 0] = 2

    assert float(oracle.combine(rows, plan)[0, 0, 0]) == 258
    assert float(np.float32(256 + 1 + 2).astype(ml_dtypes.bfloat16)) == 260


def test_one_byte_cotangents_are_rounded_once() -> None:
    """In float8_e4m3fn 16 + 1 is a tie that goes to 16; kept in float32, 17 + 2 rounds to 20."""
    topk_idx = np.array([[[0, 1, 2]], [[-1, -1, -1]]], np.int32)
    plan = oracle.plan(topk_idx, 4)
    drows = np.zeros((2, plan.capacity, 1), ml_dtypes.float8_e4m3fn)
    drows[0, :2, 0] = [16, 1]
    drows[1, 0, 0] = 2

    assert float(oracle.dispatch_grad(drows, plan)[0, 0, 0]) == 20


def test_combine_gradients() -> None:
    plan = oracle.plan(TOPK_IDX, 4)
    rows = oracle.dispatch(np.arange(6, dtype=np.float32).reshape(2, 3, 1) + 1, plan)
    weights = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    dout = np.array([[[1], [10], [100]], [[1000], [10000], [100000]]], np.float32)

    drows, dweights = oracle.combine_grad(rows, plan, weights, dout)

    assert drows[0, :8, 0].tolist() == [0, 30, 80000, 1000000, 20, 6000, 1100000, 0]
    assert drows[1, :4, 0].tolist() == [1, 7000, 500, 0]
    assert dweights.tolist() == [
        [[1, 1], [20, 20], [0, 300]],
        [[4000, 4000], [50000, 0], [600000, 600000]],
    ]


def exact_fma32(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Rounds the exact value to float32, to even on ties, by looking at both neighbours."""
    value = fractions.Fraction(float(a)) * fractions.Fraction(float(b))
    value += fractions.Fraction(float(c))
    guess = np.float32(float(value))
    near = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return min(
        near,
        key=lambda x: (abs(fractions.Fraction(float(x)) - value), int(x.view(np.int32)) & 1),
    )


def test_fma_rounds_once() -> None:
    """Operands of few bits meet the ties that rounding twice gets wrong."""
    rng = np.random.default_rng(0)
    size = 4000
    a = rng.integers(1, 2**24, size).astype(np.float32) * rng.choice([-1, 1], size)
    b = (1 + rng.integers(0, 2**12, size) / 2**23).astype(np.float32)
    c = rng.integers(1, 2**24, size) * 2.0 ** rng.integers(-40, 40, size)
    a, c = a.astype(np.float32), c.astype(np.float32)
    a[:2], b[:2], c[:2] = 2.0**24 + 2, 1.0, [1 + 2.0**-23, 1]
    # Rounded to float64 first, the tiny c is lost, and a * b is a tie of float32 that goes down.
    a[2], b[2], c[2] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80

    got = oracle.fma(a, b, c)

    assert got.tolist() == [exact_fma32(*values) for values in zip(a, b, c, strict=True)]
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (got != twice).any(), "the operands should tell one rounding from two"


def test_fma_in_float64_rounds_once() -> None:
    a, c = np.float64(1 + 2.0**-30), np.float64(-(1 + 2.0**-29))
    assert oracle.fma(a, a, c) == 2.0**-60
    assert a * a + c == 0


def test_fma_lets_infinities_and_nan_through() -> None:
    a = np.array([np.inf, -np.inf, np.nan, 3e38, 1], np.float32)
    got = oracle.fma(a, np.float32(10), np.float32(1))
    np.testing.assert_array_equal(got, np.array([np.inf, -np.inf, np.nan, np.inf, 11], np.float32))
