"""Times plan + dispatch + combine over 8 CPU devices against the copy floor and pure JAX rivals.

Every result is checked first. All contenders of a case run interleaved, so read ratios within a
case rather than milliseconds across cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import ceiling
import jax
import numpy as np
import timing
from absl import app, flags
from baselines import baselines
from checks import Expected, check_baseline, check_ours
from jax.sharding import Mesh
from programs import (
    AXIS,
    Implementation,
    Inputs,
    Tail,
    baseline_exchange,
    exchange,
    make_inputs,
    make_mesh,
    over_ranks,
    planner,
)
from shapes import EXCHANGE_SHAPES, Shape

import jax_ep

_NUM_RANKS = 8
_FLOOR = "floor"
_ROUTINGS = {"uniform": 0.0, "zipf": 0.65}
_BASELINES = ("all_to_all, factor 2", "all_to_all, no drops", "all_gather")
# Time over the floor's, at most.
_FLOOR_GOALS = {"small": 2.5, "decode": 1.2, "large": 1.2}
# A rival's time over ours, at least.
_RIVAL_GOALS = {"all_to_all, factor 2": 2.5, "all_to_all, no drops": 20.0}
_SLOWEST_RANK_SECONDS = 3.0
_COLUMNS = {
    "cpu_ms": "CPU ms",
    "slowest_rank_ms": "slowest rank",
    "kept_fraction": "kept",
    "gb_per_s": "GB/s",
    "fraction_of_ceiling": "of ceiling",
    "over_floor": "/ floor",
    "over_ours": "/ ours",
}

_shapes = flags.DEFINE_multi_enum("shapes", [*EXCHANGE_SHAPES], [*EXCHANGE_SHAPES], "What to run.")
_routings = flags.DEFINE_multi_enum(
    "routings", [*_ROUTINGS], [*_ROUTINGS], "Equal chances for all experts, or Zipf 0.65."
)
_implementations = flags.DEFINE_multi_enum(
    "implementations", ["native", "xla"], ["native", "xla"], "The first is 'ours' in ratios."
)
_tails = flags.DEFINE_multi_enum(
    "tails", ["uninitialized", "zero"], ["uninitialized", "zero"], "Of every implementation."
)
_rivals = flags.DEFINE_multi_enum("rivals", _BASELINES, _BASELINES, "Exchanges in pure JAX.")
_repeats = flags.DEFINE_integer("repeats", 50, "Rounds of each interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "One small case, a few rounds: does it all still run?")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to exchange, checked and compiled, and how many choices it keeps."""

    call: timing.Contender
    num_kept: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape under one routing, and what is to be timed on it."""

    shape: Shape
    routing: str
    inputs: Inputs
    mesh: Mesh
    contenders: dict[str, Contender]

    @classmethod
    def of(cls, shape: Shape, routing: str, mesh: Mesh) -> Case:
        inputs = make_inputs(shape, _ROUTINGS[routing])
        expected = Expected(shape, inputs)
        on_devices = inputs.on(mesh)

        def compiled(per_rank: Callable[..., Any]) -> timing.Contender:
            program = over_ranks(per_rank, mesh)
            return lambda: program(*on_devices.as_tuple())

        contenders = {_FLOOR: Contender(ceiling.make_floor(shape), shape.num_choices)}
        for implementation, tail in _variants():
            check_ours(expected, mesh, implementation, tail)
            call = compiled(exchange(planner(shape, implementation, tail)))
            contenders[_name(implementation, tail)] = Contender(call, expected.num_kept)
        rivals = baselines(shape, AXIS)
        for name in _rivals.value:
            num_kept = check_baseline(expected, mesh, rivals[name])
            contenders[name] = Contender(compiled(baseline_exchange(rivals[name])), num_kept)
        return cls(shape, routing, on_devices, mesh, contenders)

    def as_json(self) -> dict[str, int | str]:
        return {**self.shape.as_json(), "routing": self.routing}

    @property
    def title(self) -> str:
        shape = self.shape
        return (
            f"{shape.name}, {self.routing} routing: R={shape.num_ranks} T={shape.num_tokens} "
            f"H={shape.hidden} E={shape.num_experts} K={shape.num_topk} "
            f"{np.dtype(shape.dtype).name}, capacity {shape.capacity}"
        )


def time_whole(case: Case, repeats: int) -> dict[str, timing.Times]:
    """Times plan, dispatch and combine as one program; prints a table and a record of each."""
    calls = {name: contender.call for name, contender in case.contenders.items()}
    times = timing.compare(calls, repeats=repeats)
    records = []
    for name, contender in case.contenders.items():
        slowest = _slowest_rank(name, contender, times[name], repeats)
        records.append(
            {
                "contender": name,
                **times[name].as_json(),
                "slowest_rank_ms": slowest and round(slowest.median * 1e3, 4),
                **_ratios(case, times, name),
            }
        )
    timing.print_table(
        case.title,
        ("plan + dispatch + combine", "ms (p10-p90)", *_COLUMNS.values()),
        [[r["contender"], times[r["contender"]], *(r[key] for key in _COLUMNS)] for r in records],
    )
    for record in records:
        timing.print_json({**case.as_json(), "bench": "exchange", **record})
    return times


def _ratios(case: Case, times: dict[str, timing.Times], name: str) -> dict[str, float]:
    spent, num_kept = times[name].median, case.contenders[name].num_kept
    rate = ceiling.moved_bytes(num_kept, case.shape) / spent
    ceiling_rate = ceiling.moved_bytes(case.shape.num_choices, case.shape) / times[_FLOOR].median
    return {
        "kept_fraction": round(num_kept / case.shape.num_choices, 4),
        "gb_per_s": round(rate / 1e9, 3),
        "fraction_of_ceiling": round(rate / ceiling_rate, 4),
        "over_floor": round(spent / times[_FLOOR].median, 3),
        "over_ours": round(spent / times[_ours()].median, 3),
    }


def time_apart(case: Case, repeats: int) -> None:
    """Times plan, dispatch and combine each as its own program, beside half of the floor."""
    calls: dict[str, timing.Contender] = {_FLOOR: case.contenders[_FLOOR].call}
    memory = {}
    for implementation, tail in _variants():
        name = _name(implementation, tail)
        ops, sizes = _compile_apart(case, planner(case.shape, implementation, tail))
        calls |= {f"{name}: {op}": call for op, call in ops.items()}
        memory |= {f"{name}: {op}": size for op, size in sizes.items()}
    times = timing.compare(calls, repeats=repeats)
    copy = times.pop(_FLOOR).median / 2
    timing.print_table(
        case.title,
        ("each op as a program", "ms (p10-p90)", "CPU ms", "/ one plain copy"),
        [
            [name, spent, f"{spent.cpu_median * 1e3:.2f}", f"{spent.median / copy:.2f}"]
            for name, spent in times.items()
        ],
    )
    timing.print_table(
        "compiled memory in bytes, on each device",
        ("op", *next(iter(memory.values())), "temporary <= output + plan"),
        [[name, *size.values(), _met(_fits(size))] for name, size in memory.items()],
    )
    for name, spent in times.items():
        record = {"op": name, **spent.as_json(), "over_copy": round(spent.median / copy, 3)}
        timing.print_json({**case.as_json(), "bench": "ops", **record, **memory.get(name, {})})


def print_goals(case: Case, times: dict[str, timing.Times]) -> None:
    """Prints what was to be reached on a case, and what was."""
    ours = times[_ours()].median
    goals = []
    if goal := _FLOOR_GOALS.get(case.shape.name):
        reached = ours / times[_FLOOR].median
        goals.append([f"{_ours()} / {_FLOOR}", f"<= {goal}", f"{reached:.2f}", reached <= goal])
    for name, goal in _RIVAL_GOALS.items():
        if name in times:
            reached = times[name].median / ours
            goals.append([f"{name} / {_ours()}", f">= {goal}", f"{reached:.1f}", reached >= goal])
    rows = [[*goal, _met(met)] for *goal, met in goals]
    timing.print_table(f"goals on {case.shape.name}", ("ratio", "goal", "reached", "met"), rows)


def _variants() -> list[tuple[Implementation, Tail]]:
    """Lists what to run of ours: ``"xla"`` once, as the tail makes no difference to it."""
    return [
        (cast("Implementation", implementation), cast("Tail", tail))
        for implementation in _implementations.value
        for tail in _tails.value[: None if implementation == "native" else 1]
    ]


def _name(implementation: Implementation, tail: Tail) -> str:
    return f"native, tail {tail}" if implementation == "native" else implementation


def _ours() -> str:
    return _name(*_variants()[0])


def _slowest_rank(
    name: str, contender: Contender, times: timing.Times, repeats: int
) -> timing.Times | None:
    if name == _FLOOR:
        return None
    affordable = max(3, int(_SLOWEST_RANK_SECONDS / times.median))
    return timing.time_ranks(contender.call, repeats=min(repeats, affordable), warmup=1)


def _compile_apart(
    case: Case, make_plan: Callable[[jax.Array], jax_ep.Plan]
) -> tuple[dict[str, timing.Contender], dict[str, dict[str, int]]]:
    """Compiles the three ops; returns calls of them, and the memory of the two that move rows."""
    x, topk_idx, weights = case.inputs.as_tuple()
    plan_op = over_ranks(make_plan, case.mesh)
    plan = jax.block_until_ready(plan_op(topk_idx))
    dispatch = over_ranks(jax_ep.dispatch, case.mesh).lower(x, plan).compile()
    rows = jax.block_until_ready(dispatch(x, plan))
    combine = over_ranks(jax_ep.combine, case.mesh).lower(rows, plan, weights).compile()
    plan_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(plan)) // case.shape.num_ranks
    memory = {"dispatch": dispatch.memory_analysis(), "combine": combine.memory_analysis()}
    sizes = {
        op: {
            "temporary": stats.temp_size_in_bytes,
            "output": stats.output_size_in_bytes,
            "plan": plan_bytes,
        }
        for op, stats in memory.items()
    }
    calls: dict[str, timing.Contender] = {
        "plan": lambda: plan_op(topk_idx),
        "dispatch": lambda: dispatch(x, plan),
        "combine": lambda: combine(rows, plan, weights),
    }
    return calls, sizes


def _fits(size: dict[str, int]) -> bool:
    return size["temporary"] <= size["output"] + size["plan"]


def _met(met: bool) -> str:
    return "yes" if met else "NO"


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _NUM_RANKS)
    timing.print_json(timing.environment())
    mesh = make_mesh(_NUM_RANKS)
    shapes, routings, repeats = _shapes.value, _routings.value, _repeats.value
    if _quick.value:
        shapes, routings, repeats = shapes[:1], routings[:1], min(repeats, 3)
    for shape in map(EXCHANGE_SHAPES.__getitem__, shapes):
        print(f"\n{shape.name}: {shape.source}")
        for routing in routings:
            case = Case.of(shape, routing, mesh)
            times = time_whole(case, repeats)
            time_apart(case, repeats)
            if routing == "uniform":
                print_goals(case, times)


if __name__ == "__main__":
    app.run(main)
