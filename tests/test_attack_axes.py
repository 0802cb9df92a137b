"""Plans used under other axes than they were made under: rank and group are those of the use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import attacks
import jax
import numpy as np
import pytest
from attacks import MOST_TURNS, SHAPE, Numbers, R, forward_and_back, make_plan, same
from implementations import AXIS, ONE, SHARD_MAP, VMAP, Fabric, Row, over_devices, stacked
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep

GROUPS = 2
ONCE_PER_RANK = {"topk_idx", "scale"}


def mesh_of(devices: list[Any] | None = None, **sizes: int) -> Mesh:
    devices = jax.devices() if devices is None else devices
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def row_of(implementation: str, fabric: Fabric = SHARD_MAP) -> Row:
    return Row(implementation, fabric, exact=implementation == "native")


def per_device(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, **options: Any):
    """Opens a ``shard_map`` that takes the mapped axes away from blocks and puts them back."""
    specs = in_specs if isinstance(in_specs, tuple) else (in_specs,)

    def block(*args):
        own = [without_axes(arg, len(spec)) for spec, arg in zip(specs, args, strict=True)]
        return jax.tree.map(lambda a: a.reshape((1,) * len(out_specs) + a.shape), f(*own))

    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=out_specs, **options)


def without_axes(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(a.shape[count:]), tree)


def one_routing(rng: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Draws problems that share their routing and experts: [count, R, ...] for all that differs."""
    first = Numbers.draw(rng)
    several = [
        dataclasses.replace(Numbers.draw(rng), topk_idx=first.topk_idx, scale=first.scale)
        for _ in range(count)
    ]
    args = attacks.stack([n.args[1:] for n in several], 0)
    return (first.topk_idx, *args), attacks.stack([n.expect() for n in several], 0)


def replicated_over_data(row: Row, mesh: Mesh):
    """The plan leaves a ``shard_map`` over the ranks, and enters one over the groups too."""
    both = P("data", AXIS)
    make = per_device(functools.partial(make_plan, row), mesh, P(AXIS), P(AXIS), axis_names={AXIS})
    use = per_device(forward_and_back, mesh, (P(AXIS), both, both, both, both), both)
    return jax.jit(lambda topk_idx, *args: use(make(topk_idx), *args))


def nested_over_data(row: Row, mesh: Mesh):
    """A ``shard_map`` over the groups inside the one over the ranks that made the plan."""

    def outer(topk_idx, *args):
        plan = make_plan(row, topk_idx)
        inner = per_device(
            forward_and_back, None, (P(), *(P("data"),) * 4), P("data"), axis_names={"data"}
        )
        return inner(plan, *args)

    def with_groups_first(topk_idx, *args):
        # Each rank's block leads with the groups.
        args = [a.swapaxes(0, 1) for a in args]
        run = per_device(outer, mesh, (P(AXIS),) * 5, P(AXIS), axis_names={AXIS})
        return jax.tree.map(lambda a: a.swapaxes(0, 1), run(topk_idx, *args))

    return jax.jit(with_groups_first)


@pytest.mark.parametrize("program", [replicated_over_data, nested_over_data])
def test_a_plan_serves_more_groups_than_it_was_made_in(implementation: str, program) -> None:
    """Two devices claimed one rank: some runs paired the groups' rows crosswise."""
    run = program(row_of(implementation), mesh_of(data=GROUPS, **{AXIS: R}))
    rng = np.random.default_rng(0)
    for _ in range(MOST_TURNS if implementation == "native" else 30):
        args, want = one_routing(rng, GROUPS)
        same(run(*args), want)


def test_a_plan_made_in_two_groups_is_used_in_one(implementation: str) -> None:
    row, both = row_of(implementation), P("data", AXIS)
    mesh = mesh_of(data=GROUPS, **{AXIS: R})
    make = jax.jit(per_device(functools.partial(make_plan, row), mesh, both, both))
    use = row.jit(forward_and_back, R)
    rng = np.random.default_rng(1)
    groups = [Numbers.draw(rng) for _ in range(GROUPS)]
    plans = jax.device_get(make(np.stack([n.topk_idx for n in groups])))
    for i, numbers in enumerate(groups):
        plan = jax.tree.map(lambda a, i=i: a[i], plans)
        same(use(plan, *numbers.args[1:]), numbers.expect())


@pytest.mark.parametrize("axes", [("node", "local"), ("local", "node")], ids=str)
def test_ranks_along_two_axes_of_three(implementation: str, axes: tuple[str, str]) -> None:
    """The first name is the major one, whatever the order in the mesh."""
    row = row_of(implementation, dataclasses.replace(SHARD_MAP, axis_name=axes))
    mesh = mesh_of(node=2, data=GROUPS, local=2)
    both = P("data", *axes)
    make = per_device(
        functools.partial(make_plan, row), mesh, P(*axes), P(*axes), axis_names=set(axes)
    )
    use = per_device(forward_and_back, mesh, (P(*axes), both, both, both, both), both)
    program = jax.jit(lambda topk_idx, *args: use(make(topk_idx), *args))
    rng = np.random.default_rng(2)
    for _ in range(10):
        (topk_idx, *args), want = one_routing(rng, GROUPS)
        got = program(
            topk_idx.reshape(2, 2, *topk_idx.shape[1:]),
            *(a.reshape(GROUPS, 2, 2, *a.shape[2:]) for a in args),
        )
        same({k: np.asarray(a).reshape(want[k].shape) for k, a in got.items()}, want)


