"""The exchange as a JAX primitive: how it is typed, batched and differentiated.

``exchange`` binds one rank's part of an op. Its rules know which axis is which: a ``vmap`` along
the axis of the exchange brings all ranks together; one along another is a loop of independent
exchanges. What carries an exchange is decided where it is lowered, in ``_lowering``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jax_ep._axes import Place
from jax_ep._compat import (
    Primitive,
    debug_nans,
    result_type,
    run_primitive,
    vary_together,
    zero_tangent,
)
from jax_ep._layout import Layout
from jax_ep._lowering import register_lowerings
from jax_ep._ops import Op, result_shapes, transposed
from jax_ep._plan import PlanArrays, Route
from jax_ep._types import Binding

# Before the payloads come the place and, but for the plan itself, the route.
_NUM_FIXED = len(Place._fields) + len(Route._fields)


def exchange_plan(
    layout: Layout, binding: Binding, where: Place, topk_idx: jax.Array
) -> PlanArrays:
    """Computes this rank's plan, together with its peers."""
    results = _bind(*where, topk_idx, op="plan", layout=layout, binding=binding, call="make_plan")
    return PlanArrays(*results)


def exchange(
    op: Op,
    layout: Layout,
    binding: Binding,
    call: str,
    where: Place,
    route: Route,
    *payloads: jax.Array,
) -> jax.Array:
    """Runs an op for one rank, together with its peers.

    Args:
      op: which one.
      layout: static geometry of the plan.
      binding: how the axis is bound.
      call: the public function that wants it, for errors.
      where: which rank this is.
      route: the plan's arrays.
      *payloads: one or two arrays; the result is linear in each.

    Returns:
      What the op returns for this rank.
    """
    [out] = _bind(*where, *route, *payloads, op=op, layout=layout, binding=binding, call=call)
    return out


def _bind(*operands: jax.Array, layout: Layout, **params: Any) -> list[jax.Array]:
    # Results vary over the mesh as what is exchanged does, wherever that is done.
    num_places = len(Place._fields)
    varying = vary_together(operands[num_places:])
    return _exchange_p.bind(*operands[:num_places], *varying, layout=_readable(layout), **params)


def _readable(layout: Layout) -> Layout:
    # What nobody wrote may look like a NaN, and would be reported as ours.
    return dataclasses.replace(layout, tail="zero") if debug_nans() else layout


def _payload_index(op: Op) -> int:
    return len(Place._fields) if op == "plan" else _NUM_FIXED


def _impl(*operands: Any, layout: Layout, **params: Any) -> list[jax.Array]:
    return run_primitive(_exchange_p, *operands, layout=_readable(layout), **params)


def _abstract_eval(*operands: Any, op: Op, layout: Layout, **_: Any) -> list[Any]:
    payload, stack = operands[_payload_index(op)], operands[0].shape
    return [
        result_type(stack + shape, dtype, payload)
        for shape, dtype in result_shapes(op, layout, payload)
    ]


def _batch(
    axis: Any,
    operands: list[Any],
    dims: list[int | None],
    *,
    binding: str,
    layout: Layout,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    params |= {"layout": layout, "binding": binding}
    is_expert_axis = axis.name is not None and axis.name in layout.axis_names
    if is_expert_axis and binding == "mesh":
        raise ValueError(
            f"axis_name must be bound once: {axis.name!r} is a mesh axis, and an enclosing "
            "jax.vmap has the same axis_name."
        )
    if all(dim is None for dim in dims):
        out = _exchange_p.bind(*operands, **params)
        return out, [None] * len(out)
    operands = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(operands, dims, strict=True)
    ]
    if is_expert_axis and binding == "vmap":
        whole = [
            jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else x
            for x, dim in zip(operands, dims, strict=True)
        ]
        out = _exchange_p.bind(*whole, **params | {"binding": "stacked"})
    else:
        out = _one_by_one(operands, dims, params)
    return out, [0] * len(out)


def _one_by_one(
    operands: list[Any], dims: list[int | None], params: dict[str, Any]
) -> list[jax.Array]:
    """Runs independent exchanges in turn, the same order on all ranks."""
    mapped = [x for x, dim in zip(operands, dims, strict=True) if dim is not None]

    def body(mapped: list[jax.Array]) -> list[jax.Array]:
        rest = iter(mapped)
        merged = [x if dim is None else next(rest) for x, dim in zip(operands, dims, strict=True)]
        return _exchange_p.bind(*merged, **params)

    return jax.lax.map(body, mapped)


def _jvp(
    primals: list[Any], tangents: list[Any], *, op: Op, call: str, **params: Any
) -> tuple[list[jax.Array], list[Any]]:
    bind = functools.partial(_exchange_p.bind, op=op, **params)
    out = bind(*primals, call=call)
    payloads = range(_payload_index(op), len(primals))
    terms = []
    for i in payloads:
        if not isinstance(tangents[i], ad.Zero):
            operands = [*primals[:i], tangents[i], *primals[i + 1 :]]
            terms += bind(*operands, call=_derived(call, "derivative"))
    if not terms:
        return out, [zero_tangent(x) for x in out]
    return out, [functools.reduce(ad.add_jaxvals, terms)]


def _transpose(
    cotangents: list[Any], *operands: Any, op: Op, layout: Layout, binding: str, call: str
) -> list[Any]:
    [linear] = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    [cotangent] = cotangents
    result: list[Any] = [None] * len(operands)
    if isinstance(cotangent, ad.Zero):
        return result
    fixed, payloads = operands[:_NUM_FIXED], operands[_NUM_FIXED:]
    which = linear - _NUM_FIXED
    other = payloads[1 - which] if len(payloads) == 2 else None
    dtype = operands[linear].aval.dtype
    if dtype.itemsize == 1:  # Summed in float32, and rounded once.
        cotangent = cotangent.astype(jnp.float32)
    op, first, second = transposed(op, which, cotangent, other)
    back = [first] if second is None else [first, second]
    [out] = _bind(
        *fixed, *back, op=op, layout=layout, binding=binding, call=_derived(call, "gradient")
    )
    result[linear] = out.astype(dtype)
    return result


def _derived(call: str, how: str) -> str:
    """Names a derivative of a call: a gradient stays one, however it is derived from."""
    gradient = " (gradient)"
    return call if call.endswith(gradient) else f"{call.removesuffix(' (derivative)')} ({how})"


_exchange_p = Primitive("jax_ep_exchange")
_exchange_p.multiple_results = True
_exchange_p.def_impl(_impl)
_exchange_p.def_abstract_eval(_abstract_eval)
batching.fancy_primitive_batchers[_exchange_p] = _batch
ad.primitive_jvps[_exchange_p] = _jvp
ad.primitive_transposes[_exchange_p] = _transpose
register_lowerings(_exchange_p)
