"""Placements that tell rules for copies apart: 8 experts in 12 slots, on 4 ranks."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from implementations import SHARD_MAP, VMAP
from strategies import Shape

import jax_ep

SHAPE = Shape()
NUM_SLOTS = 12
IN_SLOTS = {
    "eplb": jax_ep.eplb([9, 0, 3, 3, 1, 5, 2, 8], NUM_SLOTS, 4).slot_experts,
    # Expert 0 is on one rank of each node, and expert 7 on both of the second alone.
    "even_on_nodes": [0, 1, 2, 3, 4, 5, 0, 6, 7, 1, 7, 2],
    # Expert 0 is on both ranks of the first node, and on one of the second.
    "uneven_on_nodes": [0, 1, 2, 0, 3, 4, 0, 5, 6, 7, 1, 2],
    "two_on_a_rank": [0, 0, 1, 0, 2, 3, 4, 5, 6, 7, 1, 2],
    "all_of_one": [3, 3, 3, 3, 0, 1, 2, 4, 5, 6, 7, 3],
}
PLACEMENTS = {name: jax_ep.Placement.of(slots, 8) for name, slots in IN_SLOTS.items()}
FABRICS = pytest.mark.parametrize("fabric", [SHARD_MAP, VMAP], ids=lambda fabric: fabric.name)


def everywhere(tree):
    """Returns arrays that are equal on all ranks, with an axis of these."""
    return jax.tree.map(lambda a: np.stack([a] * SHAPE.num_ranks), tree)
