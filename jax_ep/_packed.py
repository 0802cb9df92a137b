"""A rank's own part of rounds in pure JAX, for devices that native code knows nothing of.

It does what ``_local`` has handlers do, to the same bits but for what compilers make of sums.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Num

from jax_ep import _xla
from jax_ep._call import Call, Operands
from jax_ep._local import Groups, Send
from jax_ep._types import DROPPED
from jax_ep._xla import dot, from_bits, mask, pick, sum_dtype, to_bits


@dataclasses.dataclass(frozen=True)
class Packed:
    """What ``_local.Local`` does, where the wire is one array."""

    def plan(self, call: Call, operands: Operands) -> list[Array]:
        """Makes this rank's plan."""
        return _xla.plan(call.layout, operands.where.rank, *operands.payloads)

    def pack(
        self, x: Num[Array, "tokens hidden"], to: Send, *, num_rows: int, num_pieces: int
    ) -> list[Num[Array, "rows hidden"]]:
        """Copies tokens to rows on the wire, and leaves the others as they happen to be."""
        assert num_pieces == 1
        return [to_bits(x)[_choices(to, num_rows) // to.send_row.shape[1]]]

    def gather(
        self,
        x: Sequence[Num[Array, "tokens hidden"]],
        to: Send,
        dtype: Any,
        *,
        num_rows: int,
        groups: Groups | None = None,
        onto: Num[Array, "rows hidden"] | None = None,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> Num[Array, "rows hidden"]:
        """Copies tokens from the wire to rows, scaled by weights if there are any."""
        del groups  # What no token is copied to is zero.
        choice = _choices(to, num_rows)
        [tokens] = x
        rows = from_bits(tokens[choice // to.send_row.shape[1]], dtype)
        if weights is not None:
            scale = weights.reshape(-1)[choice][:, None].astype(sum_dtype(rows))
            rows = (scale * rows.astype(scale.dtype)).astype(dtype)
        bits = to_bits(rows)
        below = jnp.zeros_like(bits) if onto is None else to_bits(onto)
        return from_bits(jnp.where((choice == DROPPED)[:, None], below, bits), dtype)

    def partial_sums(
        self,
        rows: Num[Array, "rows hidden"],
        to: Send,
        *,
        num_pieces: int,
        weights: Float32[Array, "tokens topk"] | None = None,
    ) -> list[Num[Array, "tokens hidden"]]:
        """Adds up each token's rows, scaled by weights if there are any, for the wire."""
        assert num_pieces == 1
        dtype = sum_dtype(rows)
        total = jnp.zeros_like(rows, shape=(to.send_row.shape[0], rows.shape[1]), dtype=dtype)
        for k, row in enumerate(jnp.unstack(to.send_row, axis=1)):
            picked = pick(rows, row).astype(dtype)
            if weights is not None:
                picked = mask(row, weights[:, k, None].astype(dtype) * picked)
            total += picked
        return [to_bits(total.astype(rows.dtype))]

    def add_up(
        self,
        rows: Sequence[Num[Array, "rows hidden"]],
        to: Send,
        dtype: Any,
        *,
        here: Int32[Array, ""],
        num_ranks: int,
        ranks_per_node: int,
    ) -> Num[Array, "tokens hidden"]:
        """Adds up each token's partial sums from the wire, node by node in the order of ranks."""
        del here
        [partials] = rows
        wide = sum_dtype(sums := from_bits(partials, dtype))
        rank = jnp.where(to.send_row == DROPPED, num_ranks, to.send_rank)
        order = jnp.argsort(rank, axis=1, stable=True)
        row = jnp.unstack(jnp.take_along_axis(to.send_row, order, axis=1), axis=1)
        node = jnp.unstack(jnp.take_along_axis(rank, order, axis=1) // ranks_per_node, axis=1)
        of_node = total = jnp.zeros_like(sums, shape=(rank.shape[0], sums.shape[1]), dtype=wide)
        for k in range(len(row)):
            if k > 0:
                goes_on = (node[k] == node[k - 1])[:, None]
                total = jnp.where(goes_on, total, total + of_node.astype(dtype).astype(wide))
                of_node = jnp.where(goes_on, of_node, 0)
            of_node += pick(sums, row[k]).astype(wide)
        return (total + of_node.astype(dtype).astype(wide)).astype(dtype)

    def dots(
        self,
        rows: Num[Array, "rows hidden"],
        dout: Sequence[Num[Array, "tokens hidden"]],
        to: Send,
    ) -> Float32[Array, "tokens topk"]:
        """Multiplies rows with their tokens' rows of ``dout``, which come from the wire."""
        dtype = sum_dtype(rows)
        came = from_bits(dout[0], rows.dtype).astype(dtype)
        columns = jnp.unstack(to.send_row, axis=1)
        dots = [dot(pick(rows, row).astype(dtype), mask(row, came)) for row in columns]
        return jnp.stack(dots, axis=1).astype(jnp.float32)


def _choices(to: Send, num_rows: int) -> Int32[Array, "rows"]:
    """Inverts send lists: the choice of each row, or ``DROPPED``."""
    row = to.send_row.reshape(-1)
    at = jnp.where(row == DROPPED, num_rows, row)
    choice = jnp.full_like(row, DROPPED, shape=num_rows)
    return choice.at[at].set(jnp.arange(row.size, dtype=jnp.int32), mode="drop")
