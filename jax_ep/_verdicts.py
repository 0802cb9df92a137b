"""What in a trace stands out, in a sentence each: who is late, works long, or waits for whom."""

from collections.abc import Iterator

import numpy as np

from jax_ep._trace import Trace

Calls = dict[str, np.ndarray]

_FEWEST_CALLS = 3
_WORTH = 0.05
"""Of an op's time: what takes less is not worth a word."""
_ROW, _POINT, _WORK = 3.0, 5.0, 1.5
"""How many times the others' is much: waiting for all, waiting for one, and work."""
_LAYERS = 3


def verdicts(trace: Trace) -> list[str]:
    """Says which ranks others wait for, which wait for others, and which work longer than others.

    Each op is looked at as a whole and, if nothing stands out, in the layers that wait most.

    Args:
      trace: of one process, or of all that take part put together.

    Returns:
      Sentences, by op; none where nothing stands out.
    """
    calls, said = trace.calls(), []
    for op in trace.ops:
        for num_ranks in np.unique(calls["num_ranks"][calls["op"] == op]):
            which = (calls["op"] == op) & (calls["num_ranks"] == num_ranks)
            found = _look_at(trace, calls, which, op)
            for scope in [] if found else _layers(calls, which):
                among = f"{op} of {scope or 'no layer'}"
                found += _look_at(trace, calls, which & (calls["scope"] == scope), among)
            said += found
    return said


def _layers(calls: Calls, which: np.ndarray) -> list[str]:
    """Returns the layers that wait most, if there are several."""
    scopes = calls["scope"][which]
    waits = {str(name): calls["gather"][which][scopes == name].sum() for name in np.unique(scopes)}
    return sorted(waits, key=lambda name: -waits[name])[:_LAYERS] if len(waits) > 1 else []


def _look_at(trace: Trace, calls: Calls, which: np.ndarray, op: str) -> list[str]:
    num_ranks = int(calls["num_ranks"][which].max())
    if which.sum() < _FEWEST_CALLS or num_ranks < 2:
        return []
    some = {
        name: column[which] if column.ndim == 1 else column[which][:, :num_ranks]
        for name, column in calls.items()
    }
    worth = _WORTH * float(np.median(some["gather"] + some["work"] + some["tell"]))
    waits = trace._usual_waits(which)[:num_ranks, :num_ranks]
    return [*_of_last(op, some, worth), *_of_work(op, some, worth), *_of_waits(op, waits, worth)]


def _of_last(op: str, calls: Calls, worth: float) -> Iterator[str]:
    """Names a rank, or else a process, that is last far more often than by chance."""
    whole = calls["last_rank"] >= 0
    if whole.sum() < _FEWEST_CALLS:
        return
    lateness = calls["lateness"][whole]
    process = calls["rank_process"][whole]
    rank = np.broadcast_to(np.arange(lateness.shape[1]), lateness.shape)
    for kind, owner in (("rank", rank), ("a rank of process", process)):
        last = owner[np.arange(len(owner)), calls["last_rank"][whole]]
        owners, counts = np.unique(last, return_counts=True)
        most, share = owners[counts.argmax()], counts.max() / len(last)
        is_its = owner[last == most] == most
        if is_its.all() or share <= (1 + 1 / len(np.unique(owner))) / 2:
            continue
        late = lateness[last == most]
        next_to_last = np.where(is_its, 0, late).max(axis=1)
        behind = float(np.median(late.max(axis=1) - next_to_last))
        if share * behind > worth:
            yield (
                f"{kind} {most} was last in {share:.0%} of {op} calls, {ms(behind)} behind the "
                "next in the median: slow before them"
            )
            return


def _of_work(op: str, calls: Calls, worth: float) -> Iterator[str]:
    """Names ranks whose process works longer than the others'."""
    work = calls["rank_work"]
    known = ~np.isnan(work).any(axis=1)
    if known.sum() < _FEWEST_CALLS or (work[known] == work[known][:, :1]).all():
        return  # Those of one process work together.
    median = np.median(work[known], axis=0)
    of_process = np.unique(median)
    usual = np.array([np.median(of_process[of_process != own]) for own in median])
    long = np.flatnonzero((median > _WORK * usual) & (median - usual > worth))
    if len(long):
        who = f"rank {long[0]} works" if len(long) == 1 else f"ranks {_list(long)} work"
        took = median[long].max()
        yield (
            f"{who} {ms(took)} in {op}, {took / usual[long].max():.1f} times as long as the "
            "others: more rows to receive, or fewer cores"
        )


def _of_waits(op: str, waits: np.ndarray, worth: float) -> Iterator[str]:
    """Names a rank that waits for all others, and pairs of which one waits for the other alone."""
    num_ranks = len(waits)
    if num_ranks < 3:
        return
    others = ~np.eye(num_ranks, dtype=bool)
    rows = np.array([waits[i, others[i]].min() for i in range(num_ranks)])
    for i in range(num_ranks):
        if rows[i] > max(_ROW * np.median(np.delete(rows, i)), 2 * worth):
            yield (
                f"rank {i} waits for all others, {ms(rows[i])} and more for each in {op}: it has "
                "less to do before, or sees late that they have come"
            )
    for i, j in np.argwhere(others).tolist():
        rest_of_row = np.median(np.delete(waits[i], [i, j]))
        rest_of_column = np.median(np.delete(waits[:, j], [i, j]))
        if waits[i, j] > max(_POINT * max(rest_of_row, rest_of_column), worth):
            yield (
                f"rank {i} waits {ms(waits[i, j])} for rank {j} in {op}, and nobody else does: "
                "the way between them is slow"
            )


def ms(seconds: float) -> str:
    """Writes a time in milliseconds, or if it is long in seconds."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _list(ranks: np.ndarray) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
