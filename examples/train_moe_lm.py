"""Trains a byte-level MoE language model on the source text of Python's standard library.

Runs on eight CPU devices, or on the accelerators that JAX finds::

    python examples/train_moe_lm.py
    python examples/train_moe_lm.py --router=sigmoid --capacity_factor=0 --mesh=1x8
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

if "XLA_FLAGS" not in os.environ:
    # Before JAX starts: it reads this once.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from tqdm import tqdm

import jax_ep
from moe_lm import meshes, model_flags, report, sampling, text, timing, training
from moe_lm.model import Config
from moe_lm.model_flags import SEED

flags.adopt_module_key_flags(model_flags)

_STEPS = flags.DEFINE_integer("steps", 200, "Steps of training.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences in a step.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Bytes in a sequence.", lower_bound=2)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.", lower_bound=0.0)
_ROUTER: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "router", "softmax", ["softmax", "sigmoid"], "How experts are chosen."
)
_CAPACITY_FACTOR = flags.DEFINE_float(
    "capacity_factor", 1.25, "Room of a device over its fair share; 0 drops nothing.", 0.0
)
_BALANCE_AFTER = flags.DEFINE_float(
    "balance_after",
    0.5,
    "From which part of the steps on devices borrow each other's busy experts, so that all have as "
    "much to do, and room for that alone; 1 for never.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_WIRE: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "wire",
    None,
    ["float8_e4m3fn", "float8_e5m2"],
    "What tokens, and in reverse the experts' cotangents, cross as; by default what they are.",
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices along data x expert, as in 2x4. By default all, two along data."
)
_MAX_BYTES = flags.DEFINE_integer("max_bytes", 16_000_000, "The most text to read.", 1)
_SAMPLE_BYTES = flags.DEFINE_integer("sample_bytes", 300, "Bytes of text to write.", 1)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", str(Path(__file__).parent / "out"), "Where to put train_moe_lm.png."
)
_TRACE = flags.DEFINE_string(
    "trace", None, "A .npy file for the first layer's choices in a step, for benchmarks."
)

RECORDED_STEPS = 20
"""How many steps at the end are recorded, for who waits for whom."""


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
      config: what the model has become, which is balanced in the end.
      graph: its structure.
      state: its state, and the optimizer's.
      history: what every step reported.
      step_seconds: how long a step takes.
      trace: the exchanges of the last steps, as native code recorded them.
    """

    config: Config
    graph: nnx.GraphDef
    state: training.State
    history: report.History
    step_seconds: float
    trace: jax_ep.Trace


def make_config() -> Config:
    """Returns the model that the flags describe."""
    return dataclasses.replace(
        model_flags.make_config(),
        router=_ROUTER.value,
        capacity_factor=_CAPACITY_FACTOR.value or None,
        wire=_WIRE.value,
    )


def main(argv: list[str]) -> None:
    """Trains, measures, writes a sample and draws the picture.

    Raises:
      app.UsageError: a flag has no meaning here, or does not fit another.
    """
    if len(argv) > 1:
        raise app.UsageError(f"no arguments but flags are known; got {argv[1:]}.")
    config = make_config()
    mesh = make_mesh(config)
    corpus = text.read_corpus(_MAX_BYTES.value)
    entropy = text.byte_entropy(corpus.train)
    print(f"text: {len(corpus.train):,} bytes of Python, {entropy:.2f} bits per byte by frequency")
    print(f"mesh: {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].device_kind} devices")
    with jax.set_mesh(mesh):
        graph, state = training.init_state(
            config,
            mesh,
            learning_rate=_LEARNING_RATE.value,
            num_steps=_STEPS.value,
            seed=SEED.value,
        )
        first_balanced = balanced_from(config)
        trained = train(config, graph, state, corpus, mesh)
        config, history = trained.config, trained.history
        model, _ = nnx.merge(trained.graph, trained.state)
        held_out_loss, moe_inputs = measure(model, corpus, mesh)
        print_losses(history, held_out_loss, entropy)
        if (path := _TRACE.value) is not None:
            np.save(path, training.choices(model, moe_inputs[0])[None])
        if config.implementation != "dense":
            parts = timing.time_layers(config, model, moe_inputs, mesh)
            print(f"\nA step, and the parts of its {config.num_layers} expert layers on their own,")
            print(f"forward and backward:\n{report.format_shares(parts, trained.step_seconds)}")
        print_sample(model, corpus, mesh)
    picture = report.Picture(
        title=(
            f"A byte-level MoE transformer on Python's own source: {config.num_experts} experts, "
            f"{config.num_topk} per byte, mesh {' x '.join(map(str, mesh.shape.values()))}"
        ),
        held_out_loss=held_out_loss,
        entropy=entropy,
        balanced_from=first_balanced,
    )
    save(picture, trained)


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """Returns the mesh that the flags describe.

    Raises:
      app.UsageError: the mesh, the batch, the experts or the heads do not fit one another.
    """
    try:
        shape = meshes.parse_mesh(_MESH.value, jax.device_count())
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    num_devices = shape[0] * shape[1]
    model_flags.check_multiple("batch", _BATCH.value, num_devices)
    model_flags.check_config(config, shape[1])
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(shape, ("data", "expert"), axis_types=auto, devices=devices)


