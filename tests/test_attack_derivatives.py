"""Derivatives of every kind through the exchange, against those of the dense formula."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
import strategies
from attacks import Numbers, forward_and_back, make_plan, same
from implementations import ONE, SHARD_MAP, Row
from layers import close
from strategies import Shape

import jax_ep

pytestmark = pytest.mark.composes

FEW = Shape(num_ranks=2, num_tokens=3, num_topk=2, num_experts=4, hidden=2, capacity=5)
ALONE = dataclasses.replace(FEW, num_ranks=1, num_experts=3, capacity=4)
NAMES = ("x", "weights", "scale")


def shape_of(row: Row) -> Shape:
    return ALONE if row.fabric is ONE else FEW


@dataclasses.dataclass(frozen=True)
class Smooth:
    """A layer of all ranks, and the same layer without any exchange, as functions of (x, w, s)."""

    exchanged: Callable[..., Any]
    dense: Callable[..., Any]
    primals: tuple[np.ndarray, ...]
    tangents: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, row: Row, wrap: Callable[..., Any] = lambda f: f) -> Smooth:
        shape = shape_of(row)
        topk_idx = strategies.distinct(shape)
        kept = shape.plan(topk_idx).kept
        assert not kept.all()

        def per_rank(topk_idx, *args):
            plan = make_plan(row, topk_idx, shape)
            return wrap(functools.partial(experts_between, plan))(*args)

        problems = [layers.Problem.of(seed, shape) for seed in (0, 1)]
        primals, tangents = ((p.x, p.weights, p.scale) for p in problems)
        ranks = row.over_ranks(per_rank, shape.num_ranks)
        return cls(
            exchanged=lambda *args: ranks(topk_idx, *args),
            dense=lambda x, w, s: layers.dense(x, topk_idx, w, s, kept),
            primals=primals,
            tangents=tangents,
        )

    def agree(self, derive: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compares what ``derive`` makes of both."""
        got, want = (
            jax.jit(derive(f))(self.primals, self.tangents) for f in (self.exchanged, self.dense)
        )
        close(got, want)


def experts_between(plan: jax_ep.Plan, x, weights, scale) -> jax.Array:
    rows = layers.experts(jax_ep.dispatch(x, plan), plan.group_sizes, scale)
    return jax_ep.combine(rows, plan, weights)


def scalar(f: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Makes one number of all ranks' results, each with a part of its own."""

    def loss(*primals):
        out = f(*primals)
        return jnp.sum(jnp.sin(out) * jnp.arange(1.0, out.size + 1).reshape(out.shape))

    return loss


def jvp(f):
    return lambda primals, tangents: jax.jvp(f, primals, tangents)


def jacobian_forward(f):
    return lambda primals, _: jax.jacfwd(f, (0, 1, 2))(*primals)


def gradient_of_gradient(f):
    def second(primals, tangents):
        every = tuple(range(len(primals)))

        def along(*primals):
            grads = jax.grad(scalar(f), every)(*primals)
            return sum(jnp.vdot(g, t) for g, t in zip(grads, tangents, strict=True))

        return jax.grad(along, every)(*primals)

    return second


def hessian(f):
    return lambda primals, _: jax.hessian(scalar(f), (0, 1, 2))(*primals)


def forward_over_forward(f):
    def second(primals, tangents):
        def first(*primals):
            return jax.jvp(f, primals, tangents)[1]

        return jax.jvp(first, primals, tangents)

    return second


def linearized(f):
    def run(primals, tangents):
        out, linear = jax.linearize(f, *primals)
        doubled = tuple(2 * t for t in tangents)
        return out, linear(*tangents), linear(*doubled)

    return run


def third(f):
    return lambda primals, tangents: jax.jvp(
        lambda *p: gradient_of_gradient(f)(p, tangents), primals, tangents
    )


DERIVATIVES = [
    jvp,
    jacobian_forward,
    gradient_of_gradient,
    hessian,
    forward_over_forward,
    linearized,
]


@pytest.mark.parametrize("derive", DERIVATIVES)
def test_a_layer_with_smooth_experts(row: Row, derive) -> None:
    """In tokens, router weights and experts, with choices that were dropped."""
    if row.implementation == "xla" and row.fabric is not SHARD_MAP and derive is not hessian:
        pytest.skip("what carries an exchange has no derivatives of its own")
    Smooth.of(row).agree(derive)


def test_third_derivatives(row: Row) -> None:
    if row.implementation == "xla":
        pytest.skip("what carries an exchange has no derivatives of its own")
    Smooth.of(row).agree(third)


@pytest.mark.parametrize("derive", [jvp, gradient_of_gradient])
def test_through_a_checkpoint(ranks_row: Row, derive) -> None:
    Smooth.of(ranks_row, jax.checkpoint).agree(derive)


@pytest.mark.parametrize("derive", [jvp, forward_over_forward, linearized])
def test_inside_the_ranks(ranks_row: Row, derive) -> None:
    """Each rank gives its own tangents: those of other ranks' tokens travel with the rows."""
    problem = Smooth.of(ranks_row)
    topk_idx = strategies.distinct(FEW)

    def per_rank(topk_idx, primals, tangents):
        plan = make_plan(ranks_row, topk_idx, FEW)
        return derive(functools.partial(experts_between, plan))(primals, tangents)

    got = ranks_row.jit(per_rank, FEW.num_ranks)(topk_idx, problem.primals, problem.tangents)
    close(got, jax.jit(derive(problem.dense))(problem.primals, problem.tangents))


def test_a_batch_of_tangents_inside_the_ranks(ranks_row: Row) -> None:
    """As many tangents as ranks: forward mode brings a batch axis of its own."""
    numbers = Numbers.draw(np.random.default_rng(0), FEW)

    def per_rank(topk_idx, x, weights, scale, dout):
        plan = make_plan(ranks_row, topk_idx, FEW)
        several = jnp.stack([dout, 2 * dout])
        return jax.vmap(lambda d: forward_and_back(plan, x, weights, scale, d))(several)

    got = ranks_row.jit(per_rank, FEW.num_ranks)(*numbers.args)
    want = numbers.expect(FEW)
    twice = {name: a if name == "out" else 2 * a for name, a in want.items()}
    same({k: np.asarray(a)[:, 0] for k, a in got.items()}, want)
    same({k: np.asarray(a)[:, 1] for k, a in got.items()}, twice)


def test_linear_transposes(row: Row) -> None:
    """Dispatch is linear in x, combine in the rows and in the weights: transposed, not derived."""
    shape = shape_of(row)
    numbers = Numbers.draw(np.random.default_rng(1), shape)

    def per_rank(topk_idx, x, weights, dout):
        plan = make_plan(row, topk_idx, shape)
        rows, pull_rows = jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)
        uses = [
            (lambda x: jax_ep.dispatch(x, plan), x, rows),
            (lambda r: jax_ep.combine(r, plan, weights), rows, dout),
            (lambda w: jax_ep.combine(rows, plan, w), weights, dout),
        ]
        transposed = [jax.linear_transpose(f, at)(cotangent)[0] for f, at, cotangent in uses]
        pulled = [jax.vjp(f, at)[1](cotangent)[0] for f, at, cotangent in uses]
        return transposed, pulled, pull_rows(rows)[0]

    args = numbers.topk_idx, numbers.x, numbers.weights, numbers.dout
    transposed, pulled, dx = row.jit(per_rank, shape.num_ranks)(*args)
    jax.tree.map(np.testing.assert_array_equal, transposed, pulled)
    np.testing.assert_array_equal(transposed[0], dx)
    kept = shape.plan(numbers.topk_idx).kept
    np.testing.assert_array_equal(dx, kept.sum(axis=2, keepdims=True) * numbers.x)


