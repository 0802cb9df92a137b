"""What becomes of the others when processes end, stop, come late or call something else."""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import EMULATED, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import kill, multiprocess

T, E_PER_RANK, K, H = 8, 2, 2, 16
WAIT = 1.5
# A process with one device gets some of XLA's errors as the latter.
FAILURES = (jax.errors.JaxRuntimeError, ValueError)


class Layer:
    """A layer over some devices, with what it must give."""

    def __init__(self, devices: list[Any]):
        self.num_ranks = len(devices)
        self.mesh = Mesh(np.array(devices), ("expert",))
        self.program = jax.jit(
            jax.shard_map(
                self._per_rank, mesh=self.mesh, in_specs=P("expert"), out_specs=P("expert")
            )
        )

    def _per_rank(self, x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx,
            num_experts=E_PER_RANK * self.num_ranks,
            axis_name="expert",
            implementation="native",
        )
        return jax_ep.combine(jnp.tanh(jax_ep.dispatch(x, plan)), plan)

    def place(self, a: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            a.shape, NamedSharding(self.mesh, P("expert")), lambda at: a[at]
        )

    def run(self, seed: int = 0) -> None:
        """Runs once and compares what this process has of the result."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(self.num_ranks * T, H)).astype(np.float32)
        topk_idx = rng.integers(0, E_PER_RANK * self.num_ranks, (len(x), K), np.int32)
        out = jax.block_until_ready(self.program(self.place(x), self.place(topk_idx)))
        for shard in out.addressable_shards:
            np.testing.assert_allclose(shard.data, K * np.tanh(x[shard.index]), rtol=1e-5)


def layer_that_ran(timeout: float) -> Layer:
    """Returns a layer over all devices after its first run, which XLA's collectives are part of."""
    require("native")
    layer = Layer(jax.devices())
    layer.run()
    jax_ep.set_wait_timeout(timeout)
    return layer


def rank_of(process: int) -> int:
    return process * len(jax.local_devices())


def fails_in_time(layer: Layer, *needles: str) -> None:
    """Runs until an error, which comes in time and names what it must."""
    error, took = first_error(layer)
    assert took < WAIT + 1
    for needle in (r"(make_plan|dispatch|combine).*: rank \d", r"in epoch \d+", *needles):
        assert re.search(needle, error), (needle, error)


def first_error(layer: Layer) -> tuple[str, float]:
    """Returns the error of the first run that fails, and how long that run took."""
    for seed in range(1, 4):
        start = time.monotonic()
        try:
            layer.run(seed)
        except FAILURES as error:
            return str(error), time.monotonic() - start
    pytest.fail("nothing failed")


def lives_on(layer: Layer, gone: set[int]) -> None:
    """What does not need the dead goes on; what does fails at once, and again."""
    start = time.monotonic()
    with pytest.raises(FAILURES, match=r"gave up, because"):
        layer.run()
    assert time.monotonic() - start < 1
    Layer(jax.local_devices()).run()
    survivors = [device for device in jax.devices() if device.process_index not in gone]
    jax_ep.set_wait_timeout(60)
    fresh = Layer(survivors)
    for seed in range(3):
        fresh.run(seed)


PHASES = {
    "publishing": "publishing",
    "awaiting": "waiting for the others to publish",
    "pulling": "pulling",
}
not_known = pytest.mark.skipif(
    EMULATED is not None,
    reason="what a stream does that waits for a GPU whose process has ended is not known",
)
# What JAX makes of a process's end is the same in each.
every_phase = pytest.mark.parametrize(
    "when",
    [
        "publishing",
        pytest.param("awaiting", marks=not_known),
        pytest.param("pulling", marks=not_known),
    ],
)


@every_phase
@multiprocess(3, 2, timeout=100)
def test_a_killed_process(when: str) -> None:
    _loses_process_1(when, "kill", "had ended, ")


@every_phase
@multiprocess(3, 1, timeout=100)
def test_a_stopped_process(when: str) -> None:
    _loses_process_1(when, "stop", rf"had not .* after {WAIT} s; that process was last seen ")


@every_phase
@multiprocess(3, 1, timeout=100)
def test_a_process_that_exits(when: str) -> None:
    _loses_process_1(when, "exit", "had ended, ")


