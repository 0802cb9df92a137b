"""The command line: ``python -m jax_ep info`` and the like."""

from __future__ import annotations

import argparse

from jax_ep._info import info
from jax_ep._report_command import add_report


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep")
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser(
        "info", help="print versions, devices and which implementation serves"
    )
    told.set_defaults(run=lambda _: info())
    add_report(commands)
    arguments = parser.parse_args()
    print(arguments.run(arguments))


if __name__ == "__main__":
    main()
