"""Reckons what exchanges of 8 to 1,024 ranks cost on a cluster, by several ways to exchange.

Nothing here is measured. Routing is uniform, a rank's wires carry at the rates that the flags say,
and nothing else takes time: see ``cluster_traffic.py``. ``--check`` compares the rows it reckons
with, with those of real plans.

    python -m benchmarks.cluster_model --plot docs/scaling.png
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import app, flags

# Run as a module, it finds those beside it only here.
sys.path.append(str(pathlib.Path(__file__).parent))

import cluster_checks
import cluster_picture
import timing
from cluster_rows import Geometry, Rows, expect_rows
from cluster_traffic import OPS, WAYS, Cluster, Traffic, Work, node_plan_of, plan_of

_MANY = 64
"""From here on costs are compared, and up to here rows with real plans."""
_NAMES = {
    "direct": "direct: ideal, once to each rank",
    "two-level": "two-level: ideal, once to each node",
    "rounds": "rounds: jax_ep, once to each rank",
    "node rounds": "node rounds: jax_ep, once to each node",
    "xla": "xla, everything to everybody",
    "plan": "plan: before direct or rounds",
    "node plan": "node plan: before two-level or node rounds",
}
_PLAN_OF = dict.fromkeys(WAYS, "plan") | dict.fromkeys(("two-level", "node rounds"), "node plan")
_CROSSING = {"direct": "far", "two-level": "nodes", "rounds": "far", "node rounds": "nodes"}
"""What has to come from other nodes, by way."""

_ranks = flags.DEFINE_multi_integer("ranks", [2**i for i in range(3, 11)], "Numbers of ranks.")
_per_node = flags.DEFINE_integer("ranks_per_node", 8, "GPUs that NVLink joins: an HGX H100's.")
flags.register_multi_flags_validator(
    ["ranks", "ranks_per_node"],
    lambda v: all(n <= v["ranks_per_node"] or n % v["ranks_per_node"] == 0 for n in v["ranks"]),
    "ranks must fill whole nodes, or be on one.",
)
_tokens = flags.DEFINE_integer("tokens", 4096, "Tokens a rank, as DeepEP reports training.")
_topk = flags.DEFINE_integer("topk", 8, "Choices a token: DeepSeek-V3's (arXiv 2412.19437).")
_hidden = flags.DEFINE_integer("hidden", 7168, "Width: DeepSeek-V3's.")
_experts = flags.DEFINE_integer("experts", 256, "Experts, at least: DeepSeek-V3's.")
_local = flags.DEFINE_integer("experts_per_rank", 4, "Experts on a rank, at least: 256 on 64.")
_dispatch_dtype = flags.DEFINE_string(
    "dispatch_dtype", "float8_e4m3fn", "Of tokens on their way out, as in DeepSeek-V3's training."
)
_combine_dtype = flags.DEFINE_string(
    "combine_dtype", "bfloat16", "Of sums on their way back, as in DeepSeek-V3's training."
)
_scaled = flags.DEFINE_integer(
    "scaled", 128, "How many numbers of one byte share a float32 scale: DeepSeek-V3's."
)
_nvlink = flags.DEFINE_float(
    "nvlink_gb_per_s", 450, "Into a GPU from its node: half of an H100's 900 (NVIDIA's data sheet)."
)
_rdma = flags.DEFINE_float(
    "rdma_gb_per_s", 50, "Into a GPU from other nodes: a NIC's 400 Gb/s (a DGX H100 has 8 NICs)."
)
# Of a step of a ring by the protocol LL128: `hwLat` in src/graph/tuning.cc of NVIDIA/nccl.
_nvlink_us = flags.DEFINE_float("nvlink_us", 1.9, "Latency inside a node, as NCCL reckons it.")
_rdma_us = flags.DEFINE_float("rdma_us", 4.0, "Latency between nodes, as NCCL reckons it.")
_check = flags.DEFINE_bool(
    "check", False, f"Compare rows with real plans of up to {_MANY} ranks, and do no more."
)
_plot = flags.DEFINE_string("plot", None, "Where to draw the cost of a token against ranks (PNG).")


def geometry_of(num_ranks: int) -> Geometry:
    return Geometry(
        num_ranks=num_ranks,
        ranks_per_node=min(_per_node.value, num_ranks),
        num_tokens=_tokens.value,
        num_topk=_topk.value,
        num_experts=max(-(-_experts.value // num_ranks), _local.value) * num_ranks,
    )


def row_bytes() -> dict[str, int]:
    """Returns the bytes of a row by op: with scales, and with the weights of a token's choices."""
    sizes = {}
    for op, dtype in zip(OPS, (_dispatch_dtype.value, _combine_dtype.value), strict=True):
        width = jnp.dtype(dtype).itemsize
        scales = -(-_hidden.value // _scaled.value) if width == 1 else 0
        sizes[op] = width * _hidden.value + 4 * scales
    sizes["combine"] += 4 * _topk.value
    return sizes


@dataclasses.dataclass(frozen=True)
class Line:
    """What is reckoned for one number of ranks: the traffic of plans, and by (op, way)."""

    geometry: Geometry
    rows: Rows
    cluster: Cluster
    plans: dict[str, Traffic]
    ops: dict[tuple[str, str], Traffic]

    @classmethod
    def of(cls, geometry: Geometry, cluster: Cluster) -> Line:
        work = Work(geometry, expect_rows(geometry), row_bytes())
        plans = {"plan": plan_of(work), "node plan": node_plan_of(work)}
        ops = {(op, way): f(work, op) for op in OPS for way, f in WAYS.items()}
        return cls(geometry, work.rows, cluster, plans, ops)

    def nanoseconds(self, traffic: Traffic) -> float:
        """Returns the time for each token of a rank."""
        return traffic.microseconds(self.cluster) * 1e3 / self.geometry.num_tokens

    def plan_ns(self, plan: str) -> float:
        return self.nanoseconds(self.plans[plan])

    def exchange_ns(self, way: str) -> float:
        """Returns that of dispatch and combine together."""
        return sum(self.nanoseconds(self.ops[op, way]) for op in OPS)

    def share_of_plan(self, way: str) -> float:
        """Returns what a plan takes, over what it is made for."""
        return self.plan_ns(_PLAN_OF[way]) / self.exchange_ns(way)


def print_quantity(lines: Sequence[Line], title: str, of: Callable[[Line, Traffic], str]) -> None:
    """Prints a quantity of plans and of both ops by each way."""
    header = ["ranks", *lines[0].plans, *(f"{op[0]}: {way}" for op in OPS for way in WAYS)]
    table = [
        [
            line.geometry.num_ranks,
            *(of(line, each) for each in (*line.plans.values(), *line.ops.values())),
        ]
        for line in lines
    ]
    timing.print_table(title, header, table)


def print_quantities(lines: Sequence[Line]) -> None:
    tokens = _tokens.value
    print_quantity(
        lines,
        "KB that a rank receives for each of its tokens (d: dispatch, c: combine)",
        lambda _, traffic: f"{traffic.num_bytes / tokens / 1e3:,.2f}",
    )
    print_quantity(
        lines,
        "KB of these that come from other nodes",
        lambda _, traffic: f"{traffic.far_bytes / tokens / 1e3:,.2f}",
    )
    print_quantity(
        lines, "messages that a rank receives", lambda _, traffic: f"{traffic.messages:,.0f}"
    )
    print_quantity(
        lines,
        "ns for each token of a rank",
        lambda line, traffic: f"{line.nanoseconds(traffic):,.0f}",
    )


def print_costs(lines: Sequence[Line]) -> None:
    """Prints what has to cross for a token, what it costs by each way, and the plans' share."""
    header = ["ranks", "far ranks", "far nodes", *WAYS]
    header += [*lines[0].plans, "of rounds", "of node rounds"]
    table = [
        [
            line.geometry.num_ranks,
            f"{line.rows.far / line.geometry.num_tokens:.2f}",
            f"{line.rows.nodes / line.geometry.num_tokens:.2f}",
            *(f"{line.exchange_ns(way):,.0f}" for way in WAYS),
            *(f"{line.plan_ns(plan):,.0f}" for plan in line.plans),
            *(f"{line.share_of_plan(way):.1%}" for way in ("rounds", "node rounds")),
        ]
        for line in lines
    ]
    title = "ns for each token of a rank, dispatch and combine together, and what a plan adds"
    timing.print_table(title, header, table)


def print_slots(lines: Sequence[Line]) -> None:
    """Prints what a pair sends in the mean, how much room it has, and what comes of that."""
    header, table = ["ranks"], []
    for way in ("rounds", "node rounds"):
        header += [f"{way}: mean", "room", "taken", "slots a row"]
    for line in lines:
        cells: list[object] = [line.geometry.num_ranks]
        for peer, taken in (
            (1, line.rows.rounds),
            (line.geometry.ranks_per_peer, line.rows.node_rounds),
        ):
            mean = line.geometry.num_tokens * line.geometry.chance_to_reach(peer)
            cells += [f"{mean:,.0f}", f"{line.geometry.room(peer):,}", f"{taken.dispatch:.3f}"]
            cells += [f"{taken.dispatch_slots / mean:.3f}"]
        table.append(cells)
    title = "rows of a pair, slots of its first round, how many rounds, and all slots over rows"
    timing.print_table(title, header, table)


def print_growth(lines: Sequence[Line]) -> None:
    """Prints how much more has to cross than with the fewest ranks, and how much more it costs."""
    first, table = lines[0], []
    for line in lines:
        cells: list[object] = [line.geometry.num_ranks]
        for way, crossing in _CROSSING.items():
            rows = getattr(line.rows, crossing) / getattr(first.rows, crossing)
            cost = line.exchange_ns(way) / first.exchange_ns(way)
            cells += [f"{rows:.3f}", f"{cost:.3f}", f"{cost / rows:.3f}"]
        table.append(cells)
    header = ["ranks"]
    for way in _CROSSING:
        header += ["rows", way, "a row"]
    title = f"over those of {first.geometry.num_ranks} ranks: rows from other nodes, and time"
    timing.print_table(title, header, table)


def draw(path: pathlib.Path, lines: Sequence[Line]) -> None:
    cluster_picture.save(
        path,
        [line.geometry.num_ranks for line in lines],
        {_NAMES[way]: [line.exchange_ns(way) / 1e3 for line in lines] for way in WAYS},
        {_NAMES[plan]: [line.plan_ns(plan) / 1e3 for line in lines] for plan in lines[0].plans},
        steepest=_NAMES["xla"],
        title="What a token costs, dispatch and combine together: reckoned, not measured",
        subtitle=f"{_tokens.value:,} tokens a rank of {_hidden.value:,} numbers, {_topk.value} "
        f"choices, uniform routing, {_per_node.value} ranks a node; "
        f"NVLink {_nvlink.value:g} GB/s, RDMA {_rdma.value:g} GB/s a rank",
    )


def main(argv: Sequence[str]) -> None:
    del argv
    geometries = [geometry_of(num_ranks) for num_ranks in _ranks.value]
    if _check.value:
        cluster_checks.print_check([g for g in geometries if g.num_ranks <= _MANY])
        return
    cluster = Cluster(_nvlink.value, _rdma.value, _nvlink_us.value, _rdma_us.value)
    lines = [Line.of(geometry, cluster) for geometry in geometries]
    print_quantities(lines)
    print_costs(lines)
    print_slots(lines)
    if many := [line for line in lines if line.geometry.num_ranks >= _MANY and line.rows.nodes]:
        print_growth(many)
    if _plot.value:
        draw(pathlib.Path(_plot.value), lines)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
