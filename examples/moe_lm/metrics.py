"""What a step of training reports, and what follows from that."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Float32, Int32


class Metrics(NamedTuple):
    """A step's, or, with an axis of steps in front, those of a run; loads are before its update.

    Attributes:
      loss: bits per byte.
      expert_load: choices of each expert.
      rank_load: choices asked of each device's experts, once these are lent.
      dropped_by_choice: which part of the first choices got no row, of the second, and so on.
    """

    loss: Float32[Any, "*steps"]
    expert_load: Int32[Any, "*steps num_layers num_experts"]
    rank_load: Int32[Any, "*steps num_layers num_ranks"]
    dropped_by_choice: Float32[Any, "*steps num_layers num_topk"]

    @property
    def busiest_expert(self) -> Float[Any, "*steps num_layers"]:
        """The load of the busiest expert, over the mean."""
        return max_over_mean(self.expert_load)

    @property
    def busiest_rank(self) -> Float[Any, "*steps num_layers"]:
        """The load of the busiest device, over the mean."""
        return max_over_mean(self.rank_load)

    @property
    def dropped(self) -> Float[Any, "*steps num_layers"]:
        """Which part of all choices got no row: every token has as many."""
        return self.dropped_by_choice.mean(axis=-1)


def max_over_mean(load: Any) -> Any:
    """Returns the largest load over the mean one, along the last axis."""
    return load.max(axis=-1) / load.mean(axis=-1)
