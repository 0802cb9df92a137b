"""``eplb`` against all placements there are, where these are few; and ``Rebalancer``."""

from __future__ import annotations

import gzip
import itertools

import jax
import numpy as np
import pytest

import jax_ep
from jax_ep import _eplb, testing


def zipf_load(num_experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    ranked = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(seed).permutation(ranked)


def by_rank(placement: jax_ep.Placement, load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Returns what each rank is asked for if copies of an expert are asked for alike."""
    copies = np.bincount(placement.slot_experts)
    return (load / copies)[placement.slot_experts.reshape(num_ranks, -1)].sum(axis=1)


def least_busiest(load: np.ndarray, num_slots: int, num_ranks: int) -> float:
    """Tries every placement without two copies of an expert on a rank."""
    sets = list(itertools.combinations(range(load.size), num_slots // num_ranks))
    best = np.inf
    for ranks in itertools.combinations_with_replacement(sets, num_ranks):
        copies = np.bincount(np.ravel(ranks), minlength=load.size)
        if copies.all():
            best = min(best, (load / copies)[np.array(ranks)].sum(axis=1).max())
    return best


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks"), [(4, 6, 3), (3, 4, 2), (5, 6, 3), (4, 8, 4)]
)
def test_the_busiest_rank_is_near_the_least_there_is(num_experts, num_slots, num_ranks):
    """Copies are counted before they are packed, so some are not where one more would help."""
    rng = np.random.default_rng(0)
    ratios = []
    for load in rng.random((20, num_experts)) ** 2:
        placement = jax_ep.eplb(load, num_slots, num_ranks)
        best = least_busiest(load, num_slots, num_ranks)
        ratios.append(by_rank(placement, load, num_ranks).max() / best)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) <= 1.5
    assert np.mean(ratios) < 1.2


@pytest.mark.parametrize("num_experts", [4, 6])
def test_without_spare_slots_tiny_packings_are_the_best_there_are(num_experts):
    for load in np.random.default_rng(1).random((20, num_experts)):
        busiest = by_rank(jax_ep.eplb(load, num_experts, 2), load, 2).max()
        np.testing.assert_allclose(busiest, least_busiest(load, num_experts, 2), rtol=1e-9)


@pytest.mark.parametrize("ranks_per_node", [None, 8], ids=["anywhere", "on_nodes"])
@pytest.mark.parametrize("exponent", [0.3, 0.65])
def test_an_eighth_more_slots_even_out_zipf(exponent, ranks_per_node):
    routing = testing.zipf_routing(
        np.random.default_rng(0),
        num_ranks=32,
        num_tokens=64,
        num_experts=256,
        num_topk=8,
        exponent=exponent,
    )
    counted = np.bincount(routing.ravel(), minlength=256)
    for load in (zipf_load(256, exponent), counted):
        ranks = by_rank(jax_ep.eplb(load, 288, 32, ranks_per_node=ranks_per_node), load, 32)
        assert ranks.mean() / ranks.max() >= 0.998


def test_copies_are_never_together_and_on_one_node_if_asked():
    for num_ranks, ranks_per_node, num_slots in [(4, None, 32), (8, 4, 24), (8, 2, 16), (8, 1, 8)]:
        load = zipf_load(8, 2.0)
        placement = jax_ep.eplb(load, num_slots, num_ranks, ranks_per_node=ranks_per_node)
        ranks = placement.slot_experts.reshape(num_ranks, -1)
        assert all(len(set(rank)) == len(rank) for rank in ranks.tolist())
        nodes = placement.slot_experts.reshape(num_ranks // (ranks_per_node or num_ranks), -1)
        on_nodes = [set(node) for node in nodes.tolist()]
        assert sum(map(len, on_nodes)) == len(set.union(*on_nodes)) == 8


def test_a_copy_that_fits_nowhere_has_another_moved():
    """Only the first bin has room left for the last item's copies, of which it may hold one."""
    weights, copies = np.array([10, 1, 1, 1, 0.1]), np.array([1, 1, 1, 1, 2])
    held = _eplb._pack(weights, copies, 2)
    assert held.sum(axis=1).tolist() == [3, 3]
    assert held.sum(axis=0).tolist() == copies.tolist()


def test_it_is_deterministic_and_takes_the_first_of_equals():
    assert jax_ep.eplb(np.zeros(4), 6, 2).slot_experts.tolist() == [0, 1, 2, 0, 1, 3]
    assert jax_ep.eplb([0, 0, 5, 0], 6, 2).num_copies.tolist() == [2, 1, 2, 1]
    load = zipf_load(64, 1.0)
    first, again = (jax_ep.eplb(load, 72, 8) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    ("load", "counts", "error", "message"),
    [
        (["a"], (1, 1), TypeError, "load must hold real numbers; got <U1"),
        (np.ones((2, 2)), (4, 2), ValueError, r"load must have shape \[num_experts\]; got \[2, 2"),
        ([], (4, 2), ValueError, r"load must have shape \[num_experts\]; got \[0\]"),
        ([1, -1], (2, 2), ValueError, "load must be finite and not negative; got -1.0"),
        ([1, np.nan], (2, 2), ValueError, "load must be finite and not negative; got nan"),
        (np.ones(4), (6.0, 2), TypeError, "num_slots must be an int; got 6.0"),
        (np.ones(4), (6, 0), ValueError, "num_ranks must be at least 1; got 0"),
        (np.ones(4), (6, 4), ValueError, "num_slots must be a multiple of the 4 ranks; got 6"),
        (np.ones(4), (2, 2), ValueError, "num_slots must lie within 4, .* to 8, .*; got 2"),
        (np.ones(4), (10, 2), ValueError, "num_slots must lie within 4, .* to 8, .*; got 10"),
        (np.ones(4), (8, 4, 3), ValueError, "ranks_per_node must divide the 4 ranks; got 3"),
        (np.ones(3), (4, 4, 2), ValueError, "ranks_per_node must make .* divides the 3 experts"),
    ],
)
def test_errors(load, counts, error, message):
    num_slots, num_ranks, *ranks_per_node = counts
    with pytest.raises(error, match=message):
        jax_ep.eplb(load, num_slots, num_ranks, ranks_per_node=next(iter(ranks_per_node), None))


def test_old_loads_fade():
    rebalancer = jax_ep.Rebalancer(4, 6, 2, decay=0.5)
    for load in ([8, 0, 0, 0], [0, 8, 0, 0], [0, 0, 8, 0]):
        rebalancer.update(load)
    assert rebalancer.load.tolist() == [2, 4, 8, 0]
    # What was saved goes on where it was.
    again = jax_ep.Rebalancer(4, 6, 2, decay=0.5)
    again.load = rebalancer.load
    again.update([0, 0, 0, 1])
    assert again.load.tolist() == [1, 2, 4, 1]


def test_a_proposal_says_what_it_changes_and_whether_it_pays():
    now = jax_ep.Placement.of([0, 1, 2, 3], 4)
    rebalancer = jax_ep.Rebalancer(4, 4, 2, threshold=0.2)
    assert not rebalancer.propose(now).pays
    rebalancer.update([3, 3, 2, 2])
    proposal = rebalancer.propose(now)
    assert proposal.placement.slot_experts.tolist() == [0, 2, 1, 3]
    assert (proposal.before, proposal.after, proposal.num_moved) == (1.2, 1.0, 2)
    assert proposal.pays
    assert not jax_ep.Rebalancer(4, 4, 2, threshold=0.21).propose(now).pays
    done = rebalancer.propose(proposal.placement)
    assert (done.before, done.after, done.num_moved, done.pays) == (1.0, 1.0, 0, False)


def test_a_proposal_may_have_other_slots_than_there_are_now():
    rebalancer = jax_ep.Rebalancer(4, 6, 2)
    rebalancer.update([10, 1, 1, 1])
    proposal = rebalancer.propose(jax_ep.Placement.of(np.arange(4), 4))
    assert proposal.placement.num_slots == 6
    assert proposal.placement.slot_experts.tolist() == [0, 1, 2, 0, 1, 3]
    # Rank 0 has had the experts 0 and 1, and rank 1 the others.
    assert proposal.num_moved == 1 + 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, "decay must lie within 0 to 1; got 1.5"),
        ({"threshold": -1}, ValueError, "threshold must be finite and at least 0; got -1"),
        ({"num_experts": 2.0}, TypeError, "num_experts must be an int; got 2.0"),
        ({"num_slots": 5}, ValueError, "num_slots must be a multiple of the 2 ranks; got 5"),
    ],
)
def test_errors_of_a_rebalancer(options, error, message):
    with pytest.raises(error, match=message):
        jax_ep.Rebalancer(**{"num_experts": 4, "num_slots": 6, "num_ranks": 2, **options})


