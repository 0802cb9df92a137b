"""Plans that no rank makes alone, from its own choices: the bits of those made from all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import oracle
import pytest
import strategies
from exchanges import Answers, expected_fields, fields_of, make_plan, same_bits
from hypothesis import given, settings
from implementations import AXIS, EMULATED, Fabric, Row, over_devices, prefer, require
from jax.sharding import AxisType, PartitionSpec
from strategies import BASE, CASES, NODES, TIGHT, Case, Shape

from jax_ep import _fabrics, _owned_plan

pytestmark = pytest.mark.skipif(EMULATED is not None, reason="GPUs gather all choices")
LISTS = ("recv_choice", "recv_row")


@pytest.fixture(autouse=True)
def owned(monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    monkeypatch.setattr(_fabrics, "FABRICS", _fabrics.FABRICS)
    monkeypatch.setattr(_owned_plan, "FROM_CHOICES", 0)
    prefer("rounds")


@pytest.fixture(params=["one", "many"])
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Pairs are told of their rows in one round, or of one choice in each."""
    if request.param == "many":
        monkeypatch.setattr(_owned_plan, "_room_of", lambda _: 1)
    return Row("native", Fabric(f"owned plans, {request.param}", over_devices, 8), exact=True)


@functools.cache
def program(row: Row, shape: Shape) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """Compiles a plan with its lists."""

    def per_rank(topk_idx: jax.Array) -> dict[str, jax.Array]:
        plan = make_plan(row, shape, topk_idx)
        lists = {name: getattr(plan._arrays, name) for name in (*LISTS, "fingerprint")}
        return fields_of(plan) | {"group_rows": plan._arrays.group_rows} | lists

    return row.jit(per_rank, shape.num_ranks)


def check(row: Row, shape: Shape, topk_idx: np.ndarray) -> None:
    got = jax.tree.map(np.asarray, program(row, shape)(topk_idx))
    want = shape.plan(topk_idx)
    for name, array in expected_fields(want).items():
        same_bits(got[name], array, name)
    assert len({*got["fingerprint"].tolist()}) == 1
    for rank in range(shape.num_ranks):
        check_received(shape, want, {name: array[rank] for name, array in got.items()}, rank)


def check_received(shape: Shape, want: oracle.Plan, got: dict[str, np.ndarray], rank: int) -> None:
    """The lists name each row's choice, in the order of choices."""
    rows = np.flatnonzero(want.named[rank])
    source, token, k = want.origin[rank, rows].T
    choice = (source * shape.num_tokens + token) * shape.num_topk + k
    order = np.argsort(choice)
    same_bits(got["recv_choice"][: rows.size], choice[order].astype(np.int32), "recv_choice")
    same_bits(got["recv_row"][: rows.size], rows[order].astype(np.int32), "recv_row")
    experts = np.bincount(
        np.searchsorted(np.cumsum(want.group_sizes[rank]), rows, side="right"),
        minlength=shape.num_local_experts,
    )
    same_bits(got["group_rows"], experts.astype(np.int32), "group_rows")


ONE = Row("native", Fabric("owned plans, one", over_devices, 8), exact=True)
OF_ONE_OR_MORE = [
    case for case in CASES if 1 < case.shape.num_ranks <= 8 and case.shape.num_tokens > 0
]


@pytest.mark.parametrize("case", OF_ONE_OR_MORE, ids=str)
def test_every_case(row: Row, case: Case) -> None:
    check(row, case.shape, case.topk_idx)


LONG = Shape(num_ranks=4, num_tokens=150, num_topk=3, num_experts=8)


@pytest.mark.parametrize("capacity", [1, 2, 40, 63, 64, 65, 200, 449, 450, 451, 600, 1799, 1800])
@pytest.mark.parametrize("routing", [strategies.distinct, strategies.everything_to_one_expert])
def test_where_rows_run_out(capacity: int, routing: strategies.Routing) -> None:
    """In any k, in any block of tokens, and between two sources' same tokens."""
    shape = dataclasses.replace(LONG, capacity=capacity)
    check(ONE, shape, routing(shape))


@settings(max_examples=30)
@given(topk_idx=strategies.topk_indices(TIGHT))
def test_random_routings(topk_idx: np.ndarray) -> None:
    check(ONE, TIGHT, topk_idx)


@pytest.mark.parametrize("shape", [BASE, TIGHT, NODES], ids=["base", "tight", "nodes"])
def test_exchanges_over_them(row: Row, shape: Shape) -> None:
    result = Answers.of(row, shape, strategies.duplicates(shape))
    result.same_rows("sent")
    result.same_sum("out", result.inputs.rows, result.inputs.weights)
    result.same_sum("dx", result.inputs.drows)
    result.same_rows("drows")


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_groups_go_different_ways(kind: AxisType) -> None:
    """In one of them rows run out, in the other they do not: nobody hangs."""
    shape = dataclasses.replace(LONG, capacity=600)
    topk_idx = np.stack([strategies.distinct(shape), strategies.everything_to_one_expert(shape)])
    mesh = jax.make_mesh((2, 4), ("data", AXIS), axis_types=(kind,) * 2)
    row = Row("native", Fabric("groups", over_devices, 8), exact=True)

    def block(topk_idx: jax.Array) -> dict[str, jax.Array]:
        fields = fields_of(make_plan(row, shape, topk_idx[0, 0]))
        return jax.tree.map(lambda a: a[None, None], fields)

    spec = PartitionSpec("data", AXIS)
    placed = jax.device_put(topk_idx, jax.NamedSharding(mesh, spec))
    got = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))(placed)
    plans = [shape.plan(each) for each in topk_idx]
    assert [plan.num_dropped.sum() > 0 for plan in plans] == [False, True]
    for group, plan in enumerate(plans):
        for name, array in expected_fields(plan).items():
            same_bits(np.asarray(got[name])[group], array, name)


def test_fingerprints_tell_layouts_apart() -> None:
    """Of the same choices: what is laid out otherwise must not be taken for the same plan."""
    row = Row("native", Fabric("fingerprints", over_devices, 8), exact=True)
    prints = set()
    for changes in ({}, {"capacity": 19}, {"alignment": 1}):
        shape = dataclasses.replace(TIGHT, **changes)

        def per_rank(topk_idx: jax.Array, shape: Shape = shape) -> jax.Array:
            return make_plan(row, shape, topk_idx)._arrays.fingerprint

        prints |= {*row.jit(per_rank, shape.num_ranks)(strategies.distinct(shape)).tolist()}
    assert len(prints) == 3
