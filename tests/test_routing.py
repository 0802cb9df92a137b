"""Routers and their losses against straightforward NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep import DROPPED, routing

DTYPES = ["float32", "bfloat16", "float16"]


def random_logits(shape, dtype="float32", seed=0):
    logits = 2 * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(logits, jnp.dtype(dtype))


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def best(values, count):
    """Indices of the largest values, of equal ones the lowest index first."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :count]


def expected_sigmoid_topk(logits, bias, num_topk, num_groups, topk_groups, scale):
    """One token, as the paper puts it."""
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + bias
    groups = np.split(np.arange(len(logits)), num_groups)
    value = np.array([np.sort(biased[group])[-2:].sum() for group in groups])
    eligible = np.concatenate([groups[g] for g in sorted(best(value, topk_groups))])
    topk_idx = eligible[best(biased[eligible], num_topk)]
    return topk_idx, scale * scores[topk_idx] / scores[topk_idx].sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk(dtype, renormalize):
    logits = random_logits((3, 7, 9), dtype)
    topk_idx, weights = jax.jit(partial(routing.softmax_topk, num_topk=4, renormalize=renormalize))(
        logits
    )
    exact = np.asarray(logits, np.float64)
    want_idx = best(exact, 4)
    want = np.take_along_axis(softmax(exact), want_idx, -1)
    if renormalize:
        want /= want.sum(-1, keepdims=True)
    assert (topk_idx.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(topk_idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_topk", "num_groups", "topk_groups", "scale"),
    [(1, 1, 1, 1.0), (6, 1, 1, 2.5), (4, 4, 2, 1.0), (6, 2, 1, 0.5), (3, 12, 5, 1.0)],
)
def test_sigmoid_topk(dtype, num_topk, num_groups, topk_groups, scale):
    logits = random_logits((5, 8, 12), dtype)
    bias = random_logits((12,), seed=1) / 4
    topk_idx, weights = jax.jit(
        partial(
            routing.sigmoid_topk,
            num_topk=num_topk,
            num_groups=num_groups,
            topk_groups=topk_groups,
            scale=scale,
        )
    )(logits, bias)
    assert (topk_idx.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    for at in np.ndindex(5, 8):
        want_idx, want = expected_sigmoid_topk(
            np.asarray(logits[at], np.float64), bias, num_topk, num_groups, topk_groups, scale
        )
        np.testing.assert_array_equal(topk_idx[at], want_idx)
        np.testing.assert_allclose(weights[at], want, rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    logits = jnp.zeros((2, 6))
    assert routing.softmax_topk(logits, 3)[0].tolist() == [[0, 1, 2]] * 2
    topk_idx, _ = routing.sigmoid_topk(logits, jnp.zeros(6), 3, num_groups=3, topk_groups=2)
    assert topk_idx.tolist() == [[0, 1, 2]] * 2


def test_bias_chooses_and_does_not_weigh():
    logits = random_logits((1, 4))
    _, unbiased = routing.sigmoid_topk(logits, jnp.zeros(4), 4)
    topk_idx, weights = routing.sigmoid_topk(logits, jnp.array([0.0, 0.0, 5.0, 0.0]), 4)
    assert topk_idx[0, 0] == 2
    np.testing.assert_allclose(np.sort(weights), np.sort(unbiased), rtol=1e-6)
    dbias = jax.grad(lambda bias: jnp.sum(routing.sigmoid_topk(logits, bias, 2)[1]))(jnp.ones(4))
    assert not np.any(np.asarray(dbias))


def test_a_negative_bias_does_not_reach_masked_groups():
    """Groups masked with 0 in place of -inf would win against negative biased scores."""
    topk_idx, _ = routing.sigmoid_topk(
        jnp.zeros((1, 4)), jnp.array([-3.0, -3.0, -4.0, -4.0]), 2, num_groups=2
    )
    assert topk_idx.tolist() == [[0, 1]]


def test_scores_that_underflow_keep_their_weights_and_gradients():
    def first(logits):
        return routing.sigmoid_topk(logits, jnp.zeros(4), 2)[1][0, 0]

    value, gradient = jax.value_and_grad(first)(jnp.full((1, 4), -200.0))
    np.testing.assert_allclose(value, 0.5)
    np.testing.assert_allclose(gradient, [[0.25, -0.25, 0, 0]])


@pytest.mark.parametrize(
    "route",
    [
        partial(routing.softmax_topk, num_topk=3),
        partial(routing.softmax_topk, num_topk=3, renormalize=False),
        partial(routing.sigmoid_topk, bias=jnp.zeros(8), num_topk=3, num_groups=4, topk_groups=2),
    ],
    ids=["softmax", "softmax_raw", "sigmoid"],
)
def test_weights_are_differentiable(route):
    logits, towards = random_logits((2, 8)), random_logits((2, 3), seed=1)
    direction = random_logits((2, 8), seed=2)

    def value(step):
        return jnp.sum(route(logits + step * direction)[1] * towards)

    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    gradient = jax.grad(value)(0.0)
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(gradient, slope, rtol=1e-2)


def expected_load_balance(probs, topk_idx):
    num_experts = probs.shape[-1]
    counted = (topk_idx >= 0).any(-1)
    f = np.bincount(topk_idx[topk_idx >= 0], minlength=num_experts) / (topk_idx >= 0).sum()
    return num_experts * np.sum(f * probs[counted].mean(0))


def test_load_balance_loss():
    probs = softmax(np.asarray(random_logits((40, 8)), np.float64))
    topk_idx = best(probs, 2).astype(np.int32)
    topk_idx[3] = DROPPED
    topk_idx[5, 1] = DROPPED
    got = routing.load_balance_loss(jnp.asarray(probs, jnp.bfloat16), jnp.asarray(topk_idx))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected_load_balance(probs, topk_idx), rtol=3e-3)


def test_load_balance_loss_at_its_extremes():
    even = routing.load_balance_loss(jnp.full((4, 4), 0.25), jnp.arange(4)[:, None])
    worst = routing.load_balance_loss(jnp.eye(4)[jnp.zeros(6, int)], jnp.zeros((6, 1), jnp.int32))
    nothing = routing.load_balance_loss(jnp.ones((3, 4)), jnp.full((3, 2), DROPPED))
    assert (float(even), float(worst), float(nothing)) == (1.0, 4.0, 0.0)


def test_router_z_loss():
    logits = random_logits((5, 3, 7), "bfloat16")
    squares = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2
    where = np.arange(15).reshape(5, 3) % 4 > 0
    np.testing.assert_allclose(routing.router_z_loss(logits), squares.mean(), rtol=1e-5)
    got = routing.router_z_loss(logits, where=jnp.asarray(where))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, squares[where].mean(), rtol=1e-5)


@pytest.mark.long
def test_losses_over_several_axes_are_those_of_all_tokens():
    """Value and gradient, with ranks whose tokens do not all count."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits = random_logits((48, 8))
    where = np.arange(48) % 7 > 1

    def losses(logits, where, axis_name=None):
        topk_idx, _ = routing.softmax_topk(logits, 2)
        topk_idx = jnp.where(where[:, None], topk_idx, DROPPED)
        balance = routing.load_balance_loss(jax.nn.softmax(logits), topk_idx, axis_name=axis_name)
        return balance + routing.router_z_loss(logits, where=where, axis_name=axis_name)

    axes = ("data", "expert")
    sharded = jax.shard_map(
        partial(losses, axis_name=axes), mesh=mesh, in_specs=(P(axes), P(axes)), out_specs=P()
    )
    got, dgot = jax.jit(jax.value_and_grad(sharded))(logits, jnp.asarray(where))
    want, dwant = jax.value_and_grad(losses)(logits, jnp.asarray(where))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(dgot, dwant, rtol=1e-4, atol=1e-7)
    assert np.any(np.asarray(dwant))


@pytest.mark.long
def test_update_router_bias_evens_out_the_load():
    logits = random_logits((512, 8)) - 2 + jnp.linspace(-2, 2, 8)
    bias = jnp.zeros(8, jnp.bfloat16)
    assert routing.update_router_bias(bias, jnp.arange(8), 0.1).dtype == jnp.bfloat16

    @jax.jit
    def load(bias):
        return jnp.bincount(routing.sigmoid_topk(logits, bias, 2)[0].ravel(), length=8)

    bias = jnp.zeros(8)
    before = load(bias)
    for _ in range(300):
        bias = routing.update_router_bias(bias, load(bias), 0.002)
    even = 512 * 2 // 8
    assert int(before.max()) > 2 * even
    assert int(load(bias).max()) < 1.1 * even


LOGITS, BIAS = jnp.zeros((4, 6)), jnp.zeros(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: routing.softmax_topk([1.0], 1), TypeError, "logits must be an array"),
        (lambda: routing.softmax_topk(jnp.ones((1, 3), int), 1), TypeError, "floats; got int32"),
        (lambda: routing.softmax_topk(jnp.float32(0), 1), ValueError, "logits must have shape"),
        (lambda: routing.softmax_topk(LOGITS, 0), ValueError, "num_topk must be at least 1"),
        (lambda: routing.softmax_topk(LOGITS, 7), ValueError, "num_topk .* num_experts = 6; got 7"),
        (lambda: routing.softmax_topk(LOGITS, 2.0), TypeError, "num_topk must be an int"),
        (lambda: routing.sigmoid_topk(LOGITS, BIAS[1:], 2), ValueError, r"bias .* = \[6\]; got"),
        (
            lambda: routing.sigmoid_topk(LOGITS, BIAS, 2, num_groups=4),
            ValueError,
            "num_groups must divide the 6 experts; got 4",
        ),
        (
            lambda: routing.sigmoid_topk(LOGITS, BIAS, 2, num_groups=2, topk_groups=3),
            ValueError,
            "topk_groups must be at most num_groups = 2; got 3",
        ),
        (
            lambda: routing.sigmoid_topk(LOGITS, BIAS, 4, num_groups=2),
            ValueError,
            "num_topk must be at most the experts of topk_groups groups = 3; got 4",
        ),
        (
            lambda: routing.load_balance_loss(LOGITS, jnp.zeros((3, 2), jnp.int32)),
            ValueError,
            "topk_idx must have the token axes of probs",
        ),
        (lambda: routing.load_balance_loss(LOGITS, [1]), TypeError, "topk_idx must be an array"),
        (
            lambda: routing.router_z_loss(LOGITS, where=jnp.ones(3, bool)),
            ValueError,
            r"where must have shape \[tokens\] = \[4\]; got \[3\]",
        ),
        (
            lambda: routing.router_z_loss(LOGITS, where=jnp.ones(4)),
            TypeError,
            "where must have dtype bool",
        ),
        (
            lambda: routing.update_router_bias(BIAS, jnp.zeros(5), 0.1),
            ValueError,
            r"expert_load must have shape \[num_experts\] = \[6\]; got \[5\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
