"""Where rows stand in their files, so that a bad one is named by file and line."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.data.rows.indexed import FileRows


@dataclasses.dataclass(frozen=True)
class HeldRows(Sequence[Mapping[str, Any]]):
    """Rows in memory, each with where it stands."""

    rows: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


def name_rows(rows: Any, numbers: Sequence[int]) -> list[str]:
    """Where rows stand, such as "train.jsonl line 8"; "row 7" if that is not known."""
    if isinstance(rows, FileRows):
        return [rows.place(number) for number in numbers]
    if isinstance(rows, HeldRows):
        return [rows.places[number] for number in numbers]
    return [f"row {number}" for number in numbers]
