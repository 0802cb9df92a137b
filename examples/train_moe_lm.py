"""Trains a byte-level MoE language model on the source text of Python's standard library.

Runs on eight CPU devices, or on the accelerators that JAX finds::

    python examples/train_moe_lm.py
    python examples/train_moe_lm.py --router=sigmoid --capacity_factor=0 --mesh=1x8
    python examples/train_moe_lm.py --architecture=deepseek-v3 --checkpoint_dir=/tmp/moe
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any

if "XLA_FLAGS" not in os.environ:
    # Before JAX starts: it reads this once.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from moe_lm import (
    loop,
    meshes,
    model_flags,
    picture,
    report,
    sampling,
    text,
    timing,
    training,
    ways,
)
from moe_lm.model import Config
from moe_lm.model_flags import SEED

flags.adopt_module_key_flags(model_flags)

_STEPS = flags.DEFINE_integer("steps", 180, "Steps of training.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences in a step.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Bytes in a sequence.", lower_bound=2)
_ACCUMULATE = flags.DEFINE_integer(
    "accumulate",
    1,
    "Parts that a step computes its batch in, one after the other, for less memory; their "
    "gradients are averaged. A device has room for a part's choices, and the loss that evens loads "
    "is a part's, so that with a capacity or a softmax router results differ from those of 1.",
    lower_bound=1,
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.", lower_bound=0.0)
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
_SAMPLE_BYTES = flags.DEFINE_integer("sample_bytes", 200, "Bytes of text to write.", 1)
_CHECKPOINT_DIR = flags.DEFINE_string(
    "checkpoint_dir",
    None,
    "Where to keep the latest two checkpoints: parameters, biases of routers, the optimizer's "
    "state, the step, and what draws the batches. By default none are written.",
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 50, "Steps from one checkpoint to the next; the last step has one, too.", 1
)
_RESUME = flags.DEFINE_bool(
    "resume",
    False,
    "Go on from the latest checkpoint. With the same flags nothing tells that training stopped; "
    "--mesh may be another: if nothing is dropped, results then differ by rounding alone.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", str(Path(__file__).parent / "out"), "Where to put train_moe_lm.png."
)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    f"A folder for what jax.profiler sees of the last {loop.PROFILED_STEPS} steps, for XProf or "
    "Perfetto.",
)
_TRACE = flags.DEFINE_string(
    "trace", None, "A .npy file for the first layer's choices in a step, for benchmarks."
)


def main(argv: list[str]) -> None:
    """Trains, measures, writes a sample and draws the picture.

    Raises:
      app.UsageError: a flag has no meaning here, or does not fit another or a checkpoint.
    """
    if len(argv) > 1:
        raise app.UsageError(f"no arguments but flags are known; got {argv[1:]}.")
    config = make_config()
    options = make_options(config)
    mesh = make_mesh(config)
    corpus = text.read_corpus(_MAX_BYTES.value)
    entropy = text.byte_entropy(corpus.train)
    print(f"text: {len(corpus.train):,} bytes of Python, {entropy:.2f} bits per byte by frequency")
    print(f"mesh: {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].device_kind} devices")
    with jax.set_mesh(mesh):
        trained = train(config, options, corpus, mesh)
        model, _ = nnx.merge(trained.graph, trained.state)
        held_out_loss, moe_inputs = loop.measure(options, model, corpus, mesh)
        report.print_losses(
            trained.first_step, trained.history.loss, held_out_loss=held_out_loss, entropy=entropy
        )
        if (path := _TRACE.value) is not None:
            np.save(path, training.choices(model, moe_inputs[0])[None])
        if config.implementation != "dense":
            parts = timing.time_layers(trained.config, model, moe_inputs, mesh)
            report.print_parts(config.num_layers, parts, statistics.median(trained.seconds))
        print_sample(model, corpus, mesh)
        speeds = ways.compare(config, model.blocks[0].moe, moe_inputs[0], mesh)
    save(
        picture.Picture(
            title=(
                f"A byte-level MoE transformer ({model_flags.ARCHITECTURE.value}) on Python's own "
                f"source: {config.num_experts} experts, {config.num_topk} per byte, "
                f"mesh {' x '.join(map(str, mesh.shape.values()))}"
            ),
            held_out_loss=held_out_loss,
            entropy=entropy,
            first_step=trained.first_step,
            balanced_from=options.balanced_from,
            history=trained.history,
            seconds=trained.seconds,
            speeds=speeds,
            trace=trained.trace,
        )
    )


def make_config() -> Config:
    """Returns the model that the flags describe."""
    return model_flags.make_config(capacity_factor=_CAPACITY_FACTOR.value or None, wire=_WIRE.value)


def make_options(config: Config) -> loop.Options:
    """Returns how to train, by the flags.

    Raises:
      app.UsageError: there is nowhere to resume from.
    """
    if _RESUME.value and _CHECKPOINT_DIR.value is None:
        raise app.UsageError("--resume needs the --checkpoint_dir to go on from; got none.")
    moves = config.implementation != "dense"
    return loop.Options(
        num_steps=_STEPS.value,
        batch=_BATCH.value,
        seq_len=_SEQ_LEN.value,
        seed=SEED.value,
        accumulate=_ACCUMULATE.value,
        balanced_from=round(_BALANCE_AFTER.value * _STEPS.value) if moves else _STEPS.value,
        checkpoint_dir=None if _CHECKPOINT_DIR.value is None else Path(_CHECKPOINT_DIR.value),
        checkpoint_every=_CHECKPOINT_EVERY.value,
        resume=_RESUME.value,
        profile_dir=None if _PROFILE.value is None else Path(_PROFILE.value),
    )


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """Returns the mesh that the flags describe.

    Raises:
      app.UsageError: the mesh, the batch, the experts or the heads do not fit one another.
    """
    try:
        shape = meshes.parse_mesh(_MESH.value, jax.device_count())
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    num_devices = math.prod(shape)
    model_flags.check_multiple("batch", _BATCH.value, num_devices * _ACCUMULATE.value)
    model_flags.check_config(config, shape[1])
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(shape, ("data", "expert"), axis_types=auto, devices=devices)


def train(
    config: Config, options: loop.Options, corpus: text.Corpus, mesh: jax.sharding.Mesh
) -> loop.Trained:
    """Trains from the start, or goes on from a checkpoint.

    Raises:
      app.UsageError: there is no checkpoint, or it does not fit the flags.
    """
    graph, state = training.init_state(
        config,
        mesh,
        learning_rate=_LEARNING_RATE.value,
        num_steps=options.num_steps,
        seed=options.seed,
    )
    try:
        begin = loop.start(options, config, state)
    except (FileNotFoundError, ValueError) as error:
        raise app.UsageError(f"--resume: {error}") from error
    return loop.train(options, config, graph, begin, corpus, mesh)


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


def save(shown: picture.Picture) -> None:
    """Writes the picture and the trace, and prints where."""
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    path, trace = folder / "train_moe_lm.png", folder / "train_moe_lm.npz"
    picture.save_picture(path, shown)
    print(f"picture: {path}")
    if len(shown.trace):
        shown.trace.save(trace)
        print(f"who waited for whom: python -m jax_ep report {trace}")
    if _PROFILE.value is not None:
        print(f"profile: {_PROFILE.value}")


if __name__ == "__main__":
    app.run(main)
