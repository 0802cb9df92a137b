"""Times ``grouped_matmul`` against ``jax.lax.ragged_dot`` and one dense product of as many rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import timing
from absl import app, flags

import jax_ep

_GOAL = 5.0
_MODES = ("forward", "with gradients")

_repeats = flags.DEFINE_integer("repeats", 30, "Rounds of the interleaved run.", lower_bound=1)
_cases = flags.DEFINE_multi_enum(
    "case", [], ["goal", "bfloat16", "wide", "few"], "What to run; all by default."
)
_quick = flags.DEFINE_bool("quick", False, "Small cases, a few rounds: does it all still run?")

Matmul: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Operands: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: ``capacity`` rows, of which ``used`` belong to groups of random sizes."""

    name: str
    capacity: int
    used: int
    hidden: int
    ffn_hidden: int
    num_groups: int
    dtype: type[np.generic] = np.float32

    def operands(self) -> Operands:
        """Makes rows, weights, a cotangent and group sizes; what no group uses is NaN."""
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((self.capacity, self.hidden), np.float32)
        weights = rng.standard_normal((self.num_groups, self.hidden, self.ffn_hidden), np.float32)
        cotangent = rng.standard_normal((self.capacity, self.ffn_hidden), np.float32)
        rows[self.used :] = cotangent[self.used :] = np.nan
        sizes = rng.multinomial(self.used, np.full(self.num_groups, 1 / self.num_groups))
        floats = (array.astype(self.dtype) for array in (rows, weights, cotangent))
        return *(jax.device_put(array) for array in floats), jnp.asarray(sizes, jnp.int32)

    def as_json(self) -> dict[str, Any]:
        """Returns the case's sizes, for a record."""
        return {**dataclasses.asdict(self), "dtype": np.dtype(self.dtype).name}


GOAL = Case("goal", capacity=2048, used=2048, hidden=512, ffn_hidden=512, num_groups=32)
CASES = {
    # The size named in the library's speed goal.
    "goal": GOAL,
    "bfloat16": dataclasses.replace(GOAL, name="bfloat16", dtype=ml_dtypes.bfloat16),
    # A quarter of OLMoE-1B-7B's experts (https://arxiv.org/abs/2409.02060) on one rank of four.
    "wide": Case("wide", capacity=2048, used=1536, hidden=1024, ffn_hidden=512, num_groups=16),
    # Few long groups, as in Mixtral (https://arxiv.org/abs/2401.04088), narrower.
    "few": Case("few", capacity=4096, used=4096, hidden=256, ffn_hidden=896, num_groups=2),
}


def program(matmul: Matmul, mode: str) -> Callable[..., Any]:
    """Compiles the product, or the product with both gradients."""

    def run(rows: jax.Array, weights: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> Any:
        if mode == "forward":
            return matmul(rows, weights, sizes)
        out, pull = jax.vjp(lambda rows, weights: matmul(rows, weights, sizes), rows, weights)
        return out, *pull(cotangent)

    return jax.jit(run)


def dense(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies all rows by one group's weights: what the arithmetic alone costs."""
    del sizes
    return rows @ weights[0]


def expected(
    rows: np.ndarray, weights: np.ndarray, cotangent: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Computes the product and both gradients in NumPy, group by group."""
    out, drows, dweights = np.zeros_like(cotangent), np.zeros_like(rows), np.zeros_like(weights)
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        out[start:end] = rows[start:end] @ weights[group]
        drows[start:end] = cotangent[start:end] @ weights[group].T
        dweights[group] = rows[start:end].T @ cotangent[start:end]
    return out, drows, dweights


def check(case: Case, operands: Operands) -> None:
    """Compares result and gradients with NumPy's.

    Raises:
      AssertionError: one differs by more than rounding.
    """
    rows, weights, cotangent = (np.asarray(operand, np.float32) for operand in operands[:3])
    want = expected(rows, weights, cotangent, np.asarray(operands[3]))
    got = program(jax_ep.grouped_matmul, _MODES[1])(*operands)
    for got_one, want_one in zip(got, want, strict=True):
        error = np.abs(np.asarray(got_one, np.float32) - want_one).max()
        # Two roundings of the result, or float32 sums in another order.
        bound = max(2 * float(ml_dtypes.finfo(case.dtype).eps), 1e-5) * np.abs(want_one).max()
        np.testing.assert_array_less(error, bound)


def run_case(case: Case, repeats: int) -> None:
    """Checks and times one case, at full use and at a quarter of it."""
    quarter = dataclasses.replace(case, name=f"{case.name}, 1/4 used", used=case.used // 4)
    calls: dict[tuple[str, str], timing.Contender] = {}
    for mode in _MODES:
        for use in (case, quarter):
            operands = use.operands()
            check(use, operands)
            call = functools.partial(program(jax_ep.grouped_matmul, mode), *operands)
            calls[use.name, mode] = call
        operands = case.operands()
        for name, matmul in (("ragged_dot", jax.lax.ragged_dot), ("dense", dense)):
            calls[name, mode] = functools.partial(program(matmul, mode), *operands)
    report(case, timing.compare(calls, repeats=repeats))


def report(case: Case, times: dict[tuple[str, str], timing.Times]) -> None:
    """Prints a table and a record of each contender."""
    rows = []
    for (name, mode), spent in times.items():
        ratio = times["ragged_dot", mode].median / spent.median
        record = {
            **case.as_json(),
            "bench": "grouped_matmul",
            "contender": name,
            "mode": mode,
            "ragged_dot_over_this": round(ratio, 2),
            **spent.as_json(),
        }
        met = "-"
        if case.name == "goal" and name == case.name:
            met = "yes" if ratio >= _GOAL else "NO"
        rows.append([f"{name}, {mode}", spent, f"{ratio:.1f}", met])
        timing.print_json(record)
    title = (
        f"{case.name}: {case.used} of {case.capacity} rows, hidden {case.hidden}, "
        f"ffn_hidden {case.ffn_hidden}, {case.num_groups} groups, {np.dtype(case.dtype).name}"
    )
    header = ("contender", "ms (p10-p90)", "x ragged_dot", f">= {_GOAL:g} x")
    timing.print_table(title, header, rows)


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    for name in _cases.value or CASES:
        case, repeats = CASES[name], _repeats.value
        if _quick.value:
            case = dataclasses.replace(case, capacity=256, used=192, hidden=32, ffn_hidden=16)
            repeats = min(repeats, 3)
        run_case(case, repeats)


if __name__ == "__main__":
    app.run(main)
