"""What goes for every ``install``: in and out again, and not into what it was not made for."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def installed(adapter: Any, **options: Any) -> Iterator[None]:
    """Has a trainer go our way."""
    adapter.install(**options)
    try:
        yield
    finally:
        adapter.uninstall()


def check_put_back(adapter: Any, owner: Any, name: str) -> Any:
    """Makes the fixture by which every test leaves the trainer's own in its place."""
    own = getattr(owner, name)

    @pytest.fixture(autouse=True)
    def put_back() -> Iterator[None]:
        yield
        adapter.uninstall()
        assert getattr(owner, name) is own

    return put_back


def check_warns_of_version(
    monkeypatch: pytest.MonkeyPatch, adapter: Any, version: str, match: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.warns(UserWarning, match=match):
        adapter.install()


def check_refuses(
    monkeypatch: pytest.MonkeyPatch,
    adapter: Any,
    owner: Any,
    name: str,
    other: Callable[..., Any],
    match: str,
) -> None:
    """Checks that what takes other arguments is left as it is."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, other)
        with pytest.raises(NotImplementedError, match=match):
            adapter.install()
        assert getattr(owner, name) is other
