"""``MoE``: the expert layer as an ``nnx.Module``."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from jax_ep._moe import Weigh
from jax_ep._named_experts import ExpertsName, resolve_experts
from jax_ep._types import AxisName, Implementation
from jax_ep.experts import Experts
from jax_ep.flax._apply import Aux, apply
from jax_ep.flax._config import Config, RouterName, resolve_router, token_axes
from jax_ep.flax._inputs import Inputs, check_inputs, check_routed
from jax_ep.flax._out_sharding import check_out_sharding, resolve_out_sharding
from jax_ep.flax._parameters import dims_of, with_dims
from jax_ep.flax._variables import KernelInit, RouterBias, make_variables
from jax_ep.routing import Router


class MoE(nnx.Module):
    """A router and its experts, from global arrays to global arrays.

    Called as ``layer(x)`` with ``x`` [..., hidden]. Every token goes to ``num_topk`` experts, and
    the result is the sum of their outputs, weighed by the router: ``jax_ep.moe`` behind a
    ``routing.Router``. ``docs/models.md`` has the line for many a model.

    The layer opens the ``shard_map`` itself, over the mesh that ``jax.set_mesh`` put in context:
    experts are sharded over ``axis_name``, and tokens over all of the mesh's axes but
    ``tensor_axis``, whatever the shape of ``x`` (padding goes nowhere). Axes may be Auto or
    Explicit; the result has the sharding of ``x`` where that is part of its type. Make the layer
    under the mesh, too, and its experts are created sharded. Without a mesh the layer runs as one
    rank, and warns once if arguments are on several devices. To go on under another mesh, move the
    state there: ``jax.device_put(state, nnx.get_named_sharding(state, mesh))``.

    Under ``nnx.capture(..., nnx.Intermediate)`` each call sows the following; otherwise it sows
    nothing. All are about the whole batch, equal on all devices:

    * ``load_balance_loss`` and ``router_z_loss``, to be scaled and added to the loss; or what a
      ``router`` that is called returned besides choices and weights;
    * ``expert_load`` int32, choices of each expert, zero experts behind the others: what
      ``routing.update_router_bias`` takes;
    * ``rank_load`` int32 [num_ranks], what is asked of each device along ``axis_name``, before
      drops and once experts are lent;
    * ``dropped_by_choice`` float32 [num_topk], which part of the tokens' first choices got no row,
      which of their second, and so on;
    * the scalars of ``load_metrics``: ratios of that load, but for ranks of what they have once
      experts are lent; and sums over devices for ``recv_rows``, ``logical_bytes``, ``wire_bytes``
      and ``node_wire_bytes``: those of ``dispatch``.

    ``apply_with_aux`` returns them with the output instead, for Linen and plain functions.

    Attributes:
      router_kernel: ``nnx.Param`` [hidden, num_experts + num_zero_experts].
      router_bias: ``RouterBias`` float32, one for each of these, where the router ``has_bias``;
        zero until ``routing.update_router_bias`` moves it. ``router_logit_bias`` is an
        ``nnx.Param``.
      w_gate: ``nnx.Param`` [num_experts, hidden, ffn_hidden]; it and all others are named and
        shaped as ``experts.dims`` says, with the axis of experts in front.
      w_up: likewise.
      w_down: ``nnx.Param`` [num_experts, ffn_hidden, hidden].
      shared_w_gate: ``nnx.Param`` [hidden, shared_hidden], and so on, where there is a shared
        expert, with ``shared_gate_kernel`` [hidden, 1].
      latent_in: ``nnx.Param`` [hidden, latent_hidden], and ``latent_out`` back.

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

    # Made by name, of those that its options ask for.
    router_kernel: nnx.Param
    router_logit_bias: nnx.Param
    router_bias: RouterBias
    w_gate: nnx.Param
    w_up: nnx.Param
    w_gate_up: nnx.Param
    w_down: nnx.Param

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        router: RouterName | Router | Callable[..., Any] = "softmax",
        experts: ExpertsName | Experts = "swiglu",
        weigh: Weigh = "output",
        num_zero_experts: int = 0,
        latent_hidden: int | None = None,
        shared_hidden: int | None = None,
        gate_shared: bool = False,
        capacity_factor: float | None = None,
        axis_name: AxisName = "expert",
        tensor_axis: str | None = None,
        fsdp_axis: AxisName = None,
        out_sharding: Mapping[str, P | tuple[Any, ...]] | None = None,
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
        kernel_init: KernelInit | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layer's parameters.

        Args:
          hidden: width of the tokens.
          ffn_hidden: width inside an expert.
          num_experts: experts on all devices together, a multiple of the devices along
            ``axis_name``.
          num_topk: choices per token.
          router: ``"softmax"``, renormalised; ``"sigmoid"`` with a selection bias; a
            ``routing.Router``; or a callable, such as an ``nnx.Module`` with parameters of its own,
            that makes of ``x`` [..., hidden] the choices int32 [..., num_topk], their weights
            float32 likewise, and a dict of what to sow.
          experts: the expert network, by name or as ``jax_ep.experts.Experts`` says.
          weigh: whether router weights scale what experts return, ``"output"``, or ``"input"``.
          num_zero_experts: choices behind the ``num_experts`` that give a token back as it is, at
            no cost: https://arxiv.org/abs/2509.01322.
          latent_hidden: width of what crosses to experts, if not ``hidden``: the layer projects
            tokens there and sums back.
          shared_hidden: width inside a further expert of the same kind that all tokens go to.
          gate_shared: whether a sigmoid scales its output, token by token.
          capacity_factor: how many times its fair share of choices a device has room for; choices
            beyond that are dropped. None drops nothing, at the price of a receive buffer for the
            worst case.
          axis_name: the mesh axis, or axes, that experts are sharded over. None replicates them on
            all devices, each of which then serves its own tokens.
          tensor_axis: the mesh axis that ``ffn_hidden`` is cut over; its devices share their
            tokens, and add up their results.
          fsdp_axis: the mesh axis, or axes, that experts' parameters are stored over besides, by
            their ``hidden``: each device gathers them when it needs them, and gradients come back
            as they are stored, by a reduce-scatter.
          out_sharding: where parameters are stored that are named here, whatever ``fsdp_axis``
            says: by mesh axes, or by logical ones, as ``nnx.logical_axis_rules`` in context has
            them; gathered and returned likewise. ``docs/layer.md`` says what it may hold.
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
          kernel_init: draws matrices, given a key, a shape, the axis of experts included, and a
            dtype; or a mapping to such from parameters' names. What it does not draw is LeCun's
            normal for each expert's matrices, and zero for biases.
          rngs: ``params`` draws the initial parameters.

        Raises:
          TypeError: a size is not an int, or an option is not what it has to be.
          ValueError: a size or an option is out of range, or names no parameter, or the mesh in
            context lacks an axis, or its size does not divide what is cut over it or is no multiple
            of ``ranks_per_node``; or a spec would have parts of a parameter change places.
        """
        network = with_dims(resolve_experts(experts))
        self.config = Config(
            hidden=hidden,
            ffn_hidden=ffn_hidden,
            num_experts=num_experts,
            num_topk=num_topk,
            router=resolve_router(router),
            experts=network,
            weigh=weigh,
            num_zero_experts=num_zero_experts,
            latent_hidden=latent_hidden,
            shared_hidden=shared_hidden,
            gate_shared=gate_shared,
            capacity_factor=capacity_factor,
            axis_name=axis_name,
            tensor_axis=tensor_axis,
            fsdp_axis=fsdp_axis,
            out_sharding=resolve_out_sharding(out_sharding),
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
        self.router = router if callable(router) and self.config.router is None else None
        mesh = jax.sharding.get_abstract_mesh()
        token_axes(self.config, mesh)
        check_out_sharding(self.config, mesh)
        variables = make_variables(self.config, kernel_init, param_dtype, rngs)
        for name, variable in variables.items():
            setattr(self, name, variable)

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
        topk_idx: Int[Array, "*batch num_topk"] | None = None,
        share: Float32[Array, "num_ranks"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*batch hidden"]:
        """Applies the layer and sows losses and metrics.

        Args:
          x: tokens, in any shape.
          token_mask: which of them are tokens; None for all. The others, such as the padding of
            sequences, may hold anything: they go nowhere, take no room, and count in no loss and
            no load.
          topk_idx: choices that were made elsewhere, by a table of token ids or in an earlier run;
            the router weighs them by its scores. None to choose.
          share: how much of the mean each device along ``axis_name`` takes, with ``num_spares``:
            see ``jax_ep.balance``.
          rngs: draws the router's jitter from its ``router`` stream; None for none, as in serving.

        Returns:
          As many outputs, in ``dtype``; zero for a token whose choices were all dropped, and for
          what is no token.

        Raises:
          TypeError: an argument is no array of what it has to hold.
          ValueError: the last axis of ``x`` is not ``hidden``, or the others are symbols, or not
            those of ``token_mask`` and ``topk_idx``; ``topk_idx`` or ``rngs`` is given to a router
            that is called; the mesh in context does not suit the layer or is not the one of its
            weights; or a ``shard_map`` encloses the call.
          NotImplementedError: ``implementation="native"`` where native code cannot serve.
        """
        out, aux = self.apply_with_aux(
            x, token_mask=token_mask, topk_idx=topk_idx, share=share, rngs=rngs
        )
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
        topk_idx: Int[Array, "*batch num_topk"] | None = None,
        share: Float32[Array, "num_ranks"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], Aux]:
        """Applies the layer as a call does, and returns what the call would sow.

        Args:
          x: tokens, in any shape.
          token_mask: which of them are tokens, as for a call.
          topk_idx: choices, as for a call.
          share: as for a call.
          rngs: as for a call.

        Returns:
          The outputs, and losses and metrics by name.

        Raises:
          TypeError: as for a call.
          ValueError: as for a call.
          NotImplementedError: as for a call.
        """
        inputs = Inputs(x, token_mask, topk_idx, share=share)
        check_inputs(self.config, inputs, has_rngs=rngs is not None)
        routed_aux: Aux = {}
        if self.router is not None:
            topk_idx, topk_weights, routed_aux = self.router(x)
            inputs = inputs._replace(topk_idx=topk_idx, topk_weights=topk_weights)
            check_routed(self.config, inputs)
        elif rngs is not None and self.config.router is not None and self.config.router.jitter:
            inputs = inputs._replace(jitter_key=rngs.router())
        weights = {name: getattr(self, name)[...] for name in dims_of(self.config)}
        if hasattr(self, "router_bias"):
            weights["router_bias"] = self.router_bias[...]
        out, aux = apply(self.config, weights, inputs)
        return out, {**routed_aux, **aux}
