"""How many rows an exchange between nodes has to move, by chance and by choices that are given.

A *node* is some ranks that follow each other and read each other's memory. A row crosses once for
each rank, or once for each node, that a token has choices on.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jax_ep import _wire
from jax_ep._layout import Layout


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Who takes part: sizes per rank, in the library's words, and how many ranks a node has."""

    num_ranks: int
    ranks_per_node: int
    num_tokens: int
    num_topk: int
    num_experts: int

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def room(self) -> int:
        """Rows that a rank can send to each in one round."""
        return _wire.room_of(self.layout())

    def layout(self, num_ranks: int | None = None) -> Layout:
        """Returns the layout of these ranks, or of as many places that share the experts."""
        return Layout(
            num_ranks=num_ranks or self.num_ranks,
            num_experts=self.num_experts,
            num_tokens=self.num_tokens,
            num_topk=self.num_topk,
            capacity=self.num_tokens * self.num_topk,
            alignment=1,
            tail="uninitialized",
            axis_name=None,
            implementation="native",
            strict=True,
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that a rank sends, and receives: the mean over ranks.

    Attributes:
      near: one for each token and other rank of the node that it has choices on.
      far: one for each token and rank of other nodes.
      nodes: one for each token and other node.
      dispatch_rounds: how many ``dispatch`` takes.
      dispatch_slots: those that all rounds of ``dispatch`` have for a pair of ranks.
      combine_rounds: how many ``combine`` takes.
      combine_slots: likewise.
    """

    near: float
    far: float
    nodes: float
    dispatch_rounds: float
    dispatch_slots: float
    combine_rounds: float
    combine_slots: float


def expect_rows(geometry: Geometry) -> Rows:
    """Computes the rows of tokens whose choices are distinct and all as likely."""
    g = geometry
    ranks, _ = g.layout().ranks_of_a_token
    nodes, _ = g.layout(g.num_nodes).ranks_of_a_token
    own = g.ranks_per_node
    likely = chances_of_fullest(geometry)
    return Rows(
        g.num_tokens * ranks * (own - 1) / g.num_ranks,
        g.num_tokens * ranks * (g.num_ranks - own) / g.num_ranks,
        g.num_tokens * nodes * (g.num_nodes - 1) / g.num_nodes,
        *(float(likely @ each) for each in _rounds(geometry, np.arange(len(likely)))),
    )


def count_rows(geometry: Geometry, topk_idx: np.ndarray) -> Rows:
    """Counts the rows of given choices [R, T, K], all of them kept."""
    of_tokens = rows_of_tokens(geometry, topk_idx)
    rounds = _rounds(geometry, np.array(fullest_pair(geometry, topk_idx)))
    return Rows(
        *(float(of_token.sum()) / geometry.num_ranks for of_token in of_tokens),
        *(float(each) for each in rounds),
    )


def rows_of_tokens(
    geometry: Geometry, topk_idx: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts ``near``, ``far`` and ``nodes`` of each token [R, T]."""
    g = geometry
    to_rank = _reached(topk_idx // g.num_local_experts, g.num_ranks)
    source = np.arange(g.num_ranks)[:, None, None]
    to_rank &= source != np.arange(g.num_ranks)
    to_node = to_rank.reshape(*to_rank.shape[:2], g.num_nodes, g.ranks_per_node)
    is_own = source // g.ranks_per_node == np.arange(g.num_nodes)
    near = np.where(is_own, to_node.sum(-1), 0).sum(-1)
    far = np.where(is_own, 0, to_node.sum(-1)).sum(-1)
    return near, far, (to_node.any(-1) & ~is_own).sum(-1)


def fullest_pair(geometry: Geometry, topk_idx: np.ndarray) -> int:
    """Counts the most tokens that any rank has for any."""
    to_rank = _reached(topk_idx // geometry.num_local_experts, geometry.num_ranks)
    return int(to_rank.sum(axis=1).max())


def chances_of_fullest(geometry: Geometry) -> np.ndarray:
    """Computes how likely it is that the fullest pair has 0, 1, … tokens.

    A token has choices on a rank or not, and other tokens do not ask: so a pair's number is
    binomial. Pairs are taken to be independent, which those of one source are not quite.
    """
    g, tokens = geometry, geometry.num_tokens
    ranks, _ = g.layout().ranks_of_a_token
    chance = ranks / g.num_ranks
    if chance == 1:
        return np.append(np.zeros(tokens), 1.0)
    number = np.arange(tokens + 1)
    log_factorial = np.array([math.lgamma(n + 1) for n in number])
    log_ways = log_factorial[-1] - log_factorial - log_factorial[::-1]
    logs = log_ways + number * math.log(chance) + number[::-1] * math.log1p(-chance)
    exactly = np.exp(logs)
    more = np.append(np.cumsum(exactly[:0:-1])[::-1], 0.0)
    at_most = np.exp(g.num_ranks**2 * np.log1p(-np.minimum(more, 1 - 1e-16)))
    return np.diff(at_most, prepend=0.0)


def _rounds(geometry: Geometry, fullest: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the rounds and slots of both ops if the fullest pair has so many tokens.

    With several rounds ``combine`` makes each half as large: see ``jax_ep._rounds``.
    """
    room, half = geometry.room, (geometry.room + 1) // 2
    dispatch = -(-np.maximum(fullest, 1) // room)
    combine = np.where(dispatch == 1, 1, -(-fullest // half))
    return dispatch, dispatch * room, combine, np.where(dispatch == 1, room, combine * half)


def _reached(where: np.ndarray, num_places: int) -> np.ndarray:
    """Tells which places each token reaches: [R, T, places]."""
    reached = np.zeros((*where.shape[:2], num_places), bool)
    np.put_along_axis(reached, where, True, axis=2)
    return reached
