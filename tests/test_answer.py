"""The answers that the package carries with it, against the tests' own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import oracle

from jax_ep import _answer


def test_answers_are_the_oracles():
    rng = np.random.default_rng(0)
    for _ in range(100):
        num_ranks, num_local, num_tokens, num_topk = rng.integers((1, 1, 0, 1), (5, 4, 8, 4))
        alignment = int(rng.choice([1, 2, 4]))
        num_experts = int(num_ranks * num_local)
        capacity = int(num_local * (alignment - 1) + rng.integers(1, 30))
        topk_idx = rng.integers(-2, num_experts + 2, (num_ranks, num_tokens, num_topk))
        topk_idx = topk_idx.astype(np.int32)
        want = oracle.plan(topk_idx, num_experts, capacity, alignment)
        got = _answer.answer(topk_idx, num_experts, capacity, alignment)
        for name, field in got.fields.items():
            np.testing.assert_array_equal(
                field, np.broadcast_to(getattr(want, name), field.shape), name
            )
        np.testing.assert_array_equal(got.named(), want.named)
        x, dout = rng.standard_normal((2, num_ranks, num_tokens, 5)).astype(jnp.bfloat16)
        weights = rng.standard_normal(topk_idx.shape).astype(np.float32)
        rows = rng.standard_normal((num_ranks, capacity, 5)).astype(jnp.bfloat16)
        drows, dweights = oracle.combine_grad(rows, want, weights, dout)
        for mine, theirs in [
            (_answer.dispatched(x, got), oracle.dispatch(x, want)),
            (_answer.combined(rows, got), oracle.dispatch_grad(rows, want)),
            (_answer.combined(rows, got, weights), oracle.combine(rows, want, weights)),
            (_answer.dispatched(dout, got, weights), drows),
        ]:
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(_answer.dots(rows, got, dout), dweights, rtol=1e-5, atol=1e-5)


def test_some_tokens_are_answered_as_all_are():
    rng = np.random.default_rng(0)
    plan = _answer.answer(rng.integers(0, 8, (4, 6, 3), np.int32), 8, 12)
    rows = rng.standard_normal((4, 12, 5)).astype(np.float32)
    some = np.array([4, 1])
    got = _answer.combined(rows, plan.of_tokens(some))
    np.testing.assert_array_equal(got, _answer.combined(rows, plan)[:, some])
