"""An expert-parallel back-end for Levanter's grug MoE, in the signature that its others have.

Levanter picks a function for each back-end in ``levanter/grug/_moe``: ``moe_mlp_ep_jax_ep_local``
is one more of them, to be called inside its ``shard_map``, and ``install`` puts it into the place
of one. It was written for the interface of ``ep_ragged_all_to_all.py`` in autumn 2026
(marin-levanter 0.2.227); only ``install`` imports Levanter.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._combine import combine
from jax_ep._dispatch import dispatch
from jax_ep._grouped_matmul import grouped_matmul
from jax_ep._make_plan import make_plan
from jax_ep._types import DROPPED
from jax_ep.integrations._replace import check_like, own, put, put_back

_DISPATCHER, _REPLACED = "levanter.grug.grug_moe", "_moe_mlp_ep_ragged_a2a_local"


class CapacityDrops(NamedTuple):
    """Choices of real tokens that found no room, in the fields of Levanter's class of this name.

    Attributes:
      sender_dropped: on all shards together; the plan drops where tokens are.
      receiver_dropped: always 0.
    """

    sender_dropped: Int[Array, ""]
    receiver_dropped: Int[Array, ""]

    @property
    def dropped(self) -> Int[Array, ""]:
        """All of them."""
        return self.sender_dropped + self.receiver_dropped


def install() -> None:
    """Has Levanter's ``implementation="ragged_all_to_all"`` be this library's exchange.

    To be called before the model is compiled, in every process. The others stay as they are, and
    so does this one where there is no axis ``"expert"`` of several shards.

    Raises:
      ImportError: Levanter, or what it imports, is not there.
      NotImplementedError: its back-end takes other arguments than ``moe_mlp_ep_jax_ep_local``.
    """
    dispatcher = importlib.import_module(_DISPATCHER)
    original = own(dispatcher, _REPLACED)
    known = list(inspect.signature(moe_mlp_ep_jax_ep_local).parameters)
    check_like("Levanter", "marin-levanter", None, original, known)

    @functools.wraps(original)
    def local(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        out, drops = moe_mlp_ep_jax_ep_local(*args, **kwargs)
        # Levanter's shard_map knows its own class by its type.
        return out, dispatcher.CapacityDrops(**drops._asdict())

    put(dispatcher, _REPLACED, local)


def uninstall() -> None:
    """Puts Levanter's own back-end back, if ``install`` has taken it out."""
    put_back(importlib.import_module(_DISPATCHER), _REPLACED)


def moe_mlp_ep_jax_ep_local(
    x_local: Float[Array, "num_tokens hidden"],
    selected_experts_local: Int[Array, "num_tokens num_topk"],
    combine_weights_local: Float[Array, "num_tokens num_topk"],
    token_valid_local: Bool[Array, "num_tokens"],
    moe_w13_local: Float[Array, "num_local_experts hidden two_ffn_hidden"],
    moe_w2_local: Float[Array, "num_local_experts ffn_hidden hidden"],
    *,
    activation_fn: Callable[[jax.Array], jax.Array],
    num_experts: int,
    capacity_factor: float,
    token_sharding_axes: tuple[str, ...],
) -> tuple[Float[Array, "num_tokens hidden"], CapacityDrops]:
    """Applies a shard's experts by this library's exchange, along the axis ``"expert"``.

    What Levanter's remat policies name bears these names here, the plan with the first of them, so
    that a gradient under them repeats no exchange.

    Args:
      x_local: the shard's tokens.
      selected_experts_local: the global expert of each choice.
      combine_weights_local: its weight, used as given, in float32.
      token_valid_local: which are tokens; the others go nowhere and come back as zero.
      moe_w13_local: the shard's experts' gate and up matrices, side by side, gate first.
      moe_w2_local: their down matrices.
      activation_fn: what the gate goes through.
      num_experts: experts on all shards together.
      capacity_factor: rows of a shard's receive buffer, as a multiple of its own choices.
      token_sharding_axes: the mesh axes that tokens are sharded over.

    Returns:
      The tokens' outputs in their dtype, and how many choices were dropped.

    Raises:
      TypeError: an argument is no array, or of another dtype than is asked for.
      ValueError: shapes do not fit one another, or ``capacity_factor`` is not positive.
    """
    check_array("moe_w13_local", moe_w13_local, "num_local_experts, hidden, 2 * ffn_hidden")
    check_array("token_valid_local", token_valid_local, "num_tokens")
    check_dtype("token_valid_local", token_valid_local, jnp.bool_)
    check_shape("token_valid_local", token_valid_local, x_local.shape[:1], "num_tokens")
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be positive; got {capacity_factor}.")
    topk_idx = selected_experts_local.astype(jnp.int32)
    topk_idx = jnp.where(token_valid_local[:, None], topk_idx, DROPPED)
    plan = make_plan(
        topk_idx,
        num_experts=num_experts,
        axis_name="expert",
        capacity=max(len(moe_w13_local), math.ceil(capacity_factor * topk_idx.size)),
        tail="uninitialized",
    )
    plan = checkpoint_name(plan, "grug_moe_dispatch_input")
    rows = checkpoint_name(dispatch(x_local, plan), "grug_moe_dispatch_input")
    gate, up = jnp.split(grouped_matmul(rows, moe_w13_local, plan.group_sizes), 2, axis=1)
    hidden = checkpoint_name(activation_fn(gate) * up, "grug_moe_expert_hidden")
    rows = grouped_matmul(hidden, moe_w2_local, plan.group_sizes)
    rows = checkpoint_name(rows, "grug_moe_dispatch_output")
    weights = combine_weights_local.astype(jnp.float32)
    out = checkpoint_name(combine(rows, plan, weights), "grug_moe_output")
    dropped = jax.lax.psum(plan.num_dropped, token_sharding_axes)
    return out, CapacityDrops(dropped, jnp.zeros_like(dropped))
