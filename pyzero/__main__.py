"""`python -m pyzero COMMAND`."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pyzero")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="what is there, what is not, and why")
    args = parser.parse_args(argv)

    assert args.command == "report"
    from . import report

    return report.main()


if __name__ == "__main__":
    sys.exit(main())
