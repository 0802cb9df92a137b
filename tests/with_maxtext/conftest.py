"""MaxText as it is used: dtypes are promoted, and its warnings, and its libraries', are its own."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "with_maxtext" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
