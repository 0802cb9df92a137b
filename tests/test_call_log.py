"""The log of who comes to which call and how long it waits, for programs that hang."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from implementations import AXIS, over_devices, require

import jax_ep
from jax_ep.testing import multiprocess

TOPK_IDX = np.arange(24, dtype=np.int32).reshape(4, 3, 2) % 8
# XLA starts to number runs anywhere, below zero too.
CAME = re.compile(r"^jax_ep: rank (\d) of 4 came to (\w+) \(run -?\d+, call \d+\)$", re.MULTILINE)
LEFT = re.compile(
    r"^jax_ep: rank (\d) of 4 left (\w+) \(run -?\d+, call \d+\): waited \d+\.\d+ ms$", re.MULTILINE
)


def layer(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=8, axis_name=AXIS, implementation="native")
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


def run() -> None:
    x = np.ones((4, 3, 5), np.float32)
    jax.block_until_ready(jax.jit(over_devices(layer, 4))(TOPK_IDX, x))


@pytest.fixture
def logging() -> Iterator[None]:
    require("native")
    assert jax_ep.log_calls(True) is False
    yield
    jax_ep.log_calls(False)


@pytest.mark.usefixtures("logging")
def test_every_rank_comes_and_leaves(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    said = capfd.readouterr().err
    everyone = sorted(
        (str(rank), call) for rank in range(4) for call in ("make_plan", "dispatch", "combine")
    )
    assert sorted(CAME.findall(said)) == everyone
    assert sorted(LEFT.findall(said)) == everyone
    assert len(said.splitlines()) == 2 * len(everyone)


def test_nothing_is_said_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    require("native")
    run()
    assert not capfd.readouterr().err


@pytest.mark.usefixtures("logging")
def test_it_says_whether_it_was_on() -> None:
    assert jax_ep.log_calls(True) is True
    assert jax_ep.log_calls(False) is True
    assert jax_ep.log_calls(False) is False


def test_enabled_is_a_bool() -> None:
    with pytest.raises(TypeError, match="enabled must be a bool; got 1"):
        jax_ep.log_calls(1)


def test_between_processes() -> None:
    """An exchange has one number in all of them."""
    require("native")
    _run_in_two_processes()


@multiprocess(2, 2)
def _run_in_two_processes() -> None:
    jax_ep.log_calls(True)
    with tempfile.TemporaryFile("w+") as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        run()
        os.dup2(stderr, 2)
        log.seek(0)
        said = log.read()
    here = jax.process_index()
    ranks = f"jax_ep: rank \\d of 4 in process {here} "
    for call, epoch in (("make_plan", 1), ("dispatch", 2), ("combine", 3)):
        assert len(re.findall(f"{ranks}came to {call} ", said)) == 2, said
        left = re.findall(rf"{ranks}left {call} .*, epoch (\d+)\): waited", said)
        assert left == [str(epoch)] * 2, said
