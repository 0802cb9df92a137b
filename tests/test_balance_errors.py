"""What ``balance`` and ``with_copies`` refuse, and how they say so."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jax_ep


def bad(**changes):
    arguments = {"topk_idx": jnp.zeros((3, 2), jnp.int32), "num_experts": 8} | changes
    return jax_ep.balance(arguments.pop("topk_idx"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_idx": jnp.zeros(3, jnp.int32)}, ValueError, r"topk_idx must have shape"),
        ({"topk_idx": jnp.zeros((3, 2))}, TypeError, "topk_idx must have dtype int32"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1; got 0"),
        ({"num_spares": 0}, ValueError, "num_spares must be at least 1; got 0"),
        ({"num_spares": 1.0}, TypeError, "num_spares must be an int; got 1.0"),
        ({"slack": -0.1}, ValueError, "slack must be finite and at least 0; got -0.1"),
        ({"slack": float("nan")}, ValueError, "slack must be finite and at least 0; got nan"),
        ({"slack": "0.1"}, TypeError, "slack must be a number; got '0.1'"),
        ({"share": jnp.ones(2)}, ValueError, r"share must have shape .* \[1\]; got \[2\]"),
        ({"share": jnp.ones(1, jnp.int32)}, TypeError, "share must have dtype float32"),
        ({"ranks_per_node": 2}, ValueError, "ranks_per_node must divide the 1 ranks; got 2"),
        ({"axis_name": "nowhere"}, ValueError, "axis_name must name a mesh axis"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        bad(**changes)


def test_errors_of_with_copies():
    _, copies = bad()
    with pytest.raises(ValueError, match=r"weights\['w'\] .*num_local_experts"):
        jax_ep.with_copies({"w": jnp.ones((7, 2))}, copies)
    with pytest.raises(TypeError, match="copies must be a jax_ep.Plan; got int"):
        jax_ep.with_copies(jnp.ones((8, 2)), 3)


def test_moe_takes_a_balance_only():
    x, w = jnp.ones((3, 4)), jnp.ones((8, 4, 4))
    idx, weights = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    with pytest.raises(TypeError, match=r"balance must be a jax_ep.Balance or None; got True"):
        jax_ep.moe(x, idx, weights, w, w, w, num_experts=8, balance=True)
