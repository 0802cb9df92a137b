"""``moe`` against the dense formula: every expert applied to every token, then picked."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wire_oracle
from implementations import Row
from layers import reference
from strategies import Shape, a_rank_receives_nothing, distinct, duplicates, nothing_kept

import jax_ep

pytestmark = pytest.mark.composes

FFN_HIDDEN = 5
SHAPES = {
    "drops_nothing": (Shape(), distinct),
    "drops": (Shape(capacity=9), duplicates),
    "aligned": (Shape(capacity=30, alignment=4), distinct),
    "nodes": (Shape(ranks_per_node=2), distinct),
    "a_rank_receives_nothing": (Shape(), a_rank_receives_nothing),
    "nothing_kept": (Shape(), nothing_kept),
    "no_tokens": (Shape(num_tokens=0), distinct),
}


def dense(x, topk_weights, w_gate, w_up, w_down, topk_idx, kept):
    """All ranks at once; the weights lead with [R, L]."""
    w_gate, w_up, w_down = (w.reshape(-1, *w.shape[2:]) for w in (w_gate, w_up, w_down))
    gate = jnp.einsum("rth,ehf->rtef", x, w_gate)
    up = jnp.einsum("rth,ehf->rtef", x, w_up)
    outs = jnp.einsum("rtef,efh->rteh", jax.nn.silu(gate) * up, w_down)
    picked = jnp.take_along_axis(outs, jnp.where(kept, topk_idx, 0)[..., None], axis=2)
    return jnp.sum(jnp.where(kept, topk_weights, 0.0)[..., None] * picked, axis=2)


def problem(shape: Shape, routing, seed: int = 0):
    rng = np.random.default_rng(seed)
    inward = (shape.num_ranks, shape.num_local_experts, shape.hidden, FFN_HIDDEN)
    sizes = (
        (*shape.topk_shape[:2], shape.hidden),
        shape.topk_shape,
        inward,
        inward,
        (*inward[:2], FFN_HIDDEN, shape.hidden),
    )
    floats = tuple(rng.standard_normal(size).astype(np.float32) for size in sizes)
    dout = rng.standard_normal(sizes[0]).astype(np.float32)
    return floats, routing(shape), dout


def run(row: Row, shape: Shape, floats, topk_idx, dout, **options):
    def per_rank(x, topk_weights, w_gate, w_up, w_down, topk_idx, dout):
        def layer(x, topk_weights, *weights):
            return jax_ep.moe(
                x,
                topk_idx,
                topk_weights,
                *weights,
                num_experts=shape.num_experts,
                axis_name=row.fabric.axis_name,
                capacity=shape.capacity,
                alignment=shape.alignment,
                ranks_per_node=shape.ranks_per_node,
                implementation=row.implementation,
                **options,
            )

        out, pull, plan = jax.vjp(layer, x, topk_weights, w_gate, w_up, w_down, has_aux=True)
        return out, pull(dout), plan.kept

    return row.jit(per_rank, shape.num_ranks)(*floats, topk_idx, dout)


@pytest.mark.parametrize(("shape", "routing"), SHAPES.values(), ids=SHAPES)
def test_is_the_dense_formula_forward_and_backward(layer_row: Row, shape: Shape, routing):
    floats, topk_idx, dout = problem(shape, routing)
    out, grads, kept = run(layer_row, shape, floats, topk_idx, dout)
    want_kept = shape.plan(topk_idx).kept
    np.testing.assert_array_equal(kept, want_kept)
    want_out, want_grads = reference(dense, floats, dout, topk_idx, want_kept)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bits_on_the_wire(layer_row: Row, dtype: str):
    """The result is that of rounded tokens; the gradients are those of rounded ``dout`` besides."""
    shape, routing = SHAPES["drops"]
    floats, topk_idx, dout = problem(shape, routing)

    def rounded(x):
        return wire_oracle.decode(*wire_oracle.encode(x, dtype), x.dtype)

    options = {"wire_dtype": dtype, "wire_cotangents": dtype}
    out, grads, kept = run(layer_row, shape, floats, topk_idx, dout, **options)
    floats = (rounded(floats[0]), *floats[1:])
    want_out, _ = reference(dense, floats, dout, topk_idx, kept)
    _, want_grads = reference(dense, floats, rounded(dout), topk_idx, kept)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_one_rank(row: Row):
    shape = Shape(num_ranks=1)
    floats, topk_idx, dout = problem(shape, duplicates)
    # A token that asks one expert twice needs more rows than the default capacity reckons with.
    shape = Shape(num_ranks=1, capacity=18)
    out, _, _ = run(row, shape, floats, topk_idx, dout)
    want, _ = reference(dense, floats, dout, topk_idx, shape.plan(topk_idx).kept)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_bfloat16(layer_row: Row):
    shape = Shape()
    floats, topk_idx, dout = problem(shape, distinct)
    half = [a if i == 1 else a.astype(jnp.bfloat16) for i, a in enumerate(floats)]
    out, grads, kept = run(layer_row, shape, half, topk_idx, dout.astype(jnp.bfloat16))
    want, want_grads = reference(dense, floats, dout, topk_idx, np.asarray(kept))
    assert [a.dtype for a in (out, *grads)] == [
        jnp.float32 if i == 2 else jnp.bfloat16 for i in range(6)
    ]
    for got, exact in zip((out, *grads), (want, *want_grads), strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(got.astype(np.float32), exact, atol=0.03 * scale)


def test_rows_past_the_groups_may_hold_anything(layer_row: Row):
    """The buffer is not written there, and it is much larger than what is used."""
    floats, topk_idx, dout = problem(Shape(), distinct)
    small = run(layer_row, Shape(), floats, topk_idx, dout)
    large = run(layer_row, Shape(capacity=1000), floats, topk_idx, dout)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), large, small)


def weights(local=4, hidden=6, ffn=5, dtype=jnp.float32):
    return {
        "x": jnp.ones((3, hidden), dtype),
        "topk_idx": jnp.zeros((3, 2), jnp.int32),
        "topk_weights": jnp.ones((3, 2)),
        "w_gate": jnp.ones((local, hidden, ffn), dtype),
        "w_up": jnp.ones((local, hidden, ffn), dtype),
        "w_down": jnp.ones((local, ffn, hidden), dtype),
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", jnp.ones(3), ValueError, r"x must have shape \[num_tokens, hidden\]; got \[3\]"),
        ("w_gate", jnp.ones((2, 6, 5)), ValueError, r"w_gate .* = \[4, 6, 5\]; got \[2, 6, 5\]"),
        ("w_up", jnp.ones((4, 6, 4)), ValueError, r"w_up .* = \[4, 6, 5\]; got \[4, 6, 4\]"),
        ("w_down", jnp.ones((4, 6, 5)), ValueError, r"w_down .* = \[4, 5, 6\]; got \[4, 6, 5\]"),
        ("w_down", [1.0], TypeError, "w_down must be an array"),
        (
            "w_up",
            jnp.ones((4, 6, 5), jnp.bfloat16),
            TypeError,
            "w_up must have dtype float32; got bfloat16",
        ),
        ("topk_idx", jnp.ones((3, 2)), TypeError, "topk_idx must have dtype int32"),
        ("topk_weights", jnp.ones((2, 2)), ValueError, "topk_weights must have shape"),
    ],
)
def test_errors(name, value, error, message):
    with pytest.raises(error, match=message):
        jax_ep.moe(*{**weights(), name: value}.values(), num_experts=4)


def test_errors_of_make_plan_come_through():
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        jax_ep.moe(*weights().values(), num_experts=4, capacity=0)
