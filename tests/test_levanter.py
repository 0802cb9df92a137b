"""The back-end for Levanter against the dense formula, in a ``shard_map`` as Levanter makes it."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep.integrations.levanter import moe_mlp_ep_jax_ep_local

TOKENS, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 48, 6, 4, 8, 2
NAMES = (
    "grug_moe_dispatch_input",
    "grug_moe_expert_hidden",
    "grug_moe_dispatch_output",
    "grug_moe_output",
)


def problem():
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.standard_normal((TOKENS, NUM_EXPERTS)), axis=1)[:, :NUM_TOPK]
    floats = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in (
            (TOKENS, HIDDEN),
            (TOKENS, NUM_TOPK),
            (NUM_EXPERTS, HIDDEN, 2 * FFN_HIDDEN),
            (NUM_EXPERTS, FFN_HIDDEN, HIDDEN),
        )
    ]
    return floats, chosen, rng.random(TOKENS) < 0.8, rng.standard_normal(floats[0].shape)


def over_mesh(capacity_factor=8.0, **options):
    """On a mesh of data and expert parallelism."""
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=kinds)
    tokens, experts = P(("data", "expert")), P("expert")

    def local(x, weights, w13, w2, chosen, valid):
        return moe_mlp_ep_jax_ep_local(
            x,
            chosen,
            weights,
            valid,
            w13,
            w2,
            activation_fn=jax.nn.silu,
            num_experts=NUM_EXPERTS,
            capacity_factor=capacity_factor,
            token_sharding_axes=("data", "expert"),
            **options,
        )

    in_specs = (tokens, tokens, experts, experts, tokens, tokens)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(tokens, P()))


def dense(x, weights, w13, w2, chosen, valid):
    both = jnp.einsum("th,ehf->tef", x, w13)
    inner = jax.nn.silu(both[..., :FFN_HIDDEN]) * both[..., FFN_HIDDEN:]
    outs = jnp.einsum("tef,efh->teh", inner, w2)
    picked = jnp.take_along_axis(outs, chosen[..., None], axis=1)
    return jnp.sum(jnp.where(valid[:, None], weights, 0)[..., None] * picked, axis=1)


def test_is_the_dense_formula_forward_and_backward():
    floats, chosen, valid, dout = problem()

    def both(f):
        out, pull = jax.vjp(lambda *floats: f(*floats, chosen, valid), *floats)
        return out, pull(dout.astype(np.float32))

    layer = over_mesh()
    got = jax.jit(lambda: both(lambda *args: layer(*args)[0]))()
    want = jax.jit(lambda: both(dense))()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    drops = jax.jit(lambda: layer(*floats, chosen, valid)[1])()
    assert int(drops.dropped) == 0


def test_what_finds_no_room_is_counted_and_padding_is_not():
    floats, _, valid, _ = problem()
    chosen = np.broadcast_to(np.array([0, 1]), (TOKENS, NUM_TOPK))  # all to one shard
    _, drops = jax.jit(over_mesh(capacity_factor=1.0))(*floats, chosen, valid)
    room = 2 * TOKENS // 8 * NUM_TOPK  # of the two shards that hold these experts
    by_group = valid.reshape(2, -1).sum(axis=1) * NUM_TOPK
    assert int(drops.sender_dropped) == sum(np.maximum(by_group - room // 2, 0))
    assert int(drops.sender_dropped) > 0
    assert int(drops.receiver_dropped) == 0


def test_under_its_remat_policy_a_gradient_repeats_no_exchange():
    floats, chosen, valid, _ = problem()
    layer = over_mesh()

    def count(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def forward(*floats):
            return jnp.sum(layer(*floats, chosen, valid)[0] ** 2)

        text = str(jax.make_jaxpr(jax.grad(forward))(*floats))
        return {op: len(re.findall(rf"\bop={op}\b", text)) for op in ("plan", "gather_rows")}

    plain = count(jax.checkpoint_policies.everything_saveable)
    assert count(jax.checkpoint_policies.save_only_these_names(*NAMES)) == plain
    assert count(jax.checkpoint_policies.nothing_saveable)["plan"] == 2


def test_errors():
    floats, chosen, valid, _ = problem()
    with pytest.raises(ValueError, match="capacity_factor must be positive; got 0"):
        over_mesh(capacity_factor=0)(*floats, chosen, valid)
    with pytest.raises(TypeError, match="token_valid_local must have dtype bool; got int32"):
        over_mesh()(*floats, chosen, valid.astype(np.int32))
