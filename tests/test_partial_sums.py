"""Sums of a token's rows that GPUs make before the wire: the same bits, and what they save."""

from __future__ import annotations

import re
from collections.abc import Iterator

import exchanges
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies
from exchanges import Answers, same_bits
from implementations import AXIS, ROWS, SHARD_MAP, Row, over_devices
from strategies import BASE, CASES, TIGHT, Case

import jax_ep
from jax_ep import _fabrics, _foreign, _native, _partial_sums, _refusals
from jax_ep._layout import Layout

USED = {False: "every_choice", True: "partial_sums"}
GPUS = [
    pytest.param((row, used), id=f"{row}-{name}")
    for row in ROWS
    if row.platform in ("gpu", "emulated") and row.fabric is SHARD_MAP
    for used, name in USED.items()
]


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Row]:
    """A row that can have partial sums, and has them or not, whatever they save."""
    row, used = request.param
    row.require()
    monkeypatch.setattr(_partial_sums, "FORCED", used)
    exchanges.program.cache_clear()
    yield row
    exchanges.program.cache_clear()


TYPED = [(case, np.float32) for case in CASES if case.shape.num_ranks in (2, 4, 8)] + [
    (Case(name, shape, strategies.duplicates), dtype)
    for name, shape in {"base": BASE, "tight": TIGHT}.items()
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float64)
]


@pytest.mark.parametrize(
    ("gpus", "case", "dtype"),
    [
        pytest.param(*gpus.values, case, dtype, id=f"{gpus.id}-{case}-{np.dtype(dtype).name}")
        for gpus in GPUS
        for case, dtype in TYPED
    ],
    indirect=["gpus"],
)
def test_the_bits_are_the_contracts(gpus: Row, case: Case, dtype: type) -> None:
    """Rows that nobody names are NaN, and what a partial sum has not filled may be anything."""
    result = Answers.of(gpus, case.shape, case.topk_idx, dtype)
    result.same_sum("out", result.inputs.rows, result.inputs.weights)
    result.same_sum("plain", result.inputs.rows)
    result.same_sum("dx", result.inputs.drows)
    result.same_rows("drows")
    if dtype is np.float32:
        result.close_dots()


@pytest.mark.parametrize("gpus", GPUS, indirect=True)
def test_several_arrays_in_one_exchange(gpus: Row) -> None:
    """Each has partial sums of its own, in the order of the arrays."""
    topk_idx = strategies.duplicates(BASE)
    widths = (jnp.float32, 7), (jnp.bfloat16, 16), (jnp.float32, 1)
    x = [
        np.random.default_rng(i).normal(size=(4, 6, width)).astype(dtype)
        for i, (dtype, width) in enumerate(widths)
    ]

    def per_rank(topk_idx: jax.Array, x: list[jax.Array]) -> list[jax.Array]:
        plan = exchanges.make_plan(gpus, BASE, topk_idx)
        sent, pull = jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)
        return pull([2 * rows for rows in sent])[0]

    got = gpus.jit(per_rank, BASE.num_ranks)(topk_idx, x)
    for own, dx in zip(x, got, strict=True):
        plan = BASE.plan(topk_idx)
        want = oracle.combine(oracle.dispatch(2 * own, plan), plan, None)
        same_bits(np.asarray(dx), want, str(own.dtype))


def layout(**sizes: int) -> Layout:
    shape = {"num_ranks": 8, "num_experts": 64, "num_tokens": 4096, "num_topk": 8} | sizes
    shape.setdefault("capacity", max(1, shape["num_tokens"] * shape["num_topk"]))
    return Layout(
        **shape,
        alignment=1,
        tail="zero",
        axis_name=AXIS,
        implementation="native",
        strict=False,
    )


ROW_BYTES = 7168 * 2


@pytest.mark.parametrize(
    ("sizes", "saves"),
    [
        ({}, True),
        ({"num_ranks": 2}, True),
        ({"num_ranks": 32, "num_experts": 256}, True),
        # Little to move: less than it takes to begin.
        ({"num_tokens": 128}, False),
        # Hardly any two choices meet on a rank, or none do.
        ({"num_ranks": 64, "num_experts": 256}, False),
        ({"num_experts": 8, "num_topk": 4}, False),
        ({"num_tokens": 0}, False),
        # More choices than experts: all ranks have several.
        ({"num_experts": 8, "num_topk": 20}, True),
    ],
)
def test_what_is_saved(sizes: dict[str, int], saves: bool) -> None:
    assert (_saved(layout(**sizes)) > 0) == saves


def test_windows_save_copies() -> None:
    """Even where no two choices meet on a rank, sums are no slower to write than copies."""
    alone = layout(num_experts=8, num_topk=4)
    assert _saved(alone) < 0 <= _saved(alone, are_weighted=False, in_windows=True)
    # Weights are gathered first, which takes longer than copying next to nothing.
    few = layout(num_tokens=16, capacity=128)
    assert _saved(few, in_windows=True) < 0 < _saved(few, are_weighted=False, in_windows=True)


def _saved(layout: Layout, *, are_weighted: bool = True, in_windows: bool = False) -> float:
    return _partial_sums.saved_seconds(
        layout, [ROW_BYTES], are_weighted=are_weighted, in_windows=in_windows
    )


def test_ranks_of_a_token() -> None:
    """Against what drawing a token's experts many times gives."""
    rng = np.random.default_rng(0)
    drawn = np.argsort(rng.random((20000, 24)), axis=-1)[:, :5] // 3
    counts = (drawn[..., None] == np.arange(8)).sum(1)
    distinct, single = layout(num_experts=24, num_topk=5).ranks_of_a_token
    assert distinct == pytest.approx((counts > 0).sum(1).mean(), abs=0.02)
    assert single == pytest.approx((counts == 1).sum(1).mean(), abs=0.02)


class Library:
    """Stands in for the library for GPUs, which a machine without one need not have."""

    jax_ep_max_topk = staticmethod(lambda: 64)
    jax_ep_max_peers = staticmethod(lambda: 64)
    jax_ep_plan_workspace = staticmethod(lambda *_: 5)


@pytest.mark.parametrize("used", [False, True], ids=USED.get)
def test_what_a_program_passes(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    """All weights and room for the sums, or one rank's weights and no room."""
    monkeypatch.setattr(_native, "trace_platform", lambda: "gpu")
    monkeypatch.setattr(_fabrics, "library", lambda _: Library)
    monkeypatch.setattr(_refusals, "library", lambda _: Library)
    monkeypatch.setattr(_fabrics, "platform_problem", lambda _: None)
    monkeypatch.setattr(_refusals, "gpu_peers_problem", lambda: None)
    monkeypatch.setattr(_native, "platform_problem", lambda _: None)
    monkeypatch.setattr(_foreign, "register_handlers", lambda _: None)
    monkeypatch.setattr(_partial_sums, "FORCED", used)

    def per_rank(rows: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(topk_idx, num_experts=8, axis_name=AXIS, capacity=20)
        return jax_ep.combine(rows, plan, weights)

    operands = jnp.ones((4, 20, 16)), jnp.zeros((4, 6, 2), jnp.int32), jnp.ones((4, 6, 2))
    traced = jax.jit(over_devices(per_rank, 4)).trace(*operands)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r".*custom_call @jax_ep_reduce_scaled_devices.*", text)
    assert f"partial_sums = {int(used)} : i64" in call
    assert ("tensor<4x6x2xf32>" in call) == used
    assert call.endswith("tensor<20x16xf32>)" if used else "tensor<1xf32>)")
