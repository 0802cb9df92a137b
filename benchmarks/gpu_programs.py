"""The programs that the benchmark on a GPU times: checked, compiled, on stacked ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from checks import PLAN_FIELDS, Expected, assert_as_expected, fields_rows_and_sums
from programs import AXIS, Implementation, Inputs, Tail, exchange, make_inputs, planner
from shapes import Shape

import jax_ep

ROUTINGS = {"uniform": 0.0, "zipf": 0.65}
TAILS: tuple[Tail, ...] = ("uninitialized", "zero")
OURS, XLA, SORT = "native, tail uninitialized", "xla", "sort + segment_sum"
# The oracle's loops are slow: it sees the same ranks and experts with fewer and shorter tokens.
_ORACLE_TOKENS, _ORACLE_HIDDEN = 32, 136


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


def draw_inputs(shape: Shape, routing: str) -> Inputs:
    """Draws inputs as ``make_inputs`` does, but the tokens on the device."""
    drawn = make_inputs(dataclasses.replace(shape, hidden=1), ROUTINGS[routing])
    size = (shape.num_ranks, shape.num_tokens, shape.hidden)
    x = jax.jit(lambda: jax.random.normal(jax.random.key(0), size, shape.dtype))()
    return Inputs(x, jnp.asarray(drawn.topk_idx), jnp.asarray(drawn.topk_weights))


def moved_bytes(shape: Shape, topk_idx: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """Counts the bytes that dispatch and combine of all ranks have to read and write."""
    dest = topk_idx // shape.num_local_experts
    tokens_sent = sum(int(((dest == d) & kept).any(-1).sum()) for d in range(shape.num_ranks))
    used, sums = int(kept.sum()), shape.num_ranks * shape.num_tokens
    return {
        "dispatch": (tokens_sent + used) * shape.row_bytes,
        "combine": (used + sums) * shape.row_bytes,
    }


def check_small(shape: Shape, routing: str) -> None:
    """Compares all results with the oracle's, on fewer and shorter tokens.

    Raises:
      AssertionError: a result is off.
    """
    tokens = min(shape.num_tokens, _ORACLE_TOKENS)
    small = dataclasses.replace(shape, num_tokens=tokens, hidden=_ORACLE_HIDDEN)
    inputs = make_inputs(small, ROUTINGS[routing])
    expected = Expected(small, inputs)
    variants: list[tuple[Implementation, Tail]] = [("native", tail) for tail in TAILS]
    for implementation, tail in [*variants, ("xla", "zero")]:
        program = stacked(fields_rows_and_sums(small, implementation, tail))
        assert_as_expected(expected, implementation, tail, program(*inputs.as_tuple()))


class Programs:
    """The compiled programs of one shape, for any routing."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.plans = {
            f"native, tail {tail}": stacked(planner(shape, "native", tail)) for tail in TAILS
        } | {XLA: stacked(planner(shape, "xla", "zero"))}
        self.exchanges = {
            f"native, tail {tail}": stacked(exchange(planner(shape, "native", tail)))
            for tail in TAILS
        } | {
            XLA: stacked(exchange(planner(shape, "xla", "zero"))),
            SORT: sort_and_segment_sum,
        }
        self.dispatch = stacked(jax_ep.dispatch)
        self.combine = stacked(jax_ep.combine)

    def check(self, inputs: Inputs) -> None:
        """Compares implementations with each other, and sums with what they are sums of.

        Raises:
          AssertionError: a result is off.
        """
        plans = {name: make_plan(inputs.topk_idx) for name, make_plan in self.plans.items()}
        want = plans[XLA]
        want_rows = self.dispatch(inputs.x, want)
        for name, plan in plans.items():
            for field in PLAN_FIELDS:
                np.testing.assert_array_equal(
                    getattr(plan, field), getattr(want, field), f"{name}: {field}"
                )
            if name != XLA:
                wrong = _num_wrong_rows(self.dispatch(inputs.x, plan), want_rows, want.group_sizes)
                assert wrong == 0, f"{name}: {wrong} values of rows differ"
        everything = jnp.ones_like(want.kept)
        for name, program in self.exchanges.items():
            kept = everything if name == SORT else want.kept
            wrong = _num_wrong_sums(program(*inputs.as_tuple()), inputs.as_tuple(), kept)
            assert wrong == 0, f"{name}: {wrong} sums are off"

    def calls(self, inputs: Inputs) -> dict[str, timing.Contender]:
        """Returns what is to be timed: whole exchanges, and ours an op at a time."""
        x, topk_idx, weights = inputs.as_tuple()
        calls: dict[str, timing.Contender] = {
            name: functools.partial(program, x, topk_idx, weights)
            for name, program in self.exchanges.items()
        }
        for name in (f"native, tail {tail}" for tail in TAILS):
            plan = self.plans[name](topk_idx)
            rows = self.dispatch(x, plan)
            calls[f"{name}: plan"] = functools.partial(self.plans[name], topk_idx)
            calls[f"{name}: dispatch"] = functools.partial(self.dispatch, x, plan)
            calls[f"{name}: combine"] = functools.partial(self.combine, rows, plan, weights)
        return calls

    def print_memory(self, inputs: Inputs) -> None:
        """Prints what compiled programs take besides their arguments, and what ours may take."""
        shape = self.shape
        plan = self.plans[OURS](inputs.topk_idx)
        plan_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(plan))
        out = shape.num_ranks * shape.num_tokens * shape.row_bytes
        rows = shape.num_ranks * shape.capacity * shape.row_bytes
        allowed = out + rows + plan_bytes + shape.num_ranks * out
        table = []
        for name, program in self.exchanges.items():
            stats = program.lower(*inputs.as_tuple()).compile().memory_analysis()
            record = {"temporary": stats.temp_size_in_bytes, "output": stats.output_size_in_bytes}
            met = ("yes" if sum(record.values()) <= allowed else "NO") if name == OURS else "-"
            table.append([name, *record.values(), met])
            timing.print_json(
                {**shape.as_json(), "bench": "gpu memory", "contender": name, **record}
            )
        goal = f"<= {allowed}"
        timing.print_table("memory in bytes", ("program", "temporary", "output", goal), table)


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
