"""Times contenders side by side, and prints what came out as tables and JSON lines."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

import jax_ep

Contender = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

# A contender slower than this sits out rounds in proportion, so that it does not eat the budget of
# the fast ones; it still runs in at least a few.
_SLOW_SECONDS = 0.2
_FEWEST_SAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Times:
    """What one contender took, one entry per run."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()
    """Of all threads of the process: it tells work from waiting, and from a busy machine."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p10(self) -> float:
        return float(np.percentile(self.seconds, 10))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def cpu_median(self) -> float:
        return float(np.median(self.cpu_seconds))

    def as_json(self) -> dict[str, float | int]:
        """Returns the summary in milliseconds."""
        return {
            "median_ms": round(self.median * 1e3, 4),
            "p10_ms": round(self.p10 * 1e3, 4),
            "p90_ms": round(self.p90 * 1e3, 4),
            "runs": len(self.seconds),
            **({"cpu_ms": round(self.cpu_median * 1e3, 4)} if self.cpu_seconds else {}),
        }

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ({self.p10 * 1e3:.2f}-{self.p90 * 1e3:.2f})"


def compare(
    contenders: Mapping[Key, Contender], *, repeats: int = 50, warmup: int = 3
) -> dict[Key, Times]:
    """Times all contenders in one interleaved run, so that noise of the machine hits all alike.

    Every round runs each contender once, in a new random order: what one leaves behind in caches
    and free memory is then not always the same one's to find.

    Args:
      contenders: calls whose results, arrays in any pytree or nothing, are waited for. A result is
        released before the clock of the next run starts.
      repeats: rounds. A slow contender takes part in every n-th only.
      warmup: runs of each before its first that counts; the first compiles.

    Returns:
      The times of each contender.
    """
    every = {name: _rounds_between(call, warmup, repeats) for name, call in contenders.items()}
    runs: dict[Key, list[tuple[float, float]]] = {name: [] for name in contenders}
    order = random.Random(0)
    for round_number in range(repeats):
        names = [name for name in contenders if round_number % every[name] == 0]
        order.shuffle(names)
        for name in names:
            runs[name].append(_time(contenders[name]))
    return {name: Times(*zip(*pairs, strict=True)) for name, pairs in runs.items()}


def time_ranks(call: Contender, *, repeats: int = 20, warmup: int = 2) -> Times:
    """Times the slowest rank: how long until the last device has its own shards of the result.

    All devices of the process start at one call, so that a rank's time is from that call to its
    shards being ready, waited for by a thread of its own. The slowest rank is the one whose median
    is the largest; a program's time exceeds it where another rank is the last in each run.

    Args:
      call: returns arrays, in any pytree, with a shard on every device.
      repeats: runs.
      warmup: runs before the first that counts.

    Returns:
      The times of the slowest rank.
    """
    with concurrent.futures.ThreadPoolExecutor(jax.local_device_count()) as pool:
        runs = [_time_shards(call, pool) for _ in range(warmup + repeats)][warmup:]
    per_rank = [Times(ranks) for ranks in zip(*runs, strict=True)]
    return max(per_rank, key=lambda times: times.median)


def environment() -> dict[str, str | int]:
    """Returns what the numbers depend on besides the code: versions, machine, commit."""
    return {
        "jax_ep": jax_ep.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": jax.device_count(),
        "transparent_hugepages": _transparent_hugepages(),
    }


def print_json(case: Mapping[str, Any]) -> None:
    """Prints one case as a line of JSON."""
    print(json.dumps(case), flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under a header, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    print(flush=True)


def _time(call: Contender) -> tuple[float, float]:
    """Runs once; returns the seconds it took, and those of the processors."""
    cpu_start, start = time.process_time(), time.perf_counter()
    result = call()
    jax.block_until_ready(result)
    # In this order: the result, released on return, is not part of either.
    return time.perf_counter() - start, time.process_time() - cpu_start


def _rounds_between(call: Contender, warmup: int, repeats: int) -> int:
    """Warms a contender up; returns in which rounds it takes part: every that many."""
    seconds = [_time(call)[0] for _ in range(max(2, warmup))]
    wanted = max(1, round(min(seconds) / _SLOW_SECONDS))
    return min(wanted, max(1, repeats // _FEWEST_SAMPLES))


def _time_shards(call: Contender, pool: concurrent.futures.Executor) -> tuple[float, ...]:
    """Runs once; returns the seconds until each device's shards were ready, by device."""
    start = time.perf_counter()
    shards: dict[int, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(call()):
        for shard in leaf.addressable_shards:
            shards.setdefault(shard.device.id, []).append(shard.data)

    def wait(device: int) -> float:
        jax.block_until_ready(shards[device])
        return time.perf_counter() - start

    return tuple(pool.map(wait, sorted(shards)))


def _commit() -> str:
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


def _cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _transparent_hugepages() -> str:
    try:
        setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return setting[setting.index("[") + 1 : setting.index("]")]
