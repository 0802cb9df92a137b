"""Times a whole expert layer, forward and backward, in several ways and under skewed routing.

Three questions: how many tokens a second, without drops and with; what of it is the exchange, and
what becomes of it beside a product that does not wait for it; and, between processes that each have
a core to themselves, what an overfull rank costs and balancing gains. Outputs are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import layer_picture
import layers
import numpy as np
import timing
from absl import app, flags
from jax.sharding import Mesh
from layer_programs import BURSTS, ROUTINGS, check, compile_way, draw, make_arrays, place
from programs import make_mesh, over_ranks
from shapes import PINNED, SMALL, Shape

import jax_ep
from jax_ep.testing import multiprocess

_GOAL_ROUTING, _PINNED_ROUTING = "Zipf 0.65", "Zipf 1.0"
_FFN_HIDDEN = {SMALL.name: 256, PINNED.name: 896}
_NATIVE, _BALANCED, _XLA = "native", "native, balanced", "xla"
_TRACE = "a trace"

_repeats = flags.DEFINE_integer("repeats", 15, "Runs of each way.", lower_bound=1)
_pinned = flags.DEFINE_integer("pinned", 8, "Routings of the pinned processes.", lower_bound=0)
_routings = flags.DEFINE_list(
    "routings", [*ROUTINGS, BURSTS], "Routings to draw; a trace, if given, comes besides."
)
_trace = flags.DEFINE_string(
    "trace", None, "Choices of steps [steps, tokens, num_topk], as the demo's --trace writes them."
)
_picture = flags.DEFINE_string("picture", None, "Where to draw it, a PNG.")
_quick = flags.DEFINE_bool("quick", False, "One small case, a few rounds: does it all still run?")


def choices_of(shape: Shape, routing: str) -> tuple[Shape, np.ndarray]:
    """Returns all ranks' choices, drawn, or the trace's last step, repeated if it is short.

    A trace has as many experts, and choices a token, as it has: the shape says so.
    """
    if routing != _TRACE or _trace.value is None:
        return shape, draw(shape, routing)
    step = np.load(_trace.value)[-1]
    num_experts = -(-int(step.max() + 1) // shape.num_ranks) * shape.num_ranks
    shape = dataclasses.replace(shape, num_experts=num_experts, num_topk=step.shape[-1])
    rows = np.resize(step, (shape.num_ranks * shape.num_tokens, shape.num_topk))
    return shape, rows.reshape(shape.num_ranks, shape.num_tokens, -1).astype(np.int32)


def bench_routing(
    shape: Shape, topk_idx: np.ndarray, routing: str, mesh: Mesh, repeats: int
) -> list[dict[str, Any]]:
    """Times every way under one routing; returns a record of each."""
    arrays = place(mesh, make_arrays(shape, topk_idx, _FFN_HIDDEN[shape.name]))
    programs = {n: compile_way(way, mesh, arrays) for n, way in layers.ways(shape).items()}
    want = programs["dense"](*arrays)
    dropped = {}
    for name, program in programs.items():
        result = program(*arrays)
        dropped[name] = float(np.mean(result[2]))
        if dropped[name] == 0:
            check(shape, name, result, want)
    calls = {name: (lambda f=f: f(*arrays)) for name, f in programs.items()}
    load = np.bincount(topk_idx.ravel(), minlength=shape.num_experts)
    by_rank = load.reshape(shape.num_ranks, -1).sum(axis=1)
    num_tokens = shape.num_ranks * shape.num_tokens
    return [
        {
            "bench": "layer",
            "routing": routing,
            "way": name,
            **shape.as_json(),
            "ffn_hidden": _FFN_HIDDEN[shape.name],
            "busiest_over_mean": round(float(by_rank.max() / by_rank.mean()), 3),
            "dropped": round(dropped[name], 4),
            "tokens_per_s": round(num_tokens / spent.median),
            "temp_mb": round(programs[name].memory_analysis().temp_size_in_bytes / 1e6, 1),
            "p99_ms": round(float(np.percentile(spent.seconds, 99)) * 1e3, 3),
            **spent.as_json(),
        }
        for name, spent in timing.compare(calls, repeats=repeats).items()
    ]


def bench_parts(shape: Shape, mesh: Mesh, repeats: int) -> list[dict[str, Any]]:
    """Times the exchange by itself, and beside a product that does not wait for it."""
    width = 4 * shape.hidden
    x, topk_idx, topk_weights, _ = make_arrays(shape, draw(shape, _GOAL_ROUTING), 1)
    square = np.random.default_rng(2).standard_normal((shape.num_ranks, width, width), np.float32)
    arrays = place(mesh, (x, topk_idx, topk_weights, square))

    def exchange(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx, num_experts=shape.num_experts, axis_name="expert", tail="uninitialized"
        )
        rows = jax.lax.optimization_barrier(jax_ep.dispatch(x, plan))
        return jax_ep.combine(rows, plan, topk_weights)

    parts: dict[str, Callable[..., Any]] = {
        "plan, dispatch and combine": lambda x, idx, w, _: exchange(x, idx, w),
        "a product": lambda *a: a[3] @ a[3],
        "both in one program": lambda x, idx, w, a: (exchange(x, idx, w), a @ a),
    }
    programs = {name: over_ranks(part, mesh) for name, part in parts.items()}
    calls = {name: (lambda f=f: f(*arrays)) for name, f in programs.items()}
    times = timing.compare(calls, repeats=repeats)
    return [
        {"bench": "layer's exchange", "what": name, **shape.as_json(), **spent.as_json()}
        for name, spent in times.items()
    ]


def pin(core: int) -> None:
    """Keeps all threads that this process has by now on one core.

    XLA's have all cores whatever the one has that started them, and come with the first runs.
    """
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), {core})


@multiprocess(2, 1, timeout=900)
def _measure_pinned(folder: str, shape: Shape, num_routings: int, repeats: int) -> None:
    """Has each process run on one core, a rank each; saves how long each call took here."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[jax.process_index() % len(cores)]
    mesh, seconds = make_mesh(2), []
    contenders = {n: w for n, w in layers.ways(shape).items() if n in (_NATIVE, _BALANCED, _XLA)}
    compiled: dict[str, Any] = {}
    for seed in range(num_routings):
        topk_idx = draw(shape, _PINNED_ROUTING, seed)
        arrays = place(mesh, make_arrays(shape, topk_idx, _FFN_HIDDEN[shape.name]))
        compiled = compiled or {n: compile_way(w, mesh, arrays) for n, w in contenders.items()}
        for turn in range(-2, repeats):
            row = []
            pin(core)
            for program in compiled.values():
                start = time.perf_counter()
                jax.block_until_ready(program(*arrays))
                row.append(time.perf_counter() - start)
            if turn >= 0:
                seconds.append(row)
    by_routing = np.reshape(seconds, (num_routings, repeats, len(contenders)))
    np.save(pathlib.Path(folder) / f"{jax.process_index()}.npy", by_routing)


