"""Steps of routing as training shows them: skewed, drifting, and with bursts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_KEPT, _MOVED = 0.98, 0.35
"""Of an expert's drift each step keeps so much, and adds so much noise that it ends up moved by so
much: in its logarithm, and by standard deviation."""
_BURST_CHANCE, _BURST_EXPERTS, _BURST_FACTOR, _BURST_STEPS = 0.1, 8, 8.0, (3, 13)


def popularities(
    rng: np.random.Generator, num_steps: int, num_experts: int, exponent: float
) -> Iterator[np.ndarray]:
    """Yields each step's logarithm of how popular each expert is.

    Zipf's law over experts in a random order, times a slow random walk of each expert that always
    comes back, times 8 for 8 experts at a time while a burst lasts.
    """
    zipf = -exponent * np.log(rng.permutation(num_experts) + 1)
    drift = _MOVED * rng.standard_normal(num_experts)
    bursts: list[tuple[int, np.ndarray]] = []
    for step in range(num_steps):
        noise = np.sqrt(1 - _KEPT**2) * _MOVED * rng.standard_normal(num_experts)
        drift = _KEPT * drift + noise
        bursts = [(end, which) for end, which in bursts if end > step]
        if rng.random() < _BURST_CHANCE:
            which = rng.choice(num_experts, min(_BURST_EXPERTS, num_experts), replace=False)
            bursts.append((step + int(rng.integers(*_BURST_STEPS)), which))
        log = zipf + drift
        for _, which in bursts:
            log[which] += np.log(_BURST_FACTOR)
        yield log


def choices(
    rng: np.random.Generator, log_popularity: np.ndarray, num_tokens: int, num_topk: int
) -> np.ndarray:
    """Draws each token's experts [num_tokens, num_topk], in order and without replacement."""
    keys = log_popularity + rng.gumbel(size=(num_tokens, log_popularity.size))
    most = np.argpartition(-keys, num_topk - 1, axis=1)[:, :num_topk]
    order = np.argsort(-np.take_along_axis(keys, most, axis=1), axis=1)
    return np.take_along_axis(most, order, axis=1).astype(np.int32)