def swiglu(x, topk_idx, weights, w_gate, w_up, w_down, kept) -> jax.Array:
    """Computes a whole ``moe`` [R, T, H] expert by expert, matrices [E, ...]."""
    out = jnp.zeros_like(x)
    for e in range(w_gate.shape[0]):
        share = jnp.sum(jnp.where(kept & (topk_idx == e), weights, 0.0), axis=2)
        out += share[..., None] * ((jax.nn.silu(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e])
    return out


def moe_pair(row: Row) -> tuple[Callable[..., Any], Callable[..., Any], tuple[np.ndarray, ...]]:
    shape = shape_of(row)
    problem, rng = layers.Problem.of(2, shape), np.random.default_rng(2)
    topk_idx = problem.topk_idx
    kept = shape.plan(topk_idx).kept
    dims = shape.num_ranks, shape.num_local_experts, shape.hidden, 3
    into, out_of = rng.normal(size=(2, *dims)), rng.normal(size=dims).swapaxes(2, 3)

    def per_rank(topk_idx, *args):
        return jax_ep.moe(
            args[0],
            topk_idx,
            *args[1:],
            num_experts=shape.num_experts,
            axis_name=row.fabric.axis_name,
            capacity=shape.capacity,
            implementation=row.implementation,
        )[0]

    def dense(x, weights, *matrices):
        return swiglu(x, topk_idx, weights, *(m.reshape(-1, *m.shape[2:]) for m in matrices), kept)

    ranks = row.over_ranks(per_rank, shape.num_ranks)
    matrices = (a.astype(np.float32) for a in (*into, out_of))
    primals = (problem.x, problem.weights, *matrices)
    return lambda *args: ranks(topk_idx, *args), dense, primals


def hessian_in_tokens_and_weights(f):
    return lambda primals, _: jax.hessian(scalar(f), (0, 1))(*primals)


@pytest.mark.parametrize("derive", [jvp, gradient_of_gradient, hessian_in_tokens_and_weights])
def test_moe(row: Row, derive) -> None:
    """SwiGLU experts are smooth, and grouped_matmul is linear in rows and in matrices."""
    if row.implementation == "xla" and row.fabric is not SHARD_MAP:
        pytest.skip("what carries an exchange has no derivatives of its own")
    exchanged, dense, primals = moe_pair(row)
    tangents = tuple(np.cos(p).astype(np.float32) for p in primals)
    got, want = (jax.jit(derive(f))(primals, tangents) for f in (exchanged, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, want)
