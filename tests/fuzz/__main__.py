"""Runs random cases until the time is up, and stops at the first that fails."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import pathlib
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # Where pytest finds tests' modules.

import conftest  # noqa: F401  # Eight devices, before JAX starts.
import jax

from .case import Case
from .check import check

HANGS_AFTER = 300
CLEAR_EVERY = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="repeat this one case")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(time.time_ns(), 2**63)
    end, counts = time.monotonic() + 60 * options.minutes, collections.Counter()
    for number, seed in enumerate(seeds):
        case = Case.draw(seed)
        if options.seed is not None:
            print(case)
        if not _survives(case, counts):
            return 1
        if number % CLEAR_EVERY == CLEAR_EVERY - 1:
            jax.clear_caches()  # Programs would fill the memory.
        if time.monotonic() > end:
            break
    for kind, count in sorted(counts.items()):
        print(f"{count:8d} {kind}")
    return 0


def _survives(case: Case, counts: collections.Counter[str]) -> bool:
    # What hangs or ends the process has said which case it was.
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    _note(case)
    try:
        check(case, counts)
    except BaseException as error:
        traceback.print_exc()
        print(f"seed {case.seed} failed: {case}", file=sys.stderr)
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "Failed":
            raise
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()
    return True


def _note(case: Case) -> None:
    folder = pathlib.Path("build")
    folder.mkdir(exist_ok=True)
    (folder / "fuzz-last-seed").write_text(f"{case.seed}\n")


if __name__ == "__main__":
    sys.exit(main())
