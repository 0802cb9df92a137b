"""Plans made in one batch and used in another: what a loop over the batch would give."""

from __future__ import annotations

import functools

import attacks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacks import (
    MOST_TURNS,
    PLACES,
    Program,
    R,
    forward_and_back,
    inside,
    made_inside_used_outside,
    make_plan,
    outside,
    same,
)
from implementations import ONE, ROWS, SHARD_MAP, Row
from jax.sharding import AxisType, PartitionSpec
from strategies import Shape

ALONE = Shape(num_ranks=1, num_tokens=4, num_topk=2, num_experts=2, hidden=3, capacity=6)


def plan_of(row: Row, topk_idx: jax.Array):
    return make_plan(row, topk_idx, ALONE if row.fabric is ONE else attacks.SHAPE)


# Batching knows nothing of what carries an exchange; XLA's collectives show it on devices.
BATCH_ROWS = [r for r in ROWS if r.implementation == "native" or r.fabric is SHARD_MAP]


@pytest.fixture(params=BATCH_ROWS, ids=str)
def batch_row(request: pytest.FixtureRequest) -> Row:
    request.param.require()
    return request.param


def problem(row: Row, seed: int, count: int) -> tuple[tuple[np.ndarray, ...], dict]:
    """Draws problems and their answers, [R, count, ...]."""
    rng = np.random.default_rng(seed)
    if row.fabric is not ONE:
        return attacks.draw_many(rng, count)
    numbers = [attacks.Numbers.draw(rng, ALONE) for _ in range(count)]
    return (
        attacks.stack([n.args for n in numbers], 1),
        attacks.stack([n.expect(ALONE) for n in numbers], 1),
    )


@functools.cache
def program(row: Row, place: Program, wrap: Program) -> Program:
    num_ranks = 1 if row.fabric is ONE else R
    return jax.jit(place(row, functools.partial(plan_of, row), wrap(forward_and_back), num_ranks))


def plainly(f: Program) -> Program:
    return f


@pytest.mark.parametrize("place", PLACES)
def test_made_in_one_vmap_and_used_in_another(batch_row: Row, place: Program) -> None:
    """As many as ranks, the batch was taken for their axis: plausible numbers of other tokens."""
    args, want = problem(batch_row, 0, R)
    same(program(batch_row, place, plainly)(*args), want)


@pytest.mark.composes
@pytest.mark.parametrize("place", [inside, outside])
def test_a_batch_larger_than_the_ranks(batch_row: Row, place: Program) -> None:
    args, want = problem(batch_row, 0, R + 1)
    same(program(batch_row, place, plainly)(*args), want)


def test_made_in_one_vmap_on_each_fabric(row: Row) -> None:
    args, want = problem(row, 8, 2)
    same(program(row, inside, plainly)(*args), want)


@pytest.mark.long
@pytest.mark.parametrize("place", [inside, outside])
def test_many_routings(row: Row, place: Program) -> None:
    if row.implementation != "native":
        pytest.skip("chance decides nothing in XLA's collectives")
    for seed in range(1, MOST_TURNS):
        args, want = problem(row, seed, R)
        same(program(row, place, plainly)(*args), want)


def in_a_jit(f: Program) -> Program:
    return jax.jit(f)


def in_a_cond(f: Program) -> Program:
    """Chooses by a predicate of its own for each entry, as batched: both branches exchange."""

    def chosen(plan, x, *rest):
        sign = jnp.where(x[0, 0] > 0, 1.0, -1.0).astype(x.dtype)
        return jax.lax.cond(
            sign > 0, lambda: f(plan, x, *rest), lambda: negated(f(plan, -x, *rest))
        )

    def negated(results):
        # Of the layer at -x, what changes sign with x: neither dx nor what is -x's own gradient.
        return {k: v if k == "dx" else -v for k, v in results.items()}

    return chosen


def in_a_checkpoint(f: Program) -> Program:
    def recomputed(plan, x, weights, scale, dout):
        again = jax.checkpoint(attacks.layer)
        out, pull = jax.vjp(lambda x, w, s: again(plan, x, w, s), x, weights, scale)
        return {"out": out, **dict(zip(("dx", "dweights", "dscale"), pull(dout), strict=True))}

    return recomputed


