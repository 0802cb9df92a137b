"""Ranks that wait for each other: for so long and no longer, and only for the same call."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import EMULATED, SHARD_MAP, Row, require
from layers import SHAPE, Problem, close

import jax_ep

R = SHAPE.num_ranks
WAIT = 0.5
ROW = Row("native", SHARD_MAP, exact=True)
pytestmark = pytest.mark.usefixtures("native", "wait_timeout")


compares_plans = pytest.mark.skipif(
    EMULATED is not None, reason="what identifies a plan lies on the GPU, where nobody compares it"
)


@pytest.fixture
def native() -> None:
    require("native")


def make_plan(topk_idx: jax.Array) -> jax_ep.Plan:
    return ROW.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)


def there_and_back(problem: Problem) -> np.ndarray:
    """Computes what a dispatch and a combine of its rows give."""
    kept = SHAPE.plan(problem.topk_idx).kept
    return np.where(kept, problem.weights, 0).sum(axis=2, keepdims=True) * problem.x


def exchange(plan: jax_ep.Plan, x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)


def works(problem: Problem) -> None:
    program = ROW.jit(lambda x, idx, w: exchange(make_plan(idx), x, w), R)
    close(program(*problem.args[:3]), there_and_back(problem))


def absent(op, absentees):
    """Makes a rank function that leaves out ``op(plan, x)`` on some ranks."""

    def per_rank(x, topk_idx):
        plan = make_plan(topk_idx)
        rank = jax.lax.axis_index("expert")
        gone = jnp.any(rank == jnp.array(absentees))
        nothing = jnp.zeros_like(op(plan, x)) + x[0, 0]
        return jax.lax.cond(gone, lambda: nothing, lambda: op(plan, x))

    return per_rank


def dispatch(plan: jax_ep.Plan, x: jax.Array) -> jax.Array:
    return jax_ep.dispatch(x, plan)


def combine(plan: jax_ep.Plan, x: jax.Array) -> jax.Array:
    rows = jnp.zeros((plan.capacity, x.shape[1])) + x[0, 0]
    return jax_ep.combine(rows, plan)


@pytest.mark.parametrize("op", [dispatch, combine])
@pytest.mark.parametrize("absentees", [[2], [0, 3]], ids=str)
def test_a_rank_that_never_comes(
    op, absentees: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """The call fails in time and says who did not come and for how long it waited, twice."""
    problem = Problem.of(0)
    program = ROW.jit(absent(op, absentees), R).lower(problem.x, problem.topk_idx).compile()
    jax_ep.set_wait_timeout(WAIT)
    start = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(program(problem.x, problem.topk_idx))
    took = time.monotonic() - start
    assert WAIT <= took <= WAIT + 1
    ranks = ", ".join(map(str, absentees))
    assert re.search(
        rf"{op.__name__}.* rank \d of {R} .*waited {WAIT} s for ranks? {ranks} ", str(caught.value)
    )
    present = ", ".join(str(rank) for rank in range(R) if rank not in absentees)
    (said,) = re.findall(r"^jax_ep .*$", capfd.readouterr().err, re.MULTILINE)
    assert re.fullmatch(
        rf"jax_ep {op.__name__}.*: ranks {present} of {R} gave up, because rank \d waited {WAIT} s "
        rf"for ranks? {ranks} to come",
        said,
    )
    works(problem)


def test_a_rank_that_never_plans() -> None:
    problem = Problem.of(8)

    def per_rank(topk_idx):
        gone = jax.lax.axis_index("expert") == 1
        nothing = jnp.zeros_like(make_plan(topk_idx).recv_counts)
        return jax.lax.cond(gone, lambda: nothing, lambda: make_plan(topk_idx).recv_counts)

    program = ROW.jit(per_rank, R).lower(problem.topk_idx).compile()
    jax_ep.set_wait_timeout(WAIT)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"make_plan.* for rank 1 to come"):
        jax.block_until_ready(program(problem.topk_idx))
    works(problem)


def test_it_goes_on_after_many_failures(wait_timeout: float) -> None:
    problem = Problem.of(1)
    program = ROW.jit(absent(dispatch, [1]), R).lower(problem.x, problem.topk_idx).compile()
    works(problem)
    jax_ep.set_wait_timeout(0.2)
    for _ in range(5):
        with pytest.raises(jax.errors.JaxRuntimeError, match="dispatch"):
            jax.block_until_ready(program(problem.x, problem.topk_idx))
    jax_ep.set_wait_timeout(wait_timeout)
    for _ in range(5):
        works(problem)


def test_a_late_rank_is_waited_for() -> None:
    """One rank first works for a while; the others wait, and nothing is lost."""
    problem = Problem.of(2)

    def per_rank(x, topk_idx, weights):
        plan = make_plan(topk_idx)
        late = jax.lax.axis_index("expert") == 3
        turns = jnp.where(late, 300, 1)
        busy = jnp.full((200, 200), 1e-3) + x[0, 0]
        busy = jax.lax.fori_loop(0, turns, lambda _, b: jnp.tanh(b @ b), busy)
        return exchange(plan, x + 0 * busy[0, 0], weights)

    close(
        ROW.jit(per_rank, R)(*problem.args[:1], problem.topk_idx, problem.weights),
        there_and_back(problem),
    )


def other_plan_on(rank: int, topk_idx: jax.Array) -> jax_ep.Plan:
    """Makes a plan on every rank, and swaps it on one for the plan of another routing."""
    plan, other = make_plan(topk_idx), make_plan((topk_idx + 3) % SHAPE.num_experts)
    here = jax.lax.axis_index("expert") == rank
    return jax.tree.map(lambda a, b: jnp.where(here, b, a), plan, other)


@compares_plans
@pytest.mark.parametrize("op", [dispatch, combine])
def test_ranks_with_different_plans(op) -> None:
    """They would read rows that are not theirs: an error, at once, and never wrong rows."""
    problem = Problem.of(3)

    def per_rank(x, topk_idx):
        return op(other_plan_on(1, topk_idx), x)

    program = ROW.jit(per_rank, R).lower(problem.x, problem.topk_idx).compile()
    start = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"(?s){op.__name__}.*fingerprint"):
        jax.block_until_ready(program(problem.x, problem.topk_idx))
    assert time.monotonic() - start < 10, "a difference shows as soon as all are there"
    works(problem)


@compares_plans
def test_gradients_of_ranks_with_different_plans() -> None:
    problem = Problem.of(4)

    def per_rank(x, topk_idx):
        plan, swapped = make_plan(topk_idx), other_plan_on(0, topk_idx)
        pull = jax.vjp(lambda x: jax_ep.dispatch(x, swapped), x)[1]
        return pull(jax_ep.dispatch(x, plan))[0]

    with pytest.raises(jax.errors.JaxRuntimeError, match="fingerprint"):
        jax.block_until_ready(ROW.jit(per_rank, R)(problem.x, problem.topk_idx))
    works(problem)


def test_ranks_that_call_different_things() -> None:
    """One rank dispatches while the others combine."""
    problem = Problem.of(5)

    def per_rank(x, topk_idx):
        plan = make_plan(topk_idx)
        rows = jnp.zeros((plan.capacity, x.shape[1])) + x[0, 0]
        return jax.lax.cond(
            jax.lax.axis_index("expert") == 2,
            lambda: jnp.sum(jax_ep.dispatch(x, plan)),
            lambda: jnp.sum(jax_ep.combine(rows, plan)),
        )

    jax_ep.set_wait_timeout(WAIT)
    with pytest.raises(jax.errors.JaxRuntimeError, match="dispatch|combine"):
        jax.block_until_ready(ROW.jit(per_rank, R)(problem.x, problem.topk_idx))
    works(problem)


def test_a_failure_fails_no_other_program() -> None:
    """A program in flight beside the failing one gives what it always gives."""
    problem = Problem.of(6)
    failing = ROW.jit(absent(dispatch, [3]), R).lower(problem.x, problem.topk_idx).compile()
    sound = ROW.jit(lambda x, idx, w: exchange(make_plan(idx), x, w), R)
    jax.block_until_ready(sound(*problem.args[:3]))
    jax_ep.set_wait_timeout(WAIT)
    for _ in range(3):
        doomed, result = failing(problem.x, problem.topk_idx), sound(*problem.args[:3])
        with pytest.raises(jax.errors.JaxRuntimeError, match="dispatch"):
            jax.block_until_ready(doomed)
        close(result, there_and_back(problem))


def test_the_bound_is_kept(wait_timeout: float) -> None:
    assert jax_ep.set_wait_timeout(2.5) == wait_timeout
    assert jax_ep.set_wait_timeout(wait_timeout) == 2.5
