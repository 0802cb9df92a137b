"""``jax_ep.flax.MoE`` against the dense formula, on every kind of mesh, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import (
    BATCH,
    BIAS,
    FFN_HIDDEN,
    HIDDEN,
    NUM_EXPERTS,
    NUM_TOPK,
    check_against_dense,
    dense,
    dense_loss,
    expected,
    inputs,
    layer_loss,
    make_layer,
    on,
    parameters,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep.flax import MoE

MESHES = {
    "no_mesh": (None, ()),
    "expert": (AxisType.Auto, {"expert": 8}),
    "expert_explicit": (AxisType.Explicit, {"expert": 8}),
    "data_expert": (AxisType.Auto, {"data": 2, "expert": 4}),
    "data_expert_explicit": (AxisType.Explicit, {"data": 2, "expert": 4}),
}


@pytest.mark.composes
@pytest.mark.parametrize(("kind", "axes"), MESHES.values(), ids=MESHES)
def test_is_the_dense_formula_forward_and_backward(implementation, kind, axes):
    with on(kind, axes):
        check_against_dense(make_layer(implementation=implementation))


@pytest.mark.parametrize(
    ("axes", "axis_name"),
    [
        ({"data": 2, "expert": 2, "tensor": 2}, "expert"),
        ({"node": 2, "data": 2, "device": 2}, ("node", "device")),
        ({"data": 8}, None),
    ],
    ids=["between_other_axes", "two_axes", "replicated"],
)
def test_other_meshes(axes, axis_name):
    with on(AxisType.Auto, axes):
        check_against_dense(make_layer(axis_name=axis_name))


def test_sigmoid_router():
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer(router="sigmoid")
        layer.router_bias[...] = jnp.asarray(BIAS)
        check_against_dense(layer, "sigmoid")


@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "expert"), P(), P(("data", "expert"))], ids=str
)
def test_explicit_axes_keep_the_sharding_of_x(spec):
    with on(AxisType.Explicit, {"data": 2, "expert": 4}):
        layer = make_layer()
        x = jax.sharding.reshard(jnp.ones((8, 4, HIDDEN)), spec)
        types = []

        @jax.jit
        def forward(x):
            out = layer(x)
            types.extend(jax.typeof(a).sharding for a in (x, out))
            return out

        out = forward(x)
    assert types[0] == types[1]
    assert out.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parameters_are_created_sharded(kind):
    with on(kind, {"data": 2, "expert": 4}):
        layer = make_layer()
        for name in ("w_gate", "w_up", "w_down"):
            value = getattr(layer, name)[...]
            assert value.sharding.shard_shape(value.shape)[0] == NUM_EXPERTS // 4
        kernel = layer.router_kernel[...]
        assert kernel.sharding.is_fully_replicated
    for name, value in parameters(make_layer()).items():
        np.testing.assert_array_equal(parameters(layer)[name], value)


def test_initial_scale_is_that_of_each_expert():
    layer = MoE(256, 64, 4, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    for name, fan_in in (("router_kernel", 256), ("w_gate", 256), ("w_up", 256), ("w_down", 64)):
        value = getattr(layer, name)[...]
        assert value.dtype == jnp.bfloat16
        spread = float(jnp.std(value.astype(jnp.float32))) * fan_in**0.5
        assert 0.85 < spread < 1.15, name


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (17,), (2, 3, 4)], ids=str)
def test_any_batch_shape(batch):
    x = np.asarray(jax.random.normal(jax.random.key(3), (*batch, HIDDEN)))
    with on(AxisType.Explicit, {"data": 2, "expert": 4}):
        layer = make_layer()
        out, aux = layer.apply_with_aux(jnp.asarray(x))
    assert out.shape == x.shape
    num_tokens = int(np.prod(batch))
    assert int(aux["expert_load"].sum()) == int(aux["recv_rows"]) == num_tokens * NUM_TOPK
    if num_tokens:
        want, balance, z, _ = dense(parameters(layer), x.reshape(-1, HIDDEN))
        np.testing.assert_allclose(out.reshape(-1, HIDDEN), want, rtol=1e-4, atol=1e-5)
        # Padding tokens would lower the one and move the other.
        np.testing.assert_allclose(aux["load_balance_loss"], balance, rtol=1e-5)
        np.testing.assert_allclose(aux["router_z_loss"], z, rtol=1e-5)


MASK = np.arange(15).reshape(BATCH) % 4 != 1


@pytest.mark.parametrize(("kind", "axes"), MESHES.values(), ids=MESHES)
def test_what_is_no_token_is_as_if_it_were_not_there(kind, axes):
    """It is NaN, which would show in every gradient; and it takes no room from tokens."""
    x, dout = inputs()
    real, real_dout = x[MASK], dout[MASK]
    with on(kind, axes):
        layer = make_layer()
        params = parameters(layer)
        both = nnx.jit(nnx.value_and_grad(layer_loss, argnums=(0, 1), has_aux=True))
        given = np.where(MASK[..., None], x, np.nan)
        (loss, (out, load)), (grads, dx) = both(layer, given, dout, MASK)
    dense_both = jax.value_and_grad(dense_loss, argnums=(0, 1), has_aux=True)
    (want, (want_out, want_load)), (want_grads, want_dx) = dense_both(params, real, real_dout)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_array_equal(load, want_load)
    for got, wanted in ((out, want_out), (dx, want_dx)):
        np.testing.assert_allclose(np.asarray(got)[MASK], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(got)[~MASK], 0)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name][...], grad, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_no_token_takes_no_room():
    layer = make_layer(capacity_factor=1.0)
    x = np.repeat(inputs()[0][:1, :1], 16, axis=1)  # all 16 want the same experts
    _, aux = layer.apply_with_aux(x)
    assert aux["dropped_fraction"] == 0  # one rank: no budget is exceeded
    with on(AxisType.Auto, {"expert": 8}):
        layer = make_layer(capacity_factor=1.0)
        _, aux = layer.apply_with_aux(x)
        assert aux["dropped_fraction"] > 0
        mask = np.arange(16)[None] < 2
        out, aux = layer.apply_with_aux(x, token_mask=mask)
    assert aux["dropped_fraction"] == 0
    assert int(aux["expert_load"].sum()) == 2 * NUM_TOPK
    assert np.all(np.any(out, axis=-1) == mask)


@pytest.mark.parametrize(
    ("token_mask", "error", "message"),
    [
        (np.ones((3, 4), np.bool_), ValueError, r"token_mask must have shape .*\[3, 5\]; got"),
        (np.ones(BATCH, np.int32), TypeError, "token_mask must hold booleans; got int32"),
        ([True], TypeError, "token_mask must be an array of booleans, or None; got list"),
    ],
)
def test_errors_of_the_mask(token_mask, error, message):
    with pytest.raises(error, match=message):
        make_layer()(inputs()[0], token_mask=token_mask)


def test_dropped_choices_show_in_the_metrics():
    """With the router blind, all tokens want experts 0 and 1, which two of eight ranks own."""
    with on(AxisType.Auto, {"expert": 8}):
        layer = make_layer(capacity_factor=2.0)
        layer.router_kernel[...] = jnp.zeros_like(layer.router_kernel[...])
        x = jnp.ones((64, HIDDEN))
        out, aux = layer.apply_with_aux(x)
    # 8 tokens a rank, 2 choices each: room for 32 rows on each of the two ranks, 64 wanted.
    assert float(aux["dropped_fraction"]) == 0.5
    assert int(aux["recv_rows"]) == 64
    assert aux["expert_load"].tolist() == [64, 64, 0, 0, 0, 0, 0, 0]
    assert float(aux["rank_load_max_over_mean"]) == float(aux["expert_load_max_over_mean"]) == 4.0
    served = np.any(np.asarray(out) != 0, axis=-1)
    assert served.sum() == 32


def test_bytes_count_the_compute_dtype():
    layer = make_layer(dtype=jnp.bfloat16)
    out, aux = layer.apply_with_aux(jnp.ones((4, HIDDEN)))
    assert out.dtype == jnp.bfloat16
    assert float(aux["logical_bytes"]) == 4 * NUM_TOPK * HIDDEN * 2


def test_tokens_cross_as_8_bits_and_bytes_count_these():
    x = jnp.asarray(inputs()[0])
    out, aux = make_layer(wire_dtype="float8_e4m3fn").apply_with_aux(x)
    assert float(aux["logical_bytes"]) == 15 * NUM_TOPK * (HIDDEN + 4)
    want = make_layer()(x)
    assert 0 < np.max(np.abs(out - want)) < 0.1


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_compute_dtype(x_dtype, dtype):
    x = jnp.asarray(inputs()[0], x_dtype)

    def total(layer, x):
        out = layer(x)
        return jnp.sum(out).astype(jnp.float32), out

    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer(dtype=dtype)
        gradient, out = nnx.jit(nnx.grad(total, has_aux=True))(layer, x)
    assert out.dtype == (dtype or x_dtype)
    want = expected()[0][1][0]
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.05)
    assert all(value[...].dtype == jnp.float32 for value in gradient.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1; got 0"),
        ({"ffn_hidden": 2.0}, TypeError, "ffn_hidden must be an int"),
        ({"num_topk": 9}, ValueError, "num_topk must be at most num_experts = 8; got 9"),
        ({"router": "tanh"}, ValueError, r"router must be one of \('softmax', 'sigmoid'\)"),
        ({"implementation": "nccl"}, ValueError, "implementation must be one of"),
        ({"wire_dtype": "int8"}, ValueError, "wire_dtype must be one of .* got 'int8'"),
        ({"wire_cotangents": "int8"}, ValueError, "wire_cotangents must be one of .* got 'int8'"),
        ({"capacity_factor": 0.0}, ValueError, "capacity_factor must be None or positive"),
    ],
)
def test_errors_of_the_constructor(options, error, message):
    sizes = {"hidden": 16, "ffn_hidden": 8, "num_experts": 8, "num_topk": 2}
    with pytest.raises(error, match=message):
        MoE(**{**sizes, **options}, rngs=nnx.Rngs(0))


def test_errors_of_the_input():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"x must have shape .* hidden = 16\]; got \[3, 15\]"):
        layer(jnp.ones((3, 15)))
    with pytest.raises(TypeError, match="x must be an array .* of floats; got int32"):
        layer(jnp.ones((3, 16), jnp.int32))


def test_without_flax_the_import_says_what_to_install():
    script = "import sys; sys.modules['flax'] = None; import jax_ep; import jax_ep.flax"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("install it by `pip install 'jax_ep[flax]'`.")


def test_errors_of_the_mesh():
    layer = make_layer()
    with on(AxisType.Auto, {"data": 8}):
        with pytest.raises(ValueError, match=r"axis_name must .* or be None .* got 'expert'"):
            layer(jnp.ones((3, HIDDEN)))
        with pytest.raises(ValueError, match="axis_name must name axes of the mesh in context"):
            make_layer()
    with (
        on(AxisType.Auto, {"expert": 8}),
        pytest.raises(
            ValueError, match="num_experts must be a multiple of the 8 devices .* got 12"
        ),
    ):
        MoE(HIDDEN, FFN_HIDDEN, 12, 2, rngs=nnx.Rngs(0))
    with (
        on(AxisType.Auto, {"expert": 8}),
        pytest.raises(ValueError, match="ranks_per_node must divide the 8 devices .* got 3"),
    ):
        make_layer(ranks_per_node=3)
    with (
        on(AxisType.Auto, {"expert": 8}),
        pytest.raises(ValueError, match="MoE must be called on global arrays"),
    ):
        jax.shard_map(layer, in_specs=P("expert"), out_specs=P("expert"))(jnp.ones((8, HIDDEN)))
