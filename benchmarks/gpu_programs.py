"""The programs that the benchmark on a GPU times: checked, compiled, on stacked ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checks import PLAN_FIELDS, Expected, assert_as_expected, fields_rows_and_sums, oracle
from device_timing import Steps
from programs import AXIS, Implementation, Inputs, Tail, exchange, make_inputs, planner
from shapes import Shape

import jax_ep

ROUTINGS = {"uniform": 0.0, "zipf": 0.65}
OURS, ZERO_TAIL, XLA, SORT = "native", "native, tail zero", "xla", "sort + segment_sum"
COLD = "native, L2 cold in between"
# The oracle's loops are slow: it sees the same ranks and experts with fewer and shorter tokens.
_ORACLE_TOKENS, _ORACLE_HIDDEN = 32, 136
_VARIANTS: dict[str, tuple[Implementation, Tail]] = {
    OURS: ("native", "uninitialized"),
    ZERO_TAIL: ("native", "zero"),
    XLA: ("xla", "zero"),
}


def stacked(per_rank: Callable[..., Any]) -> Any:
    """Compiles what one rank does into a program of all, on arrays with a leading axis of ranks."""
    return jax.jit(jax.vmap(per_rank, axis_name=AXIS))


@jax.jit
def sort_and_segment_sum(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """Groups the rows of all ranks by expert and adds them up again, without ranks or capacity."""
    num_ranks, num_tokens, num_topk = topk_idx.shape
    order = jnp.argsort(topk_idx.reshape(-1), stable=True)
    token = order // num_topk
    rows = jax.lax.optimization_barrier(x.reshape(num_ranks * num_tokens, -1)[token])
    terms = topk_weights.reshape(-1)[order][:, None] * rows.astype(jnp.float32)
    sums = jax.ops.segment_sum(terms, token, num_segments=num_ranks * num_tokens)
    return sums.astype(x.dtype).reshape(x.shape)


def draw_tokens(shape: Shape) -> jax.Array:
    """Draws the tokens of all ranks on the device."""
    size = (shape.num_ranks, shape.num_tokens, shape.hidden)
    return jax.jit(lambda: jax.random.normal(jax.random.key(0), size, shape.dtype))()


def draw_inputs(shape: Shape, routing: str, x: jax.Array) -> Inputs:
    """Draws choices and weights as ``make_inputs`` does, for tokens that are there."""
    drawn = make_inputs(dataclasses.replace(shape, hidden=1), ROUTINGS[routing])
    return Inputs(x, jnp.asarray(drawn.topk_idx), jnp.asarray(drawn.topk_weights))


class Moved(NamedTuple):
    """The fewest bytes of rows that an op has to read and write, for all ranks together."""

    strict: int
    """On one device, which reads a token once for all of its rows."""

    between: int
    """Between devices: a token is read once for each rank that wants it."""


def moved_bytes(shape: Shape, topk_idx: np.ndarray, kept: np.ndarray) -> dict[str, Moved]:
    """Counts the bytes of each op; those of the plan's numbers are few, and left out."""
    dest = topk_idx // shape.num_local_experts
    sent = sum(int(((dest == d) & kept).any(-1).sum()) for d in range(shape.num_ranks))
    tokens, distinct, used = kept[..., 0].size, int(kept.any(-1).sum()), int(kept.sum())
    row = shape.row_bytes
    to_rows = Moved((distinct + used) * row, (sent + used) * row)
    sums = Moved(*[(used + tokens) * row] * 2)
    dots = Moved(*[(used + distinct) * row + 4 * kept.size] * 2)
    return {
        "dispatch": to_rows,
        "combine": sums,
        "scaled rows": to_rows,
        "row dots": dots,
        "plain sums": sums,
    }


def crossing_bytes(shape: Shape, topk_idx: np.ndarray, kept: np.ndarray) -> int:
    """Counts the most bytes that a rank receives from, or sends to, all others in an exchange."""
    dest = topk_idx // shape.num_local_experts
    wanted = np.stack(
        [((dest == d) & kept).any(-1).sum(-1) for d in range(shape.num_ranks)], axis=-1
    )
    np.fill_diagonal(wanted, 0)
    return int(max(wanted.sum(0).max(), wanted.sum(1).max())) * shape.row_bytes


