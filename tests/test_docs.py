"""The page of the API lists what is public, all of it and nothing else."""

from __future__ import annotations

import pathlib
import re
import types

import jax_ep

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
MODULES = {
    "experts",
    "flax.MoE",
    "flax.RouterBias",
    "integrations.levanter",
    "integrations.maxtext",
    "integrations.transformers",
    "integrations.tunix",
    "routing",
    "testing",
    "wire",
}


def test_the_api_page_lists_what_is_public() -> None:
    listed = re.findall(r"^\.\. auto[a-z]+:: (?:jax_ep\.)?(\S+)$", PAGE.read_text(), re.MULTILINE)
    public = {
        name
        for name, value in vars(jax_ep).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(listed) == sorted(public | MODULES)
