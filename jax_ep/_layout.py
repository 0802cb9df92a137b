"""The static geometry of one exchange and the formulas for its capacity."""

import dataclasses
import functools
import math

from jax_ep._checks import check_positive
from jax_ep._types import AxisName, Implementation, Tail, names_of

_EXCEEDED = 0.1
"""How often chance may give the fullest pair more than is reckoned with."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is known about an exchange before any value is: hashable, equal on all ranks."""

    num_ranks: int
    num_experts: int
    num_tokens: int
    num_topk: int
    capacity: int
    alignment: int
    tail: Tail
    axis_name: AxisName
    implementation: Implementation
    # Whether the implementation was asked for, or may be another where the program comes to run.
    strict: bool
    ranks_per_node: int = 1

    @property
    def num_local_experts(self) -> int:
        """Experts on each rank."""
        return self.num_experts // self.num_ranks

    @property
    def num_choices(self) -> int:
        """Choices of all ranks together."""
        return self.num_ranks * self.num_tokens * self.num_topk

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks are on."""
        return self.num_ranks // self.ranks_per_node

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node."""
        ranks = range(self.num_ranks)
        return [
            [*ranks[first : first + self.ranks_per_node]] for first in ranks[:: self.ranks_per_node]
        ]

    @property
    def across_nodes(self) -> list[list[int]]:
        """The ranks that stand at the same place of their nodes."""
        return [[*range(first, self.num_ranks, self.ranks_per_node)] for first in self.nodes[0]]

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names in ``axis_name``, major first."""
        return names_of(self.axis_name)

    @property
    def budget(self) -> int:
        """Choices a rank keeps at most: what is left when every group pays the worst padding."""
        return self.capacity - padding_reserve(self.num_local_experts, self.alignment)

    @property
    def ranks_of_a_token(self) -> tuple[float, float]:
        """On how many ranks a token of random experts has choices, and on how many just one."""
        experts, local = self.num_experts, self.num_local_experts
        topk = min(self.num_topk, experts)  # others are duplicates
        one = local * math.comb(experts - local, topk - 1) / math.comb(experts, topk)
        return self.num_ranks * self.chance_to_reach(local), self.num_ranks * one

    def chance_to_reach(self, some: int) -> float:
        """Returns how likely a token of random experts has choices among some experts."""
        topk = min(self.num_topk, self.num_experts)
        none = math.comb(self.num_experts - some, topk) / math.comb(self.num_experts, topk)
        return 1 - none


@functools.cache
def fullest_of(num: int, chance: float, num_pairs: int) -> int:
    """Returns what the fullest of so many pairs hardly ever exceeds, by chance.

    Each pair draws so many times, and has such a chance to count one.
    """
    if chance in (0, 1):
        return round(num * chance)
    limit, tail = _EXCEEDED / num_pairs, 0.0
    for number in range(num, 0, -1):
        ways = math.lgamma(num + 1) - math.lgamma(number + 1)
        ways -= math.lgamma(num - number + 1)
        log = ways + number * math.log(chance) + (num - number) * math.log1p(-chance)
        tail += math.exp(log)
        if tail > limit:
            return number
    return 0


def padding_reserve(num_local_experts: int, alignment: int) -> int:
    """Returns the rows that alignment can cost a rank: every group one short of a multiple."""
    return num_local_experts * (alignment - 1)


def lossless_capacity(
    num_tokens: int, num_topk: int, num_experts: int, num_ranks: int, alignment: int
) -> int:
    """Returns the rows that hold whatever the ranks send, if each token's choices are distinct."""
    num_local_experts = num_experts // num_ranks
    most = num_ranks * num_tokens * min(num_topk, num_local_experts)
    return max(1, most + padding_reserve(num_local_experts, alignment))


def suggest_capacity(
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
    *,
    factor: float = 1.25,
    alignment: int = 1,
) -> int:
    """Returns a receive budget for ranks whose load stays within a factor of the mean.

    A rank receives ``num_tokens * num_topk`` choices when routing is balanced; the result holds
    ``factor`` times as many, plus the padding of ``alignment``, and never more than a buffer that
    drops nothing would.

    Args:
      num_tokens: tokens on one rank.
      num_topk: choices per token.
      num_experts: experts on all ranks together.
      num_ranks: ranks along the expert axis.
      factor: load of the busiest rank that still fits, over the mean load.
      alignment: as given to ``make_plan``.

    Returns:
      Rows, at least 1, to pass to ``make_plan`` as ``capacity``.

    Raises:
      ValueError: a count or ``factor`` is not positive (``num_tokens`` may be 0), or
        ``num_experts`` is not a multiple of ``num_ranks``.

    Example:
      >>> suggest_capacity(4096, 8, 256, 8, factor=1.25)
      40960
    """
    check_positive("num_tokens", num_tokens + 1 if num_tokens == 0 else num_tokens)
    check_positive("num_topk", num_topk)
    check_positive("num_experts", num_experts)
    check_positive("num_ranks", num_ranks)
    check_positive("alignment", alignment)
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor must be a positive finite number; got {factor}.")
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a multiple of num_ranks ({num_ranks}); got {num_experts}."
        )
    wanted = math.ceil(factor * num_tokens * num_topk)
    wanted += padding_reserve(num_experts // num_ranks, alignment)
    lossless = lossless_capacity(num_tokens, num_topk, num_experts, num_ranks, alignment)
    return max(1, min(wanted, lossless))
