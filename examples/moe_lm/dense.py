"""The expert layer as its formula says it, with no exchange: what to compare the others with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from jax_ep import DROPPED, routing
from jax_ep.flax import MoE
from moe_lm.routed import route, shared_expert


class DenseMoE(MoE):
    """``MoE`` with the same parameters and routing, where every expert computes every token.

    It drops nothing and costs ``num_experts / num_topk`` times as much.
    """

    def apply_with_aux(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
        topk_idx: Int[Array, "*batch num_topk"] | None = None,
        share: Float32[Array, "num_ranks"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], dict[str, Num[Array, "..."]]]:
        """Returns the outputs, and the losses and metrics that training uses, by name."""
        del share, rngs  # There are no ranks that differ, and no jitter.
        num_experts = self.config.num_experts
        if token_mask is not None:
            x = jnp.where(token_mask[..., None], x, jnp.zeros((), x.dtype))
        topk_idx, topk_weights, probs = route(self, x, topk_idx=topk_idx)
        if token_mask is not None:
            topk_idx = jnp.where(token_mask[..., None], topk_idx, DROPPED)
        choices = jax.nn.one_hot(topk_idx, num_experts)
        gate = jnp.einsum("...h,ehf->...ef", x, self.w_gate[...])
        up = jnp.einsum("...h,ehf->...ef", x, self.w_up[...])
        weights = jnp.einsum("...ke,...k->...e", choices, topk_weights)
        rows = jax.nn.silu(gate) * up * weights[..., None]
        load = jnp.sum(choices.reshape(-1, num_experts), axis=0)
        out = jnp.einsum("...ef,efh->...h", rows, self.w_down[...])
        if self.config.shared_hidden is not None:
            out += shared_expert(self, x)
        return out, {
            "load_balance_loss": routing.load_balance_loss(probs, topk_idx),
            "expert_load": load.astype(jnp.int32),
            "rank_load": jnp.sum(load, keepdims=True, dtype=jnp.int32),  # Each device has all.
            "dropped_by_choice": jnp.zeros(self.config.num_topk),
        }
