"""What is static about an MoE layer, and what it trains."""

import dataclasses
import math
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ep._balance import check_slack
from jax_ep._checks import check_count, check_one_of, check_positive
from jax_ep._fp8 import DTYPES
from jax_ep._types import AxisName, Implementation

Router: TypeAlias = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The static arguments of ``MoE``, validated."""

    hidden: int
    ffn_hidden: int
    num_experts: int
    num_topk: int
    router: Router
    capacity_factor: float | None
    axis_name: AxisName
    ranks_per_node: int
    num_spares: int
    slack: float
    chunks: int
    unroll_chunks: bool
    implementation: Implementation | None
    dtype: jnp.dtype | None
    wire_dtype: str | None
    wire_cotangents: str | None

    def __post_init__(self) -> None:
        """Checks what can be checked before there is a mesh or an input.

        Raises:
          TypeError: a size is not an int.
          ValueError: a size, ``num_topk``, ``slack``, ``capacity_factor`` or an option is out of
            range.
        """
        for name in ("hidden", "ffn_hidden", "num_experts", "num_topk", "ranks_per_node", "chunks"):
            check_positive(name, getattr(self, name))
        if self.num_topk > self.num_experts:
            raise ValueError(
                f"num_topk must be at most num_experts = {self.num_experts}; got {self.num_topk}."
            )
        check_count("num_spares", self.num_spares, 0)
        check_slack(self.slack)
        check_one_of("router", self.router, ("softmax", "sigmoid"))
        check_one_of("implementation", self.implementation, (None, "xla", "native"))
        for name in ("wire_dtype", "wire_cotangents"):
            check_one_of(name, getattr(self, name), (None, *DTYPES))
        factor = self.capacity_factor
        if factor is not None and not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"capacity_factor must be None or positive and finite; got {factor}.")

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that experts are sharded over, major first."""
        if self.axis_name is None:
            return ()
        return (self.axis_name,) if isinstance(self.axis_name, str) else tuple(self.axis_name)

    @property
    def expert_spec(self) -> jax.sharding.PartitionSpec:
        """How an array of experts' matrices is sharded."""
        return jax.sharding.PartitionSpec(self.expert_axes or None, None, None)


class Weights(NamedTuple):
    """The layer's arrays; ``router_bias`` is None without one."""

    router_kernel: Float[Array, "hidden num_experts"]
    router_bias: Float32[Array, "num_experts"] | None
    w_gate: Float[Array, "num_experts hidden ffn_hidden"]
    w_up: Float[Array, "num_experts hidden ffn_hidden"]
    w_down: Float[Array, "num_experts ffn_hidden hidden"]


def mesh_axes(config: Config, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of the mesh in context that tokens are sharded over: all, or () for none.

    Raises:
      ValueError: the mesh does not have the expert axis, the axis does not divide the experts or is
        not made of whole nodes, or a ``shard_map`` encloses the layer.
    """
    if mesh.empty:
        return ()
    if mesh.manual_axes:
        raise ValueError(
            "MoE must be called on global arrays, outside of jax.shard_map (inside, call "
            f"jax_ep.moe); got the manual axes {mesh.manual_axes}."
        )
    if missing := [name for name in config.expert_axes if name not in mesh.axis_names]:
        raise ValueError(
            f"axis_name must name axes of the mesh in context, {mesh.axis_names}, or be None for "
            f"experts replicated on all devices; got {config.axis_name!r}, without {missing}."
        )
    num_ranks = math.prod(mesh.shape[name] for name in config.expert_axes)
    if config.num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a multiple of the {num_ranks} devices along "
            f"{config.axis_name!r}; got {config.num_experts}."
        )
    if num_ranks % config.ranks_per_node:
        raise ValueError(
            f"ranks_per_node must divide the {num_ranks} devices along {config.axis_name!r}; got "
            f"{config.ranks_per_node}."
        )
    return mesh.axis_names
