"""The expert layer of ``layers`` on a mesh: operands and results are global arrays.

All of it runs with ``check_vma`` on, so that a result that claims to be equal along an axis without
being so does not get past JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from implementations import devices
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import Problem, layer, whole

import jax_ep

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both_axis_types = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=lambda t: t.name)


def make_mesh(axis_type: AxisType, **sizes: int) -> Mesh:
    num_devices = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
        devices=devices()[:num_devices],
    )


def layer_on(implementation: str, axis_name: Any = "expert") -> Callable[..., jax.Array]:
    make_plan = functools.partial(
        jax_ep.make_plan, axis_name=axis_name, implementation=implementation
    )
    return functools.partial(layer, make_plan)


def put(a: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Lays an array out, in each process its part: several would compare theirs, NaN with NaN."""
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda at: a[at])


def run(mesh: Mesh, f: Callable, specs: tuple[P, ...], out_spec: P, args: tuple, dout: np.ndarray):
    """Returns ``f(*args)`` over ``mesh`` and its gradients in all but ``topk_idx``.

    Everything is global and laid out as its spec says; ``dout`` is laid out like the result.
    """
    args = [put(a, mesh, spec) for a, spec in zip(args, specs, strict=True)]
    dout = put(dout, mesh, out_spec)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=True)

    @jax.jit
    def program(x, topk_idx, weights, scale, dout):
        out, pull = jax.vjp(lambda x, w, s: sharded(x, topk_idx, w, s), x, weights, scale)
        return out, pull(dout)

    return jax.tree.map(whole, program(*args, dout))


def flat(a: np.ndarray) -> np.ndarray:
    """Joins the axis of ranks with the one behind it, as a global array has them."""
    return a.reshape(-1, *a.shape[2:])


def flat_args(problem: Problem) -> tuple[np.ndarray, ...]:
    return tuple(flat(a) for a in problem.args)


def flat_answers(problem: Problem):
    return jax.tree.map(lambda a: flat(np.asarray(a)), problem.expect())
