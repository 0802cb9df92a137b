"""What a trace says of who is to blame for waiting, in a sentence each."""

from collections.abc import Iterator

import numpy as np

from jax_ep._trace import Trace

_FEWEST_CALLS = 3
_WORTH = 0.05
"""Of an op's time: what takes less is not worth a word."""
_ROW, _POINT, _WORK = 3.0, 5.0, 1.5
"""How many times the others' is much: waiting of one, waiting of one for one, and work."""


def verdicts(trace: Trace) -> list[str]:
    """Says which ranks others wait for, which wait for others, and which work longer than others.

    Args:
      trace: of one process, or of all that take part put together.

    Returns:
      Sentences, by op; none where nothing stands out.
    """
    calls, said = trace.calls(), []
    for op in trace.ops:
        for num_ranks in np.unique(calls["num_ranks"][calls["op"] == op]):
            which = (calls["op"] == op) & (calls["num_ranks"] == num_ranks)
            if which.sum() < _FEWEST_CALLS or num_ranks < 2:
                continue
            some = {name: column[which] for name, column in calls.items()}
            said += _of_last(op, some, num_ranks)
            said += _of_work(op, some, num_ranks)
            said += _of_waits(op, trace._usual_waits(op, num_ranks), _time(some))
    return said


def _time(calls: dict[str, np.ndarray]) -> float:
    return float(np.median(calls["gather"] + calls["work"] + calls["tell"]))


def _of_last(op: str, calls: dict[str, np.ndarray], num_ranks: int) -> Iterator[str]:
    """Names a rank that is last far more often than by chance."""
    whole = calls["last_rank"] >= 0
    if whole.sum() < _FEWEST_CALLS:
        return
    last = calls["last_rank"][whole]
    counts = np.bincount(last, minlength=num_ranks)
    rank = int(counts.argmax())
    share = counts[rank] / len(last)
    lateness = calls["lateness"][whole][last == rank, :num_ranks]
    before = np.sort(lateness, axis=1)
    behind = float(np.median(before[:, -1] - before[:, -2]))
    is_worth = share * behind > _WORTH * _time(calls)
    if share > (1 + 1 / num_ranks) / 2 and is_worth:
        yield (
            f"rank {rank} was last in {share:.0%} of {op} calls, {ms(behind)} behind the next in "
            "the median: slow before them"
        )


def _of_work(op: str, calls: dict[str, np.ndarray], num_ranks: int) -> Iterator[str]:
    """Names ranks whose process works longer than the others'."""
    work = calls["rank_work"][:, :num_ranks]
    known = ~np.isnan(work).any(axis=1)
    if known.sum() < _FEWEST_CALLS or (work[known] == work[known][:, :1]).all():
        return  # Those of one process work together.
    median = np.median(work[known], axis=0)
    of_process = np.unique(median)
    usual = np.array([np.median(of_process[of_process != own]) for own in median])
    worth = _WORTH * _time(calls)
    long = np.flatnonzero((median > _WORK * usual) & (median - usual > worth))
    if len(long):
        who = f"rank {long[0]} works" if len(long) == 1 else f"ranks {_list(long)} work"
        took = median[long].max()
        yield (
            f"{who} {ms(took)} in {op}, {took / usual[long].max():.1f} times as long as the "
            "others: more rows to receive, or fewer cores"
        )


def _of_waits(op: str, waits: np.ndarray, time: float) -> Iterator[str]:
    """Names a rank that waits for all others, and pairs of which one waits for the other alone."""
    num_ranks = len(waits)
    if num_ranks < 3:
        return
    others = ~np.eye(num_ranks, dtype=bool)
    rows = np.array([np.median(waits[i, others[i]]) for i in range(num_ranks)])
    for i in range(num_ranks):
        if rows[i] > max(_ROW * np.median(np.delete(rows, i)), _WORTH * time):
            yield (
                f"rank {i} waits for all others, {ms(rows[i])} for each in {op}: it has less to "
                "do before, or is slow to see that they have come"
            )
    for i, j in np.argwhere(others).tolist():
        rest_of_row = np.median(np.delete(waits[i], [i, j]))
        rest_of_column = np.median(np.delete(waits[:, j], [i, j]))
        usual = _POINT * max(rest_of_row, rest_of_column)
        if waits[i, j] > max(usual, _WORTH * time):
            yield (
                f"rank {i} waits {ms(waits[i, j])} for rank {j} in {op}, and nobody else does: "
                "the way between them is slow"
            )


def ms(seconds: float) -> str:
    """Writes a time in milliseconds."""
    return f"{1e3 * seconds:.3g} ms"


def _list(ranks: np.ndarray) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
