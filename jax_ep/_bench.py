"""``python -m jax_ep bench``: how fast exchanges are here, beside the machine's own copies."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

import jax
import numpy as np

import jax_ep
from jax_ep import _timing, testing
from jax_ep._bench_programs import COPY, Case, Programs

_DTYPES = ("bfloat16", "float16", "float32")
_IMPLEMENTATIONS = ("native", "xla")
_DEFAULTS = {"ranks": 8, "tokens": 1024, "topk": 8}
_MOST_COPIED_BYTES = 1 << 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    says = {
        "ranks": "ranks, on a device each or all on one",
        "tokens": "tokens on each rank",
        "topk": "choices of each token",
    }
    for name, default in _DEFAULTS.items():
        text = f"{says[name]} (default: {default}, or as in the trace)"
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--hidden", type=int, default=1024, help="width of a row (%(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="on all ranks (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--routing", default="uniform", help="uniform, zipf:EXPONENT or hot:EXPERTS")
    where.add_argument("--trace", help="topk_idx [steps, ranks, tokens, topk] in a .npy file")
    parser.add_argument(
        "--capacity-factor", type=float, default=1.25, help="room over the mean (%(default)s)"
    )
    parser.add_argument("--implementation", choices=_IMPLEMENTATIONS, help="native if it serves")
    parser.add_argument("--repeats", type=int, default=100, help="runs of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Checks plan, dispatch, combine and their gradients, and times each as a program of its own.

    Has JAX make as many CPU devices as there are ranks, if it has not started yet.

    Args:
      arguments: as ``add_arguments`` parses them.

    Returns:
      The case, where it ran, and of each op its times and what it reached.

    Raises:
      ValueError: an argument is out of range, or does not fit another.
      AssertionError: a result is not what it should be.
    """
    case = _make_case(arguments)
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1; got {arguments.repeats}.")
    with contextlib.suppress(RuntimeError):  # It has started.
        jax.config.update("jax_num_cpu_devices", case.num_ranks)
    programs = Programs(case)
    programs.check()
    num_kept = programs.count_kept()
    num_rows = max(1, min(round(num_kept), _MOST_COPIED_BYTES // case.row_bytes))
    calls = {COPY: programs.copies(num_rows), **programs.calls()}
    times = _timing.compare(calls, repeats=arguments.repeats)
    rates = {name: num_kept * case.row_bytes / spent.median for name, spent in times.items()}
    rates[COPY] = 2 * num_rows * case.row_bytes / times[COPY].median
    ops = {
        name: {
            "median_ms": round(spent.median * 1e3, 4),
            "p99_ms": round(spent.p99 * 1e3, 4),
            "runs": len(spent.seconds),
            **(_reached(rates[name], rates[COPY]) if name != "plan" else {}),
        }
        for name, spent in times.items()
    }
    routed = (case.steps >= 0) & (case.steps < case.num_experts)
    kept = num_kept * len(case.steps) / max(1, routed.sum())
    return {**_describe(case, programs), "kept_fraction": round(float(kept), 4), "ops": ops}


def as_table(record: dict[str, Any]) -> str:
    """Lays out what ``bench`` returned for a reader."""
    columns = ("median_ms", "p99_ms", "gb_per_s", "of_copy_speed")
    title = (
        "{num_ranks} ranks on {where} ({implementation}), {num_tokens} tokens of {hidden} {dtype}, "
        "{num_experts} experts, {num_topk} choices, {routing} routing; capacity {capacity}, "
        "{kept_fraction:.1%} of choices kept; results checked".format(**record)
    )
    rows = [[name, *(op.get(key, "") for key in columns)] for name, op in record["ops"].items()]
    return _timing.table(title, ("", "median ms", "p99 ms", "GB/s", "of copy speed"), rows)


def _make_case(arguments: argparse.Namespace) -> Case:
    for name in (*_DEFAULTS, "hidden", "experts"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}.")
    steps = _load_trace(arguments) if arguments.trace else _draw(arguments)[None]
    return Case(
        steps=steps,
        hidden=arguments.hidden,
        num_experts=arguments.experts,
        dtype=arguments.dtype,
        routing=f"trace {arguments.trace}" if arguments.trace else arguments.routing,
        capacity_factor=arguments.capacity_factor,
        implementation=arguments.implementation,
    )


def _load_trace(arguments: argparse.Namespace) -> np.ndarray:
    steps = np.load(arguments.trace, allow_pickle=False)
    if steps.ndim != 4 or steps.size == 0 or not np.issubdtype(steps.dtype, np.integer):
        raise ValueError(
            "--trace must hold integers [steps, ranks, tokens, topk]; got "
            f"{steps.dtype}{list(steps.shape)}."
        )
    for name, size in zip(_DEFAULTS, steps.shape[1:], strict=True):
        if (value := getattr(arguments, name)) not in (None, size):
            raise ValueError(f"--{name} must be as in the trace, {size}; got {value}.")
    return steps.astype(np.int32)


def _draw(arguments: argparse.Namespace) -> np.ndarray:
    given = {name: getattr(arguments, name) for name in _DEFAULTS}
    sizes = {f"num_{n}": _DEFAULTS[n] if v is None else v for n, v in given.items()}
    sizes["num_experts"] = arguments.experts
    rng = np.random.default_rng(0)
    kind, _, number = arguments.routing.partition(":")
    try:
        if arguments.routing == "uniform":
            return testing.uniform_routing(rng, **sizes)
        if kind == "zipf":
            return testing.zipf_routing(rng, **sizes, exponent=float(number))
        if kind == "hot":
            return testing.k_hot_routing(rng, **sizes, num_hot=int(number))
    except ValueError as error:
        raise ValueError(f"--routing={arguments.routing} cannot be drawn: {error}") from error
    raise ValueError(
        f"--routing must be uniform, zipf:EXPONENT or hot:EXPERTS; got {arguments.routing}."
    )


def _reached(rate: float, copy_rate: float) -> dict[str, float]:
    return {"gb_per_s": round(rate / 1e9, 3), "of_copy_speed": round(rate / copy_rate, 3)}


def _describe(case: Case, programs: Programs) -> dict[str, Any]:
    _, num_ranks, num_tokens, num_topk = case.steps.shape
    return {
        "jax_ep": jax_ep.__version__,
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "where": programs.where,
        "implementation": programs.implementation,
        "num_ranks": num_ranks,
        "num_tokens": num_tokens,
        "num_topk": num_topk,
        "num_experts": case.num_experts,
        "hidden": case.hidden,
        "dtype": case.dtype,
        "routing": case.routing,
        "num_steps": len(case.steps),
        "capacity": case.capacity,
    }