def _scaled_rows(dout: jax.Array, rows: jax.Array, plan: jax_ep.Plan, weights: jax.Array) -> Any:
    return jax.vjp(lambda rows: jax_ep.combine(rows, plan, weights), rows)[1](dout)[0]


def _row_dots(dout: jax.Array, rows: jax.Array, plan: jax_ep.Plan, weights: jax.Array) -> Any:
    return jax.vjp(lambda weights: jax_ep.combine(rows, plan, weights), weights)[1](dout)[0]


def _plain_sums(drows: jax.Array, x: jax.Array, plan: jax_ep.Plan) -> Any:
    return jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)[1](drows)[0]


class SmallPrograms:
    """A shape's programs with fewer and shorter tokens, whose results the oracle knows."""

    def __init__(self, shape: Shape) -> None:
        tokens = min(shape.num_tokens, _ORACLE_TOKENS)
        self.shape = dataclasses.replace(shape, num_tokens=tokens, hidden=_ORACLE_HIDDEN)
        self.forward = {
            name: stacked(fields_rows_and_sums(self.shape, *variant))
            for name, variant in _VARIANTS.items()
        }
        self.backward = stacked(self._gradients)

    def _gradients(self, x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> Any:
        plan = planner(self.shape, "native", "zero")(topk_idx)
        rows = jax_ep.dispatch(x, plan)
        return (
            _scaled_rows(x, rows, plan, weights),
            _row_dots(x, rows, plan, weights),
            _plain_sums(rows, x, plan),
        )

    def check(self, routing: str) -> None:
        """Compares all results with the oracle's.

        Raises:
          AssertionError: a result is off.
        """
        inputs = make_inputs(self.shape, ROUTINGS[routing])
        expected = Expected(self.shape, inputs)
        for name, program in self.forward.items():
            assert_as_expected(expected, *_VARIANTS[name], program(*inputs.as_tuple()))
        scaled, dots, sums = map(np.asarray, self.backward(*inputs.as_tuple()))
        plan, rows = expected.plan, expected.rows
        want_scaled, want_dots = oracle.combine_grad(rows, plan, inputs.topk_weights, inputs.x)
        np.testing.assert_array_equal(scaled, want_scaled, "scaled rows")
        np.testing.assert_array_equal(sums, oracle.dispatch_grad(rows, plan), "plain sums")
        np.testing.assert_allclose(dots, want_dots, rtol=1e-4, atol=1e-2, err_msg="row dots")


class Programs:
    """The compiled programs of one shape, for any routing."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.small = SmallPrograms(shape)
        planners = {name: planner(shape, *variant) for name, variant in _VARIANTS.items()}
        self.plans = {name: stacked(planners[name]) for name in (OURS, XLA)}
        self.exchanges = {name: stacked(exchange(make)) for name, make in planners.items()}
        self.exchanges[SORT] = sort_and_segment_sum
        self.dispatch, self.combine = stacked(jax_ep.dispatch), stacked(jax_ep.combine)
        self.scaled_rows, self.row_dots = stacked(_scaled_rows), stacked(_row_dots)
        self.plain_sums = stacked(_plain_sums)
        self.send = stacked(functools.partial(_send, planners[OURS]))

    def check_ops(self, inputs: Inputs) -> None:
        """Compares the results of ours with what they are sums and copies of.

        Raises:
          AssertionError: a result is off.
        """
        x, topk_idx, weights = inputs.as_tuple()
        plan = self.plans[OURS](topk_idx)
        rows = self.dispatch(x, plan)
        ones = jnp.ones_like(weights)
        for name, sums, factors in (
            ("combine", self.combine(rows, plan, weights), weights),
            ("plain sums", self.plain_sums(rows, x, plan), ones),
            ("scaled rows", self.plain_sums(self._scaled(inputs, plan, rows), x, plan), weights),
        ):
            wrong = _num_wrong_sums(sums, (x, topk_idx, factors), plan.kept)
            assert wrong == 0, f"{name}: {wrong} sums are off"
        wrong = _num_wrong_dots(self.row_dots(x, rows, plan, weights), x, plan.kept)
        assert wrong == 0, f"row dots: {wrong} are off"

    def check_exchanges(self, inputs: Inputs) -> None:
        """Compares plans and rows of ours with those of pure JAX, and all sums with their terms.

        Raises:
          AssertionError: a result is off.
        """
        plan, want = (self.plans[name](inputs.topk_idx) for name in (OURS, XLA))
        for field in PLAN_FIELDS:
            np.testing.assert_array_equal(getattr(plan, field), getattr(want, field), field)
        rows = [self.dispatch(inputs.x, plan) for plan in (plan, want)]
        wrong = _num_wrong_rows(*rows, want.group_sizes)
        assert wrong == 0, f"{wrong} values of rows differ"
        everything = jnp.ones_like(want.kept)
        for name, program in self.exchanges.items():
            kept = everything if name == SORT else want.kept
            wrong = _num_wrong_sums(program(*inputs.as_tuple()), inputs.as_tuple(), kept)
            assert wrong == 0, f"{name}: {wrong} sums are off"

    def whole(self, inputs: Inputs) -> dict[str, Steps]:
        """Returns whole exchanges to time, each as one program, and ours as two."""
        x, topk_idx, weights = inputs.as_tuple()
        calls: dict[str, Steps] = {
            name: [functools.partial(program, x, topk_idx, weights)]
            for name, program in self.exchanges.items()
        }
        # In a model the experts come in between, and what dispatch wrote is in no cache then.
        send = functools.partial(self.send, x, topk_idx)
        return calls | {COLD: [send, lambda rows, plan: self.combine(rows, plan, weights)]}

    def ops(self, inputs: Inputs) -> dict[str, Steps]:
        """Returns ours to time an op at a time, forward and backward."""
        x, topk_idx, weights = inputs.as_tuple()
        plan = self.plans[OURS](topk_idx)
        rows = self.dispatch(x, plan)
        calls = {
            "plan": functools.partial(self.plans[OURS], topk_idx),
            "dispatch": functools.partial(self.dispatch, x, plan),
            "combine": functools.partial(self.combine, rows, plan, weights),
            "scaled rows": functools.partial(self.scaled_rows, x, rows, plan, weights),
            "row dots": functools.partial(self.row_dots, x, rows, plan, weights),
            "plain sums": functools.partial(self.plain_sums, rows, x, plan),
        }
        return {name: [call] for name, call in calls.items()}

    def _scaled(self, inputs: Inputs, plan: jax_ep.Plan, rows: jax.Array) -> jax.Array:
        return self.scaled_rows(inputs.x, rows, plan, inputs.topk_weights)


def _send(
    make_plan: Callable[[jax.Array], jax_ep.Plan], x: jax.Array, topk_idx: jax.Array
) -> tuple[jax.Array, jax_ep.Plan]:
    plan = make_plan(topk_idx)
    return jax_ep.dispatch(x, plan), plan


@jax.jit
def _num_wrong_rows(got: jax.Array, want: jax.Array, group_sizes: jax.Array) -> jax.Array:
    used = jnp.arange(got.shape[1]) < group_sizes.sum(-1, keepdims=True)
    return jnp.sum((got != want) & used[..., None], dtype=jnp.int32)


@jax.jit
def _num_wrong_sums(out: jax.Array, inputs: Any, kept: jax.Array) -> jax.Array:
    """Counts sums that are off by more than eight last places of ``kept`` weights times tokens."""
    x, _, topk_weights = inputs
    want = jnp.where(kept, topk_weights, 0).sum(-1, keepdims=True) * x.astype(jnp.float32)
    bound = 8 * float(jnp.finfo(out.dtype).eps) * jnp.abs(want)
    # Written this way round, a NaN is wrong.
    return jnp.sum(~(jnp.abs(out.astype(jnp.float32) - want) <= bound), dtype=jnp.int32)


@jax.jit
def _num_wrong_dots(dots: jax.Array, x: jax.Array, kept: jax.Array) -> jax.Array:
    """Counts products of tokens with themselves that are off by a ten-thousandth."""
    squares = jnp.sum(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    want = jnp.where(kept, squares, 0)
    return jnp.sum(~(jnp.abs(dots - want) <= 1e-4 * want), dtype=jnp.int32)
