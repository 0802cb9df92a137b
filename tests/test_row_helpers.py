"""What belongs to each received row, against the oracle, wherever exchanges run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from exchanges import make_plan
from implementations import ROWS, VMAP, Row
from strategies import BASE, CASES, TIGHT, Case

import jax_ep


@pytest.mark.parametrize(
    ("row", "case"),
    [
        pytest.param(row, case, id=f"{row}-{case}")
        for row in ROWS
        for case in CASES
        # They are local: which devices the ranks are on makes no difference, but to their types.
        if row.fabric is VMAP or (row.serves(case.shape.num_ranks) and case.shape == TIGHT)
    ],
)
@pytest.mark.long
def test_experts_and_sources(row: Row, case: Case) -> None:
    def per_rank(topk_idx: jax.Array) -> tuple[jax.Array, jax_ep.RowSources]:
        plan = make_plan(row, case.shape, topk_idx)
        return jax_ep.row_experts(plan), jax_ep.row_sources(plan)

    experts, sources = row.jit(per_rank, case.shape.num_ranks)(case.topk_idx)
    want = case.shape.plan(case.topk_idx)
    np.testing.assert_array_equal(np.stack(sources, axis=-1), want.origin)
    asked = case.topk_idx[tuple(np.moveaxis(want.origin, -1, 0))] if case.topk_idx.size else -1
    local = np.where(want.named, asked % case.shape.num_local_experts, oracle.NOWHERE)
    np.testing.assert_array_equal(experts, local)


@pytest.mark.parametrize("row", [row for row in ROWS if row.serves(BASE.num_ranks)], ids=str)
@pytest.mark.parametrize("shape", [BASE, TIGHT], ids=["base", "tight"])
def test_weights_and_their_gradient(row: Row, shape: strategies.Shape) -> None:
    topk_idx = strategies.duplicates(shape)
    want = shape.plan(topk_idx)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=topk_idx.shape).astype(np.float32)
    cotangents = rng.normal(size=want.named.shape).astype(np.float32)

    def per_rank(topk_idx: jax.Array, weights: jax.Array, cotangents: jax.Array):
        plan = make_plan(row, shape, topk_idx)
        rows, pull = jax.vjp(lambda weights: jax_ep.row_weights(weights, plan), weights)
        return rows, pull(cotangents)[0]

    rows, dweights = row.jit(per_rank, shape.num_ranks)(topk_idx, weights, cotangents)
    np.testing.assert_array_equal(np.asarray(rows)[want.named], weights[_origins(want)])
    padding = want.used & ~want.named
    np.testing.assert_array_equal(np.asarray(rows)[padding], 0)
    expected = np.zeros_like(weights)
    expected[_origins(want)] = cotangents[want.named]
    np.testing.assert_array_equal(dweights, expected)


def _origins(plan: oracle.Plan) -> tuple[np.ndarray, ...]:
    return tuple(np.moveaxis(plan.origin[plan.named], -1, 0))


@pytest.mark.long
def test_scaling_rows_before_linear_experts_is_scaling_their_sum() -> None:
    rng = np.random.default_rng(0)
    topk_idx = jnp.asarray(strategies.distinct(BASE)[0])
    plan = jax_ep.make_plan(topk_idx, num_experts=BASE.num_experts)
    x = jnp.asarray(rng.normal(size=(BASE.num_tokens, 8)), jnp.float32)
    weights = jnp.asarray(rng.random(topk_idx.shape), jnp.float32)
    rows = jax_ep.dispatch(x, plan)
    scaled = jax_ep.combine(rows * jax_ep.row_weights(weights, plan)[:, None], plan)
    np.testing.assert_allclose(scaled, jax_ep.combine(rows, plan, weights), rtol=1e-5, atol=1e-6)


PLAN = jax_ep.make_plan(jnp.zeros((3, 2), jnp.int32), num_experts=2)


@pytest.mark.parametrize("helper", [jax_ep.row_experts, jax_ep.row_sources])
def test_a_plan_is_asked_for(helper) -> None:
    with pytest.raises(TypeError, match="plan must be a jax_ep.Plan; got dict"):
        helper({})


def test_what_weights_must_be() -> None:
    weights = jnp.ones((3, 2))
    with pytest.raises(TypeError, match="plan must be a jax_ep.Plan; got Array"):
        jax_ep.row_weights(weights, weights)
    with pytest.raises(ValueError, match=r"topk_weights must have shape .*\[3, 2\]; got \[2, 2\]"):
        jax_ep.row_weights(weights[:2], PLAN)
    with pytest.raises(TypeError, match="topk_weights must .*float32.*got.*bfloat16"):
        jax_ep.row_weights(weights.astype(jnp.bfloat16), PLAN)
