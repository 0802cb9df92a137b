"""Same inputs, same bits: every run, on every fabric, forward and backward."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
import pytest
from implementations import ALL_ROWS, EMULATED, FABRIC, ROWS, Row
from strategies import Shape

import jax_ep

SHAPE = Shape(num_ranks=4, num_tokens=16, num_topk=4, num_experts=16, hidden=33, capacity=70)
ROUTINGS = 100
RUNS = {"native": 2 if EMULATED else 20, "xla": 5}


def routings() -> list[tuple[np.ndarray, ...]]:
    """Draws routings with values on which any other order of adding up gives other bits."""
    rng = np.random.default_rng(12)
    width = (*SHAPE.topk_shape[:2], SHAPE.hidden)
    return [
        (
            rng.integers(-1, SHAPE.num_experts, SHAPE.topk_shape, np.int32),
            (rng.normal(size=width) * 10.0 ** rng.integers(-3, 4, width)).astype(np.float32),
            rng.normal(size=SHAPE.topk_shape).astype(np.float32),
            rng.normal(size=width).astype(np.float32),
        )
        for _ in range(ROUTINGS)
    ]


def per_rank(row: Row):
    def f(topk_idx, x, weights, dout):
        plan = row.make_plan(
            topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity, alignment=2
        )

        def there_and_back(x, weights):
            rows = jax_ep.dispatch(x, plan)
            return jax_ep.combine(rows * (1 + rows), plan, weights), rows

        out, pull, rows = jax.vjp(there_and_back, x, weights, has_aux=True)
        return plan.group_sizes, plan.kept, rows, out, pull(dout)

    return f


def digest(program, inputs: list[tuple[np.ndarray, ...]]) -> str:
    sha = hashlib.sha256()
    for result in [program(*arrays) for arrays in inputs]:
        for array in jax.tree.leaves(result):
            sha.update(np.asarray(array).tobytes())
    return sha.hexdigest()


@pytest.mark.long
def test_one_hash(implementation: str) -> None:
    """Several runs of a hundred routings, in ``shard_map`` and under ``vmap``."""
    # As it is used: with all of the compiler's optimizations.
    options: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
    if jax.__version_info__ < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = True
    inputs = routings()
    hashes = {}
    for row in ALL_ROWS if FABRIC else ROWS:
        here = "emulated" if EMULATED else jax.default_backend()
        if row.platform != here or not row.serves(SHAPE.num_ranks):
            continue
        if row.implementation == implementation:
            f = jax.jit(row.over_ranks(per_rank(row), SHAPE.num_ranks), compiler_options=options)
            hashes[str(row)] = {digest(f, inputs) for _ in range(RUNS[implementation])}
    assert len(hashes) >= 2, "several fabrics should serve"
    assert {name: len(seen) for name, seen in hashes.items()} == dict.fromkeys(hashes, 1)
    if len(set.union(*hashes.values())) != 1:
        pytest.fail(f"the fabrics differ: {hashes}")
