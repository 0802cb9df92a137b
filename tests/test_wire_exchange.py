"""``wire.dispatch`` and ``wire.combine`` on every fabric: values, derivatives, and what crosses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import wire_oracle
from exchanges import make_plan, same_bits, same_numbers
from implementations import AXIS, Row, over_devices, stacked
from strategies import Shape, duplicates, poisoned

import jax_ep
from jax_ep import wire

SHAPE = Shape(num_ranks=4, num_tokens=6, num_topk=3, num_experts=8, hidden=150, capacity=40)
TOPK_IDX = duplicates(SHAPE)
BF16 = np.dtype(ml_dtypes.bfloat16)
each_wide = pytest.mark.parametrize("wide", [BF16, np.dtype(np.float32)], ids=str)


def draw(wide: np.dtype, seed: int = 0) -> np.ndarray:
    shape = (SHAPE.num_ranks, SHAPE.num_tokens, SHAPE.hidden)
    return np.random.default_rng(seed).normal(size=shape).astype(wide)


def crossed(x: np.ndarray, **how) -> np.ndarray:
    """What becomes of tokens on their way."""
    block = how.get("block", 128)
    return wire_oracle.decode(*wire_oracle.encode(x, **how), x.dtype, block)


@each_wide
@pytest.mark.parametrize("power_of_two", [False, True], ids=["free", "power_of_two"])
def test_rows_and_gradient_of_dispatch(ranks_row: Row, wide: np.dtype, power_of_two: bool) -> None:
    """Straight through: the gradient is that of ``jax_ep.dispatch``."""
    how = {"dtype": "float8_e4m3fn", "block": 64, "power_of_two": power_of_two}
    plan = SHAPE.plan(TOPK_IDX)
    drows = poisoned((4, SHAPE.capacity, SHAPE.hidden), plan.named, wide, seed=1)

    def per_rank(topk_idx, x, drows):
        plan = make_plan(ranks_row, SHAPE, topk_idx)
        rows, pull = jax.vjp(lambda x: wire.dispatch(x, plan, **how), x)
        _, plain = jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)
        return rows, pull(drows)[0], plain(drows)[0]

    x = draw(wide)
    rows, dx, plain = map(np.asarray, ranks_row.jit(per_rank, 4)(TOPK_IDX, x, drows))
    same_bits(rows, oracle.dispatch(crossed(x, **how), plan), "rows")
    same_bits(dx, plain, "dx")
    assert np.isfinite(dx.astype(np.float32)).all()


@each_wide
@pytest.mark.parametrize("is_weighted", [True, False], ids=["weighted", "plain"])
def test_combine_and_its_gradients(ranks_row: Row, wide: np.dtype, is_weighted: bool) -> None:
    how = {"block": 64, "power_of_two": False}
    plan = SHAPE.plan(TOPK_IDX)
    rows = poisoned((4, SHAPE.capacity, SHAPE.hidden), plan.named, wide, seed=2)
    weights = np.random.default_rng(3).normal(size=TOPK_IDX.shape).astype(np.float32)

    def per_rank(topk_idx, rows, weights, dout):
        plan = make_plan(ranks_row, SHAPE, topk_idx)
        weights = weights if is_weighted else None

        def both(combine):
            out, pull = jax.vjp(lambda r, w: combine(r, plan, w), rows, weights)
            return out, pull(dout)

        encoded = both(functools.partial(wire.combine, cotangents="float8_e5m2", **how))
        return encoded, both(jax_ep.combine)

    dout = draw(wide, seed=4)
    got, plain = ranks_row.jit(per_rank, 4)(TOPK_IDX, rows, weights, dout)
    same_bits(np.asarray(got[0]), np.asarray(plain[0]), "out")
    wide_dout = crossed(dout.astype(np.float32), dtype="float8_e5m2", **how)
    if is_weighted:
        wanted = oracle.combine_grad(rows.astype(np.float32), plan, weights, wide_dout)
        same_bits(np.asarray(got[1][0]), wanted[0].astype(wide), "drows")
        np.testing.assert_allclose(got[1][1], wanted[1], rtol=1e-5, atol=1e-4)
        assert not np.asarray(got[1][1])[~plan.kept].any()
    else:
        same_bits(np.asarray(got[1][0]), oracle.dispatch(wide_dout.astype(wide), plan), "drows")
    same_numbers(np.asarray(got[1][0]) != 0, np.asarray(plain[1][0]) != 0, "which rows")


def test_higher_derivatives(implementation: str) -> None:
    """Of ``dispatch`` any, of ``combine`` those of its gradient, all straight through."""
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation=implementation)
    x, dx = jnp.asarray(draw(np.dtype(np.float32))[:2])

    def energy(send, x):
        return jnp.sum(send(x, plan) ** 3)

    _, tangent = jax.jvp(lambda x: wire.dispatch(x, plan), (x,), (dx,))
    np.testing.assert_array_equal(tangent, jax_ep.dispatch(dx, plan))
    got = jax.jvp(jax.grad(lambda x: energy(wire.dispatch, x)), (x,), (dx,))[1]
    exact = jax.grad(lambda x: jnp.sum(3 * wire.dispatch(x, plan) ** 2 * tangent))(x)
    np.testing.assert_allclose(got, exact, rtol=1e-6)

    def slope(combine, scale):
        """How a gradient through combine changes with what scales the cotangent."""
        rows = jax_ep.dispatch(x, plan)
        return jnp.sum(jax.grad(lambda r: scale * jnp.sum(combine(r, plan) * dx))(rows))

    for derive in (jax.grad, jax.jacfwd):
        got, want = (
            derive(lambda s, c=c: slope(c, s))(1.0) for c in (wire.combine, jax_ep.combine)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("over_ranks", [stacked, over_devices])
def test_what_crosses(over_ranks, implementation: str) -> None:
    """One exchange out, of bytes; one of sums back. In reverse the other way round."""

    def loss(topk_idx, x, weights):
        plan = jax_ep.make_plan(
            topk_idx, num_experts=8, axis_name=AXIS, capacity=40, implementation=implementation
        )
        rows = wire.dispatch(x, plan)
        return jnp.sum(wire.combine(rows, plan, weights) ** 2)

    x, weights = draw(BF16), np.ones(TOPK_IDX.shape, np.float32)
    f = over_ranks(jax.grad(loss, argnums=(1, 2)), 4)
    ops = [
        [(x.aval.dtype.name, *x.aval.shape[-2:]) for x in eqn.invars[-n:]]
        for eqn, n in exchanges(jax.make_jaxpr(f)(TOPK_IDX, x, weights).jaxpr)
    ]
    sent, weights_of = [("float8_e4m3fn", 6, 150), ("float32", 6, 2)], ("float32", 6, 3)
    summed = ("bfloat16", 40, 150)
    assert ops == [
        [("int32", 6, 3)],
        sent,
        [summed, weights_of],
        [*sent, weights_of],
        [("float32", 40, 3)],
        [summed],
    ]


def exchanges(jaxpr) -> list:
    """Lists the exchanges of a program with how many payloads each has."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jax_ep_exchange":
            places = 2 + (0 if eqn.params["op"].name == "plan" else 11)
            found.append((eqn, len(eqn.invars) - places))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found += exchanges(inner) if hasattr(inner, "eqns") else []
    return found


