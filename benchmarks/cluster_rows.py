"""How many rows an exchange between nodes has to move, by chance and by choices that are given.

A *node* is some ranks that follow each other and read each other's memory. A row crosses once for
each rank, or once for each node, that a token has choices on. A *pair* is a rank and one of its
*peers*, to which it sends: all ranks, or a rank of each node.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

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
    def ranks_per_peer(self) -> int:
        """How many ranks of a node share what comes to it in node rounds: 1 without other nodes."""
        return self.ranks_per_node if self.num_nodes > 1 else 1

    @property
    def layout(self) -> Layout:
        """The layout of a plan that drops nothing."""
        return Layout(
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            num_tokens=self.num_tokens,
            num_topk=self.num_topk,
            capacity=self.num_tokens * self.num_topk,
            alignment=1,
            tail="uninitialized",
            axis_name=None,
            implementation="native",
            strict=True,
            ranks_per_node=self.ranks_per_node,
        )

    def room(self, ranks_per_peer: int = 1) -> int:
        """Returns the rows that a rank can send to each peer in the first round."""
        return _wire.room_of(self.layout, ranks_per_peer)

    def chance_to_reach(self, some_ranks: int) -> float:
        """Returns how likely a token has choices on some ranks, if all experts are as likely."""
        return self.layout.chance_to_reach(some_ranks * self.num_local_experts)


class Rounds(NamedTuple):
    """How many rounds each op takes, and the slots that they all have for a pair."""

    dispatch: float
    dispatch_slots: float
    combine: float
    combine_slots: float

    def of(self, op: str) -> tuple[float, float]:
        """Returns the rounds of an op, and their slots."""
        return getattr(self, op), getattr(self, f"{op}_slots")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that a rank sends, and receives: the mean over ranks.

    Attributes:
      near: one for each token and other rank of the node that it has choices on.
      far: one for each token and rank of other nodes.
      nodes: one for each token and other node.
      spread: one for each token and rank that has to read it from another of its own node, where a
        token comes once to each node: to the rank that stands there where its own rank stands.
      rounds: of an exchange in rounds between all ranks.
      node_rounds: of one where tokens cross once for each node, if there are several.
    """

    near: float
    far: float
    nodes: float
    spread: float
    rounds: Rounds
    node_rounds: Rounds

    def numbers(self) -> dict[str, float]:
        """Returns all by name."""
        of_rounds = {
            f"{name}.{part}": number
            for name in ("rounds", "node_rounds")
            for part, number in getattr(self, name)._asdict().items()
        }
        return {name: getattr(self, name) for name in OF_TOKENS} | of_rounds


OF_TOKENS = ("near", "far", "nodes", "spread")
"""The numbers of ``Rows`` that are sums over tokens."""


def expect_rows(geometry: Geometry) -> Rows:
    """Computes the rows of tokens whose choices are distinct and all as likely."""
    g, own = geometry, geometry.ranks_per_node
    of_a_rank = g.num_tokens * g.chance_to_reach(1)
    return Rows(
        near=of_a_rank * (own - 1),
        far=of_a_rank * (g.num_ranks - own),
        nodes=g.num_tokens * g.chance_to_reach(own) * (g.num_nodes - 1),
        spread=of_a_rank * g.num_nodes * (own - 1),
        rounds=_expect_rounds(g, 1),
        node_rounds=_expect_rounds(g, g.ranks_per_peer),
    )


def count_rows(geometry: Geometry, topk_idx: np.ndarray) -> Rows:
    """Counts the rows of given choices [R, T, K], all of them kept."""
    g = geometry
    of_tokens = rows_of_tokens(g, topk_idx)
    near, far, nodes, spread = (float(each.sum()) / g.num_ranks for each in of_tokens)
    rounds, node_rounds = (
        Rounds(*map(float, _rounds(g.room(peer), np.array(fullest_pair(g, topk_idx, peer)))))
        for peer in (1, g.ranks_per_peer)
    )
    return Rows(near, far, nodes, spread, rounds, node_rounds)


