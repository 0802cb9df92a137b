"""Layers with ``balance``: what they compute is what they compute without, with a tight buffer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import HIDDEN, check_against_dense, inputs, make_layer, on, parameters
from implementations import Row
from jax.sharding import AxisType
from layers import reference
from strategies import Shape, distinct, duplicates, everything_to_one_expert
from test_moe import dense, problem, run

import jax_ep

pytestmark = pytest.mark.composes

# As much room as choices spread evenly need.
TIGHT = Shape(capacity=18)
SHAPES = {
    "even": (TIGHT, distinct),
    "duplicates": (TIGHT, duplicates),
    "one_expert": (TIGHT, everything_to_one_expert),
    "aligned": (Shape(capacity=18 + 4, alignment=2), everything_to_one_expert),
    "nodes": (Shape(capacity=36, ranks_per_node=2), everything_to_one_expert),
}


@pytest.mark.parametrize(("shape", "routing"), SHAPES.values(), ids=SHAPES)
def test_moe_is_the_dense_formula_forward_and_backward(layer_row: Row, shape: Shape, routing):
    floats, topk_idx, dout = problem(shape, routing)
    out, grads, kept = run(
        layer_row, shape, floats, topk_idx, dout, balance=jax_ep.Balance(num_spares=2)
    )
    np.testing.assert_array_equal(kept, topk_idx >= 0)
    want_out, want_grads = reference(dense, floats, dout, topk_idx, topk_idx >= 0)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_dropped(layer_row: Row):
    """One spare slot takes one of a rank's many small experts: the others stay, and it shows."""
    shape = Shape(num_ranks=4, num_experts=32, num_tokens=8, num_topk=2, capacity=16)
    floats, _, dout = problem(shape, distinct)
    topk_idx = np.arange(64, dtype=np.int32).reshape(shape.topk_shape) % 8
    _, _, kept = run(layer_row, shape, floats, topk_idx, dout, balance=jax_ep.Balance(1))
    # Rank 0's 8 experts have 8 choices each; three ranks take one expert each.
    assert np.sum(~np.asarray(kept)) == 64 - 3 * 8 - 16


MESHES = {
    "no_mesh": (None, ()),
    "expert": (AxisType.Auto, {"expert": 8}),
    "data_expert": (AxisType.Auto, {"data": 2, "expert": 4}),
    "data_expert_explicit": (AxisType.Explicit, {"data": 2, "expert": 4}),
}


@pytest.mark.parametrize(("kind", "axes"), MESHES.values(), ids=MESHES)
def test_the_flax_layer_is_the_dense_formula(implementation, kind, axes):
    with on(kind, axes):
        layer = make_layer(implementation=implementation, num_spares=2, capacity_factor=1.0)
        check_against_dense(layer)


def test_nothing_is_dropped_and_loads_are_told():
    """With the router blind, all tokens want experts 0 and 1, which two of eight ranks own."""
    with on(AxisType.Auto, {"expert": 8}):
        layer = make_layer(num_spares=2, capacity_factor=1.0)
        layer.router_kernel[...] = jnp.zeros_like(layer.router_kernel[...])
        _, aux = layer.apply_with_aux(jnp.ones((64, HIDDEN)))
    assert float(aux["dropped_fraction"]) == 0
    assert aux["expert_load"].tolist() == [64, 64, 0, 0, 0, 0, 0, 0]
    assert float(aux["expert_load_max_over_mean"]) == 4.0
    assert float(aux["rank_load_max_over_mean"]) == 1.0
    assert aux["rank_load"].tolist() == [16] * 8


def test_slack_lends_less():
    """The busiest rank has four times the mean: with as much slack nothing is lent."""
    with on(AxisType.Auto, {"expert": 8}):
        layer = make_layer(num_spares=2, slack=3.0)
        layer.router_kernel[...] = jnp.zeros_like(layer.router_kernel[...])
        _, aux = layer.apply_with_aux(jnp.ones((64, HIDDEN)))
    assert float(aux["rank_load_max_over_mean"]) == 4.0


@pytest.mark.long
def test_in_a_scan_of_remat(implementation):
    """Layers in a loop, computed again for the gradient: copies go out and come back each time."""
    x, dout = (jnp.asarray(a) for a in inputs())
    graphdef, state = nnx.split(make_layer(implementation=implementation))

    def loss(state, x, options):
        layer = nnx.merge(graphdef, state)
        layer.config = make_layer(implementation=implementation, **options).config

        @jax.checkpoint
        def step(x, _):
            return x + layer(x), None

        x, _ = jax.lax.scan(step, x, length=2)
        return jnp.vdot(x, dout)

    both = functools.partial(jax.value_and_grad(loss, argnums=(0, 1)), state, x)
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        plain = jax.jit(functools.partial(both, {}))()
        balanced = jax.jit(functools.partial(both, {"num_spares": 2, "capacity_factor": 1.0}))()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, balanced
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_spares": -1}, ValueError, "num_spares must be at least 0; got -1"),
        ({"num_spares": True}, TypeError, "num_spares must be an int; got True"),
        ({"slack": -1.0}, ValueError, "slack must be finite and at least 0; got -1.0"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        make_layer(**options)


def test_the_layer_has_no_more_parameters():
    """Spare slots hold copies for a step: a checkpoint is the same with and without."""
    plain, balanced = make_layer(), make_layer(num_spares=2)
    assert parameters(plain).keys() == parameters(balanced).keys()
