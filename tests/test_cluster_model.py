"""The model of clusters: its rows are those of real plans, and its bytes those of its rows."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from benchmark_scripts import BENCHMARKS, run_python

pytest.importorskip("absl", reason="the benchmarks need the extra 'examples'")


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cluster_rows")


@pytest.fixture
def traffic(rows):
    return importlib.import_module("cluster_traffic")


@pytest.fixture
def checks(rows):
    return importlib.import_module("cluster_checks")


def test_a_row_counts_once_for_each_rank_and_once_for_each_node(rows):
    geometry = rows.Geometry(4, 2, num_tokens=1, num_topk=2, num_experts=4)
    topk_idx = np.array([[[1, 2]], [[2, 3]], [[3, 2]], [[0, 1]]])
    counted = rows.count_rows(geometry, topk_idx)
    assert (counted.near, counted.far, counted.nodes) == (2 / 4, 5 / 4, 3 / 4)


def test_several_rounds_of_combine_are_half_as_large(rows):
    geometry = rows.Geometry(4, 4, num_tokens=40, num_topk=1, num_experts=4)
    assert geometry.room == 13
    to_one = np.zeros((4, 40, 1), int)
    balanced = np.tile(np.arange(40)[:, None] % 4, (4, 1, 1))
    of_rounds = [dataclasses.astuple(rows.count_rows(geometry, c))[3:] for c in (balanced, to_one)]
    assert of_rounds == [(1, 13, 1, 13), (4, 4 * 13, 6, 6 * 7)]


def test_what_each_way_puts_on_the_wires(rows, traffic):
    geometry = rows.Geometry(8, 4, num_tokens=10, num_topk=2, num_experts=8)
    moved = rows.Rows(5.0, 8.0, 6.0, 1.0, 3.0, 2.0, 4.0)
    work = traffic.Work(geometry, moved, {"dispatch": 100, "combine": 200})
    cluster = traffic.Cluster(10.0, 1.0, near_us=1.0, far_us=5.0)

    def both_ways(way):
        both = [traffic.WAYS[way](work, op) for op in ("dispatch", "combine")]
        return [(each.near_bytes, each.far_bytes, each.messages) for each in both]

    assert both_ways("direct") == [(500, 800, 13), (1000, 1600, 13)]
    # Three in four of the rows from the other node go on inside this one.
    assert both_ways("two-level") == [(1100, 600, 17), (2200, 1200, 17)]
    assert both_ways("rounds") == [(3 * 300, 4 * 300, 7), (3 * 800, 4 * 800, 28)]
    # What is gathered from the other node comes in by four wires.
    assert both_ways("xla") == [(6000, 1000, 7), (3 * 2000, 4 * 2000, 14)]
    assert traffic.plan_of(work).num_bytes == 7 * 10 * 2 * 2
    direct = traffic.WAYS["direct"](work, "dispatch")
    assert direct.microseconds(cluster) == pytest.approx(15 + 0.8)


CHECKED = (16, 8, 256, 8, 256)


def test_the_model_of_clusters_reckons_with_the_rows_of_real_plans(rows, checks):
    checks.print_check([rows.Geometry(*CHECKED), rows.Geometry(8, 8, 64, 4, 32)])


ROWS = [
    *("near", "far", "nodes"),
    *("dispatch_rounds", "dispatch_slots", "combine_rounds", "combine_slots"),
]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_too_many_is_found(rows, checks, monkeypatch, name):
    geometry, right = rows.Geometry(*CHECKED), rows.count_rows

    def wrong(*args):
        counted = right(*args)
        one_more = getattr(counted, name) + 1 / geometry.num_ranks
        return dataclasses.replace(counted, **{name: one_more})

    monkeypatch.setattr(checks, "count_rows", wrong)
    with pytest.raises(SystemExit, match="1 of"):
        checks.print_check([geometry])


@pytest.mark.parametrize("name", ["near", "far", "nodes"])
def test_a_wrong_chance_is_found(rows, checks, monkeypatch, name):
    geometry, expected = rows.Geometry(*CHECKED), rows.expect_rows(rows.Geometry(*CHECKED))
    wrong = dataclasses.replace(expected, **{name: 1.05 * getattr(expected, name)})
    monkeypatch.setattr(checks, "expect_rows", lambda _: wrong)
    with pytest.raises(SystemExit, match="1 of"):
        checks.print_check([geometry])


def test_a_wrong_chance_of_a_full_pair_is_found(rows, checks, monkeypatch):
    right = rows.chances_of_fullest(rows.Geometry(*CHECKED))
    monkeypatch.setattr(checks, "chances_of_fullest", lambda _: np.roll(right, 20))
    with pytest.raises(SystemExit, match="1 of"):
        checks.print_check([rows.Geometry(*CHECKED)])


def test_the_model_of_clusters_prints_and_draws(tmp_path):
    picture = tmp_path / "scaling.png"
    done = run_python(
        "-m", "benchmarks.cluster_model", "--ranks=8", "--ranks=64", f"--plot={picture}"
    )
    assert done.returncode == 0, done.stderr
    costs = done.stdout[done.stdout.index("far ranks") :].splitlines()
    eight, many = (line.split() for line in costs[1:3])
    assert [eight[0], many[0]] == ["8", "64"]
    # 7 in 8 of 7.68 ranks and of 5.29 nodes are far; a row has 21,760 bytes both ways.
    assert many[1:4] == ["6.72", "4.63", "1.00"]
    assert float(many[4].replace(",", "")) == pytest.approx(6.72 * 21_760 / 50, rel=0.01)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_nodes_are_full():
    done = run_python("-m", "benchmarks.cluster_model", "--ranks=12")
    assert done.returncode == 1
    assert "ranks must fill whole nodes" in done.stderr


def test_the_page_on_scaling_shows_what_the_model_prints():
    printed = run_python("-m", "benchmarks.cluster_model").stdout
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text()
    tables = [block.strip("\n") for block in page.split("```") if block.startswith("\nranks")]
    assert len(tables) == 3
    for table in tables:
        assert table in printed
