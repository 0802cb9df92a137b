"""Prints what a GPU should show, where there is none: bytes, times to expect, kernels as compiled.

Nothing here is measured. Bytes are counted as ``bench_gpu.py`` counts them, from the same choices.
A time is what a GPU that copies at a given rate needs to move the strict bytes and to launch the
op: no kernel is faster unless it finds rows in a cache, which the benchmark flushes. The report on
kernels is the compiler's, of the build in ``--reports``:

    make cuda
    PYTHONPATH=. python benchmarks/model_gpu.py > benchmarks/results/gpu-expected.md
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags
from gpu_goals import DECODE_GOALS_US, FRACTION_GOALS
from gpu_programs import ROUTINGS, Moved, moved_bytes, stacked
from programs import make_inputs, planner
from shapes import GPU_SHAPES, Shape

sys.path.append(str(pathlib.Path(__file__).parents[1] / "ffi" / "cuda"))

import resources

_shapes = flags.DEFINE_multi_enum("shapes", [*GPU_SHAPES], [*GPU_SHAPES], "What to reckon.")
_rates = flags.DEFINE_multi_string(
    "rates", ["H100=3000", "H200=4300"], "Names of GPUs, and the GB/s that each reads and writes."
)
_launch_us = flags.DEFINE_float("launch_us", 2.0, "What it takes to launch an op.", lower_bound=0)
_reports = flags.DEFINE_string("reports", "build/cuda", "Folder of the compiler's reports.")
_arch = flags.DEFINE_string("arch", "90", "Architecture of which kernels are listed.")

_INTRODUCTION = """\
No GPU has run the kernels. `benchmarks/model_gpu.py` printed this page: **its times are reckoned,
not measured**. Bytes are those of rows that an op has to move for 8 ranks stacked on one GPU:
*strict* with each token read once, *between* with one read for each rank that wants it, as between
GPUs. A time is that of the strict bytes at the rate of a copy, {rates}, with {launch:g} us for each
launch. Goals are for an {first}, and what `benchmarks/gpu.sh` compares with: fractions of a copy's
rate ({goals}), and in decoding a time of plan, dispatch and combine together."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What an op has to move on a shape under uniform routing, and in which time it is to do so."""

    shape: Shape
    op: str
    moved: Moved
    goal_us: float | None = None

    def microseconds(self, gb_per_s: float) -> float:
        return self.moved.strict / gb_per_s / 1e3 + _launch_us.value

    def cells(self, rates: dict[str, float]) -> list[str]:
        """Returns its line of the table."""
        goal = self.goal_us
        if (fraction := FRACTION_GOALS.get(self.op)) and "decode" not in self.shape.name:
            goal = self.moved.strict / (fraction * next(iter(rates.values()))) / 1e3
        return [
            self.shape.name,
            self.op,
            *(f"{num_bytes / 1e6:.1f}" for num_bytes in self.moved),
            *(f"{self.microseconds(rate):.0f}" for rate in rates.values()),
            "" if goal is None else f"{goal:.0f}",
        ]


def expect(shape: Shape) -> Iterator[Expected]:
    """Yields what each op has to move under uniform routing, and dispatch and combine together."""
    inputs = make_inputs(dataclasses.replace(shape, hidden=1), ROUTINGS["uniform"])
    make_plan = stacked(lambda topk_idx: planner(shape, "xla", "zero")(topk_idx).kept)
    moved = moved_bytes(shape, inputs.topk_idx, np.asarray(make_plan(inputs.topk_idx)))
    for op, of_op in moved.items():
        yield Expected(shape, op, of_op)
    both = Moved(*(a + b for a, b in zip(moved["dispatch"], moved["combine"], strict=True)))
    yield Expected(shape, "dispatch + combine", both, DECODE_GOALS_US.get(shape.name))


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Prints a table of Markdown."""
    for line in (header, ["---"] * len(header), *lines):
        print(f"| {' | '.join(line)} |")


def read_kernels(folder: pathlib.Path) -> list[resources.Kernel]:
    """Reads what the compiler says of the kernels; ends the program where it has said nothing."""
    kernels = resources.named(resources.kernels_in(folder))
    if not kernels:
        raise SystemExit(f"There are no reports of kernels in {folder}: run `make cuda` first.")
    return kernels


def print_kernels(kernels: Sequence[resources.Kernel], arch: str) -> None:
    """Prints what the compiler says of the kernels for one architecture, and spills on all."""
    archs = ", ".join(dict.fromkeys(f"sm_{kernel.arch}" for kernel in kernels))
    spilling = [f"{kernel.name} on sm_{kernel.arch}" for kernel in kernels if kernel.spilled]
    print(f"\n## Kernels as compiled for sm_{arch}\n")
    print(f"Compiled for {archs}; registers are spilled by {', '.join(spilling) or 'none'}.\n")
    listed = [kernel for kernel in kernels if kernel.arch == arch]
    print_table(
        ("kernel", "registers", "shared bytes", "stack bytes", "spilled bytes"),
        [[f"`{name}`", *map(str, numbers)] for name, _, *numbers in listed],
    )


def main(argv: Sequence[str]) -> None:
    del argv
    kernels = read_kernels(pathlib.Path(_reports.value))
    rates = {name: float(rate) for name, rate in (text.split("=") for text in _rates.value)}
    per_second = " and ".join(f"{rate / 1e3:g} TB/s for an {name}" for name, rate in rates.items())
    goals = ", ".join(f"{op} {goal:g}" for op, goal in FRACTION_GOALS.items())
    text = _INTRODUCTION.format(
        rates=per_second, launch=_launch_us.value, goals=goals, first=next(iter(rates))
    )
    print("# What a GPU is expected to show\n")
    print(textwrap.fill(text.replace("\n", " "), 110))
    print("\n## Times on one GPU\n")
    times = [f"us, {name}" for name in rates]
    expected = [line.cells(rates) for name in _shapes.value for line in expect(GPU_SHAPES[name])]
    header = ("shape", "op", "strict MB", "between MB", *times, "goal, us")
    print_table(header, expected)
    print()
    print_shapes()
    print_kernels(kernels, _arch.value)


def print_shapes() -> None:
    """Prints what the names of the shapes stand for."""
    shapes = [GPU_SHAPES[name] for name in _shapes.value]
    fields = ("num_tokens", "hidden", "num_experts", "num_topk")
    lines = [[shape.name, *(str(getattr(shape, field)) for field in fields)] for shape in shapes]
    print_table(("shape", "tokens per rank", "width", "experts", "choices"), lines)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
