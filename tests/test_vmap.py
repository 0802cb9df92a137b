"""Batches of exchanges, for every implementation and fabric."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import ONE, ROWS, VMAP, Row
from layers import (
    SHAPE,
    Problem,
    close,
    dense,
    experts,
    inside,
    layer,
    make_plan,
    outside,
    reference,
)

import jax_ep

pytestmark = pytest.mark.composes

R = SHAPE.num_ranks


def batch_of_problems(seeds: range) -> tuple[tuple[np.ndarray, ...], object]:
    """Stacks whole problems and their answers behind the axis of ranks: [R, B, ...].

    With as many problems as ranks, a plain axis taken for that of the ranks would go unnoticed but
    for the values.
    """
    problems = [Problem.of(seed) for seed in seeds]
    stack = lambda *arrays: np.stack(arrays, axis=1)  # noqa: E731
    arrays = [(*p.args, p.dout) for p in problems]
    return jax.tree.map(stack, *arrays), jax.tree.map(stack, *(p.expect() for p in problems))


@pytest.mark.parametrize("differentiate", [outside, inside])
def test_vmap_of_a_plain_axis_inside(layer_row: Row, differentiate) -> None:
    """Every rank handles a batch of independent exchanges, plans and all."""
    arrays, want = batch_of_problems(range(10, 10 + R))
    f = jax.vmap(functools.partial(layer, layer_row.make_plan))
    close(differentiate(f, layer_row)(*arrays), want)


def test_vmap_of_a_plain_axis_outside(layer_row: Row) -> None:
    arrays, want = batch_of_problems(range(13, 13 + R))
    f = outside(functools.partial(layer, layer_row.make_plan), layer_row)
    close(jax.jit(jax.vmap(f, in_axes=1, out_axes=1))(*arrays), want)


def test_vmap_on_both_sides_of_the_ranks(layer_row: Row) -> None:
    arrays, (want, _) = batch_of_problems(range(20, 24))
    split = [a.reshape(R, 2, 2, *a.shape[2:]) for a in arrays[:4]]
    f = layer_row.over_ranks(jax.vmap(functools.partial(layer, layer_row.make_plan)), R)
    got = np.asarray(jax.jit(jax.vmap(f, in_axes=1, out_axes=1))(*split))
    close(got.reshape(want.shape), want)


def test_vmap_of_the_tokens_over_one_plan(layer_row: Row) -> None:
    """The same routing for several tensors: only some operands carry the plain axis."""
    problem = Problem.of(16)
    kept = SHAPE.plan(problem.topk_idx).kept
    xs = np.stack([problem.x, -2 * problem.x, problem.x**2, 1 - problem.x], axis=1)

    def f(xs, topk_idx, weights, scale):
        plan = make_plan(layer_row, topk_idx)
        there = jax.vmap(lambda x: experts(jax_ep.dispatch(x, plan), plan.group_sizes, scale))
        return jax.vmap(lambda rows: jax_ep.combine(rows, plan, weights))(there(xs))

    def dense_batch(xs, weights, scale):
        one = lambda x: dense(x, problem.topk_idx, weights, scale, kept)  # noqa: E731
        return jax.vmap(one, in_axes=1, out_axes=1)(xs)

    dout = np.stack([problem.dout + i for i in range(4)], axis=1).astype(np.float32)
    got = outside(f, layer_row)(xs, *problem.args[1:], dout)
    close(got, reference(dense_batch, (xs, problem.weights, problem.scale), dout))


def test_vmap_of_the_weights_over_one_plan(layer_row: Row) -> None:
    problem = Problem.of(17)
    kept = SHAPE.plan(problem.topk_idx).kept
    weights = np.stack([problem.weights * i for i in range(4)], axis=1).astype(np.float32)

    def f(x, topk_idx, weights, scale):
        plan = make_plan(layer_row, topk_idx)
        rows = experts(jax_ep.dispatch(x, plan), plan.group_sizes, scale)
        return jax.vmap(lambda w: jax_ep.combine(rows, plan, w))(weights)

    def dense_batch(x, weights, scale):
        one = lambda w: dense(x, problem.topk_idx, w, scale, kept)  # noqa: E731
        return jax.vmap(one, in_axes=1, out_axes=1)(weights)

    dout = np.stack([problem.dout + i for i in range(4)], axis=1).astype(np.float32)
    got = outside(f, layer_row)(problem.x, problem.topk_idx, weights, problem.scale, dout)
    close(got, reference(dense_batch, (problem.x, weights, problem.scale), dout))


@pytest.mark.parametrize("row", [row for row in ROWS if row.fabric is ONE], ids=str)
def test_vmap_without_ranks(row: Row) -> None:
    """With no axis of ranks, a batch is a batch of programs of one rank."""
    row.require()
    problem = Problem.of(18)

    def f(x, topk_idx, weights):
        plan = row.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=15)
        return jax_ep.combine(jnp.tanh(jax_ep.dispatch(x, plan)), plan, weights)

    plans = [oracle.plan(idx[None], SHAPE.num_experts, capacity=15) for idx in problem.topk_idx]
    kept = np.concatenate([plan.kept for plan in plans])
    assert not kept.all()
    want = np.where(kept, problem.weights, 0).sum(axis=2, keepdims=True) * np.tanh(problem.x)
    close(jax.jit(jax.vmap(f))(problem.x, problem.topk_idx, problem.weights), want)


@pytest.mark.parametrize("row", [row for row in ROWS if row.fabric is VMAP], ids=str)
def test_vmap_with_the_same_tokens_on_every_rank(row: Row) -> None:
    """Operands without the axis of ranks stand for R equal ones."""
    row.require()
    problem = Problem.of(19)
    rest = problem.args[1:]
    kept = SHAPE.plan(problem.topk_idx).kept
    f = functools.partial(layer, row.make_plan)
    all_ranks = jax.vmap(f, in_axes=(None, 0, 0, 0), axis_name="expert")

    def dense_ranks(x, *rest):
        return dense(jnp.broadcast_to(x, problem.x.shape), *rest, kept)

    got = reference(all_ranks, (problem.x[0],), problem.dout, *rest)
    close(got, reference(dense_ranks, (problem.x[0],), problem.dout, *rest))


@pytest.mark.parametrize("row", [row for row in ROWS if row.fabric is VMAP], ids=str)
def test_vmap_with_the_same_routing_on_every_rank(row: Row) -> None:
    row.require()
    problem = Problem.of(33)
    topk_idx = np.broadcast_to(problem.topk_idx[0], problem.topk_idx.shape)
    f = functools.partial(layer, row.make_plan)
    all_ranks = jax.jit(jax.vmap(f, in_axes=(0, None, 0, 0), axis_name="expert"))
    kept = SHAPE.plan(topk_idx).kept
    got = all_ranks(problem.x, topk_idx[0], problem.weights, problem.scale)
    close(got, dense(problem.x, topk_idx, problem.weights, problem.scale, kept))
