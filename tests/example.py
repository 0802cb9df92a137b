"""The example in ``examples/``, loaded, and what its tests train."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

for _name in ("optax", "matplotlib", "tqdm", "orbax.checkpoint"):
    pytest.importorskip(_name, reason="the example needs the extra 'examples'")
flagsaver = pytest.importorskip("absl.testing.flagsaver", reason="likewise").flagsaver

# A program and its parts, not an installed package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
program = importlib.import_module("train_moe_lm")
program.flags.FLAGS(["train_moe_lm.py"])
architectures, meshes, metrics, model, report, text, training, ways = (
    importlib.import_module(f"moe_lm.{name}")
    for name in (
        "architectures", "meshes", "metrics", "model", "report", "text", "training", "ways"
    )
)  # fmt: skip
DenseMoE = importlib.import_module("moe_lm.dense").DenseMoE

SMALL = {"num_layers": 2, "hidden": 32, "num_heads": 2, "ffn_hidden": 24, "num_experts": 8}
NUM_STEPS = 20


@functools.cache
def corpus():
    return text.read_corpus(1_000_000)


def train(config, num_steps=NUM_STEPS, accumulate=1):
    """Trains from one start on one sequence of batches; returns the metrics and the model."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=auto)
    rng, history = np.random.default_rng(0), []
    with jax.set_mesh(mesh):
        graph, state = training.init_state(
            config, mesh, learning_rate=3e-3, num_steps=NUM_STEPS, seed=0
        )
        step = training.compile_step(graph, state, config, accumulate=accumulate)
        placed = shardings(state)
        for _ in range(num_steps):
            batch = text.draw_windows(corpus().train, rng, 16, 33)
            state, reported = step(state, training.put_batch(batch, mesh))
            history.append(jax.device_get(reported))
        # Otherwise the step is compiled twice.
        assert shardings(state) == placed
        trained, _ = nnx.merge(graph, state)
    return metrics.Metrics(*map(np.stack, zip(*history, strict=True))), trained


def shardings(state):
    return [x.sharding for x in jax.tree.leaves(state)]
