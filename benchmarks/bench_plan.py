"""Times ``make_plan`` for 64 ranks stacked on one device, with a capacity and without drops."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
import timing
from absl import app, flags
from checks import PLAN_FIELDS, oracle
from programs import AXIS, Implementation, make_inputs
from shapes import PLAN64, Shape

import jax_ep

Key = tuple[str, str, int | None]
"""Implementation, routing and capacity."""

_GOAL_MS = 15.0
_ZIPF_EXPONENTS = {"uniform": 0.0, "zipf": 0.65}
# The oracle's loops are slow: it sees the same ranks and experts with fewer tokens.
_ORACLE_TOKENS = 32

_implementations = flags.DEFINE_multi_enum(
    "implementations", ["native", "xla"], ["native", "xla"], "What to run."
)
_repeats = flags.DEFINE_integer("repeats", 50, "Rounds of the interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "Few tokens, a few rounds: does it all still run?")


def make_planner(
    shape: Shape, implementation: Implementation, capacity: int | None
) -> Callable[[Any], jax_ep.Plan]:
    """Compiles the plans of all ranks on one device."""
    make_plan = functools.partial(
        jax_ep.make_plan,
        num_experts=shape.num_experts,
        axis_name=AXIS,
        capacity=capacity,
        implementation=implementation,
    )
    return jax.jit(jax.vmap(make_plan, axis_name=AXIS))


def check(
    shape: Shape, implementation: Implementation, capacity_factor: float | None, exponent: float
) -> None:
    """Compares every public field with the oracle's, on fewer tokens.

    Raises:
      AssertionError: a field differs.
    """
    shape = dataclasses.replace(shape, num_tokens=_ORACLE_TOKENS, hidden=1)
    capacity = shape.capacity if capacity_factor else None
    topk_idx = make_inputs(shape, exponent).topk_idx
    plan = make_planner(shape, implementation, capacity)(topk_idx)
    want = oracle.plan(topk_idx, shape.num_experts, capacity)
    for name in PLAN_FIELDS:
        got = np.asarray(getattr(plan, name))
        np.testing.assert_array_equal(got, np.broadcast_to(getattr(want, name), got.shape), name)


def check_alike(plans: dict[str, Callable[[], jax_ep.Plan]]) -> None:
    """Compares every public field of all implementations with each other, at full size.

    Raises:
      AssertionError: a field differs.
    """
    first, *others = (call() for call in plans.values())
    for other in others:
        for name in PLAN_FIELDS:
            np.testing.assert_array_equal(getattr(other, name), getattr(first, name), name)


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    # Plans see no tokens: narrow ones cost the least to draw.
    shape, repeats = dataclasses.replace(PLAN64, hidden=1), _repeats.value
    if _quick.value:
        shape, repeats = dataclasses.replace(shape, num_tokens=64), min(repeats, 3)
    print(f"\n{shape.name}: {shape.source}")
    calls: dict[Key, timing.Contender] = {}
    for routing, exponent in _ZIPF_EXPONENTS.items():
        topk_idx = jax.device_put(make_inputs(shape, exponent).topk_idx)
        for factor in (shape.capacity_factor, None):
            capacity = shape.capacity if factor else None
            plans = {}
            for implementation in cast("list[Implementation]", _implementations.value):
                check(shape, implementation, factor, exponent)
                planner = make_planner(shape, implementation, capacity)
                plans[implementation] = functools.partial(planner, topk_idx)
                calls[implementation, routing, capacity] = plans[implementation]
            check_alike(plans)
    report(shape, timing.compare(calls, repeats=repeats))


def report(shape: Shape, times: dict[Key, timing.Times]) -> None:
    """Prints a table and a record of each case."""
    rows = []
    for (implementation, routing, capacity), spent in times.items():
        goal = spent.median * 1e3 <= _GOAL_MS
        met = ("yes" if goal else "NO") if implementation == "native" else "-"
        cpu = f"{spent.cpu_median * 1e3:.1f}"
        rows.append([implementation, routing, capacity or "no drops", spent, cpu, met])
    title = (
        f"make_plan of R={shape.num_ranks} stacked ranks, T={shape.num_tokens} "
        f"K={shape.num_topk} E={shape.num_experts}"
    )
    timing.print_table(
        title,
        ("plan", "routing", "capacity", "ms (p10-p90)", "CPU ms", f"<= {_GOAL_MS:g} ms"),
        rows,
    )
    for (implementation, routing, capacity), spent in times.items():
        case = {**shape.as_json(), "capacity": capacity, "hidden": None, "routing": routing}
        timing.print_json({**case, "bench": "plan", "contender": implementation, **spent.as_json()})


if __name__ == "__main__":
    app.run(main)
