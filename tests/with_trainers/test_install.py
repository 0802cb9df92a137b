"""The method that ``install`` puts into MaxText, and what it refuses there."""

from __future__ import annotations

import importlib.metadata

import pytest
from maxtext.layers import moe  # pyright: ignore[reportMissingImports]

from jax_ep.integrations import maxtext as adapter

OWN = moe.RoutedMoE.sparse_matmul


@pytest.fixture(autouse=True)
def put_back():
    yield
    adapter.uninstall()
    assert moe.RoutedMoE.sparse_matmul is OWN


def test_it_goes_in_and_out_however_often():
    adapter.uninstall()
    assert moe.RoutedMoE.sparse_matmul is OWN
    adapter.install()
    adapter.install(implementation="xla")
    assert moe.RoutedMoE.sparse_matmul is not OWN
    assert moe.RoutedMoE.sparse_matmul.__wrapped__ is OWN


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation must be one of .*; got 'nccl'"):
        adapter.install(implementation="nccl")


def test_another_version_is_warned_of(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.0")
    with pytest.warns(UserWarning, match=r"made for MaxText 0\.2\.5.*this is 0\.3\.0"):
        adapter.install()


def test_another_method_is_refused(monkeypatch):
    monkeypatch.setattr(moe.RoutedMoE, "sparse_matmul", lambda self, inputs, logits: None)
    with pytest.raises(
        NotImplementedError, match=r"must take \['self', 'inputs', 'gate_logits'.*takes"
    ):
        adapter.install()
    monkeypatch.undo()
