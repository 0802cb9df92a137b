"""``load_metrics`` against counts taken from the oracle's plan, choice by choice."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import Row
from strategies import BASE, NODES, ROUTINGS, TIGHT, Shape

import jax_ep

HIDDEN = 40
ROW_BYTES = HIDDEN * 2


def expected(shape: Shape, topk_idx: np.ndarray) -> dict[str, np.ndarray]:
    plan = shape.plan(topk_idx)
    by_expert = plan.expert_load.astype(np.float64)
    by_rank = by_expert.reshape(shape.num_ranks, -1).sum(1)
    valid = (topk_idx >= 0) & (topk_idx < shape.num_experts)
    wires, node_wires = np.zeros((2, shape.num_ranks))
    per_node = shape.ranks_per_node
    for rank, token in np.ndindex(*topk_idx.shape[:2]):
        reached = set(plan.to_rank[rank, token][plan.kept[rank, token]].tolist())
        wires[rank] += len(reached - {rank})
        node_wires[rank] += len({r // per_node for r in reached} - {rank // per_node})
    ones = np.ones(shape.num_ranks)
    return {
        "expert_load_max_over_mean": ones * by_expert.max() / max(by_expert.mean(), 1e-9),
        "rank_load_max_over_mean": ones * by_rank.max() / max(by_rank.mean(), 1e-9),
        "dropped_fraction": plan.num_dropped / np.maximum(valid.sum((1, 2)), 1),
        "recv_rows": plan.recv_counts.sum(1),
        "logical_bytes": ROW_BYTES * plan.kept.sum((1, 2)),
        "wire_bytes": ROW_BYTES * wires,
        "node_wire_bytes": ROW_BYTES * node_wires,
    }


@pytest.mark.parametrize(
    "shape",
    [BASE, TIGHT, Shape(capacity=7), NODES],
    ids=["base", "tight", "seven", "nodes"],
)
def test_counts(ranks_row: Row, shape: Shape):
    def per_rank(topk_idx):
        plan = ranks_row.make_plan(
            topk_idx,
            num_experts=shape.num_experts,
            capacity=shape.capacity,
            alignment=shape.alignment,
            ranks_per_node=shape.ranks_per_node,
        )
        return jax_ep.load_metrics(plan, hidden=HIDDEN, dtype=jnp.bfloat16)

    program = ranks_row.jit(per_rank, shape.num_ranks)
    for routing in ROUTINGS:
        topk_idx = routing(shape)
        got, want = program(topk_idx), expected(shape, topk_idx)
        assert set(got) == set(want)
        for name, value in got.items():
            assert value.dtype == (jnp.int32 if name == "recv_rows" else jnp.float32)
            np.testing.assert_allclose(value, want[name], rtol=1e-6, err_msg=name)


def test_the_examples_tell_the_counts_apart():
    """Each routing drops, repeats a rank within a token, or stays home somewhere."""
    metrics = [expected(TIGHT, routing(TIGHT)) for routing in ROUTINGS]
    assert any(m["dropped_fraction"].any() for m in metrics)
    assert any((m["wire_bytes"] < m["logical_bytes"]).all() for m in metrics)
    nodes = [expected(NODES, routing(NODES)) for routing in ROUTINGS]
    assert any((m["node_wire_bytes"] < m["wire_bytes"]).all() for m in nodes)
    home = expected(BASE, next(r for r in ROUTINGS if r.__name__ == "own_experts_only")(BASE))
    assert not home["wire_bytes"].any()
    assert home["logical_bytes"].all()
    assert oracle.NOWHERE == jax_ep.DROPPED


def test_bytes_beyond_int32():
    plan = jax_ep.make_plan(jnp.zeros((3, 1), jnp.int32), num_experts=1)
    metrics = jax_ep.load_metrics(plan, hidden=2**30, dtype=jnp.float32)
    assert float(metrics["logical_bytes"]) == 3 * 2.0**32


def test_errors():
    plan = jax_ep.make_plan(jnp.zeros((3, 1), jnp.int32), num_experts=1)
    with pytest.raises(TypeError, match="plan must be a jax_ep.Plan; got dict"):
        jax_ep.load_metrics({}, hidden=1, dtype=jnp.float32)
    with pytest.raises(ValueError, match="hidden must be at least 1; got 0"):
        jax_ep.load_metrics(plan, hidden=0, dtype=jnp.float32)
