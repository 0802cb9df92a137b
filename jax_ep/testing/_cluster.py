"""Runs a job on a cluster of local processes, and says which rank failed, how and why."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jax_ep.testing._job import Job, Stage
from jax_ep.testing._rank_process import RankProcess

_PORT_TRIES = 5
_POLL_S = 0.02
# After a first failure: time for other ranks to report theirs, as one mistake often hits all.
_GRACE_S = 0.5


class MultiprocessFailure(AssertionError):
    """A test body failed, hung or vanished on some rank; the message shows every rank."""


def run_cluster(job: Job) -> None:
    """Runs a job to its end; no process of it is left afterwards.

    Args:
      job: what to run, and where.

    Raises:
      MultiprocessFailure: a rank did not pass, or not within the job's time limit.
    """
    __tracebackhide__ = True
    for _ in range(_PORT_TRIES):
        if not _attempt(job, f"127.0.0.1:{free_port()}"):
            return
    raise MultiprocessFailure(f"{job}: found no free port for rank 0 in {_PORT_TRIES} tries.")


def free_port() -> int:
    """Returns a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _attempt(job: Job, address: str) -> bool:
    """Runs a job once, and returns whether it must be tried again at another address."""
    __tracebackhide__ = True
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jax_ep-")))
        job.save(folder)
        ranks = [
            stack.enter_context(RankProcess(job, folder, rank, address))
            for rank in range(job.num_processes)
        ]
        culprits = _wait(ranks, job.timeout)
        if ranks[0].stage is Stage.CLASHED:
            return True
        if culprits:
            raise MultiprocessFailure(_report(job, ranks, culprits))
    return False


def _wait(ranks: Sequence[RankProcess], timeout: float) -> list[RankProcess]:
    """Waits for all ranks to pass or for a first failure; returns whose failure it was."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        failed = [rank for rank in ranks if rank.failed]
        if failed:
            time.sleep(_GRACE_S)
            return failed
        if all(rank.passed for rank in ranks):
            return []
        time.sleep(_POLL_S)
    hanging = [rank for rank in ranks if not rank.passed]
    # A rank that waits for the others to leave is a victim, unless all of them wait.
    hanging = [rank for rank in hanging if rank.stage is not Stage.PASSED] or hanging
    for rank in hanging:
        rank.dump_stacks()
    time.sleep(_GRACE_S)
    return hanging


def _report(job: Job, ranks: Sequence[RankProcess], culprits: Sequence[RankProcess]) -> str:
    raised = [rank for rank in culprits if rank.stage is Stage.FAILED]
    culprits = raised or culprits
    others = [rank for rank in ranks if rank not in culprits]
    hung = not any(rank.failed for rank in culprits)
    limit = f" when its {job.timeout:g} s were over" if hung else ""
    lines = [
        f"{job} did not pass on {job.num_processes} processes x {job.devices_per_process} devices:",
        *(f"  rank {rank.rank} {rank.outcome()}{limit}" for rank in culprits),
        *(f"  rank {rank.rank} {rank.outcome()}" for rank in others),
    ]
    for rank in [*culprits, *others]:
        lines += [f"----- output of rank {rank.rank} -----", rank.output()]
    return "\n".join(lines)
