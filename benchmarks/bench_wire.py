"""Times the encoding of rows as 8-bit floats, and exchanges of such rows beside plain ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import timing
from absl import app, flags
from programs import AXIS, make_inputs, make_mesh, over_ranks, planner
from shapes import DECODE, Shape

import jax_ep
from jax_ep import wire

_GOAL = 2.0
_BLOCK = 128
_SIZES = ((64, 2048), (512, 2048), (4096, 7168))

_repeats = flags.DEFINE_integer("repeats", 30, "Rounds of the interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "Small cases, a few rounds: does it all still run?")


def plain_jax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes as one would write it down. XLA's divisions are off in the last place."""
    blocks = x.astype(jnp.float32).reshape(len(x), -1, _BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / 448
    return (blocks / scales[..., None]).astype(jnp.float8_e4m3fn).reshape(x.shape), scales


def time_encoding(num_rows: int, hidden: int, repeats: int) -> None:
    """Compares both implementations' bits, then times them; prints a table and records."""
    x = np.random.default_rng(0).standard_normal((num_rows, hidden), np.float32)
    x = jax.device_put(x.astype(ml_dtypes.bfloat16))
    native, xla = (
        jax.jit(functools.partial(wire.encode, implementation=name)) for name in ("native", "xla")
    )
    encoded = native(x)
    for got, want in zip(encoded, xla(x), strict=True):
        np.testing.assert_array_equal(got.view(jnp.uint8), want.view(jnp.uint8))
    decode = jax.jit(functools.partial(wire.decode, dtype=x.dtype))
    calls: dict[str, Callable[[], Any]] = {
        "encode, native": lambda: native(x),
        "encode, xla": lambda: xla(x),
        "encode, plain JAX": functools.partial(jax.jit(plain_jax), x),
        "decode": lambda: decode(*encoded),
        "copy": functools.partial(jax.jit(lambda x: x + 1), x),
    }
    times = timing.compare(calls, repeats=repeats)
    base = times["encode, native"].median
    rows = [(name, t, f"{t.median / base:.2f}") for name, t in times.items()]
    met = times["encode, xla"].median >= _GOAL * base
    goal = f"goal, {_GOAL:g} times as fast as xla: {'yes' if met else 'NO'}"
    timing.print_table(
        f"{num_rows} rows of {hidden} bfloat16 ({goal})",
        ("what", "ms (p10-p90)", "of native"),
        rows,
    )
    for name, spent in times.items():
        case = {"bench": "wire", "rows": num_rows, "hidden": hidden, "contender": name}
        timing.print_json({**case, **spent.as_json()})


def time_exchange(shape: Shape, repeats: int) -> None:
    """Times dispatch and combine with their gradients over CPU devices, encoded and plain."""
    mesh = make_mesh(shape.num_ranks)
    inputs = make_inputs(shape, 0.0).on(mesh)
    make_plan = planner(shape, "native", "uninitialized")

    def program(send: Callable[..., jax.Array], receive: Callable[..., jax.Array]) -> Any:
        def loss(x: jax.Array, weights: jax.Array, topk_idx: jax.Array) -> jax.Array:
            plan = make_plan(topk_idx)
            rows = jax.lax.optimization_barrier(send(x, plan))
            return jnp.sum(receive(rows, plan, weights).astype(jnp.float32) ** 2)

        def per_rank(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> Any:
            return jax.grad(loss, argnums=(0, 1))(x, weights, topk_idx)

        return functools.partial(over_ranks(per_rank, mesh), *inputs.as_tuple())

    calls = {
        "plain": program(jax_ep.dispatch, jax_ep.combine),
        "encoded tokens": program(wire.dispatch, jax_ep.combine),
        "encoded tokens and cotangents": program(wire.dispatch, wire.combine),
    }
    plain, *others = (call()[0].astype(jnp.float32) for call in calls.values())
    for other in others:
        assert jnp.max(jnp.abs(other - plain)) < jnp.max(jnp.abs(plain)) / 4
    times = timing.compare(calls, repeats=repeats)
    base = times["plain"].median
    timing.print_table(
        f"{shape.name} on {shape.num_ranks} devices along {AXIS!r}, with gradients",
        ("what crosses", "ms (p10-p90)", "of plain"),
        [(name, t, f"{t.median / base:.2f}") for name, t in times.items()],
    )
    for name, spent in times.items():
        case = {"bench": "wire", **shape.as_json(), "contender": name}
        timing.print_json({**case, **spent.as_json()})


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DECODE.num_ranks)
    timing.print_json(timing.environment())
    repeats = min(_repeats.value, 3) if _quick.value else _repeats.value
    for num_rows, hidden in _SIZES[: 1 if _quick.value else None]:
        time_encoding(num_rows, hidden, repeats)
    time_exchange(DECODE, repeats)


if __name__ == "__main__":
    app.run(main)
