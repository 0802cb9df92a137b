"""Tells what each kernel takes of a GPU: registers, shared memory and spills, as ptxas says.

``resources.py compile COMMAND...`` runs a compiler and keeps its report beside the object;
``resources.py table FOLDER`` prints the reports of all objects in a folder.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_SUFFIX = ".ptxas"
_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")
_PTXAS_SAYS = re.compile(r"ptxas info|^ +\d+ bytes stack frame")


class Kernel(NamedTuple):
    """What one kernel takes on one architecture; sizes in bytes."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def compile_and_keep(command: Sequence[str]) -> int:
    """Runs a compiler; keeps ptxas' report beside its object and passes the rest on."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    for line in done.stderr.splitlines():
        if not _PTXAS_SAYS.search(line):
            print(line, file=sys.stderr)
    target = command[command.index("-o") + 1]
    pathlib.Path(target + _SUFFIX).write_text(done.stderr)
    return done.returncode


def kernels_in(folder: pathlib.Path) -> Iterator[Kernel]:
    """Reads the reports of all objects in a folder and those below it."""
    for report in sorted(folder.rglob("*" + _SUFFIX)):
        for entry in _ENTRY.finditer(report.read_text()):
            shared = _SHARED.search(entry["rest"])
            yield Kernel(
                name=entry["symbol"],
                arch=entry["arch"],
                registers=int(entry["registers"]),
                shared=int(shared[1]) if shared else 0,
                stack=int(entry["stack"]),
                spilled=int(entry["stores"]) + int(entry["loads"]),
            )


def named(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Replaces symbols by what the source calls the kernels, where c++filt is installed."""
    kernels = list(kernels)
    symbols = "\n".join(kernel.name for kernel in kernels)
    try:
        run = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return kernels
    names = [
        re.sub(r"void |jax_ep::(cuda::)?|\(anonymous namespace\)::|\([^()]*\)$", "", name)
        for name in run.stdout.splitlines()
    ]
    return [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]


def print_table(kernels: Iterable[Kernel]) -> None:
    """Prints a line for each kernel, with a number for each architecture where they differ."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    width = max(map(len, by_name))
    fields = ("arch", "registers", "shared", "stack", "spilled")
    print("kernel".ljust(width), *(field.rjust(16) for field in fields))
    for name, variants in by_name.items():
        columns = ([str(getattr(v, field)) for v in variants] for field in fields)
        # Architectures that agree share a number.
        texts = ("/".join(column if len(set(column)) > 1 else column[:1]) for column in columns)
        print(name.ljust(width), *(text.rjust(16) for text in texts))


def main(arguments: Sequence[str]) -> int:
    """Does what the first argument names; returns the exit status, 1 where a kernel spills."""
    match arguments:
        case ["compile", *command] if "-o" in command:
            return compile_and_keep(command)
        case ["table", folder]:
            kernels = named(kernels_in(pathlib.Path(folder)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    if not kernels:
        print(f"There are no reports of kernels in {folder}.", file=sys.stderr)
        return 1
    print_table(kernels)
    spilling = [kernel for kernel in kernels if kernel.spilled]
    for kernel in spilling:
        print(f"{kernel.name} spills {kernel.spilled} bytes on sm_{kernel.arch}.", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
