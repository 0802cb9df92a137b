"""Where the build looks for an nvcc that Python packages brought along."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import scripts

FILES = ("bin/nvcc", "include/crt/host_config.h", "include/cuda_runtime.h", "nvvm/bin/cicc")
SCRIPT = pathlib.Path(__file__).parents[1] / "ffi" / "cuda" / "find_nvcc.py"


@pytest.fixture
def find_nvcc():
    return scripts.load(SCRIPT)


def add_toolkit(packages: pathlib.Path, name: str, *, missing: str = "") -> pathlib.Path:
    root = packages / "nvidia" / name
    for file in FILES:
        if file != missing:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    return root


def test_the_newest_that_is_whole_comes_first(find_nvcc, tmp_path: pathlib.Path) -> None:
    names = ("cu13", "cu9", "cu113")
    roots = {name: add_toolkit(tmp_path, name) for name in names}
    for missing in ("nvvm/bin/cicc", "include/cuda_runtime.h", "bin/nvcc"):
        add_toolkit(tmp_path, f"cu20{len(missing)}", missing=missing)
    add_toolkit(tmp_path, "cuda_nvcc")
    assert find_nvcc.toolkits_in(tmp_path) == [roots["cu113"], roots["cu13"], roots["cu9"]]
    assert find_nvcc.toolkits_in(tmp_path / "nowhere") == []


HIDING = 'import sys; sys.path = [p for p in sys.path if not p.endswith("site-packages")]'


def test_it_is_found_in_the_environment_that_hides_its_packages(tmp_path: pathlib.Path) -> None:
    """As pip builds a wheel: with the environment's Python, but without what is installed there."""
    python = make_environment(tmp_path / "own")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = add_toolkit(tmp_path / "own" / "lib" / version / "site-packages", "cu13")
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    assert run(python, PYTHONPATH=str(tmp_path)) == str(own / "bin")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_it_is_found_in_the_active_environment(tmp_path: pathlib.Path, variable: str) -> None:
    """As other tools build a wheel: with a Python of their own."""
    python = make_environment(tmp_path / "tool")
    active = add_toolkit(tmp_path / "active" / "lib" / "python3.99" / "site-packages", "cu13")
    assert run(python, **{variable: str(tmp_path / "active")}) == str(active / "bin")


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def run(python: pathlib.Path, **env: str) -> str:
    others = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    done = subprocess.run(
        [python, SCRIPT], env=kept | env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