def balanced_from(config: Config) -> int:
    """Returns the first step in which devices borrow experts; the number of steps if none."""
    if config.implementation == "dense" or config.num_spares:
        return _STEPS.value
    return round(_BALANCE_AFTER.value * _STEPS.value)


def train(
    config: Config,
    graph: nnx.GraphDef,
    state: training.State,
    corpus: text.Corpus,
    mesh: jax.sharding.Mesh,
) -> Trained:
    """Trains for all steps, and records the last ones."""
    step = training.compile_step(graph, state, config)
    rng = np.random.default_rng(SEED.value)
    history, seconds = [], []
    progress = tqdm(range(_STEPS.value), desc="compiling", unit="step", dynamic_ncols=True)
    recording, trace = contextlib.ExitStack(), jax_ep.Trace()
    for number in progress:
        if number == balanced_from(config):
            progress.set_description("compiling")
            config, graph = training.balanced(config, graph, state)
            step = training.compile_step(graph, state, config)
        if number == max(0, _STEPS.value - RECORDED_STEPS):
            with contextlib.suppress(NotImplementedError):  # Without native code nobody records.
                trace = recording.enter_context(jax_ep.record())
        batch = text.draw_windows(corpus.train, rng, _BATCH.value, _SEQ_LEN.value + 1)
        start = time.perf_counter()
        state, metrics = step(state, training.put_batch(batch, mesh))
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - start)
        history.append(metrics)
        progress.set_description("training", refresh=False)
        progress.set_postfix_str(
            f"loss {metrics.loss:.2f} bits/byte, "
            f"{_BATCH.value * _SEQ_LEN.value / seconds[-1]:,.0f} tokens/s, "
            f"dropped {metrics.dropped.mean():.1%}, "
            f"busiest expert {metrics.max_over_mean.max():.1f}, "
            f"device {metrics.busiest_rank.max():.2f} of the mean"
        )
    recording.close()
    stacked = report.History(*(np.stack(values) for values in zip(*history, strict=True)))
    # The first step of each kind compiles.
    return Trained(config, graph, state, stacked, statistics.median(seconds[-50:]), trace)


def measure(
    model: training.Transformer, corpus: text.Corpus, mesh: jax.sharding.Mesh
) -> tuple[float, list[jax.Array]]:
    """Returns bits per byte of text not trained on, and what its last batch gave the experts."""
    rng = np.random.default_rng(SEED.value)
    graph, state = nnx.split(model)
    losses, moe_inputs = [], []
    for _ in range(10):
        batch = text.draw_windows(corpus.held_out, rng, _BATCH.value, _SEQ_LEN.value + 1)
        loss, moe_inputs = training.evaluate(graph, state, training.put_batch(batch, mesh))
        losses.append(float(loss))
    return statistics.fmean(losses), moe_inputs


def print_losses(history: report.History, held_out_loss: float, entropy: float) -> None:
    """Prints where training began and where it ended, beside what byte frequencies give."""
    print(f"loss at the first step {history.loss[0]:.3f} bits per byte")
    print(f"mean of the last 10    {history.loss[-10:].mean():.3f}")
    print(f"text not trained on    {held_out_loss:.3f}")
    print(f"byte entropy           {entropy:.3f}")


def print_sample(model: training.Transformer, corpus: text.Corpus, mesh: jax.sharding.Mesh) -> None:
    """Prints how the model goes on from a piece of text that it was not trained on."""
    rng = np.random.default_rng(SEED.value)
    prompts = text.draw_windows(corpus.held_out, rng, mesh.size, _SEQ_LEN.value)
    drawn = sampling.continue_text(
        *nnx.split(model),
        training.put_batch(prompts, mesh),
        jax.random.key(SEED.value),
        num_bytes=_SAMPLE_BYTES.value,
    )
    prompt, sample = (bytes(np.asarray(x[0]).astype(np.uint8)) for x in (prompts, drawn))
    print(f"\n--- given\n{report.format_text(prompt)}")
    print(f"\n--- the model goes on\n{report.format_text(sample)}\n---")


def save(picture: report.Picture, trained: Trained) -> None:
    """Writes the picture and the trace, and prints where."""
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    path, trace = folder / "train_moe_lm.png", folder / "train_moe_lm.npz"
    report.save_picture(path, picture, trained.history, trained.trace)
    print(f"picture: {path}")
    if len(trained.trace):
        trained.trace.save(trace)
        print(f"who waited for whom: python -m jax_ep report {trace}")


if __name__ == "__main__":
    app.run(main)
