"""The exchange under JAX's transformations, for every implementation and fabric."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from implementations import ONE, ROWS, VMAP, Row
from layers import SHAPE, Problem, close, dense, experts, layer, reference

import jax_ep

R = SHAPE.num_ranks


def outside(f, row: Row):
    """Compiles ``f`` of all ranks with its gradients, taken outside the ranks."""

    def run(x, topk_idx, weights, scale, dout):
        all_ranks = row.over_ranks(f, R)
        out, pull = jax.vjp(lambda x, w, s: all_ranks(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return jax.jit(run)


def inside(f, row: Row):
    """Compiles ``f`` of all ranks with its gradients, taken on every rank."""

    def run(x, topk_idx, weights, scale, dout):
        out, pull = jax.vjp(lambda x, w, s: f(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return row.jit(run, R)


def make_plan(row: Row, topk_idx: jax.Array) -> jax_ep.Plan:
    return row.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)


@pytest.mark.parametrize("differentiate", [outside, inside])
def test_grad(layer_row: Row, differentiate) -> None:
    problem = Problem.of(0)
    program = differentiate(functools.partial(layer, layer_row.make_plan), layer_row)
    close(program(*problem.args, problem.dout), problem.expect())


@pytest.mark.parametrize("differentiate", [outside, inside])
def test_checkpoint(layer_row: Row, differentiate) -> None:
    problem = Problem.of(1)
    f = jax.checkpoint(functools.partial(layer, layer_row.make_plan))
    close(differentiate(f, layer_row)(*problem.args, problem.dout), problem.expect())


def test_checkpoint_around_all_ranks(layer_row: Row) -> None:
    problem = Problem.of(2)
    f = jax.checkpoint(layer_row.over_ranks(functools.partial(layer, layer_row.make_plan), R))

    def loss(x, topk_idx, weights, scale, dout):
        return jnp.sum(f(x, topk_idx, weights, scale) * dout)

    grads = jax.jit(jax.grad(loss, (0, 2, 3)))(*problem.args, problem.dout)
    close(grads, problem.expect()[1])


def test_without_jit(layer_row: Row) -> None:
    problem = Problem.of(3)
    f = functools.partial(layer, layer_row.make_plan)
    close(layer_row.over_ranks(f, R)(*problem.args), problem.expect()[0])


def test_compiled_ahead_of_time(layer_row: Row) -> None:
    problem = Problem.of(4)
    f = functools.partial(layer, layer_row.make_plan)
    compiled = layer_row.jit(f, R).lower(*problem.args).compile()
    close(compiled(*problem.args), problem.expect()[0])


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "recomputed"])
def test_scan_over_layers(layer_row: Row, remat: bool) -> None:
    """One plan and one exchange a layer, run again and again by one piece of code."""
    problems = [Problem.of(seed) for seed in (5, 6, 7)]
    first = problems[0]
    topk_idx, weights, kept = (
        np.stack(arrays, axis=1)
        for arrays in zip(
            *((p.topk_idx, p.weights, SHAPE.plan(p.topk_idx).kept) for p in problems), strict=True
        )
    )

    def stack_of_layers(x, topk_idx, weights, scale):
        def step(x, inputs):
            return x + layer(layer_row.make_plan, x, *inputs, scale), None

        body = jax.checkpoint(step) if remat else step
        return jax.lax.scan(body, x, (topk_idx, weights))[0]

    def dense_layers(x, weights, scale):
        for i in range(len(problems)):
            x = x + dense(x, topk_idx[:, i], weights[:, i], scale, kept[:, i])
        return x

    got = outside(stack_of_layers, layer_row)(first.x, topk_idx, weights, first.scale, first.dout)
    close(got, reference(dense_layers, (first.x, weights, first.scale), first.dout))


def test_one_plan_for_every_step_of_a_scan(layer_row: Row) -> None:
    problem = Problem.of(8)
    kept = SHAPE.plan(problem.topk_idx).kept

    def steps(x, topk_idx, weights, scale):
        plan = make_plan(layer_row, topk_idx)

        def step(x, _):
            rows = experts(jax_ep.dispatch(x, plan), plan.group_sizes, scale)
            return x + jax_ep.combine(rows, plan, weights), None

        return jax.lax.scan(step, x, length=3)[0]

    def dense_steps(x, weights, scale):
        for _ in range(3):
            x = x + dense(x, problem.topk_idx, weights, scale, kept)
        return x

    got = outside(steps, layer_row)(*problem.args, problem.dout)
    primals = problem.x, problem.weights, problem.scale
    close(got, reference(dense_steps, primals, problem.dout))


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


def test_donated_buffers(layer_row: Row) -> None:
    """A rank may not write where its peers still read."""
    problem = Problem.of(24)
    f = layer_row.over_ranks(functools.partial(layer, layer_row.make_plan), R)
    program = jax.jit(f, donate_argnums=0)
    want = problem.expect()[0]
    for _ in range(20):
        close(program(jnp.array(problem.x), *problem.args[1:]), want)


def test_one_jitted_layer_called_twice(layer_row: Row) -> None:
    """Equal routing, different tokens, in calls that may run in any order: they must not mix."""
    problem = Problem.of(25)
    other = 5 * np.flip(problem.x, axis=1)
    rest = problem.args[1:]
    kept = SHAPE.plan(problem.topk_idx).kept
    once = jax.jit(functools.partial(layer, layer_row.make_plan))
    program = layer_row.jit(lambda x, y, *args: (once(x, *args), once(y, *args)), R)
    want = dense(problem.x, *rest, kept), dense(other, *rest, kept)
    for _ in range(20):
        close(program(problem.x, other, *rest), want)


def test_independent_exchanges_in_one_program(layer_row: Row) -> None:
    problem = Problem.of(26)
    rest = problem.args[1:]
    kept = SHAPE.plan(problem.topk_idx).kept
    # Where collectives of XLA's own take turns, three show all there is to show.
    count = 8 if layer_row.implementation == "native" else 3
    xs = [(i + 1) * problem.x for i in range(count)]
    f = functools.partial(layer, layer_row.make_plan)
    program = layer_row.jit(lambda xs, *args: [f(x, *args) for x in xs], R)
    want = [dense(x, *rest, kept) for x in xs]
    for _ in range(10):
        close(program(xs, *rest), want)


def test_many_programs_in_flight(layer_row: Row) -> None:
    """Calls are asynchronous: several runs of several programs wait for their turn at once."""
    problems = [Problem.of(seed) for seed in range(27, 31)]
    f = functools.partial(layer, layer_row.make_plan)
    programs = layer_row.jit(f, R), layer_row.jit(lambda *args: 2 * f(*args), R)
    runs = [(p, [program(*p.args) for program in programs]) for p in problems * 5]
    for problem, (once, twice) in runs:
        want = problem.expect()[0]
        close(once, want)
        close(twice, 2 * want)


def test_cond_that_all_ranks_agree_on(layer_row: Row) -> None:
    problem = Problem.of(31)
    f = functools.partial(layer, layer_row.make_plan)

    def sometimes(on, x, *args):
        return jax.lax.cond(on, lambda: x + f(x, *args), lambda: x)

    program = layer_row.jit(sometimes, R)
    close(program(np.full(R, True), *problem.args), problem.x + problem.expect()[0])
    close(program(np.full(R, False), *problem.args), problem.x)


def test_unused_results_vanish(layer_row: Row) -> None:
    """Calls are pure: what nobody uses is not in the program."""
    problem = Problem.of(32)

    def f(x, topk_idx, weights, scale):
        layer(layer_row.make_plan, x, topk_idx, weights, scale)
        return x

    text = layer_row.jit(f, R).lower(*problem.args).compile().as_text()
    assert "custom-call" not in text
    assert "all-gather" not in text
