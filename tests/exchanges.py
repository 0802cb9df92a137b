"""One program that puts everything a plan can do to the test, its answers, and the oracle's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from implementations import ROWS, Row
from strategies import CASES, Case, Shape, payload, poisoned

import jax_ep

FIELDS = ("group_sizes", "kept", "expert_load", "recv_counts", "num_dropped", "num_invalid")
TARGETS = ("send_rank", "send_row")  # Where each choice has its row: the plan keeps it to itself.
Arrays = dict[str, np.ndarray]

every_case = pytest.mark.parametrize(
    ("row", "case"),
    [
        pytest.param(row, case, id=f"{row}-{case}")
        for row in ROWS
        for case in CASES
        if row.serves(case.shape.num_ranks)
    ],
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything an exchange is given, with NaN in every row that no kept choice names."""

    topk_idx: np.ndarray
    x: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    drows: np.ndarray
    dout: np.ndarray

    @classmethod
    def of(cls, shape: Shape, topk_idx: np.ndarray, dtype: np.dtype) -> Inputs:
        named = shape.plan(topk_idx).named
        rng = np.random.default_rng(3)
        return cls(
            topk_idx=topk_idx,
            x=payload(shape, dtype),
            rows=poisoned((*named.shape, shape.hidden), named, dtype, seed=4),
            weights=rng.normal(size=topk_idx.shape).astype(np.float32),
            drows=poisoned((*named.shape, shape.hidden), named, dtype, seed=5),
            dout=rng.normal(size=(*topk_idx.shape[:2], shape.hidden)).astype(dtype),
        )


@functools.cache
def program(row: Row, shape: Shape, dtype: np.dtype) -> Callable[..., Any]:
    """Compiles one plan with the dispatches and combines over it, forward and backward."""

    def per_rank(topk_idx, x, rows, weights, drows, dout):
        plan = make_plan(row, shape, topk_idx)
        sent, pull_sent = jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)
        out, pull_out = jax.vjp(lambda r, w: jax_ep.combine(r, plan, w), rows, weights)
        plain, pull_plain = jax.vjp(lambda r: jax_ep.combine(r, plan), rows)
        combine_drows, dweights = pull_out(dout)
        return {
            **fields_of(plan),
            "sent": sent,
            "dx": pull_sent(drows)[0],
            "out": out,
            "drows": combine_drows,
            "dweights": dweights,
            "plain": plain,
            "plain_drows": pull_plain(dout)[0],
            # XLA rejects a shard_map that uses none of its operands, as this one without tokens.
            "operand": rows,
        }

    return row.jit(per_rank, shape.num_ranks)


def make_plan(row: Row, shape: Shape, topk_idx: jax.Array) -> jax_ep.Plan:
    return row.make_plan(
        topk_idx,
        num_experts=shape.num_experts,
        capacity=shape.capacity,
        alignment=shape.alignment,
        tail=shape.tail,
        ranks_per_node=shape.ranks_per_node,
    )


def fields_of(plan: jax_ep.Plan) -> dict[str, jax.Array]:
    """Reads of a plan what the oracle knows of it."""
    targets = {name: getattr(plan._arrays, name) for name in TARGETS}
    return {name: getattr(plan, name) for name in FIELDS} | targets


def expected_fields(plan: oracle.Plan) -> Arrays:
    """Returns the same of the oracle's plan, for every rank."""
    fields = {name: getattr(plan, name) for name in FIELDS}
    fields["expert_load"] = np.tile(plan.expert_load, (len(plan.kept), 1))
    targets = plan.to_rank, plan.row
    return fields | {n: a.astype(np.int32) for n, a in zip(TARGETS, targets, strict=True)}


def run(row: Row, shape: Shape, inputs: Inputs) -> Arrays:
    with jax.enable_x64(inputs.x.dtype == np.float64):
        arrays = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
        return jax.tree.map(np.asarray, program(row, shape, inputs.x.dtype)(*arrays.values()))


