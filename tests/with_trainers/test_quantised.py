"""MaxText's quantised products between this library's exchanges, and between MaxText's own.

Of MaxText's own exchanges a CPU has the ring of experts, with megablox: there experts are cut over
devices as here, and scales are of the same rows. Without expert parallelism all is its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix  # pyright: ignore[reportMissingImports]
from blocks import FFN_HIDDEN, HIDDEN, Block, ours
from compare import assert_close
from flax import nnx
from maxtext.kernels.megablox import ops  # pyright: ignore[reportMissingImports]
from maxtext.layers import moe, quantizations  # pyright: ignore[reportMissingImports]

from jax_ep.integrations._maxtext_products import add_bias, find_product, plain

SIZES = {"batch_seq": 64, "embed_dim": HIDDEN, "mlp_dim": FFN_HIDDEN}
TILES = {
    f"{whose}_tile_{side}_{dim}": size
    for whose in ("wi", "wo")
    for side in ("fwd", "dlhs", "drhs")
    for dim, size in SIZES.items()
}
RING = {"megablox": True, "use_ring_of_experts": True, **TILES}
ALONE = {"ici_fsdp_parallelism": 8, "ici_expert_parallelism": 1}
QWIX = {"use_qwix_quantization": True, "quantize_router_proj": False}
# Of the loss the ring makes one for each group of experts.
NO_LOSS = {"load_balance_loss_weight": 0.0}


def make(model_name="mixtral-8x7b", **options):
    """Returns a block, under Qwix' interception where that quantises, as MaxText's models are."""
    block = Block(model_name, **NO_LOSS, **options)
    if not options.get("use_qwix_quantization"):
        return block
    # Of a router, and of a decoder's layers: the block is all there is here.
    router, layers = quantizations.get_quantization_rule(block.config)
    rules = [
        dataclasses.replace(router, module_path="gate"),
        dataclasses.replace(layers, module_path=".*"),
    ]

    def intercept(model, x):
        model = qwix.quantize_model(model, qwix.QtProvider(rules), x)
        nnx.pop(model, nnx.Intermediate)
        return model

    with block.context(), ours():
        model = nnx.eval_shape(intercept, nnx.merge(block.graph, block.state), block.x)
    block.graph, _ = nnx.split(model)
    return block


def forward(block):
    return {"out": block.run()[0][0]}


def both(block):
    (out, _, _), grads = block.run_with_gradients()
    return {"out": out, **grads}


def is_far(got, want):
    return jnp.max(jnp.abs(got["out"] - want["out"])) > 0.01 * jnp.max(jnp.abs(want["out"]))


@pytest.fixture
def scales_of_own_rows(monkeypatch):
    """Has MaxText's kernels not see the cotangents of rows that the ring has of others' experts."""
    prepare = ops._bwd_prepare_inputs

    def of_own(cotangents, rows, kernel, group_sizes, *args):
        is_own = jnp.arange(len(cotangents)) < jnp.sum(group_sizes[: kernel.shape[0]])
        return prepare(jnp.where(is_own[:, None], cotangents, 0), rows, kernel, group_sizes, *args)

    monkeypatch.setattr(ops, "_bwd_prepare_inputs", of_own)


def test_aqt_in_megablox():
    block = make(quantization="int8", **RING)
    want = both(block)
    unquantised = make()
    with ours():
        assert_close(both(block), want)
        assert is_far(forward(unquantised), want)


def test_fp8_in_megablox():
    block = make(quantization="fp8", **RING)
    want = forward(block)
    with ours():
        assert_close(forward(block), want)


def test_qwix_in_megablox_and_in_ragged_dot(scales_of_own_rows):
    options = {"quantization": "fp8_full", "prefuse_moe_weights": True, **QWIX}
    block, without_kernels = make(**RING, **options), make(**options)
    want = both(block)
    with ours():
        assert_close(both(block), want)
        assert_close(both(without_kernels), want)


def test_qwix_in_ragged_dot_without_expert_parallelism():
    block, unquantised = make(quantization="fp8_full", **QWIX, **ALONE), make(**ALONE)
    want = forward(block)
    with ours():
        assert_close(forward(block), want)
        assert is_far(forward(unquantised), want)


class Experts(nnx.Module):
    """Products of ours, as in the block where there is no rule for experts."""

    def __init__(self):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (2, 4, 3)))
        self.bias = nnx.Param(jax.random.normal(jax.random.key(1), (2, 3)))

    def __call__(self, rows):
        sizes = jnp.array([3, 2])
        return add_bias(plain(rows, self.kernel[...], sizes, "wi"), self.bias[...], sizes)


def test_qwix_leaves_products_inside_of_ours():
    """They were quantised, where a block was not compiled: by the rule for a layer's own."""
    rule = qwix.QtRule(weight_qtype=jnp.int8, act_qtype=jnp.int8, op_names=("dot_general",))
    rows = jax.random.normal(jax.random.key(2), (5, 4))
    model = qwix.quantize_model(Experts(), qwix.QtProvider([rule]), rows)
    of = np.array([0, 0, 0, 1, 1])  # the expert of each row
    want = np.einsum("rh,rhf->rf", rows, model.kernel[...][of]) + model.bias[...][of]
    np.testing.assert_allclose(model(rows), want, rtol=1e-5, atol=1e-6)


def test_rows_of_no_expert_are_in_no_scale():
    block = make(quantization="fp8", **RING)
    rows, kernel = jnp.ones((64, HIDDEN)), jnp.ones((2, HIDDEN, FFN_HIDDEN))
    with block.context():
        product = find_product(nnx.merge(block.graph, block.state), (kernel,))
    assert product is not None

    @jax.jit
    def pulled(*arrays):
        out, pull = jax.vjp(lambda *arrays: product(*arrays, jnp.array([3, 2]), "wi"), *arrays)
        is_used = jnp.arange(64)[:, None] < 5
        return out, *pull(jnp.where(is_used, jnp.ones_like(out), jnp.nan))

    out, drows, dkernel = pulled(rows, kernel)
    assert not jnp.any(out[5:])
    assert jnp.all(jnp.isfinite(drows[:5]))
    assert jnp.all(jnp.isfinite(dkernel))


def test_without_kernels_aqt_leaves_experts_as_they_are():
    block = make(quantization="int8")
    with block.context():
        assert find_product(nnx.merge(block.graph, block.state), (jnp.ones(1),)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantization": "int8", "use_tokamax_gmm": True},
            "of use_tokamax_gmm, which is for TPUs",
        ),
        (
            {"quantization": "int8", "megablox": True},
            "by AqtQuantization with what it has for quan",
        ),
    ],
)
def test_what_is_refused(options, message):
    block = make(**options)
    with block.context():
        layer = nnx.merge(block.graph, block.state)
        if options.get("megablox"):
            layer.quant = dataclasses.replace(layer.quant, quant_dg={"__default__": None})
        with pytest.raises(NotImplementedError, match=f"not serve quantised products {message}"):
            find_product(layer, (jnp.ones(1),))


def test_packed_weights_are_refused():
    block = make()
    packed = moe.qpl.quantize(jnp.ones((4, 4)), jnp.int8)
    with (
        block.context(),
        pytest.raises(NotImplementedError, match="of weights that are packed; got"),
    ):
        find_product(nnx.merge(block.graph, block.state), (packed,))
