"""Runs a case and compares everything with the oracle; then hands its kernels hostile plans."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import attacks
import exchanges
import jax
import jax.numpy as jnp
import numpy as np
from exchanges import Answers, Inputs
from hostile_plans import ALTERATIONS, FIELDS, altered
from implementations import AXIS
from jax.sharding import AxisType, PartitionSpec
from strategies import payload, poisoned

import jax_ep

from .case import Case

Program = Callable[..., Any]
WAIT, WAIT_AT_MOST = 1.0, 20.0
NAMES_A_FIELD = re.compile(rf"plan\b.*\b({'|'.join(FIELDS)})\b|waited 1 s for ranks? ")


def check(case: Case, counts: collections.Counter[str]) -> None:
    """Compares a case's results with the oracle's.

    Raises:
      AssertionError: they differ, or a hostile plan did harm; so does ``pytest.fail``.
    """
    with jax.enable_x64(case.dtype == np.float64):
        program = jax.jit(_place(case))
        for name, topk_idx in case.routings():
            _check_routing(case, program, topk_idx)
            counts[f"routing {name}"] += case.count
        if case.place == "plain":
            _attack(case, counts)
    counts["cases"] += 1
    counts.update(case.kinds)


def _make(case: Case) -> Program:
    return lambda topk_idx: attacks.make_plan(case.row, topk_idx, case.shape)


def _use(case: Case) -> Program:
    """Returns what uses a plan in every way, each exchange wrapped as the case says."""
    dispatch = WRAPS[case.wrap](lambda plan, x: jax_ep.dispatch(x, plan))
    combine = WRAPS[case.wrap](lambda plan, r, w: jax_ep.combine(r, plan, w))
    unweighted = WRAPS[case.wrap](lambda plan, r: jax_ep.combine(r, plan))

    def use(plan, x, rows, weights, drows, dout):
        results = exchanges.fields_of(plan)
        if jnp.issubdtype(x.dtype, jnp.floating):
            results["sent"], pull = jax.vjp(lambda x: dispatch(plan, x), x)
            results["dx"] = pull(drows)[0]
        else:
            results["sent"] = dispatch(plan, x)
        results["out"], pull = jax.vjp(lambda r, w: combine(plan, r, w), rows, weights)
        results["drows"], results["dweights"] = pull(dout)
        results["plain"], pull = jax.vjp(lambda r: unweighted(plan, r), rows)
        results["plain_drows"] = pull(dout)[0]
        return results

    return use


def _in_a_scan(f: Program) -> Program:
    def run(*args):
        one_step = jax.tree.map(lambda a: a[None], args)
        return jax.lax.scan(lambda _, now: (None, f(*now)), None, one_step)[1][0]

    return run


def _in_a_cond(f: Program) -> Program:
    def run(plan, *args):
        always = jnp.all(plan.group_sizes >= 0)
        nothing = lambda *args: jnp.zeros_like(f(*args))  # noqa: E731
        return jax.lax.cond(always, f, nothing, plan, *args)

    return run


WRAPS: dict[str, Callable[[Program], Program]] = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _in_a_scan,
    "cond": _in_a_cond,
}


def _place(case: Case) -> Program:
    """Returns the whole program, on arrays [R, count, ...]."""
    make, use, num_ranks = _make(case), _use(case), case.shape.num_ranks
    match case.place:
        case "plain":
            ranks = case.row.over_ranks(lambda idx, *args: use(make(idx), *args), num_ranks)
            return lambda *args: jax.tree.map(lambda a: a[:, None], ranks(*(a[:, 0] for a in args)))
        case "groups":
            return _groups(lambda idx, *args: use(make(idx), *args), num_ranks)
        case name:
            return getattr(attacks, name)(case.row, make, use, num_ranks)


def _groups(f: Program, num_ranks: int) -> Program:
    """Spreads the batch over a mesh axis: two groups of ranks at once."""
    axis_types, some = (AxisType.Auto,) * 2, jax.devices()[: 2 * num_ranks]
    mesh = jax.make_mesh((2, num_ranks), ("data", AXIS), axis_types=axis_types, devices=some)
    spec = PartitionSpec(AXIS, "data")

    def block(*args):
        return jax.tree.map(lambda a: a[None, None], f(*(a[0, 0] for a in args)))

    return jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec)


def _inputs(case: Case, topk_idx: np.ndarray) -> Inputs:
    """Draws one exchange's inputs [R, ...]; tokens may have a dtype of their own."""
    shape, dtype = case.shape, case.token_dtype
    inputs = Inputs.of(shape, topk_idx, case.dtype)
    named = shape.plan(topk_idx).named
    drows = inputs.drows
    if dtype.kind not in "iu":
        drows = poisoned((*named.shape, shape.hidden), named, dtype, seed=5)
    return dataclasses.replace(inputs, x=payload(shape, dtype), drows=drows)


