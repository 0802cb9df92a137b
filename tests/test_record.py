"""Who waited for whom, recorded in one process; and what a trace makes of records."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import AXIS, EMULATED, over_devices, require, stacked
from traces import MS, part, trace

import jax_ep
from jax_ep import _library, _record
from jax_ep._verdicts import verdicts

R, T, K, E, H = 4, 8, 2, 8, 4
SLOW, DELAY, TURNS = 2, 0.03, 5
on_cpu = pytest.mark.skipif(
    EMULATED is not None,
    reason="the CPU's fabrics are others, and its kernels find faults in plans",
)
RECORDS = 1 if EMULATED is None else 2  # of each exchange


def layer(topk_idx: jax.Array, x: jax.Array, num_experts: int = E) -> jax.Array:
    plan = jax_ep.make_plan(
        topk_idx, num_experts=num_experts, axis_name=AXIS, implementation="native"
    )
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


def args(num_ranks: int = R) -> tuple[jax.Array, jax.Array]:
    topk_idx = jnp.arange(num_ranks * T * K, dtype=jnp.int32).reshape(num_ranks, T, K) % E
    return topk_idx, jnp.ones((num_ranks, T, H))


def dawdle(rank: np.ndarray, _: np.ndarray, zero: np.ndarray) -> np.ndarray:
    if int(rank) == SLOW:
        time.sleep(DELAY)
    return zero


def late_layer(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
    """One rank is slow between the plan and the dispatch."""
    plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS, implementation="native")
    # It is told something of the plan, or XLA could call it before that is made.
    rank, zero = jax.lax.axis_index(AXIS), 0 * x[0, 0]
    zero = jax.pure_callback(dawdle, jax.typeof(zero), rank, plan.num_dropped, zero)
    return jax_ep.combine(jax_ep.dispatch(x + zero, plan), plan)


def named_slow(recorded: jax_ep.Trace) -> bool:
    blamed = re.compile(rf"rank {SLOW} was last in \d+% of dispatch calls, .* slow before them")
    return any(map(blamed.fullmatch, verdicts(recorded)))


@on_cpu
def test_a_slow_rank_is_waited_for() -> None:
    require("native")
    run = jax.jit(over_devices(late_layer, R))
    jax.block_until_ready(run(*args()))
    with jax_ep.record() as recorded:
        for _ in range(TURNS):
            jax.block_until_ready(run(*args()))
    calls = recorded.calls()
    assert recorded.ops == ("combine", "dispatch", "make_plan")
    assert recorded.num_lost == 0
    dispatches = calls["op"] == "dispatch"
    assert len(recorded) == 3 * TURNS
    assert dispatches.sum() == TURNS
    assert named_slow(recorded)
    others = [rank for rank in range(R) if rank != SLOW]
    waits = recorded.waits()[recorded.ops.index("dispatch")]
    # The others may have been late themselves, but not each time.
    assert (waits[others, SLOW] > DELAY).all()
    assert (waits[SLOW] == 0).all()
    assert (calls["gather"][dispatches] > DELAY / 2).sum() > TURNS / 2
    assert (calls["lateness"][dispatches].max(axis=1) <= calls["gather"][dispatches]).all()
    assert (calls["first_arrival"] <= calls["last_arrival"]).all()
    assert set(calls["fabric"]) == {"devices"}
    assert (calls["lent_bytes"][dispatches] == T * H * 4).all()


def test_calls_bear_the_names_of_their_layers() -> None:
    """A layer has one name: forward, in a gradient, and where it is computed again for one."""
    require("native")

    def block(number: int, topk_idx: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope(f"block_{number}"), jax.named_scope("moe"):
            return layer((topk_idx + number) % E, x) * x

    def loss(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        x = jax.checkpoint(functools.partial(block, 0))(topk_idx, x)
        return jnp.sum(block(1, topk_idx, x))

    topk_idx, x = args()
    run = jax.jit(over_devices(lambda i, x: jax.grad(loss)(x, i), R))
    with jax_ep.record() as recorded:
        jax.block_until_ready(run(topk_idx, x))
    calls = recorded.calls()
    ops = ("dispatch", "combine", "dispatch (gradient)", "combine (gradient)")
    for op in ops:
        assert set(calls["scope"][calls["op"] == op]) == {"block_0/moe", "block_1/moe"}, op


def test_only_what_runs_in_the_block_is_recorded() -> None:
    """Recording is switched while programs are compiled already, and changes no bit."""
    require("native")
    run: Any = jax.jit(over_devices(layer, R))
    before = run(*args())
    jax.block_until_ready(before)
    with jax_ep.record() as outer:
        with jax_ep.record() as inner:
            within = jax.block_until_ready(run(*args()))
        jax.block_until_ready(run(*args()))
    jax.block_until_ready(run(*args()))
    assert (len(inner), len(outer)) == (3 * RECORDS, 6 * RECORDS)
    np.testing.assert_array_equal(before, within)
    assert run._cache_size() == 1


def test_a_block_that_fails_is_left() -> None:
    require("native")
    with pytest.raises(KeyError), jax_ep.record() as recorded:
        raise KeyError
    run = jax.jit(over_devices(layer, R))
    jax.block_until_ready(run(*args()))
    with jax_ep.record() as after:
        pass
    assert len(recorded) == len(after) == 0


@on_cpu
def test_nobody_waits_on_one_device() -> None:
    """All ranks come at once there, as many as there are, and work together."""
    require("native")
    with jax_ep.record() as recorded:
        run = jax.jit(stacked(functools.partial(layer, num_experts=70), 70))
        jax.block_until_ready(run(*args(70)))
    calls = recorded.calls()
    assert calls["op"].tolist() == ["make_plan", "dispatch", "combine"]
    assert calls["fabric"].tolist() == ["stacked"] * 3
    assert (calls["lateness"] == 0).all()
    assert (calls["work"] > 0).all()
    assert recorded.waits().shape == (3, 70, 70)
    assert (recorded.waits() == 0).all()
    assert verdicts(recorded) == []


@on_cpu
def test_a_call_that_fails_on_one_device_is_left_out() -> None:
    require("native")

    def broken(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS, implementation="native")
        arrays = plan._arrays._replace(recv_row=plan._arrays.recv_row + 2**30)
        return jax_ep.dispatch(x, dataclasses.replace(plan, _arrays=arrays))

    with jax_ep.record() as recorded, pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(jax.jit(stacked(broken, R))(*args()))
    assert "dispatch" not in recorded.ops


def test_an_empty_trace() -> None:
    assert trace().waits().shape == (0, 0, 0)
    assert trace().calls()["gather"].shape == (0,)
    assert len(trace()) == 0


def test_lost_records_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """More came than the library holds, so that it has fewer to give than there were."""

    class Full:
        counts = iter((100, 105))
        jax_ep_record_bytes = staticmethod(lambda: _record._RECORD.itemsize)
        jax_ep_record_calls = staticmethod(lambda _: 0)
        jax_ep_num_records = staticmethod(lambda: next(Full.counts))
        jax_ep_read_records = staticmethod(lambda begin, *_: 0 if begin == 100 else None)

    monkeypatch.setattr(_record, "usable_libraries", lambda: {"cpu": Full})
    with jax_ep.record() as recorded:
        pass
    assert recorded.num_lost == 5
    assert len(recorded) == 0


def test_it_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "library_problem", lambda _: "there is none")
    with pytest.raises(NotImplementedError, match="there is none"), jax_ep.record():
        pass


def test_many_ranks_are_put_together() -> None:
    """A record tells of 64 ranks; that of others is a further one of the same exchange."""
    came = np.arange(64)[None] * MS
    first, second = dict(part(came)), dict(part(came[:, :6]))
    first["num_ranks"] = second["num_ranks"] = np.array([70])
    second["first_rank"] = np.array([64])
    both = {
        name: column
        if column.ndim == 0
        else np.concatenate([column, np.zeros_like(second[name], shape=(1, 64))])
        if name == "came"
        else np.concatenate([column, second[name]])
        for name, column in first.items()
    }
    both["came"][1, :6] = second["came"][0]
    whole = trace(both)
    assert len(whole) == 1
    lateness = whole.calls()["lateness"][0]
    np.testing.assert_allclose(lateness[[5, 63, 64, 69]], [5e-3, 63e-3, 0, 5e-3])
    # Where a record is lost, who was the last is not known.
    assert whole.calls()["last_rank"].tolist() == [63]
    assert trace(first).calls()["last_rank"].tolist() == [-1]


def test_save_and_load(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace"
    saved = trace(part(np.array([[0, MS, 3 * MS]]), scope="layer_1"))
    saved.save(path)
    loaded = jax_ep.Trace.load(path)
    assert loaded.ops == ("dispatch",)
    np.testing.assert_array_equal(loaded.waits(), saved.waits())
    np.testing.assert_allclose(loaded.waits()[0], [[0, 1e-3, 3e-3], [0, 0, 2e-3], [0, 0, 0]])
    calls = loaded.calls()
    assert calls["scope"].tolist() == ["layer_1"]
    assert calls["last_rank"].tolist() == [2]
    for name, seconds in (("gather", 3e-3), ("work", 1e-3), ("tell", 1e-4)):
        np.testing.assert_allclose(calls[name], seconds)


def test_what_cannot_be_loaded(tmp_path: pathlib.Path) -> None:
    text, other, here, there = (tmp_path / name for name in ("text", "other.npz", "here", "there"))
    text.write_text("no trace")
    np.savez(other, format=0)
    trace(part(np.zeros((1, 2)))).save(here)
    trace(part(np.zeros((1, 2)), host="there")).save(there)
    for paths, message in (
        ((), "paths must name at least one file; got none"),
        ((text,), f"paths must name files that Trace.save wrote; got {text}"),
        ((other,), f"paths must name files that Trace.save wrote; got {other}, of another version"),
        ((here, there), "paths must be of one host, .* got some of \\['here', 'there'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jax_ep.Trace.load(*paths)
    with pytest.raises(FileNotFoundError):
        jax_ep.Trace.load(tmp_path / "none")
