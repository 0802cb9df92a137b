"""The fuzzer itself: it runs, says what it did, repeats a case, and finds a planted fault."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from fuzz.case import Case
from fuzz.check import check
from implementations import ONE, Row, require
from strategies import Shape

import jax_ep

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[1]


def simple_case() -> Case:
    """Makes a case that is quick to compile and moves tokens."""
    return dataclasses.replace(
        Case.draw(0),
        row=Row("native", ONE, exact=True),
        shape=Shape(num_ranks=1, num_experts=3),
        place="plain",
        count=1,
        wrap="nothing",
        dtype=np.dtype(np.float32),
        token_dtype=np.dtype(np.float32),
    )


def test_a_seed_is_a_case() -> None:
    first, second = Case.draw(7), Case.draw(7)
    assert first == second
    for (name, a), (again, b) in zip(first.routings(), second.routings(), strict=True):
        assert name == again
        assert (a == b).all()


@pytest.mark.parametrize("fault", ["rows_swapped", "weights_ignored"])
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    case, dispatch, combine = simple_case(), jax_ep.dispatch, jax_ep.combine
    check(case, collections.Counter())
    if fault == "rows_swapped":
        monkeypatch.setattr(jax_ep, "dispatch", lambda x, plan: dispatch(x, plan)[::-1])
    else:
        monkeypatch.setattr(jax_ep, "combine", lambda r, plan, w=None: combine(r, plan))
    jax.clear_caches()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(case, collections.Counter())


def test_a_few_seconds_of_it() -> None:
    require("native")
    child = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--minutes", "0.1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, child.stderr
    assert "cases" in child.stdout
