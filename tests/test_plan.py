"""Every public field of a plan, against the oracle, for every implementation and fabric."""

from __future__ import annotations

import functools

import jax
import numpy as np
import oracle
import pytest
import strategies
from exchanges import FIELDS, TARGETS, answers, every_case, expected_fields, fields_of
from hypothesis import given
from hypothesis import strategies as st
from implementations import ROWS, Row, require
from strategies import BASE, Case, Shape

import jax_ep


@every_case
def test_fields(row: Row, case: Case) -> None:
    for field in FIELDS:
        answers(row, case).same(field)


@every_case
def test_targets_are_a_rank_and_a_row_or_neither(row: Row, case: Case) -> None:
    result = answers(row, case)
    for name in TARGETS:
        result.same(name)
        assert ((result.got[name] == jax_ep.DROPPED) == ~result.got["kept"]).all(), name


@every_case
def test_groups_fit_and_are_aligned(row: Row, case: Case) -> None:
    result = answers(row, case)
    group_sizes = result.got["group_sizes"]
    assert (group_sizes % case.shape.alignment == 0).all()
    assert (group_sizes.sum(axis=1) <= result.got["sent"].shape[1]).all()


def plan_fields(row: Row, shape: Shape):
    """Compiles only the plan, for tests that try many routings."""

    def per_rank(topk_idx):
        plan = row.make_plan(
            topk_idx,
            num_experts=shape.num_experts,
            capacity=shape.capacity,
            alignment=shape.alignment,
        )
        return fields_of(plan)

    return row.jit(per_rank, shape.num_ranks)


def same_fields(got: dict[str, jax.Array], plan: oracle.Plan) -> None:
    for name, want in expected_fields(plan).items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)


@pytest.mark.parametrize(
    "shape",
    [BASE, Shape(num_tokens=9, num_experts=12, capacity=17, alignment=3)],
    ids=["roomy", "tight"],
)
def test_random_routings(ranks_row: Row, shape: Shape) -> None:
    program = plan_fields(ranks_row, shape)

    @given(strategies.topk_indices(shape))
    def check(topk_idx: np.ndarray) -> None:
        same_fields(program(topk_idx), shape.plan(topk_idx))

    check()


# Sorting so many choices in pure JAX takes long enough once.
LARGE_PLAN_ROWS = ("xla-vmap", "native-shard_map", "native-vmap")


@functools.cache
def large_plan() -> tuple[Shape, np.ndarray, oracle.Plan]:
    shape = Shape(num_ranks=2, num_tokens=5000, num_topk=8, num_experts=512, capacity=70_001)
    topk_idx = np.random.default_rng(7).integers(200, 512, shape.topk_shape, np.int32)
    return shape, topk_idx, shape.plan(topk_idx)


@pytest.mark.parametrize("row", [row for row in ROWS if str(row) in LARGE_PLAN_ROWS], ids=str)
def test_large_plan(row: Row) -> None:
    """Counts past what a byte or a signed 16-bit word holds, and more experts than a byte."""
    shape, topk_idx, want = large_plan()
    assert want.recv_counts.max() > 2**15
    row.require()
    same_fields(plan_fields(row, shape)(topk_idx), want)


def test_more_experts_than_sixteen_bits(ranks_row: Row) -> None:
    """Indices must not wrap on their way to the other ranks."""
    shape = Shape(num_ranks=2, num_experts=2**17)
    topk_idx = np.random.default_rng(8).integers(-3, 2**17 + 3, shape.topk_shape, np.int32)
    topk_idx[0, 0] = [2**15, 2**16, 2**17 - 1]
    topk_idx[1, 0] = [2**17, 2**31 - 1, -(2**31)]
    same_fields(plan_fields(ranks_row, shape)(topk_idx), shape.plan(topk_idx))


def test_static_fields(row: Row) -> None:
    num_ranks = 4 if row.serves(4) else 1
    seen = {}

    def per_rank(topk_idx):
        plan = row.make_plan(
            topk_idx,
            num_experts=8,
            capacity=37,
            alignment=2,
            tail="uninitialized",
            ranks_per_node=num_ranks,
        )
        seen["plan"] = plan
        return plan.group_sizes

    row.jit(per_rank, num_ranks)(np.zeros((num_ranks, 6, 3), np.int32))
    plan = seen["plan"]
    assert isinstance(plan, jax_ep.Plan)
    assert plan.num_ranks == num_ranks
    assert plan.num_experts == 8
    assert plan.num_local_experts == 8 // num_ranks
    assert plan.num_tokens == 6
    assert plan.num_topk == 3
    assert plan.capacity == 37
    assert plan.alignment == 2
    assert plan.ranks_per_node == num_ranks
    assert plan.tail == "uninitialized"
    assert plan.axis_name == row.fabric.axis_name
    assert plan.implementation == row.implementation


def test_default_capacity_drops_nothing_while_choices_are_distinct(row: Row) -> None:
    """With K = 3 > L = 2, at most two of a token's distinct choices can meet on one rank."""
    num_ranks = 4 if row.serves(4) else 1
    topk_idx = np.tile(np.array([1, 0, oracle.NOWHERE], np.int32), (num_ranks, 5, 1))
    seen = {}

    def per_rank(topk_idx):
        plan = row.make_plan(topk_idx, num_experts=2 * num_ranks, alignment=4)
        seen["capacity"] = plan.capacity
        return plan.num_dropped

    assert (np.asarray(row.jit(per_rank, num_ranks)(topk_idx)) == 0).all()
    assert seen["capacity"] == num_ranks * 5 * 2 + 2 * 3


def test_implementation_is_chosen_when_not_asked_for() -> None:
    """On CPU devices of one process, the native one serves if it was built."""
    require("native")
    plan = jax_ep.make_plan(np.zeros((3, 2), np.int32), num_experts=4)
    assert plan.implementation == "native"
    assert plan.axis_name is None
    assert plan.group_sizes.tolist() == [6, 0, 0, 0]


def test_dropped_is_minus_one() -> None:
    assert jax_ep.DROPPED == -1


@given(
    num_tokens=st.integers(1, 200),
    num_topk=st.integers(1, 8),
    num_ranks=st.sampled_from([1, 2, 8]),
    num_local=st.integers(1, 8),
    factor=st.floats(0.25, 4),
    alignment=st.sampled_from([1, 4, 128]),
)
def test_suggested_capacity(num_tokens, num_topk, num_ranks, num_local, factor, alignment) -> None:
    """A budget for `factor` times the balanced load, never more than would drop nothing."""
    suggested = jax_ep.suggest_capacity(
        num_tokens, num_topk, num_local * num_ranks, num_ranks, factor=factor, alignment=alignment
    )
    assert isinstance(suggested, int)
    padding = num_local * (alignment - 1)
    everything = num_ranks * num_tokens * min(num_topk, num_local)
    balanced = min(factor * num_tokens * num_topk, everything)
    assert suggested >= balanced + padding - 1e-6
    assert suggested <= max(1, everything) + padding
    assert suggested <= balanced + padding + alignment + 1
