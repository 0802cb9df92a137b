"""The table of fabrics: who carries an exchange, and what Python and the library agree on."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from implementations import AXIS, EMULATED, over_devices, require, stacked

import jax_ep
from jax_ep import _fabrics, _info, _library
from jax_ep._ops import OPS
from jax_ep._plan import PlanArrays
from jax_ep._types import Platform

TOPK_IDX = np.arange(24, dtype=np.int32).reshape(4, 3, 2) % 8
X = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
HERE: Platform = "gpu" if EMULATED else "cpu"
NOWHERE = _fabrics.Fabric(
    name="nowhere", platform=HERE, serves="nothing", refuses=lambda _: "it serves nothing"
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Has the library be compared with Python anew, in the test and after it."""
    require("native")
    _fabrics._mismatch.cache_clear()
    yield
    _fabrics._mismatch.cache_clear()


def layer(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=8, axis_name=AXIS, implementation="native")
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


@pytest.mark.parametrize("fabric", _fabrics.FABRICS, ids=lambda f: f"{f.platform}-{f.name}")
@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_library_reads_what_python_passes(fabric: _fabrics.Fabric, op: object) -> None:
    """By name and in this order: nothing else tells two operands of one type apart."""
    if not _library.library_path(fabric.platform).exists():
        pytest.skip(f"there is no library for {fabric.platform}")
    described = dict(_library.describe_handlers(fabric.platform)[fabric.target(op)])
    assert described.pop("stages")["execute"] == fabric.target(op)
    assert described == fabric.signature(op)


def test_every_handler_has_a_row() -> None:
    rows = {*_fabrics.signatures("cpu")}
    assert set(_library.describe_handlers("cpu")) == rows | {"jax_ep_roll_call"}


def test_operands_that_change_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are int32 [capacity], so that every check of shapes would pass."""
    names = {"recv_choice": "recv_row", "recv_row": "recv_choice"}
    swapped = tuple(names.get(name, name) for name in PlanArrays._fields)
    monkeypatch.setattr(_fabrics, "PlanArrays", types.SimpleNamespace(_fields=swapped))
    with pytest.raises(NotImplementedError, match="other sources.* operands of jax_ep_gather_rows"):
        jax.jit(stacked(layer, 4))(TOPK_IDX, X)


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take what it is passed for something else."""
    described = {
        name: handler | {"results": handler["results"][1:]}
        for name, handler in _library.describe_handlers(HERE).items()
    }
    monkeypatch.setattr(_fabrics, "describe_handlers", lambda _: described)
    _library.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="built from other sources"):
        plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8)
    assert plan.implementation == "xla"
    assert "built from other sources" in _info.info()


@pytest.mark.parametrize("place", [0, len(_fabrics.FABRICS)], ids=["first", "last"])
def test_one_more_fabric_that_refuses_everything(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """It is one row here, and one file that handler_list_test.cc holds: nothing else knows it."""
    rows = [*_fabrics.FABRICS[:place], NOWHERE, *_fabrics.FABRICS[place:]]
    handlers = {
        NOWHERE.target(op): NOWHERE.signature(op) | {"stages": {"execute": "none"}} for op in OPS
    }
    described = _library.describe_handlers(HERE) | handlers
    expected = jax.jit(stacked(layer, 4))(TOPK_IDX, X)
    monkeypatch.setattr(_fabrics, "FABRICS", tuple(rows))
    monkeypatch.setattr(_fabrics, "describe_handlers", lambda _: described)
    for over_ranks, carrier in ((stacked, "stacked"), (over_devices, "devices")):
        program = jax.jit(over_ranks(layer, 4)).lower(TOPK_IDX, X)
        assert f"jax_ep_gather_rows_{carrier}" in program.as_text()
        np.testing.assert_array_equal(program.compile()(TOPK_IDX, X), expected)
    assert re.search("nowhere +nothing", _info.info())


def test_where_all_refuse_each_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _fabrics.fabrics_for(HERE)
    others = [dataclasses.replace(fabric, refuses=NOWHERE.refuses) for fabric in here]
    monkeypatch.setattr(_fabrics, "FABRICS", tuple(others))
    with pytest.raises(NotImplementedError, match="stacked: it serves nothing; devices: it"):
        jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation="native")


def test_the_readme_says_what_each_serves() -> None:
    readme = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text()
    for fabric in _fabrics.FABRICS:
        assert fabric.serves in " ".join(readme.split()), fabric.name
