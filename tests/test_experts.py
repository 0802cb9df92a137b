"""Expert networks: each against its formula row by row, and the layer with ones of a user's own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep import experts
from jax_ep._named_experts import resolve_experts

HIDDEN, FFN_HIDDEN = 6, 4
SIZES = np.array([3, 0, 2], np.int32)
ROWS = 7  # two of them behind the last group


def gelu(v):
    return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def clamped(gate, up):
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


# What each network does between its products, again, in NumPy.
FORMULAS = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "clamped_swiglu": clamped,
    "relu2": lambda up: np.maximum(up, 0) ** 2,
}
NETWORKS = {
    **{name: (resolve_experts(name), formula) for name, formula in FORMULAS.items()},
    "fused": (experts.FeedForward(experts.swiglu, is_fused=True), FORMULAS["swiglu"]),
    "fused_with_biases": (
        experts.FeedForward(experts.clamped_swiglu, is_fused=True, has_bias=True),
        clamped,
    ),
    "ungated_with_biases": (
        experts.FeedForward(experts.relu2, is_gated=False, has_bias=True),
        FORMULAS["relu2"],
    ),
}


def make_weights(network, seed=0):
    """Draws parameters, large enough that the clamp clamps."""
    rng = np.random.default_rng(seed)
    sizes = {"hidden": HIDDEN, "ffn_hidden": FFN_HIDDEN}
    shapes = [[len(SIZES), *(sizes.get(d, d) for d in dims)] for dims in network.dims.values()]
    return [3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_rows(network, formula, weights, rows):
    """Applies the formula to each row of each group."""
    named = dict(zip(network.dims, weights, strict=True))
    for kind in ("w", "b"):
        if f"{kind}_gate_up" in named:
            both = named.pop(f"{kind}_gate_up")
            named[f"{kind}_gate"], named[f"{kind}_up"] = both[..., 0, :], both[..., 1, :]
    out, expert_of = np.zeros_like(rows), np.repeat(np.arange(len(SIZES)), SIZES)
    for i, e in enumerate(expert_of):

        def product(v, name, e=e):
            return v @ named[f"w_{name}"][e] + (named[f"b_{name}"][e] if "b_down" in named else 0)

        inward = [name for name in ("gate", "up") if f"w_{name}" in named]
        out[i] = product(formula(*(product(rows[i], name) for name in inward)), "down")
    return out


def make_rows():
    rows = np.random.default_rng(1).standard_normal((ROWS, HIDDEN)).astype(np.float32)
    rows[SIZES.sum() :] = np.nan
    return rows


@pytest.mark.parametrize("name", NETWORKS)
def test_is_its_formula(name):
    network, formula = NETWORKS[name]
    weights, rows = make_weights(network), make_rows()
    got = jax.jit(network)(rows, SIZES, *weights)
    used = SIZES.sum()
    want = by_rows(network, formula, weights, rows[:used])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got[:used], want, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_behind_the_last_group_reach_no_gradient(name):
    """A bias that is looked up for them would be NaN, as its gradient takes them in."""
    network, _ = NETWORKS[name]
    rows, weights = make_rows(), make_weights(network)
    dout = np.where(np.isnan(rows), np.nan, 1.0).astype(np.float32)
    _, pull = jax.vjp(lambda *weights: network(rows, SIZES, *weights), *weights)
    for grad, weight in zip(pull(dout), weights, strict=True):
        assert grad.shape == weight.shape
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[1], 0)  # the empty group
        assert np.abs(grad[0]).max() > 0


def test_the_gradient_of_a_bias_is_the_sum_over_its_group():
    bias = np.zeros((len(SIZES), HIDDEN), np.float32)
    dout = np.arange(ROWS * HIDDEN, dtype=np.float32).reshape(ROWS, HIDDEN)
    rows = np.zeros_like(dout)
    _, pull = jax.vjp(lambda bias: experts.add_bias(rows, bias, SIZES), bias)
    want = np.stack([dout[:3].sum(axis=0), np.zeros(HIDDEN), dout[3:5].sum(axis=0)])
    np.testing.assert_allclose(pull(dout)[0], want, rtol=1e-6)


def test_moe_with_experts_of_a_users_own():
    """They are given groups, and parameters of any kind, integers too; and may change the width."""
    scales = np.array([[2], [3]], np.int8)

    def widen(rows, group_sizes, scales):
        of = jnp.repeat(scales[:, 0], group_sizes, total_repeat_length=len(rows))
        return jnp.concatenate([rows, of[:, None].astype(rows.dtype) * rows], axis=1)

    x = np.array([[1.0], [10.0]], np.float32)
    topk_idx, ones = np.array([[0], [1]], np.int32), np.ones((2, 1), np.float32)
    out, _ = jax_ep.moe(x, topk_idx, ones, scales, num_experts=2, experts=widen)
    np.testing.assert_array_equal(out, [[1, 2], [10, 30]])


SWIGLU = [np.zeros((2, 1, 3), np.float32)] * 2 + [np.zeros((2, 3, 1), np.float32)]


def give(experts="swiglu", weights=SWIGLU, **options):
    x, topk_idx = np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32)
    ones = np.ones((2, 1), np.float32)
    return jax_ep.moe(x, topk_idx, ones, *weights, num_experts=2, experts=experts, **options)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "experts must be one of .*'relu2'.*; got 'relu3'", {"experts": "relu3"}),
        (TypeError, "experts must be one of .* or callable; got 3", {"experts": 3}),
        (TypeError, "weights must be the 3 w_gate, w_up, w_down; got 2", {"weights": SWIGLU[1:]}),
        (
            TypeError,
            "weights must be the 6 w_gate, w_up, w_down, b_gate, b_up, b_down; got 3",
            {"experts": "clamped_swiglu"},
        ),
        (
            ValueError,
            r"w_up must have shape \[num_local_experts, hidden, ffn_hidden\] = \[2, 1, 3\]; got",
            {"weights": [SWIGLU[0], SWIGLU[2], SWIGLU[2]]},
        ),
        (
            ValueError,
            r"weights\[1\] must have shape \[num_local_experts, ...\] = \[2, ...\]; got \[3, 1\]",
            {"experts": lambda rows, *_: rows, "weights": [SWIGLU[0], np.zeros((3, 1))]},
        ),
        (ValueError, "weigh must be one of .*; got 'both'", {"weigh": "both"}),
        (
            ValueError,
            "wire_dtype must be None with weigh='input'.*; got 'float8_e4m3fn'",
            {"weigh": "input", "wire_dtype": "float8_e4m3fn"},
        ),
    ],
)
def test_moe_refuses(error, message, given):
    with pytest.raises(error, match=message):
        give(**given)


def test_what_is_not_multiplied_is_not_weighed_on_the_input():
    x, topk_idx = np.ones((2, 1), np.int32), np.zeros((2, 1), np.int32)
    ones = np.ones((2, 1), np.float32)
    with pytest.raises(TypeError, match="x must have one of the dtypes .*; got int32"):
        jax_ep.moe(x, topk_idx, ones, num_experts=2, experts=lambda r, _: r, weigh="input")


def test_a_network_refuses():
    with pytest.raises(TypeError, match="activation must be callable; got 'silu'"):
        experts.FeedForward("silu")
    with pytest.raises(ValueError, match="is_fused needs is_gated"):
        experts.FeedForward(experts.relu2, is_gated=False, is_fused=True)


def test_networks_compare_as_static_arguments_do():
    """A jit of a layer compiles once for equal networks."""
    assert experts.FeedForward(experts.swiglu) == resolve_experts("swiglu")
    narrow = functools.partial(experts.clamped_swiglu, limit=1.0)
    changed = dataclasses.replace(resolve_experts("clamped_swiglu"), activation=narrow)
    assert changed != resolve_experts("clamped_swiglu")
    assert hash(changed) != 0
