"""MaxText's blocks with this library inside, against their own dense path; what they hand out."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BATCH, LENGTH, NUM_EXPERTS, NUM_TOPK, Block, dense, ours
from compare import assert_close

DEEPSEEK = ("deepseek3-671b", {"n_routing_groups": 4, "topk_routing_group": 2})
# Where nothing is said, on fsdp 2 x expert 4.
CASES = {
    "mixtral": ("mixtral-8x7b", {}),
    "mixtral_context": (
        "mixtral-8x7b",
        # Experts lie along both axes.
        {
            "ici_fsdp_parallelism": 1,
            "ici_context_parallelism": 2,
            "custom_mesh_and_rule": "cp-as-ep",
        },
    ),
    "qwen3_moe": (
        "qwen3-30b-a3b",
        {"num_experts_per_tok": 4, "prefuse_moe_weights": True, "check_vma": True},
    ),
    "gpt_oss": ("gpt-oss-20b", {}),
    "gpt_oss_tensor": ("gpt-oss-20b", {"ici_expert_parallelism": 2, "ici_tensor_parallelism": 2}),
    # Of the other loss MaxText's dense path makes one of other scores: see below.
    "deepseek3": (
        DEEPSEEK[0],
        {**DEEPSEEK[1], "moe_use_megatron_seq_aux_loss": True, "shard_mode": "explicit"},
    ),
    "llama4": ("llama4-17b-16e", {"num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_is_maxtexts_dense_path_forward_and_backward(name):
    model_name, options = CASES[name]
    block = Block(model_name, **options)
    with ours():
        (out, loss, updates), grads = block.run_with_gradients()
    with dense():
        (want, want_loss, _), want_grads = block.run_with_gradients()
    assert_close({"out": out, **grads}, {"out": want, **want_grads})
    assert updates is None
    if want_loss is None:
        assert loss is None
    else:
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)


@pytest.fixture(scope="module")
def block():
    return Block("mixtral-8x7b")


def choices(*experts):
    """Has all tokens choose the same experts."""
    return np.broadcast_to(np.array(experts, np.int32), (BATCH, LENGTH, NUM_TOPK)).copy()


def test_pure_jax_carries_it_too(block):
    def lowered():
        with block.context():
            return jax.jit(block.apply).lower(block.state, block.x).as_text()

    with ours(implementation="native"):
        assert "jax_ep_" in lowered()
    with ours(implementation="xla"):
        assert "jax_ep_" not in lowered()
        (out, _, _), _ = block.run()
    with dense():
        (want, _, _), _ = block.run()
    assert_close({"out": out}, {"out": want})


def test_choices_made_elsewhere_go_where_they_say():
    # More than the experts of a rank, so that a buffer for distinct ones would not hold them.
    block = Block("mixtral-8x7b", num_experts_per_tok=8)
    chosen = np.random.default_rng(1).integers(-1, NUM_EXPERTS, (BATCH, LENGTH, 8))
    chosen[0] = -1  # a sequence of padding
    chosen[1:4] = 3  # all choices of a token, and all tokens of three ranks of four
    forced = jnp.asarray(chosen, jnp.int32)
    with ours():
        (out, _, _), logged = block.run(forced_routed_experts=forced)
    with dense():
        (want, _, _), _ = block.run(forced_routed_experts=forced)
    assert_close({"out": out}, {"out": want})
    assert not np.any(out[0])
    assert not np.any(logged["moe_has_overflow"][0])


def test_a_single_sequence_is_decoded(block):
    x = block.x[:1]
    with ours():
        (out, _, _), _ = block.run(x)
    with dense():
        (want, _, _), _ = block.run(x)
    assert_close({"out": out}, {"out": want})


@pytest.mark.parametrize("force_dropless", [False, True])
def test_the_buffer_is_as_large_as_the_factor_says(force_dropless):
    block = Block("mixtral-8x7b", force_dropless, ragged_buffer_factor=1.0)
    with ours():
        (out, _, _), logged = block.run(forced_routed_experts=choices(0, 1))
    served = np.any(np.asarray(out) != 0, axis=-1)
    # A rank that is asked by all four has room for a quarter: the first choice of half the tokens.
    assert np.count_nonzero(served) == BATCH * LENGTH // (1 if force_dropless else 2)
    [flags] = logged["moe_has_overflow"]
    np.testing.assert_array_equal(flags, np.full(8, not force_dropless))


def test_loads_are_logged_where_they_are_asked_for():
    ring = {"use_ring_of_experts": True, "use_ragged_sort": True}
    asked = {"log_required_ragged_buffer_factor": True, "moe_log_max_load_ratio": True}
    block = Block("mixtral-8x7b", **ring, **asked)
    chosen = choices(0, 8)
    chosen[: BATCH // 2] = 0  # those of one fsdp shard all ask its first rank
    with ours():
        _, logged = block.run(forced_routed_experts=chosen)
    assert float(logged["moe_required_rbf"][0]) == 4.0
    assert float(logged["moe_max_load_ratio"][0]) == 4.0


@pytest.mark.parametrize("steps", [1, 2])
def test_the_routers_bias_is_told_what_to_become(steps):
    options = {"routed_bias_update_rate": 0.5, "gradient_accumulation_steps": steps}
    block = Block(DEEPSEEK[0], **DEEPSEEK[1], **options)
    with ours():
        (_, _, updates), _ = block.run()
    with dense():
        (_, _, want), _ = block.run()
    assert np.any(np.asarray(want) > 0)
    np.testing.assert_array_equal(updates, want)


def test_the_loss_is_of_scores_without_the_routers_bias():
    block = Block(DEEPSEEK[0], **DEEPSEEK[1])
    with ours():
        (_, loss, _), _ = block.run()
    biased, scores, chosen = block.route()
    assert not np.allclose(scores, biased)
    share = jax.nn.one_hot(chosen, NUM_EXPERTS).sum(axis=2).mean(axis=1) / NUM_TOPK
    mean = jax.nn.softmax(scores, axis=-1).mean(axis=1)
    weight = block.config.load_balance_loss_weight
    np.testing.assert_allclose(loss, weight * NUM_EXPERTS**2 * jnp.mean(share * mean), rtol=1e-6)


def test_under_its_remat_policies_a_gradient_repeats_no_exchange(block):
    policies = jax.checkpoint_policies

    def count(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def forward(state, x):
            return jnp.sum(block.apply(state, x)[0][0] ** 2)

        with ours(), block.context():
            text = str(jax.make_jaxpr(jax.grad(forward, argnums=1))(block.state, block.x))
        return {op: len(re.findall(rf"\bop={op}\b", text)) for op in ("plan", "gather_rows")}

    plain = count(policies.everything_saveable)
    sorted_rows = policies.save_only_these_names("moe_x_sorted", "moe_mlpwo")
    assert count(sorted_rows) == plain
    assert count(policies.nothing_saveable) == {op: n + 1 for op, n in plain.items()}
    maps = policies.save_only_these_names("moe_routing_maps")
    assert count(maps) == {**plain, "gather_rows": plain["gather_rows"] + 1}
