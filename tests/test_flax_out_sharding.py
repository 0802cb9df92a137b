"""What a ``flax.MoE`` takes as ``out_sharding``: logical axes, any mesh later, and its refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import inputs, make_layer, on
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep.flax import MoE


def test_logical_axes_are_looked_up_in_the_rules_of_flax_once():
    rules = (("experts", "expert"), ("embed", ("data", "fsdp")), ("mlp", None))
    told = {"w_gate": ("experts", "embed", "mlp"), "router_kernel": P("embed")}
    with on(AxisType.Explicit, {"data": 2, "fsdp": 2, "expert": 2}):
        with nnx.logical_axis_rules(rules):
            layer = make_layer(out_sharding=told)
        graph, state = nnx.split(layer, nnx.Param)
        x = jnp.asarray(inputs()[0])
        # Without the rules: the layer remembers what they said.
        grads = jax.eval_shape(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(x))), state)
    specs = nnx.get_partition_spec(state)
    for name, spec in {
        "w_gate": P("expert", ("data", "fsdp"), None),
        "router_kernel": P(("data", "fsdp"), None),
    }.items():
        assert specs[name].get_value() == spec
        assert jax.typeof(state[name][...]).sharding.spec == spec
        assert grads[name].get_value().sharding.spec == spec


def test_a_layer_made_without_a_mesh_is_checked_when_it_comes_to_one():
    layer = make_layer(out_sharding={"w_gate": P("expert", None, "data")})
    x = jnp.asarray(inputs()[0])
    want = nnx.jit(MoE.__call__)(layer, x)
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        assert np.allclose(nnx.jit(MoE.__call__)(layer, x), want, rtol=1e-5, atol=1e-6)
    with (
        on(AxisType.Auto, {"expert": 8}),
        pytest.raises(ValueError, match=r"w_gate'\] must name axes of the mesh in context, \('exp"),
    ):
        layer(x)


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "out_sharding must be None or a mapping from .* got P", P("data")),
        (
            TypeError,
            r"out_sharding\['w_up'\] must be a PartitionSpec, or a tuple, of .* got 'expert'",
            {"w_up": "expert"},
        ),
        (
            TypeError,
            r"out_sharding\['w_up'\] must be .* and None; got .*UNCONSTRAINED",
            {"w_up": P(P.UNCONSTRAINED)},
        ),
        (
            ValueError,
            r"out_sharding must name parameters of this layer, \('router_kernel',.*; got 'w_in'",
            {"w_in": P()},
        ),
        (
            ValueError,
            r"out_sharding\['w_up'\] must have at most 3 entries, for the shape \[8, 16, 8\]; got",
            {"w_up": P("expert", None, None, "data")},
        ),
        (
            ValueError,
            r"out_sharding\['w_up'\] must name each axis once; got",
            {"w_up": ("expert", "data", "data")},
        ),
        (
            ValueError,
            (
                r"out_sharding\['w_up'\] must begin each entry as the layer computes, "
                r"P.*\('expert', None, 'tensor'\), and go on with axes that are not in there, or "
                r"leave an entry out: else parts would have to change places at every call; got"
            ),
            {"w_up": P(("data", "expert"))},
        ),
        (ValueError, "would have to change places", {"w_up": P(None, "expert")}),
        (ValueError, "would have to change places", {"w_up": P("expert", "tensor")}),
        (ValueError, "would have to change places", {"w_up": P("data")}),
        (
            ValueError,
            (
                r"out_sharding\['w_up'\] must name axes of the mesh in context, \('data', "
                r"'expert', 'tensor'\), or logical ones .* without \['embed'\]"
            ),
            {"w_up": P("expert", "embed")},
        ),
        (
            ValueError,
            (
                r"out_sharding\['shared_gate_kernel'\] must cut the shape \[16, 1\] into equal "
                r"parts; got .* which cuts 1 over the 2 devices along \('data',\)"
            ),
            {"shared_gate_kernel": P(None, "data")},
        ),
    ],
)
def test_what_it_refuses(error, message, given):
    axes = {"data": 2, "expert": 2, "tensor": 2}
    with on(AxisType.Auto, axes), pytest.raises(error, match=message):
        make_layer(shared_hidden=4, gate_shared=True, tensor_axis="tensor", out_sharding=given)
