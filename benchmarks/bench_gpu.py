"""Times plan, dispatch and combine of 8 ranks stacked on one GPU against a copy and pure JAX.

Every result is checked first. Bytes are the fewest that an op can move: dispatch reads a token once
for each rank that wants it and writes every used row, combine reads every used row and writes the
sums. A copy on the device in the same run is the ceiling.
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
from gpu_programs import OURS, ROUTINGS, XLA, Programs, check_small, draw_inputs, moved_bytes
from shapes import GPU_SHAPES, Shape

_COPY = "copy"
_FRACTION_GOALS = {"dispatch": 0.85, "combine": 0.80}
_DECODE_GOAL_US = 120.0
_PLAN_GOAL_US = 60.0
_XLA_GOAL = 4.0
_ZIPF_GOAL = 0.10
_GIB = 2**30

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


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out of one shape under one routing."""

    times: dict[str, timing.Times]
    num_bytes: dict[str, int]
    copy_rate: float

    def fraction(self, op: str) -> float:
        """Returns an op's bandwidth as a fraction of the copy's."""
        return self.num_bytes[op] / self.times[f"{OURS}: {op}"].median / self.copy_rate


def measure(programs: Programs, routing: str, setting: Setting) -> Measured:
    """Checks and times one shape under one routing; prints a table and a record of each call."""
    shape = programs.shape
    inputs = draw_inputs(shape, routing)
    check_small(shape, routing)
    programs.check(inputs)
    if routing == "uniform":
        programs.print_memory(inputs)
    kept = np.asarray(programs.plans[OURS](inputs.topk_idx).kept)
    num_bytes = moved_bytes(shape, np.asarray(inputs.topk_idx), kept)
    times = device_timing.compare(
        {_COPY: setting.copy, **programs.calls(inputs)},
        setting.flush,
        batch=setting.batch,
        repeats=setting.repeats,
    )
    copy_rate = setting.copied_bytes / times.pop(_COPY).median
    measured = Measured(times, num_bytes, copy_rate)
    _print_times(shape, routing, measured, float(kept.mean()))
    return measured


def _print_times(shape: Shape, routing: str, measured: Measured, kept_fraction: float) -> None:
    table, records = [], []
    ours = measured.times[OURS].median
    for name, spent in measured.times.items():
        # Whole exchanges are measured by the bytes of ours.
        num_bytes = measured.num_bytes.get(name.split(": ")[-1], 0)
        if ": " not in name:
            num_bytes = sum(measured.num_bytes.values())
        rate = num_bytes / spent.median
        record: dict[str, Any] = {
            "contender": name,
            "median_us": round(spent.median * 1e6, 2),
            "p10_us": round(spent.p10 * 1e6, 2),
            "p90_us": round(spent.p90 * 1e6, 2),
            "bytes": num_bytes,
            "gb_per_s": round(rate / 1e9, 1),
            "fraction_of_copy": round(rate / measured.copy_rate, 4),
        }
        over_ours = f"{spent.median / ours:.2f}" if ": " not in name else "-"
        table.append([*record.values(), over_ours])
        records.append(record)
    copy_gb = measured.copy_rate / 1e9
    kept = f"{kept_fraction:.1%} kept"
    timing.print_table(
        f"{shape.name}, {routing} routing, {kept}; a copy moves {copy_gb:.0f} GB/s",
        ("contender", "us", "p10", "p90", "bytes", "GB/s", "of copy", "/ ours"),
        table,
    )
    case = {**shape.as_json(), "routing": routing, "bench": "gpu", "kept_fraction": kept_fraction}
    for record in records:
        timing.print_json({**case, "copy_gb_per_s": round(copy_gb, 1), **record})


def print_goals(shape: Shape, by_routing: dict[str, Measured]) -> None:
    """Prints what was to be reached on a shape, and what was."""
    uniform, zipf = by_routing["uniform"], by_routing["zipf"]
    ours = uniform.times[OURS].median
    goals: list[tuple[str, str, float, bool]] = []
    if "decode" in shape.name:
        spent = ours * 1e6
        goals.append(
            (
                "plan + dispatch + combine, us",
                f"<= {_DECODE_GOAL_US:g}",
                spent,
                spent <= _DECODE_GOAL_US,
            )
        )
    else:
        for op, goal in _FRACTION_GOALS.items():
            reached = uniform.fraction(op)
            goals.append((f"{op}, of the copy", f">= {goal}", reached, reached >= goal))
            ratio = uniform.fraction(op) / zipf.fraction(op)
            met = abs(ratio - 1) <= _ZIPF_GOAL
            goals.append((f"{op}, time per byte, zipf / uniform", f"1 +- {_ZIPF_GOAL}", ratio, met))
        for routing, measured in by_routing.items():
            spent = measured.times[f"{OURS}: plan"].median * 1e6
            met = spent <= _PLAN_GOAL_US
            goals.append((f"plan, {routing}, us", f"<= {_PLAN_GOAL_US:g}", spent, met))
        reached = uniform.times[XLA].median / ours
        goals.append((f"{XLA} / ours", f">= {_XLA_GOAL}", reached, reached >= _XLA_GOAL))
    rows = [[name, goal, f"{reached:.2f}", _met(met)] for name, goal, reached, met in goals]
    timing.print_table(f"goals on {shape.name}", ("what", "goal", "reached", "met"), rows)
    for name, goal, reached, met in goals:
        record = {"goal": name, "reach": goal, "reached": round(reached, 4), "met": met}
        timing.print_json({"shape": shape.name, "bench": "gpu goals", **record})


def _met(met: bool) -> str:
    return "yes" if met else "NO"


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
    shapes = [GPU_SHAPES[name] for name in _shapes.value]
    setting = Setting.of(_batch.value, _repeats.value, _GIB)
    if _quick.value:
        shapes = [dataclasses.replace(shape, num_tokens=16, hidden=64) for shape in shapes[:1]]
        setting = Setting.of(2, 2, 2**20)
    for shape in shapes:
        print(f"\n{shape.name}: {shape.source}")
        programs = Programs(shape)
        print_goals(shape, {routing: measure(programs, routing, setting) for routing in ROUTINGS})


if __name__ == "__main__":
    app.run(main)
