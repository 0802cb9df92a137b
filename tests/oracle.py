"""The contract in NumPy: every rank's answer, computed in one place from every rank's inputs.

It shares no code with the library, so that a mistake would have to be made twice to go unseen.
Arrays carry a leading axis of ranks: ``topk_idx`` is [R, T, K], ``x`` is [R, T, H], and the
receive buffers are [R, C, H]. Loops are plain where that makes the rule easier to check by eye.
"""

from __future__ import annotations

import dataclasses
import fractions

import numpy as np
import numpy.typing as npt

NOWHERE = -1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who goes where.

    The fields of every rank under the names the library uses, then the positions that the library
    keeps to itself.
    """

    group_sizes: np.ndarray  # [R, L]
    kept: np.ndarray  # [R, T, K]
    expert_load: np.ndarray  # [E]
    recv_counts: np.ndarray  # [R, R]: destination, source
    num_dropped: np.ndarray  # [R]
    num_invalid: np.ndarray  # [R]
    capacity: int
    ranks_per_node: int
    to_rank: np.ndarray  # [R, T, K]: the rank that holds the choice's row, or NOWHERE
    row: np.ndarray  # [R, T, K]: the row there, or NOWHERE
    origin: np.ndarray  # [R, C, 3]: (rank, token, k) of each row, or NOWHERE

    @property
    def named(self) -> np.ndarray:
        """Marks the rows that some kept choice names: [R, C]."""
        return self.origin[..., 0] != NOWHERE

    @property
    def used(self) -> np.ndarray:
        """Marks the rows inside a group, padding included: [R, C]."""
        return np.arange(self.capacity) < self.group_sizes.sum(axis=1, keepdims=True)


def drop_nothing_capacity(
    num_ranks: int, num_tokens: int, num_topk: int, num_local_experts: int, alignment: int = 1
) -> int:
    """Counts the rows that hold every choice as long as each token's choices are distinct."""
    rows = num_ranks * num_tokens * min(num_topk, num_local_experts)
    return max(1, rows + num_local_experts * (alignment - 1))


