"""The fabrics: who carries native exchanges, one row each.

A fabric brings the ranks of an exchange together and lends their buffers to each other; the same
kernels run on all of them. The table is in the order of choice: the first that does not refuse an
exchange carries it. To add one is to add a row here, and the file in ``ffi/bind`` that defines its
handlers, one for each op; the library tells Python of them by itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import (
    _foreign,
    _local,
    _native_fp8,
    _owned_plan,
    _partial_sums,
    _processes,
    _refusals,
    _rounds,
)
from jax_ep._axes import Place
from jax_ep._call import Call, Operands, all_gather
from jax_ep._compat import result_type
from jax_ep._library import describe_handlers, library, native_problem, warn_once
from jax_ep._ops import OPS, PLAN, REDUCE_ROWS, REDUCE_SCALED, Op
from jax_ep._plan import PlanArrays
from jax_ep._processes import Refusal
from jax_ep._types import Platform

_PARTIALS: dict[Op, tuple[str, ...]] = {REDUCE_ROWS: ("*partials",), REDUCE_SCALED: ("partials",)}
"""One result more for each of their payloads of rows, where partial sums are made in results."""


class Additions(NamedTuple):
    """What a fabric's handlers take and return beside what the op does, by the names in its row."""

    operands: Sequence[Any] = ()
    results: Sequence[Any] = ()
    attributes: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Fabric:
    """One fabric.

    Attributes:
      name: with which the names of its handlers end.
      platform: whose devices it serves.
      serves: what, in words, for users.
      refuses: says why it does not serve an exchange, or None, by what is known of it; it waits for
        nobody, and is asked first.
      join: brings the processes together that the exchange needs, and waits for them; says why they
        cannot exchange, or None.
      reads_place: whether its handlers read rank and group. Else all ranks are there, in order.
      adds: what its handlers take and return beside what the op does.
      operands: their names, by op; they stand between the place and the plan.
      results: likewise; they stand last.
      attributes: likewise.
      plan: what its handlers are told of a plan, by op.
      payloads: what they take after the plan, by op.
      own_results: what they return before what the fabric adds, by op.
      carry: carries an exchange, by its handlers.
    """

    name: str
    platform: Platform
    serves: str
    refuses: Callable[[Call], str | None]
    join: Callable[[Call], Refusal | None] = lambda _: None
    reads_place: bool = True
    adds: Callable[[Call, Operands], Additions] = lambda *_: Additions()
    operands: Callable[[Op], tuple[str, ...]] = lambda _: ()
    results: Callable[[Op], tuple[str, ...]] = lambda _: ()
    attributes: Callable[[Op], tuple[str, ...]] = lambda _: ()
    plan: Callable[[Op], tuple[str, ...]] = lambda op: PlanArrays._fields * op.takes_plan
    payloads: Callable[[Op], tuple[str, ...]] = lambda op: op.payloads
    own_results: Callable[[Op], tuple[str, ...]] = lambda op: op.results
    carry: Callable[["Fabric", Call, Operands], list[jax.Array]] = _foreign.run

    def target(self, op: Op) -> str:
        """Returns the name of an op's handler, as XLA knows it."""
        return f"jax_ep_{op.name}_{self.name}"

    def signature(self, op: Op) -> dict[str, list[str]]:
        """Returns what the library should say of an op's handler."""
        told = (*self.operands(op), *self.plan(op), *self.payloads(op))
        attributes = ("call", "scope", *_foreign.GEOMETRY, *op.options, *self.attributes(op))
        return {
            "operands": [*Place._fields, *told],
            "results": [*self.own_results(op), *self.results(op)],
            "attributes": sorted(attributes),
        }


def choose(call: Call, *, join: bool, among: Sequence[Fabric] | None = None) -> Fabric | Refusal:
    """Returns the fabric that carries an exchange, or why none does.

    Args:
      call: the exchange.
      join: whether to bring the processes together that it needs, and wait for them.
      among: the platform's fabrics to choose from, if not all.

    Raises:
      TimeoutError: another process did not come in time.
    """
    if (problem := platform_problem(call.platform)) is not None:
        return Refusal(problem, is_expected=not fabrics_for(call.platform))
    refusals: dict[str, Refusal] = {}
    for fabric in fabrics_for(call.platform) if among is None else among:
        reason = fabric.refuses(call)
        refusal = Refusal(reason) if reason else fabric.join(call) if join else None
        if refusal is None:
            if unexpected := [r.reason for r in refusals.values() if not r.is_expected]:
                warn_once(unexpected[0], f"the fabric {fabric.name!r}")
            return fabric
        refusals[fabric.name] = refusal
    is_expected = all(refusal.is_expected for refusal in refusals.values())
    said = [f"{name}: {refusal.reason}" for name, refusal in refusals.items()]
    return Refusal("; ".join(said), is_expected)


def fabrics_for(platform: str | None) -> list[Fabric]:
    """Returns a platform's fabrics, in the order of choice."""
    return [fabric for fabric in FABRICS if fabric.platform == platform]


def platform_problem(platform: str | None) -> str | None:
    """Returns why there is no native code for a platform, or None."""
    if not (rows := fabrics_for(platform)):
        there = " and ".join(dict.fromkeys(fabric.platform for fabric in FABRICS))
        return f"there is native code for {there}, and this is for {platform or 'another platform'}"
    name = rows[0].platform
    return native_problem(name) or _mismatch(name)


def signatures(platform: Platform) -> dict[str, dict[str, list[str]]]:
    """Returns what a platform's library should say of its handlers, by their names."""
    wanted = {f.target(op): f.signature(op) for f in fabrics_for(platform) for op in OPS}
    wanted[_native_fp8.TARGET] = _native_fp8.SIGNATURE
    return wanted | (_owned_plan.SIGNATURES if platform == "cpu" else {})


