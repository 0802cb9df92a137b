"""Layers whose tokens go in chunks: the same result, smaller buffers, and the stream on GPUs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_layers import HIDDEN, check_against_dense, make_layer, on
from implementations import Row, over_devices, require
from jax.sharding import AxisType
from layers import reference
from strategies import Shape, distinct, duplicates
from test_moe import dense, problem, run

import jax_ep

pytestmark = pytest.mark.composes

LOSSLESS = Shape(capacity=72)
LOOPS = pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])


@LOOPS
@pytest.mark.parametrize("options", [{}, {"balance": jax_ep.Balance(2)}], ids=["", "balanced"])
def test_moe_in_chunks_is_the_dense_formula(layer_row: Row, unroll: bool, options):
    floats, topk_idx, dout = problem(LOSSLESS, duplicates)
    options = {"chunks": 3, "unroll_chunks": unroll, **options}
    out, grads, kept = run(layer_row, LOSSLESS, floats, topk_idx, dout, **options)
    assert kept.shape == (4, 3, 2, 3)
    want_out, want_grads = reference(dense, floats, dout, topk_idx, topk_idx >= 0)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@LOOPS
def test_chunks_change_no_bit(layer_row: Row, unroll: bool):
    """Neither of outputs nor of tokens' gradients; those of weights are sums over all tokens."""
    floats, topk_idx, dout = problem(LOSSLESS, distinct)
    whole, grads, _ = run(layer_row, LOSSLESS, floats, topk_idx, dout)
    out, cut_grads, _ = run(
        layer_row, LOSSLESS, floats, topk_idx, dout, chunks=2, unroll_chunks=unroll
    )
    np.testing.assert_array_equal(out, whole)
    np.testing.assert_array_equal(cut_grads[0], grads[0])
    np.testing.assert_array_equal(cut_grads[1], grads[1])


@pytest.mark.long
@pytest.mark.parametrize("axes", [(), {"data": 2, "expert": 4}], ids=["no_mesh", "mesh"])
def test_the_flax_layer_in_chunks_is_the_dense_formula(axes):
    """Of 15 tokens no device has a multiple of 3: padding makes it one."""
    with on(AxisType.Auto, axes):
        check_against_dense(make_layer(chunks=3, num_spares=2))


def test_metrics_are_those_of_all_chunks():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, HIDDEN)), jnp.float32)
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        _, whole = make_layer().apply_with_aux(x)
        _, cut = make_layer(chunks=4).apply_with_aux(x)
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name].dtype == value.dtype
        np.testing.assert_allclose(cut[name], value, rtol=1e-6, err_msg=name)


def program(chunks: int, unroll: bool):
    """Lowers a layer's gradient of 64 tokens on each of 4 ranks."""

    def loss(x, topk_idx, weights, *experts):
        def layer(x, topk_idx, weights, *experts):
            return jax_ep.moe(
                x,
                topk_idx,
                weights,
                *experts,
                num_experts=8,
                axis_name="expert",
                chunks=chunks,
                unroll_chunks=unroll,
            )[0]

        return jnp.sum(over_devices(layer, 4)(x, topk_idx, weights, *experts))

    shapes = ((4, 64, 32), (4, 64, 4), (4, 64, 4), (4, 2, 32, 16), (4, 2, 32, 16), (4, 2, 16, 32))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    args[1] = jax.ShapeDtypeStruct(shapes[1], jnp.int32)
    return jax.jit(jax.value_and_grad(loss, (0, 2, 3))).lower(*args)


def test_a_loop_takes_less_memory():
    require("native")
    analyses = [program(chunks, False).compile().memory_analysis() for chunks in (1, 8)]
    whole, loop = (analysis.temp_size_in_bytes for analysis in analyses if analysis is not None)
    assert loop < 0.4 * whole


def test_unrolled_exchanges_go_on_the_collective_stream():
    """Forward and back, and the plan's counts do not: experts wait for them at once."""
    require("native")
    marked: dict[str, bool] = {}
    for line in re.findall(r".*custom_call @jax_ep.*", program(2, True).as_text()):
        [op] = re.findall(r"@jax_ep_(\w+)_devices", line)
        marked[op] = '_xla_stream_annotation = "collective"' in line
    ops = ("gather_rows", "gather_scaled", "reduce_rows", "reduce_scaled", "row_dots")
    assert marked == {"plan": False, **dict.fromkeys(ops, True)}
    for chunks, unroll in ((2, False), (1, True)):
        assert "_xla_stream_annotation" not in program(chunks, unroll).as_text()


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        (0, ValueError, "chunks must be at least 1; got 0"),
        (2.0, TypeError, "chunks must be an int; got 2.0"),
        (2, ValueError, "chunks must divide the 3 tokens of x; got 2"),
    ],
)
def test_errors(chunks, error, message):
    x, w = jnp.ones((3, 4)), jnp.ones((8, 4, 4))
    idx, weights = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2))
    with pytest.raises(error, match=message):
        jax_ep.moe(x, idx, weights, w, w, w, num_experts=8, chunks=chunks)


def test_errors_of_the_layer():
    with pytest.raises(ValueError, match="chunks must be at least 1; got 0"):
        make_layer(chunks=0)
