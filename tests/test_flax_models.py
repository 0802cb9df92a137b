"""``flax.MoE`` with what architectures differ in: the dense formula, and how it is stored."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import inputs, on
from flax_models import MESHES, MODELS, check_against_dense, make_layer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


@pytest.mark.composes
@pytest.mark.parametrize("model", MODELS)
def test_is_the_dense_formula_forward_and_backward(implementation, model):
    """On a mesh that cuts all there is to cut."""
    kind, axes, options = MESHES["all"]
    with on(kind, axes):
        check_against_dense(make_layer(model, implementation=implementation, **options), model)


@pytest.mark.parametrize("mesh", ["no_mesh", "expert"])
@pytest.mark.parametrize("model", ["llama4", "longcat", "own"])
def test_other_meshes(mesh, model):
    kind, axes, options = MESHES[mesh]
    with on(kind, axes):
        check_against_dense(make_layer(model, **options), model)


@pytest.mark.long
@pytest.mark.parametrize("model", ["gpt_oss", "nemotron"])
@pytest.mark.parametrize("mesh", ["tensor", "fsdp"])
def test_parameters_cut_over_one_axis_more(mesh, model):
    """Each gradient comes back where its parameter is stored."""
    kind, axes, options = MESHES[mesh]
    with on(kind, axes):
        layer = make_layer(model, **options)
        grads = check_against_dense(layer, model)
        for name, grad in grads.items():
            stored = getattr(layer, name)[...].sharding
            assert grad.sharding.is_equivalent_to(stored, grad.ndim), name
            if name.startswith(("w_", "shared_w_")):
                parts = axes["expert"] * 4 if name.startswith("w_") else 4
                assert stored.shard_shape(grad.shape) != grad.shape
                assert np.prod(stored.shard_shape(grad.shape)) * parts == grad.size, name


def test_stored_parts_are_gathered_and_their_gradients_scattered():
    with on(AxisType.Auto, {"data": 4, "expert": 2}):
        layer = make_layer("fused", fsdp_axis="data")
        x = jnp.asarray(inputs()[0])
        graph, state = nnx.split(layer)
        grad = jax.jit(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x))))
        text = grad.lower(state).as_text()
    for op in ("all_gather", "reduce_scatter"):
        assert len(re.findall(f"stablehlo.{op}", text)) == 2, op


def test_names_that_a_rematerialisation_keeps():
    """With them saved a gradient computes experts again, but repeats no exchange."""
    names = ("jax_ep.plan", "jax_ep.rows", "jax_ep.out")
    layer = make_layer("fused")
    graph, state = nnx.split(layer)
    x = jnp.asarray(inputs()[0])

    def count(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def forward(state, x):
            return jnp.sum(nnx.merge(graph, state)(x) ** 2)

        text = str(jax.make_jaxpr(jax.grad(forward))(state, x))
        ops = ("plan", "gather_rows", "reduce_rows", "reduce_scaled", "gather_scaled", "row_dots")
        return {op: len(re.findall(rf"\bop={op}\b", text)) for op in ops}

    plain = count(jax.checkpoint_policies.everything_saveable)
    saved = count(jax.checkpoint_policies.save_only_these_names(*names))
    repeated = count(jax.checkpoint_policies.nothing_saveable)
    assert plain["plan"] == 1
    assert saved == plain
    assert repeated["plan"] == 2
    assert repeated["gather_rows"] > plain["gather_rows"]


def test_stored_over_one_axis_a_layer_is_partitioned_so():
    with on(AxisType.Explicit, {"data": 2, "expert": 2, "tensor": 2}):
        layer = make_layer("fused", tensor_axis="tensor", fsdp_axis="data")
        spec = jax.typeof(layer.w_gate_up[...]).sharding.spec
        assert spec == P("expert", "data", None, "tensor")
        assert jax.typeof(layer.w_down[...]).sharding.spec == P("expert", "tensor", "data")
