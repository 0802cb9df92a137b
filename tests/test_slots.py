"""``to_slots`` and ``from_slots``, by themselves and around a layer over slots."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import Row
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put
from placements import FABRICS, NUM_SLOTS, PLACEMENTS, SHAPE, everywhere

import jax_ep


def mover(row: Row, f):
    """Compiles ``f(*parts, axis_name=..., implementation=...)`` of all ranks."""
    options = {"axis_name": row.fabric.axis_name, "implementation": row.implementation}
    return row.jit(functools.partial(f, **options), SHAPE.num_ranks)


def test_what_belongs_to_experts_moves_to_slots_and_back(ranks_row: Row):
    rng = np.random.default_rng(0)
    experts = {
        "w": rng.standard_normal((4, 2, 3, 5)).astype(jnp.bfloat16),
        "count": rng.integers(0, 99, (4, 2)).astype(np.int32),
        "scale": rng.standard_normal((4, 2, 1)).astype(np.float32),
    }
    there, back = mover(ranks_row, jax_ep.to_slots), mover(ranks_row, jax_ep.from_slots)
    for placement in PLACEMENTS.values():
        slots = there(experts, everywhere(placement))
        for name, array in experts.items():
            flat = array.reshape(8, *array.shape[2:])[placement.slot_experts]
            np.testing.assert_array_equal(slots[name], flat.reshape(4, -1, *array.shape[2:]))
        returned = back(slots, everywhere(placement))
        jax.tree.map(np.testing.assert_array_equal, returned, experts)


def test_a_state_moves_from_one_placement_to_another(ranks_row: Row):
    """Weights and what an optimizer knows of them, by one program for all placements."""

    def move(state, old, new, **options):
        return jax_ep.to_slots(jax_ep.from_slots(state, old, **options), new, **options)

    rng = np.random.default_rng(0)
    experts = {"w": rng.standard_normal((8, 2, 3)), "mean": rng.standard_normal((8, 3))}
    program = mover(ranks_row, move)
    ways = list(PLACEMENTS.values())
    for old, new in zip(ways, ways[1:] + ways[:1], strict=True):
        state, want = (
            {n: a[p.slot_experts].reshape(4, -1, *a.shape[1:]) for n, a in experts.items()}
            for p in (old, new)
        )
        got = program(jax.tree.map(np.float32, state), everywhere(old), everywhere(new))
        jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.float32, want))


def test_the_gradient_of_an_expert_is_the_sum_of_its_copies(ranks_row: Row):
    num_local = NUM_SLOTS // 4
    rng = np.random.default_rng(0)
    grads = {
        "w": rng.integers(-9, 9, (4, num_local, 2, 3)).astype(np.float32),
        "half": rng.integers(-9, 9, (4, num_local, 1)).astype(jnp.bfloat16),
    }

    def per_rank(grads, placement, **options):
        # They vary from rank to rank, as those of a model do.
        experts = jax.tree.map(lambda a: a[:2], grads)
        _, pull = jax.vjp(lambda t: jax_ep.to_slots(t, placement, **options), experts)
        return pull(grads)[0], jax_ep.from_slots(grads, placement, copies="sum", **options)

    program = mover(ranks_row, per_rank)
    for placement in PLACEMENTS.values():
        by_gradient, by_name = program(grads, everywhere(placement))
        for name, array in grads.items():
            want = np.zeros((8, *array.shape[2:]), np.float32)
            np.add.at(want, placement.slot_experts, array.reshape(-1, *array.shape[2:]))
            got = np.asarray(by_name[name]).astype(np.float32).reshape(want.shape)
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(by_gradient[name], by_name[name])


@FABRICS
def test_gradients_that_are_equal_on_all_ranks_are_added_up_likewise(fabric):
    def per_rank(placement):
        ones = jnp.ones((NUM_SLOTS // 4, 2))
        return jax_ep.from_slots(ones, placement, axis_name=fabric.axis_name, copies="sum")

    placement = PLACEMENTS["all_of_one"]
    got = jax.jit(fabric.over_ranks(per_rank, 4))(everywhere(placement))
    want = np.repeat(placement.num_copies.reshape(4, 2)[..., None], 2, axis=-1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.composes
def test_a_layer_over_slots_is_the_layer_over_experts(implementation: str):
    """Output and gradients, on 8 devices, for several placements by one program."""
    num_ranks, num_experts, num_slots, hidden, ffn = 8, 16, 24, 6, 5
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_ranks * 7, hidden)).astype(np.float32)
    topk_idx = (num_experts * rng.random((len(x), 3)) ** 2).astype(np.int32)
    topk_idx[::5, 0], topk_idx[::9, 1] = jax_ep.DROPPED, num_experts + 3
    topk_weights = rng.random(topk_idx.shape).astype(np.float32)
    inward, outward = (num_experts, hidden, ffn), (num_experts, ffn, hidden)
    weights = [rng.standard_normal(s).astype(np.float32) for s in (inward, inward, outward)]
    mesh = make_mesh(AxisType.Auto, expert=num_ranks)
    options = {"axis_name": "expert", "implementation": implementation}
    # A token that asks one expert twice needs more than the default.
    layer = functools.partial(jax_ep.moe, capacity=num_ranks * 7 * 3, **options)

    def plain(x, topk_weights, weights, topk_idx, placement):
        del placement
        out, plan = layer(x, topk_idx, topk_weights, *weights, num_experts=num_experts)
        return out, plan.expert_load, plan.num_invalid[None]

    traces = []

    def placed(x, topk_weights, weights, topk_idx, placement):
        traces.append(placement)
        slots = jax_ep.place(topk_idx, placement, axis_name="expert")
        own = jax_ep.to_slots(weights, placement, **options)
        out, plan = layer(x, slots, topk_weights, *own, num_experts=num_slots)
        return out, placement.fold(plan.expert_load), plan.num_invalid[None]

    def program(f):
        specs = (*[P("expert")] * 4, P())
        sharded = jax.shard_map(
            f, mesh=mesh, in_specs=specs, out_specs=(P("expert"), P(), P("expert"))
        )

        def run(x, topk_weights, weights, topk_idx, placement):
            def loss(*args):
                out, *rest = sharded(*args, topk_idx, placement)
                return jnp.sum(jnp.sin(out)), (out, *rest)

            return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, topk_weights, weights)

        return jax.jit(run)

    args = jax.tree.map(lambda a: put(a, mesh, P("expert")), (x, topk_weights, weights, topk_idx))
    placements = [
        jax_ep.eplb(np.bincount(topk_idx[topk_idx < num_experts] + 1)[1:], num_slots, num_ranks),
        jax_ep.Placement.of(np.r_[:num_experts, [0] * 7, 1], num_experts),
    ]
    want = program(plain)(*args, placements[0])
    over_slots = program(placed)
    for placement in placements:
        got = over_slots(*args, placement)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    assert len(traces) == 1
