"""Whether arrays lie where the layer is going to run, as far as JAX shows it ahead of time."""

import itertools
import warnings

import jax
from jax.sharding import AbstractMesh, AxisType

from jax_ep.flax._parameters import Weights

# To warn once, whatever others do to Python's filters.
_num_spread_calls = itertools.count()


def check_placement(mesh: AbstractMesh, weights: Weights, x: jax.Array) -> None:
    """Compares the meshes of arrays with the one in context.

    Raises:
      ValueError: the weights are on another mesh than the one in context, or there is none and an
        array is on a mesh of Explicit axes.
    """
    if mesh.empty:
        _check_without_mesh({"x": x, **weights})
        return
    for name, weight in weights.items():
        own = jax.typeof(weight).sharding.mesh
        # Where the axes are Auto, JAX cannot make gradients of Explicit arrays.
        was_explicit = AxisType.Explicit in own.axis_types
        untyped = was_explicit and AxisType.Explicit not in mesh.axis_types
        if own.size > 1 and (own.shape != mesh.shape or untyped):
            # XLA would move all experts at every call; some versions end the process over it.
            raise ValueError(
                f"MoE's weights must be on the mesh in context, {_say(mesh)}: move the state there "
                "once, by jax.device_put(state, nnx.get_named_sharding(state, mesh)); got "
                f"{name} on the mesh {_say(own)}."
            )


def _check_without_mesh(arrays: dict[str, jax.Array]) -> None:
    shardings = {name: jax.typeof(array).sharding for name, array in arrays.items()}
    for name, sharding in shardings.items():
        if AxisType.Explicit in sharding.mesh.axis_types and sharding.mesh.size > 1:
            raise ValueError(
                "MoE must be called with the mesh of its arguments in context, by `with "
                f"jax.set_mesh(mesh):`; got {name} on Explicit axes, as {sharding.spec}, and none."
            )
    for name, sharding in shardings.items():
        if sharding.mesh.size > 1 and next(_num_spread_calls) == 0:
            warnings.warn(
                f"MoE runs as one rank, as no mesh is in context, but {name} is on "
                f"{sharding.mesh.size} devices: each of them does the work of all. To run a rank "
                "on each, put calls, or the jit around them, into `with jax.set_mesh(mesh):`.",
                RuntimeWarning,
                stacklevel=6,
            )


def _say(mesh: AbstractMesh) -> str:
    kinds = {kind.name for kind in mesh.axis_types}
    return f"{dict(mesh.shape)} of {' and '.join(sorted(kinds))} axes"
