"""What ``balance`` must return, in plain Python, choice by choice, seeing those of all ranks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

NOWHERE = -1


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Slots of all choices [R, T, K], and the expert of each rank's spare slots [R, num_spares]."""

    slots: np.ndarray
    borrowed: np.ndarray


def limits(load: list[int], num_ranks: int, slack: float = 0.0) -> list[int]:
    """What each rank may have at most, if all take the same."""
    mean = math.ceil(sum(load) / num_ranks)
    return [mean + math.floor(np.float32(mean) * np.float32(slack))] * num_ranks


def lend(load, most, num_ranks, num_spares):
    """Returns rows by (expert, rank), and the experts that each rank borrows, in order."""
    num_local = len(load) // num_ranks
    owner = [e // num_local for e in range(len(load))]
    rows = {(e, owner[e]): load[e] for e in range(len(load))}
    borrowed: list[list[int]] = [[] for _ in range(num_ranks)]

    def has(rank):
        return sum(n for (_, at), n in rows.items() if at == rank)

    while True:
        over = [has(r) - most[r] for r in range(num_ranks)]
        room = [-over[r] if len(borrowed[r]) < num_spares else 0 for r in range(num_ranks)]
        taker = room.index(max(room))
        lenders = [r for r in range(num_ranks) if over[r] > 0]
        if not lenders or room[taker] <= 0:
            return rows, borrowed
        largest = {
            r: max(range(num_local), key=lambda e: rows[r * num_local + e, r]) for r in lenders
        }
        size = {r: rows[r * num_local + largest[r], r] for r in lenders}
        filling = [r for r in lenders if size[r] >= room[taker]]
        lender = (
            max(filling, key=lambda r: over[r]) if filling else max(lenders, key=lambda r: size[r])
        )
        expert = lender * num_local + largest[lender]
        taken = min(rows[expert, lender], room[taker])
        rows[expert, lender] -= taken
        rows[expert, taker] = taken
        borrowed[taker].append(expert)


def assign(topk_idx, rows, borrowed, num_experts, num_spares):
    """Gives every choice of an expert in order its own rank's place, or the first with room."""
    num_ranks = len(topk_idx)
    num_local = num_experts // num_ranks
    num_slots = num_local + num_spares
    slots = np.full(topk_idx.shape, num_ranks * num_slots, np.int32)
    slots[topk_idx == NOWHERE] = NOWHERE

    def slot(expert, rank):
        mine = rank == expert // num_local
        at = expert % num_local if mine else num_local + borrowed[rank].index(expert)
        return rank * num_slots + at

    for expert in range(num_experts):
        room = {rank: n for (e, rank), n in rows.items() if e == expert}
        places = sorted(room, key=lambda rank: (rank != expert // num_local, rank))
        rest = []
        for choice in map(tuple, np.argwhere(topk_idx == expert)):
            if room.get(choice[0], 0):
                room[choice[0]] -= 1
                slots[choice] = slot(expert, choice[0])
            else:
                rest.append(choice)
        for choice in rest:
            rank = next(rank for rank in places if room[rank])
            room[rank] -= 1
            slots[choice] = slot(expert, rank)
    return slots


def balance(
    topk_idx: np.ndarray, num_experts: int, num_spares: int, slack: float = 0.0, most=None
) -> Balanced:
    num_ranks = len(topk_idx)
    load = [int(np.sum(topk_idx == e)) for e in range(num_experts)]
    most = limits(load, num_ranks, slack) if most is None else most
    rows, borrowed = lend(load, most, num_ranks, num_spares)
    slots = assign(topk_idx, rows, borrowed, num_experts, num_spares)
    spare = np.full((num_ranks, num_spares), NOWHERE)
    for rank, experts in enumerate(borrowed):
        spare[rank, : len(experts)] = experts
    return Balanced(slots, spare)