def expect(shape: Shape, inputs: Inputs) -> tuple[oracle.Plan, Arrays]:
    """Asks the oracle for the plan and for the answers that are no sums over rows."""
    plan = shape.plan(inputs.topk_idx)
    drows, dweights = oracle.combine_grad(inputs.rows, plan, inputs.weights, inputs.dout)
    return plan, {
        **expected_fields(plan),
        "sent": oracle.dispatch(inputs.x, plan),
        "drows": drows,
        "dweights": dweights,
        "plain_drows": oracle.combine_grad(inputs.rows, plan, None, inputs.dout)[0],
    }


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a row gave for a case beside what the oracle says."""

    row: Row
    shape: Shape
    inputs: Inputs
    plan: oracle.Plan
    got: Arrays
    want: Arrays

    @classmethod
    def of(
        cls, row: Row, shape: Shape, topk_idx: np.ndarray, dtype: np.dtype | type = np.float32
    ) -> Answers:
        row.require()
        inputs = Inputs.of(shape, topk_idx, np.dtype(dtype))
        plan, want = expect(shape, inputs)
        return cls(row, shape, inputs, plan, run(row, shape, inputs), want)

    def same(self, name: str) -> None:
        same_bits(self.got[name], self.want[name], name)

    def same_rows(self, name: str) -> None:
        """Compares receive buffers: all of them, or what lies inside a group."""
        got, want = self.got[name], self.want[name]
        if self.shape.tail == "uninitialized":
            assert got.shape == want.shape
            got, want = got[self.plan.used], want[self.plan.used]
        same_bits(got, want, name)

    def same_sum(self, name: str, rows: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Compares one of the sums over `rows`."""
        same_sums(self.row, self.got[name], self.plan, rows, weights, name)

    def close_dots(self) -> None:
        """Compares dot products over the hidden axis, summed in float32 in any order."""
        got, want = self.got["dweights"], self.want["dweights"]
        assert got.dtype == np.float32
        rows, dout = (
            np.abs(np.nan_to_num(a)).astype(np.float64)
            for a in (self.inputs.rows, self.inputs.dout)
        )
        terms = oracle.combine_grad(rows, self.plan, None, dout)[1]
        bound = self.shape.hidden * np.finfo(np.float32).eps * terms
        assert (np.abs(got - want) <= bound).all()


def same_sums(
    row: Row,
    got: np.ndarray,
    plan: oracle.Plan,
    rows: np.ndarray,
    weights: np.ndarray | None,
    name: str,
) -> None:
    """Compares sums over `rows`: bit for bit, or to the last two places of their terms."""
    want = oracle.combine(rows, plan, weights)
    if row.exact:
        return same_numbers(got, want, name)
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    sizes = np.abs(rows.astype(np.float32))
    terms = oracle.combine(sizes, plan, None if weights is None else np.abs(weights))
    error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    bound = 2 * float(ml_dtypes.finfo(want.dtype).eps) * terms
    assert (error <= bound).all(), f"{name}: {error.max()} is past the last two places"
    return None


@functools.cache
def answers(row: Row, case: Case) -> Answers:
    return Answers.of(row, case.shape, case.topk_idx)


def same_bits(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Asserts equal shapes, dtypes and bits, and shows where the first difference is."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    bits = np.dtype(f"u{want.dtype.itemsize}")
    wrong = np.argwhere(
        np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(want).view(bits)
    )
    if wrong.size:
        at = tuple(wrong[0])
        pytest.fail(f"{name}: {len(wrong)} differ, first {at}: got {got[at]}, want {want[at]}")


def same_numbers(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Asserts equal bits, where any NaN will do for a NaN: which, is the processor's affair."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    nan, zero = np.isnan(got) & np.isnan(want), want.dtype.type(0)
    same_bits(np.where(nan, zero, got), np.where(nan, zero, want), name)
