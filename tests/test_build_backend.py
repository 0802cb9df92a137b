"""Where the package is built without native code, and what is built and said then."""

from __future__ import annotations

import os
import pathlib
import platform
import sys
import types

import pytest
import scripts

SCRIPT = pathlib.Path(__file__).parents[1] / "ffi" / "build_backend.py"
BUILDS = ("build_wheel", "build_editable")
OTHERS = (
    "get_requires_for_build_wheel",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
)
PURE = {"wheel.cmake": "false"}


@pytest.fixture
def told() -> list[object]:
    """The settings that scikit-build-core is told, call by call."""
    return []


@pytest.fixture
def backend(told: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """The build backend, over a stand-in of scikit-build-core, on Linux without a compiler."""

    def hook(*args: object) -> list[str] | str:
        told.append(args[1] if len(args) > 1 else args[0])
        return "a name" if len(args) > 1 else ["cmake"]

    names = (*BUILDS, *OTHERS, "build_sdist", "get_requires_for_build_sdist")
    build = types.ModuleType("scikit_build_core.build")
    vars(build).update(dict.fromkeys(names, hook))
    package = types.ModuleType("scikit_build_core")
    vars(package).update(build=build)
    monkeypatch.setitem(sys.modules, "scikit_build_core", package)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", build)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return scripts.load(SCRIPT)


def add_program(name: str, *, fails: bool = False) -> None:
    program = pathlib.Path(os.environ["PATH"], name)
    program.write_text(f"#!/bin/sh\nexit {int(fails)}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("name", BUILDS)
def test_without_a_compiler_cmake_does_not_run(backend, told, capsys, name: str) -> None:
    assert getattr(backend, name)("folder", {"build.verbose": "true"}) == "a name"
    assert told == [{"build.verbose": "true"} | PURE]
    said = capsys.readouterr().err
    assert said.startswith("jax_ep is installed as pure JAX, without native code: CXX is not set")
    assert "with a C++20 compiler, install it again." in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_comes_before_a_build_is_told_the_same(backend, told, capsys, name: str) -> None:
    hook = getattr(backend, name)
    hook("folder") if name.startswith("prepare") else hook()
    assert told == [PURE]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", OTHERS[:2])
def test_another_jax_is_asked_for_only_with_native_code(backend, name: str) -> None:
    requires = getattr(backend, name)
    assert requires() == ["cmake"]
    assert requires(PURE) == ["cmake"]
    add_program("g++")
    assert requires(PURE) == ["cmake"]
    assert requires() == ["cmake", *backend.HEADERS]


def test_a_compiler_that_fails_is_run(backend, told) -> None:
    """So that what it says is seen."""
    add_program("clang++", fails=True)
    backend.build_wheel("folder")
    assert told == [{}]


def test_a_compiler_by_name_is_run_even_if_it_is_not_there(
    backend, told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    backend.build_wheel("folder")
    assert told == [{}]


@pytest.mark.parametrize("name", ["cmake.define.JAX_EP_CUDA", "skbuild.wheel.cmake"])
def test_whoever_sets_an_option_of_cmakes_wants_it_to_run(backend, told, name: str) -> None:
    backend.build_wheel("folder", {name: "ON"})
    assert told == [{name: "ON"}]


@pytest.mark.parametrize(
    ("system", "machine", "said"),
    [
        ("win32", "AMD64", "native code is for Linux and macOS, and this is win32"),
        ("linux", "ppc64le", "native code is for x86-64 and arm64, and this is ppc64le"),
    ],
)
def test_where_native_code_is_not_for(
    backend, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, said: str
) -> None:
    add_program("c++")
    assert backend.why_pure({}) is None
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert backend.why_pure({}) == said


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_compiler_of_macos_may_be_none(
    backend, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    add_program("c++")
    add_program("xcode-select", fails=not is_installed)
    assert (backend.why_pure({}) is None) == is_installed
