"""Fails where a source file is longer than it may be: it wants to be two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMITS = {".py": 300, ".h": 300, ".cc": 400, ".cu": 400}


def main() -> int:
    """Names each tracked file that is too long, with its length and the limit."""
    patterns = [f"*{suffix}" for suffix in LIMITS]
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], check=True, capture_output=True, text=True
    )
    files = [Path(name) for name in listing.stdout.split("\0") if name]
    lengths = {file: len(file.read_bytes().splitlines()) for file in files if file.exists()}
    too_long = {file: n for file, n in lengths.items() if n > LIMITS[file.suffix]}
    for file, length in too_long.items():
        print(f"{file} has {length} lines; the limit is {LIMITS[file.suffix]}.")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
