"""What carries an exchange, decided where a program is lowered: by its platform and devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from jax_ep import _native, _xla
from jax_ep._axes import Place, devices_by_group
from jax_ep._compat import concrete_mesh
from jax_ep._layout import Layout
from jax_ep._ops import Op
from jax_ep._plan import Route
from jax_ep._types import LoweredBinding, Platform

_FFI_PLATFORMS: dict[Platform, str] = {"cpu": "cpu", "gpu": "cuda"}


def register_lowerings(primitive: Any) -> None:
    """Says how an exchange is lowered on every platform."""
    for platform, name in _FFI_PLATFORMS.items():
        rule = functools.partial(_lower, platform)
        mlir.register_lowering(primitive, rule, platform=name, cacheable=False)
    mlir.register_lowering(primitive, functools.partial(_lower, None), cacheable=False)


def _lower(platform: Platform | None, ctx: Any, *nodes: Any, **params: Any) -> Any:
    layout, binding = params["layout"], params["binding"]
    if binding == "vmap":
        raise ValueError(
            f"axis_name must be mapped around what is compiled: {layout.axis_name!r} of "
            f"{layout.num_ranks} ranks is the axis of a jax.vmap; got a part of it alone."
        )
    devices = None
    if binding == "mesh" and layout.num_ranks > 1 and (mesh := concrete_mesh(ctx)):
        devices = devices_by_group(mesh, layout)
    carrier: Callable[..., list[jax.Array]] = _xla.run
    if platform is not None and _takes_native(platform, layout, binding, devices):
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


def _takes_native(
    platform: Platform, layout: Layout, binding: LoweredBinding, devices: np.ndarray | None
) -> bool:
    if layout.strict and layout.implementation == "xla":
        return False
    reason = _native.refusal(platform, layout, binding)
    if reason is None and binding == "mesh" and layout.num_ranks > 1:
        reason = _native.processes_refusal(devices, warn=not layout.strict)
    if reason is not None and layout.strict:
        raise NotImplementedError(f"implementation='native' cannot serve here: {reason}")
    return reason is None
