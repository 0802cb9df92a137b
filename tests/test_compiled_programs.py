"""What XLA runs besides our calls, each of which would be a launch on a GPU."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from implementations import ALL_ROWS, Row

import jax_ep

R, T, K, E, H = 4, 6, 2, 8, 3
STACKED = [
    row
    for row in ALL_ROWS
    if (row.implementation, row.platform) == ("native", "cpu") and row.fabric.name != "shard_map"
]
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}


def computed(row: Row, f) -> Counter[str]:
    """Counts what a program of all ranks runs: instructions that are no mere names of values."""
    num_ranks = min(R, row.fabric.max_ranks)
    x, topk_idx = jnp.ones((num_ranks, T, H)), jnp.zeros((num_ranks, T, K), jnp.int32)
    program = row.jit(f, num_ranks).lower(x, topk_idx, jnp.ones(topk_idx.shape)).compile()
    entry = program.as_text().split("ENTRY")[1]
    codes = re.findall(r"^ *(?:ROOT )?%\S+ = .*? ([\w-]+)\(", entry, re.MULTILINE)
    return Counter(code for code in codes if code not in FREE)


def layer(row: Row):
    def per_rank(x, topk_idx, weights):
        plan = row.make_plan(topk_idx, num_experts=E)
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)

    return per_rank


@pytest.mark.parametrize("row", STACKED, ids=str)
def test_an_exchange_on_one_device(row: Row) -> None:
    """Ranks and groups, which nobody reads there, took five more kernels to write."""
    row.require()
    # The fusion marks what is not routed.
    assert computed(row, layer(row)) == {"custom-call": 3, "fusion": 1}


@pytest.mark.parametrize("row", STACKED, ids=str)
def test_its_gradient(row: Row) -> None:
    row.require()

    def per_rank(x, topk_idx, weights):
        _, pull = jax.vjp(lambda x, weights: layer(row)(x, topk_idx, weights), x, weights)
        return pull(x)

    # A plan, the rows again, and how they go back to rows, weights and tokens.
    assert computed(row, per_rank) == {"custom-call": 5, "fusion": 1}
