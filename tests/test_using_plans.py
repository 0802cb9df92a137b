"""Plans and metrics that leave their ``shard_map``: what ``docs/using_plans.md`` says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep

NUM_EXPERTS, NUM_RANKS, NUM_TOKENS, NUM_TOPK, CAPACITY = 16, 8, 6, 3, 20
MESHES = {
    "expert": ({"expert": 8}, "expert"),
    "data_expert": ({"data": 2, "expert": 4}, "expert"),
    "two_axes": ({"node": 2, "device": 4}, ("node", "device")),
}
ON_MESHES = pytest.mark.parametrize(("axes", "axis_name"), MESHES.values(), ids=MESHES)


def stack(tree):
    return jax.tree.map(lambda a: a[None], tree)


def mine(tree):
    return jax.tree.map(lambda a: a[0], tree)


def make_plan(topk_idx, axis_name="expert"):
    return jax_ep.make_plan(
        topk_idx, num_experts=NUM_EXPERTS, axis_name=axis_name, capacity=CAPACITY
    )


def exchange(x, plan):
    return jax_ep.combine(jnp.sin(jax_ep.dispatch(x, plan)), plan)


def sharded(f, axes=None, out_specs=None):
    """Runs ``f`` on each of 8 devices, whose parts of all arguments lie along the first axis."""
    axes = axes or {"expert": NUM_RANKS}
    kinds = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    spec = P(tuple(axes))
    out_specs = spec if out_specs is None else out_specs
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out_specs))


def operands():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_RANKS * NUM_TOKENS, 4)).astype(np.float32)
    # Skewed: some ranks are asked for more than they have room for.
    topk_idx = (NUM_EXPERTS * rng.random((len(x), NUM_TOPK)) ** 2).astype(np.int32)
    topk_idx[::7, 0] = NUM_EXPERTS
    return x, topk_idx


@ON_MESHES
def test_a_plan_of_one_shard_map_serves_in_another(axes, axis_name):
    x, topk_idx = operands()
    plans = sharded(lambda topk_idx: stack(make_plan(topk_idx, axis_name)), axes)(topk_idx)
    got = sharded(lambda x, plans: exchange(x, mine(plans)), axes)(x, plans)
    want = sharded(lambda x, i: exchange(x, make_plan(i, axis_name)), axes)(x, topk_idx)
    np.testing.assert_array_equal(got, want)
    assert np.asarray(plans.num_dropped).shape == (NUM_RANKS,)
    assert np.any(plans.num_dropped)


def test_the_specs_of_each_field():
    _, topk_idx = operands()

    def fields(topk_idx):
        plan = make_plan(topk_idx)
        return {
            "group_sizes": plan.group_sizes,
            "kept": plan.kept,
            "expert_load": plan.expert_load,
            "recv_counts": plan.recv_counts[None],
            "num_dropped": plan.num_dropped[None],
            "num_invalid": plan.num_invalid[None],
            "all_dropped": jax.lax.psum(plan.num_dropped, "expert"),
        }

    names = ("group_sizes", "kept", "recv_counts", "num_dropped", "num_invalid")
    specs = {name: P("expert") for name in names} | {"expert_load": P(), "all_dropped": P()}
    got = jax.tree.map(np.asarray, sharded(fields, out_specs=specs)(topk_idx))
    plans = sharded(lambda topk_idx: stack(make_plan(topk_idx)))(topk_idx)
    valid = topk_idx < NUM_EXPERTS
    np.testing.assert_array_equal(got["group_sizes"], np.asarray(plans.group_sizes).ravel())
    np.testing.assert_array_equal(got["kept"], np.asarray(plans.kept).reshape(topk_idx.shape))
    np.testing.assert_array_equal(
        got["expert_load"], np.bincount(topk_idx[valid], minlength=NUM_EXPERTS)
    )
    np.testing.assert_array_equal(plans.expert_load, [got["expert_load"]] * NUM_RANKS)
    assert got["recv_counts"].shape == (NUM_RANKS, NUM_RANKS)
    np.testing.assert_array_equal(
        got["recv_counts"].sum(1), got["group_sizes"].reshape(-1, 2).sum(1)
    )
    np.testing.assert_array_equal(got["num_invalid"], (~valid).reshape(NUM_RANKS, -1).sum(1))
    assert got["all_dropped"] == got["num_dropped"].sum() == (valid & ~got["kept"]).sum() > 0


@pytest.mark.parametrize(
    ("take", "spec", "message"),
    [
        (lambda plan: plan.num_dropped, P("expert"), "too long to be compatible"),
        (lambda plan: plan.num_dropped, P(), "replication which can't be statically inferred"),
        (lambda plan: plan, P("expert"), "too long to be compatible"),
    ],
    ids=["scalar", "own_value", "plan"],
)
def test_shard_map_itself_refuses_other_specs(take, spec, message):
    run = sharded(lambda topk_idx: take(make_plan(topk_idx)), out_specs=spec)
    with pytest.raises(ValueError, match=message):
        run(operands()[1])


def test_metrics_of_all_ranks():
    _, topk_idx = operands()

    def metrics(topk_idx):
        of_rank = jax_ep.load_metrics(make_plan(topk_idx), hidden=4, dtype=jnp.float32)
        ratios = {name: of_rank[name] for name in of_rank if name.endswith("max_over_mean")}
        sums = {name: jax.lax.psum(of_rank[name], "expert") for name in of_rank.keys() - ratios}
        return stack(of_rank), ratios, sums

    each, ratios, sums = sharded(metrics, out_specs=(P("expert"), P(), P()))(topk_idx)
    assert len(ratios) == 2
    for name, value in ratios.items():
        np.testing.assert_array_equal(each[name], np.full(NUM_RANKS, value))
    for name, value in sums.items():
        assert each[name].shape == (NUM_RANKS,)
        np.testing.assert_allclose(value, np.sum(each[name]), rtol=1e-6)


@pytest.mark.parametrize(
    ("alter", "error"),
    [
        (lambda plan: jax.tree.map(lambda a: jax.lax.pmean(a, "expert"), plan), TypeError),
        (stack, ValueError),
    ],
    ids=["averaged", "leading_axis_left"],
)
def test_what_is_no_plan_any_more_is_refused(alter, error):
    run = sharded(lambda x, topk_idx: exchange(x, alter(make_plan(topk_idx))))
    with pytest.raises(error, match="plan must be as make_plan made it, for one rank"):
        run(*operands())


def test_a_plan_is_refused_where_its_axis_is_not_bound():
    x, topk_idx = operands()
    plans = sharded(lambda topk_idx: stack(make_plan(topk_idx)))(topk_idx)
    with pytest.raises(ValueError, match="plan must be used where the axis"):
        exchange(x[:NUM_TOKENS], mine(plans))
