"""What of MaxText's configuration is served, and where it puts arrays."""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the arrays of a layer lie on the mesh; no axis of it has size 1.

    Attributes:
      batch: the axes that sequences are cut over.
      length: the axes that each sequence is cut over.
      experts: the axes that experts lie along, major first.
      tensor: the axes that each expert's inner width is cut over, and outputs' width.
    """

    batch: Axes
    length: Axes
    experts: Axes
    tensor: Axes

    @property
    def tokens(self) -> P:
        """Of what belongs to tokens, whole in its last axis."""
        return P(self.batch, self.length, None)

    @property
    def out(self) -> P:
        """Of the tokens' outputs."""
        return P(self.batch, self.length, self.tensor)

    @property
    def shards(self) -> P:
        """Of what each shard of tokens has one of."""
        return P((*self.batch, *self.length))

    @property
    def weights(self) -> tuple[P, ...]:
        """Of the experts' three matrices, gate first, and their three biases."""
        inward = P(self.experts, None, self.tensor)
        bias = P(self.experts, self.tensor)
        return inward, inward, P(self.experts, self.tensor, None), bias, bias, bias


def find_places(layer: Any, batch: int) -> Places:
    """Asks a layer's logical axis rules where its arrays lie, as its own sparse path does.

    Args:
      layer: MaxText's ``RoutedMoE``.
      batch: how many sequences there are; a single one is being decoded.

    Raises:
      NotImplementedError: the rules put experts along other axes than the layer says, or cut their
        inner width over others than the outputs.
    """
    batch_axis = "activation_batch" if batch > 1 else "decode_batch_moe"
    tokens = _resolve(layer, batch_axis, "activation_norm_length", "activation_embed")
    weights = _resolve(layer, "exp", None, "mlp_no_fsdp")
    # Stored over fsdp, but gathered for use.
    experts, _, inner = (tuple(axis for axis in axes if axis != "fsdp") for axes in weights)
    named = layer._expert_parallelism_name
    named = named if isinstance(named, tuple) else (named,)
    want = tuple(axis for axis in named if layer.mesh.shape.get(axis, 1) > 1)
    if experts != want:
        raise NotImplementedError(
            "The logical axis 'exp' must lie along those mesh axes of experts that have several "
            f"devices, {want}; got {experts}."
        )
    if inner != tokens[2]:
        raise NotImplementedError(
            "The logical axis 'mlp_no_fsdp' must lie along those mesh axes of 'activation_embed' "
            f"that have several devices, {tokens[2]}; got {inner}."
        )
    return Places(tokens[0], tokens[1], experts, inner)


def _resolve(layer: Any, *names: str | None) -> list[Axes]:
    """Returns the mesh axes of each of an array's logical axes."""
    axes = [() if part is None else part for part in layer._logical_to_mesh_axes(names)]
    return [(part,) if isinstance(part, str) else tuple(part) for part in axes]


def tile_sizes(config: Any, whose: str, is_eval: bool) -> tuple[int, ...]:
    """Returns the tiles of a product and of its gradients, in the order of MaxText's kernels.

    Args:
      config: MaxText's configuration.
      whose: "wi" for a product with the gates or what is gated, "wo" for the one after.
      is_eval: whether the forward pass has tiles of its own.
    """
    inner, outer = ("embed_dim", "mlp_dim") if whose == "wi" else ("mlp_dim", "embed_dim")
    forward = f"eval_{whose}_tile_fwd" if is_eval else f"{whose}_tile_fwd"
    sides = {
        forward: (inner, outer),
        f"{whose}_tile_dlhs": (outer, inner),
        f"{whose}_tile_drhs": (inner, outer),
    }
    return tuple(
        getattr(config, f"{side}_{dim}")
        for side, dims in sides.items()
        for dim in ("batch_seq", *dims)
    )


def check_served(config: Any) -> None:
    """Checks that nothing is asked for that would be left out.

    Args:
      config: MaxText's configuration.

    Raises:
      NotImplementedError: something is.
    """
    needs = {
        "moe_quantize_token_all_gather": config.moe_quantize_token_all_gather,
        "moe_quantize_combine_bwd_method": config.moe_quantize_combine_bwd_method,
        "moe_dropless_fallback": config.moe_dropless_fallback == "layer",
        "defer_small_all_reduces": config.defer_small_all_reduces,
        "attention": config.attention.startswith("vllm"),
    }
    if asked := [name for name, is_asked in needs.items() if is_asked]:
        values = {name: getattr(config, name) for name in asked}
        raise NotImplementedError(not_served(f"{', '.join(asked)}; got {values}"))


def not_served(what: str) -> str:
    """Returns the message about what is asked for and would be left out."""
    return (
        f"jax_ep.integrations.maxtext does not serve {what}: see docs/trainers.md, or go on with "
        "MaxText's own path by uninstall()."
    )
