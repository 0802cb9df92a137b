"""The model of clusters: its rows are those of real plans, and its bytes those of its rows."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from benchmark_scripts import BENCHMARKS, run_python

pytestmark = pytest.mark.long

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
    # Those to ranks of the other node that stand where their own does need not be spread.
    assert counted.spread == 4 / 4


def test_rounds_after_the_first_are_smaller_and_those_of_combine_half_as_large(rows, monkeypatch):
    geometry = rows.Geometry(4, 4, num_tokens=400, num_topk=1, num_experts=4)
    # 100 in the mean, and 1.25 times as many: by chance the fullest pair seldom has more than 122.
    assert geometry.room() == 125
    balanced = np.tile(np.arange(400)[:, None] % 4, (4, 1, 1))
    to_one = np.zeros((4, 400, 1), int)
    at_once, in_many = (rows.count_rows(geometry, topk_idx) for topk_idx in (balanced, to_one))
    assert at_once.rounds == at_once.node_rounds == (1, 125, 1, 125)
    # No round is below 64 rows; 63 is half of the first one.
    assert in_many.rounds == (1 + 5, 125 + 5 * 64, 1 + 6, 63 + 6 * 63)
    monkeypatch.setattr(rows._wire, "FEW_ROWS", 1)
    assert rows.count_rows(geometry, to_one).rounds == (1 + 9, 125 + 9 * 32, 1 + 22, 63 + 22 * 16)


def test_node_rounds_have_room_for_what_chance_adds(rows):
    geometry = rows.Geometry(8, 2, num_tokens=4000, num_topk=1, num_experts=8)
    # To a rank 500 in the mean, and 1.25 times as many; to a node 1000, and 75 more by chance.
    assert (geometry.room(), geometry.room(2)) == (625, 1075)
    to_one_node = np.tile(np.arange(4000)[:, None] % 2, (8, 1, 1))
    counted = rows.count_rows(geometry, to_one_node)
    assert counted.rounds == (1 + 9, 625 + 9 * 157, 1 + 22, 313 + 22 * 79)
    assert counted.node_rounds == (1 + 11, 1075 + 11 * 269, 1 + 26, 538 + 26 * 135)


@pytest.mark.parametrize(("ranks", "tokens"), [(128, 4096), (1024, 4096), (64, 128), (1024, 128)])
@pytest.mark.parametrize("ranks_per_peer", [1, 8])
def test_chance_seldom_asks_for_a_second_round(rows, ranks, tokens, ranks_per_peer):
    geometry = rows.Geometry(ranks, 8, tokens, num_topk=8, num_experts=4 * ranks)
    room, chances = geometry.room(ranks_per_peer), rows.chances_of_fullest(geometry, ranks_per_peer)
    # The chances of all pairs add up to 0.1 at most, which with one row less would be more. Of
    # pairs that do not ask each other, some one is then as full a little less often.
    assert chances[room + 1 :].sum() <= 0.1
    assert chances[room:].sum() > 1 - np.exp(-0.1)


@pytest.fixture
def work(rows, traffic):
    rounds = rows.Rounds(1, 3, 2, 4), rows.Rounds(1, 7, 2, 9)
    geometry = rows.Geometry(8, 4, num_tokens=10, num_topk=2, num_experts=8)
    moved = rows.Rows(5.0, 8.0, 6.0, 11.0, *rounds)
    return traffic.Work(geometry, moved, {"dispatch": 100, "combine": 200})


def test_what_each_way_puts_on_the_wires(traffic, work):
    def both_ways(way):
        both = [traffic.WAYS[way](work, op) for op in ("dispatch", "combine")]
        return [(each.near_bytes, each.far_bytes, each.messages) for each in both]

    assert both_ways("direct") == [(500, 800, 13), (1000, 1600, 13)]
    assert both_ways("two-level") == [(1100, 600, 17), (2200, 1200, 17)]
    assert both_ways("rounds") == [(3 * 300, 4 * 300, 7), (3 * 800, 4 * 800, 28)]
    # Bits of 10 tokens of 8 ranks come from three; where two choices have rows is told in 16 bytes.
    assert both_ways("node rounds") == [
        (1100 + 3 * 8 * 2, 7 * 100, 1 + 11 + 3),
        (2200 + 3 * 8 * 2, 9 * (200 + 16), 4 + 11 + 3),
    ]
    # What is gathered from the other node comes in by four wires.
    assert both_ways("xla") == [(6000, 1000, 7), (3 * 2000, 4 * 2000, 14)]


def test_a_plan_of_nodes_gathers_as_much_in_fewer_steps(traffic, work):
    plans = traffic.plan_of(work), traffic.node_plan_of(work)
    for plan in plans:
        assert (plan.near_bytes, plan.far_bytes) == (6 * 10 * 2 * 2, 10 * 2 * 2)
    assert [(*plan.steps, plan.messages) for plan in plans] == [(6, 1, 7), (3, 1, 4)]


def test_times_add_up_where_one_wire_waits_for_the_other(traffic, work):
    cluster = traffic.Cluster(10.0, 1.0, near_us=1.0, far_us=5.0)

    def microseconds(way, op):
        return traffic.WAYS[way](work, op).microseconds(cluster)

    # A maximum, up each node of four and down again; a round's collectives; in the node a read.
    tree, told, read = 2 * (3 + 5), 3, 3
    assert microseconds("direct", "dispatch") == pytest.approx(3 * 5 + 0.8)
    assert microseconds("rounds", "dispatch") == pytest.approx(tree + 5 + 1.2)
    one = tree + told + (5 + read) + 0.1148 + 0.7
    assert microseconds("node rounds", "dispatch") == pytest.approx(one)
    two = tree + told + 2 * (2 * 5 + read) + 0.2248 + 1.944
    assert microseconds("node rounds", "combine") == pytest.approx(two)


def test_where_all_are_on_one_node_its_rounds_are_like_others(rows, traffic):
    geometry = rows.Geometry(8, 8, num_tokens=64, num_topk=2, num_experts=8)
    work = traffic.Work(geometry, rows.expect_rows(geometry), {"dispatch": 100, "combine": 200})
    for op in traffic.OPS:
        assert traffic.WAYS["node rounds"](work, op) == traffic.WAYS["rounds"](work, op)


CHECKED = (16, 4, 256, 8, 256)


def test_the_model_of_clusters_reckons_with_the_rows_of_real_plans(rows, checks):
    checks.print_check([rows.Geometry(*CHECKED), rows.Geometry(8, 8, 64, 4, 32)])


def test_full_pairs_take_several_rounds_of_both_kinds(rows, checks):
    counted = {each.what: each.counted for each in checks.compare(rows.Geometry(*CHECKED))}
    for name in ("rounds.dispatch", "rounds.combine", "node_rounds.dispatch"):
        assert counted[f"{name}, of full pairs"] > 1


OF_TOKENS = ["near", "far", "nodes", "spread"]
PARTS = ["dispatch", "dispatch_slots", "combine", "combine_slots"]
OF_ROUNDS = [f"{name}.{part}" for name in ("rounds", "node_rounds") for part in PARTS]


@pytest.mark.parametrize("name", [*OF_TOKENS, *OF_ROUNDS])
def test_a_row_too_many_is_found(rows, checks, monkeypatch, name):
    """In both draws of choices; those of nodes by what plans receive, and by their metrics too."""
    geometry, right = rows.Geometry(*CHECKED), rows.count_rows
    field, _, part = name.partition(".")

    def wrong(*args):
        counted = right(*args)
        value, more = getattr(counted, field), 1 / geometry.num_ranks
        value = value._replace(**{part: getattr(value, part) + more}) if part else value + more
        return dataclasses.replace(counted, **{field: value})

    monkeypatch.setattr(checks, "count_rows", wrong)
    with pytest.raises(SystemExit, match=f"^{4 if name == 'nodes' else 2} of"):
        checks.print_check([geometry])


def test_metrics_that_count_ranks_and_not_nodes_are_found(rows, checks, monkeypatch):
    right = checks.jax_ep.load_metrics

    def wrong(*args, **kwargs):
        metrics = right(*args, **kwargs)
        return metrics | {"node_wire_bytes": metrics["wire_bytes"]}

    monkeypatch.setattr(checks.jax_ep, "load_metrics", wrong)
    with pytest.raises(SystemExit, match="^2 of"):
        checks.print_check([rows.Geometry(*CHECKED)])


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_wrong_chance_is_found(rows, checks, monkeypatch, name):
    geometry, expected = rows.Geometry(*CHECKED), rows.expect_rows(rows.Geometry(*CHECKED))
    wrong = dataclasses.replace(expected, **{name: 1.05 * getattr(expected, name)})
    monkeypatch.setattr(checks, "expect_rows", lambda _: wrong)
    with pytest.raises(SystemExit, match="^1 of"):
        checks.print_check([geometry])


@pytest.mark.parametrize(("ranks_per_peer", "more"), [(1, 20), (4, -20)])
def test_a_wrong_chance_of_a_full_pair_is_found(rows, checks, monkeypatch, ranks_per_peer, more):
    right = rows.chances_of_fullest

    def wrong(geometry, peer):
        return np.roll(right(geometry, peer), more if peer == ranks_per_peer else 0)

    monkeypatch.setattr(checks, "chances_of_fullest", wrong)
    with pytest.raises(SystemExit, match="^1 of"):
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
    assert many[1:3] == ["6.72", "4.63"]
    direct, two_level = (float(cell.replace(",", "")) for cell in many[3:5])
    assert direct == pytest.approx(6.72 * 21_760 / 50, rel=0.01)
    assert two_level == pytest.approx(4.63 * 21_760 / 50, rel=0.01)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_nodes_are_full():
    done = run_python("-m", "benchmarks.cluster_model", "--ranks=12")
    assert done.returncode == 1
    assert "ranks must fill whole nodes" in done.stderr


def test_the_page_on_scaling_shows_what_the_model_prints():
    printed = run_python("-m", "benchmarks.cluster_model").stdout
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text()
    tables = [block.strip("\n") for block in page.split("```") if block.startswith("\nranks")]
    assert len(tables) == 4
    for table in tables:
        assert table in printed
