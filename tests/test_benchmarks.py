"""The benchmarks: what they count, and that they still run, on whatever devices there are."""

from __future__ import annotations

import importlib
import re
import subprocess

import numpy as np
import pytest
from benchmark_scripts import BENCHMARKS, records_of, run
from implementations import require

pytestmark = pytest.mark.long

pytest.importorskip("absl", reason="the benchmarks need the extra 'examples'")


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_programs")


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("shapes")


def test_a_token_counts_once_for_each_rank_that_keeps_it(programs, shapes):
    shape = shapes.Shape("tiny", 2, 2, 8, 4, 2, np.float32, 1.0, "this test")
    # Rank 0 sends token 0 to rank 0 twice and token 1 to both; rank 1 keeps one choice of four.
    topk_idx = np.array([[[0, 1], [1, 2]], [[3, 2], [0, 3]]])
    kept = np.array([[[True, True], [True, True]], [[True, False], [False, False]]])
    read_by_ranks, distinct, rows, tokens, choices = 4, 3, 5, 4, 8
    moved = programs.moved_bytes(shape, topk_idx, kept)
    assert moved["dispatch"] == ((distinct + rows) * 32, (read_by_ranks + rows) * 32)
    assert moved["scaled rows"] == moved["dispatch"]
    assert moved["combine"] == moved["plain sums"] == ((rows + tokens) * 32,) * 2
    assert moved["row dots"] == ((rows + distinct) * 32 + choices * 4,) * 2


def test_the_busiest_rank_s_bytes_cross_between_gpus(programs, shapes):
    shape = shapes.Shape("tiny", 3, 1, 8, 6, 3, np.float32, 1.0, "this test")
    # Rank 0 sends to all, its own row stays; of rank 1's rows two become one, and rank 2 drops one.
    topk_idx = np.array([[[0, 2, 4]], [[0, 1, 3]], [[0, 5, 2]]])
    kept = np.array([[[True, True, True]], [[True, True, True]], [[True, True, False]]])
    assert programs.crossing_bytes(shape, topk_idx, kept) == 2 * 32


def test_the_pure_jax_rival_adds_up_every_choice(programs):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4), np.float32)
    topk_idx = rng.integers(0, 5, (2, 3, 2), np.int32)
    weights = rng.random((2, 3, 2), np.float32)
    out = programs.sort_and_segment_sum(x, topk_idx, weights)
    np.testing.assert_allclose(out, x * weights.sum(-1, keepdims=True), rtol=1e-6)


def test_wrong_dots_are_found(programs):
    x = np.full((1, 2, 4), 2, np.float32)
    kept = np.array([[[True, False], [True, True]]])
    right = np.where(kept, np.float32(16), 0)
    assert programs._num_wrong_dots(right, x, kept) == 0
    assert programs._num_wrong_dots(right + np.float32([0, 0.1]), x, kept) == 2
    assert programs._num_wrong_dots(right * np.nan, x, kept) == 4


def test_wrong_sums_and_rows_are_found(programs):
    x, weights = np.ones((1, 2, 4), np.float32), np.full((1, 2, 1), 0.5, np.float32)
    kept = np.array([[[True], [False]]])
    right = np.array([[[0.5] * 4, [0.0] * 4]], np.float32)
    wrong = right.copy()
    wrong[0, 0, :2] = 0.6, np.nan
    assert programs._num_wrong_sums(right, (x, None, weights), kept) == 0
    assert programs._num_wrong_sums(wrong, (x, None, weights), kept) == 2
    # Only the first row is used.
    assert programs._num_wrong_rows(wrong, right, np.array([[1, 0]], np.int32)) == 2
    assert programs._num_wrong_rows(wrong[:, ::-1], right[:, ::-1], np.array([[1]], np.int32)) == 0


REPORT = """\
ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'
    {spilled} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 16 bytes smem
"""


