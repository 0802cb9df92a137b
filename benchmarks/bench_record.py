"""Times an exchange that is recorded beside one that is not: what `jax_ep.record` costs.

Both are the same compiled program, in turn. Only the program's run is timed: the switch, and the
reading of what was recorded, are once for as many steps as a user records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import timing
from absl import app, flags
from programs import exchange, make_inputs, make_mesh, over_ranks, planner
from shapes import DECODE, SMALL, TOKEN, Shape

import jax_ep

_repeats = flags.DEFINE_integer("repeats", 600, "Runs of each, in turn.", lower_bound=2)
_quick = flags.DEFINE_bool("quick", False, "A few runs: does it all still run?")

_CALLS = 3
"""Plan, dispatch and combine."""


def time_in_turn(program: Any, operands: Sequence[Any], repeats: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each run, recorded and not; which comes first takes turns too."""
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for turn in range(repeats):
        for name in ("off", "on") if turn % 2 else ("on", "off"):
            seconds[name].append(_time(program, operands, is_recorded=name == "on"))
    return {name: np.array(spent) for name, spent in seconds.items()}


def _time(program: Any, operands: Sequence[Any], *, is_recorded: bool) -> float:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*operands))
        return time.perf_counter() - start

    # Either finds the caches as the switch has left them.
    with jax_ep.record() as trace:
        spent = run() if is_recorded else 0.0
    # On GPUs the streams' part is recorded too.
    assert np.sum(trace.calls()["fabric"] != "streams") == _CALLS * is_recorded
    return spent if is_recorded else run()


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """Returns what the exchange of a shape takes, in ms, and pairs of runs compared."""
    mesh = make_mesh(shape.num_ranks)
    per_rank = exchange(planner(shape, "native", "uninitialized"))
    operands = make_inputs(shape, 0.0).on(mesh).as_tuple()
    program = over_ranks(per_rank, mesh).lower(*operands).compile()
    time_in_turn(program, operands, 2)
    spent = time_in_turn(program, operands, repeats)
    low, median, high = np.quantile(spent["on"] / spent["off"], [0.25, 0.5, 0.75])
    quiet = {name: np.quantile(column, 0.25) for name, column in spent.items()}
    return {
        **{f"{name}_ms": round(1e3 * float(np.median(spent[name])), 4) for name in spent},
        "ratio_p25": round(float(low), 4),
        "ratio_p50": round(float(median), 4),
        "ratio_p75": round(float(high), 4),
        "ratio_of_p25s": round(float(quiet["on"] / quiet["off"]), 4),
        "runs": repeats,
    }


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    timing.print_json(timing.environment())
    repeats = 4 if _quick.value else _repeats.value
    measured = {shape: measure(shape, repeats) for shape in (TOKEN, DECODE, SMALL)}
    rows = [[shape.name, *columns.values()] for shape, columns in measured.items()]
    header = ("shape", *measured[SMALL])
    timing.print_table("an exchange recorded, by the one before or after that is not", header, rows)
    for shape, columns in measured.items():
        timing.print_json({"bench": "record", **shape.as_json(), **columns})


if __name__ == "__main__":
    app.run(main)