def _loses_process_1(when: str, how: str, fate: str) -> None:
    layer = layer_that_ran(WAIT)
    kill(1, when=when, how=how, exchanges=1)
    if jax.process_index() == 1:
        layer.run(1)
        return
    place = (
        rf"ranks? {rank_of(1)}[, 0-9]* of process 1 (had given up|{fate}{PHASES[when]}, in epoch 5)"
    )
    fails_in_time(layer, place)
    lives_on(layer, {1})


@multiprocess(4, 1, timeout=100)
def test_two_killed_at_once() -> None:
    layer = layer_that_ran(WAIT)
    kill(1, when="publishing")
    kill(3, when="publishing")
    if jax.process_index() in (1, 3):
        layer.run(1)
        return
    fails_in_time(layer, "process [13] had ended, publishing")
    lives_on(layer, {1, 3})


@multiprocess(3, 1, timeout=100)
def test_the_coordinator_stopped() -> None:
    """Its process leads the exchange too."""
    layer = layer_that_ran(WAIT)
    kill(0, when="awaiting", how="stop")
    if jax.process_index() == 0:
        layer.run(1)
        return
    fails_in_time(layer, r"process 0 had (not|given up)")


@multiprocess(3, 1, timeout=100)
def test_a_process_that_never_comes() -> None:
    layer = layer_that_ran(WAIT)
    if jax.process_index() == 1:
        time.sleep(WAIT + 2)
        with pytest.raises(FAILURES, match="had given up"):
            layer.run(1)
        return
    fails_in_time(layer, r"process 1 had not published .* last seen between exchanges, in epoch 3")


@multiprocess(2, 2, timeout=100)
def test_a_process_that_comes_late() -> None:
    """Later than anybody spins, and within the time-out: nothing is lost."""
    layer = layer_that_ran(30)
    if jax.process_index() == 1:
        time.sleep(10)
    layer.run(1)
    if jax.process_index() == 0:
        time.sleep(1)
    layer.run(2)


@multiprocess(2, 2, timeout=100)
def test_ranks_that_call_different_things() -> None:
    """One process combines while the other dispatches, in a program that they share."""
    require("native")
    mesh = Mesh(np.array(jax.devices()), ("expert",))

    def per_rank(combines: jax.Array, x: jax.Array) -> jax.Array:
        topk_idx = jnp.zeros((T, 1), jnp.int32) + combines[0].astype(jnp.int32) * 0
        plan = jax_ep.make_plan(
            topk_idx, num_experts=4, axis_name="expert", implementation="native"
        )
        rows = jnp.zeros((plan.capacity, H)) + x[0, 0]
        return jax.lax.cond(
            combines[0],
            lambda: jnp.sum(jax_ep.combine(rows, plan)),
            lambda: jnp.sum(jax_ep.dispatch(x, plan)),
        )[None]

    program = jax.jit(
        jax.shard_map(per_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    )

    def run(combines: list[bool]) -> None:
        layout = NamedSharding(mesh, P("expert"))
        args = np.array(combines), np.ones((4 * T, H), np.float32)
        args = [jax.make_array_from_callback(a.shape, layout, lambda at, a=a: a[at]) for a in args]
        jax.block_until_ready(program(*args))

    run([True] * 4)
    run([False] * 4)
    jax_ep.set_wait_timeout(WAIT)
    start = time.monotonic()
    with pytest.raises(FAILURES, match=r"(dispatch|combine).*epoch 6.*process"):
        run([False, False, True, True])
    assert time.monotonic() - start < WAIT + 1
    Layer(jax.local_devices()).run()


@multiprocess(2, 1, timeout=100)
def test_processes_with_different_shapes() -> None:
    """Their programs differ, which JAX does not notice."""
    require("native")
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    hidden = 8 * (1 + jax.process_index())

    def per_rank(topk_idx: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx, num_experts=2, axis_name="expert", implementation="native"
        )
        return jax_ep.dispatch(jnp.ones((T, hidden)) + topk_idx[0], plan)[:1, :1]

    program = jax.jit(
        jax.shard_map(per_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    )
    topk_idx = jax.make_array_from_callback(
        (2 * T, 1), NamedSharding(mesh, P("expert")), lambda _: np.zeros((T, 1), np.int32)
    )
    jax_ep.set_wait_timeout(WAIT)
    start = time.monotonic()
    with pytest.raises(FAILURES, match=r"(32|64) bytes|gave up"):
        jax.block_until_ready(program(topk_idx))
    assert time.monotonic() - start < WAIT + 1