def nest(f: Callable[..., Any], order: str, num_mapped: int) -> Callable[..., Any]:
    """Maps over further axes, ``b``, and that of the ranks, ``r``; the outermost comes first."""
    for i, letter in reversed(list(enumerate(order))):
        plan_axis = 0 if letter == "r" else None
        name = {"axis_name": AXIS} if letter == "r" else {"axis_name": f"batch_{i}"}
        f = jax.vmap(f, in_axes=(plan_axis, *(0,) * num_mapped), **name)
    return f


@pytest.mark.parametrize("order", ["rb", "br", "brb", "bbr", "rbb"])
def test_further_vmaps_in_any_order(implementation: str, order: str) -> None:
    """Made under the axis of ranks alone; as long as it, the other axes could be taken for it."""
    row = row_of(implementation, VMAP)
    use = jax.jit(nest(forward_and_back, order, num_mapped=4))
    make = jax.jit(row.over_ranks(functools.partial(make_plan, row), R))
    (topk_idx, *args), want = one_routing(np.random.default_rng(3), R ** (len(order) - 1))
    at = order.index("r")

    def arrange(a: np.ndarray) -> np.ndarray:
        split = a.reshape((R,) * (len(order) - 1) + a.shape[1:])
        return np.moveaxis(split, len(order) - 1, at)

    got = use(make(topk_idx), *map(arrange, args))
    same(got, {name: arrange(a) for name, a in want.items()})


FIRST, LAST = slice(0, R), slice(R, 2 * R)


def on(devices: list[Any]) -> Callable[..., Any]:
    """Runs one rank on each of these devices, in this order."""
    mesh = Mesh(np.array(devices), (AXIS,))
    return lambda f, _: per_device(f, mesh, P(AXIS), P(AXIS))


PLACES: dict[str, Callable[..., Any]] = {
    "first": over_devices,
    "last": lambda f, n: on(jax.devices()[LAST])(f, n),
    "reversed": lambda f, n: on(jax.devices()[FIRST][::-1])(f, n),
    "stacked": stacked,
}


@pytest.mark.parametrize(
    ("made", "used"),
    [("first", "last"), ("first", "reversed"), ("first", "stacked"), ("stacked", "first")],
)
def test_a_plan_moves_to_other_devices(implementation: str, made: str, used: str) -> None:
    row, numbers = row_of(implementation), Numbers.draw(np.random.default_rng(4))
    make = PLACES[made](functools.partial(make_plan, row), R)
    plan = jax.device_get(jax.jit(make)(numbers.topk_idx))

    def own(packed):
        return forward_and_back(*packed)

    got = jax.jit(PLACES[used](own, R))((plan, *numbers.args[1:]))
    same(got, numbers.expect())


def dispatch(plan: jax_ep.Plan) -> jax.Array:
    return jax_ep.dispatch(np.zeros((SHAPE.num_tokens, 1), np.float32), plan)


def combine(plan: jax_ep.Plan) -> jax.Array:
    return jax_ep.combine(np.zeros((plan.capacity, 1), np.float32), plan)


@functools.cache
def plans_of(implementation: str, num_ranks: int, fabric: Fabric = VMAP) -> jax_ep.Plan:
    """Makes a whole group's plans."""
    row = row_of(implementation, fabric)
    make = row.over_ranks(functools.partial(make_plan, row), num_ranks)
    return jax.jit(make)(np.zeros((num_ranks, *SHAPE.topk_shape[1:]), np.int32))


both_uses = pytest.mark.parametrize("use", [dispatch, combine])


def refuses(f: Callable[[jax_ep.Plan], Any], plan: jax_ep.Plan, *named: object) -> None:
    """Expects a ValueError while tracing, before anything is lowered, that names all of these."""
    with pytest.raises(ValueError, match="plan") as caught:
        jax.eval_shape(f, plan)
    for name in named:
        assert str(name) in str(caught.value)


@both_uses
@pytest.mark.parametrize(("made", "used"), [(4, 8), (4, 2), (2, 4), (1, 2)])
@pytest.mark.parametrize("fabric", [SHARD_MAP, VMAP], ids=lambda fabric: fabric.name)
def test_another_number_of_ranks(
    implementation: str, fabric: Fabric, made: int, used: int, use
) -> None:
    plan = plans_of(implementation, made)
    enough = jax.tree.map(lambda a: np.resize(np.asarray(a), (used, *a.shape[1:])), plan)
    refuses(fabric.over_ranks(use, used), enough, AXIS, made, used)


@both_uses
def test_another_axis_of_as_many_ranks(implementation: str, use) -> None:
    plan = plans_of(implementation, R)
    mesh = mesh_of(jax.devices()[:R], model=R)
    refuses(per_device(use, mesh, P("model"), P("model")), plan, AXIS, "model")
    refuses(jax.vmap(use, axis_name="model"), plan, AXIS, "model")


@both_uses
def test_no_axis(implementation: str, use) -> None:
    plan = jax.tree.map(lambda a: a[0], plans_of(implementation, R))
    refuses(use, plan, AXIS, R)
    refuses(jax.vmap(use), plans_of(implementation, R), AXIS, R)


@both_uses
def test_a_plan_without_an_axis_is_at_home_under_any(implementation: str, use) -> None:
    """One rank exchanges with itself alone: any axis is a further one."""
    plans = plans_of(implementation, 1, ONE)
    several = jax.tree.map(lambda a: np.repeat(np.asarray(a), R, axis=0), plans)
    for fabric in (SHARD_MAP, VMAP):
        jax.jit(fabric.over_ranks(use, R))(several)
