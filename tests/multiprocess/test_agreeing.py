"""How processes find each other's calls, however their programs came to be."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import require
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import multiprocess

Program = Callable[..., jax.Array]


def program(layers: int = 1, devices: Any = None, scale: float = 1.0) -> Program:
    """Compiles nothing yet: sends each token to two experts and back, times 2 each layer."""
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("expert",), (AxisType.Auto,), devices=devices)

    def per_rank(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        for _ in range(layers):
            plan = jax_ep.make_plan(
                topk_idx, num_experts=8, axis_name="expert", implementation="native"
            )
            x = jax_ep.combine(scale * jax_ep.dispatch(x, plan), plan)
        return x

    spec = P("expert")
    return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec))


def operands(step: int = 0, num_ranks: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    num_tokens = 4 * (num_ranks or jax.device_count())
    rng = np.random.default_rng(step)
    x = np.arange(3 * num_tokens, dtype=np.float32).reshape(num_tokens, 3) + step
    return x, rng.integers(0, 8, (num_tokens, 2)).astype(np.int32)


def check(out: jax.Array, x: np.ndarray, factor: float = 2) -> None:
    for shard in out.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), factor * x[shard.index])


def run(f: Program, step: int = 0, factor: float = 2) -> None:
    x, topk_idx = operands(step)
    check(f(x, topk_idx), x, factor)


@multiprocess(2, 2)
def test_calls_from_different_lines() -> None:
    """XLA numbers the runs of a program by its text, which names the line that called it."""
    require("native")
    jax_ep.set_wait_timeout(15)
    f = program()
    x, topk_idx = operands()
    for _ in range(3):
        if jax.process_index() == 0:
            out = f(x, topk_idx)
            print("only one process logs")
        else:
            out = f(x, topk_idx)
        check(out, x)


def test_a_start_from_the_compilation_cache(tmp_path: pathlib.Path) -> None:
    """A program from JAX's persistent cache counts its runs from elsewhere in each process."""
    _start_with_cache(str(tmp_path))
    entries = {path.name for path in tmp_path.iterdir()}
    assert entries
    _start_with_cache(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == entries


@multiprocess(2, 2)
def _start_with_cache(cache: str) -> None:
    require("native")
    jax_ep.set_wait_timeout(15)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    f = program()
    for step in range(3):
        run(f, step)


@multiprocess(2, 2)
def test_one_process_compiles_ahead_of_time() -> None:
    require("native")
    jax_ep.set_wait_timeout(15)
    f = program()
    if jax.process_index() == 0:
        f = f.lower(*operands()).compile()
    for step in range(3):
        run(f, step)


@multiprocess(2, 2)
def test_one_process_compiles_again() -> None:
    """It finds the call that the other is in, as XLA's own collectives would."""
    require("native")
    jax_ep.set_wait_timeout(15)
    f = program()
    for step in range(12):
        if step % 4 == 2 and jax.process_index() == step // 4 % 2:
            jax.clear_caches()
        run(f, step)
    run(program(scale=0.5), factor=1)


@multiprocess(2, 2)
def test_one_process_compiles_two_equal_layers_again() -> None:
    """Which of its calls is which cannot be told from outside: all fail in time, and say why."""
    require("native")
    f = program(layers=2)
    run(f, factor=4)
    jax_ep.set_wait_timeout(3)
    if jax.process_index() == 0:
        jax.clear_caches()
    began = time.monotonic()
    message = "since it was compiled" if jax.process_index() == 0 else "make_plan: rank"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run(f, factor=4)
    assert time.monotonic() - began < 8


@multiprocess(2, 2)
def test_both_processes_compile_again() -> None:
    require("native")
    f = program(layers=2)
    for step in range(4):
        if step == 2:
            jax.clear_caches()
        run(f, step, factor=4)


@multiprocess(2, 2)
def test_a_process_that_never_runs_the_call() -> None:
    """Before ranks have agreed on a call no collective is waited for without a bound."""
    require("native")
    f = program()
    f.lower(*operands())  # Both say where they are.
    if jax.process_index() == 0:
        jax_ep.set_wait_timeout(2)
        began = time.monotonic()
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="ranks 2, 3 of process 1 (did not|had ended)"
        ):
            run(f)
        assert time.monotonic() - began < 6


@multiprocess(3, 2)
def test_meshes_of_one_shape_over_different_processes() -> None:
    """A process tells meshes apart by their devices, however alike their programs are."""
    require("native")
    jax_ep.set_wait_timeout(15)
    here = jax.process_index()
    of = [[d for d in jax.devices() if d.process_index == p] for p in range(3)]
    pairs = ((0, 1), (0, 2), (1, 2), (1, 0))
    programs = [program(devices=of[a] + of[b]) for a, b in pairs]
    for step in range(3):
        for pair, f in zip(pairs, programs, strict=True):
            if here in pair:
                x, topk_idx = operands(step, num_ranks=4)
                check(f(x, topk_idx), x)
    local = program(devices=of[here])
    x, topk_idx = operands(num_ranks=2)
    check(local(x, topk_idx), x)


@multiprocess(2, 1)
def test_a_local_mesh_needs_no_other_process() -> None:
    """The other process does nothing at all."""
    require("native")
    if jax.process_index() == 0:
        jax_ep.set_wait_timeout(1)
        x, topk_idx = operands(num_ranks=1)
        check(program(devices=jax.local_devices())(x, topk_idx), x)


@multiprocess(2, 2)
def test_many_programs_in_flight() -> None:
    """Names of executions hold while runs of several programs wait for each other."""
    require("native")
    programs = [program(layers=1 + i % 2, scale=(i + 1) / 2) for i in range(4)]
    x, topk_idx = operands()
    for _ in range(5):
        outs = [f(x, topk_idx) for f in programs for _ in range(3)]
        for i, out in enumerate(outs):
            check(out, x, (i // 3 + 1) ** (1 + i // 3 % 2))


@multiprocess(2, 2)
def test_plan_is_used_under_the_axes_of_its_place() -> None:
    """Made along one axis, used along two: each data group exchanges its own tokens."""
    require("native")
    mesh = jax.make_mesh((2, 2), ("data", "expert"), (AxisType.Auto,) * 2)
    topk_idx = operands(num_ranks=2)[1]
    x = np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3)

    def route(topk_idx: jax.Array) -> Any:
        plan = jax_ep.make_plan(topk_idx, num_experts=8, axis_name="expert")
        return jax.tree.map(lambda a: a[None], plan)

    def work(x: jax.Array, plan: Any) -> jax.Array:
        plan = jax.tree.map(lambda a: a[0], plan)
        return jax_ep.combine(jax_ep.dispatch(x[0], plan), plan)[None]

    @jax.jit
    def f(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        plan = jax.shard_map(
            route, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
        )(topk_idx)
        specs = (P("data", "expert"), P("expert"))
        return jax.shard_map(work, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
            x, plan
        )

    for _ in range(50):
        check(f(jnp.asarray(x), topk_idx), x)
