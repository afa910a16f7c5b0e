"""Columns under the names that jaxtrain reads: `data.column_map`, and its hints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.record.safe_text import shown
from jaxtrain.schema import did_you_mean

# Every name of a column that a format reads.
NAMES = (
    "text", "prompt", "completion", "label", "messages", "conversations", "chosen",
    "rejected", "instruction", "input", "output", "system", "history", "tools",
    "chat_template_kwargs", "input_ids", "labels", "completion_mask", "assistant_masks",
    "attention_mask",
)  # fmt: skip
# What data sets call them, to propose a map.
_LIKELY = {
    "prompt": ("question", "query", "problem", "input", "instruction"),
    "completion": ("answer", "response", "output", "solution", "target"),
}

# Columns of other things than text, and those where a prompt may stand unread.
_IMAGES = ("image", "images", "video", "videos", "audio", "audios")
_PROMPTS = ("question", "query", "problem", "instruction", "input", "context")

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


def check_unread(
    row: Mapping[str, Any], read: Sequence[str], *, finds_prompt: bool
) -> None:
    """Refuse a row of which the better part would silently be left out.

    Args:
        read: the columns that are read.
        finds_prompt: whether the prompt is what chosen and rejected begin with.

    Raises:
        ValueError: it has images, or its prompt stands in a column that is not read.
    """
    for name in _IMAGES:
        if name not in read and row.get(name):
            raise ValueError(
                f"column {name!r} holds {shown(row[name], 40)}, and only text can be"
                " trained: take the column out, where the text makes sense without"
            )
    if not finds_prompt:
        return
    for name in _PROMPTS:
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            continue
        if text.strip() not in str(row.get("chosen")):
            raise ValueError(
                f"there is no column 'prompt', and chosen and rejected do not hold the"
                f" text of column {name!r}: set data.column_map = {{prompt: {name}}},"
                " or take the column out"
            )


def propose_map(found: Iterable[str]) -> str:
    """Propose a `data.column_map`, as text, for columns with other names."""
    columns, proposed = list(found), {}
    if {"instruction", "response"} <= {*columns}:  # Alpaca's, but for the names
        more = ", input: context" if "context" in columns else ""
        return f"data.column_map = {{output: response{more}}}"
    for name, likely in _LIKELY.items():
        match = next(filter(columns.__contains__, (name, *likely)), None)
        words = [(column, column.lower()) for column in columns]
        near = (c for c, low in words if any(word in low for word in likely))
        match = match or next(near, None)
        if match is not None:
            columns.remove(match)
        proposed[name] = match or "..."
    listed = ", ".join(f"{name}: {shown(proposed[name])}" for name in _LIKELY)
    return f"data.column_map = {{{listed}}}"
