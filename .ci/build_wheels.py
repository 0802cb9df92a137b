"""Builds what a release is made of: wheels for Linux on x86-64 and arm64, and the sources.

Where there is an nvcc also `jax_ep_cuda13`, the library for this machine's processor and GPUs.

Run by `make wheel`, in an environment of its own. `zig c++` compiles for the C library of
manylinux_2_28, whatever this machine's processor and C library are, and links the C++ library into
ours. nvcc wants this machine's compiler, and so asks for its C library or a newer one. auditwheel
names the wheels by what they turn out to need.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = pathlib.Path(sys.executable).parent
GLIBC = (2, 28)
MACHINES = ("x86_64", "aarch64")
ZIG = ("-m", "ziglang", "c++", "-target")
# The C library and its loader: not the C++ library, nor a compiler's own.
ALLOWED = ("ld-linux", "libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so")


def main() -> None:
    """Builds all into the folder that the command line names, and prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder.resolve()
    run("build", "--sdist", f"--outdir={folder}", str(ROOT))
    for machine in MACHINES:
        with tempfile.TemporaryDirectory() as scratch:
            built = build_wheel(machine, pathlib.Path(scratch))
            run("auditwheel", "repair", "--only-plat", f"--wheel-dir={folder}", str(built))
    for wheel in folder.glob("*.whl"):
        check_name(wheel)
        check_needs(wheel, "jax_ep/libjax_ep_cpu.so")
    if find_nvcc() is None:
        print("There is no nvcc: jax_ep_cuda13 is left out.")
    else:
        check_needs(build_gpu_wheel(folder), "jax_ep_cuda13/libjax_ep_cuda.so")
    print(*sorted(folder.iterdir()), sep="\n")


def run(module: str, *arguments: str) -> None:
    """Runs a program that is a module of this environment, and finds others in it."""
    path = os.pathsep.join([str(TOOLS), os.environ["PATH"]])
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PATH": path})


def build_wheel(machine: str, folder: pathlib.Path) -> pathlib.Path:
    """Builds a machine's wheel into a folder; returns its path."""
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": ";".join([sys.executable, *ZIG, target]),
        # zig's linker knows no such option.
        "CMAKE_LINK_DEPENDS_USE_LINKER": "OFF",
        # This machine's `strip` may not know that machine's files.
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "JAX_EP_CUDA": "OFF",
        "JAX_EP_WERROR": "ON",
    }
    settings = [f"-Ccmake.define.{name}={value}" for name, value in options.items()]
    settings += ["-Cinstall.strip=false", f"-Cenv._PYTHON_HOST_PLATFORM=linux-{machine}"]
    run("build", "--wheel", f"--outdir={folder}", *settings, str(ROOT))
    [wheel] = folder.glob("*.whl")
    return wheel


def find_nvcc() -> str | None:
    """Returns the path of CUDA's compiler, as CMake will find it."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


def build_gpu_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Builds the library for GPUs as a wheel of its own into a folder; returns its path."""
    with tempfile.TemporaryDirectory() as scratch:
        run("build", "--wheel", f"--outdir={scratch}", str(ROOT / "ffi" / "cuda" / "package"))
        [built] = pathlib.Path(scratch).glob("*.whl")
        run("auditwheel", "repair", "--only-plat", f"--wheel-dir={folder}", str(built))
    [wheel] = folder.glob("jax_ep_cuda13-*.whl")
    return wheel


def check_name(wheel: pathlib.Path) -> None:
    """Fails if a wheel is named for a newer C library than all are built for.

    Raises:
      SystemExit: it is.
    """
    named = re.fullmatch(r".*-manylinux_(\d+)_(\d+)_[^.]*\.whl", wheel.name)
    if named is None or (int(named[1]), int(named[2])) > GLIBC:
        raise SystemExit(f"{wheel.name} should be for manylinux_{GLIBC[0]}_{GLIBC[1]} or an older")


def check_needs(wheel: pathlib.Path, library: str) -> None:
    """Fails unless a wheel has one library, which needs no more than the C library.

    Args:
      wheel: the file.
      library: what the library's name in it has to be.

    Raises:
      SystemExit: what is wrong.
    """
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        libraries = [name for name in archive.namelist() if ".so" in name]
        if libraries != [library]:
            raise SystemExit(f"{wheel.name} should have {library}; has {libraries}")
        command = [TOOLS / "patchelf", "--print-needed", archive.extract(libraries[0], scratch)]
        needs = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    if more := [name for name in needs if not name.startswith(ALLOWED)]:
        raise SystemExit(f"{wheel.name} should need parts of the C library alone; needs {more}")


if __name__ == "__main__":
    main()