def test_batches_are_independent(implementation: str) -> None:
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation=implementation)
    x = jnp.asarray(draw(BF16))
    rows = jax.vmap(lambda x: wire.dispatch(x, plan))(x)
    for i in range(len(x)):
        np.testing.assert_array_equal(rows[i], wire.dispatch(x[i], plan))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, plan: wire.dispatch(x[:2], plan), ValueError, r"= \[6, 150\]; got \[2, 150\]"),
        (lambda x, plan: wire.dispatch(x, x), TypeError, "plan must be a jax_ep.Plan"),
        (
            lambda x, plan: wire.dispatch(x.astype(jnp.int8), plan),
            TypeError,
            "x must have one of .* got int8",
        ),
        (
            lambda x, plan: wire.dispatch(x, plan, "bfloat16"),
            ValueError,
            "dtype must be one of .* got 'bfloat16'",
        ),
        (
            lambda x, plan: wire.combine(x, plan, cotangents="int8"),
            ValueError,
            "cotangents must be one of .* got 'int8'",
        ),
        (lambda x, plan: wire.combine(x, x), TypeError, "plan must be a jax_ep.Plan"),
        (
            lambda x, plan: wire.combine(x, plan),
            ValueError,
            r"rows must have shape .*got \[6, 150\]",
        ),
    ],
    ids=range(7),
)
def test_errors(call, error: type[Exception], message: str) -> None:
    plan = jax_ep.make_plan(TOPK_IDX[0], num_experts=8, implementation="xla")
    with pytest.raises(error, match=message):
        call(jnp.asarray(draw(BF16)[0]), plan)
