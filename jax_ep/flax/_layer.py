"""``MoE``: the expert layer as an ``nnx.Module``."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jax_ep._checks import check_dtype, check_shape
from jax_ep._types import AxisName, Implementation
from jax_ep.flax._apply import Aux, apply
from jax_ep.flax._config import Config, Router, Weights, mesh_axes


class RouterBias(nnx.Variable):
    """The bias of a sigmoid router: state, but no ``nnx.Param``, so that no optimizer trains it."""


class MoE(nnx.Module):
    """A router and its SwiGLU experts, from global arrays to global arrays.

    Called as ``layer(x)`` with ``x`` [..., hidden]. Every token goes to ``num_topk`` experts, and
    the result is the sum of their outputs, weighed by the router: ``jax_ep.moe`` with
    ``routing.softmax_topk`` or ``routing.sigmoid_topk``.

    The layer opens the ``shard_map`` itself, over the mesh that ``jax.set_mesh`` put in context:
    experts are sharded over ``axis_name``, and tokens over all of the mesh's axes, whatever the
    shape of ``x`` (padding goes nowhere). Axes may be Auto or Explicit; the result has the sharding
    of ``x`` where that is part of its type. Make the layer under the mesh, too, and its experts are
    created sharded. Without a mesh the layer runs as one rank, and warns once if arguments are on
    several devices. To go on under another mesh, move the state there:
    ``jax.device_put(state, nnx.get_named_sharding(state, mesh))``.

    Under ``nnx.capture(..., nnx.Intermediate)`` each call sows the following; otherwise it sows
    nothing. All are about the whole batch, equal on all devices:

    * ``load_balance_loss`` and ``router_z_loss``, to be scaled and added to the loss;
    * ``expert_load`` int32 [num_experts], what ``routing.update_router_bias`` takes;
    * the scalars of ``load_metrics``: ratios of that load, but for ranks of what they have once
      experts are lent; and sums over devices for ``recv_rows``, ``logical_bytes``, ``wire_bytes``
      and ``node_wire_bytes``: those of ``dispatch``.

    ``apply_with_aux`` returns them with the output instead, for Linen and plain functions.

    Attributes:
      router_kernel: ``nnx.Param`` [hidden, num_experts].
      router_bias: ``RouterBias`` float32 [num_experts], with ``router="sigmoid"`` only; zero until
        ``routing.update_router_bias`` moves it.
      w_gate: ``nnx.Param`` [num_experts, hidden, ffn_hidden].
      w_up: ``nnx.Param`` [num_experts, hidden, ffn_hidden].
      w_down: ``nnx.Param`` [num_experts, ffn_hidden, hidden].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_ep.flax import MoE
      >>> layer = MoE(16, 32, num_experts=8, num_topk=2, rngs=nnx.Rngs(0))
      >>> forward = nnx.capture(lambda layer, x: layer(x), nnx.Intermediate)
      >>> out, sown = forward(layer, jnp.ones((4, 10, 16)))
      >>> out.shape, int(sown["expert_load"][0].sum())
      ((4, 10, 16), 80)
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        router: Router = "softmax",
        capacity_factor: float | None = None,
        axis_name: AxisName = "expert",
        ranks_per_node: int = 1,
        num_spares: int = 0,
        slack: float = 0.0,
        chunks: int = 1,
        unroll_chunks: bool = False,
        implementation: Implementation | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        wire_dtype: jax.typing.DTypeLike | None = None,
        wire_cotangents: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layer's parameters.

        Args:
          hidden: width of the tokens.
          ffn_hidden: width inside an expert.
          num_experts: experts on all devices together, a multiple of the devices along
            ``axis_name``.
          num_topk: choices per token.
          router: ``"softmax"``, renormalised, or ``"sigmoid"`` with a selection bias.
          capacity_factor: how many times its fair share of choices a device has room for; choices
            beyond that are dropped. None drops nothing, at the price of a receive buffer for the
            worst case.
          axis_name: the mesh axis, or axes, that experts are sharded over. None replicates them on
            all devices, each of which then serves its own tokens.
          ranks_per_node: how many devices along ``axis_name`` are on a node, as for ``make_plan``;
            without a mesh there is one rank and one node.
          num_spares: how many busy experts each device along ``axis_name`` can borrow for a step,
            so that all have as much to do: see ``jax_ep.balance``. 2 do, as a rule, and with
            ``capacity_factor=1`` nothing is dropped then. With 0 experts stay where they are.
          slack: how much more than its share a device may have before experts are lent.
          chunks: into how many parts a device cuts its tokens, which then go one after the other,
            with buffers for one of them: see ``jax_ep.moe``.
          unroll_chunks: whether the parts may go beside each other, for time and not for memory.
          implementation: ``"xla"``, ``"native"``, or None for native code where it serves.
          dtype: what the experts compute in, and the dtype of the result; None for that of ``x``.
            The router computes in float32.
          wire_dtype: what tokens cross as on their way to the experts, ``"float8_e4m3fn"`` or
            ``"float8_e5m2"``: see ``jax_ep.wire``; None for ``dtype``.
          wire_cotangents: likewise for the cotangents of the result.
          param_dtype: dtype of the parameters.
          rngs: ``params`` draws the initial parameters, each expert's by LeCun's normal.

        Raises:
          TypeError: a size is not an int.
          ValueError: a size or an option is out of range, or the mesh in context does not have
            ``axis_name``, or its size does not divide ``num_experts`` or is no multiple of
            ``ranks_per_node``.
        """
        self.config = Config(
            hidden=hidden,
            ffn_hidden=ffn_hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            router=router,
            capacity_factor=capacity_factor,
            axis_name=axis_name,
            ranks_per_node=ranks_per_node,
            num_spares=num_spares,
            slack=slack,
            chunks=chunks,
            unroll_chunks=unroll_chunks,
            implementation=implementation,
            dtype=None if dtype is None else jnp.dtype(dtype),
            wire_dtype=None if wire_dtype is None else jnp.dtype(wire_dtype).name,
            wire_cotangents=None if wire_cotangents is None else jnp.dtype(wire_cotangents).name,
        )
        axes = mesh_axes(self.config, jax.sharding.get_abstract_mesh())
        # Without a mesh Flax refuses the annotation.
        sharded: dict[str, Any] = {"out_sharding": self.config.expert_spec} if axes else {}
        init = jax.nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        inward = (num_experts, hidden, ffn_hidden)
        outward = (num_experts, ffn_hidden, hidden)
        kernel = init(rngs.params(), (1, hidden, num_experts), param_dtype)[0]
        self.router_kernel = nnx.Param(kernel)
        self.w_gate = nnx.Param(init(rngs.params(), inward, param_dtype), **sharded)
        self.w_up = nnx.Param(init(rngs.params(), inward, param_dtype), **sharded)
        self.w_down = nnx.Param(init(rngs.params(), outward, param_dtype), **sharded)
        if router == "sigmoid":
            self.router_bias = RouterBias(jnp.zeros(num_experts, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch hidden"]:
        """Applies the layer and sows losses and metrics.

        Args:
          x: tokens, in any shape.
          token_mask: which of them are tokens; None for all. The others, such as the padding of
            sequences, may hold anything: they go nowhere, take no room, and count in no loss and
            no load.

        Returns:
          As many outputs, in ``dtype``; zero for a token whose choices were all dropped, and for
          what is no token.

        Raises:
          TypeError: ``x`` is no array of floats, or ``token_mask`` no array of booleans.
          ValueError: the last axis of ``x`` is not ``hidden``, or the others are not those of
            ``token_mask``; the mesh in context does not suit
            the layer or is not the one of its weights; or a ``shard_map`` encloses the call.
          NotImplementedError: ``implementation="native"`` where native code cannot serve.
        """
        out, aux = self.apply_with_aux(x, token_mask=token_mask)
        # Outside of nnx.capture, sow would store into the layer, and more at every call.
        if hasattr(self, "__captures__"):
            for name, value in aux.items():
                self.sow(nnx.Intermediate, name, value)
        return out

    def apply_with_aux(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], Aux]:
        """Applies the layer as a call does, and returns what the call would sow.

        Args:
          x: tokens, in any shape.
          token_mask: which of them are tokens, as for a call.

        Returns:
          The outputs, and losses and metrics by name.

        Raises:
          TypeError: as for a call.
          ValueError: as for a call.
          NotImplementedError: as for a call.
        """
        _check_input(x, self.config.hidden)
        if token_mask is not None:
            _check_mask(token_mask, x)
        bias = self.router_bias[...] if self.config.router == "sigmoid" else None
        experts = (self.w_gate[...], self.w_up[...], self.w_down[...])
        return apply(self.config, Weights(self.router_kernel[...], bias, *experts), x, token_mask)


def _check_mask(token_mask: jax.Array, x: jax.Array) -> None:
    if not hasattr(token_mask, "dtype") or not hasattr(token_mask, "shape"):
        given = type(token_mask).__name__
        raise TypeError(f"token_mask must be an array of booleans, or None; got {given}.")
    check_dtype("token_mask", token_mask, jnp.bool_)
    check_shape("token_mask", token_mask, x.shape[:-1], "...")


def _check_input(x: jax.Array, hidden: int) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        given = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be an array [..., hidden] of floats; got {given}.")
    if x.ndim == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x must have shape [..., hidden = {hidden}]; got {list(x.shape)}.")
