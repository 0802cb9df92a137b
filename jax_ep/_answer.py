"""What an exchange has to give, in NumPy, with all ranks' arrays at once: to check it anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from jax_ep._types import DROPPED


@dataclasses.dataclass(frozen=True)
class Answer:
    """A plan of all ranks.

    Attributes:
      fields: those of ``Plan`` by name, with a leading axis of ranks.
      capacity: rows of each rank.
      rank: where each choice goes, or ``DROPPED``.
      row: in which row there, or ``DROPPED``.
    """

    fields: dict[str, np.ndarray]
    capacity: int
    rank: Int[np.ndarray, "num_ranks num_tokens num_topk"]
    row: Int[np.ndarray, "num_ranks num_tokens num_topk"]

    @property
    def kept(self) -> Bool[np.ndarray, "num_ranks num_tokens num_topk"]:
        """Which choices have a row."""
        return self.rank != DROPPED

    def of_tokens(self, tokens: Int[np.ndarray, "some"]) -> "Answer":
        """Returns what concerns some tokens of each rank alone; their rows stay where they are."""
        return dataclasses.replace(self, rank=self.rank[:, tokens], row=self.row[:, tokens])

    def named(self) -> Bool[np.ndarray, "num_ranks capacity"]:
        """Returns which rows hold a kept choice, padding aside."""
        named = np.zeros((len(self.rank), self.capacity), bool)
        named[self.rank[self.kept], self.row[self.kept]] = True
        return named


def answer(
    topk_idx: Int[np.ndarray, "num_ranks num_tokens num_topk"],
    num_experts: int,
    capacity: int,
    alignment: int = 1,
) -> Answer:
    """Plans an exchange, by sorting all choices there are.

    Args:
      topk_idx: the choices of all ranks.
      num_experts: experts on all ranks together.
      capacity: rows of each rank.
      alignment: of what groups begin at a multiple.

    Returns:
      The plan that all implementations have to make.
    """
    num_ranks = len(topk_idx)
    num_local = num_experts // num_ranks
    routed = (topk_idx >= 0) & (topk_idx < num_experts)
    source, token, k = np.nonzero(routed)
    expert = topk_idx[routed]
    room = capacity - num_local * (alignment - 1)
    survives = _positions(expert // num_local, (source, token, k)) < room
    source, token, k, expert = (a[survives] for a in (source, token, k, expert))
    target, local = np.divmod(expert, num_local)
    counts = np.bincount(expert, minlength=num_experts).reshape(num_ranks, num_local)
    group_sizes = -(-counts // alignment) * alignment
    group_starts = np.cumsum(group_sizes, axis=1) - group_sizes
    rank, row = np.full((2, *topk_idx.shape), DROPPED)
    rank[source, token, k] = target
    row[source, token, k] = group_starts[target, local] + _positions(expert, (k, token, source))
    recv_counts = np.zeros((num_ranks, num_ranks), int)
    np.add.at(recv_counts, (target, source), 1)
    load = np.bincount(topk_idx[routed], minlength=num_experts)
    kept = rank != DROPPED
    fields = {
        "group_sizes": group_sizes,
        "kept": kept,
        "expert_load": np.stack([load] * num_ranks),
        "recv_counts": recv_counts,
        "num_dropped": (routed & ~kept).sum(axis=(1, 2)),
        "num_invalid": (~routed & (topk_idx != DROPPED)).sum(axis=(1, 2)),
    }
    return Answer(fields, capacity, rank, row)


def dispatched(
    x: Float[np.ndarray, "num_ranks num_tokens hidden"],
    answer: Answer,
    weights: Float32[np.ndarray, "num_ranks num_tokens num_topk"] | None = None,
) -> Float[np.ndarray, "num_ranks capacity hidden"]:
    """Returns all ranks' rows, each scaled by its choice's weight if there are weights."""
    rows = np.zeros((len(x), answer.capacity, x.shape[-1]), x.dtype)
    source, token, _ = np.nonzero(answer.kept)
    tokens = x[source, token]
    if weights is not None:
        scaled = weights[answer.kept][:, None] * tokens.astype(np.float32)
        tokens = scaled.astype(x.dtype)
    rows[answer.rank[answer.kept], answer.row[answer.kept]] = tokens
    return rows


def combined(
    rows: Float[np.ndarray, "num_ranks capacity hidden"],
    answer: Answer,
    weights: Float32[np.ndarray, "num_ranks num_tokens num_topk"] | None = None,
) -> Float[np.ndarray, "num_ranks num_tokens hidden"]:
    """Returns all ranks' sums, rounded as they have to be.

    In float64 a product is exact, and its sum with another number is close enough to that for
    float32 to round it as one ``fma`` does, but for odd cases that bfloat16 rows have none of.
    """
    shape = (*answer.rank.shape[:2], rows.shape[-1])
    total = np.zeros(shape, np.float32)
    for rank, theirs in enumerate(rows):
        partial = np.zeros(shape, np.float32)
        for k in range(answer.rank.shape[2]):
            here = answer.rank[..., k] == rank
            picked = theirs[answer.row[..., k][here]].astype(np.float64)
            scale = 1.0 if weights is None else weights[..., k][here][:, None].astype(np.float64)
            partial[here] = (scale * picked + partial[here]).astype(np.float32)
        total += partial.astype(rows.dtype).astype(np.float32)
    return total.astype(rows.dtype)


def dots(
    rows: Float[np.ndarray, "num_ranks capacity hidden"],
    answer: Answer,
    dout: Float[np.ndarray, "num_ranks num_tokens hidden"],
) -> Float32[np.ndarray, "num_ranks num_tokens num_topk"]:
    """Returns the gradients of weights: each row's product with its token's cotangent, or 0."""
    result = np.zeros(answer.rank.shape, np.float32)
    source, token, _ = np.nonzero(answer.kept)
    picked = rows[answer.rank[answer.kept], answer.row[answer.kept]].astype(np.float64)
    result[answer.kept] = (picked * dout[source, token].astype(np.float64)).sum(axis=-1)
    return result


def sizes(
    rows: Float[np.ndarray, "num_ranks capacity hidden"],
    answer: Answer,
    weights: Float32[np.ndarray, "num_ranks num_tokens num_topk"] | None = None,
) -> Float[np.ndarray, "num_ranks num_tokens hidden"]:
    """Adds up the sizes of what ``combined`` sums: the measure of its rounding errors."""
    return combined(np.abs(rows), answer, weights if weights is None else np.abs(weights))


def difference(
    got: jax.Array, want: np.ndarray, sizes: np.ndarray | None = None, places: int = 2
) -> str | None:
    """Says where what this process has of a result is not what it should be, or None.

    Args:
      got: all ranks' result.
      want: what it should be.
      sizes: None if it should be equal. Else what its numbers are sums of, in size.
      places: how many last places of these it may be off by.

    Returns:
      How many numbers differ, and the first.
    """
    for shard in got.addressable_shards:
        here, should = np.asarray(shard.data), want[shard.index]
        if sizes is None:
            wrong = here != should
        else:
            bound = places * float(jnp.finfo(here.dtype).eps) * sizes[shard.index]
            error = np.abs(here.astype(np.float64) - should.astype(np.float64))
            # So that NaN is wrong too.
            wrong = ~(error <= bound.astype(np.float64))
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0].tolist())
            rank = (shard.index[0].start or 0) + place[0]
            return (
                f"DIFFERS in {wrong.sum()} of {wrong.size} numbers, first at rank {rank}, "
                f"{list(place[1:])}: {here[place]}, should be {should[place]}"
            )
    return None


def _positions(group: np.ndarray, order: tuple[np.ndarray, ...]) -> np.ndarray:
    """Returns each choice's place in its group, in an order given by keys, the last one first."""
    places = np.lexsort((*order, group))
    ordered = group[places]
    positions = np.empty_like(places)
    positions[places] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return positions
