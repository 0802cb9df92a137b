"""One rank of a cluster as its launcher sees it: a process, its log and its stage."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from jax_ep.testing._job import Job, Stage, read_stage

_SHOWN_LINES = 200
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


class RankProcess:
    """A running rank. Leave the ``with`` block and it is gone, and reaped."""

    def __init__(self, job: Job, folder: Path, rank: int, address: str):
        """Starts the rank; ``folder`` holds the job and receives log and stage."""
        self.rank = rank
        self._folder = folder
        self._log = folder / f"rank-{rank}.log"
        runner = [sys.executable, "-P", "-m", "jax_ep.testing._runner"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*runner, str(folder), str(rank), address],
                # The rank ends itself when this pipe closes, even if we are killed.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(job.devices_per_process),
                start_new_session=True,
            )

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._signal(signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    @property
    def stage(self) -> Stage:
        """How far the rank came."""
        return read_stage(self._folder, self.rank)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    @property
    def passed(self) -> bool:
        """Whether the body returned and the process then ended in order, or was to be ended."""
        if self.stage is Stage.DOOMED:
            return True
        return self._process.poll() == 0 and self.stage is Stage.PASSED

    @property
    def failed(self) -> bool:
        """Whether the body raised, or the process ended in any other way than by passing."""
        return self.stage is Stage.FAILED or not (self.running or self.passed)

    def dump_stacks(self) -> None:
        """Asks the rank to write the stack of each of its threads to its log."""
        # Before the body runs, the rank may not yet catch this signal: it would only die of it.
        if self.running and self.stage is not Stage.STARTING:
            self._signal(signal.SIGUSR1)

    def outcome(self) -> str:
        """Returns what became of the rank, as the end of a sentence."""
        code = self._process.poll()
        if self.stage is Stage.DOOMED:
            return "was " + str(self.stage)
        if self.stage is Stage.FAILED:
            return "raised an exception"
        if code is None:
            return f"was still {self.stage}"
        if self.passed:
            return "passed"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"ended with {cause} while {self.stage}"

    def output(self) -> str:
        """Returns the last lines that the rank printed."""
        lines = self._log.read_text(errors="replace").splitlines()
        hidden = len(lines) - _SHOWN_LINES
        head = [f"... {hidden} lines above ..."] if hidden > 0 else []
        return "\n".join(head + lines[-_SHOWN_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _environment(devices_per_process: int) -> dict[str, str]:
    env = dict(os.environ)
    env.pop("JAX_NUM_CPU_DEVICES", None)
    flags = re.sub(rf"{_DEVICE_COUNT_FLAG}=\S+", "", env.get("XLA_FLAGS", "")).split()
    env["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT_FLAG}={devices_per_process}"])
    env["JAX_PLATFORMS"] = "cpu"
    env["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env["PYTHONUNBUFFERED"] = "1"
    return env