def rows_of_tokens(geometry: Geometry, topk_idx: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts each of ``OF_TOKENS`` for each token: [R, T]."""
    g = geometry
    to_rank = _reached(topk_idx // g.num_local_experts, g.num_ranks)
    source, rank = np.arange(g.num_ranks)[:, None, None], np.arange(g.num_ranks)
    is_own_node = source // g.ranks_per_node == rank // g.ranks_per_node
    is_own_place = source % g.ranks_per_node == rank % g.ranks_per_node
    to_node = to_rank.reshape(*to_rank.shape[:2], g.num_nodes, g.ranks_per_node).any(-1)
    return (
        (to_rank & is_own_node & (source != rank)).sum(-1),
        (to_rank & ~is_own_node).sum(-1),
        (to_node & ~is_own_node[:, :, :: g.ranks_per_node]).sum(-1),
        (to_rank & ~is_own_place).sum(-1),
    )


def fullest_pair(geometry: Geometry, topk_idx: np.ndarray, ranks_per_peer: int = 1) -> int:
    """Counts the most tokens that any rank has for any peer."""
    g = geometry
    peer = topk_idx // (g.num_local_experts * ranks_per_peer)
    return int(_reached(peer, g.num_ranks // ranks_per_peer).sum(axis=1).max())


def chances_of_fullest(geometry: Geometry, ranks_per_peer: int = 1) -> np.ndarray:
    """Computes how likely it is that the fullest pair has 0, 1, … tokens.

    A token has choices on a peer or not, and other tokens do not ask: so a pair's number is
    binomial. Pairs are taken to be independent, which those of one source are not quite.
    """
    g, tokens = geometry, geometry.num_tokens
    chance = g.chance_to_reach(ranks_per_peer)
    if chance == 1:
        return np.append(np.zeros(tokens), 1.0)
    number = np.arange(tokens + 1)
    log_factorial = np.array([math.lgamma(n + 1) for n in number])
    log_ways = log_factorial[-1] - log_factorial - log_factorial[::-1]
    logs = log_ways + number * math.log(chance) + number[::-1] * math.log1p(-chance)
    exactly = np.exp(logs)
    more = np.append(np.cumsum(exactly[:0:-1])[::-1], 0.0)
    num_pairs = g.num_ranks * (g.num_ranks // ranks_per_peer)
    at_most = np.exp(num_pairs * np.log1p(-np.minimum(more, 1 - 1e-16)))
    return np.diff(at_most, prepend=0.0)


def _expect_rounds(geometry: Geometry, ranks_per_peer: int) -> Rounds:
    likely = chances_of_fullest(geometry, ranks_per_peer)
    rounds = _rounds(geometry.room(ranks_per_peer), np.arange(len(likely)))
    return Rounds(*(float(likely @ each) for each in rounds))


def _rounds(room: int, fullest: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns ``Rounds`` if the fullest pair has so many tokens.

    With several rounds ``combine`` makes each half as large: see ``jax_ep._rounds``.
    """
    dispatch, halves = _from(room, fullest), _from((room + 1) // 2, fullest)
    combine = (np.where(fullest <= room, *both) for both in zip(dispatch, halves, strict=True))
    return *dispatch, *combine


def _from(first: int, fullest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rounds and slots if the first round has room for so many: others are smaller."""
    later = max(min(first, _wire.FEW_ROWS), -(-first // _wire.FURTHER_ROUNDS))
    further = -(-np.maximum(fullest - first, 0) // later)
    return 1 + further, first + further * later


def _reached(where: np.ndarray, num_places: int) -> np.ndarray:
    """Tells which places each token reaches: [R, T, places]."""
    reached = np.zeros((*where.shape[:2], num_places), bool)
    np.put_along_axis(reached, where, True, axis=2)
    return reached
