"""What ``python -m jax_ep bench`` times: each op and its gradient, as a program of its own."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _programs, _timing
from jax_ep._answer import answer, combined, difference, dots, sizes
from jax_ep._combine import combine
from jax_ep._dispatch import dispatch
from jax_ep._layout import suggest_capacity
from jax_ep._make_plan import make_plan
from jax_ep._plan import Plan
from jax_ep._types import Implementation

COPY = "plain copy, out and back"

# Of each rank, spread over all: rows and sums of so many tokens are checked.
_CHECKED_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange: the choices of all ranks, at one step or several, and what else it is given."""

    steps: np.ndarray
    hidden: int
    num_experts: int
    dtype: str
    routing: str
    capacity_factor: float
    implementation: Implementation | None

    @property
    def num_ranks(self) -> int:
        """Ranks along the expert axis."""
        return self.steps.shape[1]

    @property
    def capacity(self) -> int:
        """Rows of each rank's buffer."""
        _, num_ranks, num_tokens, num_topk = self.steps.shape
        factor = self.capacity_factor
        return suggest_capacity(num_tokens, num_topk, self.num_experts, num_ranks, factor=factor)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * jnp.dtype(self.dtype).itemsize


class Programs:
    """The programs of a case, on a device for each rank, or on one for all if there are fewer."""

    def __init__(self, case: Case) -> None:
        """Makes inputs, and the plans of all steps."""
        self.case = case
        devices = jax.devices()
        self._mesh = None
        if len(devices) >= case.num_ranks:
            self._mesh = _programs.make_mesh(devices[: case.num_ranks])
        rng = np.random.default_rng(0)
        _, num_ranks, num_tokens, num_topk = case.steps.shape
        tokens = (num_ranks, num_tokens, case.hidden)
        self._inputs = {
            "x": rng.standard_normal(tokens, np.float32).astype(jnp.dtype(case.dtype)),
            "dout": rng.standard_normal(tokens, np.float32).astype(jnp.dtype(case.dtype)),
            "weights": rng.random((num_ranks, num_tokens, num_topk), np.float32),
        }
        self._x, self._dout, self._weights = map(self._put, self._inputs.values())
        self._steps = [self._put(step) for step in case.steps]
        self._plan = self._over(
            partial(
                make_plan,
                num_experts=case.num_experts,
                axis_name=_programs.AXIS,
                capacity=case.capacity,
                tail="uninitialized",
                implementation=case.implementation,
            )
        )
        self._dispatch, self._combine = self._over(dispatch), self._over(combine)
        self._pull_dispatch = self._over(_pull_dispatch)
        self._pull_combine = self._over(_pull_combine)
        self._plans: list[Plan] = [self._plan(step) for step in self._steps]
        self._rows = self._dispatch(self._x, self._plans[0])

    @property
    def where(self) -> str:
        """The devices, in words."""
        devices = jax.devices()[: self.case.num_ranks if self._mesh else 1]
        return f"{len(devices)} x {devices[0].platform}: {devices[0].device_kind}"

    @property
    def implementation(self) -> Implementation:
        """What carries the exchanges."""
        return self._plans[0].implementation

    def count_kept(self) -> float:
        """Counts the choices that have a row, in the mean of all steps."""
        return float(np.mean([np.sum(plan.kept) for plan in self._plans]))

    def check(self) -> None:
        """Checks all results of the first step: all of the plan, and what concerns some tokens.

        Raises:
          AssertionError: something is not as it should be.
        """
        case = self.case
        plan = answer(case.steps[0], case.num_experts, case.capacity)
        for name, field in plan.fields.items():
            _assert_same(f"plan: {name}", getattr(self._plans[0], name), field)
        num_tokens = case.steps.shape[2]
        tokens = np.unique(np.linspace(0, num_tokens - 1, _CHECKED_TOKENS).astype(int))
        some = plan.of_tokens(tokens)
        x, dout, weights = (self._inputs[name][:, tokens] for name in ("x", "dout", "weights"))
        rows = np.asarray(self._rows)
        kept = some.kept
        source, token, _ = np.nonzero(kept)
        _assert_same("dispatch", rows[some.rank[kept], some.row[kept]], x[source, token])
        exact = self.implementation == "native" and case.dtype != "float32"
        out = self._combine(self._rows, self._plans[0], self._weights)
        dx = self._pull_dispatch(self._x, self._plans[0], self._rows)
        for name, got, scale in (("combine", out, weights), ("gradient of dispatch", dx, None)):
            bound = None if exact else sizes(rows, some, scale)
            _assert_same(name, np.asarray(got)[:, tokens], combined(rows, some, scale), bound)
        drows, dweights = map(np.asarray, self._pull_combine(*self._of_combine(self._plans[0])))
        scaled = weights[kept][:, None] * dout[source, token].astype(np.float32)
        got = drows[some.rank[kept], some.row[kept]]
        _assert_same("gradient of combine: rows", got, scaled.astype(dout.dtype))
        bound = case.hidden * dots(np.abs(rows), some, np.abs(dout))
        want = dots(rows, some, dout)
        _assert_same("gradient of combine: weights", dweights[:, tokens], want, bound)

    def calls(self) -> dict[str, _timing.Contender]:
        """Returns a call of each op, which takes the steps in turn."""
        return {
            "plan": _in_turn(self._plan, self._steps),
            "dispatch": _in_turn(partial(self._dispatch, self._x), self._plans),
            "combine": _in_turn(
                lambda plan: self._combine(self._rows, plan, self._weights), self._plans
            ),
            "dispatch, backward": _in_turn(
                lambda plan: self._pull_dispatch(self._x, plan, self._rows), self._plans
            ),
            "combine, backward": _in_turn(
                lambda plan: self._pull_combine(*self._of_combine(plan)), self._plans
            ),
        }

    def copies(self, num_rows: int) -> _timing.Contender:
        """Returns a call that copies so many rows twice, as fast as the devices can."""
        if jax.devices()[0].platform == "cpu":
            threads = len(os.sched_getaffinity(0))
            return _timing.make_copies(num_rows, self.case.row_bytes, num_threads=threads)
        each = -(-num_rows // self.case.num_ranks)
        rows = self._put(np.zeros((self.case.num_ranks, each, self.case.hidden), self._x.dtype))
        # A copy that XLA cannot leave out.
        copy = jax.jit(jnp.negative)
        return lambda: copy(copy(rows))

    def _of_combine(self, plan: Plan) -> tuple[Any, ...]:
        return self._rows, plan, self._weights, self._dout

    def _put(self, array: np.ndarray) -> jax.Array:
        return _programs.put(array, self._mesh) if self._mesh else jnp.asarray(array)

    def _over(self, per_rank: Callable[..., Any]) -> Any:
        if self._mesh is not None:
            return _programs.over_ranks(per_rank, self._mesh)
        return jax.jit(jax.vmap(per_rank, axis_name=_programs.AXIS))


def _pull_dispatch(x: jax.Array, plan: Plan, drows: jax.Array) -> jax.Array:
    _, pull = jax.vjp(partial(dispatch, plan=plan), x)
    return pull(drows)[0]


def _pull_combine(
    rows: jax.Array, plan: Plan, weights: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(lambda rows, weights: combine(rows, plan, weights), rows, weights)
    return pull(dout)


def _in_turn(op: Callable[[Any], Any], steps: Iterable[Any]) -> _timing.Contender:
    turn = itertools.cycle(steps)
    return lambda: op(next(turn))


def _assert_same(
    name: str, got: jax.Array | np.ndarray, want: np.ndarray, bound: np.ndarray | None = None
) -> None:
    problem = difference(jnp.asarray(got), want, bound)
    if problem is not None:
        raise AssertionError(f"{name} {problem}")
