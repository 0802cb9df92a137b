"""``python -m jax_ep report``: what files of traces tell."""

import argparse
from typing import Any

from jax_ep._picture import save_picture
from jax_ep._report import report, save_timeline
from jax_ep._trace import Trace


def add_report(commands: Any) -> None:
    """Adds the command to a parser's: its ``run`` returns what is to be printed."""
    command = commands.add_parser("report", help="say who waited for whom, from files of traces")
    command.add_argument(
        "files", nargs="+", help="what Trace.save wrote, of all processes of a host"
    )
    command.add_argument("--picture", metavar="PNG", help="draw it too; needs matplotlib")
    command.add_argument("--timeline", metavar="JSON", help="write a timeline for ui.perfetto.dev")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    try:
        trace = Trace.load(*arguments.files)
        if arguments.timeline:
            save_timeline(trace, arguments.timeline)
        if arguments.picture:
            save_picture(trace, arguments.picture)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"python -m jax_ep report: {error}") from error
    return report(trace)
