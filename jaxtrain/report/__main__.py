"""The command `jaxtrain report`, or `python -m jaxtrain.report`."""

import sys
from collections.abc import Sequence

from jaxtrain.cli.command import Parser, file_argument, path_argument
from jaxtrain.cli.ending import run_command
from jaxtrain.report import write_report


def main(arguments: Sequence[str]) -> None:
    """Write the page and print its path.

    Raises:
        ValueError: a directory holds no run.
    """
    parser = Parser("report", "Write one HTML page of one or several runs.")
    parser.add_argument("workdir", nargs="+", type=path_argument)
    parser.add_argument(
        "--output", type=file_argument, help="default: report.html in the first workdir"
    )
    options = parser.parse(arguments)
    print(write_report(options.workdir, options.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
