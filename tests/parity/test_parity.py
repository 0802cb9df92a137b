"""``MoE`` beside transformers' own expert blocks, whose results ``record`` has written down."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import require
from jax.sharding import AxisType

from jax_ep.integrations.transformers import from_transformers, layer_options, to_transformers

pytest.importorskip("flax")
from flax import nnx
from flax_layers import on

from jax_ep.flax import MoE, RouterBias

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
EVERY_CASE = pytest.mark.parametrize("name", NAMES)
# Two cases may be of one family.
MODEL_TYPES = {"deepseek_v3_as_scored": "deepseek_v3"}

EXACT = 1e-6
"""The largest error by the largest value, in float32."""

MESHES = {
    "data_expert": {"data": 2, "expert": 4},
    "expert": {"expert": 8},
    "tensor": {"data": 2, "expert": 2, "tensor": 2},
}
# Each family on one mesh: those with biases, a shared expert or a latent width where their width is
# cut, as that is where each adds up differently; and some with one expert on each device.
ELSEWHERE = {
    "gpt_oss": "tensor",
    "nemotron_h": "tensor",
    "qwen3_next": "tensor",
    "granitemoe": "expert",
    "longcat_flash": "expert",
}
# What each family but these has, one of these has too.
VARIED = {"deepseek_v3", "deepseek_v4", "llama4_text", *ELSEWHERE}
PROGRAMS = [
    pytest.param(
        name,
        ELSEWHERE.get(name, "data_expert"),
        "native",
        marks=() if name in VARIED else pytest.mark.long,
    )
    for name in NAMES
] + [("llama4_text", "expert", "xla")]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one file says: ``weights`` and ``gradients`` under the block's names."""

    model_type: str
    config: dict[str, object]
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    topk_idx: np.ndarray | None


@functools.cache
def recorded(name: str) -> Case:
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    weights, gradients = (below(arrays, prefix) for prefix in ("weight/", "gradient/"))
    table = weights.pop("gate.tid2eid", None)
    return Case(
        model_type=MODEL_TYPES.get(name, name),
        config=json.loads(str(arrays["config"])),
        weights=weights,
        gradients=gradients,
        arrays=arrays,
        topk_idx=None if table is None else table[arrays["ids"]].astype(np.int32),
    )


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    named = (name for name in arrays if name.startswith(prefix))
    return {name.removeprefix(prefix): arrays[name] for name in named}


def make_layer(case: Case, **options) -> MoE:
    """Makes the layer that a block is, with the block's weights."""
    options = layer_options(case.model_type, case.config) | options
    layer = MoE(**options, kernel_init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0))
    weights = from_transformers(case.model_type, case.weights)
    state = nnx.state(layer, (nnx.Param, RouterBias))
    assert set(weights) == set(state)
    for key, array in weights.items():
        old = state[key][...]
        assert old.shape == array.shape, key
        state[key][...] = jax.device_put(jnp.asarray(array, old.dtype), old.sharding)
    nnx.update(layer, state)
    return layer


def output(layer: MoE, x: jax.Array, topk_idx: np.ndarray | None) -> jax.Array:
    return layer(x) if topk_idx is None else layer(x, topk_idx=jnp.asarray(topk_idx))


@nnx.jit
def output_and_gradients(layer, x, dout, topk_idx):
    def loss(layer, x):
        out = output(layer, x, topk_idx)
        return jnp.vdot(out, dout), out

    both = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), (dlayer, dx) = both(layer, x)
    return out, dx, dlayer


def arrays_of(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(value[...]) for name, value in state.items()}


def untrained(layer: MoE) -> dict[str, np.ndarray]:
    """What has no gradient, but a place among the arrays that are converted."""
    return arrays_of(nnx.state(layer, RouterBias))


def close(what: str, got: jax.Array | np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Compares the largest error with the largest value."""
    got = np.asarray(got, np.float32)
    assert got.shape == want.shape, what
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    assert error <= tolerance, f"{what} is off by {error:.1e} of its largest value"


@pytest.mark.composes
@pytest.mark.parametrize(("name", "mesh", "implementation"), PROGRAMS)
def test_outputs_and_gradients(name, mesh, implementation):
    require(implementation)
    case, axes = recorded(name), MESHES[mesh]
    x, dout = (jnp.asarray(case.arrays[key]) for key in ("x", "dout"))
    with on(AxisType.Auto, axes):
        options = {"tensor_axis": "tensor"} if "tensor" in axes else {}
        layer = make_layer(case, implementation=implementation, **options)
        out, dx, dlayer = output_and_gradients(layer, x, dout, case.topk_idx)
    close("out", out, case.arrays["out"], EXACT)
    close("dx", dx, case.arrays["dx"], EXACT)
    got = to_transformers(case.model_type, untrained(layer) | arrays_of(dlayer))
    assert case.gradients
    for key, want in case.gradients.items():
        close(key, got[key], want, EXACT)


@EVERY_CASE
@pytest.mark.composes
@pytest.mark.parametrize("implementation", ["xla"])
def test_bfloat16(name, implementation):
    """Both compute in bfloat16, and round at places of their own: to 8 bits, a few times each."""
    case = recorded(name)
    layer = make_layer(case, dtype=jnp.bfloat16, implementation=implementation)
    out = output(layer, jnp.asarray(case.arrays["x"], jnp.bfloat16), case.topk_idx)
    assert out.dtype == jnp.bfloat16
    close("out", out, case.arrays["out_bfloat16"], 2**-6)


@EVERY_CASE
def test_weights_come_back(name):
    case = recorded(name)
    there = from_transformers(case.model_type, case.weights)
    back = to_transformers(case.model_type, there)
    assert set(back) == set(case.weights)
    for key, array in case.weights.items():
        want = array.copy()
        if name == "longcat_flash" and key == "experts.gate_up_proj":
            want[case.config["n_routed_experts"] :] = 0  # No token ever meets them.
        np.testing.assert_array_equal(back[key], want, err_msg=key)
        assert back[key].dtype == array.dtype