def model(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("model_gpu.py", "--shapes=narrow-decode", *arguments)


def test_what_to_expect_of_a_gpu_is_reckoned(tmp_path):
    (tmp_path / "kernel.ptxas").write_text(
        REPORT.format(name="kernel", arch="90", registers=40, spilled=0)
        + REPORT.format(name="kernel", arch="100f", registers=80, spilled=8)
    )
    printed = model("--rates=GPU=1000", "--launch_us=1", f"--reports={tmp_path}").stdout
    rows = 8 * 128 * 4
    strict = (rows + 8 * 128) * 2048 * 2
    line = f"| narrow-decode | dispatch | {strict / 1e6:.1f} |"
    assert line in printed
    [cells] = [text.split(" | ") for text in printed.splitlines() if text.startswith(line)]
    assert cells[4] == f"{strict / 1e6 + 1:.0f}"
    assert "| `kernel` | 40 | 16 | 0 | 0 |" in printed
    assert "spilled by kernel on sm_100f" in printed


def test_without_reports_it_says_what_makes_them(tmp_path):
    done = model(f"--reports={tmp_path}")
    assert done.returncode == 1
    assert "run `make cuda` first" in done.stderr


def test_it_runs_and_records_every_contender():
    require("native")
    done = run("bench_gpu.py", "--quick", "--shapes=wide-decode", "--shapes=wide")
    environment, *records = records_of(done)
    assert {"commit", "jax", "device", "driver"} <= environment.keys()
    whole = ["native", "native, tail zero", "native, L2 cold in between", "xla"]
    ops = ["plan", "dispatch", "combine", "scaled rows", "row dots", "plain sums"]
    for routing in ("uniform", "zipf"):
        timed = [
            r["contender"]
            for r in records
            if (r.get("shape"), r.get("routing")) == ("wide", routing)
        ]
        assert sorted(timed) == sorted([*whole, "sort + segment_sum", *ops])
    half = [r["contender"] for r in records if r.get("shape") == "wide-float16"]
    assert half == ops
    reached = {(r["shape"], r["goal"]) for r in records if "goal" in r}
    assert ("wide", "row dots, of the copy, strict bytes") in reached
    assert ("wide-decode", "plan + dispatch + combine, us: native, L2 cold in between") in reached


def test_the_mesh_benchmark_runs_on_devices_of_the_cpu():
    require("native")
    options = ("--cpu_devices=8", "--quick", "--repeats=2", "--batch=2", "--shapes=wide-decode")
    environment, *records = records_of(run("bench_gpu_mesh.py", *options))
    assert environment["ranks"] == 8
    ops = ("plan", "dispatch", "combine", "all three")
    timed = [record["contender"] for record in records]
    assert timed == [f"{name}: {op}" for name in ("native", "xla") for op in ops]
    each_way = {record["contender"]: record["bytes_each_way"] for record in records}
    assert 2 * each_way["native: dispatch"] == each_way["xla: all three"] > 0


def test_stacked_ranks_are_timed_and_what_many_hold_is_said():
    require("native")
    _, *records = records_of(run("bench_scale.py", "--quick"))
    timed = [(r["num_ranks"], r["op"]) for r in records if r["bench"] == "scale"]
    assert timed == [(ranks, op) for ranks in (8, 16) for op in ("plan", "dispatch", "combine")]
    held = [record for record in records if record["bench"] == "scale memory"]
    assert [record["op"] for record in held] == ["dispatch", "combine"]
    # Both have one side of an exchange as operands and the other as results, and rows on their way.
    tokens, rows = 256 * 4096, 2560 * 4096
    for record, sizes in zip(held, [(tokens, rows), (rows, tokens)], strict=True):
        assert record["operand_bytes"] > sizes[0]
        assert record["result_bytes"] == sizes[1]
        assert 1 < record["temporary_bytes"] / record["round_bytes"] < 2


def test_processes_are_timed_and_the_bytes_between_hosts_counted():
    require("native")
    _, *records = records_of(run("bench_processes.py", "--quick"))
    hosts = [r for r in records if r["where"] == "2 hosts x 4 devices"]
    timed = [r["contender"] for r in hosts if r["bench"] == "processes"]
    assert timed == ["plan + dispatch + combine", "plan", "the same, told of the nodes"]
    in_rounds, by_xla = (r["bytes"] for r in hosts if r["bench"] == "received")
    # By "xla" the rows of 7 ranks come twice, 4 weights a token, and 4 choices of 2 bytes.
    assert by_xla == 7 * 512 * (2 * 1024 + 4 * 4 + 4 * 2)
    assert 0.5 < in_rounds / by_xla < 0.6


def test_a_step_of_decoding_is_timed_beside_three_meetings():
    require("native")
    done = run("bench_decode.py", "--quick")
    _, *records = records_of(done)
    assert [r["contender"] for r in records][:2] == ["three meetings", "plan + dispatch + combine"]
    assert records[0]["over_floor"] == 1
    assert all(0 < r["p50_ms"] <= r["p99_ms"] for r in records)
    assert re.search(r"combine / three meetings: \d+\.\d\d; goal <= 1.5: ", done.stdout)


def test_placements_are_played_through_traces():
    _, *records = records_of(run("bench_placement.py", "--quick", "--tokens=64"))
    assert [record["num_ranks"] for record in records] == [8] * 3
    as_they_are, without_spares, with_spares = (record["median"] for record in records)
    assert as_they_are > without_spares > 1
    assert as_they_are > with_spares > 1
    assert records[0]["moved_a_rank_and_step"] == 0 < records[1]["moved_a_rank_and_step"]


def test_own_parts_of_plans_are_timed():
    require("native")
    _, *records = records_of(run("bench_own_plan.py", "--quick"))
    assert {record["num_ranks"] for record in records} == {64, 128}
    assert len({record["from"] for record in records}) == 3


def test_what_recording_costs_is_timed():
    require("native")
    _, *records = records_of(run("bench_record.py", "--quick"))
    assert [record["runs"] for record in records] == [4, 4, 4]
    assert all(record["on_ms"] > 0 for record in records)


def test_what_balancing_leaves_is_counted():
    _, *records = records_of(run("bench_balance.py", "--quick"))
    assert len(records) == 4 * 4 * 5
    two = [r for r in records if (r["num_spares"], r["slack"]) == (2, 0.0)]
    assert all(r["after_worst"] <= r["before_worst"] for r in two)
    assert {r["after_median"] for r in two if r["exponent"] == 0.65} == {1.0}


def test_a_layer_is_timed_in_every_way(tmp_path):
    require("native")
    picture = tmp_path / "layer.png"
    _, *records = records_of(run("bench_layer.py", "--quick", f"--picture={picture}"))
    layers = [r for r in records if r["bench"] == "layer"]
    assert len(layers) == 8
    # Those that have room for what even routing asks drop some, and the others none.
    assert {r["way"] for r in layers if r["dropped"]} <= {
        "all_to_all, factor 2",
        "einsum (GSPMD), factor 2",
    }
    assert len([r for r in records if r["bench"] == "pinned layer"]) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
