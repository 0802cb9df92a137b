"""The exchange in native code: whether it serves, and its foreign calls."""

import math
from typing import Any, cast, get_args

import jax
import numpy as np
from jaxtyping import Array

from jax_ep._call import Call, Operands
from jax_ep._compat import result_type, trace_platform
from jax_ep._fabrics import GEOMETRY, Fabric, choose, platform_problem
from jax_ep._layout import Layout
from jax_ep._library import describe, native_platform, register_handlers, warn_once
from jax_ep._ops import PLAN
from jax_ep._processes import Refusal
from jax_ep._types import Binding, Platform


def platform_here() -> str | None:
    """Returns the platform whose native code will most likely run what is traced here."""
    return native_platform(trace_platform())


def refusal(layout: Layout, binding: Binding) -> str | None:
    """Returns why native code does not serve an exchange that is traced here, or None.

    Says nothing of the processes that its ranks are in: only a program's devices tell.
    """
    chosen = choose(Call(PLAN, layout, binding, "make_plan", platform_here()), join=False)
    return chosen.reason if isinstance(chosen, Refusal) else None


def serves(layout: Layout, binding: Binding) -> bool:
    """Tells whether native code serves an exchange here; warns once if its library is unfit."""
    platform = platform_here()
    if platform in get_args(Platform) and (reason := platform_problem(platform)) is not None:
        warn_once(reason)
        return False
    return refusal(layout, binding) is None


def unavailable_reason() -> str | None:
    """Returns why native code does not serve at all here, or None. Waits for nobody."""
    return platform_problem(platform_here())


def library_info() -> dict[str, str]:
    """Returns what the native library for this platform says of itself.

    Raises:
      NotImplementedError: there is none, or it cannot be loaded.
    """
    if (reason := unavailable_reason()) is not None:
        raise NotImplementedError(reason)
    return describe(cast(Platform, platform_here()))


def run(fabric: Fabric, call: Call, operands: Operands) -> list[Array]:
    """Calls an op's handler for the rank of this device, or for all ranks of a leading axis."""
    register_handlers(fabric.platform)
    op, layout = call.op, call.layout
    stack, like = operands.where.rank.shape, operands.payloads[0]
    types = [
        result_type(stack + shape, dtype, like)
        for shape, dtype in op.result_types(layout, operands.payloads)
    ]
    own = (*(operands.plan or ()), *operands.payloads)
    added = fabric.adds(call, operands)
    attributes: dict[str, Any] = {
        "call": call.name,
        **{name: np.int64(getattr(layout, name)) for name in GEOMETRY},
        **{name: np.int64(option(layout)) for name, option in op.options.items()},
        **dict(zip(fabric.attributes(op), added.attributes, strict=True)),
    }
    foreign = jax.ffi.ffi_call(fabric.target(op), [*types, *added.results])
    where = operands.where if fabric.reads_place else _constant_place(stack)
    return list(foreign(*where, *added.operands, *own, **attributes))[: len(types)]


def _constant_place(stack: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what stands in for rank and group where all ranks are stacked, in their order."""
    # XLA turns constants back into kernels if they are all one number, or a line that counts up.
    ranks = np.arange(math.prod(stack), dtype=np.int32).reshape(1, *stack)
    return ranks, ranks
