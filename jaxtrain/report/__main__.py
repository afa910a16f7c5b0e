"""The command `python -m jaxtrain.report`."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxtrain.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtrain.report",
        description="Write one HTML page of one or several runs.",
    )
    parser.add_argument("workdir", nargs="+", type=pathlib.Path)
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: report.html in the first workdir"
    )
    arguments = parser.parse_args(argv)
    try:
        path = write_report(arguments.workdir, arguments.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
