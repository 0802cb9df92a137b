"""How even lent experts leave steps of skewed routing: the busiest rank's load over the mean.

Steps are those of ``routing_steps``. Nothing is timed, so that the machine is no matter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import routing_steps
import timing
from absl import app, flags

from jax_ep._lend import lend, most_rows

_NUM_EXPERTS, _NUM_TOPK, _TOKENS = 256, 8, 2048
_NUM_RANKS, _EXPONENTS = (8, 16, 32, 64), (0.0, 0.3, 0.65, 1.0)
_SETTINGS = ((1, 0.0), (2, 0.0), (2, 0.05), (2, 0.25), (3, 0.0))

_steps = flags.DEFINE_integer("steps", 625, "Steps of each of 16 kinds.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "Few steps: does it all still run?")


def loads_of(exponent: float, num_steps: int, seed: int) -> np.ndarray:
    """Returns the load of each expert in each step [num_steps, num_experts]."""
    rng = np.random.default_rng(seed)
    steps = routing_steps.popularities(rng, num_steps, _NUM_EXPERTS, exponent)
    drawn = (routing_steps.choices(rng, log, _TOKENS, _NUM_TOPK) for log in steps)
    counts = [np.bincount(topk_idx.ravel(), minlength=_NUM_EXPERTS) for topk_idx in drawn]
    return np.stack(counts).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def balanced(load: jax.Array, num_ranks: int, num_spares: int, slack: float):
    """Returns the rows of the busiest rank, and how many experts are lent."""
    most = most_rows(load, num_ranks, num_ranks, slack, None)
    loans = lend(load, most, num_spares=num_spares, ranks_per_node=num_ranks)
    own = jnp.sum(loans.left.reshape(num_ranks, -1), axis=1)
    lent = jnp.sum(loans.rows > 0)
    lender = jnp.where(loans.rows > 0, loans.expert // (len(load) // num_ranks), num_ranks)
    given = jnp.bincount(lender.ravel(), length=num_ranks + 1)[:num_ranks]
    return jnp.max(own + jnp.sum(loans.rows, axis=1)), lent, jnp.max(given)


def measure(num_steps: int) -> list[dict[str, float]]:
    """Returns one record for each number of ranks, skew and setting."""
    records = []
    for i, num_ranks in enumerate(_NUM_RANKS):
        for j, exponent in enumerate(_EXPONENTS):
            loads = loads_of(exponent, num_steps, seed=10 * i + j)
            mean = loads.sum(axis=1) / num_ranks
            before = loads.reshape(num_steps, num_ranks, -1).sum(axis=2).max(axis=1) / mean
            for num_spares, slack in _SETTINGS:
                busiest, lent, given = balanced(loads, num_ranks, num_spares, slack)
                # A mean that is no integer is rounded up.
                after = np.asarray(busiest) / np.ceil(mean)
                records.append(
                    {
                        "bench": "balance",
                        "num_ranks": num_ranks,
                        "exponent": exponent,
                        "num_spares": num_spares,
                        "slack": slack,
                        "steps": num_steps,
                        "before_median": round(float(np.median(before)), 3),
                        "before_worst": round(float(before.max()), 3),
                        "after_median": round(float(np.median(after)), 4),
                        "after_worst": round(float(after.max()), 4),
                        "steps_over": int(np.sum(after > 1 + slack)),
                        "lent_per_rank": round(float(np.mean(lent)) / num_ranks, 3),
                        "most_from_one_rank": int(np.max(given)),
                    }
                )
    return records


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    records = measure(3 if _quick.value else _steps.value)
    columns = ("num_ranks", "exponent", "num_spares", "slack", "before_median", "before_worst")
    columns += ("after_median", "after_worst", "steps_over", "lent_per_rank", "most_from_one_rank")
    title = f"busiest rank over mean, E={_NUM_EXPERTS} K={_NUM_TOPK}, {_steps.value} steps a row"
    timing.print_table(title, columns, [[record[name] for name in columns] for record in records])
    for num_spares, slack in _SETTINGS:
        rows = [r for r in records if (r["num_spares"], r["slack"]) == (num_spares, slack)]
        over, total = (sum(int(r[name]) for r in rows) for name in ("steps_over", "steps"))
        print(f"{num_spares} spares, slack {slack}: {over} of {total} steps over their limit")
    for record in records:
        timing.print_json(record)


if __name__ == "__main__":
    app.run(main)
