"""Experts lent between processes of a host, and between hosts: as one process finds alone."""

from __future__ import annotations

import jax
import numpy as np
from implementations import AXIS, require
from jax.sharding import AxisType, PartitionSpec

import jax_ep
from jax_ep import _processes
from jax_ep.testing import multiprocess, zipf_routing

R, T, K, E, X, H = 4, 16, 4, 16, 2, 33


def lend(topk_idx: jax.Array, weights: jax.Array) -> list[jax.Array]:
    slots, copies = jax_ep.balance(
        topk_idx, num_experts=E, axis_name=AXIS, num_spares=X, implementation="native"
    )
    every, pull = jax.vjp(lambda w: jax_ep.with_copies(w, copies), weights)
    plan = jax_ep.make_plan(
        slots, num_experts=E + R * X, axis_name=AXIS, capacity=T * K, implementation="native"
    )
    return [slots, every, *pull(every), plan.num_dropped]


def check_loans() -> None:
    require("native")
    mesh = jax.make_mesh((R,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices())
    spec = PartitionSpec(AXIS)

    def block(*arrays: jax.Array) -> list[jax.Array]:
        return [a[None] for a in lend(*(a[0] for a in arrays))]

    program = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = {"num_ranks": R, "num_tokens": T, "num_experts": E, "num_topk": K}
        topk_idx = zipf_routing(rng, **sizes, exponent=1.2)
        arrays = topk_idx, rng.normal(size=(R, E // R, H)).astype(np.float32)
        with jax.default_device(jax.local_devices()[0]):
            want = jax.vmap(lend, axis_name=AXIS)(*arrays)
        got = program(*jax.device_put(arrays, jax.NamedSharding(mesh, spec)))
        assert not np.any(want[-1])
        for one, whole in zip(jax.block_until_ready(got), want, strict=True):
            for shard in one.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])


@multiprocess(2, 2, timeout=200)
def test_between_processes() -> None:
    check_loans()


@multiprocess(2, 2, timeout=200)
def test_between_hosts() -> None:
    _processes._host = lambda: [f"host {jax.process_index()}"]
    check_loans()
