"""``dispatch`` of a pytree: what belongs to the tokens travels with them, in one exchange."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from exchanges import make_plan, same_bits
from implementations import AXIS, FABRIC, Row, over_devices, stacked
from strategies import Shape, duplicates

import jax_ep

SHAPE = Shape(num_ranks=4, num_tokens=6, num_topk=3, num_experts=8, hidden=5, capacity=24)
TOPK_IDX = duplicates(SHAPE)
X = np.zeros((6, 7), np.float32)


def tokens() -> dict[str, np.ndarray]:
    """Draws leaves of every width, with no, one and more axes behind the tokens."""
    rng = np.random.default_rng(0)
    lead = (SHAPE.num_ranks, SHAPE.num_tokens)
    return {
        "quantised": rng.normal(size=(*lead, 37)).astype(ml_dtypes.float8_e4m3fn),
        "scales": rng.normal(size=lead).astype(np.float32),
        "x": rng.normal(size=(*lead, 5)).astype(ml_dtypes.bfloat16),
        "positions": rng.integers(-(2**31), 2**31, (*lead, 2, 3)).astype(np.int32),
        "flags": rng.integers(0, 2, (*lead, 1)).astype(np.int8),
    }


def send(row: Row, topk_idx: jax.Array, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax_ep.dispatch(x, make_plan(row, SHAPE, topk_idx))


def flat(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(*leaf.shape[:2], -1)


def test_every_leaf_arrives_as_it_would_alone(ranks_row: Row) -> None:
    x, plan = tokens(), SHAPE.plan(TOPK_IDX)
    got = ranks_row.jit(lambda *args: send(ranks_row, *args), 4)(TOPK_IDX, x)
    assert list(got) == sorted(x)
    for name, leaf in x.items():
        assert got[name].shape == (4, SHAPE.capacity, *leaf.shape[2:])
        same_bits(flat(np.asarray(got[name])), oracle.dispatch(flat(leaf), plan), name)


def test_gradients_of_the_float_leaves(ranks_row: Row) -> None:
    """They are those of dispatching each by itself; integers have none."""
    x = tokens()
    floats = {name: x.pop(name) for name in ("quantised", "scales", "x")}

    def together(topk_idx, floats, rest):
        plan = make_plan(ranks_row, SHAPE, topk_idx)
        rows, pull = jax.vjp(lambda f: jax_ep.dispatch(f | rest, plan), floats)
        return pull(
            {
                name: row if name in floats else np.zeros(row.shape, jax.dtypes.float0)
                for name, row in rows.items()
            }
        )[0]

    def alone(topk_idx, floats):
        plan = make_plan(ranks_row, SHAPE, topk_idx)
        pulls = {n: jax.vjp(lambda f: jax_ep.dispatch(f, plan), f) for n, f in floats.items()}
        return {name: pull(rows)[0] for name, (rows, pull) in pulls.items()}

    got = ranks_row.jit(together, 4)(TOPK_IDX, floats, x)
    want = ranks_row.jit(alone, 4)(TOPK_IDX, floats)
    for name in floats:
        assert np.asarray(got[name], np.float32).any()
        same_bits(np.asarray(got[name]), np.asarray(want[name]), name)


def test_a_leaf_that_nothing_depends_on_has_a_zero_gradient(implementation: str) -> None:
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation=implementation)
    pair = (jnp.ones((6, 5)), jnp.ones((6, 2)))

    def loss(pair):
        rows, unused = jax_ep.dispatch(pair, plan)
        del unused
        return jnp.sum(rows**2)

    used, unused = jax.grad(loss)(pair)
    np.testing.assert_array_equal(used, np.full((6, 5), 6.0))
    assert not unused.any()


def test_derivatives_along_some_leaves(implementation: str) -> None:
    """The others stand still: their tangents are zeros that nothing is sent for."""
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation=implementation)
    a, b = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0)
    _, (da, db) = jax.jvp(lambda a: jax_ep.dispatch((a, b), plan), (a,), (2 * a,))
    np.testing.assert_array_equal(da, 2 * jax_ep.dispatch(a, plan))
    assert not db.any()
    [back] = jax.linear_transpose(lambda a: jax_ep.dispatch((a, b), plan)[0], a)(da)
    np.testing.assert_array_equal(back, 2 * 3 * a)


@pytest.mark.parametrize("over_ranks", [stacked, over_devices])
def test_it_is_one_exchange(over_ranks, implementation: str) -> None:
    """One call out and one back, however many leaves: ranks meet once for all of them."""

    def loss(topk_idx, floats):
        plan = jax_ep.make_plan(
            topk_idx, num_experts=8, axis_name=AXIS, implementation=implementation
        )
        rows = jax_ep.dispatch(floats, plan)
        return jnp.sum(jnp.stack([jnp.sum(r.astype(jnp.float32)) for r in rows.values()]))

    floats = {name: tokens()[name] for name in ("scales", "x", "quantised")}
    f = over_ranks(lambda idx, x: jax.grad(lambda x: loss(idx, x))(x), 4)
    if implementation == "native" and FABRIC != "rounds":
        text = jax.jit(f).lower(TOPK_IDX, floats).as_text()
        assert text.count("@jax_ep_reduce_rows") == 1
        text = jax.jit(over_ranks(loss, 4)).lower(TOPK_IDX, floats).as_text()
        assert text.count("@jax_ep_gather_rows") == 1
    assert str(jax.make_jaxpr(f)(TOPK_IDX, floats)).count("op=reduce_rows") == 1


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"x": X, "scales": np.zeros(5)}, ValueError, r"x\['scales'\] must have .* got \[5\]"),
        ((X, "text"), TypeError, r"x\[1\] must be an array .* got str"),
        ([X.astype(np.complex64)], TypeError, r"x\[0\] must hold floats .* got complex64"),
    ],
)
def test_errors_name_the_leaf(x: object, error: type[Exception], message: str) -> None:
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation="xla")
    with pytest.raises(error, match=message):
        jax_ep.dispatch(x, plan)


def test_batches_are_independent(implementation: str) -> None:
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation=implementation)
    a, b = jnp.arange(36.0).reshape(3, 6, 2), jnp.arange(6)
    rows, ids = jax.vmap(lambda a: jax_ep.dispatch((a, b), plan))(a)
    for i in range(3):
        np.testing.assert_array_equal(rows[i], jax_ep.dispatch(a[i], plan))
        np.testing.assert_array_equal(ids[i], jax_ep.dispatch(b, plan))
