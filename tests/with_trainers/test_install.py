"""The method that ``install`` puts into MaxText, and what it refuses there."""

from __future__ import annotations

import pytest
from installed import check_put_back, check_refuses, check_warns_of_version
from maxtext.layers import moe  # pyright: ignore[reportMissingImports]

from jax_ep.integrations import maxtext as adapter

OWN = moe.RoutedMoE.sparse_matmul
put_back = check_put_back(adapter, moe.RoutedMoE, "sparse_matmul")


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
    match = r"made for MaxText 0\.2\.5.*this is 0\.3\.0"
    check_warns_of_version(monkeypatch, adapter, "0.3.0", match)


def test_another_method_is_refused(monkeypatch):
    other = lambda self, inputs, logits: None  # noqa: E731
    match = r"must take \['self', 'inputs', 'gate_logits'.*takes"
    check_refuses(monkeypatch, adapter, moe.RoutedMoE, "sparse_matmul", other, match)
