"""A chunk of raw rows to documents in flat arrays: the unit of work of preparation.

A chunk depends on its rows and the recipe alone, so that any process may make it.
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.prepare.kinds import KINDS, Recipe, Row
from jaxtrain.data.prepare.sequences import Sequences
from jaxtrain.data.rows.files import drop_filled
from jaxtrain.data.rows.formats import BadRow, is_equal, read_row
from jaxtrain.data.rows.tokenize import Example
from jaxtrain.record.safe_text import shown

DIFFICULTY = "difficulty"  # the name of a canonical row's number for a curriculum


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The documents of consecutive rows, and what became of the others.

    `sides` has one sequence a document and side; `values` float64[documents] for each
    name in `value_names`. `problems` are the numbers of bad rows in the whole data set,
    in order, with the reasons; `equal` those of pairs that prefer nothing.
    """

    sides: Mapping[str, Sequences]
    values: Mapping[str, np.ndarray]
    problems: tuple[tuple[int, str], ...]
    equal: tuple[int, ...]
    dropped: int
    truncated: int


def value_names(recipe: Recipe) -> list[tuple[str, str]]:
    """What documents have beside tokens: names, and their keys in canonical rows."""
    names = list(KINDS[recipe.options.objective].row_values)
    if recipe.options.difficulty_column is not None:
        names.append((DIFFICULTY, DIFFICULTY))
    return names


def take_rows(rows: Any, first: int, stop: int) -> list[Mapping[str, Any]]:
    """Rows `first` to `stop` - 1. `datasets` decodes many at once several times faster.

    Args:
        rows: a list, or what slices like one; a slice may also be columns by name.
    """
    found = rows[first:stop]
    if not isinstance(found, Mapping):
        return list(found)
    return [
        drop_filled(dict(zip(found, values, strict=True)))
        for values in zip(*found.values(), strict=True)
    ]


def make_chunk(rows: Sequence[Mapping[str, Any]], first: int, recipe: Recipe) -> Chunk:
    """The documents of raw rows, of which the first has this number.

    Raises:
        ValueError: an option that does not fit the rows' format.
    """
    problems: list[tuple[int, str]] = []
    numbers, canonical = [], []
    for number, row in _read_rows(rows, first, recipe, problems):
        numbers.append(number)
        canonical.append(row)

    def on_bad(index: int, reason: str) -> None:
        problems.append((numbers[index], reason))

    sides: dict[str, list[Example]] = {}
    values: dict[str, list[float]] = {name: [] for name, _ in value_names(recipe)}
    dropped = truncated = 0
    kind = KINDS[recipe.options.objective]
    for document in kind.tokenize(canonical, recipe, on_bad):
        truncated += document.truncated
        if document.sides is None:
            dropped += 1
            continue
        for side, example in document.sides.items():
            sides.setdefault(side, []).append(example)
        for name, key in value_names(recipe):
            values[name].append(float(document.row[key]))
    return Chunk(
        {side: Sequences.of(examples) for side, examples in sides.items()},
        {name: np.asarray(found, np.float64) for name, found in values.items()},
        tuple(sorted(problems, key=operator.itemgetter(0))),
        tuple(n for n, row in zip(numbers, canonical, strict=True) if is_equal(row)),
        dropped,
        truncated,
    )


def _read_rows(
    rows: Sequence[Mapping[str, Any]],
    first: int,
    recipe: Recipe,
    problems: list[tuple[int, str]],
) -> Iterator[tuple[int, Row]]:
    """Numbers of rows and canonical rows; bad rows go to `problems`."""
    column = recipe.options.difficulty_column
    for number, row in enumerate(rows, start=first):
        try:
            read = read_row(row, recipe.row_format)
            if column is not None:
                read |= {DIFFICULTY: _read_number(row, column)}
        except BadRow as bad:
            problems.append((number, str(bad)))
        else:
            yield number, read


def _read_number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if isinstance(value, str):  # a cell of a csv file
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{column} is {shown(value)}, expected a number")
    if not math.isfinite(value):
        raise BadRow(f"{column} is {shown(value)}, expected a finite number")
    return float(value)
