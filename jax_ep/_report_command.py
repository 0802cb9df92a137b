"""``python -m jax_ep report``: what files of traces tell."""

import argparse

from jax_ep._picture import save_picture
from jax_ep._report import report, save_timeline
from jax_ep._trace import Trace


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Says which files to read and to write."""
    command.add_argument(
        "files", nargs="+", help="what Trace.save wrote, of all processes of a host"
    )
    command.add_argument("--picture", metavar="PNG", help="draw it too; needs matplotlib")
    command.add_argument("--timeline", metavar="JSON", help="write a timeline for ui.perfetto.dev")


def run(arguments: argparse.Namespace) -> str:
    """Writes what is asked for, and returns what the traces tell.

    Raises:
      ImportError: a picture is asked for, and matplotlib is not installed.
      OSError: a file cannot be read or written.
      ValueError: a file is no trace, or they do not belong together.
    """
    trace = Trace.load(*arguments.files)
    if arguments.timeline:
        save_timeline(trace, arguments.timeline)
    if arguments.picture:
        save_picture(trace, arguments.picture)
    return report(trace)
