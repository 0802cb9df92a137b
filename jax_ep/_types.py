"""Names and literal types that every layer shares."""

from typing import Final, Literal, TypeAlias

DROPPED: Final = -1
"""In ``topk_idx``: this choice goes to no expert."""

AxisName: TypeAlias = str | tuple[str, ...] | None
Implementation: TypeAlias = Literal["xla", "native"]
Tail: TypeAlias = Literal["zero", "uninitialized"]

Fabric: TypeAlias = Literal["stacked", "devices"]
"""How the ranks of one exchange meet.

``"devices"``: one rank per device of the mesh axes that an enclosing ``shard_map`` made manual.
``"stacked"``: all ranks on one device, along a leading array axis; a single rank is a stack of one.
"""
