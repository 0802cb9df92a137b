"""The command line: ``python -m jax_ep info``."""

from __future__ import annotations

import argparse

from jax_ep._info import info


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, devices and which implementation serves")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
