"""The example's named models, gradient accumulation, and going on from a checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from example import (
    SMALL,
    architectures,
    corpus,
    flagsaver,
    model,
    program,
    text,
    train,
    training,
    ways,
)
from flax import nnx

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("standard_promotion")]

SIGMOID = architectures.ROUTERS["sigmoid"]


@pytest.mark.parametrize("name", ["olmoe", "deepseek-v3"])
def test_an_architecture_trains_as_its_dense_formula(name):
    sizes = {"hidden": 32, "ffn_hidden": 16, "num_layers": 1, "num_heads": 2}
    config = architectures.make_config(name, sizes | {"implementation": "xla"})
    dense = dataclasses.replace(config, implementation="dense")
    (history, trained), (want, _) = (train(c, num_steps=4) for c in (config, dense))
    np.testing.assert_allclose(history.loss, want.loss, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(history.expert_load[0], want.expert_load[0])
    bias = getattr(trained.blocks[0].moe, "router_bias", None)
    assert (bias is not None and bool(np.any(bias[...]))) == (name == "deepseek-v3")


def test_flags_change_what_an_architecture_says():
    with flagsaver(architecture="deepseek-v3"):
        config = program.make_config()
        assert (config.num_experts, config.num_topk, config.router.num_groups) == (32, 4, 4)
        assert (config.router.scale, config.shared_hidden) == (2.5, 40)
    with flagsaver(architecture="olmoe", num_experts=16, router="sigmoid"):
        config = program.make_config()
    assert (config.num_experts, config.num_topk, config.router) == (16, 8, SIGMOID)
    routers = {name: architectures.make_config(name, {}).router for name in architectures.NAMES}
    assert [name for name, router in routers.items() if not router.renormalize] == ["olmoe"]
    assert program.make_config().num_experts == model.Config().num_experts


def test_the_layer_by_all_to_all_is_the_dense_formula():
    config = model.Config(hidden=16, ffn_hidden=8, num_experts=8, shared_hidden=4)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=auto)
    with jax.set_mesh(mesh):
        state = nnx.state(model.make_moe(config, rngs=nnx.Rngs(0)))
        x = jax.random.normal(jax.random.key(0), (8, 16, 16))
        layers = ways.layers(config, mesh)
        (out, dropped), (want, _) = (
            jax.jit(layers[name])(state, x) for name in ("all_to_all", "dense")
        )
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert dropped == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts": 10, "mesh": "4x2"}, "--num_experts must be a multiple of 4; got 10"),
        ({"num_topk": 17}, "--num_topk must be at most 16; got 17"),
        ({"batch": 24, "accumulate": 2}, "--batch must be a multiple of 16; got 24"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_a_router_of_groups(given, message):
    saved = flagsaver(architecture="deepseek-v3", **given)
    with saved, pytest.raises(program.app.UsageError, match=message):
        program.make_mesh(program.make_config())


def test_parts_of_a_batch_add_up_to_it():
    """Without a capacity, and with no loss but that of the bytes, nothing looks at a part."""
    config = model.Config(**SMALL | {"num_layers": 1}, router=SIGMOID, implementation="xla")
    transformer = model.Transformer(config, rngs=nnx.Rngs(0))
    unembedding = transformer.unembedding
    unembedding[...] = jax.random.normal(jax.random.key(0), unembedding.shape)
    tokens = text.draw_windows(corpus().train, np.random.default_rng(0), 16, 9)
    (want, whole), (got, parts) = (
        nnx.jit(partial(training.gradients, config, accumulate))(transformer, tokens)
        for accumulate in (1, 4)
    )
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_array_equal(parts.expert_load, whole.expert_load)
    np.testing.assert_array_equal(parts.rank_load, whole.rank_load)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = np.abs(want_leaf).max()
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-3, atol=1e-5 * size)


def test_parts_train():
    """Over a mesh, in the step as it is compiled."""
    config = model.Config(**SMALL | {"num_layers": 1}, capacity_factor=1.0, implementation="xla")
    history, _ = train(config, num_steps=4, accumulate=2)
    assert history.loss[-1] < history.loss[0] - 0.05
    assert np.all(history.expert_load.sum(axis=-1) == 16 * 32 * 2)
    assert np.all(history.dropped < 1)


def run(tmp_path, **given):
    """Trains by flags; returns what it trained."""
    small = SMALL | {"num_layers": 1, "batch": 8, "seq_len": 16, "steps": 4}
    small |= {"checkpoint_every": 2, "checkpoint_dir": str(tmp_path / "checkpoints")}
    with flagsaver(**small | given):
        config = program.make_config()
        mesh = program.make_mesh(config)
        with jax.set_mesh(mesh):
            return program.train(config, program.make_options(config), corpus(), mesh)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    flags = {"router": "sigmoid", "capacity_factor": 0.0, "implementation": "xla"}
    whole = run(tmp_path, **flags)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    resumed = run(tmp_path, **flags, resume=True)
    assert (resumed.first_step, len(resumed.history.loss)) == (2, 2)
    for got, want in zip(resumed.history, whole.history, strict=True):
        np.testing.assert_array_equal(got, want[2:])
    for got, want in zip(*map(jax.tree.leaves, (resumed.state, whole.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    moved = run(tmp_path, **flags, resume=True, mesh="1x8")
    assert moved.history.rank_load.shape == (2, 1, 8)
    np.testing.assert_allclose(moved.history.loss, whole.history.loss[2:], rtol=1e-5)
    # What the checkpoint holds now is of the last step.
    for given, message in (
        ({}, "--resume: the checkpoint is of step 4: nothing is left of 4."),
        ({"steps": 8, "num_experts": 16}, "another model: num_experts is 8, not 16"),
        ({"checkpoint_dir": str(tmp_path / "none")}, "there is no checkpoint in .*none"),
        ({"checkpoint_dir": None}, "--resume needs the --checkpoint_dir to go on from; got none"),
    ):
        with pytest.raises(program.app.UsageError, match=message):
            run(tmp_path, **flags | given, resume=True)
