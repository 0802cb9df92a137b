"""How Sphinx makes a site of the documentation: pages from the whole repository, as they are."""

from __future__ import annotations

import jax_ep

project = "jax_ep"
author = "The jax_ep contributors"
version = release = jax_ep.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "docs/notebooks/*.ipynb",
    "benchmarks/results/*.md",
]
html_theme = "furo"
html_title = f"jax_ep {version}"
# The front page is named README.html; hosts look for index.html.
html_additional_pages = {"index": "index.html"}
templates_path = ["templates"]
myst_heading_anchors = 3
# Notebooks are stored without results: making the site runs them, and an error there is one here.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# Fields would be listed twice: by their class, and as its members.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
# Only to be described, not run.
autodoc_mock_imports = ["maxtext"]
# Shapes are in the annotations.
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100

_GUIDES = (
    "concepts",
    "own_model",
    "layer",
    "models",
    "trainers",
    "processes",
    "hangs",
    "checkpoints",
    "gpus",
    "serving",
    "using_plans",
    "balance",
    "placement",
    "fp8",
    "sight",
    "rounds",
    "scaling",
    "gpu_fabric",
)
_INSIDE = ("docs/how_a_call_travels", "docs/protocol", "docs/releasing", "CONTRIBUTING")
_NOTEBOOKS = ("exchange_by_hand", "layer_in_sight")
_PAGES = {
    "Notebooks": [f"docs/notebooks/{name}" for name in _NOTEBOOKS],
    "Guides": [f"docs/{name}" for name in _GUIDES],
    "Reference": ["docs/api", "docs/support", "benchmarks/results/gpu-expected", "CHANGELOG"],
    "Inside": [*_INSIDE, "SECURITY"],
}


def _add_contents(app: object, name: str, source: list[str]) -> None:
    """Adds the list of pages to the front page, which is read without Sphinx too."""
    del app
    if name == root_doc:
        for caption, pages in _PAGES.items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def setup(app: object) -> None:
    """Is called by Sphinx."""
    app.connect("source-read", _add_contents)  # pyright: ignore[reportAttributeAccessIssue]
