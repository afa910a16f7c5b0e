"""One HTML page of one or several runs: `python -m jaxtrain.report WORKDIR...`."""

from jaxtrain.report.page import main, read_run, summarize, thin, write_report

__all__ = ["main", "read_run", "summarize", "thin", "write_report"]
