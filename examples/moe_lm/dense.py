"""The expert layer as its formula says it, with no exchange: what to compare the others with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jax_ep import DROPPED, routing
from jax_ep.flax import MoE


class DenseMoE(MoE):
    """``MoE`` with the same parameters and routing, where every expert computes every token.

    It drops nothing and costs ``num_experts / num_topk`` times as much.
    """

    def apply_with_aux(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        token_mask: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], dict[str, Num[Array, "..."]]]:
        """Returns the outputs, and the losses and metrics that training uses, by name."""
        num_experts, num_topk = self.config.num_experts, self.config.num_topk
        if token_mask is not None:
            x = jnp.where(token_mask[..., None], x, jnp.zeros((), x.dtype))
        logits = jnp.matmul(x, self.router_kernel[...], precision=jax.lax.Precision.HIGHEST)
        if self.config.router == "softmax":
            topk_idx, topk_weights = routing.softmax_topk(logits, num_topk)
            probs = jax.nn.softmax(logits)
        else:
            topk_idx, topk_weights = routing.sigmoid_topk(logits, self.router_bias[...], num_topk)
            probs = jax.nn.softmax(jax.nn.log_sigmoid(logits))
        if token_mask is not None:
            topk_idx = jnp.where(token_mask[..., None], topk_idx, DROPPED)
        choices = jax.nn.one_hot(topk_idx, num_experts)
        gate = jnp.einsum("...h,ehf->...ef", x, self.w_gate[...])
        up = jnp.einsum("...h,ehf->...ef", x, self.w_up[...])
        weights = jnp.einsum("...ke,...k->...e", choices, topk_weights)
        rows = jax.nn.silu(gate) * up * weights[..., None]
        load = jnp.sum(choices.reshape(-1, num_experts), axis=0)
        return jnp.einsum("...ef,efh->...h", rows, self.w_down[...]), {
            "load_balance_loss": routing.load_balance_loss(probs, topk_idx),
            "expert_load": load.astype(jnp.int32),
            "expert_load_max_over_mean": jnp.max(load) / jnp.mean(load),
            "rank_load_max_over_mean": jnp.ones(()),  # All experts on every device.
            "dropped_fraction": jnp.zeros(()),
        }