def _arrays(inputs: Inputs) -> tuple[np.ndarray, ...]:
    return tuple(getattr(inputs, field.name) for field in dataclasses.fields(inputs))


def _check_routing(case: Case, program: Program, topk_idx: np.ndarray) -> None:
    entries = [_inputs(case, topk_idx[:, i]) for i in range(case.count)]
    got = jax.device_get(program(*attacks.stack([_arrays(e) for e in entries], 1)))
    for i, inputs in enumerate(entries):
        _check_entry(case, inputs, {name: a[:, i] for name, a in got.items()})


def _check_entry(case: Case, inputs: Inputs, got: dict[str, np.ndarray]) -> None:
    plan, want = exchanges.expect(case.shape, inputs)
    result = Answers(case.row, case.shape, inputs, plan, got, want)
    for name in (*exchanges.FIELDS, *exchanges.TARGETS):
        result.same(name)
    for name in ("sent", "drows", "plain_drows"):
        result.same_rows(name)
    if "dx" in got:
        result.same_sum("dx", inputs.drows)
    result.same_sum("out", inputs.rows, inputs.weights)
    result.same_sum("plain", inputs.rows)
    result.close_dots()
    assert (got["dweights"][~plan.kept] == 0).all()


def _attack(case: Case, counts: collections.Counter[str]) -> None:
    """Gives hostile plans to compiled programs: an error that names a field, or any result."""
    rng = np.random.default_rng([case.seed, 2])
    num_ranks = case.shape.num_ranks
    topk_idx = next(case.routings())[1][:, 0]
    inputs = _inputs(case, topk_idx)
    plan = jax.device_get(case.row.jit(_make(case), num_ranks)(topk_idx))
    use, args = case.row.jit(_use(case), num_ranks), _arrays(inputs)[1:]
    _check_entry(case, inputs, jax.device_get(use(plan, *args)))
    for _ in range(4):
        hostile = plan
        for i in rng.integers(len(ALTERATIONS), size=rng.integers(1, 3)):
            some = slice(None) if rng.random() < 0.5 else slice(0, 1)
            hostile = altered(hostile, ALTERATIONS[i], some)
        refused = _run_hostile(use, hostile, args)
        counts[f"hostile plans {'refused' if refused else 'harmless'} by {case.row}"] += 1
        _check_entry(case, inputs, jax.device_get(use(plan, *args)))


def _run_hostile(use: Program, plan: jax_ep.Plan, args: tuple[np.ndarray, ...]) -> bool:
    before, start = jax_ep.set_wait_timeout(WAIT), time.monotonic()
    try:
        jax.block_until_ready(use(plan, *args))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not NAMES_A_FIELD.search(str(error)):
            raise
        return True
    finally:
        jax_ep.set_wait_timeout(before)
        took = time.monotonic() - start
        if took > WAIT_AT_MOST:
            raise AssertionError(f"a hostile plan was waited for {took:.1f} s")
    return False
