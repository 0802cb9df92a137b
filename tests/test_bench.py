"""``python -m jax_ep bench`` checks, times and says what it timed."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
from benchmark_scripts import run_python

import jax_ep
from jax_ep import __main__, _bench_programs

TINY = ("--tokens=6", "--hidden=8", "--experts=16", "--topk=2", "--repeats=2")
OPS = ["plan", "dispatch", "combine", "dispatch, backward", "combine, backward"]


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command in this process; returns its status, and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jax_ep", "bench", *arguments])
        status = __main__.main()
        return status, *capsys.readouterr()

    return run


def test_a_trace_in_a_process_of_its_own(tmp_path):
    steps = np.random.default_rng(0).integers(0, 8, (3, 4, 6, 2))
    steps[1, :, :, 1] = jax_ep.DROPPED
    np.save(tmp_path / "trace.npy", steps)
    options = (f"--trace={tmp_path / 'trace.npy'}", "--experts=8", "--hidden=8", "--repeats=4")
    done = run_python("-m", "jax_ep", "bench", *options, "--capacity-factor=4", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    sizes = {"num_ranks": 4, "num_tokens": 6, "num_topk": 2, "num_experts": 8, "num_steps": 3}
    assert {name: record[name] for name in sizes} == sizes
    assert record["kept_fraction"] == 1.0
    assert [name for name in record["ops"] if name != _bench_programs.COPY] == OPS
    for op in record["ops"].values():
        assert op["p99_ms"] >= op["median_ms"] > 0
        assert op["runs"] == 4
    # 40 of 48 choices a step in the mean, of 8 numbers in bfloat16.
    dispatch = record["ops"]["dispatch"]
    reckoned = 40 * 16 / dispatch["median_ms"] / 1e6
    np.testing.assert_allclose(dispatch["gb_per_s"], reckoned, atol=6e-4)


def test_what_is_printed_for_a_reader(bench):
    status, printed, _ = bench(*TINY, "--routing=zipf:0.65", "--dtype=float32")
    assert status == 0
    title, header, *rows = printed.splitlines()
    assert f"8 ranks on 8 x {jax.devices()[0].platform}" in title
    assert "zipf:0.65 routing" in title
    assert header.split()[:4] == ["median", "ms", "p99", "ms"]
    assert [row.split("  ")[0] for row in rows] == [_bench_programs.COPY, *OPS]


def test_more_ranks_than_devices_run_on_one(bench):
    _, printed, _ = bench(*TINY, "--ranks=16", "--json", "--implementation=xla")
    record = json.loads(printed)
    assert record["where"].startswith("1 x ")
    assert record["implementation"] == "xla"


def test_what_is_dropped_is_not_counted(bench):
    """All of 96 choices are for two experts, of two ranks with room for 12 each."""
    _, printed, _ = bench(*TINY, "--routing=hot:2", "--capacity-factor=1", "--json")
    record = json.loads(printed)
    assert (record["capacity"], record["kept_fraction"]) == (12, 0.25)


def test_steps_are_taken_in_turn():
    call = _bench_programs._in_turn(lambda step: step, [1, 2, 3])
    assert [call() for _ in range(4)] == [1, 2, 3, 1]


def plan_of_reversed_tokens(topk_idx, **options):
    return jax_ep.make_plan(topk_idx[::-1], **options)


def rows_out_of_order(x, plan):
    return jax_ep.dispatch(x, plan)[::-1]


def sums_a_little_off(rows, plan, weights):
    return jax_ep.combine(rows, plan, weights) * 1.5


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("make_plan", plan_of_reversed_tokens, "plan: group_sizes DIFFERS in"),
        ("dispatch", rows_out_of_order, "dispatch DIFFERS in"),
        ("combine", sums_a_little_off, "combine DIFFERS in"),
    ],
)
def test_wrong_results_are_not_timed(bench, monkeypatch, name, fault, said):
    monkeypatch.setattr(_bench_programs, name, fault)
    status, printed, error = bench(*TINY, "--routing=hot:3", "--capacity-factor=1")
    assert (status, printed) == (1, "")
    assert said in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens=0"], "--tokens must be at least 1; got 0"),
        (["--repeats=0"], "--repeats must be at least 1; got 0"),
        (["--experts=9"], "num_experts must be a multiple of num_ranks (8); got 9"),
        (["--routing=odd"], "--routing must be uniform, zipf:EXPONENT or hot:EXPERTS; got odd"),
        (["--routing=zipf:x"], "--routing=zipf:x cannot be drawn: could not convert"),
        (["--routing=hot:1"], "--routing=hot:1 cannot be drawn: num_hot must lie within"),
    ],
)
def test_errors(bench, options, message):
    status, _, error = bench(*TINY, *options)
    assert status == 1
    assert message in error


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (np.zeros((2, 2)), (), "--trace must hold integers [steps, ranks, tokens, topk]; got"),
        (np.zeros((1, 8, 4, 2), int), ("--topk=3",), "--topk must be as in the trace, 2; got 3"),
    ],
)
def test_errors_of_traces(bench, tmp_path, steps, options, message):
    np.save(tmp_path / "trace.npy", steps)
    status, _, error = bench(f"--trace={tmp_path / 'trace.npy'}", *options)
    assert status == 1
    assert message in error