WRAPS = [in_a_jit, in_a_cond, in_a_checkpoint]


@pytest.mark.composes
@pytest.mark.parametrize("wrap", WRAPS)
def test_through_control_flow(batch_row: Row, wrap: Program) -> None:
    place = made_inside_used_outside
    args, want = problem(batch_row, 2, R)
    same(program(batch_row, place, wrap)(*args), want)


@pytest.mark.composes
def test_a_scan_over_a_batch_of_plans(batch_row: Row) -> None:
    """The axis of a batch becomes a loop's."""
    args, want = problem(batch_row, 3, R)

    def per_rank(topk_idx, *args):
        plans = jax.vmap(functools.partial(plan_of, batch_row))(topk_idx)
        return jax.lax.scan(lambda _, now: (None, forward_and_back(*now)), None, (plans, *args))[1]

    same(batch_row.jit(per_rank, 1 if batch_row.fabric is ONE else R)(*args), want)


@pytest.mark.composes
def test_a_batch_in_a_batch(batch_row: Row) -> None:
    """Made under (a, b), used under (b, a)."""
    args, want = problem(batch_row, 4, 2 * R)
    split = [a.reshape(a.shape[0], 2, R, *a.shape[2:]) for a in args]

    def per_rank(topk_idx, *args):
        plans = jax.vmap(jax.vmap(functools.partial(plan_of, batch_row)))(topk_idx)
        return jax.vmap(jax.vmap(forward_and_back), in_axes=1, out_axes=1)(plans, *args)

    got = batch_row.jit(per_rank, 1 if batch_row.fabric is ONE else R)(*split)
    same({k: np.asarray(a).reshape(want[k].shape) for k, a in got.items()}, want)


@pytest.mark.composes
def test_one_plan_of_a_batch(batch_row: Row) -> None:
    """A plan taken out of a batch is a plan; the rest of the batch does not matter."""
    args, want = problem(batch_row, 5, R)

    def per_rank(topk_idx, *args):
        plans = jax.vmap(functools.partial(plan_of, batch_row))(topk_idx)
        last = jax.tree.map(lambda a: a[-1], (plans, args))
        return forward_and_back(last[0], *last[1])

    got = batch_row.jit(per_rank, 1 if batch_row.fabric is ONE else R)(*args)
    same(got, {k: a[:, -1] for k, a in want.items()})


@pytest.mark.composes
def test_some_tokens_for_a_batch_of_plans(batch_row: Row) -> None:
    """Only the plan is batched."""
    rng = np.random.default_rng(6)
    shape = ALONE if batch_row.fabric is ONE else attacks.SHAPE
    first = attacks.Numbers.draw(rng, shape)
    rest = first.args[1:]
    numbers = [first] + [
        attacks.Numbers(attacks.Numbers.draw(rng, shape).topk_idx, *rest) for _ in range(R - 1)
    ]
    want = attacks.stack([n.expect(shape) for n in numbers], 1)

    def per_rank(topk_idx, *args):
        plans = jax.vmap(functools.partial(plan_of, batch_row))(topk_idx)
        return jax.vmap(lambda plan: forward_and_back(plan, *args))(plans)

    topk_idx = np.stack([n.topk_idx for n in numbers], 1)
    same(batch_row.jit(per_rank, shape.num_ranks)(topk_idx, *rest), want)


def test_a_batch_over_groups_of_devices(implementation: str) -> None:
    """A vmap that spreads its batch over a mesh axis beside that of the ranks."""
    row = Row(implementation, SHARD_MAP, exact=implementation == "native")
    args, want = problem(row, 7, 2)
    mesh = jax.make_mesh((2, R), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("expert")

    def block(*args):
        def per_rank(topk_idx, *args):
            return forward_and_back(make_plan(row, topk_idx), *args)

        return jax.tree.map(lambda a: a[None], per_rank(*(a[0] for a in args)))

    ranks = jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec)
    run = jax.jit(jax.vmap(ranks, in_axes=1, out_axes=1, spmd_axis_name="data"))
    same(run(*args), want)
