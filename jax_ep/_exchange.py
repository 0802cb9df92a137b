"""Runs one rank's part of an exchange on the chosen implementation, wherever its ranks live.

The ranks of a ``vmap`` axis are on one device and must be seen together, those of a ``shard_map``
one each. ``exchange`` hides the difference: it is a ``custom_vmap`` whose rule recognises the
expert axis by the rank operand, the only one that must be batched there and never is elsewhere.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_ep import _native, _xla
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
    """
    impl = _IMPLEMENTATIONS[layout.implementation]

    @custom_vmap
    def call(rank: jax.Array, *args: Any) -> Any:
        if layout.fabric == "devices":
            return impl.devices(op, layout, rank, *args)
        # One rank is a stack of one. For more this result only lends its type: the rule below
        # replaces it when the expert axis is mapped.
        stack = jax.tree.map(lambda a: _repeat(a, layout.num_ranks), (rank, *args))
        return jax.tree.map(lambda a: a[0], impl.stacked(op, layout, *stack))

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

    return call(rank, *args)


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
