"""``jax_ep.flax.MoE`` inside of models: in several layers, under Linen, and as it is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from flax_layers import (
    FFN_HIDDEN,
    HIDDEN,
    NUM_EXPERTS,
    NUM_TOPK,
    dense,
    inputs,
    make_layer,
    on,
    parameters,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep import routing
from jax_ep.flax import MoE, RouterBias


def test_router_bias_is_trained_by_update_router_bias_alone():
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer(router="sigmoid")
        assert "router_bias" not in nnx.state(layer, nnx.Param)
        assert set(nnx.state(layer, RouterBias)) == {"router_bias"}
        x = jax.random.normal(jax.random.key(2), (256, HIDDEN)) + 0.3

        @nnx.jit
        def step(layer, x):
            forward = nnx.capture(lambda layer, x: layer(x), nnx.Intermediate)
            _, sown = forward(layer, x)
            bias, load = layer.router_bias[...], sown["expert_load"][0]
            layer.router_bias[...] = routing.update_router_bias(bias, load, 0.005)
            return sown["expert_load_max_over_mean"][0]

        loads = [float(step(layer, x)) for _ in range(60)]
    assert loads[0] > 1.4
    assert loads[-1] < 1.15


class Tower(nnx.Module):
    """Two layers, so that both exchange in one program."""

    def __init__(self, rngs):
        self.layers = nnx.List([make_layer(), make_layer(router="sigmoid")])
        self.head = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.long
@pytest.mark.parametrize("remat", [False, True])
def test_two_layers_train_and_sow(remat):
    def loss(model, x):
        call = nnx.remat(lambda model, x: model(x)) if remat else lambda model, x: model(x)
        out = call(model, x)
        return jnp.mean((out - 1) ** 2)

    @nnx.jit
    def step(model, x):
        (value, gradient) = nnx.value_and_grad(loss)(model, x)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient))
        return value

    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        model, x = Tower(nnx.Rngs(1)), jnp.asarray(inputs()[0])
        before = jax.tree.structure(nnx.state(model))
        losses = [float(step(model, x)) for _ in range(5)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.7 * losses[0]
        # Nothing is left behind in the model without nnx.capture: it would grow, and recompile.
        assert jax.tree.structure(nnx.state(model)) == before
        forward = nnx.capture(lambda model, x: model(x), nnx.Intermediate)
        _, sown = nnx.jit(forward)(model, x)
    for index in range(2):
        assert int(sown["layers"][index]["expert_load"][0].sum()) == 15 * NUM_TOPK
        assert set(sown["layers"][index]) == {
            "load_balance_loss",
            "router_z_loss",
            "expert_load",
            "rank_load",
            "dropped_by_choice",
            "expert_load_max_over_mean",
            "rank_load_max_over_mean",
            "dropped_fraction",
            "recv_rows",
            "logical_bytes",
            "wire_bytes",
            "node_wire_bytes",
        }


def test_nodes():
    """Tokens leave a node once for each other one; without a mesh there is just one."""
    x = jnp.asarray(inputs()[0])
    alone, _ = make_layer(ranks_per_node=2).apply_with_aux(x)
    aux = {}
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        for per_node in (1, 2, 4):
            layer = make_layer(ranks_per_node=per_node)
            out, aux[per_node] = jax.jit(layer.apply_with_aux)(x)
            np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-5)
    left = [float(aux[per_node]["node_wire_bytes"]) for per_node in (1, 2, 4)]
    assert left[0] == float(aux[1]["wire_bytes"]) == float(aux[2]["wire_bytes"])
    assert left[0] > left[1] > left[2] == 0


@pytest.mark.parametrize("chunks", [1, 2])
def test_loads_of_ranks_and_drops_by_choice(chunks):
    """The first of four ranks owns both experts that all want: it keeps first choices alone."""
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer(capacity_factor=1.0, chunks=chunks)
        layer.router_kernel[...] = jnp.zeros_like(layer.router_kernel[...])
        half = np.arange(64) % 2 == 0
        _, aux = layer.apply_with_aux(jnp.ones((64, HIDDEN)), token_mask=half)
    assert aux["rank_load"].tolist() == [64, 0, 0, 0]
    assert aux["dropped_by_choice"].tolist() == [0.0, 1.0]


@pytest.mark.long
def test_losses_can_be_trained_on_through_capture():
    """The router's gradients from sown losses are those of the losses themselves."""
    x = jnp.asarray(inputs()[0])

    def sown_loss(layer, x):
        _, sown = nnx.capture(lambda layer, x: layer(x), nnx.Intermediate)(layer, x)
        return sum(sown[name][0] for name in ("load_balance_loss", "router_z_loss"))

    def direct_loss(params):
        _, balance, z, _ = dense(params, x)
        return balance + z

    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = make_layer()
        got = nnx.jit(nnx.grad(sown_loss))(layer, x)["router_kernel"][...]
    want = jax.grad(direct_loss)(parameters(layer))["router_kernel"]
    assert np.any(np.abs(want) > 1e-3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_linen():
    x = jnp.asarray(inputs()[0])
    arguments = (HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK)
    layer = bridge.ToLinen(MoE, args=arguments, kwargs={"router": "sigmoid"})
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        out = jax.jit(layer.apply)(variables, x)
        again, aux = layer.apply(variables, x, nnx_method="apply_with_aux")
    assert set(variables["params"]) == {"router_kernel", "w_gate", "w_up", "w_down"}
    params = {name: np.asarray(getattr(p, "value", p)) for name, p in variables["params"].items()}
    want, balance, _, _ = dense(params, x, bias=jnp.zeros(NUM_EXPERTS))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["load_balance_loss"], balance, rtol=1e-5)


def linen_layer(**kwargs):
    options = {"experts": "geglu", "shared_hidden": 4, "fsdp_axis": "data"}
    return bridge.ToLinen(MoE, args=(HIDDEN, FFN_HIDDEN, 8, NUM_TOPK), kwargs=options, **kwargs)


class LinenBlock(nn.Module):
    """A layer as one of several in a scan."""

    @nn.compact
    def __call__(self, x, _):
        return x + linen_layer(name="moe")(x), None


@pytest.mark.long
def test_linen_in_a_scan_of_remat():
    """As a loop over layers that keeps all: outputs, gradients, and where parameters are."""
    kept = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    tower = nn.scan(nn.remat(LinenBlock), in_axes=nn.broadcast, **kept)()
    x = jnp.asarray(inputs()[0])

    def by_scan(variables):
        return jnp.sum(tower.apply(variables, x, None)[0] ** 2)

    def by_loop(variables):
        out: Any = x
        for i in range(3):
            params = jax.tree.map(lambda a, i=i: a[i], nn.unbox(variables)["params"]["moe"])
            out = out + linen_layer().apply({"params": params}, out)
        return jnp.sum(out**2)

    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        variables = jax.jit(tower.init)(jax.random.key(0), x, None)
        loss, grads = jax.jit(jax.value_and_grad(by_scan))(variables)
        want_loss, want = jax.jit(jax.value_and_grad(by_loop))(variables)
        alone = jax.jit(linen_layer().init)(jax.random.key(0), x)
        specs = nn.get_partition_spec(alone)["params"]
    assert specs["w_down"] == P("expert", None, "data")
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for name, grad in nn.unbox(grads)["params"]["moe"].items():
        other = nn.unbox(want)["params"]["moe"][name]
        np.testing.assert_allclose(grad, other, rtol=1e-4, atol=1e-5, err_msg=name)
    down = nn.unbox(grads)["params"]["moe"]["w_down"]
    assert down.sharding.spec == P(None, "expert", None, "data")
