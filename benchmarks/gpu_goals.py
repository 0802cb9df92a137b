"""What a GPU is to reach, by what was measured on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import timing
from gpu_programs import COLD, OURS, XLA, Moved
from shapes import Shape

FRACTION_GOALS = {"dispatch": 0.90, "combine": 0.90, "scaled rows": 0.85, "row dots": 0.80}
DECODE_GOALS_US = {"narrow-decode": 30.0, "wide-decode": 115.0}
PLAN_GOAL_US = 60.0
XLA_GOAL = 4.0
ZIPF_GOAL = 0.10


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out of one shape under one routing; ops by name, whole exchanges likewise."""

    times: dict[str, timing.Times]
    moved: dict[str, Moved]
    copy_rate: float

    def microseconds(self, name: str) -> float:
        return self.times[name].median * 1e6

    def fraction(self, name: str) -> float:
        """Returns the bandwidth, by strict bytes, as a fraction of the copy's."""
        return self.moved[name].strict / self.times[name].median / self.copy_rate


class Goal(NamedTuple):
    """What was to be reached, and what was."""

    what: str
    reach: str
    reached: float
    met: bool


def goals(shape: Shape, by_routing: dict[str, Measured]) -> Iterator[Goal]:
    """Yields what was to be reached on a shape, and what was."""
    uniform, zipf = by_routing["uniform"], by_routing["zipf"]
    if (most := DECODE_GOALS_US.get(shape.name)) is not None:
        for name in (COLD, OURS):
            spent = uniform.microseconds(name)
            yield Goal(
                f"plan + dispatch + combine, us: {name}", f"<= {most:g}", spent, spent <= most
            )
        return
    for op, least in FRACTION_GOALS.items():
        reached = uniform.fraction(op)
        yield Goal(f"{op}, of the copy, strict bytes", f">= {least}", reached, reached >= least)
        ratio = reached / zipf.fraction(op)
        met = abs(ratio - 1) <= ZIPF_GOAL
        yield Goal(f"{op}, time per byte, zipf / uniform", f"1 +- {ZIPF_GOAL}", ratio, met)
    for routing, measured in by_routing.items():
        spent = measured.microseconds("plan")
        yield Goal(f"plan, {routing}, us", f"<= {PLAN_GOAL_US:g}", spent, spent <= PLAN_GOAL_US)
    reached = uniform.times[XLA].median / uniform.times[OURS].median
    yield Goal(f"{XLA} / {OURS}", f">= {XLA_GOAL}", reached, reached >= XLA_GOAL)


def print_goals(shape: Shape, by_routing: dict[str, Measured]) -> None:
    """Prints the goals of a shape as a table and a record of each."""
    rows = []
    for goal in goals(shape, by_routing):
        rows.append([goal.what, goal.reach, f"{goal.reached:.2f}", "yes" if goal.met else "NO"])
        record = {"goal": goal.what, "reach": goal.reach, "reached": round(goal.reached, 4)}
        timing.print_json(
            {"shape": shape.name, "bench": "gpu goals", **record, "met": bool(goal.met)}
        )
    timing.print_table(f"goals on {shape.name}", ("what", "goal", "reached", "met"), rows)
