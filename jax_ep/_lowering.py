"""What carries an exchange, decided where a program is lowered: by its platform and devices."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jax_ep import _fabrics, _foreign, _rounds, _xla
from jax_ep._axes import devices_by_group
from jax_ep._call import Call, Operands
from jax_ep._compat import concrete_mesh, lowered_scopes, vary_over, varying_axes
from jax_ep._layout import Layout
from jax_ep._library import native_platform, warn_once
from jax_ep._ops import Op
from jax_ep._packed import Packed
from jax_ep._processes import Refusal
from jax_ep._types import LoweredBinding, Platform

FFI_PLATFORMS: dict[Platform, str] = {"cpu": "cpu", "gpu": "cuda"}
"""What lowerings for a platform are registered as."""

_OURS = "jax_ep."
_JAXS = ("checkpoint", "rematted_computation", "shard_map")

Carrier: TypeAlias = Callable[[Call, Operands], list[jax.Array]]


def register_lowerings(primitive: Any, unnamed: Any) -> None:
    """Says how an exchange is lowered on every platform.

    JAX lowers equal exchanges of a program once, and would tell all of them one layer's name. So
    each is lowered by itself, and those in which nobody is told as the other primitive: of these
    there may be much to lower.
    """
    for platform, name in [*FFI_PLATFORMS.items(), (None, None)]:
        rule = functools.partial(_lower, platform, unnamed)
        mlir.register_lowering(primitive, rule, platform=name, cacheable=False)
        rule = functools.partial(_lower, platform, None)
        mlir.register_lowering(unnamed, rule, platform=name)


def _lower(
    platform: Platform | None,
    unnamed: Any | None,
    ctx: Any,
    *nodes: Any,
    op: Op,
    layout: Layout,
    binding: LoweredBinding,
    call: str,
) -> Any:
    told = Call(op, layout, binding, call, native_platform(platform), scope=_scope(ctx))
    if told.binding == "vmap":
        raise ValueError(
            f"axis_name must be mapped around what is compiled: {layout.axis_name!r} of "
            f"{layout.num_ranks} ranks is the axis of a jax.vmap; got a part of it alone."
        )
    told, carrier = _choose(told, concrete_mesh(ctx))
    if unnamed is not None and not _is_told_names(carrier):
        params = {"op": op, "layout": layout, "binding": binding, "call": call}
        bind = functools.partial(unnamed.bind, **params)
        return mlir.lower_fun(bind, multiple_results=True)(ctx, *nodes)

    def run(*operands: jax.Array) -> list[jax.Array]:
        return carrier(told, Operands.of(op, operands))

    return mlir.lower_fun(run, multiple_results=True)(ctx, *nodes)


def _is_told_names(carrier: Carrier) -> bool:
    return isinstance(carrier, functools.partial) and carrier.func is _foreign.run


def _scope(ctx: Any) -> str:
    """Returns the names that users gave to what is around a call of ours, as a path.

    Not what JAX calls a part of its own: in a step and where it is computed again, in a gradient
    and forward, a layer has one name.
    """
    names = itertools.takewhile(lambda name: not name.startswith(_OURS), lowered_scopes(ctx))
    return "/".join(name for name in names if name not in _JAXS and not name.startswith("jit("))


def _choose(call: Call, mesh: Any | None) -> tuple[Call, Carrier]:
    """Returns what carries an exchange, and the call with all that is known of its devices."""
    layout = call.layout
    if layout.num_tokens == 0:
        return call, _carry_nothing
    if layout.strict and layout.implementation == "xla":
        return call, _xla.run
    # In one process, ranks and groups say it all.
    if call.spans_devices and jax.process_count() > 1:
        devices = None if mesh is None else devices_by_group(mesh, layout)
        call = dataclasses.replace(call, devices=devices, is_placed=mesh is not None)
    chosen = _fabrics.choose(call, join=True)
    if not isinstance(chosen, Refusal):
        return call, functools.partial(chosen.carry, chosen)
    if layout.strict:
        raise NotImplementedError(f"implementation='native' cannot serve here: {chosen.reason}")
    if not chosen.is_expected:
        warn_once(chosen.reason)
    if call.platform is None and call.spans_devices:
        return call, _carry_packed
    return call, _xla.run


def _carry_packed(call: Call, operands: Operands) -> list[jax.Array]:
    """Has XLA's collectives carry what JAX packs, where there is no native code for the devices.

    ``_xla`` specifies the exchange, but brings all ranks' tokens to each.
    """
    return _rounds.run(Packed(), call, operands, None)


def _carry_nothing(call: Call, operands: Operands) -> list[jax.Array]:
    """Returns what an op does where no rank has any tokens: nothing is sent, and sums are empty.

    XLA does not always compile a shard_map in which an empty operand goes to a foreign call.
    """
    stack, payloads = operands.where.rank.shape, operands.payloads
    axes = varying_axes(payloads[0])
    types = call.op.result_types(call.layout, payloads)
    return [vary_over(jnp.zeros(stack + shape, dtype), axes) for shape, dtype in types]
