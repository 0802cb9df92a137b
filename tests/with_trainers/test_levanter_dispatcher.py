"""Levanter's own dispatcher with this library's back-end, against its other back-ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from installed import check_put_back, check_refuses, installed
from jax.sharding import PartitionSpec as P
from levanter.grug import grug_moe, sharding  # pyright: ignore[reportMissingImports]
from levanter.grug._moe import common  # pyright: ignore[reportMissingImports]
from test_levanter import NAMES

from jax_ep.integrations import levanter as adapter

TOKENS, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 128, 16, 12, 16, 2
put_back = check_put_back(adapter, grug_moe, "_moe_mlp_ep_ragged_a2a_local")


@pytest.fixture(scope="module")
def mesh():
    mesh = sharding.compact_grug_mesh(expert_axis_size=4)
    assert mesh.shape["data"] == 2
    return mesh


def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 2  # noqa: E731
    floats = {
        "x": draw(TOKENS, HIDDEN),
        "router": draw(HIDDEN, NUM_EXPERTS),
        "w_gate": draw(NUM_EXPERTS, HIDDEN, FFN_HIDDEN),
        "w_up": draw(NUM_EXPERTS, HIDDEN, FFN_HIDDEN),
        "w_down": draw(NUM_EXPERTS, FFN_HIDDEN, HIDDEN),
    }
    return floats, rng.random(TOKENS) < 0.8, draw(TOKENS, HIDDEN)


def routed(mesh, implementation, capacity_factor):
    """Levanter's router and experts, as its models put them together."""
    moe = grug_moe.QBRoutedMoE(
        num_experts_per_token=NUM_TOPK, batch_axes=("replica_dcn", "data", "expert")
    )

    def apply(floats, valid):
        names = ("w_gate", "w_up", "w_down")
        experts = grug_moe.MoEExpertMlp(
            **{name: floats[name] for name in names},
            implementation=implementation,
            activation=jax.nn.silu,
            capacity_factor=capacity_factor,
        )
        bias = jnp.zeros(NUM_EXPERTS)
        return moe(
            floats["x"],
            valid,
            router=floats["router"],
            router_bias=bias,
            expert_mlp=experts,
            mesh=mesh,
        )

    return apply


def place(floats, valid):
    """Puts arrays where Levanter's models have them: tokens over data and experts."""
    tokens = P(("replica_dcn", "data", "expert"))
    pspecs = common.MoEExpertMlpPspecs()
    inward, outward = pspecs.w_gate_up, pspecs.w_down
    specs = {"x": tokens, "router": P(), "w_gate": inward, "w_up": inward, "w_down": outward}
    reshard = jax.sharding.reshard
    return {name: reshard(floats[name], specs[name]) for name in floats}, reshard(valid, tokens)


def run(mesh, implementation, capacity_factor=16.0):
    """Returns outputs, gradients of all that has some, and what is counted."""
    floats, valid, dout = problem()
    apply = routed(mesh, implementation, capacity_factor)

    def objective(floats):
        out, stats = apply(floats, valid_)
        return jnp.sum(out * dout_), (out, stats)

    with jax.set_mesh(mesh):
        floats, valid_ = place(floats, valid)
        dout_ = jax.sharding.reshard(dout, P(("replica_dcn", "data", "expert")))
        grads, (out, stats) = jax.jit(jax.grad(objective, has_aux=True))(floats)
    arrays = {"out": out, **{f"d{name}": grad for name, grad in grads.items()}}
    return jax.tree.map(np.asarray, (arrays, stats))


def test_it_is_levanters_ring_forward_and_backward(mesh):
    with installed(adapter):
        got, stats = run(mesh, "ragged_all_to_all")
    want, want_stats = run(mesh, "ring")
    assert_close(got, want)
    assert stats.keys() == want_stats.keys()
    for name in stats:
        np.testing.assert_allclose(stats[name], want_stats[name], rtol=1e-6, err_msg=name)
    assert stats["capacity_overflow"] == 0
    assert stats["skipped_assignments"] > 0


def test_what_finds_no_room_is_counted(mesh):
    with installed(adapter):
        _, stats = run(mesh, "ragged_all_to_all", capacity_factor=0.25)
    assert 0 < stats["routing_sender_drops"] == stats["capacity_overflow"]
    assert stats["routing_receiver_drops"] == 0


def test_names_are_levanters():
    """Those that tests/test_levanter.py shows a remat policy to find, for one."""
    assert adapter.CapacityDrops._fields == grug_moe.CapacityDrops._fields
    assert NAMES == common.MOE_REMAT_SAVE_NAMES


def test_another_back_end_is_refused(monkeypatch):
    other = lambda x_local: None  # noqa: E731
    match = r"must take \['x_local', 'selected_.*takes \['x"
    check_refuses(monkeypatch, adapter, grug_moe, "_moe_mlp_ep_ragged_a2a_local", other, match)
