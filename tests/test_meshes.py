"""The expert axis among other axes: groups of ranks keep to themselves, whatever else is sharded.

All of it runs with ``check_vma`` on, so that a result that claims to be equal along an axis without
being so does not get past JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import devices, require
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import SHAPE, Problem, close, dense, layer, reference, whole

import jax_ep

R, T, H = SHAPE.num_ranks, SHAPE.num_tokens, SHAPE.hidden
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both_axis_types = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=lambda t: t.name)


def make_mesh(axis_type: AxisType, **sizes: int) -> Mesh:
    num_devices = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
        devices=devices()[:num_devices],
    )


def layer_on(implementation: str, axis_name: Any = "expert") -> Callable[..., jax.Array]:
    make_plan = functools.partial(
        jax_ep.make_plan, axis_name=axis_name, implementation=implementation
    )
    return functools.partial(layer, make_plan)


def put(a: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Lays an array out, in each process its part: several would compare theirs, NaN with NaN."""
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda at: a[at])


def run(mesh: Mesh, f: Callable, specs: tuple[P, ...], out_spec: P, args: tuple, dout: np.ndarray):
    """Returns ``f(*args)`` over ``mesh`` and its gradients in all but ``topk_idx``.

    Everything is global and laid out as its spec says; ``dout`` is laid out like the result.
    """
    args = [put(a, mesh, spec) for a, spec in zip(args, specs, strict=True)]
    dout = put(dout, mesh, out_spec)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=True)

    @jax.jit
    def program(x, topk_idx, weights, scale, dout):
        out, pull = jax.vjp(lambda x, w, s: sharded(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return jax.tree.map(whole, program(*args, dout))


def flat(a: np.ndarray) -> np.ndarray:
    """Joins the axis of ranks with the one behind it, as a global array has them."""
    return a.reshape(-1, *a.shape[2:])


def flat_args(problem: Problem) -> tuple[np.ndarray, ...]:
    return tuple(flat(a) for a in problem.args)


def flat_answers(problem: Problem):
    return jax.tree.map(lambda a: flat(np.asarray(a)), problem.expect())


@both_axis_types
@pytest.mark.parametrize("order", ["data_major", "expert_major"])
def test_data_and_expert(implementation: str, axis_type: AxisType, order: str) -> None:
    """Two groups of four: each has its own routing, and the experts' gradients add up over both."""
    sizes = {"data": 2, "expert": R}
    axes = list(sizes) if order == "data_major" else list(sizes)[::-1]
    mesh = make_mesh(axis_type, **{axis: sizes[axis] for axis in axes})
    groups = [Problem.of(0), Problem.of(3)]
    scale = groups[0].scale
    kept = [SHAPE.plan(p.topk_idx).kept for p in groups]
    x, idx, weights, dout = (
        np.concatenate([flat(getattr(p, name)) for p in groups])
        for name in ("x", "topk_idx", "weights", "dout")
    )

    def both_groups(x, weights, scale):
        split = lambda a: a.reshape(2, R, T, -1)  # noqa: E731
        args = zip(split(x), [p.topk_idx for p in groups], split(weights), kept, strict=True)
        out = [dense(x, idx, w, scale.reshape(R, -1), k) for x, idx, w, k in args]
        return jnp.concatenate(out).reshape(2 * R * T, H)

    tokens = P(("data", "expert"))
    got = run(
        mesh,
        layer_on(implementation),
        (tokens, tokens, tokens, P("expert")),
        tokens,
        (x, idx, weights, flat(scale)),
        dout,
    )
    close(got, reference(both_groups, (x, weights, flat(scale)), dout))


def test_plan_fields_by_group(implementation: str) -> None:
    """``expert_load`` is typed as equal along the expert axis, and differs between the groups."""
    mesh = make_mesh(AUTO, data=2, expert=R)
    groups = [Problem.of(1), Problem.of(2)]
    topk_idx = np.concatenate([flat(p.topk_idx) for p in groups])
    topk_idx[: R * T] = 0

    def per_rank(topk_idx):
        plan = jax_ep.make_plan(
            topk_idx,
            num_experts=SHAPE.num_experts,
            capacity=SHAPE.capacity,
            axis_name="expert",
            implementation=implementation,
        )
        return plan.expert_load[None], plan.group_sizes, plan.num_dropped[None]

    tokens = P(("data", "expert"))
    program = jax.jit(
        jax.shard_map(per_rank, mesh=mesh, in_specs=tokens, out_specs=(P("data"), tokens, tokens))
    )
    expert_load, group_sizes, num_dropped = map(whole, program(topk_idx))
    plans = [SHAPE.plan(idx) for idx in topk_idx.reshape(2, R, T, -1)]
    assert np.asarray(expert_load).tolist() == [p.expert_load.tolist() for p in plans]
    close(group_sizes, np.concatenate([p.group_sizes.reshape(-1) for p in plans]))
    close(num_dropped, np.concatenate([p.num_dropped for p in plans]))


def test_a_group_never_sees_another(implementation: str) -> None:
    """One group's NaN stays there, though both run the same program at the same time."""
    mesh = make_mesh(AUTO, data=2, expert=R)
    problem = Problem.of(4)
    x = np.concatenate([np.full_like(flat(problem.x), np.nan), flat(problem.x)])
    twice = [np.concatenate([flat(a)] * 2) for a in (problem.topk_idx, problem.weights)]
    dout = np.concatenate([flat(problem.dout)] * 2)
    tokens = P(("data", "expert"))
    specs = (tokens, tokens, tokens, P("expert"))
    args = (x, *twice, flat(problem.scale))
    out, (dx, dweights, _) = run(mesh, layer_on(implementation), specs, tokens, args, dout)
    want, (want_dx, want_dweights, _) = flat_answers(problem)
    half = R * T
    close([a[half:] for a in (out, dx, dweights)], [want, want_dx, want_dweights])
    kept = flat(SHAPE.plan(problem.topk_idx).kept).any(axis=1)
    assert np.isnan(out[:half][kept]).all()


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


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids="-".join)
@both_axis_types
def test_tuple_of_axes(implementation: str, names: tuple, axis_type: AxisType) -> None:
    """The first name is the major one, whatever the order of the mesh."""
    mesh = make_mesh(axis_type, a=2, other=2, b=2)
    problem = Problem.of(9)
    spec = P(names)
    got = run(
        mesh,
        layer_on(implementation, names),
        (spec,) * 4,
        spec,
        flat_args(problem),
        flat(problem.dout),
    )
    close(got, flat_answers(problem))


def test_rank_is_the_place_on_the_axis_and_no_device_id(implementation: str) -> None:
    """On the last four devices, in no order."""
    some = np.array(devices())[[6, 4, 7, 5]]
    problem = Problem.of(10)
    spec = P("expert")
    got = run(
        Mesh(some, ("expert",)),
        layer_on(implementation),
        (spec,) * 4,
        spec,
        flat_args(problem),
        flat(problem.dout),
    )
    close(got, flat_answers(problem))


def test_an_axis_of_one_rank(implementation: str) -> None:
    """One rank a group: nothing leaves its device."""
    mesh = make_mesh(AUTO, data=4, expert=1)
    problem = Problem.of(11)

    def per_rank(x, topk_idx, weights):
        plan = jax_ep.make_plan(
            topk_idx,
            num_experts=SHAPE.num_experts,
            axis_name="expert",
            implementation=implementation,
        )
        return jax_ep.combine(jnp.tanh(jax_ep.dispatch(x, plan)), plan, weights)

    spec = P(("data", "expert"))
    program = jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec))
    out = program(*flat_args(problem)[:3])
    kept = problem.topk_idx >= 0
    total = np.where(kept, problem.weights, 0).sum(axis=2, keepdims=True)
    close(out, flat(total * np.tanh(problem.x)))


