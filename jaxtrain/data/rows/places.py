"""Where rows stand in their files, so that a bad one is named by file and line."""

import dataclasses
import pathlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from jaxtrain.data.rows.files import Item, Unit, make_units

_FILES: "weakref.WeakKeyDictionary[datasets.Dataset, tuple[pathlib.Path, ...]]" = (
    weakref.WeakKeyDictionary()
)


@dataclasses.dataclass(frozen=True)
class HeldRows(Sequence[Mapping[str, Any]]):
    """Rows in memory, each with where it stands."""

    rows: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def first(self, count: int | None) -> "HeldRows":
        """The first rows; all if None."""
        return HeldRows(self.rows[:count], self.places[:count])


def hold(files: Sequence[pathlib.Path]) -> HeldRows:
    """All rows of files in memory, `UnreadableRow`s among them.

    Raises:
        ValueError: a file cannot be read as rows.
    """
    found = [(unit.row(item), unit.place(item)) for unit, item in _items(files)]
    return HeldRows(tuple(row for row, _ in found), tuple(at for _, at in found))


def remember_files(rows: datasets.Dataset, files: Sequence[pathlib.Path]) -> None:
    """Take note that `rows` are those of `files`, in order."""
    _FILES[rows] = tuple(files)


def same_files(rows: datasets.Dataset, others: datasets.Dataset) -> datasets.Dataset:
    """`rows`, of which number n is `others`' number n."""
    if others in _FILES:
        _FILES[rows] = _FILES[others]
    return rows


def name_rows(rows: Any, numbers: Sequence[int]) -> list[str]:
    """Where rows stand, such as "train.jsonl line 8"; "row 7" if that is not known."""
    if isinstance(rows, HeldRows):
        return [rows.places[number] for number in numbers]
    files = _FILES.get(rows, ()) if isinstance(rows, datasets.Dataset) else ()
    found = {number: f"row {number}" for number in numbers}
    try:
        for number, (unit, item) in enumerate(_items(files)):
            if number in found:
                found[number] = unit.place(item)
            if number >= max(numbers, default=0):
                break
    except ValueError:  # a form that only `datasets` reads, such as a JSON array
        pass
    return [found[number] for number in numbers]


def _items(files: Sequence[pathlib.Path]) -> Iterator[tuple[Unit, Item]]:
    units = (unit for file in files for unit in make_units(file))
    return ((unit, item) for unit in units for item in unit.items())
