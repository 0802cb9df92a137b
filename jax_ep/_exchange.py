"""The exchange as a JAX primitive: how it is typed, batched and differentiated.

``exchange`` binds one rank's part of an op. Its rules know which axis is which: a ``vmap`` along
the axis of the exchange brings all ranks together; one along another is a loop of independent
exchanges. What carries an exchange is decided where it is lowered, in ``_lowering``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jax_ep._axes import Place, place
from jax_ep._call import Operands
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
from jax_ep._ops import PLAN, Op, transposed
from jax_ep._plan import Plan, PlanArrays
from jax_ep._types import Binding


def exchange_plan(
    layout: Layout, binding: Binding, where: Place, topk_idx: jax.Array
) -> PlanArrays:
    """Computes this rank's plan, together with its peers."""
    results = _bind(*where, topk_idx, op=PLAN, layout=layout, binding=binding, call="make_plan")
    return PlanArrays(*results)


def exchange(
    op: Op, plan: Plan, binding: Binding, call: str, payloads: Sequence[jax.Array]
) -> list[jax.Array]:
    """Runs an op for one rank, together with its peers.

    Args:
      op: which one.
      plan: where everything goes.
      binding: how the plan's axis is bound here.
      call: the public function that wants it, for errors.
      payloads: what the op takes besides the plan.

    Returns:
      What the op returns for this rank.
    """
    layout = plan._layout
    operands = (*place(layout), *plan._arrays, *payloads)
    return _bind(*operands, op=op, layout=layout, binding=binding, call=call)


def _bind(*operands: jax.Array, layout: Layout, **params: Any) -> list[jax.Array]:
    # Results vary over the mesh as what is exchanged does, wherever that is done.
    num_places = len(Place._fields)
    varying = vary_together(operands[num_places:])
    return _exchange_p.bind(*operands[:num_places], *varying, layout=_readable(layout), **params)


def _readable(layout: Layout) -> Layout:
    # What nobody wrote may look like a NaN, and would be reported as ours.
    return dataclasses.replace(layout, tail="zero") if debug_nans() else layout


def _impl(*operands: Any, layout: Layout, **params: Any) -> list[jax.Array]:
    return run_primitive(_exchange_p, *operands, layout=_readable(layout), **params)


def _abstract_eval(*operands: Any, op: Op, layout: Layout, **_: Any) -> list[Any]:
    given = Operands.of(op, operands)
    stack, like = given.where.rank.shape, given.payloads[0]
    return [
        result_type(stack + shape, dtype, like)
        for shape, dtype in op.result_types(layout, given.payloads)
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
    out = _exchange_p.bind(*primals, op=op, call=call, **params)
    bind = functools.partial(_exchange_p.bind, op=op, call=_derived(call, "derivative"), **params)
    num_fixed = len(primals) - len(Operands.of(op, primals).payloads)
    moving = [i for i in range(num_fixed, len(primals)) if not isinstance(tangents[i], ad.Zero)]
    out_tangents = [zero_tangent(x) for x in out]
    if op.is_joint and moving:
        moved = bind(*primals[:num_fixed], *(tangents[i] for i in moving))
        for i, tangent in zip(moving, moved, strict=True):
            out_tangents[i - num_fixed] = tangent
    elif moving:
        terms = [bind(*primals[:i], tangents[i], *primals[i + 1 :])[0] for i in moving]
        out_tangents = [functools.reduce(ad.add_jaxvals, terms)]
    return out, out_tangents


def _transpose(
    cotangents: list[Any], *operands: Any, op: Op, layout: Layout, binding: Binding, call: str
) -> list[Any]:
    payloads = Operands.of(op, operands).payloads
    num_fixed = len(operands) - len(payloads)
    if not op.is_joint:  # One result, whichever payload it is linear in.
        cotangents = cotangents * len(payloads)
    back = [i for i, x in enumerate(payloads) if ad.is_undefined_primal(x)]
    back = [i for i in back if not isinstance(cotangents[i], ad.Zero)]
    result: list[Any] = [None] * len(operands)
    if not back:
        return result
    wide = [_widen(cotangents[i], payloads[i].aval.dtype) for i in back]
    other = None if op.is_joint else payloads[1 - back[0]]
    op, wide = transposed(op, back[0], wide, other)
    params = {"op": op, "layout": layout, "binding": binding, "call": _derived(call, "gradient")}
    for i, x in zip(back, _bind(*operands[:num_fixed], *wide, **params), strict=True):
        result[num_fixed + i] = x.astype(payloads[i].aval.dtype)
    return result


def _widen(cotangent: jax.Array, dtype: Any) -> jax.Array:
    """Has a gradient of 1-byte floats be summed in float32, to be rounded once."""
    return cotangent.astype(jnp.float32) if dtype.itemsize == 1 else cotangent


def _derived(call: str, how: str) -> str:
    """Names a derivative of a call: a gradient stays one, however it is derived from."""
    gradient = " (gradient)"
    return call if call.endswith(gradient) else f"{call.removesuffix(' (derivative)')} ({how})"


_exchange_p, _unnamed_p = Primitive("jax_ep_exchange"), Primitive("jax_ep_unnamed_exchange")
for _primitive in (_exchange_p, _unnamed_p):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_abstract_eval)
_exchange_p.def_impl(_impl)
batching.fancy_primitive_batchers[_exchange_p] = _batch
ad.primitive_jvps[_exchange_p] = _jvp
ad.primitive_transposes[_exchange_p] = _transpose
register_lowerings(_exchange_p, _unnamed_p)
