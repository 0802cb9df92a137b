"""What a ``flax.MoE`` is given besides tokens, and the options that it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import BATCH, FFN_HIDDEN, HIDDEN, NUM_EXPERTS, NUM_TOPK, inputs, on, parameters
from flax_models import MODELS, apply_expert, dense, make_layer
from jax.sharding import AxisType

from jax_ep import experts
from jax_ep.flax import MoE
from jax_ep.routing import Router


def test_choices_made_elsewhere_are_weighed_by_the_router():
    x, _ = inputs()
    topk_idx = np.stack([np.arange(15) % NUM_EXPERTS, (np.arange(15) + 3) % NUM_EXPERTS], axis=-1)
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer("gpt_oss")
        forced = topk_idx.reshape(*BATCH, NUM_TOPK)
        out, aux = layer.apply_with_aux(jnp.asarray(x), topk_idx=forced)
    want = dense(layer.config, parameters(layer), x, topk_idx)
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(aux["expert_load"], np.bincount(topk_idx.ravel()))


class TableRouter(nnx.Module):
    """A router of a user's own, with a parameter."""

    def __init__(self):
        self.scale = nnx.Param(jnp.float32(2.0))

    def __call__(self, x):
        topk_idx = jnp.broadcast_to(jnp.arange(NUM_TOPK), (*x.shape[:-1], NUM_TOPK))
        weights = self.scale[...] * jnp.ones(topk_idx.shape, jnp.float32)
        return topk_idx.astype(jnp.int32), weights, {"router_loss": jnp.float32(5)}


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_router_that_is_called(kind):
    x, dout = inputs()

    def loss(layer):
        out, aux = layer.apply_with_aux(jnp.asarray(x))
        return jnp.vdot(out, dout), (out, aux)

    with on(kind, {"data": 2, "expert": 4}):
        layer = MoE(
            HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, router=TableRouter(), rngs=nnx.Rngs(0)
        )
        (_, (out, aux)), grads = nnx.value_and_grad(loss, has_aux=True)(layer)
    assert not hasattr(layer, "router_kernel")
    assert float(aux["router_loss"]) == 5
    assert "load_balance_loss" not in aux
    params = {
        k: np.asarray(v[...]) for k, v in nnx.state(layer, nnx.Param).items() if k != "router"
    }
    flat = x.reshape(-1, HIDDEN)
    one = sum(
        apply_expert(layer.config, {name: params[name][e] for name in params}, flat)
        for e in range(NUM_TOPK)
    )
    np.testing.assert_allclose(out.reshape(-1, HIDDEN), 2 * one, rtol=2e-4, atol=2e-5)
    want = np.vdot(one, dout.reshape(-1, HIDDEN))
    np.testing.assert_allclose(grads["router"]["scale"][...], want, rtol=1e-4)


def test_jitter_is_drawn_if_a_call_has_rngs_and_is_the_same_on_every_mesh():
    x = jnp.asarray(inputs()[0])
    outs = []
    for axes in ({}, {"data": 2, "expert": 4}):
        with on(AxisType.Auto, axes):
            layer = MoE(
                HIDDEN,
                FFN_HIDDEN,
                NUM_EXPERTS,
                NUM_TOPK,
                router=Router(jitter=0.5),
                rngs=nnx.Rngs(0),
            )
            outs.append([layer(x), layer(x, rngs=nnx.Rngs(router=1)), layer(x, rngs=nnx.Rngs(2))])
    for one, other in zip(*outs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    plain, first, second = outs[0]
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_zero_experts_count_among_the_choices():
    x = jnp.asarray(inputs()[0])
    layer = make_layer("longcat")
    _, aux = layer.apply_with_aux(x)
    assert aux["expert_load"].shape == (NUM_EXPERTS + 4,)
    assert int(aux["expert_load"].sum()) == 15 * NUM_TOPK
    assert int(aux["recv_rows"]) == int(aux["expert_load"][:NUM_EXPERTS].sum())
    assert int(aux["expert_load"][NUM_EXPERTS:].sum()) > 0
    assert float(aux["dropped_fraction"]) == 0
    assert aux["dropped_by_choice"].tolist() == [0.0] * NUM_TOPK


@pytest.mark.long
def test_a_share_drains_a_device():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, HIDDEN)), jnp.float32)
    with on(AxisType.Auto, {"expert": 4}):
        layer = make_layer("balanced")
        even, drained = (
            layer.apply_with_aux(x, share=share)
            for share in (None, jnp.array([0.0, 1.0, 1.0, 1.0], jnp.float32))
        )
    np.testing.assert_allclose(even[0], drained[0], rtol=2e-4, atol=2e-5)
    assert float(even[1]["rank_load_max_over_mean"]) < 1.05
    # Three devices do what four did.
    assert 1.3 < float(drained[1]["rank_load_max_over_mean"]) < 1.4


def test_matrices_are_drawn_by_kernel_init():
    """The router's and the shared expert's, too; biases begin as zero, as in Flax's own layers."""
    options = {"kernel_init": jax.nn.initializers.ones, "shared_hidden": 4, **MODELS["gpt_oss"]}
    layer = MoE(HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, rngs=nnx.Rngs(0), **options)
    for name, value in parameters(layer).items():
        is_bias = "b_" in name or "bias" in name
        np.testing.assert_array_equal(value, 0 if is_bias else 1, err_msg=name)


