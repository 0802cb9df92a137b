"""``balance`` against plain Python, choice by choice; and what its slots and copies compute."""

from __future__ import annotations

import functools

import balance_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import ALL_ROWS, Row
from strategies import (
    Shape,
    a_rank_sends_nothing,
    distinct,
    duplicates,
    everything_to_one_expert,
    nothing_kept,
    out_of_range,
    own_experts_only,
)

import jax_ep
from jax_ep.testing import zipf_routing

VMAP_XLA = next(row for row in ALL_ROWS if str(row) == "xla-vmap")
SHAPE = Shape()
SKEWED = Shape(num_tokens=16, num_topk=4, num_experts=16)
WIDTH = 3


def zipf(shape: Shape, seed: int = 0) -> np.ndarray:
    return zipf_routing(
        np.random.default_rng(seed),
        num_ranks=shape.num_ranks,
        num_tokens=shape.num_tokens,
        num_topk=shape.num_topk,
        num_experts=shape.num_experts,
        exponent=1.2,
    )


def own_and_hot(shape: Shape) -> np.ndarray:
    """All ranks ask the first rank's experts: some of what they ask can stay with each."""
    topk_idx = own_experts_only(shape)
    topk_idx[:, :, :2] = np.arange(2)
    return topk_idx


ROUTINGS = (
    distinct,
    duplicates,
    everything_to_one_expert,
    nothing_kept,
    a_rank_sends_nothing,
    out_of_range,
    own_and_hot,
    zipf,
)


@functools.cache
def program(row: Row, shape: Shape, num_spares: int, slack: float = 0.0, shared: bool = False):
    """Compiles: choices, experts and shares of all ranks to slots, these experts, and a gradient.

    The experts' weights are [R, L, WIDTH]; the gradient is of their product with what they are
    given.
    """

    def per_rank(topk_idx, weights, dout, share):
        slots, copies = jax_ep.balance(
            topk_idx,
            num_experts=shape.num_experts,
            axis_name=row.fabric.axis_name,
            num_spares=num_spares,
            slack=slack,
            share=share if shared else None,
            ranks_per_node=shape.ranks_per_node,
            implementation=row.implementation,
        )
        every, pull = jax.vjp(lambda w: jax_ep.with_copies(w, copies), weights)
        return slots, every, pull(dout)[0]

    return row.jit(per_rank, shape.num_ranks)


def run(row: Row, shape: Shape, topk_idx: np.ndarray, num_spares: int, share=None, slack=0.0):
    """Returns the slots, the experts of all slots, and what their owners get back of ``dout``."""
    num_ranks, num_local = shape.num_ranks, shape.num_local_experts
    weights = 1 + np.arange(num_ranks * num_local * WIDTH, dtype=np.float32)
    dout = np.random.default_rng(3).integers(1, 9, (num_ranks, num_local + num_spares, WIDTH))
    dout = dout.astype(np.float32)
    shares = np.ones(num_ranks, np.float32) if share is None else np.asarray(share, np.float32)
    shares = np.broadcast_to(shares, (num_ranks, num_ranks))
    f = program(row, shape, num_spares, slack, share is not None)
    slots, every, back = f(topk_idx, weights.reshape(num_ranks, num_local, WIDTH), dout, shares)
    return np.asarray(slots), np.asarray(every), np.asarray(back), dout


