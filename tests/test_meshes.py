"""The expert axis among other axes: each group of ranks keeps to itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import devices, require
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from layers import SHAPE, Problem, close, dense, reference, whole
from meshes import (
    AUTO,
    EXPLICIT,
    both_axis_types,
    flat,
    flat_answers,
    flat_args,
    layer_on,
    make_mesh,
    put,
    run,
)

import jax_ep

pytestmark = pytest.mark.composes

R, T, H = SHAPE.num_ranks, SHAPE.num_tokens, SHAPE.hidden


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
