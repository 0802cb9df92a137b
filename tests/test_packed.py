"""Rounds in pure JAX, for devices without native code: run on CPU devices, lowered for TPUs."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import numpy as np
import pytest
import strategies
from exchanges import Answers
from implementations import AXIS, EMULATED, FABRIC, Fabric, Row, over_devices
from rounds import MANY, collectives, set_room
from strategies import BASE, NODES, TIGHT, Shape

import jax_ep
from jax_ep import _lowering, _wire

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(bool(EMULATED or FABRIC), reason="it is not about native code"),
]
R, T, K, E, H = 4, 32, 4, 16, 256


@pytest.fixture(params=["one", "many", "smaller_ones"])
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Has CPU devices be taken for some of which nothing is known."""
    if request.param == "many":
        set_room(monkeypatch, MANY)
    if request.param == "smaller_ones":
        set_room(monkeypatch, 0.6)
        monkeypatch.setattr(_wire, "FEW_ROWS", 1)
    take_for_unknown(monkeypatch)
    return Row("xla", Fabric(f"{request.param} packed", over_devices, 8), exact=False)


def take_for_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = _lowering._choose

    def choose_packed(call: Any, mesh: Any) -> Any:
        layout = dataclasses.replace(call.layout, strict=False)
        return choose(dataclasses.replace(call, layout=layout, platform=None), mesh)

    monkeypatch.setattr(_lowering, "_choose", choose_packed)


@pytest.mark.parametrize(
    ("shape", "routing"),
    [
        (TIGHT, strategies.distinct),
        (BASE, strategies.duplicates),
        (BASE, strategies.out_of_range),
        (BASE, strategies.everything_to_one_expert),
        (NODES, strategies.duplicates),
        (
            Shape(num_ranks=8, num_topk=6, num_experts=24, alignment=4, ranks_per_node=4),
            strategies.a_rank_receives_nothing,
        ),
    ],
)
def test_every_op_in_any_number_of_rounds(
    row: Row, shape: Shape, routing: strategies.Routing
) -> None:
    result = Answers.of(row, shape, routing(shape))
    inputs = result.inputs
    for name in ("sent", "drows", "plain_drows"):
        result.same_rows(name)
    result.same_sum("out", inputs.rows, inputs.weights)
    result.same_sum("plain", inputs.rows)
    result.same_sum("dx", inputs.drows)
    result.close_dots()


def exchange(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS)
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


def operands() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    topk_idx = np.argsort(rng.random((R, T, E)), axis=-1)[:, :, :K].astype(np.int32)
    return rng.normal(size=(R, T, H)).astype(np.float32), topk_idx


@pytest.mark.long
def test_rows_go_to_their_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are gathered, and no tokens."""
    take_for_unknown(monkeypatch)
    x, topk_idx = operands()
    program = jax.jit(over_devices(exchange, R)).lower(x, topk_idx).compile()
    text = program.as_text()
    assert text is not None
    assert max(collectives(text, "all-gather")) <= R * T * K * 4
    assert max(collectives(text, "all-to-all")) < R * T * H * 4
    np.testing.assert_allclose(program(x, topk_idx), K * x, rtol=1e-5)


def test_lowered_for_tpus() -> None:
    """It cannot be compiled for these here: its module holds collectives, and no foreign call."""
    x, topk_idx = operands()

    def gradient(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        return jax.grad(lambda x: exchange(x, topk_idx).sum())(x)

    traced = jax.jit(over_devices(gradient, R)).trace(x, topk_idx)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.all_to_all" in text
    assert f"tensor<{R}x{T}x{H}xui32>" not in text
    assert "@jax_ep_" not in text