def check(shape: Shape, want: balance_oracle.Balanced, got) -> None:
    slots, every, back, dout = got
    np.testing.assert_array_equal(slots, want.slots)
    num_local = shape.num_local_experts
    weights = 1 + np.arange(shape.num_experts * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    spare = np.where(want.borrowed[..., None] >= 0, weights[want.borrowed], 0)
    np.testing.assert_array_equal(every[:, :num_local].reshape(-1, WIDTH), weights)
    np.testing.assert_array_equal(every[:, num_local:], spare)
    # Small integers: the order of sums is no matter.
    want_back = dout[:, :num_local].reshape(-1, WIDTH).copy()
    for rank, slot in np.argwhere(want.borrowed >= 0):
        want_back[want.borrowed[rank, slot]] += dout[rank, num_local + slot]
    np.testing.assert_array_equal(back.reshape(-1, WIDTH), want_back)


@pytest.mark.parametrize("num_spares", [1, 2])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_is_the_oracles(ranks_row: Row, routing, num_spares: int):
    topk_idx = routing(SHAPE)
    want = balance_oracle.balance(topk_idx, SHAPE.num_experts, num_spares)
    check(SHAPE, want, run(ranks_row, SHAPE, topk_idx, num_spares))


@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_of_many_random_routings(slack: float):
    row = VMAP_XLA
    for seed in range(100):
        topk_idx = zipf(SKEWED, seed)
        want = balance_oracle.balance(topk_idx, SKEWED.num_experts, 2, slack)
        check(SKEWED, want, run(row, SKEWED, topk_idx, 2, slack=slack))


def test_one_rank(row: Row):
    shape = Shape(num_ranks=1)
    topk_idx = duplicates(shape)
    want = balance_oracle.balance(topk_idx, shape.num_experts, 2)
    np.testing.assert_array_equal(want.slots, topk_idx)
    check(shape, want, run(row, shape, topk_idx, 2))


def test_no_tokens(ranks_row: Row):
    shape = Shape(num_tokens=0)
    topk_idx = distinct(shape)
    check(shape, balance_oracle.balance(topk_idx, 8, 2), run(ranks_row, shape, topk_idx, 2))


@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("routing", [zipf, everything_to_one_expert, nothing_kept])
def test_the_plan_of_copies_is_that_of_make_plan(ranks_row: Row, routing, ranks_per_node: int):
    """It is made without a word between ranks, and has to be what these would agree on."""
    axis_name, num_slots = ranks_row.fabric.axis_name, SHAPE.num_ranks * 2

    def both(topk_idx):
        _, copies = jax_ep.balance(
            topk_idx,
            num_experts=SHAPE.num_experts,
            axis_name=axis_name,
            ranks_per_node=ranks_per_node,
            implementation=ranks_row.implementation,
        )
        rank, row = copies._arrays.send_rank, copies._arrays.send_row
        slots = jnp.where(copies.kept, 2 * rank + row, oracle.NOWHERE)
        options = {"num_experts": num_slots, "capacity": 2, "ranks_per_node": ranks_per_node}
        return copies, ranks_row.make_plan(slots, **options)

    copies, want = ranks_row.jit(both, SHAPE.num_ranks)(routing(SHAPE))
    assert copies._layout == want._layout
    assert len(set(np.asarray(copies._arrays.fingerprint).tolist())) == 1
    for name, array in want._arrays._asdict().items():
        got, expected = np.asarray(getattr(copies._arrays, name)), np.asarray(array)
        assert got.dtype == expected.dtype
        if name.startswith("recv_") and name != "recv_counts":  # The rest holds anything.
            used = np.arange(2) < np.sum(want.recv_counts, axis=1)[:, None]
            got, expected = np.where(used, got, 0), np.where(used, expected, 0)
        if name != "fingerprint":
            np.testing.assert_array_equal(got, expected, err_msg=name)


def rows_of_ranks(shape: Shape, slots: np.ndarray, num_spares: int) -> np.ndarray:
    slots_each = shape.num_local_experts + num_spares
    routed = slots[(slots >= 0) & (slots < shape.num_ranks * slots_each)]
    return np.bincount(routed // slots_each, minlength=shape.num_ranks)


def test_nodes_keep_their_experts(ranks_row: Row):
    """All ask the first node's first rank: its neighbour helps, the other node's ranks do not."""
    shape = Shape(ranks_per_node=2)
    topk_idx = np.zeros(shape.topk_shape, np.int32)
    slots, *_ = run(ranks_row, shape, topk_idx, 2)
    assert rows_of_ranks(shape, slots, 2).tolist() == [36, 36, 0, 0]


def test_nodes_balance_up_to_the_whole_mean(ranks_row: Row):
    """A node with less than others lends no more than it takes to reach the mean of all."""
    shape = Shape(ranks_per_node=2)
    topk_idx = np.full(shape.topk_shape, oracle.NOWHERE, np.int32)
    topk_idx[:, :5, 0] = 7  # 20 choices for the last node, 24 for the first
    topk_idx[:, :, 1] = 0
    slots, *_ = run(ranks_row, shape, topk_idx, 1)
    assert rows_of_ranks(shape, slots, 1).tolist() == [12, 12, 11, 9]


@pytest.mark.parametrize(
    ("share", "rows"),
    [
        ([1, 1, 1, 1], [16, 16, 16, 16]),
        ([5, 5, 5, 5], [16, 16, 16, 16]),
        ([0, 0, 0, 0], [16, 16, 16, 16]),
        ([0.5, 1, 1, 1.5], [8, 16, 16, 24]),
        ([0, 1, 1, 2], [0, 16, 16, 32]),
        ([-3, 1, np.nan, 1], [0, 32, 0, 32]),
    ],
)
def test_shares(share, rows):
    """They are data: one program serves them all."""
    shape = Shape(num_tokens=8, num_topk=2)
    row = VMAP_XLA
    topk_idx = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], shape.topk_shape)
    slots, *_ = run(row, shape, topk_idx, 4, share=share)
    assert rows_of_ranks(shape, slots, 4).tolist() == rows
    assert program(row, shape, 4, 0.0, True)._cache_size() == 1


def test_shares_of_more_rows_than_float32_counts():
    """Ranks with a share take what rounding lost, so that all rows find room."""
    from jax_ep._lend import most_rows

    load = jnp.asarray([2**30 + 1, 2**29 + 3, 7, 11], jnp.int32)
    for share in ([1.0, 0.7, 0.3, 0.001], [1.0, 0.0, 0.0, 0.9]):
        most = most_rows(load, 4, 4, 0.0, jnp.asarray(share, jnp.float32))
        assert int(np.sum(np.asarray(most, np.int64))) >= int(np.sum(np.asarray(load, np.int64)))
        assert [not x for x in most.tolist()] == [not x for x in share]


def test_balances_skewed_steps():
    """Two spares do for what routers ask: no rank has more than the mean, but for few steps.

    The docs say how many of ten thousand; here it is fewer steps of the same kind.
    """
    from jax_ep._lend import lend, most_rows

    for num_ranks in (8, 32):
        loads = np.stack(
            [
                np.bincount(
                    zipf_routing(
                        np.random.default_rng(seed),
                        num_ranks=1,
                        num_tokens=2048,
                        num_topk=8,
                        num_experts=256,
                        exponent=0.65,
                    ).ravel(),
                    minlength=256,
                )
                for seed in range(20)
            ]
        ).astype(np.int32)

        def busiest(load, num_ranks=num_ranks):
            most = most_rows(load, num_ranks, num_ranks, 0.0, None)
            loans = lend(load, most, num_spares=2, ranks_per_node=num_ranks)
            own = jnp.sum(loans.left.reshape(num_ranks, -1), axis=1)
            return jnp.max(own + jnp.sum(loans.rows, axis=1))

        after = jax.jit(jax.vmap(busiest))(loads)
        np.testing.assert_array_equal(after, 2048 * 8 // num_ranks)


def test_counts_choices():
    topk_idx = out_of_range(SHAPE)[0]
    want = [int(np.sum(topk_idx == e)) for e in range(8)]
    np.testing.assert_array_equal(jax_ep.count_choices(topk_idx, 8), want)
