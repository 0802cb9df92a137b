"""The exchange under JAX's transformations, for every implementation and fabric."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import Row
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
