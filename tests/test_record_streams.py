"""When GPUs' streams came to exchanges: what emulated ones record, and what is made of it."""

from __future__ import annotations

import pathlib
import time

import jax
import numpy as np
import pytest
from implementations import EMULATED, over_devices, require
from test_record import DELAY, SLOW, TURNS, R, args, late_layer, named_slow
from test_record_processes import _record_in_two_processes
from traces import MS, part, trace

import jax_ep
from jax_ep._stream_times import _CLOCK, _TIMES, on_host_clock, streams_beside
from jax_ep._verdicts import verdicts

on_gpus = pytest.mark.skipif(EMULATED is None, reason="streams are those of GPUs")
OPS = ("combine", "combine (launch)", "dispatch", "dispatch (launch)")
OTHERS = [rank for rank in range(R) if rank != SLOW]


@on_gpus
def test_a_slow_rank_is_waited_for_on_streams() -> None:
    require("native")
    run = jax.jit(over_devices(late_layer, R))
    jax.block_until_ready(run(*args()))
    begin = time.monotonic_ns()
    with jax_ep.record() as recorded:
        for _ in range(TURNS):
            jax.block_until_ready(run(*args()))
    end = time.monotonic_ns()
    assert recorded.ops == (*OPS, "make_plan", "make_plan (launch)")
    assert recorded.num_lost == 0
    assert len(recorded) == 6 * TURNS
    assert named_slow(recorded)
    calls = recorded.calls()
    launched = np.array([op.endswith("(launch)") for op in calls["op"]])
    assert set(calls["fabric"][launched]) == {"launches"}
    assert set(calls["fabric"][~launched]) == {"streams"}
    assert (recorded.waits()[recorded.ops.index("dispatch")][OTHERS, SLOW] > DELAY).all()
    # By the host's clock, to within what it takes to read both.
    assert calls["first_arrival"].min() > begin - MS
    assert calls["last_arrival"].max() < end + MS
    for name in ("gather", "work", "tell", "rank_work"):
        assert (calls[name][~launched] >= 0).all(), name
    # Each stream has a time of its own.
    assert (np.ptp(calls["rank_work"][~launched], axis=1) > 0).any()


@on_gpus
def test_streams_of_processes_are_put_together(tmp_path: pathlib.Path) -> None:
    require("native")
    _record_in_two_processes(tmp_path)
    both = jax_ep.Trace.load(*(tmp_path / f"{process}.npz" for process in range(2)))
    assert len(both) == 6 * TURNS
    assert named_slow(both)
    for op in ("dispatch", "dispatch (launch)"):
        assert (both.waits()[both.ops.index(op)][OTHERS, SLOW] > DELAY).all()
    assert (both.calls()["last_rank"] >= 0).all()


def test_clocks_that_run_apart_are_compared() -> None:
    """One GPU's clock is fast, one's is read at the end only, and one's is never read."""
    start, fast, late, unread = 10**18, 1, 2, 3
    before = np.array([(fast, start, 100 * MS)], _CLOCK)
    after = np.array([(fast, start + 1001 * MS, 1100 * MS), (late, 7, 1100 * MS)], _CLOCK)
    times = np.zeros(3, _TIMES)
    times["device"] = fast, late, unread
    times["came"] = start + 1001 * MS // 2, 7 - 300 * MS, 5
    times["told"] = start + 1001 * MS, 7, 5
    converted = on_host_clock(times, before, after)
    assert converted["device"].tolist() == [fast, late]
    assert converted["came"].tolist() == [600 * MS, 800 * MS]
    assert converted["told"].tolist() == [1100 * MS, 1100 * MS]
    assert times["told"][1] == 7


def of_streams(came: np.ndarray, work: np.ndarray, exchange: int) -> np.ndarray:
    times = np.zeros(len(came), _TIMES)
    times["exchange"], times["rank"], times["came"] = exchange, np.arange(len(came)), came
    times["began"] = came.max()
    times["ended"] = times["began"] + work
    times["told"] = times["ended"].max()
    return times


def test_streams_are_recorded_beside_launches() -> None:
    """Ranks that worked longer are named; exchanges of which something is missing are left out."""
    launches = part(np.zeros((5, 3), np.int64), fabric="launches", scope="layer_1")
    work = np.array([MS, MS, 5 * MS])
    came = 10**12 + np.array([2 * MS, 0, 0])
    times = [of_streams(came + 100 * MS * number, work, number) for number in (0, 1, 3, 9, 4)]
    times[-1] = times[-1][1:]
    whole = trace(streams_beside(launches, np.concatenate(times), 5))
    assert len(whole) == 3
    assert whole.num_lost == 5
    calls = whole.calls()
    assert set(calls["scope"]) == {"layer_1"}
    assert set(calls["fabric"]) == {"streams"}
    assert calls["last_rank"].tolist() == [0] * 3
    np.testing.assert_allclose(calls["rank_work"], np.tile(work * 1e-9, (3, 1)))
    np.testing.assert_allclose(calls["tell"], 4e-3)
    np.testing.assert_allclose(whole.waits()[0][1:, 0], 6e-3)
    said = verdicts(whole)
    assert any(line.startswith("rank 2 works 5 ms in dispatch, 5.0 times") for line in said)
    assert len(trace(streams_beside(launches, times[3], 0))) == 0
