"""Hosts of one process or of several, made up: tokens cross to each once, by gloo, and spread."""

from __future__ import annotations

import os
import re

import jax
import numpy as np
from implementations import AXIS, require
from jax.sharding import AxisType, PartitionSpec
from test_faults import first_error

import jax_ep
from jax_ep import _owned_plan, _processes
from jax_ep.testing import kill, multiprocess, uniform_routing

R, T, K, E, H = 8, 24, 4, 16, 33
PER_NODE = 4


def arrays(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    sizes = {"num_ranks": R, "num_tokens": T, "num_experts": E, "num_topk": K}
    topk_idx = np.asarray(uniform_routing(rng, **sizes))
    if seed % 2:  # More than a round has room for.
        topk_idx = np.where(topk_idx < E // 2, topk_idx, topk_idx - E // 2)
    x, weights = rng.normal(size=(R, T, H)), rng.normal(size=(R, T, K))
    return x.astype(np.float32), weights.astype(np.float32), topk_idx


def there_and_back(x: jax.Array, weights: jax.Array, topk_idx: jax.Array) -> list[jax.Array]:
    plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS, ranks_per_node=PER_NODE)

    def layer(x: jax.Array, weights: jax.Array) -> jax.Array:
        rows = jax_ep.dispatch(x, plan)
        return jax_ep.combine(rows * rows, plan, weights)

    out, pull = jax.vjp(layer, x, weights)
    return [out, *pull(x)]


class Layer:
    """A layer over all ranks, and how its operands are placed."""

    def __init__(self) -> None:
        mesh = jax.make_mesh((R,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices())
        spec = PartitionSpec(AXIS)

        def block(*arrays: jax.Array) -> list[jax.Array]:
            return [a[None] for a in there_and_back(*(a[0] for a in arrays))]

        self.sharding = jax.NamedSharding(mesh, spec)
        self.program = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))

    def place(self, seed: int) -> tuple[jax.Array, ...]:
        return jax.device_put(arrays(seed), self.sharding)

    def run(self, seed: int = 0) -> list[jax.Array]:
        return jax.block_until_ready(self.program(*self.place(seed)))


def check_nodes(fabric: str) -> None:
    """Compares a layer over all ranks with what this process finds alone, to the bit."""
    layer = Layer()
    assert f"jax_ep_gather_rows_{fabric}" in layer.program.lower(*layer.place(0)).as_text()
    alone = jax.jit(jax.vmap(there_and_back, axis_name=AXIS))
    for seed in range(4):
        with jax.default_device(jax.local_devices()[0]):
            want = alone(*arrays(seed))
        for got, whole in zip(layer.run(seed), want, strict=True):
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])


@multiprocess(2, 4, timeout=200)
def test_hosts_of_one_process() -> None:
    require("native")
    _processes._host = lambda: [f"host {jax.process_index()}"]
    check_nodes("devices")


@multiprocess(2, 4, timeout=200)
def test_plans_that_no_rank_makes_alone() -> None:
    require("native")
    _processes._host = lambda: [f"host {jax.process_index()}"]
    _owned_plan.FROM_CHOICES = 0
    check_nodes("devices")


@multiprocess(4, 2, timeout=300)
def test_hosts_of_several_processes() -> None:
    require("native")
    _processes._host = lambda: [f"host {jax.process_index() // 2}"]
    check_nodes("processes")


@multiprocess(4, 2, timeout=120)
def test_a_process_that_ends() -> None:
    """Its node's other process misses it, or XLA's collectives do: nobody waits for ever."""
    limit = 4
    os.environ["XLA_FLAGS"] += f" --xla_cpu_collective_timeout_seconds={limit}"
    require("native")
    _processes._host = lambda: [f"host {jax.process_index() // 2}"]
    layer = Layer()
    layer.run()
    kill(1)
    error, took = first_error(layer)
    assert took < limit + 20, took
    assert re.search(r"Gloo|jax_ep \w+", error), error