def plan(
    topk_idx: np.ndarray,
    num_experts: int,
    capacity: int | None = None,
    alignment: int = 1,
    ranks_per_node: int = 1,
) -> Plan:
    """Plans the exchange of ``topk_idx`` [R, T, K]."""
    num_ranks, num_tokens, num_topk = topk_idx.shape
    num_local = num_experts // num_ranks
    if capacity is None:
        capacity = drop_nothing_capacity(num_ranks, num_tokens, num_topk, num_local, alignment)
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    to_rank = np.full(topk_idx.shape, NOWHERE)
    row = np.full(topk_idx.shape, NOWHERE)
    origin = np.full((num_ranks, capacity, 3), NOWHERE)
    group_sizes = np.zeros((num_ranks, num_local), np.int32)
    for destination in range(num_ranks):
        arriving = [
            (k, token, source)
            for source, token, k in np.ndindex(*topk_idx.shape)
            if valid[source, token, k] and topk_idx[source, token, k] // num_local == destination
        ]
        survivors = sorted(arriving)[: capacity - num_local * (alignment - 1)]
        start = 0
        for local in range(num_local):
            expert = destination * num_local + local
            group = sorted(
                (source, token, k)
                for k, token, source in survivors
                if topk_idx[source, token, k] == expert
            )
            for offset, choice in enumerate(group):
                to_rank[choice] = destination
                row[choice] = start + offset
                origin[destination, start + offset] = choice
            group_sizes[destination, local] = -(-len(group) // alignment) * alignment
            start += group_sizes[destination, local]
    kept = row != NOWHERE
    return Plan(
        group_sizes=group_sizes,
        kept=kept,
        expert_load=np.bincount(topk_idx[valid], minlength=num_experts).astype(np.int32),
        recv_counts=np.array(
            [
                [(origin[to, :, 0] == source).sum() for source in range(num_ranks)]
                for to in range(num_ranks)
            ],
            np.int32,
        ),
        num_dropped=(valid & ~kept).sum(axis=(1, 2), dtype=np.int32),
        num_invalid=(~valid & (topk_idx != NOWHERE)).sum(axis=(1, 2), dtype=np.int32),
        capacity=capacity,
        ranks_per_node=ranks_per_node,
        to_rank=to_rank,
        row=row,
        origin=origin,
    )


def dispatch(x: np.ndarray, plan: Plan) -> np.ndarray:
    """Copies each choice's token to its row; every other row is zero."""
    rows = np.zeros((x.shape[0], plan.capacity, x.shape[2]), x.dtype)
    source, token, _ = np.moveaxis(plan.origin[plan.named], -1, 0)
    rows[plan.named] = x[source, token]
    return rows


def dispatch_grad(drows: np.ndarray, plan: Plan) -> np.ndarray:
    """Adds up the cotangents of each token's rows: [R, T, H]."""
    return _reduce(drows, plan, None)


def combine(rows: np.ndarray, plan: Plan, topk_weights: np.ndarray | None = None) -> np.ndarray:
    """Adds up each token's rows, weighted: [R, T, H], rounded where the contract rounds."""
    return _reduce(rows, plan, topk_weights)


def combine_grad(
    rows: np.ndarray, plan: Plan, topk_weights: np.ndarray | None, dout: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cotangents of the rows, in their dtype, and of the weights, in float64."""
    wide = _accumulator(rows.dtype)
    weights = _weights(plan, topk_weights).astype(wide)
    drows = np.zeros_like(rows)
    dweights = np.zeros(plan.kept.shape)
    for choice in zip(*np.nonzero(plan.kept), strict=True):
        at = plan.to_rank[choice], plan.row[choice]
        cotangent = dout[choice[:2]]
        drows[at] = (weights[choice] * cotangent.astype(wide)).astype(rows.dtype)
        dweights[choice] = rows[at].astype(np.float64) @ cotangent.astype(np.float64)
    return drows, dweights


def _reduce(rows: np.ndarray, plan: Plan, topk_weights: np.ndarray | None) -> np.ndarray:
    wide = _accumulator(rows.dtype)
    # One-byte floats only ever arrive here as cotangents, whose partials are not rounded.
    wire = wide if rows.dtype.itemsize == 1 else rows.dtype
    weights = _weights(plan, topk_weights).astype(wide)[..., None]
    num_ranks, _, hidden = rows.shape
    total = np.zeros((*plan.kept.shape[:2], hidden), wide)
    for node in range(num_ranks // plan.ranks_per_node):
        of_node = np.zeros_like(total)
        for destination in range(node * plan.ranks_per_node, (node + 1) * plan.ranks_per_node):
            partial = np.zeros_like(total)
            for k in range(plan.kept.shape[2]):
                here = plan.to_rank[:, :, k] == destination
                picked = rows[destination, plan.row[:, :, k][here]].astype(wide)
                partial[here] = fma(weights[:, :, k][here], picked, partial[here])
            of_node += partial.astype(wire).astype(wide)
        total += of_node.astype(wire).astype(wide)
    return total.astype(rows.dtype)


def _weights(plan: Plan, topk_weights: np.ndarray | None) -> np.ndarray:
    return np.ones(plan.kept.shape, np.float32) if topk_weights is None else topk_weights


def _accumulator(dtype: np.dtype) -> type[np.floating]:
    return np.float64 if dtype == np.float64 else np.float32


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> np.ndarray:
    """Computes ``a * b + c`` with a single rounding, in the dtype of ``c``."""
    a, b, c = np.broadcast_arrays(a, b, c)
    return _fma64(a, b, c) if c.dtype == np.float64 else _fma32(a, b, c)


def _fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounds once by rounding to odd in float64 first.

    The product of two float32 is exact in float64. The sum may not be: when it was rounded and its
    last bit is even, step towards the part that was lost. The result's last bit then says "not
    exact", which keeps the rounding to float32, 29 bits shorter, from mistaking it for a tie.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    finite = np.isfinite(total)
    with np.errstate(invalid="ignore"):
        shadow = total - product
        lost = (product - (total - shadow)) + (addend - shadow)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    odd = np.where(finite & (lost != 0) & even, np.nextafter(total, towards), total)
    with np.errstate(over="ignore"):
        return odd.astype(np.float32)


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounds once by computing in fractions: slow, for small arrays."""
    out = np.array(a * b + c)
    for at in np.ndindex(out.shape):
        if np.isfinite(out[at]):
            exact = fractions.Fraction(float(a[at])) * fractions.Fraction(float(b[at]))
            exact += fractions.Fraction(float(c[at]))
            out[at] = float(exact) if exact else out[at]  # Which keeps the sign of a zero.
    return out