def bench_pinned(shape: Shape, num_routings: int, repeats: int) -> list[dict[str, Any]]:
    """Runs ranks on cores of their own; a call's time is the slowest rank's."""
    with tempfile.TemporaryDirectory() as folder:
        _measure_pinned(folder, shape, num_routings, repeats)
        seconds = np.max([np.load(file) for file in pathlib.Path(folder).iterdir()], axis=0)
    records = []
    for seed in range(num_routings):
        load = np.bincount(draw(shape, _PINNED_ROUTING, seed).ravel(), minlength=shape.num_experts)
        by_rank = load.reshape(shape.num_ranks, -1).sum(axis=1)
        for i, name in enumerate((_NATIVE, _BALANCED, _XLA)):
            p50, p99 = np.percentile(seconds[seed, :, i], [50, 99]) * 1e3
            records.append(
                {
                    "bench": "pinned layer",
                    "routing": _PINNED_ROUTING,
                    "seed": seed,
                    "way": name,
                    **shape.as_json(),
                    "ffn_hidden": _FFN_HIDDEN[shape.name],
                    "busiest_over_mean": round(float(by_rank.max() / by_rank.mean()), 3),
                    "p50_ms": round(float(p50), 3),
                    "p99_ms": round(float(p99), 3),
                    "runs": repeats,
                }
            )
    return records


def print_json(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints each record on a line of its own; returns them."""
    for record in records:
        timing.print_json(record)
    return records


def print_goals(records: Sequence[dict[str, Any]]) -> None:
    """Prints whether native code is faster than all others, and balanced faster than not."""
    rows = []
    lossless = {
        r["way"]: r["median_ms"]
        for r in records
        if r["bench"] == "layer" and r["routing"] == _GOAL_ROUTING and r["dropped"] == 0
    }
    if lossless:
        best = min(ms for way, ms in lossless.items() if not way.startswith(_NATIVE))
        ratio = best / min(lossless[_NATIVE], lossless[_BALANCED])
        rows.append(["best other / native, no drops", ">= 1.5", f"{ratio:.2f}", _met(ratio >= 1.5)])
    pinned = [r for r in records if r["bench"] == "pinned layer"]
    if pinned:
        ms = {way: [r["p50_ms"] for r in pinned if r["way"] == way] for way in (_NATIVE, _BALANCED)}
        ratio = float(np.sum(ms[_NATIVE]) / np.sum(ms[_BALANCED]))
        rows.append(["native / balanced, pinned", ">= 1.3", f"{ratio:.2f}", _met(ratio >= 1.3)])
    timing.print_table("goals", ("ratio", "goal", "reached", "met"), rows)


def _met(met: bool) -> str:
    return "yes" if met else "NO"


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SMALL.num_ranks)
    timing.print_json(timing.environment())
    mesh, repeats = make_mesh(SMALL.num_ranks), 2 if _quick.value else _repeats.value
    shape = dataclasses.replace(SMALL, num_tokens=16, hidden=32) if _quick.value else SMALL
    routings = [*filter(None, _routings.value), *([_TRACE] if _trace.value else [])]
    records: list[dict[str, Any]] = []
    for routing in [_GOAL_ROUTING] if _quick.value else routings:
        found = bench_routing(*choices_of(shape, routing), routing, mesh, repeats)
        columns = ("way", "tokens_per_s", "dropped", "median_ms", "p99_ms", "temp_mb")
        title = f"{routing}: busiest rank {found[0]['busiest_over_mean']} of the mean"
        timing.print_table(title, columns, [[record[name] for name in columns] for record in found])
        records += print_json(found)
    records += print_json(parts := bench_parts(shape, mesh, repeats))
    timing.print_table("parts", ("what", "ms"), [[r["what"], r["median_ms"]] for r in parts])
    if _pinned.value:
        shape = dataclasses.replace(PINNED, num_tokens=16, hidden=32) if _quick.value else PINNED
        pinned = bench_pinned(shape, 1 if _quick.value else _pinned.value, repeats)
        columns = ("seed", "way", "busiest_over_mean", "p50_ms", "p99_ms")
        title = f"{_PINNED_ROUTING}, a core for each of {PINNED.num_ranks} ranks"
        timing.print_table(
            title, columns, [[record[name] for name in columns] for record in pinned]
        )
        records += print_json(pinned)
    print_goals(records)
    if (path := _picture.value) is not None:
        layer_picture.save(pathlib.Path(path), records)


if __name__ == "__main__":
    app.run(main)
