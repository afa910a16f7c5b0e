"""One HTML page of one or several runs: `python -m jaxtrain.report WORKDIR...`."""

from jaxtrain.report.page import read_run, summarize, write_report

__all__ = ["read_run", "summarize", "write_report"]
