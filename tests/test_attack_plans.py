"""Plans that somebody altered: public fields change nothing, private ones harm nobody."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import attacks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacks import Numbers, make_plan, same
from hostile_plans import ALTERATIONS, FIELDS, Alteration, altered
from implementations import ONE, SHARD_MAP, VMAP, Row, require
from strategies import Shape

import jax_ep

SHAPE = Shape(num_ranks=8, num_tokens=4, num_topk=2, num_experts=16, hidden=3, capacity=9)
ALONE = dataclasses.replace(SHAPE, num_ranks=1, num_experts=2)
WAIT = 5.0
NATIVE = [Row("native", fabric, exact=True) for fabric in (SHARD_MAP, VMAP, ONE)]
PUBLIC = [f.name for f in dataclasses.fields(jax_ep.Plan) if not f.name.startswith("_")]


def there_and_back(plan: jax_ep.Plan, x, weights, dout) -> dict[str, jax.Array]:
    """Exchanges four times, forward and back, and itself reads no field of the plan."""

    def twice(x, weights):
        return jax_ep.combine(2 * jax_ep.dispatch(x, plan), plan, weights)

    out, pull = jax.vjp(twice, x, weights)
    dx, dweights = pull(dout)
    return {"out": out, "dx": dx, "dweights": dweights}


def public_answers(numbers: Numbers, shape: Shape) -> dict[str, np.ndarray]:
    twice = dataclasses.replace(numbers, scale=np.full_like(numbers.scale, 2))
    want = twice.expect(shape)
    del want["dscale"]
    return want


REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "rounded_up": lambda a: (a + 127) // 128 * 128,
    "negative": lambda a: jnp.full_like(a, -1),
    "most": lambda a: jnp.full_like(a, 2**31 - 1),
    "nothing": lambda _: None,
    "another_shape": lambda a: jnp.zeros((3, *a.shape), jnp.float32),
}


def test_public_fields_replaced(row: Row) -> None:
    """Rounding group sizes up for one's own kernel corrupted the heap."""
    shape = ALONE if row.fabric is ONE else attacks.SHAPE
    numbers = Numbers.draw(np.random.default_rng(0), shape)
    want = public_answers(numbers, shape)

    def per_rank(topk_idx, x, weights, dout):
        plan = make_plan(row, topk_idx, shape)
        results = {}
        for name in PUBLIC:
            for how, change in REPLACEMENTS.items():
                value = getattr(plan, name)
                value = value.astype(jnp.int32) if how in ("rounded_up", "most") else value
                other = dataclasses.replace(plan, **{name: change(value)})
                results[f"{name} {how}"] = there_and_back(other, x, weights, dout)
        return results

    args = numbers.topk_idx, numbers.x, numbers.weights, numbers.dout
    for got in row.jit(per_rank, shape.num_ranks)(*args).values():
        same(got, want)


def cast(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32)


def mean(a: jax.Array) -> jax.Array:
    return jnp.mean(a.astype(jnp.float32))


def stacked(a: jax.Array) -> jax.Array:
    return a[None]


def doubled(a: jax.Array) -> jax.Array:
    return jnp.concatenate([a[None], a[None]])


@pytest.mark.parametrize("change", [cast, mean, stacked, doubled])
@pytest.mark.parametrize("use", ["dispatch", "combine"])
def test_a_plan_mapped_over_like_parameters(row: Row, use: str, change) -> None:
    """Averaged, cast or stacked, it is refused while tracing, by the name of what is wrong."""
    shape = ALONE if row.fabric is ONE else attacks.SHAPE

    def per_rank(topk_idx):
        plan = jax.tree.map(change, make_plan(row, topk_idx, shape))
        if use == "dispatch":
            return jax_ep.dispatch(jnp.zeros((shape.num_tokens, 1)), plan)
        return jax_ep.combine(jnp.zeros((plan.capacity, 1)), plan)

    program = row.over_ranks(per_rank, shape.num_ranks)
    names = "|".join(FIELDS)
    with pytest.raises((TypeError, ValueError), match=rf"plan must .*\b({names})\b"):
        jax.eval_shape(program, np.zeros(shape.topk_shape, np.int32))


def dispatch(plan, x, rows, weights, dout):
    del rows, weights, dout
    return jax_ep.dispatch(x, plan)


def dispatch_gradient(plan, x, rows, weights, dout):
    del weights, dout
    return jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)[1](rows)


def combine(plan, x, rows, weights, dout):
    del x, dout
    return jax_ep.combine(rows, plan, weights)


def combine_gradient(plan, x, rows, weights, dout):
    del x
    return jax.vjp(lambda r, w: jax_ep.combine(r, plan, w), rows, weights)[1](dout)


USES = [dispatch, dispatch_gradient, combine, combine_gradient]


@dataclasses.dataclass(frozen=True)
class Victim:
    """Compiled programs, a sound plan for them, and what they give with it."""

    row: Row
    plan: jax_ep.Plan
    programs: dict[str, Callable[..., Any]]
    args: tuple[np.ndarray, ...]
    want: dict[str, Any]

    @classmethod
    def of(cls, row: Row) -> Victim:
        shape = ALONE if row.fabric is ONE else SHAPE
        r, rng = shape.num_ranks, np.random.default_rng(0)
        numbers = Numbers.draw(rng, shape)
        rows = rng.integers(-8, 9, (r, 9, shape.hidden)).astype(np.float32)
        make = row.jit(lambda idx: make_plan(row, idx, shape), r)
        plan = jax.device_get(make(numbers.topk_idx))
        programs = {use.__name__: row.jit(use, r) for use in USES}
        args = numbers.x, rows, numbers.weights, numbers.dout
        want = {name: jax.device_get(f(plan, *args)) for name, f in programs.items()}
        return cls(row, plan, programs, args, want)

    def works(self, name: str) -> None:
        got = jax.device_get(self.programs[name](self.plan, *self.args))
        jax.tree.map(np.testing.assert_array_equal, got, self.want[name])


@pytest.fixture(scope="module", params=NATIVE, ids=str)
def victim(request: pytest.FixtureRequest) -> Victim:
    require("native")
    return Victim.of(request.param)


@pytest.fixture
def short_wait() -> Iterator[None]:
    before = jax_ep.set_wait_timeout(WAIT)
    yield
    jax_ep.set_wait_timeout(before)


@pytest.mark.once
@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("use", [use.__name__ for use in USES])
@pytest.mark.parametrize("alteration", ALTERATIONS, ids=str)
def test_private_arrays_altered(victim: Victim, use: str, alteration: Alteration) -> None:
    """On every rank or on one: an error that names a field, or a result; later calls are right."""
    for ranks in (slice(None), slice(0, 1)):
        plan = altered(victim.plan, alteration, ranks)
        start = time.monotonic()
        try:
            jax.block_until_ready(victim.programs[use](plan, *victim.args))
        except jax.errors.JaxRuntimeError as error:
            names = "|".join(FIELDS)
            assert re.search(rf"\b({names})\b", str(error)), str(error)
        assert time.monotonic() - start < WAIT, "a bad plan shows before anybody is waited for"
        victim.works(use)
