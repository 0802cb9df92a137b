"""Foreign calls of the library's handlers, as XLA is told of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array

from jax_ep._call import Call, Operands
from jax_ep._compat import result_type
from jax_ep._library import register_handlers
from jax_ep._ops import Op
from jax_ep._types import Platform

GEOMETRY = ("num_ranks", "num_experts", "num_tokens", "num_topk", "capacity")
"""What every handler is told of the exchange: attributes by the names of ``Layout``."""


class Target(Protocol):
    """Whose handlers are called: a fabric, as ``_fabrics`` describes it."""

    @property
    def platform(self) -> Platform: ...
    @property
    def reads_place(self) -> bool: ...
    @property
    def adds(self) -> Callable[[Call, Operands], Any]: ...
    @property
    def attributes(self) -> Callable[[Op], tuple[str, ...]]: ...
    def target(self, op: Op) -> str: ...


def run(fabric: Target, call: Call, operands: Operands) -> list[Array]:
    """Calls an op's handler for the rank of this device, or for all ranks of a leading axis."""
    stack, like = operands.where.rank.shape, operands.payloads[0]
    types = [
        result_type(stack + shape, dtype, like)
        for shape, dtype in call.op.result_types(call.layout, operands.payloads)
    ]
    own = (*(operands.plan or ()), *operands.payloads)
    added = fabric.adds(call, operands)
    attributes = dict(zip(fabric.attributes(call.op), added.attributes, strict=True))
    where = operands.where if fabric.reads_place else _constant_place(stack)
    foreign = [*where, *added.operands, *own]
    return invoke(fabric, call, foreign, [*types, *added.results], attributes)[: len(types)]


def invoke(
    fabric: Target,
    call: Call,
    operands: Sequence[Any],
    results: Sequence[Any],
    attributes: dict[str, Any],
    **options: Any,
) -> list[Array]:
    """Calls a handler with these operands, as they are, for results of these types."""
    register_handlers(fabric.platform)
    layout = call.layout
    told: dict[str, Any] = {
        "call": call.name,
        "scope": call.scope,
        **{name: np.int64(getattr(layout, name)) for name in GEOMETRY},
        **{name: np.int64(option(layout)) for name, option in call.op.options.items()},
        **attributes,
    }
    foreign = jax.ffi.ffi_call(fabric.target(call.op), results, **options)
    return list(foreign(*operands, **told))


def _constant_place(stack: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what stands in for rank and group where all ranks are stacked, in their order."""
    # XLA turns constants back into kernels if they are all one number, or a line that counts up.
    ranks = np.arange(math.prod(stack), dtype=np.int32).reshape(1, *stack)
    return ranks, ranks
