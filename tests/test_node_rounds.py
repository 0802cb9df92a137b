"""Rounds on two levels: tokens cross between nodes once for each node, and are spread there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import AXIS, EMULATED, over_devices, prefer, require, stacked
from jax.sharding import AxisType, PartitionSpec
from rounds import MANY, collectives, set_room

import jax_ep
from jax_ep import _fabrics, _wire
from jax_ep._layout import Layout
from jax_ep.testing import uniform_routing

R, T, K, E, H = 8, 32, 4, 16, 256
PER_NODE = 4


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    monkeypatch.setattr(_fabrics, "FABRICS", _fabrics.FABRICS)
    prefer("rounds")


def make_plan(topk_idx: jax.Array, per_node: int = PER_NODE) -> jax_ep.Plan:
    return jax_ep.make_plan(
        topk_idx,
        num_experts=E,
        axis_name=AXIS,
        implementation="native",
        ranks_per_node=per_node,
    )


def routing(num_ranks: int = R, num_tokens: int = T) -> np.ndarray:
    return np.asarray(
        uniform_routing(
            np.random.default_rng(0),
            num_ranks=num_ranks,
            num_tokens=num_tokens,
            num_experts=E,
            num_topk=K,
        )
    )


def layer(x: jax.Array, topk_idx: jax.Array, per_node: int = PER_NODE) -> jax.Array:
    plan = make_plan(topk_idx, per_node)
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


def crossing(text: str, per_node: int) -> tuple[int, int]:
    """Counts the bytes that permutations of a program bring a rank: from other nodes, and all."""
    between = total = 0
    for line in text.splitlines():
        for size in collectives(line, "collective-permute"):
            pairs = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1])
            total += size
            nodes = [(int(a) // per_node, int(b) // per_node) for a, b in pairs]
            between += size * any(a != b for a, b in nodes)
    return between, total


@pytest.mark.skipif(EMULATED is not None, reason="GPUs send all in one all-to-all")
@pytest.mark.parametrize("num_tokens", [T, 512])
def test_what_crosses_between_nodes(num_tokens: int) -> None:
    """The slots of other nodes, each once; within a node the ranks read from each other.

    Where a round has room for all tokens there is no other, and nobody asks how many there are.
    """
    x, topk_idx = np.ones((R, num_tokens, H), np.float32), routing(R, num_tokens)
    plan = jax.jit(over_devices(make_plan, R))(topk_idx)
    text = jax.jit(over_devices(jax_ep.dispatch, R)).lower(x, plan).compile().as_text()
    assert text is not None
    assert "jax_ep_gather_rows_devices" in text
    room = _wire.room_of(plan._layout, PER_NODE)
    further = 0 if room == num_tokens else max(_wire.FEW_ROWS, -(-room // _wire.FURTHER_ROUNDS))
    assert (further == 0) == (num_tokens == T)
    assert len(list(collectives(text, "all-reduce"))) == (further > 0)
    assert crossing(text, PER_NODE) == ((room + further) * H * 4,) * 2


@pytest.mark.parametrize("per_node", [1, R])
def test_one_level_where_there_is_no_second(per_node: int) -> None:
    program = jax.jit(over_devices(lambda x, idx: layer(x, idx, per_node), R))
    x, topk_idx = np.ones((R, T, H), np.float32), routing()
    assert "_devices" not in program.lower(x, topk_idx).as_text()
    np.testing.assert_array_equal(program(x, topk_idx), K * x)


@pytest.mark.parametrize("num_nodes", [2, 4, 8])
def test_rows_between_nodes_are_little_more_than_needed(num_nodes: int) -> None:
    """Slots are no more than 1.05 times what random tokens take of them, and one round has room."""
    num_ranks, num_tokens, num_experts = 8 * num_nodes, 4096, 256
    rng = np.random.default_rng(num_nodes)
    layout = Layout(num_ranks, num_experts, num_tokens, 8, 1, 1, "zero", AXIS, "native", True, 8)
    room = _wire.room_of(layout, 8)
    wanted = 0
    for rank in range(num_ranks):
        scores = rng.random((num_tokens, num_experts), np.float32)
        experts = np.argpartition(scores, 8, axis=1)[:, :8]
        reached = np.zeros((num_tokens, num_nodes), bool)
        np.put_along_axis(reached, experts // (num_experts // num_nodes), True, axis=1)
        assert reached.sum(axis=0).max() <= room
        wanted += np.delete(reached, rank // 8, axis=1).sum()
    sent = num_ranks * (num_nodes - 1) * room
    assert wanted <= sent <= 1.05 * wanted


def test_metrics_count_what_crosses() -> None:
    def per_rank(topk_idx: jax.Array) -> jax.Array:
        metrics = jax_ep.load_metrics(make_plan(topk_idx), hidden=H, dtype=np.float32)
        return metrics["node_wire_bytes"]

    topk_idx = routing()
    there = topk_idx // (E // 2)
    other = there != (np.arange(R) // PER_NODE)[:, None, None]
    want = 4 * H * other.any(axis=2).sum(axis=1)
    np.testing.assert_array_equal(jax.jit(over_devices(per_rank, R))(topk_idx), want)
    np.testing.assert_array_equal(jax.jit(stacked(per_rank, R))(topk_idx), want)


@pytest.mark.parametrize("rounds", ["one", "many"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_groups_of_nodes(monkeypatch: pytest.MonkeyPatch, kind: AxisType, rounds: str) -> None:
    """Two groups of two nodes on one mesh, with gradients: the same bits as on one device."""
    if rounds == "many":
        set_room(monkeypatch, MANY)
    mesh = jax.make_mesh((2, 4), ("data", AXIS), axis_types=(kind,) * 2)
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 4, T, H)), rng.normal(size=(2, 4, T, K))
    x, weights = x.astype(np.float32), weights.astype(np.float32)
    topk_idx = np.stack([routing(4), routing(4)[:, ::-1]])

    def loss(x: jax.Array, weights: jax.Array, topk_idx: jax.Array) -> jax.Array:
        plan = make_plan(topk_idx, 2)
        rows = jax_ep.dispatch(x, plan)
        return jax_ep.combine(rows * rows, plan, weights).sum()

    grads = jax.grad(loss, (0, 1))

    def block(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.map(lambda a: a[None, None], grads(*(a[0, 0] for a in arrays)))

    spec = PartitionSpec("data", AXIS)
    arrays = jax.device_put((x, weights, topk_idx), jax.NamedSharding(mesh, spec))
    got = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))(*arrays)
    alone = jax.jit(jax.vmap(jax.vmap(grads, axis_name=AXIS)))
    for mine, want in zip(got, alone(x, weights, topk_idx), strict=True):
        np.testing.assert_array_equal(mine, want)


def test_trees_and_layers_in_turn() -> None:
    """Several arrays at once; and exchanges that nothing orders among each other."""
    topk_idx = routing()
    x = np.random.default_rng(1).normal(size=(R, T, H)).astype(np.float32)

    def per_rank(x: jax.Array, topk_idx: jax.Array) -> dict[str, jax.Array]:
        plan = make_plan(topk_idx)
        rows = jax_ep.dispatch({"x": x, "half": x[:, : H // 2].astype(np.float16)}, plan)
        sums = jax.tree.map(lambda rows: jax_ep.combine(rows, plan), rows)
        others = make_plan(topk_idx[:, ::-1])
        return sums | {"others": jax_ep.combine(jax_ep.dispatch(x, others), others)}

    program, alone = jax.jit(over_devices(per_rank, R)), jax.jit(stacked(per_rank, R))
    want = alone(x, topk_idx)
    for _, name in itertools.product(range(5), want):
        np.testing.assert_array_equal(program(x, topk_idx)[name], want[name], err_msg=name)


@pytest.mark.long
def test_a_bad_plan_on_one_rank_keeps_nobody_waiting() -> None:
    """What is no index is left out, as on one level: the others get what is theirs."""
    x, topk_idx = np.ones((R, T, H), np.float32), routing()
    plan = jax.jit(over_devices(make_plan, R))(topk_idx)
    right = np.asarray(jax.jit(over_devices(jax_ep.dispatch, R))(x, plan))
    for name, bad in (("recv_row", plan.capacity), ("recv_choice", -7), ("send_row", 1 << 30)):
        array = np.array(getattr(plan._arrays, name))
        array[1].reshape(-1)[0] = bad
        broken = dataclasses.replace(plan, _arrays=plan._arrays._replace(**{name: array}))
        got = np.asarray(jax.jit(over_devices(jax_ep.dispatch, R))(x, broken))
        assert (got != right).any(axis=2).sum() <= K
        assert np.isfinite(
            np.asarray(jax.jit(over_devices(jax_ep.combine, R))(right, broken))
        ).all()


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids="-".join)
@pytest.mark.parametrize("per_node", [1, 2])
def test_tuple_of_all_axes(names: tuple[str, str], per_node: int) -> None:
    """The first name is the major one: a permutation counts by the order of the mesh."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(3).normal(size=(4, T, H)).astype(np.float32)

    def per_rank(x: jax.Array, topk_idx: jax.Array, axis_name: Any) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx, num_experts=E, axis_name=axis_name, ranks_per_node=per_node
        )
        return jax_ep.combine(jnp.tanh(jax_ep.dispatch(x, plan)), plan)

    def block(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        return per_rank(x[0], topk_idx[0], names)[None]

    spec = PartitionSpec(names)
    program = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))
    alone = jax.vmap(functools.partial(per_rank, axis_name=AXIS), axis_name=AXIS)
    np.testing.assert_array_equal(program(x, routing(4)), jax.jit(alone)(x, routing(4)))
