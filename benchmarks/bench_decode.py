"""Times a decoding step's exchange, one token a rank, against three calls in which ranks only meet.

One token a rank is next to nothing to move: what such an exchange takes is that three native calls
are called on each device, and that in each all ranks come together and let each other go. The floor
is just that: the same program, plan, dispatch and combine, of one number and one choice a rank. It
has as many arguments and results, so that JAX and XLA have as much to do, and three calls on the
same fabric, each waiting for the one before it. Between meetings a rank places 8 choices, copies 4
bytes and adds them up. (Three dispatches by a plan made beforehand are no lower floor: to hand the
plan's 17 arrays to a program takes longer than the call that it saves.) What an exchange takes
beyond the floor is its own work: more choices to place, rows of real width, sums of several rows.

Beside them: a program of the same arguments that calls nothing, which is JAX's and XLA's part, and
the exchange in pure JAX. Results are checked first, and all contenders run interleaved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags
from checks import Expected, check_ours
from jax.sharding import Mesh
from programs import exchange, make_inputs, make_mesh, over_ranks, planner
from shapes import TOKEN, Shape

_repeats = flags.DEFINE_integer("repeats", 2000, "Rounds of the interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "A few rounds: does it all still run?")

# Nothing is dropped while a sequence is written: there is room for all choices of all ranks.
SHAPE = dataclasses.replace(TOKEN, capacity_factor=float(TOKEN.num_ranks))
MEETING = dataclasses.replace(
    SHAPE,
    name="meeting",
    hidden=1,
    num_experts=TOKEN.num_ranks,
    num_topk=1,
    dtype=np.float32,
    source="the least that is an exchange",
)
_OURS, _FLOOR = "plan + dispatch + combine", "three meetings"
# Time over the floor's, at most.
_GOAL = 1.5


def make_contenders(mesh: Mesh) -> dict[str, timing.Contender]:
    """Checks the exchange and its floor, and compiles all that is to be timed."""
    operands = {}
    for shape in (SHAPE, MEETING):
        inputs = make_inputs(shape, 0.0)
        check_ours(Expected(shape, inputs), mesh, "native", "uninitialized")
        operands[shape.name] = inputs.on(mesh).as_tuple()

    def compiled(per_rank: Callable[..., jax.Array], shape: Shape) -> timing.Contender:
        program = over_ranks(per_rank, mesh)
        return lambda: program(*operands[shape.name])

    def native(shape: Shape) -> timing.Contender:
        return compiled(exchange(planner(shape, "native", "uninitialized")), shape)

    return {
        _FLOOR: native(MEETING),
        _OURS: native(SHAPE),
        'the same, "xla"': compiled(exchange(planner(SHAPE, "xla", "zero")), SHAPE),
        "a program without calls": compiled(_call_nothing, MEETING),
    }


def _call_nothing(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """Uses all that an exchange is given: XLA is not given what nobody uses."""
    return x * topk_weights + topk_idx.astype(jnp.float32)


def report(shape: Shape, times: dict[str, timing.Times]) -> None:
    """Prints a table, a record of each contender, and the goal."""
    floor = times[_FLOOR]
    rows = []
    for name, spent in times.items():
        columns = {
            "p50_ms": round(1e3 * spent.median, 4),
            "p99_ms": round(1e3 * spent.p99, 4),
            "over_floor": round(spent.median / floor.median, 3),
            "over_floor_p99": round(spent.p99 / floor.p99, 3),
        }
        rows.append([name, spent, *columns.values()])
        record = {"bench": "decode", **shape.as_json(), "contender": name, **spent.as_json()}
        timing.print_json(record | columns)
    title = (
        f"one token on each of {shape.num_ranks} ranks, hidden {shape.hidden}, "
        f"{shape.num_experts} experts, {shape.num_topk} choices, {np.dtype(shape.dtype).name}"
    )
    header = ("", "ms (p10-p90)", "p50", "p99", "/ floor's p50", "/ floor's p99")
    timing.print_table(title, header, rows)
    reached = times[_OURS].median / floor.median
    met = "yes" if reached <= _GOAL else "NO"
    print(f"{_OURS} / {_FLOOR}: {reached:.2f}; goal <= {_GOAL:g}: {met}")


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SHAPE.num_ranks)
    timing.print_json(timing.environment())
    print(f"\n{SHAPE.name}: {SHAPE.source}")
    contenders = make_contenders(make_mesh(SHAPE.num_ranks))
    report(SHAPE, timing.compare(contenders, repeats=5 if _quick.value else _repeats.value))


if __name__ == "__main__":
    app.run(main)
