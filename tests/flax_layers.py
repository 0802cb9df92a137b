"""A small ``jax_ep.flax.MoE``, and the dense formula of what it computes."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ep.flax import MoE

HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 16, 8, 8, 2
# 15 tokens: no mesh divides them.
BATCH = (3, 5)
BIAS = np.linspace(0.5, -0.5, NUM_EXPERTS, dtype=np.float32)


def on(kind, axes):
    """Puts a mesh in context, or none."""
    if not axes:
        return contextlib.nullcontext()
    sizes, names = tuple(axes.values()), tuple(axes)
    return jax.set_mesh(jax.make_mesh(sizes, names, axis_types=(kind,) * len(axes)))


def make_layer(**options):
    return MoE(HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, rngs=nnx.Rngs(0), **options)


@functools.cache
def inputs():
    keys = jax.random.split(jax.random.key(1), 2)
    return tuple(np.asarray(jax.random.normal(key, (*BATCH, HIDDEN))) for key in keys)


def parameters(layer):
    return {name: np.asarray(value[...]) for name, value in nnx.state(layer, nnx.Param).items()}


def dense(params, x, bias=None):
    """Every expert on every token, without any exchange; returns output, losses and load."""
    logits = jnp.einsum("...h,he->...e", x, params["router_kernel"])
    probs = jax.nn.softmax(logits) if bias is None else jax.nn.sigmoid(logits)
    choosing = probs if bias is None else probs + bias
    chosen = choosing >= jax.lax.stop_gradient(jnp.sort(choosing)[..., -NUM_TOPK, None])
    weights = jnp.where(chosen, probs, 0)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    gate = jnp.einsum("...h,ehf->...ef", x, params["w_gate"])
    up = jnp.einsum("...h,ehf->...ef", x, params["w_up"])
    outs = jnp.einsum("...ef,efh->...eh", jax.nn.silu(gate) * up, params["w_down"])
    tokens = tuple(range(x.ndim - 1))
    load = jnp.sum(chosen, axis=tokens)
    share = jnp.mean(probs / jnp.sum(probs, axis=-1, keepdims=True), axis=tokens)
    fraction = load.astype(jnp.float32) / jnp.sum(load).astype(jnp.float32)
    balance = NUM_EXPERTS * jnp.sum(fraction * share)
    z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    return jnp.sum(weights[..., None] * outs, axis=-2), balance, z, load


def dense_loss(params, x, dout, bias=None):
    out, balance, z, load = dense(params, x, bias)
    return jnp.vdot(out, dout) + 3 * balance + 2 * z, (out, load)


def layer_loss(layer, x, dout, token_mask=None):
    out, aux = layer.apply_with_aux(x, token_mask=token_mask)
    loss = jnp.vdot(out, dout) + 3 * aux["load_balance_loss"] + 2 * aux["router_z_loss"]
    return loss, (out, aux["expert_load"])


@functools.cache
def expected(router="softmax"):
    bias = None if router == "softmax" else BIAS
    params, (x, dout) = parameters(make_layer(router=router)), inputs()
    both = jax.value_and_grad(dense_loss, argnums=(0, 1), has_aux=True)
    return jax.jit(both)(params, x, dout, bias)


def check_against_dense(layer, router="softmax"):
    x, dout = (jnp.asarray(a) for a in inputs())
    both = nnx.value_and_grad(layer_loss, argnums=(0, 1), has_aux=True)
    (loss, (out, load)), (dlayer, dx) = nnx.jit(both)(layer, x, dout)
    (want_loss, (want_out, want_load)), (want_dparams, want_dx) = expected(router)
    np.testing.assert_array_equal(load, want_load)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    close(loss, want_loss)
    close(out, want_out)
    close(dx, want_dx)
    got_dparams = {name: value[...] for name, value in dlayer.items()}
    assert set(got_dparams) == set(want_dparams)
    for name, want in want_dparams.items():
        close(got_dparams[name], want, err_msg=name)
