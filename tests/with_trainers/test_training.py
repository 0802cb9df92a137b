"""MaxText's own training loop, by the example."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "maxtext_train.py"


def train(*settings: str) -> list[float]:
    """Trains in a process of its own, as MaxText sets options of JAX's; returns the losses."""
    command = [sys.executable, str(EXAMPLE), *settings]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.MULTILINE)
    ]


def test_the_loss_falls():
    losses = train()
    assert len(losses) == 10
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.85 * losses[0]
