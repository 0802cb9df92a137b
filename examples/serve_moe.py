"""Serves a small MoE language model: reads prompts at once, then writes a token a device a step.

Two ways, which have to write the same: each device has its own experts and tokens go there, or
each has all experts. The parameters are random, and so is what is written. Runs on eight CPU
devices, or on the accelerators that JAX finds::

    python examples/serve_moe.py
    python examples/serve_moe.py --sequences=64 --num_experts=64 --implementation=xla
"""

from __future__ import annotations

import dataclasses
import os

if "XLA_FLAGS" not in os.environ:
    # Before JAX starts: it reads this once.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from absl import app, flags

from moe_lm import model_flags, serving, serving_times, text
from moe_lm.model_flags import SEED
from moe_lm.serving_times import Way

flags.adopt_module_key_flags(model_flags)

_SEQUENCES = flags.DEFINE_integer("sequences", None, "By default one on each device.", 1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Bytes of a prompt.", 1)
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 64, "The most bytes to write after a prompt; a newline ends it before.", 2
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "How often all is timed.", 1)

_AXES: dict[str, str | None] = {"each device its experts": "expert", "each device all": None}


def main(argv: list[str]) -> None:
    """Serves in both ways, compares what they wrote, and prints how long it took.

    Raises:
      app.UsageError: a flag has no meaning here, or does not fit another.
      RuntimeError: the ways wrote different text.
    """
    if len(argv) > 1:
        raise app.UsageError(f"no arguments but flags are known; got {argv[1:]}.")
    mesh = jax.make_mesh(
        (jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    prompts = draw_prompts(mesh)
    print(
        f"{len(prompts)} prompts of {_PROMPT_LEN.value} bytes on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} devices, at most {_NUM_TOKENS.value} bytes written "
        f"after each"
    )
    with jax.set_mesh(mesh):
        ways = {name: make_way(axis_name, mesh, prompts) for name, axis_name in _AXES.items()}
        written = {name: way.serve() for name, way in ways.items()}
        check_equal(written)
        [sequences, *_] = written.values()
        total = serving.num_written(sequences, _PROMPT_LEN.value)
        ended = int(np.sum(sequences.has_ended))
        print(f"both wrote the same {total} bytes; {ended} of {len(prompts)} came to their end")
        times = serving_times.compare(ways, repeats=_REPEATS.value)
    print(f"\n{serving_times.format_times(times, ways)}")


def draw_prompts(mesh: jax.sharding.Mesh) -> np.ndarray:
    """Draws pieces of the standard library's source.

    Raises:
      app.UsageError: they do not fit the devices.
    """
    num_sequences = _SEQUENCES.value or mesh.size
    model_flags.check_multiple("sequences", num_sequences, mesh.size)
    corpus, rng = text.read_corpus(1_000_000), np.random.default_rng(SEED.value)
    return text.draw_windows(corpus.held_out, rng, num_sequences, _PROMPT_LEN.value)


def make_way(axis_name: str | None, mesh: jax.sharding.Mesh, prompts: np.ndarray) -> Way:
    """Makes the model on the mesh in context, the same one wherever its experts are.

    Raises:
      app.UsageError: it does not fit the devices.
    """
    config = dataclasses.replace(model_flags.make_config(), axis_name=axis_name)
    model_flags.check_config(config, mesh.size)
    graph, state = serving.init_state(config, mesh, seed=SEED.value)
    placed = jax.device_put(
        prompts, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    )
    max_length = _PROMPT_LEN.value + _NUM_TOKENS.value
    return Way(graph, state, placed, jax.random.key(SEED.value), max_length)


def check_equal(written: dict[str, serving.Sequences]) -> None:
    """Compares what was written in all ways.

    Raises:
      RuntimeError: it differs.
    """
    (first, expected), *others = ((name, np.asarray(s.tokens)) for name, s in written.items())
    for name, tokens in others:
        if not np.array_equal(tokens, expected):
            sequence, position = np.argwhere(tokens != expected)[0]
            raise RuntimeError(
                f"{name!r} must write what {first!r} does; from byte {position} of sequence "
                f"{sequence} on it differs."
            )


if __name__ == "__main__":
    app.run(main)
