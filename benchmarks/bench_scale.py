"""Times plan, dispatch and combine of more and more ranks that are stacked on one device.

What each costs a rank should not grow with their number. Results are checked. Then prints what
dispatch and combine of many ranks hold in memory between hosts, which should not grow either.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags
from programs import AXIS, Inputs, make_inputs, make_mesh, over_ranks, planner
from shapes import Shape

import jax_ep
from jax_ep import _fabrics, _wire
from jax_ep.testing import multiprocess

_NUM_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Milliseconds a rank, on two cores. Plans of many ranks read tables of ranks by experts.
_LIMITS = {"plan": {256: 0.3, 1024: 1.0}, "dispatch": {64: 2.0}, "combine": {64: 1.0}}

_MOST_ROUNDS = 2.0
"""Rounds of rows that an op may hold beside its operands and results: what goes and what comes."""

_MEMORY = Shape(
    name="memory64",
    num_ranks=64,
    num_tokens=256,
    hidden=1024,
    num_experts=256,
    num_topk=8,
    dtype=np.float32,
    capacity_factor=1.25,
    source="4 experts a rank as in DeepSeek-V3's training (https://arxiv.org/abs/2412.19437), few "
    "tokens, of which a row outweighs what the plan knows of it",
)

_FEW = dataclasses.replace(_MEMORY, name="memory8", num_ranks=8)

_max_ranks = flags.DEFINE_integer("max_ranks", _NUM_RANKS[-1], "Up to how many ranks.")
_repeats = flags.DEFINE_integer("repeats", 15, "Rounds of the interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "Few ranks, a few rounds: does it all still run?")


def shape_of(num_ranks: int) -> Shape:
    """Returns as much for each rank, and 4 experts on it, whatever their number."""
    return Shape(
        name=f"scale{num_ranks}",
        num_ranks=num_ranks,
        num_tokens=64,
        hidden=256,
        num_experts=4 * num_ranks,
        num_topk=8,
        dtype=np.float32,
        capacity_factor=1.25,
        source="8 choices, 4 experts a rank, tokens narrow enough for a thousand ranks in memory",
    )


def contenders(shape: Shape) -> dict[str, timing.Contender]:
    """Compiles the three, checks that they fit together, and binds what each takes."""
    inputs = Inputs(*jax.device_put(make_inputs(shape, 0.0).as_tuple()))

    def stacked(per_rank: Any) -> Any:
        return jax.jit(jax.vmap(per_rank, axis_name=AXIS))

    make_plan = stacked(
        functools.partial(
            jax_ep.make_plan,
            num_experts=shape.num_experts,
            axis_name=AXIS,
            capacity=shape.capacity,
            tail="uninitialized",
            implementation="native",
        )
    )
    dispatch, combine = stacked(jax_ep.dispatch), stacked(jax_ep.combine)
    plan = make_plan(inputs.topk_idx)
    rows = dispatch(inputs.x, plan)
    _check(inputs, plan, combine(rows, plan, inputs.topk_weights))
    return {
        "plan": lambda: make_plan(inputs.topk_idx),
        "dispatch": lambda: dispatch(inputs.x, plan),
        "combine": lambda: combine(rows, plan, inputs.topk_weights),
    }


def _check(inputs: Inputs, plan: jax_ep.Plan, out: jax.Array) -> None:
    """Experts that change nothing give each token back, as often as its choices were kept.

    Raises:
      AssertionError: some did not.
    """
    scale = np.where(plan.kept, inputs.topk_weights, 0).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(out, scale * inputs.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.sum(plan.group_sizes), np.sum(plan.kept))


def limit_of(op: str, num_ranks: int) -> float | None:
    """Returns the milliseconds a rank that an op may take, from some number of ranks on."""
    limits = [ms for ranks, ms in _LIMITS[op].items() if num_ranks >= ranks]
    return limits[-1] if limits else None


@multiprocess(1, _MEMORY.num_ranks, timeout=600)
def _analyze(file: str, shape: Shape) -> None:
    """Compiles both ops for a device each, in rounds as between hosts, and saves what XLA says."""
    _fabrics.FABRICS = tuple(f for f in _fabrics.FABRICS if f.name == "rounds")
    mesh = make_mesh(shape.num_ranks)

    def of_ranks(*sizes: int, dtype: Any = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.num_ranks, *sizes), dtype)

    choices = of_ranks(shape.num_tokens, shape.num_topk, dtype=jnp.int32)
    make_plan = planner(shape, "native", "uninitialized")
    plan = jax.eval_shape(over_ranks(make_plan, mesh), choices)
    weights = of_ranks(shape.num_tokens, shape.num_topk, dtype=jnp.float32)
    operands = {
        "dispatch": (of_ranks(shape.num_tokens, shape.hidden), plan),
        "combine": (of_ranks(shape.capacity, shape.hidden), plan, weights),
    }
    a_round = shape.num_ranks * _wire.room_of(plan._layout) * shape.row_bytes
    records = []
    for op, given in operands.items():
        program = over_ranks(getattr(jax_ep, op), mesh).lower(*given).compile()
        memory = program.memory_analysis()
        records.append(
            {
                "op": op,
                "operand_bytes": memory.argument_size_in_bytes,
                "result_bytes": memory.output_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "round_bytes": a_round,
            }
        )
    pathlib.Path(file).write_text(json.dumps(records))


def bench_memory(shape: Shape) -> None:
    """Prints what a rank holds while it exchanges between hosts."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "memory.json")
        _analyze(str(file), shape)
        records = json.loads(file.read_text())
    table = []
    for record in records:
        _, *sizes = record.values()
        rounds = record["temporary_bytes"] / record["round_bytes"]
        met = "yes" if rounds <= _MOST_ROUNDS else "NO"
        megabytes = (f"{size / 1e6:.2f}" for size in sizes)
        table.append([record["op"], *megabytes, f"{rounds:.2f}", f"{_MOST_ROUNDS:g}", met])
    timing.print_table(
        f"MB that one of {shape.num_ranks} ranks holds in rounds: {shape.source}",
        ("op", "operands", "results", "beside", "a round", "rounds", "at most", "met"),
        table,
    )
    for record in records:
        timing.print_json({**shape.as_json(), "bench": "scale memory", **record})


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    most, repeats = (16, 3) if _quick.value else (_max_ranks.value, _repeats.value)
    shapes = [shape_of(num_ranks) for num_ranks in _NUM_RANKS if num_ranks <= most]
    # One number of ranks after the other: all at once would not fit into memory.
    times = {shape: timing.compare(contenders(shape), repeats=repeats) for shape in shapes}
    table, records = [], []
    for shape, spent in times.items():
        for op, each in spent.items():
            per_rank = each.median * 1e3 / shape.num_ranks
            limit = limit_of(op, shape.num_ranks)
            met = "-" if limit is None else "yes" if per_rank <= limit else "NO"
            table.append([shape.num_ranks, op, each, f"{per_rank:.3f}", limit or "-", met])
            records.append({**shape.as_json(), "bench": "scale", "op": op, **each.as_json()})
    title = f"{shapes[0].source}: T={shapes[0].num_tokens} H={shapes[0].hidden}"
    header = ("ranks", "op", "ms (p10-p90)", "ms a rank", "at most", "met")
    timing.print_table(title, header, table)
    for record in records:
        timing.print_json(record)
    bench_memory(_FEW if _quick.value else _MEMORY)


if __name__ == "__main__":
    app.run(main)
