"""The child process of one rank: joins the cluster, then runs the test body.

Started as ``python -m jax_ep.testing._runner FOLDER RANK ADDRESS`` by `_cluster`.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from jax_ep.testing._job import Job, Stage, enter, read_stage, write_stage

_POLL_S = 0.02
_HEARTBEAT_TIMEOUT_S = 600  # the launcher watches the ranks; JAX need not


def main(folder: Path, rank: int, address: str) -> None:
    """Runs one rank of the job in ``folder``; does not return if its body raises."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = Job.load(folder)
    report = functools.partial(write_stage, folder, rank)
    if rank == 0 and not _can_bind(address):
        # JAX 0.12.0 crashes on a taken port, so that it must not get to see one.
        report(Stage.CLASHED)
        return
    try:
        report(Stage.CONNECTING)
        _join_cluster(job, rank, address)
        body = _load_body(job)
        args, kwargs = pickle.loads(job.arguments)  # noqa: S301 (from our own parent)
        enter(folder)
        report(Stage.RUNNING)
        body(*args, **kwargs)
    except BaseException:
        traceback.print_exc()
        _leave_if_doomed(folder, rank)
        report(Stage.FAILED)
        # The launcher ends this process. An exit of ours would abort the other ranks before they
        # can report the same mistake, and JAX's exit handler waits for ranks that may never come.
        threading.Event().wait()
    _leave_if_doomed(folder, rank)
    report(Stage.PASSED)
    stages = functools.partial(_stages, folder, job.num_processes)
    if Stage.DOOMED not in stages():
        jax.distributed.shutdown()
        return
    # JAX would wait for the dead at the end. It ends all others when rank 0 is gone, so that goes
    # last.
    while rank == 0 and not set(stages()) <= {Stage.PASSED, Stage.DOOMED}:
        time.sleep(_POLL_S)
    sys.stdout.flush()
    os._exit(0)


def _leave_if_doomed(folder: Path, rank: int) -> None:
    """Ends a process that the test meant to be gone; what it still met does not matter."""
    if read_stage(folder, rank) is Stage.DOOMED:
        os._exit(1)


def _stages(folder: Path, num_processes: int) -> list[Stage]:
    return [read_stage(folder, rank) for rank in range(num_processes)]


def _leave_with_parent() -> None:
    """Ends this process when the launcher is gone, however it went."""
    # Not through sys.stdin: Python would wait for its lock when it ends.
    os.read(0, 1)
    os._exit(1)


def _can_bind(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        # Like the server that follows, tolerate connections of a past run in TIME_WAIT.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def _join_cluster(job: Job, rank: int, address: str) -> None:
    if job.num_processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=address,
        coordinator_bind_address=address,
        num_processes=job.num_processes,
        process_id=rank,
        initialization_timeout=max(1, round(job.timeout)),
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
    )


def _load_body(job: Job) -> Callable[..., object]:
    """Imports the test's file under its name in the parent, and takes the body from it."""
    spec = importlib.util.spec_from_file_location(job.module, job.file)
    if spec is None or spec.loader is None:
        raise ImportError(f"Cannot import the test module {job.module!r} from {job.file!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[job.module] = module
    spec.loader.exec_module(module)
    function = getattr(module, job.name)
    return getattr(function, "multiprocess_body", function)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
