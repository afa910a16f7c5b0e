"""Curves for a screen: few points of many, and none of the highest and lowest lost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = tuple[int, float | None]  # step and value; None: NaN or infinite, a gap
Record = Mapping[str, Any]

# More than a plot has columns tell nothing more, and slow the page.
_MOST_POINTS, _FEWEST_POINTS = 1000, 100
# Of all curves of all runs: about 16 bytes each.
_POINTS_OF_A_PAGE = 150_000
_MOST_PAUSES = 20
_SIGNIFICANT_DIGITS = 6
_NOT_METRICS = ("step", "time")


def points_of(records: Iterable[Record]) -> dict[str, list[Point]]:
    """The points of each metric, in the order of the records."""
    found: dict[str, list[Point]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _NOT_METRICS and _is_number_or_gap(value):
                found.setdefault(name, []).append((record["step"], value))
    return found


def points_for_each(curves: int) -> int:
    """How many points each curve may have on a page with this number of curves."""
    share = _POINTS_OF_A_PAGE // max(curves, 1)
    return min(max(share, _FEWEST_POINTS), _MOST_POINTS)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """About `most` points: of each group of neighbours the lowest and the highest.

    The first point, the last and one gap of each group stay too, so that no spike gets
    lost, no best value, and no gap.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / max(1, most // 2))
    kept = {0, len(points) - 1}
    for first in range(0, len(points), size):
        group = range(first, min(first + size, len(points)))
        values = {at: value for at in group if (value := points[at][1]) is not None}
        if values:
            kept |= {min(values, key=values.__getitem__)}
            kept |= {max(values, key=values.__getitem__)}
        kept |= set([at for at in group if at not in values][:1])
    return [points[at] for at in sorted(kept)]


def columns(points: Iterable[Point]) -> list[list[Any]]:
    """Steps and values apart, values rounded: the shortest form in JSON."""
    pairs = list(points)
    return [[step for step, _ in pairs], [shorten(value) for _, value in pairs]]


def clock(records: Sequence[Record], most: int) -> dict[str, list[Any]]:
    """When each step was recorded: `steps`, `seconds` since the first, `tokens`.

    About `most` of the steps, among them those around the longest pauses, so that the
    time of a step between two of them can be interpolated.
    """
    table: dict[int, tuple[float, float]] = {}
    tokens = 0.0
    for record in records:
        tokens = record.get("num_tokens") or tokens
        table.setdefault(record["step"], (record["time"] - records[0]["time"], tokens))
    rows = [(step, *at) for step, at in sorted(table.items())]
    every = math.ceil(len(rows) / most)
    kept = {*range(0, len(rows), every), len(rows) - 1}
    waits = sorted(range(1, len(rows)), key=lambda at: rows[at][1] - rows[at - 1][1])
    if every > 1:
        kept |= {near for at in waits[-_MOST_PAUSES:] for near in (at - 1, at)}
    chosen = [rows[at] for at in sorted(kept)]
    steps, seconds, counts = zip(*chosen, strict=True)
    found = {"steps": list(steps), "seconds": [shorten(x) for x in seconds]}
    return found | ({"tokens": [shorten(x) for x in counts]} if any(counts) else {})


def shorten(value: float | None) -> float | int | None:
    """A number of six significant digits, an integer where it is one."""
    if value is None:
        return None
    rounded = float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _is_number_or_gap(value: Any) -> bool:
    if value is None:
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
