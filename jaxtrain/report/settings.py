"""What runs were set to and made by, and in which of it they differ."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.tree import dotted

Row = tuple[str, list[str]]  # a key, and what it is in each run, as JSON

_ABSENT = "–"
# Under `training`; config.json has such a group where it is on.
_GROUPS = ("curriculum", "dpo", "generation", "lora")
_NAME = "training.run_name"  # stands above each column
_MADE_BY = ("versions", "commit", "devices", "data")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of config.json by their full keys, without groups that are off."""
    training = dict(config.get("training", {}))
    for name in _GROUPS:
        group = training.get(name)
        if group is None or (
            isinstance(group, Mapping) and not group.get("enabled", 1)
        ):
            training.pop(name, None)
    sections = {n: below for n, below in config.items() if n != "provenance"}
    return dotted({**sections, "training": training} if training else sections)


def starts_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What config.json tells of each start; [] of a run of an older version."""
    provenance = config.get("provenance")
    starts = provenance.get("starts") if isinstance(provenance, Mapping) else None
    return [start for start in starts or [] if isinstance(start, dict)]


def made_by(start: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, commit, devices and data of a start, by full keys."""
    kept = {name: start[name] for name in _MADE_BY if start.get(name)}
    if commit := kept.get("commit"):
        changed = " with changes" if commit.get("dirty") else ""
        kept["commit"] = f"{commit.get('id')}{changed}"
    return dotted(kept)


def changes_between(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed as a run was started again, a sentence for each such start."""
    told = []
    for before, after in itertools.pairwise(starts):
        rows = differing([made_by(before), made_by(after)])
        if rows:
            what = ", ".join(f"{key} {old} → {new}" for key, (old, new) in rows)
            told.append(f"from step {after.get('step')} on: {what}")
    return told


def differing(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The keys whose values differ between runs.

    If a group of keys is on in some runs only, one row says so in place of its keys.
    An unset key is no row where its value is a group of keys in another run, and
    differs from none where another run does not know it.
    """
    groups = [f"training.{name}" for name in _GROUPS]
    partly = [
        group
        for group in groups
        if len({any(_is_below(key, group) for key in run) for run in runs}) > 1
    ]
    keys = sorted({key for run in runs for key in run} - {_NAME})
    rows: list[Row] = []
    for group in partly:
        on = [any(_is_below(key, group) for key in run) for run in runs]
        rows.append((group, ["on" if is_on else "off" for is_on in on]))
    for key in keys:
        if any(_is_below(key, group) for group in partly):
            continue
        values = [run.get(key) for run in runs]
        has_parts = any(_is_below(other, key) for other in keys)
        if has_parts and not any(values):
            continue
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            rows.append((key, [_cell(run, key) for run in runs]))
    return sorted(rows)


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every key of any run."""
    keys = sorted({key for run in runs for key in run})
    return [(key, [_cell(run, key) for run in runs]) for key in keys]


def _cell(run: Mapping[str, Any], key: str) -> str:
    return json.dumps(run[key], ensure_ascii=False) if key in run else _ABSENT


def _is_below(key: str, group: str) -> bool:
    return key.startswith(f"{group}.")
