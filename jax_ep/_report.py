"""What a trace tells a reader: times by op and by layer, and what stands out."""

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_ep._exchanges import STREAMS
from jax_ep._trace import Trace
from jax_ep._verdicts import ms, verdicts

_QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
_LAYERS = 5
_PHASES = ("wait", "work", "tell")
_NS_PER_US = 1e3


def report(trace: Trace) -> str:
    """Describes a trace to a reader: a table of its ops, its slowest layers, and verdicts.

    Args:
      trace: of one process, or of several put together.

    Returns:
      Lines of text.
    """
    calls = trace.calls()
    sections = ["\n".join(_head(trace, calls))]
    if len(trace):
        sections += ["\n".join(_table(trace, calls)), "\n".join(_layers(calls))]
        sections.append("\n".join(verdicts(trace)) or "no rank stands out")
    return "\n\n".join(section for section in sections if section)


def _head(trace: Trace, calls: dict[str, np.ndarray]) -> Iterator[str]:
    yield f"exchanges: {len(trace)}; processes that recorded them: {len(trace.processes)}"
    if len(trace):
        span = (calls["last_arrival"].max() - calls["first_arrival"].min()) * 1e-9
        fabrics = ", ".join(sorted(set(calls["fabric"].tolist())))
        yield f"in {span:.3g} s; who met: {fabrics}; ranks: {calls['num_ranks'].max()}"
    if trace.num_lost:
        yield f"{trace.num_lost} records are lost: record fewer steps at once"


def _table(trace: Trace, calls: dict[str, np.ndarray]) -> Iterator[str]:
    """One row for each op: from when the first rank came until the last was told."""
    width = max(len(op) for op in trace.ops)
    names = "".join(f"{name:>9}" for name in _QUANTILES)
    yield f"{'ms':<{width}}{'calls':>7}{names}{'waiting':>9}{'work':>7}{'tell':>7}"
    parts = np.stack([calls[name] for name in ("gather", "work", "tell")])
    for op in trace.ops:
        some = parts[:, calls["op"] == op]
        time = some.sum(axis=0)
        quantiles = "".join(f"{1e3 * np.quantile(time, q):9.3f}" for q in _QUANTILES.values())
        gather, work, tell = some.sum(axis=1) / max(float(time.sum()), 1e-12)
        yield f"{op:<{width}}{time.size:7}{quantiles}{gather:9.0%}{work:7.0%}{tell:7.0%}"


def _layers(calls: dict[str, np.ndarray]) -> Iterator[str]:
    """Where most is waited, if the program's parts have names."""
    scopes = calls["scope"]
    if len(names := np.unique(scopes)) < 2:
        return
    sums = {str(name): float(calls["gather"][scopes == name].sum()) for name in names}
    total = max(sum(sums.values()), 1e-12)
    yield "most of the waiting is in"
    for name in sorted(sums, key=lambda name: -sums[name])[:_LAYERS]:
        yield f"  {sums[name] / total:4.0%}  {ms(sums[name]):>9}  {name or '(no name)'}"


def save_timeline(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Writes what a trace holds for Perfetto (ui.perfetto.dev) or ``chrome://tracing``.

    Each rank has a line, on which it waits, works and is told; times are those of the host's steady
    clock.

    Args:
      trace: of one process, or of several put together.
      path: the file, which is replaced.

    Raises:
      OSError: the file cannot be written.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": [*_names(trace), *_events(trace)]}, file)


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    for process in trace.processes:
        told = {"name": f"jax_ep, process {process}"}
        yield {"ph": "M", "name": "process_name", "pid": process, "args": told}
    calls = trace.calls()
    lines = {(p, _line(calls, number, r), r) for p, r, (number, *_) in trace._visits()}
    for process, line, rank in sorted(lines):
        told = {"name": f"rank {rank}" if line == rank else f"rank {rank}'s stream"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": line, "args": told}


def _line(calls: dict[str, np.ndarray], number: int, rank: int) -> int:
    """Returns a rank's line, that of its stream below those of all ranks."""
    is_stream = calls["fabric"][number] == STREAMS
    return rank + (calls["lateness"].shape[1] if is_stream else 0)


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    calls = trace.calls()
    for process, rank, (number, *times) in trace._visits():
        told = {name: calls[name][number].item() for name in ("scope", "epoch", "fabric")}
        op = calls["op"][number]
        for what, begin, end in zip(_PHASES, times[:-1], times[1:], strict=True):
            yield {
                "ph": "X",
                "name": f"{op}: {what}",
                "cat": what,
                "pid": process,
                "tid": _line(calls, number, rank),
                "ts": begin / _NS_PER_US,
                "dur": (end - begin) / _NS_PER_US,
                "args": told,
            }
