"""``place`` against a loop over all choices, and what it and its neighbours refuse."""

from __future__ import annotations

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placements import FABRICS, NUM_SLOTS, PLACEMENTS, SHAPE, everywhere
from strategies import ROUTINGS

import jax_ep


def expected(topk_idx, slot_experts, num_experts, ranks_per_node):
    """Goes through all choices, one by one."""
    num_ranks, num_slots = len(topk_idx), len(slot_experts)
    slots = np.array(topk_idx)
    for rank in range(num_ranks):
        seen = collections.Counter()
        for token, k in np.ndindex(*topk_idx.shape[1:]):
            expert = int(topk_idx[rank, token, k])
            if 0 <= expert < num_experts:
                copies = nearest(slot_experts, expert, rank, num_ranks, ranks_per_node)
                slots[rank, token, k] = copies[(rank + seen[expert]) % len(copies)]
                seen[expert] += 1
            elif expert >= num_experts:
                slots[rank, token, k] = max(expert, num_slots)
    return slots


def nearest(slot_experts, expert, rank, num_ranks, ranks_per_node):
    [copies] = np.nonzero(np.asarray(slot_experts) == expert)
    for together in (1, ranks_per_node):
        places = copies // (len(slot_experts) // num_ranks * together)
        counts = np.bincount(places)
        is_even = len(set(counts[counts > 0].tolist())) == 1
        if is_even and rank // together in places:
            return copies[places == rank // together]
    return copies


@FABRICS
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_each_choice_gets_the_slot_that_it_should(fabric, ranks_per_node):
    def per_rank(topk_idx, placement):
        return jax_ep.place(
            topk_idx, placement, axis_name=fabric.axis_name, ranks_per_node=ranks_per_node
        )

    program = jax.jit(fabric.over_ranks(per_rank, SHAPE.num_ranks))
    for (name, placement), routing in itertools.product(PLACEMENTS.items(), ROUTINGS):
        topk_idx = routing(SHAPE)
        want = expected(topk_idx, placement.slot_experts, SHAPE.num_experts, ranks_per_node)
        got = program(topk_idx, everywhere(placement))
        np.testing.assert_array_equal(got, want, f"{name}, {routing.__name__}")


@pytest.mark.parametrize("num_tokens", [0, 21, 22, 100])
def test_many_choices_are_taken_in_turn(num_tokens):
    """They are numbered by blocks: these have less than one, one about full, and several."""
    placement = PLACEMENTS["all_of_one"]
    topk_idx = np.random.default_rng(0).integers(2, 10, (1, num_tokens, 3), np.int32)
    got = jax.jit(jax_ep.place)(topk_idx[0], placement)
    # Along no axis there is one rank, which has all copies.
    want = expected(topk_idx, placement.slot_experts, SHAPE.num_experts, 1)
    np.testing.assert_array_equal(got, want[0])


@pytest.mark.long
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_copies_are_asked_for_alike_if_all_ranks_ask_alike(ranks_per_node):
    """Whichever are taken for being near: none gets more than another but by what is left over."""
    times = 60
    topk_idx = np.tile(np.arange(SHAPE.num_experts, dtype=np.int32), (times, 1))
    place = functools.partial(jax_ep.place, axis_name="expert", ranks_per_node=ranks_per_node)
    program = jax.jit(jax.vmap(place, in_axes=(0, None), axis_name="expert"))
    for name, placement in PLACEMENTS.items():
        slots = program(np.stack([topk_idx] * SHAPE.num_ranks), placement)
        load = np.bincount(np.ravel(slots), minlength=NUM_SLOTS)
        all_of_expert = times * SHAPE.num_ranks
        want = (all_of_expert / placement.num_copies)[placement.slot_experts]
        np.testing.assert_array_equal(load, want, name)
        np.testing.assert_array_equal(placement.fold(jnp.asarray(load)), all_of_expert)


def test_a_rank_that_asks_more_for_what_it_has_keeps_it():
    placement = jax_ep.Placement.of([0, 1, 0, 2], 3)
    asked = np.full((2, 10, 1), jax_ep.DROPPED, np.int32)
    asked[0] = 0
    place = functools.partial(jax_ep.place, axis_name="expert")
    slots = jax.jit(jax.vmap(place, (0, None), axis_name="expert"))(asked, placement)
    assert np.ravel(slots[0]).tolist() == [0] * 10


@pytest.mark.long
def test_what_is_not_routed_stays_so():
    """An index past the experts would name a slot, as there are more slots than experts."""
    placement = jax_ep.Placement.of([0, 1, 0, 1], 2)
    topk_idx = jnp.array([[2, 3], [4, 5], [-1, -2], [1, np.iinfo(np.int32).max]], jnp.int32)
    slots = jax.jit(jax_ep.place)(topk_idx, placement)
    plan = jax_ep.make_plan(slots, num_experts=4)
    assert (int(plan.num_invalid), int(plan.kept.sum())) == (6, 1)
    where_they_are = jax_ep.Placement.of(np.arange(6), 6)
    np.testing.assert_array_equal(jax.jit(jax_ep.place)(topk_idx, where_they_are), topk_idx)


def test_another_placement_needs_no_new_program():
    traces = []

    @jax.jit
    def program(topk_idx, placement):
        traces.append(placement)
        return jax_ep.place(topk_idx, placement)

    topk_idx = jnp.arange(8, dtype=jnp.int32)[:, None]
    for seed in range(3):
        load = np.random.default_rng(seed).random(8)
        program(topk_idx, jax_ep.eplb(load, 10, 2))
    assert len(traces) == 1


def test_placements_of_layers_go_through_a_scan():
    layers = [jax_ep.eplb(np.random.default_rng(i).random(8), 12, 4) for i in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    topk_idx = jnp.asarray(ROUTINGS[0](SHAPE)[0])
    _, slots = jax.lax.scan(lambda _, layer: (None, jax_ep.place(topk_idx, layer)), None, stacked)
    alone = jax.jit(jax_ep.place)
    for got, layer in zip(slots, layers, strict=True):
        np.testing.assert_array_equal(got, alone(topk_idx, layer))


IDX = jnp.zeros((2, 1), jnp.int32)
PLACEMENT = jax_ep.Placement.of([0, 1, 0], 2)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda: jax_ep.Placement.of([0.5], 1), TypeError, "slot_experts must hold integers; got"),
        (lambda: jax_ep.Placement.of([[0]], 1), ValueError, r"\[num_slots\]; got \[1, 1\]"),
        (lambda: jax_ep.Placement.of([0, 2], 2), ValueError, "must lie within 0 to 1; got 2"),
        (lambda: jax_ep.Placement.of([0, 2], 3), ValueError, "each expert; got none of expert 1"),
        (lambda: jax_ep.Placement.of([0], 1.0), TypeError, "num_experts must be an int; got 1.0"),
        (lambda: PLACEMENT.fold(jnp.ones(2)), ValueError, r"\[num_slots\] = \[3\]; got \[2\]"),
        (lambda: PLACEMENT.fold([1]), TypeError, r"load must be an array \[num_slots\]; got list"),
        (lambda: jax_ep.place(jnp.ones((2, 1)), PLACEMENT), TypeError, "must have dtype int32"),
        (lambda: jax_ep.place(IDX[0], PLACEMENT), ValueError, r"\[num_tokens, num_topk\]; got"),
        (lambda: jax_ep.place(IDX, [0, 1]), TypeError, "must be a jax_ep.Placement; got list"),
        (lambda: jax_ep.place(IDX, PLACEMENT, axis_name="no"), ValueError, "axis_name must name"),
        (lambda: jax_ep.place(IDX, PLACEMENT, axis_name=1), TypeError, "axis_name must be a name"),
        (
            lambda: jax_ep.place(IDX, PLACEMENT, ranks_per_node=2),
            ValueError,
            "ranks_per_node must divide the 1 ranks; got 2",
        ),
        (
            lambda: jax_ep.place(IDX, PLACEMENT, ranks_per_node=1.0),
            TypeError,
            "ranks_per_node must be an int",
        ),
        (lambda: jax_ep.to_slots((), PLACEMENT), TypeError, "tree must hold at least one array"),
        (lambda: jax_ep.to_slots([1.0], PLACEMENT), TypeError, r"tree\[0\] must be an array"),
        (
            lambda: jax_ep.to_slots({"w": jnp.ones(3)}, PLACEMENT),
            ValueError,
            r"tree\['w'\] must have shape \[num_local_experts, ...\] = \[2, ...\]; got \[3\]",
        ),
        (lambda: jax_ep.to_slots(jnp.ones(2, bool), PLACEMENT), TypeError, "floats or integers"),
        (
            lambda: jax_ep.from_slots(jnp.ones(2), PLACEMENT),
            ValueError,
            r"tree must have shape \[num_local_slots, ...\] = \[3, ...\]; got \[2\]",
        ),
        (
            lambda: jax_ep.from_slots(jnp.ones(3), PLACEMENT, copies="last"),
            ValueError,
            "copies must be one of",
        ),
        (
            lambda: jax_ep.from_slots([jnp.arange(3)], PLACEMENT, copies="sum"),
            TypeError,
            r"tree\[0\] must hold floats to be added up; got int32",
        ),
    ],
)
def test_errors(f, error, message):
    with pytest.raises(error, match=message):
        f()


@pytest.mark.parametrize(
    ("f", "slot_experts", "message"),
    [
        (
            lambda p: jax_ep.place(IDX, p, axis_name="e"),
            [0, 1, 0],
            "a multiple of 2 slots.*; got 3",
        ),
        (
            lambda p: jax_ep.to_slots(IDX, p, axis_name="e"),
            [0, 1, 2, 0],
            "a multiple of 2 experts.*; got 3",
        ),
    ],
)
def test_ranks_have_to_divide_slots_and_experts(f, slot_experts, message):
    placement = jax_ep.Placement.of(slot_experts, max(slot_experts) + 1)
    with pytest.raises(ValueError, match=message):
        jax.vmap(f, in_axes=None, axis_name="e", axis_size=2)(placement)
