"""The flags that describe a model, for all programs."""

from __future__ import annotations

import math
from typing import Any

from absl import app, flags

from moe_lm import architectures
from moe_lm.model import Config

ARCHITECTURE = flags.DEFINE_enum(
    "architecture",
    architectures.DEFAULT,
    architectures.NAMES,
    "The model: how its router chooses, and how many experts of what kind it has. The names of "
    "published models stand for theirs, with sizes shrunk. The flags below change parts of it.",
)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "Blocks of attention and experts.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", None, "Width of the model.", 1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Heads of attention.", 1)
_FFN_HIDDEN = flags.DEFINE_integer("ffn_hidden", None, "Width inside an expert.", 1)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", None, "Experts in a layer.", 1)
_NUM_TOPK = flags.DEFINE_integer("num_topk", None, "Experts that a byte goes to.", 1)
_ROUTER: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "router",
    None,
    [*architectures.ROUTERS],
    "How experts are chosen: softmax, and a loss evens their loads; or sigmoid with a bias, which "
    "is moved to even them. By default the architecture's.",
)
_IMPLEMENTATION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "implementation",
    None,
    ["native", "xla", "dense"],
    "What moves the tokens, by default what serves; dense moves none: every expert computes all.",
)
SEED = flags.DEFINE_integer("seed", 0, "Fixes parameters, text and all that is drawn.")


def make_config(**changes: Any) -> Config:
    """Returns the model that the flags describe.

    Args:
      changes: values of ``Config`` besides, by name; those that are None stay the architecture's.
    """
    router = _ROUTER.value
    flagged = {
        "num_layers": _NUM_LAYERS.value,
        "hidden": _HIDDEN.value,
        "num_heads": _NUM_HEADS.value,
        "ffn_hidden": _FFN_HIDDEN.value,
        "num_experts": _NUM_EXPERTS.value,
        "num_topk": _NUM_TOPK.value,
        "router": None if router is None else architectures.ROUTERS[router],
        "implementation": _IMPLEMENTATION.value,
    }
    return architectures.make_config(ARCHITECTURE.value, flagged | changes)


def check_config(config: Config, num_ranks: int) -> None:
    """Checks what the sizes of a model ask of each other and of the devices.

    Raises:
      app.UsageError: the experts or the heads do not fit.
    """
    groups = config.router.num_groups
    check_multiple("num_experts", config.num_experts, math.lcm(num_ranks, groups))
    check_multiple("hidden", config.hidden, 2 * config.num_heads)
    num_choosable = config.num_experts // groups * config.router.topk_groups
    if config.num_topk > num_choosable:
        raise app.UsageError(f"--num_topk must be at most {num_choosable}; got {config.num_topk}.")


def check_multiple(name: str, value: int, of: int) -> None:
    """Checks a flag that has to divide evenly.

    Raises:
      app.UsageError: it does not.
    """
    if value % of:
        raise app.UsageError(f"--{name} must be a multiple of {of}; got {value}.")
