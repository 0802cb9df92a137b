"""The flags that describe a model, for all programs."""

from __future__ import annotations

from typing import Any

from absl import app, flags

from moe_lm.model import Config

_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "Blocks of attention and experts.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 128, "Width of the model.", 1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", 4, "Heads of attention.", 1)
_FFN_HIDDEN = flags.DEFINE_integer("ffn_hidden", 128, "Width inside an expert.", 1)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 16, "Experts in a layer.", 1)
_NUM_TOPK = flags.DEFINE_integer("num_topk", 2, "Experts that a byte goes to.", 1)
_IMPLEMENTATION: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "implementation",
    None,
    ["native", "xla", "dense"],
    "What moves the tokens, by default what serves; dense moves none: every expert computes all.",
)
SEED = flags.DEFINE_integer("seed", 0, "Fixes parameters, text and all that is drawn.")


def make_config() -> Config:
    """Returns the model that the flags describe."""
    return Config(
        num_layers=_NUM_LAYERS.value,
        hidden=_HIDDEN.value,
        num_heads=_NUM_HEADS.value,
        ffn_hidden=_FFN_HIDDEN.value,
        num_experts=_NUM_EXPERTS.value,
        num_topk=_NUM_TOPK.value,
        implementation=_IMPLEMENTATION.value,
    )


def check_config(config: Config, num_ranks: int) -> None:
    """Checks what the sizes of a model ask of each other and of the devices.

    Raises:
      app.UsageError: the experts or the heads do not fit.
    """
    check_multiple("num_experts", config.num_experts, num_ranks)
    check_multiple("hidden", config.hidden, 2 * config.num_heads)
    if config.num_topk > config.num_experts:
        raise app.UsageError(
            f"--num_topk must be at most {config.num_experts}; got {config.num_topk}."
        )


def check_multiple(name: str, value: int, of: int) -> None:
    """Checks a flag that has to divide evenly.

    Raises:
      app.UsageError: it does not.
    """
    if value % of:
        raise app.UsageError(f"--{name} must be a multiple of {of}; got {value}.")
