"""What ways to exchange rows put on a cluster's wires, and how long that takes at least.

All is of one rank, and the same for each: ranks that have more to do than others are not in it, nor
is what a rank does with rows in its own memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cluster_rows import Geometry, Rows

OPS = ("dispatch", "combine")
_STEPS_OF_A_READ = 3
"""A rank is told that rows are there, asks for them, and they come."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A rank's wires: to the ranks of its node, and to those of others."""

    near_gb_per_s: float
    far_gb_per_s: float
    near_us: float
    far_us: float


class Steps(NamedTuple):
    """How often something has to cross before something else can: inside nodes, and between."""

    near: float
    far: float

    @classmethod
    def of_a_hop(cls, geometry: Geometry) -> Steps:
        """From a rank to the farthest."""
        return cls(1, 0) if geometry.num_nodes == 1 else cls(0, 1)

    @classmethod
    def of_a_ring(cls, geometry: Geometry) -> Steps:
        """From each rank to the next, until all ranks have what one had."""
        far = geometry.num_nodes - 1
        return cls(geometry.num_ranks - 1 - far, far)

    @classmethod
    def of_a_tree(cls, geometry: Geometry) -> Steps:
        """From all ranks to one and back: along each node, and by halves between nodes."""
        return cls(2 * (geometry.ranks_per_node - 1), 2 * math.log2(geometry.num_nodes))

    def times(self, number: float) -> Steps:
        return Steps(number * self.near, number * self.far)

    def then(self, other: Steps) -> Steps:
        return Steps(self.near + other.near, self.far + other.far)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be exchanged.

    Attributes:
      geometry: among whom.
      rows: how many rows.
      row_bytes: bytes of a row, by op. Those of ``combine`` have with them the weights of a token's
        choices, which go the other way.
    """

    geometry: Geometry
    rows: Rows
    row_bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a rank receives, in how many messages, and after how many steps the last one comes."""

    near_bytes: float
    far_bytes: float
    messages: float
    steps: Steps

    @property
    def num_bytes(self) -> float:
        return self.near_bytes + self.far_bytes

    def microseconds(self, cluster: Cluster) -> float:
        """Returns the time: both wires carry at once, so the slower one's counts."""
        near = self.near_bytes / cluster.near_gb_per_s
        far = self.far_bytes / cluster.far_gb_per_s
        waits = self.steps.near * cluster.near_us + self.steps.far * cluster.far_us
        return waits + max(near, far) / 1e3


def plan_of(work: Work) -> Traffic:
    """All choices, gathered in 2 bytes each if that is enough for an expert's number."""
    g = work.geometry
    index_bytes = 2 if g.num_experts <= np.iinfo(np.int16).max else 4
    return _all_gather(g, g.num_tokens * g.num_topk * index_bytes)


def _direct(work: Work, op: str) -> Traffic:
    rows, row_bytes = work.rows, work.row_bytes[op]
    return Traffic(
        near_bytes=rows.near * row_bytes,
        far_bytes=rows.far * row_bytes,
        messages=rows.near + rows.far,
        steps=Steps.of_a_hop(work.geometry).times(_STEPS_OF_A_READ),
    )


def _two_level(work: Work, op: str) -> Traffic:
    """A row comes to one rank of a node and goes on to others of it, while the next one comes."""
    g, rows, row_bytes = work.geometry, work.rows, work.row_bytes[op]
    # The rank that it comes to wants it as often as any other of its node.
    near = rows.near + rows.far * (g.ranks_per_node - 1) / g.ranks_per_node
    return Traffic(
        near_bytes=near * row_bytes,
        far_bytes=rows.nodes * row_bytes,
        messages=near + rows.nodes,
        steps=Steps(1, g.num_nodes > 1).times(_STEPS_OF_A_READ),
    )


def _in_rounds(work: Work, op: str) -> Traffic:
    """All slots of all pairs, filled or not, and first a maximum over all ranks."""
    g, rows, row_bytes = work.geometry, work.rows, work.row_bytes[op]
    collectives, slots = rows.dispatch_rounds, rows.dispatch_slots
    if op == "combine":
        collectives, slots = 2 * rows.combine_rounds, rows.combine_slots  # weights go first
    return Traffic(
        near_bytes=(g.ranks_per_node - 1) * slots * row_bytes,
        far_bytes=(g.num_ranks - g.ranks_per_node) * slots * row_bytes,
        messages=(g.num_ranks - 1) * collectives,
        steps=Steps.of_a_tree(g).then(Steps.of_a_hop(g).times(collectives)),
    )


def _by_xla(work: Work, op: str) -> Traffic:
    """All tokens on each rank; and from each a sum for each, zeros for most."""
    g, row_bytes = work.geometry, work.row_bytes[op]
    if op == "dispatch":
        return _all_gather(g, g.num_tokens * row_bytes)
    return Traffic(
        near_bytes=(g.ranks_per_node - 1) * g.num_tokens * row_bytes,
        far_bytes=(g.num_ranks - g.ranks_per_node) * g.num_tokens * row_bytes,
        messages=2 * (g.num_ranks - 1),
        steps=Steps.of_a_ring(g).then(Steps.of_a_hop(g)),  # weights are gathered
    )


def _all_gather(geometry: Geometry, num_bytes: float) -> Traffic:
    """In as many rings as a node has ranks: what is far enters a node once, in equal parts."""
    g = geometry
    far = (g.num_ranks - g.ranks_per_node) * num_bytes / g.ranks_per_node
    return Traffic(
        near_bytes=(g.num_ranks - 1) * num_bytes - far,
        far_bytes=far,
        messages=g.num_ranks - 1,
        steps=Steps.of_a_ring(g),
    )


WAYS: dict[str, Callable[[Work, str], Traffic]] = {
    "direct": _direct,
    "two-level": _two_level,
    "rounds": _in_rounds,
    "xla": _by_xla,
}
"""The ways to exchange rows.

- ``direct``: a token is read once by each rank that wants it, row by row, wherever it is.
- ``two-level``: once by each node that wants it, and inside the node by each rank.
- ``rounds``: as ``jax_ep`` does between hosts, by ``all_to_all`` of padded blocks.
- ``xla``: as ``jax_ep``'s specification does, by an all-gather and an ``all_to_all`` of everything.
"""
