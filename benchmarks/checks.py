"""Checks results before they are timed: speed measured on wrong results is none."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from baselines import Baseline
from jax.sharding import Mesh
from programs import (
    Implementation,
    Inputs,
    Tail,
    baseline_with_experts,
    expert_scale,
    over_ranks,
    planner,
)
from shapes import Shape

import jax_ep

PLAN_FIELDS = ("group_sizes", "kept", "expert_load", "recv_counts", "num_dropped", "num_invalid")


def _load_oracle() -> ModuleType:
    """Loads the NumPy oracle of the tests, which is no installed package."""
    path = pathlib.Path(__file__).parents[1] / "tests" / "oracle.py"
    spec = importlib.util.spec_from_file_location("oracle", path)
    assert spec is not None
    assert spec.loader is not None
    # Dataclasses look their module up while they are made.
    module = sys.modules["oracle"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


class Expected:
    """What the oracle says of one exchange whose experts do nothing."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        self.shape = shape
        self.inputs = inputs
        self.plan = oracle.plan(inputs.topk_idx, shape.num_experts, shape.capacity)
        self.rows = oracle.dispatch(inputs.x, self.plan)
        self.out = oracle.combine(self.rows, self.plan, inputs.topk_weights)

    @property
    def num_kept(self) -> int:
        return int(self.plan.kept.sum())


def check_ours(expected: Expected, mesh: Mesh, implementation: Implementation, tail: Tail) -> None:
    """Checks a plan, its dispatch and its combine, of ranks on the devices of a mesh.

    Raises:
      AssertionError: something is off, as ``assert_as_expected`` says.
    """
    program = over_ranks(fields_rows_and_sums(expected.shape, implementation, tail), mesh)
    results = program(*expected.inputs.on(mesh).as_tuple())
    assert_as_expected(expected, implementation, tail, results)


def fields_rows_and_sums(
    shape: Shape, implementation: Implementation, tail: Tail
) -> Callable[..., tuple[dict[str, jax.Array], jax.Array, jax.Array]]:
    """Returns what one rank does to have all its results checked."""
    make_plan = planner(shape, implementation, tail)

    def per_rank(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> Any:
        plan = make_plan(topk_idx)
        rows = jax_ep.dispatch(x, plan)
        out = jax_ep.combine(rows, plan, topk_weights)
        return {name: getattr(plan, name) for name in PLAN_FIELDS}, rows, out

    return per_rank


def assert_as_expected(
    expected: Expected, implementation: Implementation, tail: Tail, results: Any
) -> None:
    """Compares what ``fields_rows_and_sums`` returned on all ranks with the oracle.

    Raises:
      AssertionError: a field or row differs from the oracle's at all, or a sum by more than the
        implementation promises: nothing for native code, two last places for ``"xla"``.
    """
    fields, rows, out = jax.tree.map(np.asarray, results)
    for name in PLAN_FIELDS:
        want = getattr(expected.plan, name)
        np.testing.assert_array_equal(fields[name], np.broadcast_to(want, fields[name].shape), name)
    compared = expected.plan.used if tail == "uninitialized" else np.full(rows.shape[:2], True)
    np.testing.assert_array_equal(rows[compared], expected.rows[compared], "rows")
    if implementation == "native":
        np.testing.assert_array_equal(out, expected.out, "out")
    else:
        _assert_sums(out, expected.out, _sum_of_sizes(expected.inputs, expected.plan.kept), 2)


def check_baseline(expected: Expected, mesh: Mesh, baseline: Baseline) -> int:
    """Checks a baseline's sums over the choices it kept, with experts that differ.

    Returns:
      How many choices it kept.

    Raises:
      AssertionError: a sum is off by more than eight last places of its terms.
    """
    program = over_ranks(baseline_with_experts(baseline, expected.shape), mesh)
    out, kept = map(np.asarray, program(*expected.inputs.on(mesh).as_tuple()))
    x, topk_idx, topk_weights = expected.inputs.as_tuple()
    scale = np.where(kept, topk_weights * expert_scale(topk_idx), 0).sum(axis=-1, keepdims=True)
    want = scale.astype(np.float32) * x.astype(np.float32)
    _assert_sums(out, want, _sum_of_sizes(expected.inputs, kept), 8)
    return int(kept.sum())


def _sum_of_sizes(inputs: Inputs, kept: np.ndarray) -> np.ndarray:
    """Adds up the sizes of all terms of each sum, the measure of its rounding errors."""
    weights = np.where(kept, inputs.topk_weights, 0).sum(axis=-1, keepdims=True)
    return weights * np.abs(inputs.x.astype(np.float32))


def _assert_sums(got: np.ndarray, want: np.ndarray, sizes: np.ndarray, places: int) -> None:
    error = np.abs(got.astype(np.float32) - want.astype(np.float32))
    bound = places * float(ml_dtypes.finfo(got.dtype).eps) * sizes
    wrong = int((error > bound).sum())
    assert wrong == 0, f"out: {wrong} of {error.size} sums are off, by up to {error.max()}"
