"""Whether GPUs add up what they hold of a token before its rank pulls it: what that would save.

`combine` pulls a row for each of a token's choices. Those of one rank end up in one sum, which that
rank can make: then one row crosses the wire for each rank, with the same bits. In return the rank
reads these rows once more, and writes their sums. Rows that are alone on their rank stay as they
are. Peers in other processes read a window, though, and not the rows: in there go the sums, in
place of a copy of all rows, and rows that are alone as sums of one.
"""

from collections.abc import Sequence
from typing import Any

from jax_ep._layout import Layout

FORCED: bool | None = None
"""What to do whatever it saves, for tests: they set it before a program is lowered."""

# Of one GPU, in bytes per second. An H100 has 450 GB/s of NVLink in each direction, of which pulls
# reach three quarters, and copies 3 TB/s in its memory. Newer GPUs have about the same ratio.
_WIRE = 0.75 * 450e9
_MEMORY = 3e12
# In seconds: one more kernel, and one more collective of XLA's, both with next to nothing to do.
_KERNEL = 10e-6
_GATHER = 25e-6


def use(layout: Layout, pulled: Sequence[Any], *, are_weighted: bool, in_windows: bool) -> bool:
    """Returns whether to pull partial sums, which is a matter of time alone.

    Args:
      layout: the exchange.
      pulled: the arrays of rows.
      are_weighted: whether they are scaled as they are added up: then every rank needs to know all
        ranks' weights.
      in_windows: whether peers read windows, and not the rows where they are.
    """
    if FORCED is not None:
        return FORCED
    row_bytes = [rows.shape[-1] * rows.dtype.itemsize for rows in pulled]
    return saved_seconds(layout, row_bytes, are_weighted=are_weighted, in_windows=in_windows) > 0


def saved_seconds(
    layout: Layout, row_bytes: Sequence[int], *, are_weighted: bool, in_windows: bool
) -> float:
    """Returns by how much partial sums make an exchange shorter if each token's experts are random.

    With 8 ranks, 64 experts and 8 choices a token has choices on 5.4 ranks, on 3.4 of them one. So
    it pulls 5.4 rows instead of 8, of which an eighth need no wire; and for it 4.6 rows are read
    and 2.1 written. For 4096 tokens of 7168 bfloat16 numbers that is 0.39 ms less of 1.2, against
    0.13 ms of summing. Into a window the sums take 0.26 ms, and copying all rows 0.31 or more.
    """
    ranks, tokens, topk = layout.num_ranks, layout.num_tokens, layout.num_topk
    distinct, single = layout.ranks_of_a_token
    total = tokens * sum(row_bytes)
    elsewhere = (ranks - 1) / ranks
    wire = (topk - distinct) * elsewhere * total / _WIRE
    if in_windows:
        copies = 2 * layout.capacity * sum(row_bytes)
        saved = wire - ((topk + distinct) * total - copies) / _MEMORY
    else:
        memory = (topk - single + distinct - single) * total / _MEMORY
        saved = wire - memory - len(row_bytes) * _KERNEL
    if are_weighted:
        saved -= _GATHER + (ranks - 1) * tokens * topk * 4 / _WIRE
    return saved
