"""All steps of training: batches, the change to lent experts, checkpoints, and what is recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

import jax_ep
from moe_lm import checkpoints, text, training
from moe_lm.checkpoints import Checkpoint
from moe_lm.metrics import Metrics
from moe_lm.model import Config

RECORDED_STEPS = 20
"""How many steps at the end are recorded, for who waits for whom."""
PROFILED_STEPS = 3
"""How many of them are profiled."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
      num_steps: steps in all, those before a checkpoint included.
      batch: sequences in a step.
      seq_len: bytes in a sequence.
      seed: draws the batches.
      accumulate: into how many parts a step cuts its batch.
      balanced_from: the first step in which devices borrow experts; ``num_steps`` for none.
      checkpoint_dir: where checkpoints are, if there are any.
      checkpoint_every: steps from one to the next; the last step has one, too.
      resume: whether to go on from the latest.
      profile_dir: where to put a profile of the last steps, if one is wanted.
    """

    num_steps: int
    batch: int
    seq_len: int
    seed: int
    accumulate: int
    balanced_from: int
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 50
    resume: bool = False
    profile_dir: Path | None = None

    @property
    def batch_bytes(self) -> int:
        """Bytes that a step predicts."""
        return self.batch * self.seq_len


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
      config: what the model has become, which is balanced in the end.
      graph: its structure.
      state: its state, and the optimizer's.
      first_step: the number of the first step, not 0 behind a checkpoint.
      history: what every step reported.
      seconds: how long steps take, of the kind that the last one is.
      trace: the exchanges of the last steps, as native code recorded them.
    """

    config: Config
    graph: nnx.GraphDef
    state: training.State
    first_step: int
    history: Metrics
    seconds: Float[np.ndarray, "num_timed"]
    trace: jax_ep.Trace


def start(options: Options, config: Config, state: training.State) -> Checkpoint:
    """Returns where training begins: at step 0, or behind the latest checkpoint.

    Raises:
      FileNotFoundError: there is no checkpoint to go on from.
      ValueError: it is of another model, or of the last step.
    """
    if not options.resume or options.checkpoint_dir is None:
        return Checkpoint(0, state, np.random.default_rng(options.seed))
    checkpoint = checkpoints.restore(options.checkpoint_dir, config, state)
    if checkpoint.step >= options.num_steps:
        raise ValueError(
            f"the checkpoint is of step {checkpoint.step}: nothing is left of {options.num_steps}."
        )
    return checkpoint


def train(
    options: Options,
    config: Config,
    graph: nnx.GraphDef,
    begin: Checkpoint,
    corpus: text.Corpus,
    mesh: jax.sharding.Mesh,
) -> Trained:
    """Trains to the last step, and records some at the end."""
    first, state, rng = begin
    last = options.num_steps
    step = training.compile_step(graph, state, config, accumulate=options.accumulate)
    history, seconds, trace = [], [], jax_ep.Trace()
    progress = tqdm(
        range(first, last), "compiling", last, initial=first, unit="step", dynamic_ncols=True
    )
    with contextlib.ExitStack() as observed:
        for number in progress:
            if number == max(first, options.balanced_from):
                progress.set_description("compiling")
                config, graph = training.balanced(config, graph, state)
                step = training.compile_step(graph, state, config, accumulate=options.accumulate)
                seconds = []
            if number == max(first, last - RECORDED_STEPS):
                trace = observed.enter_context(_recorded())
            if number == max(first, last - PROFILED_STEPS) and options.profile_dir is not None:
                observed.enter_context(jax.profiler.trace(options.profile_dir))
            batch = text.draw_windows(corpus.train, rng, options.batch, options.seq_len + 1)
            begun = time.perf_counter()
            state, metrics = step(state, training.put_batch(batch, mesh))
            metrics = jax.device_get(metrics)
            seconds.append(time.perf_counter() - begun)
            history.append(metrics)
            _show(progress, metrics, options.batch_bytes / seconds[-1])
            _save(options, config, Checkpoint(number + 1, state, rng))
    stacked = Metrics(*(np.stack(values) for values in zip(*history, strict=True)))
    # The first step of a kind compiles.
    timed = np.array(seconds[1:] or seconds)
    return Trained(config, graph, state, first, stacked, timed, trace)


def measure(
    options: Options, model: training.Transformer, corpus: text.Corpus, mesh: jax.sharding.Mesh
) -> tuple[float, list[Float[Array, "batch length hidden"]]]:
    """Returns bits per byte of text not trained on, and what its last batch gave the experts."""
    rng = np.random.default_rng(options.seed)
    graph, state = nnx.split(model)
    losses, moe_inputs = [], []
    for _ in range(10):
        batch = text.draw_windows(corpus.held_out, rng, options.batch, options.seq_len + 1)
        loss, moe_inputs = training.evaluate(graph, state, training.put_batch(batch, mesh))
        losses.append(float(loss))
    return statistics.fmean(losses), moe_inputs


@contextlib.contextmanager
def _recorded() -> Iterator[jax_ep.Trace]:
    """Records exchanges; without native code nobody does."""
    with contextlib.ExitStack() as stack:
        trace = jax_ep.Trace()
        with contextlib.suppress(NotImplementedError):
            trace = stack.enter_context(jax_ep.record())
        yield trace


def _show(progress: tqdm, metrics: Metrics, bytes_per_s: float) -> None:
    progress.set_description("training", refresh=False)
    progress.set_postfix_str(
        f"loss {metrics.loss:.2f} bits/byte, {bytes_per_s:,.0f} tokens/s, "
        f"dropped {metrics.dropped.mean():.1%}, "
        f"busiest expert {metrics.busiest_expert.max():.1f}, "
        f"device {metrics.busiest_rank.max():.2f} of the mean"
    )


def _save(options: Options, config: Config, checkpoint: Checkpoint) -> None:
    """Saves every so often, and the last step."""
    is_due = checkpoint.step % options.checkpoint_every == 0
    if options.checkpoint_dir is not None and (is_due or checkpoint.step == options.num_steps):
        checkpoints.save(options.checkpoint_dir, config, checkpoint)