@pytest.mark.parametrize("load", [np.ones(6), [1, 1, 1, -1], [1, 1, 1, np.inf]])
def test_loads_of_slots_are_refused(load):
    message = r"load must (have shape \[num_experts\] = \[4\]|be finite and not negative)"
    with pytest.raises(ValueError, match=message):
        jax_ep.Rebalancer(4, 6, 2).update(load)


@pytest.mark.parametrize(
    ("placement", "error", "message"),
    [
        ([0, 1], TypeError, "placement must be a jax_ep.Placement; got list"),
        (jax_ep.Placement.of([0, 1], 2), ValueError, "placement must have 4 experts .*; got 2"),
        (jax_ep.Placement.of([0, 1, 2, 3, 0], 4), ValueError, "multiple of 2 slots; got 4 in 5"),
    ],
)
def test_a_proposal_is_for_a_placement_of_the_same_experts(placement, error, message):
    with pytest.raises(error, match=message):
        jax_ep.Rebalancer(4, 6, 2).propose(placement)


def test_a_profile_shows_it(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax_ep.eplb(np.arange(8), 8, 4)
    profiles = [gzip.decompress(file.read_bytes()) for file in tmp_path.rglob("*.json.gz")]
    assert any(b"jax_ep.eplb" in profile for profile in profiles)
