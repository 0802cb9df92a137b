"""The text: Python source of the standard library, which every machine with Python has."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

# Not the library's own code (tests, installed packages), or tables rather than text.
_SKIPPED = frozenset(
    {
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
        *("encodings", "pydoc_data", "lib2to3"),
    }
)
_HELD_OUT_EVERY = 16


class Corpus(NamedTuple):
    """Bytes to train on, and bytes of other files to measure with."""

    train: UInt8[np.ndarray, "train_bytes"]
    held_out: UInt8[np.ndarray, "held_out_bytes"]


def read_corpus(max_bytes: int, root: Path | None = None) -> Corpus:
    """Reads the ``.py`` files below ``root``, in the order of their paths.

    Every 16th file is held out. Only whole files are taken, until the next would exceed
    ``max_bytes``.

    Args:
      max_bytes: the most to read, held-out files included.
      root: the folder to read; None for this Python's standard library.

    Returns:
      The files' bytes, joined.

    Raises:
      FileNotFoundError: there is nothing to train on, or nothing to hold out, below ``root``.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts, size = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes()
            size += len(text)
            if size > max_bytes:
                break
            texts.append(text)
    held_out = b"".join(texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY])
    del texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    train = b"".join(texts)
    if not (train and held_out):
        raise FileNotFoundError(
            f"no text to train on and to hold out in the first {max_bytes} bytes of the .py files "
            f"below {root}."
        )
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))


def byte_entropy(text: UInt8[np.ndarray, "bytes"]) -> float:
    """Returns the bits a byte costs to a model that knows how often each byte occurs, no more."""
    counts = np.bincount(text, minlength=256)
    probs = counts[counts > 0] / len(text)
    return float(-np.sum(probs * np.log2(probs)))


def draw_windows(
    text: UInt8[np.ndarray, "bytes"], rng: np.random.Generator, batch: int, length: int
) -> Int32[np.ndarray, "batch length"]:
    """Draws stretches of the text from uniformly random places.

    Raises:
      ValueError: the text is shorter than ``length``.
    """
    if len(text) < length:
        raise ValueError(f"text must hold at least {length} bytes; got {len(text)}.")
    start = rng.integers(0, len(text) - length + 1, size=batch)
    return text[start[:, None] + np.arange(length)].astype(np.int32)
