"""Gradients of dispatch and combine, for every implementation and fabric."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import strategies
from exchanges import Answers, Inputs, answers, every_case, make_plan, run, same_bits, same_sums
from implementations import Row
from strategies import BASE, TIGHT, Case

import jax_ep


@every_case
def test_dispatch_adds_up_the_cotangents_of_a_tokens_rows(row: Row, case: Case) -> None:
    result = answers(row, case)
    result.same_sum("dx", result.inputs.drows)


@every_case
def test_combine_sends_weighted_cotangents_to_rows(row: Row, case: Case) -> None:
    """Padding rows get zeros, and so do rows past the groups unless the tail is uninitialized."""
    answers(row, case).same_rows("drows")


@every_case
def test_combine_without_weights_sends_cotangents_as_they_are(row: Row, case: Case) -> None:
    answers(row, case).same_rows("plain_drows")


@every_case
def test_weights_get_dot_products(row: Row, case: Case) -> None:
    answers(row, case).close_dots()


@every_case
def test_dropped_choices_get_no_gradient(row: Row, case: Case) -> None:
    result = answers(row, case)
    assert (result.got["dweights"][~result.plan.kept] == 0).all()


def test_dropped_choices_take_no_part_whatever_they_hold(ranks_row: Row) -> None:
    """A padding token's weights may be 0 / 0, and so may the cotangent of its result."""
    topk_idx = strategies.distinct(TIGHT)
    kept = TIGHT.plan(topk_idx).kept
    inputs = Inputs.of(TIGHT, topk_idx, np.dtype(np.float32))
    weights = np.where(kept, inputs.weights, np.nan).astype(np.float32)
    want = run(ranks_row, TIGHT, inputs)
    got = run(ranks_row, TIGHT, dataclasses.replace(inputs, weights=weights))
    for name in ("out", "drows", "dweights"):
        same_bits(got[name], want[name], name)
    dout = np.full_like(inputs.dout, np.nan)
    got = run(ranks_row, TIGHT, dataclasses.replace(inputs, dout=dout))
    assert (got["dweights"][~kept] == 0).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_get_float32_whatever_the_rows_are(layer_row: Row, dtype: type) -> None:
    Answers.of(layer_row, TIGHT, strategies.distinct(TIGHT), dtype).close_dots()


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_one_byte_cotangents_are_summed_in_float32(layer_row: Row, dtype: type) -> None:
    topk_idx = strategies.duplicates(BASE)
    plan = BASE.plan(topk_idx)
    x = strategies.payload(BASE, np.dtype(dtype))
    shape = (*plan.named.shape, BASE.hidden)
    drows = strategies.poisoned(shape, plan.named, np.dtype(dtype), seed=6)

    def per_rank(topk_idx, x, drows):
        plan = make_plan(layer_row, BASE, topk_idx)
        return jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)[1](drows)[0]

    dx = np.asarray(layer_row.jit(per_rank, BASE.num_ranks)(topk_idx, x, drows))
    same_sums(layer_row, dx, plan, drows, None, "dx")


def test_integers_ride_along_under_grad(ranks_row: Row) -> None:
    """Token numbers dispatched beside the tokens have no gradient and must not stop others'."""
    topk_idx = strategies.distinct(BASE)
    plan = BASE.plan(topk_idx)
    x = strategies.payload(BASE, np.dtype(np.float32))
    numbers = np.arange(24, dtype=np.int32).reshape(4, 6, 1)

    def per_rank(topk_idx, x, numbers):
        plan = make_plan(ranks_row, BASE, topk_idx)

        def loss(x):
            rows, row_numbers = jax_ep.dispatch(x, plan), jax_ep.dispatch(numbers, plan)
            return jnp.sum(rows * row_numbers.astype(jnp.float32))

        return jax.grad(loss)(x)

    dx = np.asarray(ranks_row.jit(per_rank, BASE.num_ranks)(topk_idx, x, numbers))
    want = numbers * plan.kept.sum(axis=2, keepdims=True) * np.ones_like(x)
    same_bits(dx, want.astype(np.float32), "dx")


def test_only_the_weights_are_differentiated(ranks_row: Row) -> None:
    topk_idx = strategies.distinct(TIGHT)
    result = Answers.of(ranks_row, TIGHT, topk_idx)
    inputs = result.inputs

    def per_rank(topk_idx, rows, weights, dout):
        plan = make_plan(ranks_row, TIGHT, topk_idx)
        return jax.grad(lambda w: jnp.sum(jax_ep.combine(rows, plan, w) * dout))(weights)

    program = ranks_row.jit(per_rank, TIGHT.num_ranks)
    dweights = program(topk_idx, inputs.rows, inputs.weights, inputs.dout)
    np.testing.assert_allclose(dweights, result.want["dweights"], rtol=1e-5, atol=1e-5)


def test_whole_layer_against_the_dense_formula(ranks_row: Row) -> None:
    """Through the exchange there and back: out = sum over kept choices of weight * x ** 3."""
    topk_idx = strategies.distinct(TIGHT)
    kept = TIGHT.plan(topk_idx).kept
    rng = np.random.default_rng(11)
    x = rng.normal(size=(4, 6, 7)).astype(np.float32)
    weights = rng.normal(size=topk_idx.shape).astype(np.float32)
    dout = rng.normal(size=x.shape).astype(np.float32)

    def per_rank(topk_idx, x, weights, dout):
        plan = make_plan(ranks_row, TIGHT, topk_idx)
        layer = lambda x, w: jax_ep.combine(jax_ep.dispatch(x, plan) ** 3, plan, w)  # noqa: E731
        out, pull = jax.vjp(layer, x, weights)
        return out, *pull(dout)

    out, dx, dweights = ranks_row.jit(per_rank, 4)(topk_idx, x, weights, dout)
    total = np.where(kept, weights, 0).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(out, total * x**3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, total * 3 * x**2 * dout, rtol=1e-5, atol=1e-5)
    dots = (x**3 * dout).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(dweights, np.where(kept, dots, 0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_rows_are_kept_for_the_weights_alone(implementation: str, trained: bool) -> None:
    """Only the weights' gradient needs the rows: else what the experts wrote may be freed."""
    plan = jax.eval_shape(
        lambda idx: jax_ep.make_plan(
            idx, num_experts=8, capacity=31, implementation=implementation
        ),
        np.zeros((6, 3), np.int32),
    )
    weights = jax.ShapeDtypeStruct((6, 3), np.float32)
    rows = jax.ShapeDtypeStruct((31, 7), np.float32)

    def pull(rows, weights, plan):
        if trained:
            return jax.vjp(lambda r, w: jax_ep.combine(r, plan, w), rows, weights)[1]
        return jax.vjp(lambda r: jax_ep.combine(r, plan, weights), rows)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull, rows, weights, plan))
    assert (rows.shape in [leaf.shape for leaf in residuals]) == trained
