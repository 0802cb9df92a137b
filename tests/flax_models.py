"""``flax.MoE`` layers of what architectures differ in, and one dense formula of them all."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax_layers import BATCH, FFN_HIDDEN, HIDDEN, NUM_EXPERTS, NUM_TOPK, inputs, parameters
from jax.sharding import AxisType

from jax_ep import experts, grouped_matmul
from jax_ep.flax import MoE
from jax_ep.routing import Router


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A user's network: one matrix, a vector beside it, and no activation."""

    @property
    def dims(self):
        inward, outward = ("hidden", "ffn_hidden"), ("ffn_hidden", "hidden")
        return {"w": inward, "back": outward, "shift": ("hidden",)}

    def __call__(self, rows, group_sizes, w, back, shift):
        out = grouped_matmul(grouped_matmul(rows, w, group_sizes), back, group_sizes)
        return experts.add_bias(out, shift, group_sizes)


GPT_OSS = {"experts": "clamped_swiglu", "router": Router(has_logit_bias=True)}
MODELS = {
    "llama4": {"router": Router("sigmoid", renormalize=False), "weigh": "input"},
    "gpt_oss": GPT_OSS,
    "fused": {"experts": experts.FeedForward(experts.swiglu, is_fused=True)},
    "deepseek": {
        "router": Router("sigmoid", has_bias=True, num_groups=4, topk_groups=2, scale=2.5),
        "shared_hidden": 4,
    },
    "qwen2": {"shared_hidden": 12, "gate_shared": True},
    "longcat": {"router": Router(has_bias=True, renormalize=False), "num_zero_experts": 4},
    "nemotron": {"experts": "relu2", "latent_hidden": 4, "shared_hidden": 8},
    "own": {"experts": Scaled(), "shared_hidden": 4},
    "balanced": {"num_spares": 2, **GPT_OSS},
}
MESHES = {
    "no_mesh": (None, {}, {}),
    "expert": (AxisType.Auto, {"expert": 8}, {}),
    "tensor": (AxisType.Auto, {"expert": 2, "tensor": 4}, {"tensor_axis": "tensor"}),
    "all": (
        AxisType.Explicit,
        {"data": 2, "expert": 2, "tensor": 2},
        {"tensor_axis": "tensor", "fsdp_axis": "data"},
    ),
    "fsdp": (AxisType.Auto, {"data": 4, "expert": 2}, {"fsdp_axis": "data"}),
}
BIAS = np.linspace(0.3, -0.3, NUM_EXPERTS + 4, dtype=np.float32)


def make_layer(model, **options):
    layer = MoE(
        HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, rngs=nnx.Rngs(0), **MODELS[model], **options
    )
    for name, value in nnx.state(layer, nnx.Param).items():
        if "b_" in name or "bias" in name or "shift" in name:
            # They begin as zero, which any use of them would leave alone.
            shape = value[...].shape
            numbers = jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
            getattr(layer, name)[...] = jax.device_put(numbers, value[...].sharding)
    if hasattr(layer, "router_bias"):
        layer.router_bias[...] = jnp.asarray(BIAS[: layer.config.num_choosable])
    return layer


def apply_expert(config, named, v):
    """Applies one network to tokens; ``named`` are one expert's parameters."""
    if isinstance(config.experts, Scaled):
        return v @ named["w"] @ named["back"] + named["shift"]
    if config.experts.is_fused:
        both = jnp.einsum("th,hcf->tcf", v, named["w_gate_up"])
        return config.experts.activation(both[:, 0], both[:, 1]) @ named["w_down"]
    names = ("gate", "up") if config.experts.is_gated else ("up",)
    inner = (v @ named[f"w_{name}"] + named.get(f"b_{name}", 0) for name in names)
    return config.experts.activation(*inner) @ named["w_down"] + named.get("b_down", 0)


def dense(config, params, x, topk_idx=None):
    """Every expert on every token, without any exchange."""
    x = x.reshape(-1, HIDDEN)
    logits = x @ params["router_kernel"] + params.get("router_logit_bias", 0)
    bias = BIAS[: config.num_choosable] if config.router.has_bias else None
    topk_idx, weights = config.router.choose(logits, NUM_TOPK, bias=bias, topk_idx=topk_idx)
    inner = x @ params["latent_in"] if config.latent_hidden else x
    out = jnp.zeros_like(inner)
    for e in range(NUM_EXPERTS):
        weight = jnp.sum(jnp.where(topk_idx == e, weights, 0), axis=1, keepdims=True)
        named = {name: params[name][e] for name in config.experts.dims}
        if config.weigh == "input":
            is_chosen = jnp.any(topk_idx == e, axis=1, keepdims=True)
            out += jnp.where(is_chosen, apply_expert(config, named, weight * inner), 0)
        else:
            out += weight * apply_expert(config, named, inner)
    if config.latent_hidden:
        out = out @ params["latent_out"]
    kept = jnp.sum(jnp.where(topk_idx >= NUM_EXPERTS, weights, 0), axis=1, keepdims=True)
    out += kept * x
    if config.shared_hidden:
        named = {name: params["shared_" + name] for name in config.experts.dims}
        shared = apply_expert(config, named, x)
        if config.gate_shared:
            shared *= jax.nn.sigmoid(x @ params["shared_gate_kernel"])
        out += shared
    return out.reshape(*BATCH, HIDDEN)


@functools.cache
def expected(model):
    layer = make_layer(model)
    x, dout = inputs()

    def loss(params, x):
        out = dense(layer.config, params, x)
        return jnp.vdot(out, dout), out

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), grads = jax.jit(both)(parameters(layer), x)
    return out, grads


def check_against_dense(layer, model):
    x, dout = inputs()

    def loss(layer, x):
        out = layer(x)
        return jnp.vdot(out, dout), out

    both = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), (dlayer, dx) = both(layer, jnp.asarray(x))
    want_out, (want_dparams, want_dx) = expected(model)

    def close(got, want, name):
        scale = max(float(np.abs(want).max()), 1e-3)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * scale, err_msg=name)

    close(out, want_out, "out")
    close(dx, want_dx, "dx")
    got_dparams = {name: value[...] for name, value in dlayer.items()}
    assert set(got_dparams) == set(want_dparams)
    for name, want in want_dparams.items():
        close(got_dparams[name], want, name)
        assert np.abs(want).max() > 0, name
    return got_dparams
