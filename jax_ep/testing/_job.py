"""What a launcher tells its ranks, and what a rank tells back: files in one folder."""

from __future__ import annotations

import dataclasses
import enum
import os
import pickle
from pathlib import Path


class Stage(enum.StrEnum):
    """How far a rank came, in the order in which it happens."""

    STARTING = "starting"
    CLASHED = "finding its port taken"
    CONNECTING = "connecting to the other ranks"
    RUNNING = "running the test body"
    PASSED = "leaving"
    FAILED = "after an exception"
    DOOMED = "to be ended by the test"


@dataclasses.dataclass(frozen=True)
class Job:
    """One test body, and the cluster that it wants."""

    file: str
    module: str
    name: str
    arguments: bytes  # pickled (args, kwargs); unpickled after the module is loaded
    num_processes: int
    devices_per_process: int
    timeout: float

    def __str__(self) -> str:
        """Returns the test's name as pytest would write it."""
        return f"{os.path.relpath(self.file)}::{self.name}"

    def save(self, folder: Path) -> None:
        """Writes this job for `load`."""
        (folder / "job").write_bytes(pickle.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Reads what `save` wrote, in a child that trusts its parent."""
        return cls(**pickle.loads((folder / "job").read_bytes()))  # noqa: S301


def write_stage(folder: Path, rank: int, stage: Stage) -> None:
    """Replaces the stage of one rank; a reader sees the old one or the new one."""
    draft = folder / f"rank-{rank}.stage.draft"
    draft.write_text(stage.name)
    draft.replace(folder / f"rank-{rank}.stage")


def read_stage(folder: Path, rank: int) -> Stage:
    """Returns the last stage that a rank reported."""
    file = folder / f"rank-{rank}.stage"
    return Stage[file.read_text()] if file.exists() else Stage.STARTING


_entered: list[Path] = []


def enter(folder: Path) -> None:
    """Remembers, in a rank, the folder of its job."""
    _entered.append(folder)


def current_folder() -> Path:
    """Returns the folder of the job whose body this process runs.

    Raises:
      RuntimeError: this process is no rank of a job.
    """
    if not _entered:
        raise RuntimeError("This only works in the body of a multiprocess test.")
    return _entered[-1]
