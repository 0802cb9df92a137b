"""Tunix's own layer with this library inside, against what it computes on a CPU by itself."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from flax import nnx
from installed import check_put_back, check_refuses, check_warns_of_version
from jax.sharding import AxisType
from tunix.models.qwen3 import model  # pyright: ignore[reportMissingImports]

from jax_ep.integrations import tunix as adapter

BATCH, LENGTH, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 6, 16, 12, 8, 2
FSDP = model.ShardingConfig.get_default_sharding()
put_back = check_put_back(adapter, model.MoELayer, "__call__")


def over(tokens, experts):
    """Tunix's specs, with other axes for tokens and experts."""
    return dataclasses.replace(
        FSDP,
        act_btd=(tokens, None, "tp"),
        exp_weight_edf=(experts, None, "tp"),
        exp_weight_efd=(experts, "tp", None),
    )


MESHES = {
    "fsdp_tp": (FSDP, {"fsdp": 4, "tp": 2}),
    "fsdp_ep_tp": (over(("fsdp", "ep"), "ep"), {"fsdp": 2, "ep": 2, "tp": 2}),
}


def layer_on(name):
    """Returns a layer with parameters that are all different, and the mesh for its specs."""
    specs, sizes = MESHES[name]
    config = model.ModelConfig(
        num_layers=1,
        vocab_size=8,
        embed_dim=HIDDEN,
        hidden_dim=FFN_HIDDEN,
        num_heads=1,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_TOPK,
        shd_config=specs,
    )
    layer = model.MoELayer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for param in jax.tree.leaves(
        nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    ):
        param[...] = jnp.asarray(rng.standard_normal(param.shape) / 2, jnp.float32)
    kinds = (AxisType.Auto,) * len(sizes)
    return layer, jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def lower(layer, mesh, **options):
    """Returns a program's text, and what runs it: outputs, and gradients of all floats."""
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(1)
    x, dout = (rng.standard_normal((BATCH, LENGTH, HIDDEN)).astype(np.float32) for _ in range(2))

    def objective(state, x):
        out = nnx.merge(graph, state)(x, **options)
        return jnp.vdot(out, dout), out

    with mesh or contextlib.nullcontext():
        grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        lowered = grad.lower(state, x)

    def run():
        (_, out), (grads, dx) = lowered.compile()(state, x)
        arrays = {"/".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}
        return jax.tree.map(np.asarray, {"out": out, "dx": dx, **arrays})

    return lowered.as_text(), run


@pytest.fixture(scope="module")
def want():
    text, run = lower(layer_on("fsdp_tp")[0], None)
    assert "jax_ep" not in text
    return run()


@pytest.mark.parametrize("name", MESHES)
def test_is_tunixs_loop_over_experts_forward_and_backward(name, want):
    adapter.install()
    text, run = lower(*layer_on(name))
    assert "jax_ep_" in text
    assert_close(run(), want)


def test_it_leaves_to_tunix_what_goes_without_an_exchange():
    adapter.install()
    layer, mesh = layer_on("fsdp_tp")
    for options in ({"mesh": None}, {"mesh": mesh, "use_megablox": False}):
        assert "jax_ep_" not in lower(layer, **options)[0]


def test_a_buffer_may_be_bounded(want):
    adapter.install(capacity_factor=0.25)
    adapter.install(capacity_factor=0.5)
    out = lower(*layer_on("fsdp_tp"))[1]()["out"]
    # With half the mean of rows on each device, most tokens lose a choice and some lose both.
    same = np.all(np.isclose(out, want["out"], atol=1e-5), axis=-1)
    assert 0 < np.count_nonzero(same) <= BATCH * LENGTH // 2
    assert 0 < np.count_nonzero(np.any(out != 0, axis=-1)) < BATCH * LENGTH


def test_another_version_is_warned_of(monkeypatch):
    match = r"made for Tunix 0\.1\.7.*this is 0\.2\.0"
    check_warns_of_version(monkeypatch, adapter, "0.2.0", match)


def test_another_layer_is_refused(monkeypatch):
    other = lambda self, x, mask: None  # noqa: E731
    match = r"must take \['self', 'x', 'use_meg.*'mask'\]"
    check_refuses(monkeypatch, adapter, model.MoELayer, "__call__", other, match)
