"""``routing.Router`` against NumPy, for every score, and what it refuses."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep.routing import Router

TOKENS, NUM_EXPERTS, NUM_TOPK = 20, 8, 3
SCORES = ("softmax", "sigmoid", "sqrt_softplus")


def softmax(v):
    e = np.exp(v - v.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


FORMULAS = {
    "softmax": softmax,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "sqrt_softplus": lambda v: np.sqrt(np.log1p(np.exp(v))),
}


def expect(router, logits, bias):
    """Chooses and weighs token by token, in float64."""
    scores = FORMULAS[router.score](logits.astype(np.float64))
    biased = scores if bias is None else scores + bias
    size = NUM_EXPERTS // router.num_groups
    topk_idx, weights = [], []
    for score, value in zip(scores, biased, strict=True):
        groups = [sorted(value[g * size : (g + 1) * size])[-2:] for g in range(router.num_groups)]
        best = np.argsort([-sum(group) for group in groups], kind="stable")[: router.topk_groups]
        eligible = [e for e in range(NUM_EXPERTS) if e // size in best]
        chosen = sorted(eligible, key=lambda e: -value[e])[:NUM_TOPK]
        weight = score[chosen]
        weights.append(router.scale * (weight / weight.sum() if router.renormalize else weight))
        topk_idx.append(chosen)
    return np.array(topk_idx), np.array(weights)


OPTIONS = [
    {"score": score, "has_bias": has_bias, "renormalize": renormalize, **groups}
    for score, has_bias, renormalize, groups in itertools.product(
        SCORES, (False, True), (False, True), ({}, {"num_groups": 4, "topk_groups": 2})
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_its_formula(options):
    router = Router(scale=2.5, **options)
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((TOKENS, NUM_EXPERTS)).astype(np.float32)
    bias = rng.standard_normal(NUM_EXPERTS).astype(np.float32) if router.has_bias else None
    want_idx, want = expect(router, logits, bias)
    topk_idx, weights = router.choose(logits, NUM_TOPK, bias=bias)
    np.testing.assert_array_equal(topk_idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    again, forced = router.choose(logits, NUM_TOPK, bias=bias, topk_idx=want_idx)
    np.testing.assert_array_equal(again, want_idx)
    np.testing.assert_array_equal(forced, weights)
    scores = FORMULAS[router.score](logits.astype(np.float64))
    want_probs = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(router.probs(logits), want_probs, rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_extreme_logits_and_choices_of_nothing_have_finite_gradients(score, renormalize):
    """Scores that underflow would divide zero by zero, and a token without a choice likewise."""
    router = Router(score, renormalize=renormalize)
    logits = jnp.array([[-200.0, -210.0, 0.0], [200.0, -200.0, 90.0], [0.0, 0.0, 0.0]])
    topk_idx = jnp.array([[0, 1], [1, -1], [-1, -1]])

    def total(logits):
        weights = router.choose(logits, 2, topk_idx=topk_idx)[1]
        return jnp.sum(weights * jnp.array([1.0, 2.0])), weights

    (_, weights), grad = jax.value_and_grad(total, has_aux=True)(logits)
    assert np.isfinite(grad).all()
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(weights[topk_idx < 0], 0)
    np.testing.assert_array_equal(grad[2], 0)
    if renormalize:
        np.testing.assert_allclose(weights.sum(axis=1), [1, 1, 0], rtol=1e-6)
        if score != "softmax":
            return
        np.testing.assert_allclose(weights[0, 0], 1 / (1 + np.exp(-10)), rtol=1e-6)


def test_softplus_of_very_negative_logits_is_their_exponential():
    """Its logarithm is the logit itself, where ``log1p(exp(x))`` has nothing left."""
    logits = jnp.array([[-100.0, -102.0]])
    weights = Router("sqrt_softplus").choose(logits, 2)[1]
    np.testing.assert_allclose(weights[0, 0] / weights[0, 1], np.e, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "score must be one of .*; got 'tanh'", {"score": "tanh"}),
        (ValueError, "scale must be finite; got inf", {"scale": float("inf")}),
        (ValueError, "jitter must be at least 0 and below 1; got 1.5", {"jitter": 1.5}),
        (ValueError, "num_groups must be", {"num_groups": 0}),
        (TypeError, "topk_groups must be an int", {"topk_groups": 1.5}),
        (ValueError, "dtype must be one of floats; got int32", {"dtype": "int32"}),
    ],
)
def test_options_out_of_range(error, message, options):
    with pytest.raises(error, match=message):
        Router(**options)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "bias must be None with has_bias=False; got one", {"bias": np.zeros(4)}),
        (
            TypeError,
            "topk_idx must be an array of integers",
            {"topk_idx": np.zeros((2, 2), np.float32)},
        ),
        (
            ValueError,
            r"topk_idx must have shape \[tokens, num_topk\] = \[2, 2\]; got \[2, 1\]",
            {"topk_idx": np.zeros((2, 1), np.int32)},
        ),
        (ValueError, "num_topk must be at most num_experts = 4; got 5", {"num_topk": 5}),
    ],
)
def test_choosing_refuses(error, message, given):
    given = {"num_topk": 2, **given}
    with pytest.raises(error, match=message):
        Router().choose(np.zeros((2, 4), np.float32), **given)
    with pytest.raises(ValueError, match="bias must be given with has_bias=True; got None"):
        Router(has_bias=True).choose(np.zeros((2, 4), np.float32), 2)
