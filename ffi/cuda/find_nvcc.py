"""Prints the folder of the nvcc that Python packages brought along, if there is one.

What builds wheels runs in an environment of its own, which hides the packages of whoever asked for
the wheel: theirs are looked for where they are, not imported.
"""

from __future__ import annotations

import os
import pathlib
import re
import site
import sys
import sysconfig
from collections.abc import Iterator

# What nvcc needs that packages of their own bring along.
_NEEDED = ("include/crt/host_config.h", "include/cuda_runtime.h", "nvvm/bin/cicc")


def package_folders() -> Iterator[pathlib.Path]:
    """Yields where Python's packages may be: this environment's first, then its user's."""
    yield from map(pathlib.Path, sys.path)
    # pip has the Python of the environment that it installs into, and takes away its packages.
    yield pathlib.Path(sysconfig.get_path("purelib"))
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            yield from sorted(pathlib.Path(prefix).glob("lib/python3*/site-packages"))
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    yield pathlib.Path(sysconfig.get_path("purelib", vars=base))
    yield pathlib.Path(site.getusersitepackages())


def toolkits_in(packages: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders among the packages in which nvcc is whole, the newest CUDA's first."""
    found = [nvcc.parents[1] for nvcc in packages.glob("nvidia/cu[0-9]*/bin/nvcc")]
    whole = [root for root in found if all((root / name).exists() for name in _NEEDED)]
    return sorted(whole, key=lambda root: int(re.sub(r"\D", "", root.name)), reverse=True)


def main() -> None:
    """Prints the first one's folder."""
    for packages in package_folders():
        for toolkit in toolkits_in(packages):
            print(toolkit / "bin")
            return


if __name__ == "__main__":
    main()
