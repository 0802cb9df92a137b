"""Times plan, dispatch and combine of 8 ranks stacked on one GPU against a copy and pure JAX.

Every result is checked first, the L2 cache is flushed before each call, and a copy on the device in
the same run is the ceiling. Bytes are those of rows that an op has to move: ``strict`` on one
device, which reads a token once for all of its rows; ``between`` devices, where each rank that
wants a token reads it. What is reached stands beside what an H100 is to reach.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Sequence
from typing import Any

import device_timing
import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags
from gpu_goals import Measured, print_goals
from gpu_programs import (
    OURS,
    ROUTINGS,
    XLA,
    Moved,
    Programs,
    draw_inputs,
    draw_tokens,
    moved_bytes,
)
from shapes import GPU_SHAPES, Shape

_COPY = "copy"
_GIB = 2**30
# Sums of float16 are rounded by other instructions than those of bfloat16.
_HALF_SHAPE = "wide"

_shapes = flags.DEFINE_multi_enum("shapes", [*GPU_SHAPES], [*GPU_SHAPES], "What to run.")
_repeats = flags.DEFINE_integer("repeats", 15, "Runs of each contender.", lower_bound=1)
_batch = flags.DEFINE_integer("batch", 10, "Calls in a run.", lower_bound=1)
_quick = flags.DEFINE_bool(
    "quick", False, "Small ranks, a few runs, on any platform: does it all still run?"
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    flush: device_timing.Flush
    copy: timing.Contender
    copied_bytes: int
    batch: int
    repeats: int

    @classmethod
    def of(cls, batch: int, repeats: int, num_bytes: int) -> Setting:
        source = jnp.ones((num_bytes,), jnp.uint8)
        copy = functools.partial(jax.jit(jnp.copy), source)
        return cls(device_timing.Flush(num_bytes), copy, 2 * num_bytes, batch, repeats)


def measure(
    shape: Shape,
    routing: str,
    contenders: dict[str, device_timing.Steps],
    kept: np.ndarray,
    topk_idx: np.ndarray,
    setting: Setting,
) -> Measured:
    """Times contenders of one shape under one routing; prints a table and a record of each."""
    moved = moved_bytes(shape, topk_idx, kept)
    times = device_timing.compare(
        {_COPY: [setting.copy], **contenders},
        setting.flush,
        batch=setting.batch,
        repeats=setting.repeats,
    )
    copy_rate = setting.copied_bytes / times.pop(_COPY).median
    whole = Moved(*(a + b for a, b in zip(moved["dispatch"], moved["combine"], strict=True)))
    # Whole exchanges, also of others, are measured by the bytes of ours.
    all_moved = {name: moved.get(name, Moved(0, 0) if name == "plan" else whole) for name in times}
    measured = Measured(times, all_moved, copy_rate)
    _print_times(shape, routing, measured, float(kept.mean()))
    return measured


def _print_times(shape: Shape, routing: str, measured: Measured, kept_fraction: float) -> None:
    table = []
    copy_gb = measured.copy_rate / 1e9
    case = {**shape.as_json(), "routing": routing, "bench": "gpu", "kept_fraction": kept_fraction}
    for name, spent in measured.times.items():
        moved = measured.moved[name]
        rates = [num_bytes / spent.median for num_bytes in moved]
        record: dict[str, Any] = {
            "contender": name,
            "median_us": round(spent.median * 1e6, 2),
            "p10_us": round(spent.p10 * 1e6, 2),
            "p90_us": round(spent.p90 * 1e6, 2),
            "strict_bytes": moved.strict,
            "strict_fraction_of_copy": round(rates[0] / measured.copy_rate, 4),
            "between_bytes": moved.between,
            "between_fraction_of_copy": round(rates[1] / measured.copy_rate, 4),
        }
        table.append([*record.values()])
        timing.print_json({**case, "copy_gb_per_s": round(copy_gb, 1), **record})
    kept = f"{kept_fraction:.1%} kept"
    timing.print_table(
        f"{shape.name}, {routing} routing, {kept}; a copy moves {copy_gb:.0f} GB/s",
        ("contender", "us", "p10", "p90", "strict", "of copy", "between", "of copy"),
        table,
    )


def print_memory(programs: Programs, plan_bytes: int, args: tuple[Any, ...]) -> None:
    """Prints what compiled exchanges take besides their arguments, and what ours may take."""
    shape = programs.shape
    out = shape.num_ranks * shape.num_tokens * shape.row_bytes
    rows = shape.num_ranks * shape.capacity * shape.row_bytes
    allowed = out + rows + plan_bytes + shape.num_ranks * out
    table = []
    for name in (OURS, XLA):
        stats = programs.exchanges[name].lower(*args).compile().memory_analysis()
        record = {"temporary": stats.temp_size_in_bytes, "output": stats.output_size_in_bytes}
        met = ("yes" if sum(record.values()) <= allowed else "NO") if name == OURS else "-"
        table.append([name, *record.values(), met])
        timing.print_json({**shape.as_json(), "bench": "gpu memory", "contender": name, **record})
    goal = f"<= {allowed}"
    timing.print_table("memory in bytes", ("program", "temporary", "output", goal), table)


def run(shape: Shape, setting: Setting) -> None:
    """Checks and times whole exchanges and ops of a shape under every routing."""
    print(f"\n{shape.name}: {shape.source}")
    programs, x, by_routing = Programs(shape), draw_tokens(shape), {}
    for routing in ROUTINGS:
        programs.small.check(routing)
        inputs = draw_inputs(shape, routing, x)
        programs.check_ops(inputs)
        programs.check_exchanges(inputs)
        plan = programs.plans[OURS](inputs.topk_idx)
        if not by_routing:
            plan_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(plan))
            print_memory(programs, plan_bytes, inputs.as_tuple())
        contenders = {**programs.whole(inputs), **programs.ops(inputs)}
        kept, topk_idx = np.asarray(plan.kept), np.asarray(inputs.topk_idx)
        by_routing[routing] = measure(shape, routing, contenders, kept, topk_idx, setting)
    print_goals(shape, by_routing)


def run_half(shape: Shape, setting: Setting) -> None:
    """Checks and times the ops of a shape in float16."""
    shape = dataclasses.replace(shape, name=f"{shape.name}-float16", dtype=np.float16)
    programs = Programs(shape)
    programs.small.check("uniform")
    inputs = draw_inputs(shape, "uniform", draw_tokens(shape))
    programs.check_ops(inputs)
    kept = np.asarray(programs.plans[OURS](inputs.topk_idx).kept)
    topk_idx = np.asarray(inputs.topk_idx)
    measure(shape, "uniform", programs.ops(inputs), kept, topk_idx, setting)


def _gpu() -> dict[str, str]:
    """Names the device, and the driver where there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        driver = "none"
    return {"device": jax.devices()[0].device_kind, "driver": driver.strip()}


def main(argv: Sequence[str]) -> None:
    del argv
    timing.print_json({**timing.environment(), **_gpu()})
    setting = Setting.of(_batch.value, _repeats.value, _GIB)
    shapes = {name: GPU_SHAPES[name] for name in _shapes.value}
    if _quick.value:
        small = {"num_tokens": 16, "hidden": 64}
        shapes = {name: dataclasses.replace(shape, **small) for name, shape in shapes.items()}
        setting = Setting.of(2, 2, 2**20)
    for shape in shapes.values():
        run(shape, setting)
    if _HALF_SHAPE in shapes:
        run_half(shapes[_HALF_SHAPE], setting)


if __name__ == "__main__":
    app.run(main)
