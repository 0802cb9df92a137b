"""Times plan, dispatch and combine between all GPUs of a process, against pure JAX and the wires.

One command, on a machine with several GPUs:

    make cuda && PYTHONPATH=. python benchmarks/bench_gpu_mesh.py

Results are checked first, on every rank: plans and rows against pure JAX, and rows and sums against
the same ranks stacked on one GPU, to the bit. A call's time is that of calls in a row, each GPU
working on one while the next are queued, or that of a call alone, from Python until the slowest
rank has its part. Bytes are the most that a rank receives or sends: a token once for each other
rank that wants it, and one sum of its rows for the way back. ``--cpu_devices=8`` runs all of it on
a CPU, slowly, to see that it does run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags
from checks import PLAN_FIELDS, Expected, check_ours
from gpu_programs import crossing_bytes, stacked
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import (
    AXIS,
    Implementation,
    Inputs,
    exchange,
    make_inputs,
    make_mesh,
    over_ranks,
    planner,
)
from shapes import GPU_SHAPES, Shape

import jax_ep

_BOTH: tuple[Implementation, ...] = ("native", "xla")
_ORACLE_TOKENS, _ORACLE_HIDDEN = 32, 136

_shapes = flags.DEFINE_multi_enum("shapes", [*GPU_SHAPES], [*GPU_SHAPES], "What to run.")
_repeats = flags.DEFINE_integer("repeats", 100, "Runs of each contender.", lower_bound=1)
_batch = flags.DEFINE_integer("batch", 10, "Calls in a row in a run.", lower_bound=1)
_link = flags.DEFINE_float("link_gb_per_s", 450.0, "What a GPU sends, or receives, at most.")
_cpu_devices = flags.DEFINE_integer("cpu_devices", 0, "Take so many devices of the CPU instead.")
_quick = flags.DEFINE_bool("quick", False, "Few and short tokens: does it all still run?")


class Programs:
    """What one implementation runs on a mesh, and ours on the same ranks stacked."""

    def __init__(self, shape: Shape, implementation: Implementation, over: Callable[..., Any]):
        make_plan = planner(shape, implementation, "uninitialized")
        self.plan = over(make_plan)
        # XLA hands one field around once more, to tell its types that all ranks have the same.
        self.bare_plan = over(
            lambda idx: dataclasses.replace(p := make_plan(idx), expert_load=p.kept)
        )
        self.dispatch, self.combine = over(jax_ep.dispatch), over(jax_ep.combine)
        self.exchange = over(exchange(make_plan))

    def calls(self, inputs: Inputs) -> dict[str, timing.Contender]:
        """Returns what is to be timed."""
        x, topk_idx, weights = inputs.as_tuple()
        plan = self.plan(topk_idx)
        rows = self.dispatch(x, plan)
        return {
            "plan": functools.partial(self.bare_plan, topk_idx),
            "dispatch": functools.partial(self.dispatch, x, plan),
            "combine": functools.partial(self.combine, rows, plan, weights),
            "all three": functools.partial(self.exchange, x, topk_idx, weights),
        }


def draw_inputs(shape: Shape, mesh: Mesh) -> Inputs:
    """Draws tokens on the devices, and choices and weights as ``make_inputs`` does."""
    drawn = make_inputs(dataclasses.replace(shape, hidden=1), 0.0).on(mesh)
    size = (shape.num_ranks, shape.num_tokens, shape.hidden)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    draw = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), size, shape.dtype), out_shardings=sharding
    )
    return dataclasses.replace(drawn, x=draw())


def check(programs: dict[Implementation, Programs], shape: Shape, inputs: Inputs) -> None:
    """Compares plans and rows with pure JAX's, and rows and sums with those of stacked ranks.

    Raises:
      AssertionError: anything differs.
    """
    x, topk_idx, weights = inputs.as_tuple()
    ours, xla = (programs[name] for name in _BOTH)
    plan, want = ours.plan(topk_idx), xla.plan(topk_idx)
    for field in PLAN_FIELDS:
        np.testing.assert_array_equal(getattr(plan, field), getattr(want, field), field)
    rows = ours.dispatch(x, plan)
    wrong = _num_wrong(rows, xla.dispatch(x, want), want.group_sizes)
    assert wrong == 0, f"{wrong} values of rows differ from pure JAX's"
    out = ours.combine(rows, plan, weights)
    # All ranks on one device: the same kernels, without a wire.
    device = jax.devices()[0]
    x, topk_idx, weights, rows, out = jax.device_put((x, topk_idx, weights, rows, out), device)
    alone = Programs(shape, "native", stacked)
    plan = alone.plan(topk_idx)
    alone_rows = alone.dispatch(x, plan)
    wrong = _num_wrong(rows, alone_rows, plan.group_sizes)
    assert wrong == 0, f"{wrong} values of rows differ from stacked ranks'"
    same = (
        np.asarray(out).tobytes() == np.asarray(alone.combine(alone_rows, plan, weights)).tobytes()
    )
    assert same, "sums differ from stacked ranks'"


@jax.jit
def _num_wrong(got: jax.Array, want: jax.Array, group_sizes: jax.Array) -> jax.Array:
    used = jnp.arange(got.shape[1]) < group_sizes.sum(-1, keepdims=True)
    return jnp.sum((got != want) & used[..., None], dtype=jnp.int32)


def _in_a_row(call: timing.Contender, batch: int) -> timing.Contender:
    def run() -> Any:
        result = None
        for _ in range(batch):
            result = call()
        return result

    return run


def measure(shape: Shape, mesh: Mesh) -> None:
    """Checks and times one shape; prints a table and a record of each contender."""
    small = dataclasses.replace(
        shape, num_tokens=min(shape.num_tokens, _ORACLE_TOKENS), hidden=_ORACLE_HIDDEN
    )
    check_ours(Expected(small, make_inputs(small, 0.0)), mesh, "native", "uninitialized")
    inputs = draw_inputs(shape, mesh)
    over = functools.partial(over_ranks, mesh=mesh)
    programs: dict[Implementation, Programs] = {name: Programs(shape, name, over) for name in _BOTH}
    check(programs, shape, inputs)
    kept = np.asarray(programs["native"].plan(inputs.topk_idx).kept)
    num_bytes = crossing_bytes(shape, np.asarray(inputs.topk_idx), kept)
    calls = {
        (name, op): call for name in _BOTH for op, call in programs[name].calls(inputs).items()
    }
    in_a_row = timing.compare(
        {key: _in_a_row(call, _batch.value) for key, call in calls.items()},
        repeats=_repeats.value,
    )
    alone = {key: timing.time_ranks(call, repeats=_repeats.value) for key, call in calls.items()}
    _print(shape, num_bytes, in_a_row, alone)


def _print(
    shape: Shape, num_bytes: int, in_a_row: dict[Any, timing.Times], alone: dict[Any, timing.Times]
) -> None:
    crossings = {"plan": 0, "dispatch": 1, "combine": 1, "all three": 2}
    link, table = _link.value, []
    for key, times in in_a_row.items():
        name, op = key
        each = np.asarray(times.seconds) / _batch.value
        crossing = num_bytes * crossings[op]
        rate = crossing / float(np.median(each)) / 1e9
        record = {
            "contender": f"{name}: {op}",
            **_percentiles("", each),
            **_percentiles("alone_", np.asarray(alone[key].seconds)),
            "bytes_each_way": crossing,
            "gb_per_s": round(rate, 2),
            "fraction_of_link": round(rate / link, 4),
        }
        table.append([*record.values()])
        timing.print_json({**shape.as_json(), "bench": "gpu mesh", "link_gb_per_s": link, **record})
    header = ("contender", "p50, us", "p99", "alone: p50", "p99", "bytes", "GB/s", "of the link")
    timing.print_table(f"{shape.name} on {shape.num_ranks} devices", header, table)


def _percentiles(name: str, seconds: np.ndarray) -> dict[str, float]:
    return {f"{name}p{p}_us": round(float(np.percentile(seconds, p)) * 1e6, 1) for p in (50, 99)}


def main(argv: Sequence[str]) -> None:
    del argv
    if _cpu_devices.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _cpu_devices.value)
    num_ranks = len(jax.local_devices())
    device = jax.devices()[0].device_kind
    timing.print_json({**timing.environment(), "device": device, "ranks": num_ranks})
    for name in _shapes.value:
        shape = dataclasses.replace(GPU_SHAPES[name], num_ranks=num_ranks)
        if shape.num_experts % num_ranks:
            raise app.UsageError(
                f"{shape.num_experts} experts are no multiple of {num_ranks} ranks."
            )
        if _quick.value:
            shape = dataclasses.replace(shape, num_tokens=16, hidden=64)
        measure(shape, make_mesh(num_ranks))


if __name__ == "__main__":
    app.run(main)
