"""Columns under the names that jaxtrain reads: `data.column_map`, and its hints."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain.record.safe_text import shown
from jaxtrain.schema import did_you_mean

# Every name of a column that a format reads.
NAMES = (
    "text", "prompt", "completion", "label", "messages", "conversations", "chosen",
    "rejected", "instruction", "input", "output", "system", "history", "tools",
    "chat_template_kwargs", "input_ids", "labels", "completion_mask", "assistant_masks",
)  # fmt: skip
# What data sets call them, to propose a map.
_LIKELY = {
    "prompt": ("question", "query", "problem", "input", "instruction"),
    "completion": ("answer", "response", "output", "solution", "target"),
}

ColumnMap = tuple[tuple[str, str], ...]  # (name that is read, the file's name) each


def make_column_map(given: Mapping[str, Any] | None) -> ColumnMap:
    """The pairs of `data.column_map`, in an order that does not depend on its own.

    Raises:
        ValueError: a value is not the name of a column.
    """
    for name, column in (given or {}).items():
        if not isinstance(column, str) or not column:
            raise ValueError(
                f"data.column_map = {shown(dict(given or {}))}: {name} is"
                f" {shown(column)}; give the name of a column of the file"
            )
    return tuple(sorted((given or {}).items()))


def check_columns(names: ColumnMap, found: Iterable[str], text_column: str) -> None:
    """Refuse a column map that does not fit the rows.

    Args:
        found: the columns that the rows have.
        text_column: a further name that a format reads.

    Raises:
        ValueError: the map has a name that no format reads, or a column that the rows
            do not have.
    """
    setting = f"data.column_map = {shown(dict(names))}"
    found = sorted(set(found))
    for name, column in names:
        known = [*NAMES, text_column]
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(
                f"{setting}: no format reads {shown(name)}; {hint}The map goes from our"
                f" name to the file's, and our names are {', '.join(NAMES)}"
            )
        if column not in found:
            close = did_you_mean(column, found).rstrip()
            hint = f"; {close}" if close else ""
            raise ValueError(
                f"{setting}: there is no column {shown(column)}, only {found}{hint}"
            )


def rename(row: Mapping[str, Any], names: ColumnMap) -> Mapping[str, Any]:
    """A row whose mapped columns have the names that formats read, not their own."""
    if not names:
        return row
    taken = {column for _, column in names}
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {name: row.get(column) for name, column in names}


def propose_map(found: Iterable[str]) -> str:
    """Propose a `data.column_map`, as text, for columns with other names."""
    columns, proposed = list(found), {}
    for name, likely in _LIKELY.items():
        words = ((column, column.lower()) for column in columns)
        match = next((c for c, low in words if any(w in low for w in likely)), None)
        if match is not None:
            columns.remove(match)
            proposed[name] = match
    for name in _LIKELY:
        proposed.setdefault(name, columns.pop(0) if columns else "...")
    listed = ", ".join(f"{name}: {shown(proposed[name])}" for name in _LIKELY)
    return f"data.column_map = {{{listed}}}"