@functools.cache
def _mismatch(platform: Platform) -> str | None:
    """Returns how a library's handlers differ from what calls will pass them, or None."""
    described = describe_handlers(platform)
    for target, signature in signatures(platform).items():
        handler = described.get(target, {})
        for part, names in signature.items():
            if handler.get(part) != names:
                return (
                    f"the native library was built from other sources than jax_ep's modules: "
                    f"the {part} of {target} should be {names}; got {handler.get(part)}"
                )
    return None


def _add_workspace(call: Call, operands: Operands) -> Additions:
    if call.op is not PLAN:
        return Additions()
    layout = call.layout
    geometry = (layout.num_ranks, layout.num_tokens, layout.num_topk, layout.num_experts)
    words = library("gpu").jax_ep_plan_workspace(*geometry)
    return Additions(results=[result_type((words,), jnp.int32, operands.payloads[0])])


def _add_to_gpus(call: Call, operands: Operands, *, in_windows: bool) -> Additions:
    layout, members = call.layout, _processes.members(call.devices)
    if call.op not in _PARTIALS:
        return _add_workspace(call, operands)._replace(attributes=[members])
    # Of either form, so that the library reads one kind of call.
    pulled = operands.payloads if call.op is REDUCE_ROWS else operands.payloads[:1]
    weights = operands.payloads[len(pulled) :]
    use = _partial_sums.use(layout, pulled, are_weighted=bool(weights), in_windows=in_windows)
    gathered = [all_gather(call, w) if use else w for w in weights]
    room = min(layout.capacity, layout.num_ranks * layout.num_tokens)
    partials = [
        result_type((room, rows.shape[-1]) if use else (1,), rows.dtype, rows) for rows in pulled
    ]
    return Additions(gathered, [] if in_windows else partials, [members, np.int64(use)])


def _add_agreement(call: Call, operands: Operands) -> Additions:
    members = _processes.members(call.devices)
    kind = _processes.kind(call, operands)
    numbers = _processes.agree(call, operands, members, kind)
    return Additions(operands=[numbers], attributes=[members, kind])


def _workspace(op: Op) -> tuple[str, ...]:
    return ("workspace",) if op is PLAN else ()


def _gathered(op: Op) -> tuple[str, ...]:
    return ("gathered",) if op is REDUCE_SCALED else ()


def _members_and_sums(op: Op) -> tuple[str, ...]:
    return ("members", "partial_sums") if op in _PARTIALS else ("members",)


def _carry_in_rounds(fabric: Fabric, call: Call, operands: Operands) -> list[jax.Array]:
    """Has another fabric carry what can be exchanged within nodes, if a plan has such."""
    within_nodes = None
    if call.op is not PLAN and 1 < call.layout.ranks_per_node < call.layout.num_ranks:
        others = [row for row in fabrics_for(fabric.platform) if row.name != fabric.name]
        chosen = choose(call.within_nodes(), join=True, among=others)
        if not isinstance(chosen, Refusal):
            within_nodes = functools.partial(chosen.carry, chosen)
    local = _local.Local(fabric, call, operands.where)
    return _rounds.run(local, call, operands, within_nodes)


_Rounds = functools.partial(
    Fabric,
    name="rounds",
    operands=_local.onto,
    plan=_local.told_of_plan,
    payloads=_local.payloads,
    own_results=_local.results,
    carry=_carry_in_rounds,
)

FABRICS: tuple[Fabric, ...] = (
    Fabric(
        name="stacked",
        platform="cpu",
        serves="one rank, and the ranks of a vmap axis, on one CPU device",
        refuses=_refusals.several_devices,
        reads_place=False,
    ),
    Fabric(
        name="devices",
        platform="cpu",
        serves="ranks on the CPU devices of one process",
        refuses=_refusals.several_processes,
        adds=lambda call, _: Additions(attributes=[_processes.members(call.devices)]),
        attributes=lambda _: ("members",),
    ),
    Fabric(
        name="processes",
        platform="cpu",
        serves="ranks on the CPU devices of several processes of one host",
        refuses=_refusals.one_process,
        join=lambda call: _processes.join(call.groups, "cpu"),
        adds=_add_agreement,
        operands=lambda _: ("numbers",),
        attributes=lambda _: ("members", "kind"),
    ),
    _Rounds(
        platform="cpu",
        serves="ranks on CPU devices anywhere, by XLA's collectives",
        refuses=_refusals.one_device,
    ),
    Fabric(
        name="stacked",
        platform="gpu",
        serves="one rank, and the ranks of a vmap axis, on one GPU",
        refuses=_refusals.several_gpus,
        reads_place=False,
        adds=_add_workspace,
        results=_workspace,
    ),
    Fabric(
        name="devices",
        platform="gpu",
        serves="ranks on GPUs of one process that can read each other's memory",
        refuses=_refusals.gpus_of_several_processes,
        adds=functools.partial(_add_to_gpus, in_windows=False),
        operands=_gathered,
        results=lambda op: _workspace(op) or _PARTIALS.get(op, ()),
        attributes=_members_and_sums,
    ),
    Fabric(
        name="processes",
        platform="gpu",
        serves="ranks on GPUs of several processes of one host that can read each other's memory",
        refuses=_refusals.gpus_of_one_process,
        join=lambda call: _processes.join(call.groups, "gpu"),
        adds=functools.partial(_add_to_gpus, in_windows=True),
        operands=_gathered,
        results=_workspace,
        attributes=_members_and_sums,
    ),
    _Rounds(
        platform="gpu",
        serves="ranks on GPUs anywhere, by XLA's collectives",
        refuses=_refusals.one_gpu,
        adds=_add_workspace,
        results=_workspace,
    ),
)
