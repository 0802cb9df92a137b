"""The command line: ``python -m jax_ep info``, or another command."""

from __future__ import annotations

import argparse
import json
import sys

from jax_ep import _bench, _report_command
from jax_ep._info import info
from jax_ep._selftest import selftest


def main() -> int:
    """Runs the command that the arguments name, ``info`` without any; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep")
    parser.set_defaults(run=_info)
    commands = parser.add_subparsers()
    command = commands.add_parser("info", help="print versions, devices and what serves here")
    command.set_defaults(run=_info)
    command = commands.add_parser("selftest", help="check exchanges on all fabrics that serve here")
    command.set_defaults(run=_selftest)
    command = commands.add_parser("bench", help="time exchanges here, beside plain copies")
    _bench.add_arguments(command)
    command.set_defaults(run=_time)
    command = commands.add_parser("report", help="say who waited for whom, from files of traces")
    _report_command.add_arguments(command)
    command.set_defaults(run=_report)
    arguments = parser.parse_args()
    return arguments.run(arguments)


def _info(arguments: argparse.Namespace) -> int:
    del arguments
    print(info())
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    del arguments
    return 0 if selftest(lambda line: print(line, flush=True)) else 1


def _time(arguments: argparse.Namespace) -> int:
    try:
        record = _bench.bench(arguments)
    except (ValueError, AssertionError, NotImplementedError) as error:
        print(f"jax_ep bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record) if arguments.json else _bench.as_table(record))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    try:
        print(_report_command.run(arguments))
    except (ImportError, OSError, ValueError) as error:
        print(f"jax_ep report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
