"""``python -m jax_ep selftest``: whether exchanges give here what they have to, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _fabrics, _native, _programs
from jax_ep._answer import answer, combined, difference, dispatched, dots, sizes
from jax_ep._combine import combine
from jax_ep._compat import local_gpus
from jax_ep._dispatch import dispatch
from jax_ep._library import gpu_peers_problem
from jax_ep._make_plan import make_plan
from jax_ep._types import DROPPED, Implementation
from jax_ep.testing import MultiprocessFailure, multiprocess

_RANKS, _TOKENS, _TOPK, _EXPERTS, _HIDDEN = 4, 9, 3, 8, 40
# Some ranks are asked for more, and groups begin at multiples of 2.
_CAPACITY, _ALIGNMENT = 22, 2
_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to exchange: the fabric that has to carry it, or pure JAX."""

    name: str
    fabric: str | None

    @property
    def implementation(self) -> Implementation:
        return "native" if self.fabric else "xla"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check of one way found out: a problem, or none."""

    way: str
    check: str
    problem: str | None = None
    note: str = "ok"

    def __str__(self) -> str:
        return f"{self.way:<34}{self.check:<24}{self.problem or self.note}"


_XLA = Way("pure JAX (xla)", None)
_ONE_DEVICE = Way("virtual ranks of one device", "stacked")
_IN_ROUNDS = Way("rounds", "rounds")


def selftest(say: Callable[[str], object]) -> bool:
    """Checks exchanges on every fabric that serves on this machine, and pure JAX.

    On CPU devices of one process and of two that it starts, and on the GPUs that this one has.

    Args:
      say: is given a line for each check and fabric as soon as it is known.

    Returns:
      Whether all was as it had to be.
    """
    passed = True
    places: dict[str, Callable[[], Iterable[Result]]] = dict(_PLACES)
    if gpus := local_gpus():
        # A power of 2 divides the experts.
        some = gpus[: min(_RANKS, 1 << len(gpus).bit_length() - 1)]
        places["GPUs"] = lambda: check_here(gpu_ways(), some)
    for place, run in places.items():
        for result in run():
            say(f"{place:<20}{result}")
            passed = passed and result.problem is None
    say("all as it has to be" if passed else "NOT all as it has to be")
    return passed


def cpu_ways() -> list[Way]:
    """Returns the ways on CPU devices of one process, or of several."""
    alone = jax.process_count() == 1
    nearest = Way("shared memory", "devices" if alone else "processes")
    native = [*[_ONE_DEVICE] * alone, nearest, _IN_ROUNDS]
    return [_XLA, *native] if _native.unavailable_reason() is None else [_XLA]


def gpu_ways() -> list[Way]:
    """Returns the ways on the GPUs of this process."""
    pure, native = [_XLA], [_ONE_DEVICE]
    if _native.unavailable_reason() is not None:
        return pure
    if len(local_gpus()) > 1:
        reads = gpu_peers_problem() is None
        native += [*[Way("each other's memory", "devices")] * reads, _IN_ROUNDS]
    return pure + native


def check_here(ways: list[Way], devices: list[Any]) -> Iterator[Result]:
    """Checks some ways on some devices, and says what native code does not serve."""
    if (reason := _native.unavailable_reason()) is not None:
        yield Result("native code", "does not serve", note=reason)
    for way in ways:
        try:
            yield from _check(way, devices)
        except Exception as error:  # Whatever it is, the others are of interest too.
            yield Result(way.name, "all", f"FAILED: {type(error).__name__}: {error}")


def _check(way: Way, devices: list[Any]) -> Iterator[Result]:
    """Runs one program of all that exchanges do, and compares its results with the answer."""
    num_ranks = _RANKS if way is _ONE_DEVICE else len(devices)
    inputs = _make_inputs(num_ranks)
    per_rank = _everything(way.implementation)
    if way is _ONE_DEVICE:
        program = jax.jit(jax.vmap(per_rank, axis_name=_programs.AXIS))
        args = {name: jax.device_put(a, devices[0]) for name, a in inputs.items()}
    else:
        mesh = _programs.make_mesh(devices)
        program = _programs.over_ranks(per_rank, mesh)
        args = {name: _programs.put(a, mesh) for name, a in inputs.items()}
    with _preferring(way.fabric):
        lowered = program.lower(args)
    wanted = f"jax_ep_plan_{way.fabric}" if way.fabric else None
    text = lowered.as_text()
    is_carried = wanted in text if wanted else "jax_ep_plan_" not in text
    yield Result(way.name, "carried as it should be", None if is_carried else "by something else")
    results = jax.block_until_ready(lowered.compile()(args))
    for check, expected in _expected(inputs, way.implementation).items():
        parts = [difference(results[check][name], *e) for name, e in expected.items()]
        yield Result(way.name, check, next(filter(None, parts), None))


def _make_inputs(num_ranks: int) -> dict[str, np.ndarray]:
    """Draws inputs with all that a router may ask for: nothing, nonsense, and an expert twice."""
    rng = np.random.default_rng(0)
    choices, half = (num_ranks, _TOKENS, _TOPK), jnp.bfloat16
    # The first experts are asked for more often, so that their ranks have to drop some.
    topk_idx = (_EXPERTS * rng.random(choices) ** 2).astype(np.int32)
    topk_idx[:, ::4, 0], topk_idx[:, 1, 1], topk_idx[:, 2, 2] = DROPPED, _EXPERTS, -7
    named = answer(topk_idx, _EXPERTS, _CAPACITY, _ALIGNMENT).named()[..., None]
    tokens, rows = (num_ranks, _TOKENS, _HIDDEN), (num_ranks, _CAPACITY, _HIDDEN)
    # What nobody should read is NaN.
    return {
        "topk_idx": topk_idx,
        "weights": rng.standard_normal(choices).astype(np.float32),
        "x": rng.standard_normal(tokens).astype(half),
        "dout": rng.standard_normal(tokens).astype(half),
        "rows": np.where(named, rng.standard_normal(rows), np.nan).astype(half),
        "drows": np.where(named, rng.standard_normal(rows), np.nan).astype(half),
    }


def _everything(implementation: Implementation) -> Callable[..., dict[str, dict[str, jax.Array]]]:
    """Returns what one rank does to have all of an exchange and its gradients checked."""

    def per_rank(inputs: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        plan = make_plan(
            inputs["topk_idx"],
            num_experts=_EXPERTS,
            axis_name=_programs.AXIS,
            capacity=_CAPACITY,
            alignment=_ALIGNMENT,
            implementation=implementation,
        )
        rows, pull = jax.vjp(lambda x: dispatch(x, plan), inputs["x"])
        [dx] = pull(inputs["drows"])
        out, pull = jax.vjp(
            lambda rows, weights: combine(rows, plan, weights), inputs["rows"], inputs["weights"]
        )
        drows, dweights = pull(inputs["dout"])
        return {
            "make_plan": {name: getattr(plan, name) for name in _FIELDS},
            "dispatch": {"rows": rows},
            "combine": {"out": out},
            "gradient of dispatch": {"dx": dx},
            "gradients of combine": {"drows": drows, "dweights": dweights},
        }

    return per_rank


_FIELDS = ("group_sizes", "kept", "expert_load", "recv_counts", "num_dropped", "num_invalid")
Expected = dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]]


def _expected(inputs: dict[str, np.ndarray], implementation: Implementation) -> Expected:
    """Returns for each check what it should give, and the sizes it sums if not to the bit."""
    plan = answer(inputs["topk_idx"], _EXPERTS, _CAPACITY, _ALIGNMENT)
    x, rows, drows, weights, dout = (
        inputs[name] for name in ("x", "rows", "drows", "weights", "dout")
    )
    exact = implementation == "native"
    return {
        "make_plan": {name: (plan.fields[name], None) for name in _FIELDS},
        "dispatch": {"rows": (dispatched(x, plan), None)},
        "combine": {
            "out": (combined(rows, plan, weights), None if exact else sizes(rows, plan, weights))
        },
        "gradient of dispatch": {
            "dx": (combined(drows, plan), None if exact else sizes(drows, plan))
        },
        "gradients of combine": {
            "drows": (dispatched(dout, plan, weights), None),
            # In which order they are summed is nobody's promise.
            "dweights": (
                dots(rows, plan, dout),
                _HIDDEN * dots(np.abs(rows), plan, np.abs(dout)),
            ),
        },
    }


@contextlib.contextmanager
def _preferring(fabric: str | None) -> Iterator[None]:
    """Has a fabric carry whatever it serves, in programs that are lowered meanwhile."""
    before = _fabrics.FABRICS
    _fabrics.FABRICS = tuple(sorted(before, key=lambda row: row.name != fabric))
    try:
        yield
    finally:
        _fabrics.FABRICS = before


@multiprocess(1, _RANKS, timeout=_TIMEOUT_S)
def _in_one_process(folder: str) -> None:
    _save(folder)


@multiprocess(2, _RANKS // 2, timeout=_TIMEOUT_S)
def _in_two_processes(folder: str) -> None:
    _save(folder)


def _save(folder: str) -> None:
    results = [dataclasses.asdict(r) for r in check_here(cpu_ways(), jax.devices())]
    path = pathlib.Path(folder) / f"{jax.process_index()}.json"
    path.write_text(json.dumps(results))


def _collect(run: Callable[[str], None]) -> Callable[[], list[Result]]:
    """Returns what starts processes and joins their results: what any of them found wrong is."""

    def collected() -> list[Result]:
        with tempfile.TemporaryDirectory(prefix="jax_ep-") as folder:
            try:
                run(folder)
            except MultiprocessFailure as failure:
                return [Result("all", "all", f"FAILED: {failure}")]
            files = sorted(pathlib.Path(folder).iterdir())
            lists = [[Result(**r) for r in json.loads(file.read_text())] for file in files]
        return [
            next((r for r in same if r.problem is not None), same[0])
            for same in zip(*lists, strict=True)
        ]

    return collected


_PLACES = {
    "1 process, 4 CPUs": _collect(_in_one_process),
    "2 processes, 2 CPUs": _collect(_in_two_processes),
}
