"""Plays traces of drifting loads through ``eplb``: how busy the busiest rank stays.

No exchange runs: choices are drawn, placed by the placement of the time, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import routing_steps
import timing
from absl import app, flags

import jax_ep

_EXPERTS, _TOPK = 256, 8
_CASES = ((8, 0.65), (32, 0.3), (32, 0.65), (32, 1.0))

_steps = flags.DEFINE_integer("steps", 40, "Steps of each trace.", lower_bound=2)
_tokens = flags.DEFINE_integer("tokens", 1024, "Tokens on each rank.", lower_bound=1)
_every = flags.DEFINE_integer("every", 8, "Steps from one placement to the next.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "One case of a few steps: does it all still run?")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How experts are placed: in how many slots, and whether once or every so many steps."""

    name: str
    num_spares: int
    is_placed: bool = True


_POLICIES = (
    Policy("as they are", 0, is_placed=False),
    Policy("eplb, no spare slots", 0),
    Policy("eplb, 32 spare slots", 32),
)


def trace(num_ranks: int, exponent: float, num_steps: int) -> Iterator[np.ndarray]:
    """Yields the choices of all ranks at each step."""
    rng = np.random.default_rng(0)
    for log in routing_steps.popularities(rng, num_steps, _EXPERTS, exponent):
        drawn = routing_steps.choices(rng, log, num_ranks * _tokens.value, _TOPK)
        yield drawn.reshape(num_ranks, _tokens.value, _TOPK)


def play(policy: Policy, num_ranks: int, steps: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns how busy the busiest rank is over the mean, and what had to be moved."""
    rebalancer = jax_ep.Rebalancer(_EXPERTS, _EXPERTS + policy.num_spares, num_ranks)
    placement = jax_ep.Placement.of(np.arange(_EXPERTS), _EXPERTS)
    program = jax.jit(
        jax.vmap(
            lambda topk_idx, placement: jax_ep.place(topk_idx, placement, axis_name="expert"),
            in_axes=(0, None),
            axis_name="expert",
        )
    )
    ratios, num_moved = [], 0
    for step, topk_idx in enumerate(steps):
        if policy.is_placed and step % _every.value == 0 and step:
            proposal = rebalancer.propose(placement)
            placement, num_moved = proposal.placement, num_moved + proposal.num_moved
        slots = np.asarray(program(topk_idx, placement))
        load = np.bincount(slots.ravel(), minlength=placement.num_slots)
        # Before the first placement there is none to judge.
        if step >= _every.value:
            by_rank = load.reshape(num_ranks, -1).sum(axis=1)
            ratios.append(by_rank.max() / by_rank.mean())
        rebalancer.update(np.bincount(topk_idx.ravel(), minlength=_EXPERTS))
    return {
        "policy": policy.name,
        "median": round(float(np.median(ratios)), 3),
        "worst": round(float(np.max(ratios)), 3),
        "moved_a_rank_and_step": round(num_moved / num_ranks / len(steps), 2),
    }


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    cases, num_steps = _CASES, _steps.value
    if _quick.value:
        cases, num_steps = cases[:1], _every.value + 2
    for num_ranks, exponent in cases:
        steps = list(trace(num_ranks, exponent, num_steps))
        results = [play(policy, num_ranks, steps) for policy in _POLICIES]
        timing.print_table(
            f"busiest rank over the mean: {num_ranks} ranks, Zipf {exponent}",
            [*results[0]],
            [[*result.values()] for result in results],
        )
        for result in results:
            case = {"bench": "placement", "num_ranks": num_ranks, "exponent": exponent}
            timing.print_json(case | result)


if __name__ == "__main__":
    app.run(main)
