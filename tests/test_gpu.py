"""What only a GPU shows beyond the table of rows: programs that are replayed."""

from __future__ import annotations

import jax
import numpy as np
from implementations import ALL_ROWS, VMAP, Row
from layers import SHAPE, Problem, close

import jax_ep

REPLAYS = 1000


def gpu_row() -> Row:
    (row,) = (row for row in ALL_ROWS if row.platform == "gpu" and row.fabric is VMAP)
    row.require()
    return row


def test_replays_with_changing_inputs() -> None:
    """Recorded once into a CUDA graph, where XLA does so, and run again on other choices."""
    row = gpu_row()

    def there_and_back(x, topk_idx, weights):
        plan = row.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)

    program = row.jit(there_and_back, SHAPE.num_ranks)
    operands, results = [], []
    for seed in range(8):
        problem = Problem.of(seed)
        kept = SHAPE.plan(problem.topk_idx).kept
        want = np.where(kept, problem.weights, 0).sum(axis=2, keepdims=True) * problem.x
        operands.append(jax.device_put(problem.args[:3]))
        results.append(np.asarray(program(*operands[-1])))
        close(results[-1], want)
    assert len({result.tobytes() for result in results}) == len(results)
    for turn in range(REPLAYS):
        i = turn * 5 % len(operands)
        np.testing.assert_array_equal(np.asarray(program(*operands[i])), results[i])
