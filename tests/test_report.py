"""What a report says of traces: of those that a test makes up, who is to blame is known."""

from __future__ import annotations

import builtins
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from test_record_processes import in_processes
from traces import MS, part, trace

from jax_ep import Trace, draw_waits
from jax_ep._picture import save_picture
from jax_ep._report import report, save_timeline
from jax_ep._verdicts import verdicts

pytestmark = pytest.mark.long

R, CALLS = 4, 40
NOISE = np.random.default_rng(0).exponential(MS / 10, (CALLS, R)).astype(np.int64)


def test_nobody_is_blamed_for_noise() -> None:
    assert verdicts(trace(part(NOISE))) == []
    assert report(trace(part(NOISE))).endswith("no rank stands out")
    assert verdicts(trace()) == []
    assert verdicts(trace(part(np.zeros((CALLS, 1), np.int64)))) == []


def test_one_call_is_no_rule() -> None:
    came = NOISE.copy()
    came[7, 1] += 500 * MS
    came[9, [0, 2, 3]] += 500 * MS
    assert verdicts(trace(part(came))) == []


def test_little_is_not_worth_a_word() -> None:
    """A rank that is always last, but by no time, and one that works a little longer."""
    came = NOISE.copy()
    came[:, 3] = came.max(axis=1) + 1000
    assert verdicts(trace(part(came, work=10 * MS))) == []
    work = np.array([MS, MS + MS // 3, MS, MS])
    assert verdicts(apart(NOISE, np.zeros((R, R), np.int64), work)) == []


def test_a_slow_rank_is_named() -> None:
    came = NOISE.copy()
    came[: 3 * CALLS // 4, 3] += 2 * MS
    [said] = verdicts(trace(part(came)))
    assert said.startswith("rank 3 was last in 8"), said
    assert said.endswith("ms behind the next in the median: slow before them")
    behind = float(said.split(", ")[1].split(" ")[0])
    assert 1.7 < behind < 2.1


def test_a_rank_that_is_slow_in_one_layer_is_named() -> None:
    came = NOISE.copy()
    came[::4, 3] += 2 * MS
    scopes = [f"layer_{number % 4}" for number in range(CALLS)]
    [said] = verdicts(trace(part(came, scope=scopes)))
    assert said.startswith("rank 3 was last in 100% of dispatch of layer_0 calls, "), said


def test_a_process_that_is_slow_is_named() -> None:
    """Each of its ranks is last at times."""
    came = NOISE.copy()
    came[:, 2:] += 2 * MS
    parts = [
        part(
            np.where([rank // 2 == process for rank in range(R)], came, 9 * MS),
            process=process,
            is_here=[rank // 2 == process for rank in range(R)],
            published=8 * MS,
            fabric="processes",
        )
        for process in range(2)
    ]
    said = verdicts(trace(*parts))
    assert any(s.startswith("a rank of process 1 was last in 100% of dispatch") for s in said), said


def test_an_early_rank_is_named() -> None:
    came = NOISE + 3 * MS
    came[:, 1] = 0
    [said] = verdicts(trace(part(came, op="combine")))
    assert said.startswith("rank 1 waits for all others, 3.0"), said


def apart(came: np.ndarray, late: np.ndarray, work: np.ndarray) -> Trace:
    """Makes a trace of processes of one rank each, which see each other's rows ``late``."""
    parts = []
    for process in range(R):
        own = np.eye(R, dtype=bool)[process]
        # Each looks at those that have published, one after the other, once all have.
        seen = came.max(axis=1)[:, None] + MS + np.cumsum(late[process] + 1000)
        parts.append(
            part(
                np.where(own, came, seen),
                process=process,
                is_here=own.tolist(),
                published=came[:, process] + MS,
                work=int(work[process]),
                fabric="processes",
            )
        )
    return trace(*parts)


def test_a_slow_pair_is_named() -> None:
    late = np.zeros((R, R), np.int64)
    late[2, 0] = 4 * MS
    [said] = verdicts(apart(NOISE, late, np.full(R, MS)))
    assert said.startswith("rank 2 waits 4.")
    assert "ms for rank 0 in dispatch, and nobody else does" in said


def test_an_overloaded_receiver_is_named() -> None:
    work = np.array([MS, 5 * MS, MS, MS])
    [said] = verdicts(apart(NOISE, np.zeros((R, R), np.int64), work))
    assert said.startswith("rank 1 works 5 ms in dispatch, 5.0 times as long as the others")


def test_ranks_of_an_overloaded_process_are_named_together() -> None:
    parts = [
        part(
            NOISE,
            process=process,
            is_here=[rank // 2 == process for rank in range(R)],
            work=(1 + 2 * process) * MS,
            fabric="processes",
        )
        for process in range(2)
    ]
    [said] = verdicts(trace(*parts))
    assert said.startswith("ranks 2 and 3 work 3 ms in dispatch, 3.0 times as long")


def test_a_report_has_times_by_op_and_layer() -> None:
    """Gathering takes what the last one is late, work and telling what the records say."""
    came = np.zeros((CALLS, 2), np.int64)
    came[:, 1] = 8 * MS
    ops = ["dispatch", "combine"] * (CALLS // 2)
    scopes = ["layer_0"] * (CALLS - 10) + ["layer_1"] * 10
    lines = report(trace(part(came, op=ops, scope=scopes))).splitlines()
    assert lines[0] == f"exchanges: {CALLS}; processes that recorded them: 1"
    [dispatch] = [line.split() for line in lines if line.startswith("dispatch ")]
    assert dispatch[:5] == ["dispatch", str(CALLS // 2), "9.100", "9.100", "9.100"]
    assert dispatch[5:] == ["88%", "11%", "1%"]
    assert "   75%     240 ms  layer_0" in lines


def test_lost_records_are_told() -> None:
    some = dict(part(NOISE)) | {"num_lost": np.array(12)}
    assert "12 records are lost" in report(trace(some))


def test_a_timeline_has_what_each_rank_did(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "timeline.json"
    parts = in_processes(np.array([0, 5 * MS]), np.full((2, 2), 7 * MS), np.full(2, 6 * MS))
    save_timeline(trace(*parts), path)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    spans = {(e["pid"], e["tid"], e["cat"]): e for e in events if e["ph"] == "X"}
    assert set(spans) == {(p, p, what) for p in range(2) for what in ("wait", "work", "tell")}
    assert spans[0, 0, "wait"]["name"] == "dispatch: wait"
    assert spans[1, 1, "wait"]["ts"] - spans[0, 0, "wait"]["ts"] == pytest.approx(5e3)
    assert spans[0, 0, "wait"]["dur"] == pytest.approx(7e3)
    assert spans[0, 0, "work"]["args"] == {"scope": "", "epoch": 1, "fabric": "processes"}
    named = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert named == ["jax_ep, process 0", "jax_ep, process 1", "rank 0", "rank 1"]


def test_streams_have_lines_of_their_own(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "timeline.json"
    came = np.zeros((1, 2), np.int64)
    save_timeline(trace(part(came, fabric="launches"), part(came, fabric="streams")), path)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    lines = {(e["tid"], e["args"]["fabric"]) for e in events if e["ph"] == "X"}
    assert lines == {(0, "launches"), (1, "launches"), (2, "streams"), (3, "streams")}
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {0: "rank 0", 1: "rank 1", 2: "rank 0's stream", 3: "rank 1's stream"}


def test_the_command(tmp_path: pathlib.Path) -> None:
    """Files of several processes go into one report."""
    pytest.importorskip("matplotlib")
    parts = in_processes(np.array([0, 5 * MS]), np.full((2, 2), 7 * MS), np.full(2, 6 * MS))
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    for file, some in zip(files, parts, strict=True):
        trace(some).save(file)
    picture, timeline = tmp_path / "trace.png", tmp_path / "trace.json"
    options = ["--picture", picture, "--timeline", timeline]
    command = [sys.executable, "-m", "jax_ep", "report", *files, *options]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert said.startswith("exchanges: 1; processes that recorded them: 2")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(timeline.read_text())["traceEvents"]


def test_the_command_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "jax_ep", "report", tmp_path / "none.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    [said] = done.stderr.splitlines()
    assert said.startswith("jax_ep report: ")
    assert "none.npz" in said


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="`pip install matplotlib`, or jax_ep's extra 'examples'"):
        save_picture(trace(part(NOISE)), tmp_path / "none.png")


def test_pictures_show_something(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="trace must hold an exchange to be drawn; got an empty"):
        save_picture(trace(), tmp_path / "none.png")
    with pytest.raises(ValueError, match="trace must hold an exchange to be drawn; got an empty"):
        draw_waits(None, trace())
