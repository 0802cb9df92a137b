"""Operands that are equal along an axis of the mesh, or split along one without ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layers import SHAPE, Problem, close, dense, reference
from meshes import AUTO, both_axis_types, flat, flat_answers, flat_args, layer_on, make_mesh, run

pytestmark = pytest.mark.composes

R, H = SHAPE.num_ranks, SHAPE.hidden


@both_axis_types
def test_tokens_replicated_over_another_axis(implementation: str, axis_type: AxisType) -> None:
    """Results are equal along ``tensor``, and typed so: ``out_specs`` need not mention it."""
    mesh = make_mesh(axis_type, expert=R, tensor=2)
    problem = Problem.of(5)
    spec = P("expert")
    got = run(
        mesh, layer_on(implementation), (spec,) * 4, spec, flat_args(problem), flat(problem.dout)
    )
    close(got, flat_answers(problem))


def test_hidden_sharded_over_another_axis(implementation: str) -> None:
    """Each part of the hidden axis takes the same way; the weights' gradient adds up over parts."""
    mesh = make_mesh(AUTO, tensor=2, expert=R)
    problem = Problem.of(6)
    x, dout = (np.concatenate([a, a[..., :1]], axis=-1) for a in (problem.x, problem.dout))
    kept = SHAPE.plan(problem.topk_idx).kept
    spec, split = P("expert"), P("expert", "tensor")
    args = (flat(x), *flat_args(problem)[1:])
    got = run(mesh, layer_on(implementation), (split, spec, spec, spec), split, args, flat(dout))
    want = reference(
        lambda x, w, s: dense(x, problem.topk_idx, w, s, kept),
        (x, problem.weights, problem.scale),
        dout,
    )
    close(got, jax.tree.map(lambda a: flat(np.asarray(a)), want))


def test_tokens_replicated_over_the_expert_axis(implementation: str) -> None:
    """Every rank sends the same tokens its own way; their gradient adds up over the ranks."""
    mesh = make_mesh(AUTO, expert=R)
    problem = Problem.of(7)
    kept = SHAPE.plan(problem.topk_idx).kept
    x = problem.x[0]
    spec = P("expert")

    def all_ranks(x, weights, scale):
        return dense(jnp.stack([x] * R), problem.topk_idx, weights, scale, kept).reshape(-1, H)

    args = (x, *flat_args(problem)[1:])
    specs = (P(), spec, spec, spec)
    got = run(mesh, layer_on(implementation), specs, spec, args, flat(problem.dout))
    out, (dx, dweights, dscale) = reference(
        all_ranks, (x, problem.weights, problem.scale), flat(problem.dout)
    )
    close(got, (out, (dx, flat(dweights), flat(dscale))))


def test_routing_replicated_over_the_expert_axis(implementation: str) -> None:
    mesh = make_mesh(AUTO, expert=R)
    problem = Problem.of(8)
    topk_idx = np.stack([problem.topk_idx[0]] * R)
    weights = np.stack([problem.weights[0]] * R)
    kept = SHAPE.plan(topk_idx).kept
    spec = P("expert")
    args = (flat(problem.x), topk_idx[0], weights[0], flat(problem.scale))

    def all_ranks(x, weights, scale):
        return dense(x, topk_idx, jnp.stack([weights] * R), scale, kept).reshape(-1, H)

    specs = (spec, P(), P(), spec)
    got = run(mesh, layer_on(implementation), specs, spec, args, flat(problem.dout))
    out, (dx, dweights, dscale) = reference(
        all_ranks, (problem.x, weights[0], problem.scale), flat(problem.dout)
    )
    close(got, (out, (flat(dx), dweights, flat(dscale))))