def test_parameters_are_drawn_by_name():
    """What is not named is drawn as if nothing were."""
    inits = {"w_down": jax.nn.initializers.zeros, "b_up": jax.nn.initializers.constant(3)}
    options = {"shared_hidden": 4, **MODELS["gpt_oss"]}
    plain, named = (
        parameters(
            MoE(
                HIDDEN,
                FFN_HIDDEN,
                NUM_EXPERTS,
                NUM_TOPK,
                kernel_init=kernel_init,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
        for kernel_init in (None, inits)
    )
    for name, value in plain.items():
        want = {"w_down": 0, "b_up": 3}.get(name, value)
        np.testing.assert_array_equal(named[name], want, err_msg=name)


def test_initial_scale_of_what_is_no_plain_matrix():
    fused = experts.FeedForward(experts.clamped_swiglu, is_fused=True, has_bias=True)
    options = {"latent_hidden": 128, "shared_hidden": 64, "gate_shared": True}
    layer = MoE(256, 96, 4, 2, experts=fused, rngs=nnx.Rngs(0), **options)
    params = parameters(layer)
    fans = {"w_gate_up": 128, "w_down": 96, "shared_w_gate_up": 256, "latent_in": 256}
    for name, fan_in in (fans | {"shared_gate_kernel": 256, "latent_out": 128}).items():
        assert 0.85 < np.std(params[name]) * fan_in**0.5 < 1.15, name
    assert params["w_gate_up"].shape == (4, 128, 2, 96)
    assert params["shared_b_gate_up"].shape == (2, 64)
    np.testing.assert_array_equal(params["b_down"], 0)


class NoDims:
    def __call__(self, rows, group_sizes):
        return rows


class WrongDims(NoDims):
    @property
    def dims(self):
        return {"w": ("model", "ffn_hidden")}


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "router must be one of .* or callable; got 3", {"router": 3}),
        (ValueError, "router must be one of .*; got 'topk'", {"router": "topk"}),
        (TypeError, "experts must be a name, or have `dims`", {"experts": NoDims()}),
        (ValueError, r"dims\['w'\] must consist of", {"experts": WrongDims()}),
        (ValueError, "gate_shared needs a shared expert", {"gate_shared": True}),
        (ValueError, "num_zero_experts must be at least 0", {"num_zero_experts": -1}),
        (ValueError, "latent_hidden must be", {"latent_hidden": 0}),
        (ValueError, "weigh must be one of", {"weigh": "rows"}),
        (
            TypeError,
            "kernel_init must be None, an initializer, or a mapping to these .*; got 0.02",
            {"kernel_init": 0.02},
        ),
        (TypeError, "kernel_init must be None.*; got {'w_up': 1}", {"kernel_init": {"w_up": 1}}),
        (
            ValueError,
            r"kernel_init must name parameters of this layer, \('router_kernel', .*; got 'bias'",
            {"kernel_init": {"bias": jax.nn.initializers.ones}},
        ),
        (ValueError, "must name different axes", {"tensor_axis": "expert"}),
        (
            ValueError,
            r"tensor_axis must name axes of the mesh in context, \('data', 'expert'\), or be None",
            {"tensor_axis": "tensor"},
        ),
        (
            ValueError,
            "shared_hidden must be a multiple of the 2 devices along tensor_axis='data'; got 5",
            {"tensor_axis": "data", "shared_hidden": 5},
        ),
        (
            ValueError,
            "latent_hidden must be a multiple of the 2 devices along fsdp_axis='data'; got 5",
            {"fsdp_axis": "data", "latent_hidden": 5},
        ),
    ],
)
def test_options_out_of_range(error, message, options):
    with on(AxisType.Auto, {"data": 2, "expert": 4}), pytest.raises(error, match=message):
        MoE(HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "topk_idx must hold integers", {"topk_idx": np.zeros((*BATCH, 2), np.float32)}),
        (
            ValueError,
            r"topk_idx must have shape \[..., num_topk\] = \[3, 5, 2\]; got \[15, 2\]",
            {"topk_idx": np.zeros((15, 2), np.int32)},
        ),
        (ValueError, "share needs num_spares", {"share": np.ones(4, np.float32)}),
    ],
)
def test_a_call_refuses(error, message, given):
    with pytest.raises(error, match=message):
        make_layer("gpt_oss")(jnp.asarray(inputs()[0]), **given)


def test_a_router_that_is_called_refuses():
    def of(weights):
        def router(x):
            return np.zeros((*BATCH, NUM_TOPK), np.int32), weights, {}

        return MoE(HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, router=router, rngs=nnx.Rngs(0))

    x = jnp.asarray(inputs()[0])
    good = np.ones((*BATCH, NUM_TOPK), np.float32)
    of(good)(x)
    with pytest.raises(ValueError, match="topk_idx and rngs must be None where the router is a"):
        of(good)(x, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="router's topk_weights must hold float32; got int32"):
        of(good.astype(np.int32))(x)
    with pytest.raises(ValueError, match=r"router's topk_weights must have shape"):
        of(good[..., :1])(x)
