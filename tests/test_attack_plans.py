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
from hostile_plans import ALTERATIONS, FIELDS, altered
from implementations import EMULATED, FABRIC, ONE, SHARD_MAP, VMAP, Row, require
from strategies import Shape

import jax_ep

SHAPE = Shape(num_ranks=8, num_tokens=4, num_topk=2, num_experts=16, hidden=3, capacity=9)
ALONE = dataclasses.replace(SHAPE, num_ranks=1, num_experts=2)
WAIT = 5.0
NATIVE = [Row("native", fabric, exact=True) for fabric in (SHARD_MAP, VMAP, ONE)]
NAMES_A_FIELD = re.compile(rf"plan\b.*\b({'|'.join(FIELDS)})\b")
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
    "rounded_up": lambda a: ((a.astype(np.int32) + 127) // 128 * 128).astype(a.dtype),
    "negative": lambda a: np.full(a.shape, -1).astype(a.dtype),
    "most": lambda a: np.full(a.shape, 2**31 - 1).astype(a.dtype),
}
# Of other types, so that each is another program: all fields at once.
RETYPINGS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda _: None,
    "floats": lambda a: np.full((len(a), 3), np.nan, np.float32),
}


def replaced(plan: jax_ep.Plan) -> Iterator[jax_ep.Plan]:
    public = {name: getattr(plan, name) for name in PUBLIC}
    for change in REPLACEMENTS.values():
        for name, value in public.items():
            yield dataclasses.replace(plan, **{name: change(value)})
    for change in RETYPINGS.values():
        yield dataclasses.replace(plan, **{name: change(a) for name, a in public.items()})


@pytest.mark.parametrize("row", [*NATIVE, Row("xla", SHARD_MAP, exact=False)], ids=str)
def test_public_fields_replaced(row: Row) -> None:
    """Rounding group sizes up for one's own kernel corrupted the heap."""
    row.require()
    shape = ALONE if row.fabric is ONE else attacks.SHAPE
    numbers = Numbers.draw(np.random.default_rng(0), shape)
    want = public_answers(numbers, shape)
    program = row.jit(there_and_back, shape.num_ranks)
    make = row.jit(lambda idx: make_plan(row, idx, shape), shape.num_ranks)
    for plan in replaced(jax.device_get(make(numbers.topk_idx))):
        same(program(plan, numbers.x, numbers.weights, numbers.dout), want)


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
    with pytest.raises((TypeError, ValueError), match=NAMES_A_FIELD):
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


def rows_gradient(plan, x, rows, weights, dout):
    del x
    return jax.vjp(lambda r: jax_ep.combine(r, plan, weights), rows)[1](dout)


def weights_gradient(plan, x, rows, weights, dout):
    del x
    return jax.vjp(lambda w: jax_ep.combine(rows, plan, w), weights)[1](dout)


USES = [dispatch, dispatch_gradient, combine, rows_gradient, weights_gradient]


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


def complaint(f: Callable[..., Any], *args: Any) -> str | None:
    """Runs a program to its end; returns what was said of its failure."""
    try:
        jax.block_until_ready(f(*args))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.long
@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_private_arrays_altered(victim: Victim, use: Callable[..., Any]) -> None:
    """On every rank or on one: an error that names a field, or a result; later calls are right."""
    harmed = []
    for alteration in ALTERATIONS:
        for ranks in (slice(None), slice(0, 1)):
            plan = altered(victim.plan, alteration, ranks)
            start = time.monotonic()
            said = complaint(victim.programs[use.__name__], plan, *victim.args)
            took = time.monotonic() - start
            if took > WAIT or (said is not None and not NAMES_A_FIELD.search(said)):
                harmed.append(f"{alteration}, {took:.1f} s: {said}")
            victim.works(use.__name__)
    assert not harmed


@pytest.mark.skipif(
    EMULATED is not None or FABRIC == "rounds",
    reason="kernels for GPUs, and rounds, leave out what a plan has wrong",
)
@pytest.mark.usefixtures("short_wait")
def test_a_bad_plan_ends_what_follows(implementation: str) -> None:
    """The rank that found its plan bad does not come to the next exchange: others give up."""
    if implementation == "xla":
        pytest.skip("XLA's collectives know no bad plan")
    row = Row("native", SHARD_MAP, exact=True)
    numbers = Numbers.draw(np.random.default_rng(0), SHAPE)
    make = row.jit(lambda idx: make_plan(row, idx, SHAPE), SHAPE.num_ranks)
    plan = jax.device_get(make(numbers.topk_idx))
    program = row.jit(there_and_back, SHAPE.num_ranks)
    args = numbers.x, numbers.weights, numbers.dout
    want = public_answers(numbers, SHAPE)
    same(program(plan, *args), want)
    jax_ep.set_wait_timeout(0.5)
    [bad] = [a for a in ALTERATIONS if str(a) == "recv_row-most"]
    start = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"recv_row|waited 0\.5 s for rank 0"):
        jax.block_until_ready(program(altered(plan, bad, slice(0, 1)), *args))
    assert time.monotonic() - start < WAIT
    same(program(plan, *args), want)
