"""Times the exchange between processes, of one host and as if of two, and in one process.

Clusters of processes are started in turn, several times each. A call's time is that of the process
it takes longest in. Results are checked. As if of two hosts, the bytes that a rank receives are
counted too, from the choices.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import timing
from absl import app, flags
from cluster_rows import Geometry, count_rows
from cluster_traffic import OPS, WAYS, Work, plan_of
from jax.sharding import Mesh
from programs import AXIS, Inputs, exchange, make_inputs, make_mesh, over_ranks, planner
from shapes import EXCHANGE_SHAPES, TOKEN, Shape

import jax_ep
from jax_ep import _processes
from jax_ep.testing import multiprocess

_ONE, _TWO = "1 process x 8 devices", "2 processes x 4 devices"
_HOSTS = "2 hosts x 4 devices"
_EXCHANGE, _XLA = "plan + dispatch + combine", "the same by 'xla'"
_NODES = "the same, told of the nodes"
_DISPATCH, _PLAN, _GATHER = "dispatch", "plan", "XLA's all-gather of the choices"
_WARMUP = 5

_shapes = flags.DEFINE_multi_enum("shapes", [*EXCHANGE_SHAPES], [*EXCHANGE_SHAPES], "What to run.")
_rounds = flags.DEFINE_integer("rounds", 4, "Clusters of each kind and shape.", lower_bound=1)
_repeats = flags.DEFINE_integer("repeats", 30, "Runs of each in a cluster.", lower_bound=1)
_calls = flags.DEFINE_integer("calls", 5000, "Calls of one token.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "One small case, a few rounds: does it all still run?")


@multiprocess(1, 8, timeout=600)
def _in_one(folder: str, shape: Shape, repeats: dict[str, int]) -> None:
    _measure(pathlib.Path(folder), shape, repeats)


@multiprocess(2, 4, timeout=600)
def _in_two(folder: str, shape: Shape, repeats: dict[str, int]) -> None:
    _measure(pathlib.Path(folder), shape, repeats)


@multiprocess(2, 4, timeout=600)
def _in_two_hosts(folder: str, shape: Shape, repeats: dict[str, int]) -> None:
    """Has two processes believe that they are on different hosts: there are no others here."""
    _processes._host = lambda: [f"host {jax.process_index()}"]
    _measure(pathlib.Path(folder), shape, repeats)


def _measure(folder: pathlib.Path, shape: Shape, repeats: dict[str, int]) -> None:
    """Runs each contender so many times, and saves how long each run took here."""
    mesh = make_mesh(shape.num_ranks)
    inputs = make_inputs(shape, 0.0)
    placed = inputs.on(mesh).as_tuple()
    calls = {name: _contender(name, shape, mesh, placed, inputs) for name in repeats}
    # One after the other, and each back to back: what comes after another takes the processes
    # differently long, and a call then waits for the one that is late.
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    for name, count in repeats.items():
        for turn in range(-_WARMUP, count):
            start = time.perf_counter()
            result = jax.block_until_ready(calls[name]())
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            del result
    for i, name in enumerate(repeats):
        np.save(folder / f"{i}-{jax.process_index()}.npy", seconds[name])


def _contender(
    name: str, shape: Shape, mesh: Mesh, placed: tuple[Any, ...], inputs: Inputs
) -> Callable[[], Any]:
    """Compiles a contender, and checks it if it is a whole exchange."""
    x, topk_idx, _ = placed
    native = planner(shape, "native", "uninitialized")
    if name == _GATHER:
        gather = over_ranks(lambda idx: jax.lax.all_gather(idx, AXIS), mesh)
        return lambda: gather(topk_idx)
    if name == _PLAN:
        # Without the one field that a collective of XLA's hands out.
        make_plan = over_ranks(
            lambda idx: dataclasses.replace(made := native(idx), expert_load=made.kept), mesh
        )
        return lambda: make_plan(topk_idx)
    plan = over_ranks(native, mesh)(topk_idx)
    if name == _DISPATCH:
        dispatch = over_ranks(jax_ep.dispatch, mesh)
        return lambda: dispatch(x, plan)
    per_node = shape.num_ranks // jax.process_count()
    planners = {
        _EXCHANGE: native,
        _XLA: planner(shape, "xla", "uninitialized"),
        _NODES: planner(shape, "native", "uninitialized", ranks_per_node=per_node),
    }
    program = over_ranks(exchange(planners[name]), mesh)
    _check(plan, program(*placed), inputs)
    return lambda: program(*placed)


def _check(plan: jax_ep.Plan, out: jax.Array, inputs: Inputs) -> None:
    """Experts that change nothing give each token back, as often as its choices were kept."""
    for kept, shard in zip(plan.kept.addressable_shards, out.addressable_shards, strict=True):
        weights = np.where(kept.data, inputs.topk_weights[shard.index[0]], 0)
        want = inputs.x[shard.index[0]].astype(np.float32) * weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(np.asarray(shard.data, np.float32), want, rtol=0.05, atol=0.05)


def _collect(
    run: Callable[..., None], shape: Shape, repeats: dict[str, int]
) -> dict[str, np.ndarray]:
    """Runs one cluster; returns the seconds of each call in the process where it took longest."""
    with tempfile.TemporaryDirectory() as folder:
        run(folder, shape, repeats)
        files = [sorted(pathlib.Path(folder).glob(f"{i}-*.npy")) for i in range(len(repeats))]
        slowest = [np.max([np.load(file) for file in some], axis=0) for some in files]
    return dict(zip(repeats, slowest, strict=True))


def _bench_shape(shape: Shape, rounds: int, repeats: int) -> None:
    seconds: dict[tuple[str, str], list[float]] = {}
    # XLA's collectives have clusters to themselves: the memory they give back after each run would
    # be missed by whatever comes next.
    wanted = [
        (_ONE, _in_one, {_EXCHANGE: repeats, _PLAN: repeats}),
        (_TWO, _in_two, {_EXCHANGE: repeats, _PLAN: repeats}),
        (_HOSTS, _in_two_hosts, {_EXCHANGE: repeats, _PLAN: repeats}),
        (_HOSTS, _in_two_hosts, {_NODES: repeats}),
        (_TWO, _in_two, {_XLA: max(3, repeats // 3), _GATHER: repeats}),
    ]
    for _ in range(rounds):
        for where, run, counts in wanted:
            for name, times in _collect(run, shape, counts).items():
                seconds.setdefault((where, name), []).extend(times)
    times = {key: timing.Times(tuple(some)) for key, some in seconds.items()}
    timing.print_table(
        f"{shape.name}: {shape.source}",
        ("where", "what", "ms (p10-p90)"),
        [[*key, spent] for key, spent in times.items()],
    )
    one, two, hosts = (times[where, _EXCHANGE].median for where in (_ONE, _TWO, _HOSTS))
    nodes = times[_HOSTS, _NODES].median
    xla = times[_TWO, _XLA].median
    timing.print_table(
        f"goals on {shape.name}",
        ("ratio", "goal", "reached", "met"),
        [
            [f"{_TWO} / {_ONE}", "<= 1.6", f"{two / one:.2f}", _met(two <= 1.6 * one)],
            [f"'xla' / 'native', {_TWO}", ">= 5", f"{xla / two:.1f}", _met(xla >= 5 * two)],
            [f"'xla' / 'native', {_HOSTS}", ">= 3", f"{xla / hosts:.1f}", _met(xla >= 3 * hosts)],
            ["likewise, told of the nodes", ">= 3", f"{xla / nodes:.1f}", _met(xla >= 3 * nodes)],
        ],
    )
    _print_bytes(shape)
    for (where, name), spent in times.items():
        record = {"bench": "processes", "where": where, "contender": name, **spent.as_json()}
        timing.print_json({**shape.as_json(), **record})


def _print_bytes(shape: Shape) -> None:
    """Prints what a rank receives in plan, dispatch and combine as if the processes were hosts."""
    sizes = (shape.num_tokens, shape.num_topk, shape.num_experts)
    geometry = Geometry(shape.num_ranks, shape.num_ranks // 2, *sizes)
    topk_idx = make_inputs(dataclasses.replace(shape, hidden=1), 0.0).topk_idx
    weights = 4 * shape.num_topk
    row_bytes = {"dispatch": shape.row_bytes, "combine": shape.row_bytes + weights}
    work = Work(geometry, count_rows(geometry, topk_idx), row_bytes)
    received = {
        name: plan_of(work).num_bytes + sum(WAYS[way](work, op).num_bytes for op in OPS)
        for name, way in ((_EXCHANGE, "rounds"), (_XLA, "xla"))
    }
    timing.print_table(
        f"bytes that a rank receives on {shape.name}, {_HOSTS}",
        ("what", "MB", "of what 'xla' brings"),
        [[name, f"{b / 1e6:.2f}", f"{b / received[_XLA]:.2f}"] for name, b in received.items()],
    )
    for name, num_bytes in received.items():
        record = {"bench": "received", "where": _HOSTS, "contender": name, "bytes": int(num_bytes)}
        timing.print_json({**shape.as_json(), **record})


def _bench_token(calls: int) -> None:
    """One token on each rank: what a call costs when there is next to nothing to move."""
    records = []
    for where, run in ((_ONE, _in_one), (_TWO, _in_two)):
        for name, seconds in _collect(run, TOKEN, {_DISPATCH: calls, _EXCHANGE: calls}).items():
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            records.append(
                {
                    "where": where,
                    "contender": name,
                    "p50_ms": round(float(p50), 4),
                    "p99_ms": round(float(p99), 4),
                    "calls": len(seconds),
                }
            )
    timing.print_table(
        f"one token a rank, the slowest process of each call: {TOKEN.source}",
        [*records[0]],
        [[*record.values()] for record in records],
    )
    for record in records:
        timing.print_json({**TOKEN.as_json(), "bench": "one token", **record})


def _met(met: bool) -> str:
    return "yes" if met else "NO"


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    shapes, rounds, repeats, calls = _shapes.value, _rounds.value, _repeats.value, _calls.value
    if _quick.value:
        shapes, rounds, repeats, calls = shapes[:1], 1, 3, 20
    for name in shapes:
        _bench_shape(EXCHANGE_SHAPES[name], rounds, repeats)
    _bench_token(calls)


if __name__ == "__main__":
    app.run(main)
