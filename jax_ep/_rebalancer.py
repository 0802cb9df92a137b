"""``Rebalancer``: remembers what experts were asked for, and says when to place them anew."""

import dataclasses

import numpy as np
from jaxtyping import Float64, Num

from jax_ep._checks import check_positive
from jax_ep._eplb import eplb
from jax_ep._placement import Placement


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A placement by the loads so far, and what it would change if experts were asked for alike.

    Attributes:
      placement: as ``eplb`` makes it.
      before: load of the busiest rank over the mean, as experts are placed now; 0 without any load.
      after: likewise as proposed.
      num_moved: slots whose expert is on their rank in no slot now, so that it has to come from
        another.
      pays: whether ``before`` exceeds ``after`` by the threshold.
    """

    placement: Placement
    before: float
    after: float
    num_moved: int
    pays: bool


class Rebalancer:
    """Remembers the loads of experts, older ones less, and proposes where to place them.

    On the host, beside the program: give it the load of each step, or of some, and ask it every so
    many steps. It is deterministic: processes that give it the same loads get the same proposals.

    Attributes:
      load: what it remembers, for checkpoints: ``[num_experts]`` in float64, all 0 at first.

    Example:
      >>> import jax_ep
      >>> rebalancer = jax_ep.Rebalancer(num_experts=4, num_slots=6, num_ranks=3)
      >>> rebalancer.update([90, 30, 20, 10])
      >>> proposal = rebalancer.propose(jax_ep.Placement.of([0, 1, 0, 2, 2, 3], num_experts=4))
      >>> proposal.placement.slot_experts.tolist(), proposal.num_moved, proposal.pays
      ([0, 1, 0, 2, 0, 3], 1, True)
      >>> f"{proposal.before:.2f} {proposal.after:.2f}"
      '1.50 1.20'
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        num_ranks: int,
        *,
        ranks_per_node: int | None = None,
        decay: float = 0.9,
        threshold: float = 0.05,
    ) -> None:
        """Begins without any load.

        Args:
          num_experts: experts, before they are placed.
          num_slots: as for ``eplb``.
          num_ranks: as for ``eplb``.
          ranks_per_node: as for ``eplb``.
          decay: what each update leaves of the loads before it, from 0 to 1: 0.9 remembers some ten
            updates.
          threshold: by which share the busiest rank's load has to shrink for a proposal to pay:
            0.05 asks for ``before >= 1.05 * after``.

        Raises:
          TypeError: a count is not an int.
          ValueError: ``decay`` or ``threshold`` is out of its range, or ``eplb`` refuses a count.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie within 0 to 1; got {decay}.")
        if not 0 <= threshold < np.inf:
            raise ValueError(f"threshold must be finite and at least 0; got {threshold}.")
        check_positive("num_experts", num_experts)
        self.load: Float64[np.ndarray, "num_experts"] = np.zeros(num_experts)
        self._num_slots, self._num_ranks = num_slots, num_ranks
        self._ranks_per_node = ranks_per_node
        self._decay, self._threshold = decay, threshold
        self._plan()

    def update(self, load: Num[np.ndarray, "num_experts"]) -> None:
        """Adds what experts were asked for to what is left of what they were asked for before.

        Args:
          load: of experts, not of slots: ``expert_load`` of a plan over experts, or ``fold`` of
            that of a plan over slots. It is waited for; that of an earlier step is there.

        Raises:
          ValueError: it is not ``[num_experts]``, or holds something negative or not finite.
        """
        given = np.asarray(load, np.float64)
        if given.shape != self.load.shape:
            raise ValueError(
                f"load must have shape [num_experts] = {list(self.load.shape)}, so fold that of "
                f"slots; got {list(given.shape)}."
            )
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ValueError("load must be finite and not negative; got something else.")
        self.load = self._decay * self.load + given

    def propose(self, placement: Placement) -> Proposal:
        """Proposes a placement by the loads so far, and says what it would change.

        Args:
          placement: as experts are placed now, in any number of slots that the ranks divide.

        Returns:
          The proposal. It reckons that all copies of an expert are asked for as often, and that
          experts will be as they were: loads that drift leave more than ``after``.

        Raises:
          TypeError: ``placement`` is not a ``Placement``.
          ValueError: it is of another number of experts, or the ranks do not divide its slots.
        """
        if not isinstance(placement, Placement):
            raise TypeError(
                f"placement must be a jax_ep.Placement; got {type(placement).__name__}."
            )
        if placement.num_experts != self.load.size or placement.num_slots % self._num_ranks:
            raise ValueError(
                f"placement must have {self.load.size} experts in a multiple of {self._num_ranks} "
                f"slots; got {placement.num_experts} in {placement.num_slots}."
            )
        proposed = self._plan()
        before, after = self._busiest_over_mean(placement), self._busiest_over_mean(proposed)
        return Proposal(
            placement=proposed,
            before=before,
            after=after,
            num_moved=self._count_moved(placement, proposed),
            pays=before > after and before >= (1 + self._threshold) * after,
        )

    def _plan(self) -> Placement:
        return eplb(
            self.load, self._num_slots, self._num_ranks, ranks_per_node=self._ranks_per_node
        )

    def _by_rank(self, placement: Placement) -> np.ndarray:
        return np.asarray(placement.slot_experts).reshape(self._num_ranks, -1)

    def _busiest_over_mean(self, placement: Placement) -> float:
        a_copy = self.load / np.asarray(placement.num_copies)
        by_rank = a_copy[self._by_rank(placement)].sum(axis=1)
        return float(by_rank.max() / by_rank.mean()) if by_rank.any() else 0.0

    def _count_moved(self, old: Placement, new: Placement) -> int:
        pairs = zip(self._by_rank(old), self._by_rank(new), strict=True)
        return sum(int((~np.isin(wanted, there)).sum()) for there, wanted in pairs)
