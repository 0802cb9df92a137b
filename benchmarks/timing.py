"""Times contenders side by side, and prints what came out as tables and JSON lines."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jax_ep
from jax_ep._timing import Contender, Times, compare, table

__all__ = [
    "Contender",
    "Times",
    "compare",
    "environment",
    "print_json",
    "print_table",
    "time_ranks",
]


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
    print(f"\n{table(title, header, rows)}\n", flush=True)


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
