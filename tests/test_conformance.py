"""Rows and sums, bit for bit where the contract says so, for every implementation and fabric."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies
from exchanges import Answers, answers, every_case, make_plan, same_bits, same_sums
from hypothesis import given, settings
from implementations import Row
from strategies import BASE, NODES, TIGHT, Case, Shape

import jax_ep

HALF_AND_DOUBLE = [ml_dtypes.bfloat16, np.float16, np.float64]


@every_case
def test_dispatch_copies_tokens_to_their_rows(row: Row, case: Case) -> None:
    answers(row, case).same_rows("sent")


@every_case
def test_combine_adds_up_each_tokens_rows(row: Row, case: Case) -> None:
    result = answers(row, case)
    result.same_sum("out", result.inputs.rows, result.inputs.weights)


@every_case
def test_combine_without_weights_adds_rows_as_they_are(row: Row, case: Case) -> None:
    result = answers(row, case)
    result.same_sum("plain", result.inputs.rows)


@every_case
def test_rows_that_nobody_names_never_reach_a_result(row: Row, case: Case) -> None:
    """They hold NaN, here, in the rows and in their cotangents."""
    result = answers(row, case)
    assert np.isnan(result.inputs.rows[~result.plan.named]).all()
    for name in ("dx", "out", "plain", "dweights"):
        assert np.isfinite(result.got[name]).all(), name
    for name in ("drows", "plain_drows"):
        assert np.isfinite(result.got[name][result.plan.used]).all(), name


@pytest.mark.parametrize("dtype", HALF_AND_DOUBLE, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("routing", [strategies.distinct, strategies.duplicates])
@pytest.mark.parametrize("shape", [TIGHT, NODES], ids=["tight", "nodes"])
def test_other_dtypes_of_sums(
    layer_row: Row, shape: Shape, routing: strategies.Routing, dtype: type
) -> None:
    """The parts are rounded to the dtype of the rows on the wire, or summed in float64."""
    result = Answers.of(layer_row, shape, routing(shape), dtype)
    inputs = result.inputs
    result.same_rows("sent")
    result.same_sum("out", inputs.rows, inputs.weights)
    result.same_sum("plain", inputs.rows)
    result.same_sum("dx", inputs.drows)
    result.same_rows("drows")
    result.same_rows("plain_drows")


def test_nodes_change_how_sums_are_rounded() -> None:
    """Else the cases above could not tell a sum by nodes from one by ranks."""
    topk_idx = strategies.distinct(NODES)
    by_ranks, by_nodes = (
        dataclasses.replace(NODES, ranks_per_node=1).plan(topk_idx),
        NODES.plan(topk_idx),
    )
    rows = np.random.default_rng(11).normal(size=(*by_nodes.named.shape, 40)).astype(np.float32)
    assert (oracle.combine(rows, by_ranks) != oracle.combine(rows, by_nodes)).any()


@settings(max_examples=10)
@given(topk_idx=strategies.topk_indices(BASE))
def test_random_routings(ranks_row: Row, topk_idx: np.ndarray) -> None:
    result = Answers.of(ranks_row, BASE, topk_idx)
    result.same_rows("sent")
    result.same_sum("out", result.inputs.rows, result.inputs.weights)
    result.same_sum("dx", result.inputs.drows)
    result.same_rows("drows")


COPIED = [
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
    np.uint32,
]
COPIED_WIDE = [np.float64, np.int64, np.uint64]


@pytest.mark.parametrize("dtypes", [COPIED, COPIED_WIDE], ids=["up_to_four_bytes", "eight_bytes"])
def test_dispatch_copies_every_bit(layer_row: Row, dtypes: list[type]) -> None:
    """Tokens of any dtype and any bits: NaN with their payloads, denormals, negative zeros."""
    rng = np.random.default_rng(9)
    topk_idx = strategies.distinct(TIGHT)
    plan = TIGHT.plan(topk_idx)
    wild = [
        np.frombuffer(rng.bytes(4 * 6 * 7 * np.dtype(d).itemsize), d).reshape(4, 6, 7)
        for d in dtypes
    ]
    named = [strategies.payload(TIGHT, np.dtype(d)) for d in dtypes]

    def per_rank(topk_idx, tokens):
        plan = make_plan(layer_row, TIGHT, topk_idx)
        return [jax_ep.dispatch(x, plan) for x in tokens]

    with jax.enable_x64(dtypes is COPIED_WIDE):
        program = layer_row.jit(per_rank, TIGHT.num_ranks)
        for tokens in (named, wild):
            for x, rows in zip(tokens, program(topk_idx, tokens), strict=True):
                want = _dispatch_bits(x, plan)
                same_bits(np.asarray(rows), want, str(x.dtype))


def _dispatch_bits(x: np.ndarray, plan: oracle.Plan) -> np.ndarray:
    """Dispatches the bits, which a conversion between floats cannot change."""
    bits = x.view(f"u{x.dtype.itemsize}")
    return oracle.dispatch(bits, plan).view(x.dtype)


def test_hidden_sizes(layer_row: Row) -> None:
    """Widths around those of native code's vector registers and blocks, with their odd ends."""
    topk_idx = strategies.distinct(TIGHT)
    plan = TIGHT.plan(topk_idx)
    rng = np.random.default_rng(10)
    weights = rng.normal(size=topk_idx.shape).astype(np.float32)
    native = layer_row.implementation == "native"
    tokens = [
        rng.normal(size=(*topk_idx.shape[:2], hidden)).astype(dtype)
        for hidden in ((1, 2, 3, 8, 15, 16, 17, 63, 1030) if native else (1, 2, 130))
        for dtype in (np.float32, ml_dtypes.bfloat16)
    ]

    def per_rank(topk_idx, weights, tokens):
        plan = make_plan(layer_row, TIGHT, topk_idx)
        sent = [jax_ep.dispatch(x, plan) for x in tokens]
        return sent, [jax_ep.combine(rows, plan, weights) for rows in sent]

    sent, out = layer_row.jit(per_rank, TIGHT.num_ranks)(topk_idx, weights, tokens)
    for x, rows, sums in zip(tokens, sent, out, strict=True):
        want = oracle.dispatch(x, plan)
        same_bits(np.asarray(rows), want, f"dispatch of {x.dtype} {x.shape}")
        same_sums(
            layer_row, np.asarray(sums), plan, want, weights, f"combine of {x.dtype} {x.shape}"
        )


def test_one_plan_serves_payloads_of_several_widths(ranks_row: Row) -> None:
    """Tokens beside their scales, say: each call stands for itself."""
    topk_idx = strategies.distinct(BASE)
    plan = BASE.plan(topk_idx)
    x = strategies.payload(BASE, np.dtype(np.float32))
    scales = x[..., :1] * np.float32(0.5)

    def per_rank(topk_idx, x, scales):
        plan = make_plan(ranks_row, BASE, topk_idx)
        return jax_ep.dispatch(x, plan), jax_ep.dispatch(scales, plan)

    rows, row_scales = ranks_row.jit(per_rank, BASE.num_ranks)(topk_idx, x, scales)
    same_bits(np.asarray(rows), oracle.dispatch(x, plan), "x")
    same_bits(np.asarray(row_scales), oracle.dispatch(scales, plan), "scales")
