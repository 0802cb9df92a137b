"""What the library is compared with: slots for each expert, and XLA's ``all_to_all``."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing import slots_moe, uniform_routing

RANKS, TOKENS, EXPERTS, TOPK, HIDDEN, FFN = 4, 12, 8, 3, 16, 8


def arrays():
    rng = np.random.default_rng(0)
    topk_idx = uniform_routing(
        rng, num_ranks=RANKS, num_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK
    )
    shapes = ((HIDDEN, FFN), (HIDDEN, FFN), (FFN, HIDDEN))
    experts = (rng.standard_normal((RANKS, EXPERTS // RANKS, *s), np.float32) for s in shapes)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN), np.float32)
    return tuple(map(jnp.asarray, (x, topk_idx, rng.random(topk_idx.shape, np.float32), *experts)))


def by_slots(num_slots, num_experts=EXPERTS):
    layer = partial(slots_moe, num_experts=num_experts, num_slots=num_slots, axis_name="expert")
    return jax.jit(jax.vmap(layer, axis_name="expert"))(*arrays())


def test_with_room_for_all_it_is_the_layer():
    moe = partial(jax_ep.moe, num_experts=EXPERTS, axis_name="expert", implementation="xla")
    want, _ = jax.jit(jax.vmap(moe, axis_name="expert"))(*arrays())
    out, kept = by_slots(TOKENS)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    assert np.all(kept)


def test_first_choices_get_slots_before_second_ones():
    _, topk_idx, *_ = arrays()
    want = np.zeros(topk_idx.shape, bool)
    for rank in range(RANKS):
        left = np.full(EXPERTS, 3)
        for k, token in np.ndindex(TOPK, TOKENS):
            expert = topk_idx[rank, token, k]
            want[rank, token, k] = left[expert] > 0
            left[expert] -= 1
    _, kept = by_slots(3)
    np.testing.assert_array_equal(kept, want)
    assert not np.all(want)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1; got 0"),
        ({"num_slots": 1.5}, TypeError, "num_slots must be an int; got 1.5"),
        ({"num_slots": 1, "num_experts": 6}, ValueError, "a multiple of the 4 ranks; got 6"),
    ],
)
def test_errors(given, error, message):
    with pytest.raises(error, match=message):
        by_slots(**given)
