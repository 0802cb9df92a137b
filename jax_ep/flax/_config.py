"""What is static about an MoE layer, and which of a mesh's axes it uses how."""

import dataclasses
import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_ep._balance import check_slack
from jax_ep._checks import check_count, check_one_of, check_positive
from jax_ep._fp8 import DTYPES
from jax_ep._moe import Weigh
from jax_ep._types import AxisName, Implementation, names_of
from jax_ep.experts import Experts
from jax_ep.routing import Router

RouterName: TypeAlias = Literal["softmax", "sigmoid"]

_ROUTERS = {"softmax": Router(), "sigmoid": Router("sigmoid", has_bias=True)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The static arguments of ``MoE``, validated; ``router`` is None for one that is called."""

    hidden: int
    ffn_hidden: int
    num_experts: int
    num_topk: int
    router: Router | None
    experts: Experts
    weigh: Weigh
    num_zero_experts: int
    latent_hidden: int | None
    shared_hidden: int | None
    gate_shared: bool
    capacity_factor: float | None
    axis_name: AxisName
    tensor_axis: str | None
    fsdp_axis: AxisName
    out_sharding: tuple[tuple[str, P], ...]
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
            range, or options do not go together.
        """
        self._check_sizes()
        check_slack(self.slack)
        check_one_of("weigh", self.weigh, ("output", "input"))
        check_one_of("implementation", self.implementation, (None, "xla", "native"))
        for name in ("wire_dtype", "wire_cotangents"):
            check_one_of(name, getattr(self, name), (None, *DTYPES))
        factor = self.capacity_factor
        if factor is not None and not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"capacity_factor must be None or positive and finite; got {factor}.")
        if self.gate_shared and self.shared_hidden is None:
            raise ValueError("gate_shared needs a shared expert: got shared_hidden=None.")
        roles = (*self.expert_axes, *self.fsdp_axes, *filter(None, [self.tensor_axis]))
        if len(set(roles)) < len(roles):
            raise ValueError(
                "axis_name, tensor_axis and fsdp_axis must name different axes; got "
                f"{self.axis_name!r}, {self.tensor_axis!r} and {self.fsdp_axis!r}."
            )

    def _check_sizes(self) -> None:
        for name in ("hidden", "ffn_hidden", "num_experts", "num_topk", "ranks_per_node", "chunks"):
            check_positive(name, getattr(self, name))
        for name in ("latent_hidden", "shared_hidden"):
            if (size := getattr(self, name)) is not None:
                check_positive(name, size)
        check_count("num_zero_experts", self.num_zero_experts, 0)
        check_count("num_spares", self.num_spares, 0)
        if self.num_topk > self.num_choosable:
            what = "num_experts" if not self.num_zero_experts else "num_experts + num_zero_experts"
            raise ValueError(
                f"num_topk must be at most {what} = {self.num_choosable}; got {self.num_topk}."
            )

    @property
    def num_choosable(self) -> int:
        """What a router chooses from: experts, and those that give back what they get."""
        return self.num_experts + self.num_zero_experts

    @property
    def expert_hidden(self) -> int:
        """The width of what crosses to experts."""
        return self.latent_hidden or self.hidden

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that experts are sharded over, major first."""
        return names_of(self.axis_name)

    @property
    def fsdp_axes(self) -> tuple[str, ...]:
        """The mesh axes that parameters are stored over besides, major first."""
        return names_of(self.fsdp_axis)


def resolve_router(router: object) -> Router | None:
    """Returns the router of a name, or what is one; None for one that is called.

    Raises:
      TypeError: it is none of these.
      ValueError: nothing has this name.
    """
    if isinstance(router, str):
        check_one_of("router", router, tuple(_ROUTERS))
        return _ROUTERS[router]
    if isinstance(router, Router):
        return router
    if not callable(router):
        raise TypeError(
            f"router must be one of {tuple(_ROUTERS)}, a routing.Router, or callable; got "
            f"{router!r}."
        )
    return None


def token_axes(config: Config, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of the mesh in context that tokens are sharded over, or () without a mesh.

    They are all but ``tensor_axis``.

    Raises:
      ValueError: the mesh lacks an axis that the layer uses, or one does not divide what is cut
        over it or is not made of whole nodes, or a ``shard_map`` encloses the layer.
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
    _check_cut(config, mesh, "tensor_axis", ("ffn_hidden", "shared_hidden"))
    _check_cut(config, mesh, "fsdp_axis", ("hidden", "expert_hidden"))
    return tuple(name for name in mesh.axis_names if name != config.tensor_axis)


def _check_cut(
    config: Config, mesh: jax.sharding.AbstractMesh, argument: str, sizes: tuple[str, ...]
) -> None:
    axes = names_of(getattr(config, argument))
    if missing := [name for name in axes if name not in mesh.axis_names]:
        raise ValueError(
            f"{argument} must name axes of the mesh in context, {mesh.axis_names}, or be None; "
            f"got {getattr(config, argument)!r}, without {missing}."
        )
    num_parts = math.prod(mesh.shape[name] for name in axes)
    for name in sizes:
        size = getattr(config, name)
        if size is not None and size % num_parts:
            shown = {"expert_hidden": "latent_hidden"}.get(name, name)
            raise ValueError(
                f"{shown} must be a multiple of the {num_parts} devices along {argument}="
                f"{getattr(config, argument)!r}; got {size}."
            )
