"""One exchange, as what carries it is told of it when a program is lowered."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Num

from jax_ep._axes import Place
from jax_ep._layout import Layout
from jax_ep._ops import Op
from jax_ep._plan import PlanArrays
from jax_ep._types import Binding, LoweredBinding


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What is known of an exchange before any value is.

    Attributes:
      op: what it does.
      layout: the plan's static geometry.
      binding: how the plan's axis is bound.
      name: the public function that wants it, for errors.
      platform: where the program is to run, by JAX's name of the devices; None if not known.
      devices: those of its ranks, [groups, ranks]; None where ranks are all of this process, or
        where not even the program knows.
      is_placed: whether its program knows where its ranks are.
      num_parts: into how many parts its axis is cut, of the ranks of one exchange each.
      scope: the user's name of the part of the program that it is in, such as a layer's.
    """

    op: Op
    layout: Layout
    binding: Binding | LoweredBinding
    name: str
    platform: str | None
    devices: np.ndarray | None = None
    is_placed: bool = True
    num_parts: int = 1
    scope: str = ""

    @property
    def spans_devices(self) -> bool:
        """Whether its ranks are on several devices."""
        return self.binding == "mesh" and self.layout.num_ranks > 1

    def within_nodes(self) -> "Call":
        """Returns the exchange of which each node's ranks have one by themselves."""
        layout, num_nodes = self.layout, self.layout.num_nodes
        changes = {
            "num_ranks": layout.ranks_per_node,
            "num_experts": layout.num_experts // num_nodes,
            "ranks_per_node": 1,
        }
        devices = None if self.devices is None else self.devices.reshape(-1, layout.ranks_per_node)
        return dataclasses.replace(
            self,
            layout=dataclasses.replace(layout, **changes),
            devices=devices,
            num_parts=num_nodes,
        )

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The processes of each group of ranks, ascending: each such set once; none if unknown."""
        if self.devices is None:
            return ()
        process_of = np.vectorize(lambda device: device.process_index)(self.devices)
        return tuple(sorted({tuple(sorted({*group})) for group in process_of.tolist()}))

    @property
    def spans_processes(self) -> bool:
        """Whether ranks of some group are known to be in several processes."""
        return any(len(group) > 1 for group in self.groups)


class Operands(NamedTuple):
    """The values that an exchange is given."""

    where: Place
    plan: PlanArrays | None
    payloads: tuple[Any, ...]

    @classmethod
    def of(cls, op: Op, operands: Sequence[Any]) -> "Operands":
        """Parts the operands of an op: the place, the plan if it takes one, and its payloads."""
        num_places = len(Place._fields)
        num_fixed = num_places + len(PlanArrays._fields) * op.takes_plan
        plan = PlanArrays(*operands[num_places:num_fixed]) if op.takes_plan else None
        return cls(Place(*operands[:num_places]), plan, tuple(operands[num_fixed:]))


def all_gather(call: Call, x: Array) -> Num[Array, "num_ranks ..."]:
    """Stacks what the ranks of an exchange have, on each of them."""
    num_ranks, parts = call.layout.num_ranks, None
    if call.num_parts > 1:
        parts = np.arange(call.num_parts * num_ranks).reshape(-1, num_ranks).tolist()
    return jax.lax.all_gather(x, call.layout.axis_name, axis_index_groups=parts)
