"""Names and literal types that every layer shares, and what axis names name."""

from typing import Final, Literal, TypeAlias

DROPPED: Final = -1
"""In ``topk_idx``: this choice goes to no expert."""

AxisName: TypeAlias = str | tuple[str, ...] | None
Implementation: TypeAlias = Literal["xla", "native"]
Tail: TypeAlias = Literal["zero", "uninitialized"]

Binding: TypeAlias = Literal["none", "vmap", "mesh"]
"""How the axis of an exchange is bound where a plan is made or used.

``"mesh"``: mesh axes that an enclosing ``shard_map`` made manual, one rank per device. ``"vmap"``:
the ``axis_name`` of an enclosing ``vmap``, all ranks on one device. ``"none"``: one rank alone.
"""

LoweredBinding: TypeAlias = Literal["none", "stacked", "mesh"]
"""The same once ``vmap`` has done its part: ``"stacked"`` ranks are a leading array axis."""

Platform: TypeAlias = Literal["cpu", "gpu"]
"""Where there is native code, by the name that JAX's devices have for it."""


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    """Returns the axes that an axis name names, major first; none for None."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
