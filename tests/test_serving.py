"""A Flax layer, compiled in one process and run in another, which traces nothing of ours."""

from __future__ import annotations

import importlib.util
import pathlib
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from elsewhere import run_elsewhere
from flax import nnx
from implementations import require
from jax.experimental import serialize_executable

import jax_ep.flax
from jax_ep._ops import OPS

pytestmark = pytest.mark.long

LOAD = """
    import pathlib, pickle, sys
    import jax, jax.export
    import numpy as np
    from jax.experimental import serialize_executable
    import jax_ep

    jax_ep.register()
    assert "flax" not in sys.modules
    folder = pathlib.Path(sys.argv[1])
    args = pickle.loads((folder / "args").read_bytes())
    stored = pickle.loads((folder / "executable").read_bytes())
    executable = serialize_executable.deserialize_and_load(*stored)
    placed = jax.tree.map(jax.device_put, args, tuple(executable.input_shardings[0]))
    program = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
    out = {"executable": executable(*placed), "program": jax.jit(program.call)(*placed)}
    assert all(len(array.devices()) == 8 for array in out.values())
    np.savez(folder / "out.npz", **out)
"""


def store(folder: pathlib.Path) -> np.ndarray:
    """Writes a layer as an exported program and as an executable; returns what it computes."""
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (8, 3, 16))
    with jax.set_mesh(mesh):
        moe = jax_ep.flax.MoE(16, 24, 16, 2, implementation="native", rngs=nnx.Rngs(0))
        graph, state = nnx.split(moe)
        args = nnx.to_pure_dict(state), x
        layer = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
        names = [f"jax_ep_{op}_devices" for op in OPS]
        allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
        exported = jax.export.export(layer, disabled_checks=allowed)(*args)
        compiled = layer.lower(*args).compile()
        (folder / "program").write_bytes(exported.serialize())
        stored = serialize_executable.serialize(compiled)
        (folder / "executable").write_bytes(pickle.dumps(stored))
        (folder / "args").write_bytes(pickle.dumps(jax.device_get(args)))
        return np.asarray(compiled(*args))


def test_a_layer_runs_where_it_was_not_compiled(tmp_path: pathlib.Path) -> None:
    require("native")
    if importlib.util.find_spec("flatbuffers") is None:
        pytest.skip("jax.export serializes with the package flatbuffers, which is not installed")
    want = store(tmp_path)
    assert np.all(np.any(want != 0, axis=-1))
    run_elsewhere(LOAD, tmp_path)
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(out["executable"], want)
    np.testing.assert_array_equal(out["program"], want)


def test_its_number_of_tokens_is_no_symbol() -> None:
    [tokens] = jax.export.symbolic_shape("t")
    moe = jax_ep.flax.MoE(16, 24, 16, 2, rngs=nnx.Rngs(0))
    message = r"x must have shape \[..., hidden\] of known sizes; got \[t, 16\], .* symbols of jax"
    with pytest.raises(ValueError, match=message):
        jax.export.export(jax.jit(moe))(jax.ShapeDtypeStruct((tokens, 16), jnp.float32))
