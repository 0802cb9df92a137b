"""Training on disk: what it takes to go on as if it had never stopped, on any mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_lm.model import Config
from moe_lm.training import State

_KEPT = 2
# These may change from run to run: the parameters stay what they are.
_OF_THE_EXCHANGE = ("capacity_factor", "num_spares", "implementation", "wire")


class Checkpoint(NamedTuple):
    """What is saved after a step.

    Attributes:
      step: how many steps were done.
      state: parameters, biases of routers, and the optimizer's state.
      rng: what draws the batches.
    """

    step: int
    state: State
    rng: np.random.Generator


def save(folder: Path, config: Config, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, and removes all but the latest two."""
    rest = {"model": _model(config), "rng": checkpoint.rng.bit_generator.state}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(checkpoint.state), rest=ocp.args.JsonSave(rest)
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        manager.save(checkpoint.step, args=items)


def restore(folder: Path, config: Config, state: State) -> Checkpoint:
    """Reads the latest checkpoint.

    Args:
      folder: where it is.
      config: the model's.
      state: one of the same structure: the checkpoint's comes to where its arrays are.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError: it is of another model.
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {folder}.")
        rest = manager.restore(step, args=ocp.args.Composite(rest=ocp.args.JsonRestore())).rest
        _check_model(rest["model"], _model(config))
        wanted = jax.tree.map(_abstract, state)
        items = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        )
    rng = np.random.default_rng()
    rng.bit_generator.state = rest["rng"]
    return Checkpoint(step, items.state, rng)


def _model(config: Config) -> dict[str, str]:
    """Returns what parameters mean, in words."""
    fields = (field.name for field in dataclasses.fields(config))
    return {name: repr(getattr(config, name)) for name in fields if name not in _OF_THE_EXCHANGE}


def _check_model(saved: dict[str, str], given: dict[str, str]) -> None:
    differing = [name for name in given if saved.get(name) != given[name]]
    if differing:
        raise ValueError(
            "the checkpoint is of another model: "
            + "; ".join(f"{name} is {saved.get(name)}, not {given[name]}" for name in differing)
            + "."
        )


def _abstract(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
