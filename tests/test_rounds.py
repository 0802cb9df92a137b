"""Rounds over XLA's collectives: how many, the same bits in any number, what crosses the wire."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
import strategies
from exchanges import FIELDS, TARGETS, Answers
from implementations import AXIS, EMULATED, Fabric, Row, over_devices, prefer, require
from jax.sharding import AxisType, PartitionSpec
from rounds import (
    MANY,
    E,
    H,
    K,
    R,
    T,
    collectives,
    count_rounds,
    make_plan,
    random_routing,
    set_room,
)
from strategies import BASE, NODES, TIGHT, Shape

import jax_ep
from jax_ep import _fabrics, _wire


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    monkeypatch.setattr(_fabrics, "FABRICS", _fabrics.FABRICS)
    prefer("rounds")


@pytest.fixture(params=["one", "many", "smaller_ones"])
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Rounds as they are, and so small that there are many: a fabric each, as programs differ."""
    if request.param == "many":
        set_room(monkeypatch, MANY)
    if request.param == "smaller_ones":
        set_room(monkeypatch, 0.6)
        monkeypatch.setattr(_wire, "FEW_ROWS", 1)
    fabric = Fabric(f"{request.param} rounds", over_devices, 8)
    return Row("native", fabric, exact=True, platform="emulated" if EMULATED else "cpu")


@pytest.mark.parametrize(
    ("shape", "routing"),
    [
        (TIGHT, strategies.distinct),
        (BASE, strategies.duplicates),
        (BASE, strategies.out_of_range),
        (BASE, strategies.everything_to_one_expert),
        (BASE, strategies.a_rank_receives_nothing),
        (Shape(num_ranks=2, num_topk=5, num_experts=8, alignment=4), strategies.distinct),
        (
            Shape(num_ranks=8, num_experts=24, alignment=4, tail="uninitialized"),
            strategies.distinct,
        ),
        (NODES, strategies.distinct),
        (NODES, strategies.out_of_range),
        (dataclasses.replace(NODES, capacity=24, alignment=2), strategies.duplicates),
        (
            Shape(num_ranks=8, num_tokens=11, num_topk=6, num_experts=16, ranks_per_node=4),
            strategies.distinct,
        ),
        (
            Shape(
                num_ranks=8,
                num_topk=6,
                num_experts=24,
                alignment=4,
                tail="uninitialized",
                ranks_per_node=2,
            ),
            strategies.a_rank_receives_nothing,
        ),
    ],
)
def test_every_op_in_any_number_of_rounds(
    row: Row, shape: Shape, routing: strategies.Routing
) -> None:
    result = Answers.of(row, shape, routing(shape))
    inputs = result.inputs
    for name in (*FIELDS, *TARGETS):
        result.same(name)
    for name in ("sent", "drows", "plain_drows"):
        result.same_rows(name)
    result.same_sum("out", inputs.rows, inputs.weights)
    result.same_sum("plain", inputs.rows)
    result.same_sum("dx", inputs.drows)
    result.close_dots()


def test_a_balanced_exchange_takes_one_round() -> None:
    count = count_rounds()
    for seed in range(5):
        assert count(random_routing(seed))[0] == 1


