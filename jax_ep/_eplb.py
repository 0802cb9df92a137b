"""``eplb``: a placement of experts by what was asked of them, on the host."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int64, Num

from jax_ep._checks import check_nodes, check_positive
from jax_ep._placement import Placement

_LEAST_GAIN = 1e-9


@partial(jax.profiler.annotate_function, name="jax_ep.eplb")
def eplb(
    load: Num[np.ndarray, "num_experts"],
    num_slots: int,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
) -> Placement:
    """Places experts so that ranks are as busy as each other if they are asked for as before.

    Each expert gets one copy, and each further slot one more of the expert with the largest load a
    copy. Copies then go, the busiest first, to the least busy rank that has room and none of the
    expert yet, each rank having ``num_slots / num_ranks`` slots. Last, the busiest rank swaps
    copies with others for as long as that makes it less busy. In the manner of DeepSeek's load
    balancer, https://github.com/deepseek-ai/EPLB, which does not swap. Of equals the first is
    taken, so equal arguments give equal placements.

    With ``ranks_per_node`` all copies of an expert are on one node: experts are first divided among
    nodes in the same way, as many for each, and then copied and placed within theirs. That keeps
    copies near to each other, and nodes as busy as whole experts allow.

    Runs on the host in NumPy: takes some 20 ms for 32 ranks of 9 slots, and seconds for 1,024 of 5.

    Args:
      load: what was asked of each expert: ``expert_load`` of plans, summed over steps; ``fold`` of
        a ``Placement`` makes it of loads of slots.
      num_slots: slots on all ranks together: a multiple of ``num_ranks``, at least one for each
        expert and at most one on each rank that may have copies.
      num_ranks: ranks along the expert axis.
      ranks_per_node: how many ranks, one after the other, are on a node to which the copies of an
        expert keep. None lets them be anywhere.

    Returns:
      The placement, in NumPy arrays. Experts ascend within each rank.

    Raises:
      TypeError: ``load`` does not hold real numbers, or a count is not an int.
      ValueError: ``load`` is not 1-D or empty, or holds something negative or not finite;
        ``num_slots`` is out of its range or no multiple of ``num_ranks``; ``ranks_per_node`` does
        not divide ``num_ranks``; or the nodes do not divide the experts.

    Example:
      >>> import jax_ep
      >>> jax_ep.eplb([90, 30, 20, 10], num_slots=6, num_ranks=3).slot_experts.tolist()
      [0, 1, 0, 2, 0, 3]
    """
    loads = _check_load(load)
    ranks_per_node = num_ranks if ranks_per_node is None else ranks_per_node
    _check_counts(loads.size, num_slots, num_ranks, ranks_per_node)
    num_nodes = num_ranks // ranks_per_node
    held = np.zeros((num_ranks, loads.size), bool)
    nodes = _pack(loads, np.ones(loads.size, np.int64), num_nodes)
    for node, held_on_node in enumerate(np.split(held, num_nodes)):
        [experts] = np.nonzero(nodes[node])
        copies = _count_copies(loads[experts], num_slots // num_nodes, ranks_per_node)
        held_on_node[:, experts] = _pack(loads[experts] / copies, copies, ranks_per_node)
    return Placement.of(np.nonzero(held)[1], loads.size)


def _check_load(load: Num[np.ndarray, "num_experts"]) -> Float64[np.ndarray, "num_experts"]:
    given = np.asarray(load)
    if given.dtype.kind not in "biuf" and given.dtype.name != "bfloat16":
        raise TypeError(f"load must hold real numbers; got {given.dtype}.")
    loads = given.astype(np.float64)
    if loads.ndim != 1 or loads.size == 0:
        raise ValueError(f"load must have shape [num_experts]; got {list(loads.shape)}.")
    wrong = loads[~(np.isfinite(loads) & (loads >= 0))]
    if wrong.size:
        raise ValueError(f"load must be finite and not negative; got {wrong[0]}.")
    return loads


def _check_counts(num_experts: int, num_slots: int, num_ranks: int, ranks_per_node: int) -> None:
    check_positive("num_slots", num_slots)
    check_positive("num_ranks", num_ranks)
    check_nodes(ranks_per_node, num_ranks)
    if num_slots % num_ranks:
        raise ValueError(f"num_slots must be a multiple of the {num_ranks} ranks; got {num_slots}.")
    most = num_experts * ranks_per_node
    if not num_experts <= num_slots <= most:
        raise ValueError(
            f"num_slots must lie within {num_experts}, one for each expert, to {most}, one for "
            f"each on all ranks that may have copies; got {num_slots}."
        )
    if num_experts % (num_ranks // ranks_per_node):
        raise ValueError(
            f"ranks_per_node must make a number of nodes that divides the {num_experts} experts; "
            f"got {ranks_per_node} for {num_ranks} ranks."
        )


def _count_copies(
    loads: Float64[np.ndarray, "num_experts"], num_slots: int, most: int
) -> Int64[np.ndarray, "num_experts"]:
    """Gives each further slot to the expert with the largest load a copy, of at most so many."""
    copies = np.ones(loads.size, np.int64)
    for _ in range(num_slots - loads.size):
        copies[np.argmax(np.where(copies < most, loads / copies, -1))] += 1
    return copies


@dataclasses.dataclass(frozen=True)
class _Bins:
    """Which items each bin holds, at most one copy of each; how many, and what they weigh."""

    weights: Float64[np.ndarray, "num_items"]
    held: Bool[np.ndarray, "num_bins num_items"]
    count: Int64[np.ndarray, "num_bins"]
    total: Float64[np.ndarray, "num_bins"]

    def put(self, chosen: int, item: int, sign: Literal[1, -1] = 1) -> None:
        """Puts an item in, or takes it out with a sign of -1."""
        self.held[chosen, item] = sign > 0
        self.count[chosen] += sign
        self.total[chosen] += sign * self.weights[item]

    def lightest(self, among: Bool[np.ndarray, "num_bins"]) -> int:
        return int(np.argmin(np.where(among, self.total, np.inf)))


def _pack(
    weights: Float64[np.ndarray, "num_items"], copies: Int64[np.ndarray, "num_items"], num_bins: int
) -> Bool[np.ndarray, "num_bins num_items"]:
    """Packs copies of items into bins of like weight, as many into each.

    Args:
      weights: of each copy of an item.
      copies: how many there are of each item, at most one for each bin.
      num_bins: divides how many copies there are.

    Returns:
      Which bin holds which items.
    """
    held = np.zeros((num_bins, weights.size), bool)
    bins = _Bins(weights, held, np.zeros(num_bins, np.int64), np.zeros(num_bins))
    each = copies.sum() // num_bins
    order = np.argsort(-weights, kind="stable")
    for item in np.repeat(order, copies[order]).tolist():
        fits = (bins.count < each) & ~held[:, item]
        bins.put(bins.lightest(fits) if fits.any() else _make_room(bins, each, item), item)
    _even_out(bins)
    return held


def _make_room(bins: _Bins, each: int, item: int) -> int:
    """Makes room for an item that all bins with room hold; returns the bin where room is now."""
    chosen, other = bins.lightest(~bins.held[:, item]), bins.lightest(bins.count < each)
    # The one is full, the other is not and holds the item: so the one has what the other has not.
    moved = int(np.argmax(bins.held[chosen] & ~bins.held[other]))
    bins.put(chosen, moved, -1)
    bins.put(other, moved)
    return chosen


def _even_out(bins: _Bins) -> None:
    """Swaps items of the heaviest bin with others' until no swap makes it lighter.

    Of all swaps it takes the one after which the heavier of both bins is lightest.
    """
    owners, items = np.nonzero(bins.held)
    while True:
        heaviest = int(np.argmax(bins.total))
        [own] = np.nonzero(owners == heaviest)
        lost = bins.weights[items[own], None] - bins.weights[items]
        heavier = np.maximum(bins.total[heaviest] - lost, bins.total[owners] + lost)
        doubled = bins.held[owners, items[own, None]] | bins.held[heaviest, items]
        heavier[doubled] = np.inf
        best = int(np.argmin(heavier))
        # What only rounding gains would never end.
        if heavier.flat[best] >= bins.total[heaviest] * (1 - _LEAST_GAIN):
            return
        row, taken = divmod(best, items.size)
        for bin_, slot in ((heaviest, own[row]), (int(owners[taken]), taken)):
            bins.put(bin_, items[slot], -1)
        items[[own[row], taken]] = items[[taken, own[row]]]
        for bin_, slot in ((heaviest, own[row]), (int(owners[taken]), taken)):
            bins.put(bin_, items[slot])
