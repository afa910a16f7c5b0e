"""One HTML page of one or several runs: `python -m jaxtrain.report WORKDIR...`.

The page stands alone: data, style and script are in it, and it may load nothing else.
It shows curves, throughput, sample outputs and the configuration; of several runs, each
curve in one plot and the settings in which they differ.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.tree import dotted

_PAGE = pathlib.Path(__file__).with_name("page.html")
_PLACE = "/*JAXTRAIN_DATA*/null"
# More points than a screen has columns tell nothing more, and slow the page.
_MOST_RECORDS = 4000


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What `JsonlWriter` left in a work directory, as the page's script wants.

    Raises:
        ValueError: there are no metrics in it.
    """
    path, samples = workdir / "metrics.jsonl", workdir / "samples.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is no work directory of a run: it has no metrics.jsonl. Give"
            " the --workdir that it was trained with"
        )
    records = _read_lines(path)
    if not records:
        raise ValueError(f"{path} is empty: the run has logged no step yet")
    config = workdir / "config.json"
    settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    return {
        "name": workdir.resolve().name,
        "path": str(workdir),
        "config": dotted(settings),
        "records": thin(records, _MOST_RECORDS),
        "samples": [
            _split_samples(line)
            for line in (_read_lines(samples) if samples.is_file() else ())
        ],
        "summary": summarize(records, settings),
    }


def summarize(
    records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a run that one compares first; what is not known is left out."""
    training = config.get("training", {})
    summary: dict[str, Any] = {"type": training.get("training_type")}
    summary["steps"] = records[-1].get("step")
    summary["hours"] = (records[-1]["time"] - records[0]["time"]) / 3600
    for name in ("loss", "num_tokens"):
        if values := _numbers(records, name):
            summary[name], _ = values[-1]
    metric = training.get("metric_for_best_model", "eval_loss")
    metric = f"eval_{metric.removeprefix('eval_')}"
    if values := _numbers(records, metric):
        choose = max if training.get("greater_is_better") else min
        best, step = choose(values, key=lambda pair: pair[0])
        summary |= {"best_metric": metric, "best": best, "best_step": step}
    for name in ("tokens_per_sec", "samples_per_sec", "mfu"):
        if rates := sorted(_numbers(records, name)):
            summary[name], _ = rates[len(rates) // 2]
    if peaks := _numbers(records, "device_memory_peak_gib"):
        summary["device_memory_peak_gib"], _ = max(peaks)
    return {name: value for name, value in summary.items() if value is not None}


def _numbers(
    records: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[float, int]]:
    """(value, step) of the records that have a finite number of that name."""
    return [
        (record[name], record["step"])
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]


def thin(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most about `most` records: evaluations all, of the others evenly many.

    Of each group of neighbours the one with the highest loss stays, so that no spike
    gets lost.
    """
    if len(records) <= most:
        return records
    size = math.ceil(len(records) / most)
    kept = []
    for start in range(0, len(records), size):
        group = records[start : start + size]
        others = [r for r in group if not any(k.startswith("eval_") for k in r)]
        losses = [math.inf if r.get("loss") is None else r["loss"] for r in others]
        worst = others[losses.index(max(losses))] if others else None
        kept += [r for r in group if r is worst or r not in others]
    return kept


def make_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The HTML page of what `read_run` gave; names are made unique."""
    names = [run["name"] for run in runs]
    shown = [
        {**run, "name": run["path" if names.count(run["name"]) > 1 else "name"]}
        for run in runs
    ]
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False)
    # A text in the data must not end the script that holds it.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028")
    page = _PAGE.read_text("utf-8")
    assert page.count(_PLACE) == 1
    return page.replace(_PLACE, data)


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path | None = None
) -> pathlib.Path:
    """Write the page, by default as report.html in the first directory.

    Raises:
        ValueError: a directory holds no run.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    path = output or workdirs[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(runs), encoding="utf-8")
    return path


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Whole JSON lines; a run that still writes may have left half a one."""
    found = []
    # Not splitlines, for which U+2028 in a text ends a line too.
    for line in path.read_text("utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def _split_samples(line: Mapping[str, Any]) -> dict[str, Any]:
    """{"sample_1/prompt": ...} -> {"step": ..., "texts": [{"prompt": ...}]}."""
    texts: dict[str, dict[str, str]] = {}
    for name, text in line.items():
        if name in ("step", "time"):
            continue
        sample, _, part = name.rpartition("/")
        texts.setdefault(sample or name, {})[part if sample else "output"] = text
    return {"step": line["step"], "texts": list(texts.values())}