@pytest.mark.parametrize("choice", ["first", "every"])
def test_as_many_as_the_fullest_pair_needs(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """A token goes to a rank once, however many of its choices are there."""
    set_room(monkeypatch, 0.2)
    count = count_rounds()
    topk_idx = np.full((R, T, K), jax_ep.DROPPED, np.int32)
    for tokens in range(T + 1):
        if tokens:
            topk_idx[2, tokens - 1] = [12, -1, -1, -1] if choice == "first" else [12, 13, 12, 15]
        number, room = count(topk_idx)
        assert room == math.ceil(0.2 * T * (1 - math.comb(12, 4) / math.comb(16, 4)))
        assert number == max(1, -(-tokens // room))


def test_rounds_after_the_first_are_smaller() -> None:
    """But not so small that they take as long as larger ones; together they carry all."""
    unknown: list[Any] = [None] * len(dataclasses.fields(_wire.Wire))
    wire = _wire.Wire(*unknown)
    wire = dataclasses.replace(wire, room=1000, start=0)
    for fullest, rooms in ((1, 0), (1000, 0), (1001, 1), (1250, 1), (1251, 2), (4096, 13)):
        others = dataclasses.replace(wire, fullest=np.int32(fullest)).after_the_first()
        assert (others.room, others.start) == (250, 1000)
        assert max(0, int(others.num_rounds)) == rooms
    for room, smaller in ((1, 1), (64, 64), (65, 64), (256, 64), (260, 65)):
        assert dataclasses.replace(wire, room=room).after_the_first().room == smaller


@pytest.mark.long
def test_what_a_round_takes_over_the_wire() -> None:
    """No rank gets all ranks' tokens; rows cross once for each rank that wants them."""

    def layer(x: jax.Array, plan: jax_ep.Plan) -> jax.Array:
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan)

    x = np.ones((R, T, 256), np.float32)
    plan = jax.jit(over_devices(make_plan, R))(random_routing())
    program = jax.jit(over_devices(layer, R)).lower(x, plan).compile()
    text = program.as_text()
    assert not list(collectives(text, "all-gather"))
    room = _wire.room_of(plan._layout)
    # In the round that there always is, out and back, and in the loops' bodies, of which those of
    # combine are half as large.
    sizes = [room * 256 * 4] * 3 + [(room + 1) // 2 * 256 * 4] * 2
    if EMULATED:
        want = {"all-to-all": [R * size for size in sizes]}
    else:
        want = {"collective-permute": sizes * (R - 1)}
    for name in ("all-to-all", "collective-permute"):
        assert sorted(collectives(text, name)) == sorted(want.get(name, []))
    program(x, plan)


@pytest.mark.long
@pytest.mark.skipif(EMULATED is not None, reason="XLA:CPU cuts up what XLA:GPU sends as it is")
def test_memory_grows_with_rounds_and_not_with_ranks() -> None:
    """Dispatch and combine hold two rounds' rows, and what XLA copies once more."""
    plan = jax.jit(over_devices(make_plan, R))(random_routing())
    x, rows = np.ones((R, T, 4096), np.float32), np.ones((R, plan.capacity, 4096), np.float32)
    a_round = R * _wire.room_of(plan._layout) * 4096 * 4
    for f, operand in ((jax_ep.dispatch, x), (jax_ep.combine, rows)):
        memory = jax.jit(over_devices(f, R)).lower(operand, plan).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes <= 3.1 * a_round


@pytest.mark.parametrize("where", ["everywhere", "in_one_group"])
def test_groups_go_different_ways(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """One needs a dozen rounds and the other one; or only one exchanges at all: nobody hangs."""
    set_room(monkeypatch, MANY)
    mesh = jax.make_mesh((2, R), ("data", AXIS), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(2, R, T, H)).astype(np.float32)
    topk_idx = np.stack([np.zeros((R, T, K), np.int32), random_routing()])
    topk_idx[1, :, 3:] = jax_ep.DROPPED

    def exchange(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        plan = make_plan(topk_idx)
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan)

    def block(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        x, topk_idx = x[0, 0], topk_idx[0, 0]
        if where == "everywhere":
            return exchange(x, topk_idx)[None, None]
        is_first = jax.lax.axis_index("data") == 0
        return jax.lax.cond(is_first, exchange, lambda x, _: x, x, topk_idx)[None, None]

    spec = PartitionSpec("data", AXIS)
    program = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    want = x * np.sum(topk_idx >= 0, axis=-1, keepdims=True)
    if where == "in_one_group":
        want[1] = x[1]
    np.testing.assert_allclose(program(x, topk_idx), want, rtol=1e-6)


@pytest.mark.skipif(EMULATED is not None, reason="GPUs leave it out without a word")
def test_a_bad_plan_on_one_rank_keeps_nobody_waiting(capfd: pytest.CaptureFixture[str]) -> None:
    """An error would keep it from the collectives that follow."""

    def layer(x: jax.Array, plan: jax_ep.Plan, recv_row: jax.Array) -> jax.Array:
        plan = dataclasses.replace(plan, _arrays=plan._arrays._replace(recv_row=recv_row))
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan)

    x, topk_idx = np.ones((R, T, H), np.float32), random_routing()
    plan = jax.jit(over_devices(make_plan, R))(topk_idx)
    recv_row = np.array(plan._arrays.recv_row)
    program = jax.jit(over_devices(layer, R))
    np.testing.assert_array_equal(program(x, plan, recv_row), K * x)
    recv_row[1, 0] = plan.capacity
    # The list's first entry is the first choice of rank 0's that goes to rank 1.
    token = np.flatnonzero((topk_idx[0] // (E // R) == 1).any(axis=1))[0]
    right = np.ones((R, T), bool)
    right[0, token] = False
    got = np.asarray(program(x, plan, recv_row))
    np.testing.assert_array_equal(got[right], K * x[right])
    assert "dispatch: plan must be as make_plan made it: its send_row" in capfd.readouterr().err
