"""``python -m jax_ep selftest`` passes here, and does not where anything is wrong."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from implementations import require

import jax_ep
from jax_ep import __main__, _fabrics, _selftest
from jax_ep.testing import MultiprocessFailure

pytestmark = pytest.mark.long

CHECKS = (
    "carried as it should be",
    "make_plan",
    "dispatch",
    "combine",
    "gradient of dispatch",
    "gradients of combine",
)
SHARED = _selftest.Way("shared memory", "devices")


def test_the_command_passes():
    require("native")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "jax_ep", "selftest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, verdict = done.stdout.splitlines()
    assert verdict == "all as it has to be"
    assert all(line.endswith(" ok") for line in lines)
    ways = ["pure JAX (xla)", "virtual ranks of one device", "shared memory", "rounds"]
    one, two = "1 process, 4 CPUs", "2 processes, 2 CPUs"
    wanted = [(one, way) for way in ways] + [(two, way) for way in ways if way != ways[1]]
    for (place, way), check in zip(
        [pair for pair in wanted for _ in CHECKS], CHECKS * len(wanted), strict=True
    ):
        line = lines.pop(0)
        assert all(part in line for part in (place, way, check))
    assert not lines


def run_here(monkeypatch, capsys, *ways) -> tuple[int, list[str]]:
    """Runs the command on devices of this process alone; returns its status and lines."""
    here = {"here": lambda: _selftest.check_here(list(ways), jax.devices()[:4])}
    monkeypatch.setattr(_selftest, "_PLACES", here)
    monkeypatch.setattr(sys, "argv", ["jax_ep", "selftest"])
    status = __main__.main()
    return status, capsys.readouterr().out.splitlines()


def plan_of_reversed_tokens(topk_idx, **options):
    return jax_ep.make_plan(topk_idx[::-1], **options)


def rows_out_of_order(x, plan):
    return jax_ep.dispatch(x, plan)[::-1]


def sums_a_little_off(rows, plan, weights):
    return jax_ep.combine(rows, plan, weights) * (1 + 2**-7)


def combine_that_raises(rows, plan, weights):
    raise RuntimeError("the needle")


@pytest.mark.parametrize(
    ("name", "fault", "check", "said"),
    [
        ("make_plan", plan_of_reversed_tokens, "make_plan", "DIFFERS in"),
        ("dispatch", rows_out_of_order, "dispatch", "DIFFERS in"),
        ("combine", sums_a_little_off, "combine", "DIFFERS in"),
        ("combine", combine_that_raises, "all", "FAILED: RuntimeError: the needle"),
    ],
)
def test_a_fault_fails_the_command(monkeypatch, capsys, name, fault, check, said):
    require("native")
    monkeypatch.setattr(_selftest, name, fault)
    status, lines = run_here(monkeypatch, capsys, SHARED)
    assert status == 1
    assert lines[-1] == "NOT all as it has to be"
    assert any(f" {check} " in line and said in line for line in lines)


def test_it_says_where_the_first_difference_is(monkeypatch, capsys):
    require("native")
    right = _selftest.dispatch
    monkeypatch.setattr(_selftest, "dispatch", lambda x, plan: right(x, plan).at[3, 5].add(1))
    _, lines = run_here(monkeypatch, capsys, SHARED)
    [line] = [line for line in lines if line[54:].startswith("dispatch ")]
    assert "DIFFERS in 1 of 880 numbers, first at rank 0, [3, 5]: " in line


def test_another_fabric_than_the_one_to_be_checked_is_a_fault(monkeypatch, capsys):
    require("native")
    monkeypatch.setattr(_selftest, "_preferring", lambda _: _selftest.contextlib.nullcontext())
    status, lines = run_here(monkeypatch, capsys, _selftest.Way("rounds", "rounds"))
    assert status == 1
    assert lines[0].endswith("by something else")


def test_without_native_code_pure_jax_is_checked_alone(monkeypatch, capsys):
    monkeypatch.setattr(_fabrics, "native_problem", lambda _: "the needle")
    assert [way.name for way in _selftest.cpu_ways()] == ["pure JAX (xla)"]
    status, lines = run_here(monkeypatch, capsys, *_selftest.cpu_ways())
    assert status == 0
    assert lines[0].endswith("the needle")
    assert len(lines) == 1 + len(CHECKS) + 1


@pytest.mark.parametrize("strangers", [False, True])
def test_gpus_are_checked_too_as_many_as_divide_the_experts(monkeypatch, capsys, strangers):
    """Three devices of the CPU stand for GPUs here."""
    require("native")
    monkeypatch.setattr(_selftest, "local_gpus", lambda: jax.devices()[:3])
    monkeypatch.setattr(_selftest, "gpu_peers_problem", lambda: "strangers" if strangers else None)
    status, lines = run_here(monkeypatch, capsys)
    assert status == 0
    ways = ["pure JAX (xla)", "virtual ranks of one device", "each other's memory", "rounds"]
    if strangers:
        ways.remove("each other's memory")
    for way in ways:
        assert sum(line.startswith("GPUs") and f" {way} " in line for line in lines) == len(CHECKS)
    assert len(lines) == len(ways) * len(CHECKS) + 1


def test_what_one_process_of_several_finds_is_found():
    def run(folder: str) -> None:
        for process, problem in enumerate([None, "DIFFERS"]):
            results = [{"way": "w", "check": "c", "problem": problem}]
            (pathlib.Path(folder) / f"{process}.json").write_text(json.dumps(results))

    assert [r.problem for r in _selftest._collect(run)()] == ["DIFFERS"]


def test_processes_that_do_not_end_well_are_a_fault():
    def run(folder: str) -> None:
        raise MultiprocessFailure("rank 1 hung")

    [result] = _selftest._collect(run)()
    assert result.problem == "FAILED: rank 1 hung"
