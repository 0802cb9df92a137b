"""Checks that native code includes only what its folder may know of.

Run by ``make lint``. Prints file, line and the rule of each include that is out of place.
"""

import pathlib
import re
import sys

# Those that every platform has.
FABRICS = ["fabric/work", "fabric/threads", "fabric/processes"]

# What the files of a folder may include besides their own folder's. XLA's headers are "xla".
MAY_INCLUDE = {
    "common": [],
    "cpu": ["common"],
    "cuda": ["common"],
    "fabric/work": ["common"],
    "fabric/threads": ["common", "fabric/work"],
    "fabric/processes": ["common", "fabric/work", "fabric/threads"],
    "fabric/gpus": ["common", *FABRICS],
    "bind": ["common", "xla"],
    "bind/process": ["common", *FABRICS, "bind", "xla"],
    "bind/cpu": ["common", "cpu", *FABRICS, "bind", "bind/process", "xla"],
    "bind/cuda": ["common", "cuda", *FABRICS, "fabric/gpus", "bind", "bind/process", "xla"],
}

SOURCES = {".h", ".cc", ".cu"}
INCLUDE = re.compile(r'\s*#\s*include\s*(?:"([^"]+)"|<(xla/[^>]+)>)')


def folder_of_include(path: str) -> str:
    """Returns the folder that an included path is in; all of XLA is one."""
    return "xla" if path.startswith("xla/") else str(pathlib.PurePosixPath(path).parent)


def problems_of(path: pathlib.Path, name: str) -> list[str]:
    """Returns what is wrong with the includes of the source at ``path``, called ``name``."""
    folder = str(pathlib.PurePosixPath(name).parent)
    if folder not in MAY_INCLUDE:
        return [f"{path}: MAY_INCLUDE of ffi/check_includes.py must name its folder, {folder}"]
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        include = INCLUDE.match(line)
        if include is None:
            continue
        included = include[1] or include[2]
        if folder_of_include(included) not in [folder, *MAY_INCLUDE[folder]]:
            rule = ", ".join([f"its own folder ({folder})", *MAY_INCLUDE[folder]])
            problems.append(f"{path}:{number}: includes {included}, but may include only {rule}")
    return problems


def main() -> int:
    """Checks all sources next to this file; returns the exit status."""
    root = pathlib.Path(__file__).parent
    sources = sorted(path for path in root.rglob("*") if path.suffix in SOURCES)
    problems = [
        problem
        for path in sources
        for problem in problems_of(path, path.relative_to(root).as_posix())
    ]
    print("\n".join(problems) or f"{len(sources)} files include what they may")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
