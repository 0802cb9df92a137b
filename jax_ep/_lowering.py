"""What carries an exchange, decided where a program is lowered: by its platform and devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_ep import _native, _xla
from jax_ep._axes import Place, devices_by_group
from jax_ep._compat import concrete_mesh, vary_over, varying_axes
from jax_ep._layout import Layout
from jax_ep._ops import Op, result_shapes
from jax_ep._plan import Route
from jax_ep._types import LoweredBinding, Platform

_FFI_PLATFORMS: dict[Platform, str] = {"cpu": "cpu", "gpu": "cuda"}


def register_lowerings(primitive: Any) -> None:
    """Says how an exchange is lowered on every platform."""
    for platform, name in _FFI_PLATFORMS.items():
        rule = functools.partial(_lower, platform)
        mlir.register_lowering(primitive, rule, platform=name)
    mlir.register_lowering(primitive, functools.partial(_lower, None))


def _lower(platform: Platform | None, ctx: Any, *nodes: Any, **params: Any) -> Any:
    layout, binding = params["layout"], params["binding"]
    if binding == "vmap":
        raise ValueError(
            f"axis_name must be mapped around what is compiled: {layout.axis_name!r} of "
            f"{layout.num_ranks} ranks is the axis of a jax.vmap; got a part of it alone."
        )
    devices = None
    # In one process, ranks and groups say it all.
    spans = binding == "mesh" and layout.num_ranks > 1 and jax.process_count() > 1
    if spans and (mesh := concrete_mesh(ctx)):
        devices = devices_by_group(mesh, layout)
    carrier: Callable[..., list[jax.Array]] = _xla.run
    if layout.num_tokens == 0:
        carrier = _carry_nothing
    elif _takes_native(platform, layout, binding, devices):
        assert platform is not None
        details = {"call": params["call"], "platform": platform, "devices": devices}
        carrier = functools.partial(_native.run, **details)
    lowered = mlir.lower_fun(functools.partial(_run, carrier), multiple_results=True)
    return lowered(ctx, *nodes, **params)


def _run(
    carrier: Callable[..., list[jax.Array]],
    *operands: jax.Array,
    op: Op,
    layout: Layout,
    binding: LoweredBinding,
    call: str,
) -> list[jax.Array]:
    del call  # The carrier has it, if it has a use for it.
    where, rest = Place(*operands[: len(Place._fields)]), operands[len(Place._fields) :]
    if op == "plan":
        return carrier(op, layout, binding, where, None, rest)
    num_fields = len(Route._fields)
    return carrier(op, layout, binding, where, Route(*rest[:num_fields]), rest[num_fields:])


def _carry_nothing(
    op: Op,
    layout: Layout,
    binding: LoweredBinding,
    where: Place,
    route: Route | None,
    payloads: tuple[jax.Array, ...],
) -> list[jax.Array]:
    """Returns what an op does where no rank has any tokens: nothing is sent, and sums are empty.

    XLA does not always compile a shard_map in which an empty operand goes to a foreign call.
    """
    del binding, route
    types = result_shapes(op, layout, payloads[0])
    axes = varying_axes(payloads[0])
    return [vary_over(jnp.zeros(where.rank.shape + shape, dtype), axes) for shape, dtype in types]


def _takes_native(
    platform: Platform | None, layout: Layout, binding: LoweredBinding, devices: np.ndarray | None
) -> bool:
    if layout.strict and layout.implementation == "xla":
        return False
    reason = _native.refusal(platform or "another platform", layout, binding)
    if reason is None and binding == "mesh" and layout.num_ranks > 1:
        reason = _native.processes_refusal(devices, warn=not layout.strict)
    if reason is not None and layout.strict:
        raise NotImplementedError(f"implementation='native' cannot serve here: {reason}")
    return reason is None
