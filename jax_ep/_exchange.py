"""Runs one rank's part of an exchange on the chosen implementation, wherever its ranks live.

The ranks of a ``vmap`` axis are on one device and must be seen together, those of a ``shard_map``
one each. ``exchange`` hides the difference: it is a ``custom_vmap`` whose rule recognises the
expert axis by the rank operand, the only one that must be batched there and never is elsewhere.
"""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_ep import _native, _xla
from jax_ep._compat import manual_axes
from jax_ep._layout import Layout

_IMPLEMENTATIONS: dict[str, ModuleType] = {"xla": _xla, "native": _native}


def exchange(op: str, layout: Layout, rank: jax.Array, *args: Any) -> Any:
    """Runs ``op`` for one rank.

    Args:
      op: a key of the implementations' ``OPS``.
      layout: static geometry; names implementation, axis and fabric.
      rank: position along the expert axis, int32 scalar.
      *args: the op's operands, pytrees of arrays.

    Returns:
      What the op returns for this rank.

    Raises:
      ValueError: the ranks are a mesh's, and no ``shard_map`` over it encloses the call.
    """
    impl = _IMPLEMENTATIONS[layout.implementation]

    @custom_vmap
    def call(rank: jax.Array, *args: Any) -> Any:
        if layout.fabric == "devices":
            return impl.devices(op, layout, rank, *args)
        stack = jax.tree.map(lambda a: _repeat(a, layout.num_ranks), (rank, *args))
        if layout.num_ranks == 1 and layout.axis_name is None:
            return jax.tree.map(lambda a: a[0], impl.stacked(op, layout, *stack))
        out = jax.eval_shape(partial(impl.stacked, op, layout), *stack)
        return _never_mapped(layout, jax.tree.map(lambda a: a.update(shape=a.shape[1:]), out))

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        if in_batched[0]:
            whole = jax.tree.map(
                lambda a, batched: a if batched else _repeat(a, axis_size), args, tuple(in_batched)
            )
            out = impl.stacked(op, layout, *whole)
        else:
            out = _one_by_one(call, args, in_batched)
        return out, jax.tree.map(lambda _: True, out)

    if layout.fabric == "devices" and not set(layout.axis_names) <= set(manual_axes()):
        raise ValueError(_needs_its_axis(layout))
    return call(rank, *args)


def _never_mapped(layout: Layout, out: Any) -> Any:
    """Stands for an exchange until the rule sees its axis mapped; fails if that never happens.

    It fails when it runs: a trace cannot tell, since the axis name is not bound in the backward
    pass of a ``custom_vjp`` although the axis is mapped there too.
    """

    def fail(*_: Any) -> None:
        raise ValueError(_needs_its_axis(layout))

    return jax.pure_callback(fail, out)


def _needs_its_axis(layout: Layout) -> str:
    return (
        f"plan must be used where the axis it was made along is mapped: axis_name "
        f"{layout.axis_name!r} of {layout.num_ranks} ranks; got a call outside it."
    )


def _repeat(a: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(a, (count, *a.shape))


def _one_by_one(call: Any, args: tuple[Any, ...], in_batched: list[Any]) -> Any:
    """Runs independent exchanges of a plain ``vmap`` axis in turn, the same order on all ranks."""
    leaves, tree = jax.tree.flatten(args)
    batched = jax.tree.leaves(in_batched)
    mapped = [leaf for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]

    def body(mapped: list[jax.Array]) -> Any:
        rest = iter(mapped)
        merged = [next(rest) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
        return call(*jax.tree.unflatten(tree, merged))

    return jax.lax.map(body, mapped)
