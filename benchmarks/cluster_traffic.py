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
_COLLECTIVES = {"dispatch": 1, "combine": 2}
"""Of a round: in ``combine`` the weights of choices go out before sums come back."""
_WHERE = 8
"""Bytes that say where a choice has its row: on which rank of a node, and which."""


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
    """What a rank receives, in how many messages, and after how many steps the last one comes.

    Attributes:
      near_bytes: from ranks of its node.
      far_bytes: from others.
      messages: from both.
      steps: how long the longest chain of them is.
      in_turn: whether one wire has to wait until the other has carried all; else both do at once.
    """

    near_bytes: float
    far_bytes: float
    messages: float
    steps: Steps
    in_turn: bool = False

    @property
    def num_bytes(self) -> float:
        return self.near_bytes + self.far_bytes

    def microseconds(self, cluster: Cluster) -> float:
        """Returns the time: where both wires carry at once, the slower one's counts."""
        near = self.near_bytes / cluster.near_gb_per_s
        far = self.far_bytes / cluster.far_gb_per_s
        waits = self.steps.near * cluster.near_us + self.steps.far * cluster.far_us
        return waits + (near + far if self.in_turn else max(near, far)) / 1e3


def plan_of(work: Work) -> Traffic:
    """All choices, gathered in 2 bytes each if that is enough for an expert's number."""
    return _all_gather(work.geometry, _bytes_of_choices(work.geometry))


def node_plan_of(work: Work) -> Traffic:
    """Likewise, but first between nodes, and then each node's ranks from each other."""
    g = work.geometry
    between, inside = g.num_nodes - 1, g.ranks_per_node - 1
    return Traffic(
        near_bytes=inside * g.num_nodes * _bytes_of_choices(g),
        far_bytes=between * _bytes_of_choices(g),
        messages=between + inside,
        steps=Steps(inside, between),
        in_turn=True,
    )


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
    return Traffic(
        near_bytes=rows.spread * row_bytes,
        far_bytes=rows.nodes * row_bytes,
        messages=rows.spread + rows.nodes,
        steps=Steps(1, g.num_nodes > 1).times(_STEPS_OF_A_READ),
    )


def _in_rounds(work: Work, op: str) -> Traffic:
    """All slots of all pairs, filled or not, and first a maximum over all ranks."""
    g, row_bytes = work.geometry, work.row_bytes[op]
    rounds, slots = work.rows.rounds.of(op)
    collectives = rounds * _COLLECTIVES[op]
    return Traffic(
        near_bytes=(g.ranks_per_node - 1) * slots * row_bytes,
        far_bytes=(g.num_ranks - g.ranks_per_node) * slots * row_bytes,
        messages=(g.num_ranks - 1) * collectives,
        steps=Steps.of_a_tree(g).then(Steps.of_a_hop(g).times(collectives)),
    )


def _in_node_rounds(work: Work, op: str) -> Traffic:
    """All slots between ranks at the same place of their nodes; inside, what is wanted of them.

    A node's ranks read from each other when all of a round has come, and in ``combine`` before
    anything goes back. First they tell each other, in a bit for each token, what comes to them.
    """
    g, rows, row_bytes = work.geometry, work.rows, work.row_bytes[op]
    if g.ranks_per_peer == 1:
        return _in_rounds(work, op)
    rounds, slots = rows.node_rounds.of(op)
    between, inside = g.num_nodes - 1, g.ranks_per_node - 1
    told = _WHERE * g.num_topk if op == "combine" else 0
    bits = inside * g.num_ranks * math.ceil(g.num_tokens / 8)
    collectives = rounds * _COLLECTIVES[op]
    a_round = Steps(0, _COLLECTIVES[op]).then(Steps(_STEPS_OF_A_READ, 0))
    return Traffic(
        near_bytes=rows.spread * row_bytes + bits,
        far_bytes=between * slots * (row_bytes + told),
        messages=between * collectives + rows.spread + inside,
        steps=Steps.of_a_tree(g).then(Steps(inside, 0)).then(a_round.times(rounds)),
        in_turn=True,
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


def _bytes_of_choices(geometry: Geometry) -> int:
    """Returns those of a rank's."""
    index_bytes = 2 if geometry.num_experts <= np.iinfo(np.int16).max else 4
    return geometry.num_tokens * geometry.num_topk * index_bytes


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
    "node rounds": _in_node_rounds,
    "xla": _by_xla,
}
"""The ways to exchange rows.

- ``direct``: a token is read once by each rank that wants it, row by row, wherever it is.
- ``two-level``: once by each node that wants it, and inside the node by each rank.
- ``rounds``: as ``jax_ep`` does between hosts, by ``all_to_all`` of padded blocks.
- ``node rounds``: as it does if a plan says how many ranks a node has: such blocks between nodes,
  and what has come is read as by ``two-level``.
- ``xla``: as ``jax_ep``'s specification does, by an all-gather and an ``all_to_all`` of everything.
"""
