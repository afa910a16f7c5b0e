"""Rows by a function of the user's own: `data.format_row`."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain.config.own_parts import bind_own

_KEY = "data.format_row"


def format_rows(
    rows: Iterable[Mapping[str, Any]], path: str, keywords: Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """Each row as the function makes it of a copy.

    Args:
        path: the function as `module:function`.
        keywords: `training.function_kwargs`.

    Raises:
        ValueError: the function cannot be had, raises, or returns no mapping; names the
            row.
    """
    function = bind_own(_KEY, path, keywords, "row")
    formatted: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            made = function(dict(row))
        except Exception as error:  # whatever the user's function raises
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{_KEY} = {path!r}: row {number}: {what}") from error
        if not isinstance(made, Mapping):
            kind = type(made).__name__
            raise ValueError(
                f"{_KEY} = {path!r}: row {number}: it returned {kind}; return a mapping"
                " of columns, such as {'prompt': ..., 'completion': ...}"
            )
        formatted.append(dict(made))
    return formatted
