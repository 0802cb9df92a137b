"""Where a ``flax.MoE`` is told to store its parameters: the same numbers, gradients in place."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import FFN_HIDDEN, HIDDEN, NUM_EXPERTS, NUM_TOPK, inputs, on
from implementations import require
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ep import grouped_matmul
from jax_ep.flax import MoE
from jax_ep.routing import Router

# A parameter of each kind.
EVERYTHING = {
    "router": Router(has_logit_bias=True),
    "experts": "clamped_swiglu",
    "latent_hidden": 8,
    "shared_hidden": 8,
    "gate_shared": True,
}
STORED = {
    "one_axis": (
        {"expert": 8},
        {},
        {
            "router_kernel": P("expert"),
            "w_gate": P(),
            "latent_in": P("expert"),
            "shared_w_up": P(None, "expert"),
            "shared_b_down": P("expert"),
        },
    ),
    "experts_over_both": (
        {"data": 2, "expert": 4},
        {"fsdp_axis": "data"},
        {
            "router_kernel": P("data"),
            "router_logit_bias": P(("expert", "data")),
            "w_gate": P(("expert", "data")),
            "w_up": P("expert", None, "data"),
            "b_up": P(("expert", "data")),
            "shared_w_down": P(),
            "latent_out": P("data", "expert"),
        },
    ),
    "tensor": (
        {"data": 2, "expert": 2, "tensor": 2},
        {"tensor_axis": "tensor"},
        {
            "router_kernel": P("expert", ("data", "tensor")),
            "router_logit_bias": P(("tensor", "data")),
            "w_gate": P("expert", None, ("tensor", "data")),
            "w_up": P("expert", "data"),
            "w_down": P(("expert", "data"), "tensor"),
            "b_down": P("expert", ("data", "tensor")),
            "b_up": P(None, "tensor"),
            "shared_w_gate": P(),
            "shared_w_down": P("tensor", ("data", "expert")),
            "shared_b_down": P(("tensor", "expert", "data")),
            "shared_gate_kernel": P("tensor"),
            "latent_in": P("tensor", "data"),
        },
    ),
}


def waves(key, shape, dtype):
    return np.cos(np.arange(np.prod(shape), dtype=dtype)).reshape(shape)


# They would begin as zero, which any use of them would leave alone.
BIASES = [
    "router_logit_bias",
    *(f"{whose}b_{name}" for whose in ("", "shared_") for name in ("gate", "up", "down")),
]


def make_layer(**options):
    drawn = dict.fromkeys(BIASES, waves)
    return flax_layers.make_layer(**(EVERYTHING | {"kernel_init": drawn} | options))


def loss(layer, x):
    out, aux = layer.apply_with_aux(x)
    return jnp.sum(out**2) + aux["load_balance_loss"] + aux["router_z_loss"], out


@functools.cache
def expected():
    """The same layer that knows of no mesh."""
    both = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return both(make_layer(), jnp.asarray(inputs()[0]))


def differ(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max() / np.abs(want).max()


ALIKE = 1e-6


@pytest.mark.parametrize(
    ("case", "kind", "implementation"),
    [
        ("one_axis", AxisType.Auto, "native"),
        ("experts_over_both", AxisType.Auto, "xla"),
        ("tensor", AxisType.Explicit, "native"),
    ],
)
def test_numbers_are_those_without_a_mesh_and_gradients_lie_as_told(case, kind, implementation):
    require(implementation)
    axes, options, told = STORED[case]
    x = jnp.asarray(inputs()[0])
    (want_loss, want_out), (want_grads, want_dx) = expected()
    with on(kind, axes):
        layer = make_layer(**options, out_sharding=told, implementation=implementation)
        graph, state = nnx.split(layer)
        both = jax.value_and_grad(lambda s, x: loss(nnx.merge(graph, s), x), (0, 1), has_aux=True)
        (got_loss, got_out), (got_grads, got_dx) = jax.jit(both)(state, x)
    for got, want in ((got_loss, want_loss), (got_out, want_out), (got_dx, want_dx)):
        assert differ(got, want) < ALIKE
    for name, want in want_grads.items():
        stored, grad = state[name][...], got_grads[name][...]
        assert differ(grad, want[...]) < ALIKE, name
        assert grad.sharding.is_equivalent_to(stored.sharding, grad.ndim), name
        if name in told:
            wanted = NamedSharding(grad.sharding.mesh, told[name])
            assert stored.sharding.is_equivalent_to(wanted, stored.ndim), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_what_is_gathered_is_scattered_and_no_part_changes_places(kind):
    """Also once XLA has had its way: of all-to-alls there are those that carry tokens, if any."""
    require("native")
    axes, options, _ = STORED["experts_over_both"]
    told = {"router_kernel": P("data"), "w_gate": P(("expert", "data")), "w_up": P()}
    plain = {"experts": "swiglu", "shared_hidden": None, "gate_shared": False, "kernel_init": None}
    with on(kind, axes):
        layer = make_layer(**(options | plain), out_sharding=told, implementation="native")
        graph, state = nnx.split(layer)
        x = jnp.asarray(inputs()[0])
        grad = jax.jit(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x))))
        lowered = grad.lower(state)
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    # The router's, those of w_gate, and of w_down by fsdp_axis.
    for op in ("all_gather", "reduce_scatter"):
        assert len(re.findall(f"stablehlo.{op}", text)) == 3, op
    assert len(re.findall(r" reduce-scatter\(", compiled)) == 3
    assert not re.findall(r" (all-to-all|collective-permute)\(", compiled)


META = {nnx.PARTITION_NAME: None}


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=META)
@nnx.remat
def apply_all(layer, x):
    return x + layer(x)


def test_layers_in_a_scan_of_remat():
    def make(**options):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata=META)
        def of(rngs):
            return MoE(HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK, rngs=rngs, **options)

        return of(nnx.Rngs(0))

    both = nnx.jit(nnx.value_and_grad(lambda layers, x: jnp.sum(apply_all(layers, x) ** 2)))
    x = jnp.asarray(inputs()[0])
    want_loss, want_grads = both(make(), x)
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layers = make(fsdp_axis="data", out_sharding={"w_gate": P(("expert", "data"))})
        got_loss, got_grads = both(layers, x)
    assert differ(got_loss, want_loss) < ALIKE
    for name, want in want_grads.items():
        assert differ(got_grads[name][...], want[...]) < ALIKE, name
    assert got_grads["w_gate"][...].sharding.spec == P(None, ("expert", "data"))
    assert got_grads["w_up"][...].sharding.spec == P(None, "expert", "data")


@dataclasses.dataclass(frozen=True)
class Square:
    """A network that the layer could store by either of its axes."""

    @property
    def dims(self):
        return {"w": ("hidden", "hidden")}

    def __call__(self, rows, group_sizes, w):
        return grouped_matmul(rows, w, group_sizes)


def test_of_two_axes_of_one_width_the_first_is_stored_in_parts():
    """It named the mesh axis twice in one spec, which JAX refuses."""
    with on(AxisType.Auto, {"data": 2, "expert": 4}):
        layer = MoE(HIDDEN, 8, 8, 2, experts=Square(), fsdp_axis="data", rngs=nnx.Rngs(0))
    assert nnx.state(layer)["w"][...].sharding.spec == P("expert", "data", None)
