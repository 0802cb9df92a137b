"""What several processes record of their exchanges, and what comes of it when put together."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from implementations import over_devices, require
from test_record import DELAY, SLOW, TURNS, R, T, args, late_layer, named_slow, on_cpu
from traces import MS, part, trace

import jax_ep
from jax_ep.testing import multiprocess

pytestmark = pytest.mark.long


@on_cpu
def test_a_slow_rank_of_another_process_is_waited_for(tmp_path: pathlib.Path) -> None:
    require("native")
    _record_in_two_processes(tmp_path)
    # Ranks take turns between the processes.
    alone = [jax_ep.Trace.load(tmp_path / f"{process}.npz") for process in range(2)]
    both = jax_ep.Trace.load(*(tmp_path / f"{process}.npz" for process in range(2)))
    dispatch = both.ops.index("dispatch")
    assert len(both) == len(alone[0]) == len(alone[1]) == 3 * TURNS
    calls = both.calls()
    assert set(calls["fabric"]) == {"processes"}
    assert sorted(calls["epoch"]) == list(range(calls["epoch"].min(), calls["epoch"].max() + 1))
    assert named_slow(both)
    assert not np.isnan(calls["rank_work"]).any()
    others = [rank for rank in range(R) if rank != SLOW]
    assert (both.waits()[dispatch][others, SLOW] > DELAY).all()
    # The process of the others knows only that it waited for that of the slow one.
    assert np.isnan(alone[1].calls()["lateness"][:, SLOW]).all()
    waited = [one.waits()[dispatch] for one in alone]
    assert (waited[1][1::2, SLOW] > DELAY).all()
    assert waited[0][:, 1::2].max() < waited[1][1::2, SLOW].min()


@multiprocess(2, 2)
def _record_in_two_processes(folder: pathlib.Path) -> None:
    run = jax.jit(over_devices(late_layer, R))
    topk_idx, x = (np.asarray(a) for a in args())
    assert x.shape[:2] == (R, T)
    jax.block_until_ready(run(topk_idx, x))
    with jax_ep.record() as recorded:
        for _ in range(TURNS):
            jax.block_until_ready(run(topk_idx, x))
    recorded.save(folder / f"{jax.process_index()}.npz")


def in_processes(came: np.ndarray, seen: np.ndarray, published: np.ndarray) -> list:
    """Makes the records of an exchange of as many processes, of one rank each.

    Args:
      came: when each came, [processes].
      seen: when each saw what others had published, [processes, processes].
      published: when each did, [processes].
    """
    count = len(came)
    own = np.eye(count, dtype=bool)
    times = np.where(own, came, seen)
    return [
        part(
            times[process][None],
            process=process,
            is_here=own[process].tolist(),
            published=published[process],
            fabric="processes",
        )
        for process in range(count)
    ]


def test_processes_are_put_together() -> None:
    """Whoever came late is known; and for a slow link, who went on waiting for whom."""
    came = np.array([0, 5 * MS, MS])
    published = came + MS
    # Rank 0 looks at 1 until it has published, and sees at once that 2 had. Rank 2 looks at 0,
    # which had published, and at 1, which it sees 2 ms late.
    seen = np.array([[0, 6 * MS, 6 * MS + 9], [6 * MS, 0, 6 * MS + 9], [2 * MS, 8 * MS, 0]])
    parts = in_processes(came, seen, published)
    whole = trace(*parts)
    assert len(whole) == 1
    expected = np.array([[0, 5, 1], [0, 0, 0], [0, 6, 0]]) * 1e-3
    np.testing.assert_allclose(whole.waits()[0], expected, atol=1e-7)
    calls = whole.calls()
    assert calls["last_rank"].tolist() == [1]
    np.testing.assert_allclose(calls["lateness"][0], [0, 5e-3, 1e-3])
    # One by itself knows what it waited for each after the other, and for the leader before.
    expected = np.array([[0, 5, 0], [0, 0, 0], [0, 0, 0]]) * 1e-3
    np.testing.assert_allclose(trace(parts[0]).waits()[0], expected, atol=1e-7)
    expected = np.array([[0, 0, 0], [0, 0, 0], [0, 6, 0]]) * 1e-3
    np.testing.assert_allclose(trace(parts[2]).waits()[0], expected, atol=1e-7)
    assert trace(parts[2]).calls()["last_rank"].tolist() == [-1]
    led = part(
        seen[1:2] + came[1] * np.eye(3, dtype=int)[1],
        process=1,
        named=7 * MS,
        is_here=[False, True, False],
        published=8 * MS,
        fabric="processes",
    )
    np.testing.assert_allclose(trace(led).waits()[0, 1], [2e-3, 0, 0], atol=1e-7)


def test_files_of_one_process_follow_each_other(tmp_path: pathlib.Path) -> None:
    """What two traces of a process both hold is there once."""
    first = part(np.zeros((3, 2)))
    second = {name: column[1:] if column.ndim else column for name, column in first.items()}
    later = dict(part(np.zeros((2, 2)), process=1))
    assert len(trace(first, second)) == 3
    assert len(trace(first, second, later)) == 5