def test_two_meshes_take_turns(implementation: str) -> None:
    problem = Problem.of(12)
    want = flat_answers(problem)[0]
    spec = P("expert")
    programs = [
        jax.jit(
            jax.shard_map(
                layer_on(implementation),
                mesh=Mesh(np.array(devices()[start : start + R]), ("expert",)),
                in_specs=spec,
                out_specs=spec,
            )
        )
        for start in (0, R)
    ]
    results = [program(*flat_args(problem)) for _ in range(5) for program in programs]
    for out in results:
        close(out, want)


def test_other_axes_left_to_the_compiler(implementation: str) -> None:
    """Only the expert axis is manual; the compiler may do as it likes along ``data``."""
    mesh = make_mesh(AUTO, data=2, expert=R)
    problem = Problem.of(13)
    spec = P("expert")
    program = jax.jit(
        jax.shard_map(
            layer_on(implementation),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names={"expert"},
        )
    )
    x = put(flat(problem.x), mesh, P("expert"))
    for _ in range(5):
        close(program(x, *flat_args(problem)[1:]), flat_answers(problem)[0])


def test_one_program_under_meshes_of_other_devices(implementation: str) -> None:
    """JAX shares a trace between meshes of one shape; what knows devices must not be shared."""
    topk_idx = np.random.default_rng(0).integers(0, 16, (32, 2)).astype(np.int32)
    x = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)

    def per_rank(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx, num_experts=16, axis_name="expert", implementation=implementation
        )
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan)

    @jax.jit
    def program(*args: jax.Array) -> jax.Array:
        return jax.shard_map(per_rank, in_specs=P("expert"), out_specs=P("expert"))(*args)

    for order in (range(8), range(7, -1, -1), (3, 1, 2, 0, 7, 6, 5, 4)):
        devices = [jax.devices()[i] for i in order]
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
        with jax.set_mesh(mesh):
            np.testing.assert_array_equal(program(topk_idx, x), 2 * x)


def test_mesh_from_the_context(implementation: str) -> None:
    require(implementation)
    mesh = make_mesh(EXPLICIT, data=2, expert=R)
    problem = Problem.of(14)
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, P("expert")) for a in flat_args(problem)]
        f = jax.shard_map(layer_on(implementation), in_specs=P("expert"), out_specs=P("expert"))
        close(jax.jit(f)(*args), flat_answers(problem)[0])
