"""``MoE`` where its arrays and the mesh in context do not go together, and how to move a layer."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ep.flax import MoE, _placement

HIDDEN = 16
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
WARNING = "runs as one rank.*no mesh.*is on 8 devices.*`with jax.set_mesh"


def make_mesh(axes, kind=AxisType.Auto):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


MESH = {"data": 2, "expert": 4}
OTHERS = {
    "other_sizes": {"data": 4, "expert": 2},
    "one_axis": {"expert": 8},
    "other_order": {"expert": 4, "data": 2},
    "other_name": {"batch": 2, "expert": 4},
}


def make_layer(mesh=None):
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return MoE(HIDDEN, 8, 8, 2, router="sigmoid", rngs=nnx.Rngs(0))


def tokens():
    return jnp.asarray(np.random.default_rng(0).standard_normal((12, HIDDEN)), jnp.float32)


def caller(compiled):
    def call(layer, x):
        return layer(x)

    return nnx.jit(call) if compiled else call


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(_placement, "_num_spread_calls", itertools.count())


@COMPILED
@pytest.mark.parametrize("spread", ["x", "weights"])
def test_warns_once_without_a_mesh(compiled, spread):
    mesh = make_mesh({"expert": 8})
    layer = make_layer(mesh if spread == "weights" else None)
    x = jax.device_put(tokens(), NamedSharding(mesh, P())) if spread == "x" else tokens()
    call = caller(compiled)
    with pytest.warns(RuntimeWarning, match=WARNING):
        out = call(layer, x)
    np.testing.assert_allclose(out, make_layer()(tokens()), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(layer, x)
        caller(compiled)(layer, x)


@COMPILED
def test_warns_behind_other_operations(compiled):
    mesh = make_mesh({"expert": 4, "data": 2})
    x = jax.device_put(tokens(), NamedSharding(mesh, P("expert")))
    layer = make_layer()

    def model(layer, x):
        return layer(jnp.tanh(x.reshape(3, 4, HIDDEN)) + 1)

    with pytest.warns(RuntimeWarning, match=WARNING):
        (nnx.jit(model) if compiled else model)(layer, x)


@COMPILED
def test_does_not_warn_on_one_device(compiled):
    one = Mesh(np.array(jax.devices()[3:4]), ("expert",))
    for x in (
        tokens(),
        np.asarray(tokens()),
        jax.device_put(tokens(), jax.devices()[0]),
        jax.device_put(tokens(), NamedSharding(one, P("expert"))),
    ):
        layer = make_layer()
        if isinstance(x, jax.Array) and x.committed:
            nnx.update(layer, jax.device_put(nnx.state(layer), x.sharding))
        caller(compiled)(layer, x)


@COMPILED
@pytest.mark.parametrize(
    ("spread", "spec"),
    [("x", P("expert")), ("x", P()), ("router_kernel", P())],
    ids=["x", "x_replicated", "weights"],
)
def test_explicit_axes_need_the_mesh(compiled, spread, spec):
    mesh = make_mesh({"expert": 4, "data": 2}, AxisType.Explicit)
    layer = make_layer(None if spread == "x" else mesh)
    x = jax.device_put(tokens(), NamedSharding(mesh, spec)) if spread == "x" else tokens()
    with pytest.raises(ValueError, match=f"`with jax.set_mesh.*got {spread} on Explicit axes"):
        caller(compiled)(layer, x)


@COMPILED
@KINDS
@pytest.mark.parametrize("axes", OTHERS.values(), ids=OTHERS)
def test_weights_of_another_mesh_are_refused(axes, kind, compiled):
    layer = make_layer(make_mesh(MESH, kind))
    given = r"got router_kernel on the mesh \{'data': 2, 'expert': 4\} of"
    with (
        jax.set_mesh(make_mesh(axes, kind)),
        pytest.raises(ValueError, match=f"must be on the mesh in context.*device_put.*{given}"),
    ):
        caller(compiled)(layer, tokens())


def test_weights_of_explicit_axes_are_refused_under_auto_ones():
    layer = make_layer(make_mesh(MESH, AxisType.Explicit))
    with (
        jax.set_mesh(make_mesh(MESH)),
        pytest.raises(ValueError, match="of Auto axes.*got router_kernel.*of Explicit axes"),
    ):
        layer(tokens())


def loss_and_gradients(layer, x):
    return nnx.value_and_grad(lambda layer, x: jnp.sum(layer(x) ** 2), argnums=(0, 1))(layer, x)


@pytest.fixture(scope="module")
def expected():
    """What a layer gives that never saw a mesh."""
    return nnx.jit(loss_and_gradients)(make_layer(), tokens())


def assert_right(layer, want):
    got = nnx.jit(loss_and_gradients)(layer, tokens())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "kinds"),
    [
        (OTHERS["other_sizes"], (AxisType.Auto, AxisType.Auto)),
        (OTHERS["other_order"], (AxisType.Explicit, AxisType.Explicit)),
        (OTHERS["one_axis"], (AxisType.Auto, AxisType.Explicit)),
        (MESH, (AxisType.Explicit, AxisType.Auto)),
    ],
    ids=["other_sizes", "other_order", "one_axis_explicit", "to_auto"],
)
def test_a_layer_moves_to_another_mesh(axes, kinds, expected):
    layer = make_layer(make_mesh(MESH, kinds[0]))
    mesh = make_mesh(axes, kinds[1])
    graphdef, state = nnx.split(layer)
    state = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    layer = nnx.merge(graphdef, state)
    assert layer.w_gate[...].sharding.is_equivalent_to(NamedSharding(mesh, P("expert")), 3)
    with jax.set_mesh(mesh):
        assert_right(layer, expected)


def test_weights_of_auto_axes_serve_under_explicit_ones(expected):
    layer = make_layer(make_mesh(MESH))
    with jax.set_mesh(make_mesh(MESH, AxisType.Explicit)):
        assert_right(layer, expected)


@KINDS
def test_weights_made_without_a_mesh_serve_under_any(kind, expected):
    layer = make_layer()
    with jax.set_mesh(make_mesh(MESH, kind)):
        assert_right(layer, expected)


@KINDS
def test_tokens_of_another_mesh_are_brought_over(kind):
    """Activations may come from a part of the model with another mesh of the same devices."""
    elsewhere = make_mesh({"rows": 4, "columns": 2})
    x = jax.device_put(tokens(), NamedSharding(elsewhere, P("rows", "columns")))
    want = make_layer()(tokens())
    with jax.set_mesh(mesh := make_mesh(MESH, kind)):
        out = nnx.jit(lambda layer, x: layer(x))(make_layer(mesh), x)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
