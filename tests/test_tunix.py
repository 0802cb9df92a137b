"""The body of Tunix's layer against the dense formula, in a ``shard_map`` as Tunix makes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep.integrations.tunix import sharded_jax_ep_moe

pytestmark = pytest.mark.long

BATCH, LENGTH, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 5, 6, 4, 8, 2
TOKENS = (BATCH, LENGTH)


def problem():
    rng = np.random.default_rng(0)
    shapes = {
        "inputs": (*TOKENS, HIDDEN),
        "weights": (*TOKENS, NUM_TOPK),
        "gate": (NUM_EXPERTS, HIDDEN, FFN_HIDDEN),
        "up": (NUM_EXPERTS, HIDDEN, FFN_HIDDEN),
        "down": (NUM_EXPERTS, FFN_HIDDEN, HIDDEN),
    }
    floats = [rng.standard_normal(shape).astype(np.float32) for shape in shapes.values()]
    indices = np.argsort(rng.standard_normal((*TOKENS, NUM_EXPERTS)))[..., :NUM_TOPK]
    dout = rng.standard_normal(shapes["inputs"]).astype(np.float32)
    return floats, indices, rng.random(TOKENS) < 0.8, dout


def over_mesh(tp, **options):
    """With Tunix's specs for training, where experts and sequences are cut over ``fsdp``."""
    mesh = jax.make_mesh((8 // tp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    tp_axis = "tp" if tp > 1 else None
    tokens, routing, mask = P("fsdp", None, tp_axis), P("fsdp"), P("fsdp")
    inward, outward = P("fsdp", None, tp_axis), P("fsdp", tp_axis, None)

    def body(inputs, weights, gate, up, down, indices, token_mask):
        return sharded_jax_ep_moe(
            inputs,
            weights,
            indices,
            gate,
            up,
            down,
            num_experts=NUM_EXPERTS,
            ep_axis="fsdp",
            tp_axis=tp_axis,
            token_mask=token_mask,
            **options,
        )

    in_specs = (tokens, routing, inward, inward, outward, routing, mask)
    # Tunix does not have JAX check what is equal along an axis.
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)


def dense(inputs, weights, gate, up, down, indices, mask):
    inner = jax.nn.silu(jnp.einsum("bth,ehf->btef", inputs, gate))
    inner *= jnp.einsum("bth,ehf->btef", inputs, up)
    outs = jnp.einsum("btef,efh->bteh", inner, down)
    picked = jnp.take_along_axis(outs, indices[..., None], axis=2)
    return jnp.sum(jnp.where(mask[..., None], weights, 0)[..., None] * picked, axis=2)


@pytest.mark.parametrize("tp", [1, 2])
def test_is_the_dense_formula_forward_and_backward(tp):
    floats, indices, mask, dout = problem()

    def both(f):
        out, pull = jax.vjp(lambda *floats: f(*floats, indices, mask), *floats)
        return out, pull(dout)

    got, want = jax.jit(lambda: both(over_mesh(tp)))(), jax.jit(lambda: both(dense))()
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_without_a_mask_all_are_tokens():
    floats, indices, _, _ = problem()
    out = sharded_jax_ep_moe(
        *floats[:2], indices, *floats[2:], num_experts=NUM_EXPERTS, ep_axis=None, tp_axis=None
    )
    np.testing.assert_allclose(out, dense(*floats, indices, np.full(TOKENS, True)), atol=1e-5)


def test_what_finds_no_room_is_dropped():
    floats, _, _, _ = problem()
    indices = np.broadcast_to(np.array([0, 4]), (*TOKENS, NUM_TOPK))  # two shards of four do all
    mask = np.full(TOKENS, True)
    out = jax.jit(over_mesh(2, capacity_factor=0.5))(*floats, indices, mask)
    # Each has half the mean of a shard's choices: that of 10 tokens, of 40 who ask.
    assert np.count_nonzero(np.any(np.asarray(out) != 0, axis=-1)) == 10


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("token_mask", np.ones(TOKENS, np.int32), TypeError, "have dtype bool; got int32"),
        ("token_mask", np.ones(TOKENS[:1], bool), ValueError, r"\[batch, length\] = \[8, 5\]"),
        ("indices", np.zeros((BATCH, LENGTH)), ValueError, r"\[batch, length, num_topk\]; got"),
        ("indices", np.zeros((BATCH, 1, NUM_TOPK)), ValueError, r"= \[8, 5, 2\]; got \[8, 1, 2\]"),
        ("weights", np.zeros((BATCH, LENGTH, 1)), ValueError, r"= \[8, 5, 2\]; got \[8, 5, 1\]"),
        ("inputs", np.zeros((BATCH, HIDDEN)), ValueError, r"\[batch, length, local_hidden\]; got"),
    ],
)
def test_errors(name, value, error, message):
    floats, indices, mask, _ = problem()
    arrays = {"inputs": floats[0], "weights": floats[1], "indices": indices, "token_mask": mask}
    weights = dict(zip(("gate_w", "up_w", "down_w"), floats[2:], strict=True))
    arrays[name] = value
    with pytest.raises(error, match=f"{name} must .*{message}"):
        sharded_jax_ep_moe(**arrays, **weights, num_experts=NUM_EXPERTS, ep_axis=None, tp_axis=None)
