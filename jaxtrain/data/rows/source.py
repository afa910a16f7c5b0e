"""Load rows from files, folders or the Hugging Face hub, memory-mapped.

A local path holds jsonl, json, parquet, csv, arrow or plain text (one document a
line), each also as `.gz`, or is a folder of such files, or one that
`Dataset.save_to_disk` wrote. Any other name is a data set of the hub.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import datasets

from jaxtrain.data.rows.files import READERS, reader_of
from jaxtrain.data.rows.folders import (
    is_saved,
    looks_local,
    split_aliases,
    split_files,
)
from jaxtrain.data.rows.formats import UnreadableRow
from jaxtrain.data.rows.places import HeldRows, hold, remember_files, same_files

logger = logging.getLogger(__name__)


def load_rows(
    path_or_name: str, *, split: str = "train", max_rows: int | None = None
) -> datasets.Dataset | HeldRows:
    """Load the rows of one split as a memory-mapped `datasets.Dataset`.

    Where lines of a jsonl or csv file are malformed, rows are held in memory, these
    lines as `UnreadableRow`s.

    Args:
        path_or_name: a file, a folder, or a data set's name on the hub.
        split: "train" or "eval", or a split's own name. A folder whose subfolders or
            files are named by split gives that split; any other folder, or a file,
            is taken whole.
        max_rows: keep only the first rows.

    Raises:
        ValueError: nothing to read there, the split is absent, a file is malformed,
            or the hub cannot be reached.
    """
    path = pathlib.Path(path_or_name).expanduser()
    if path.exists():
        rows = _load_local(path, split)
    elif looks_local(path_or_name):
        raise ValueError(f"data path {path_or_name!r} does not exist")
    else:
        rows = load_hub(path_or_name, split)
    if isinstance(rows, HeldRows):
        return rows.first(max_rows)
    if max_rows is not None and max_rows < len(rows):
        rows = same_files(rows.select(range(max_rows)), rows)
    logger.debug(
        "loaded %d rows of split %r from %s, columns %s",
        len(rows), split, path_or_name, rows.column_names,
    )  # fmt: skip
    return rows


def _load_local(path: pathlib.Path, split: str) -> datasets.Dataset | HeldRows:
    if (saved := load_saved(path, split)) is not None:
        return saved
    files = split_files(path, split) if path.is_dir() else [path]
    readers = {reader_of(file) for file in files}
    if len(readers) != 1:
        names = sorted(file.name for file in files)[:5]
        raise ValueError(
            f"{path} mixes formats {sorted(map(str, readers))} "
            f"({', '.join(names)}...): keep one format in a folder"
        )
    (reader,) = readers
    if reader is None:
        raise ValueError(
            f"{files[0]} has no known suffix: use one of {', '.join(READERS)} "
            "(each also .gz)"
        )
    return _read_files(reader, files)


def load_saved(folder: pathlib.Path, split: str) -> datasets.Dataset | None:
    """What `save_to_disk` wrote to a folder, or None."""
    if is_saved(folder):
        loaded = datasets.load_from_disk(str(folder))
        return _choose_split(loaded, split, str(folder))
    return None


def _read_files(
    reader: str, files: Sequence[pathlib.Path]
) -> datasets.Dataset | HeldRows:
    options: dict[str, Any] = {}
    if reader == "csv":
        options["keep_default_na"] = False  # "NA" and "" are text like any other
        if ".tsv" in files[0].suffixes:
            options["sep"] = "\t"
    try:
        rows = datasets.load_dataset(
            reader,
            data_files=[str(file.resolve()) for file in files],
            split="train",
            **options,
        )
    except Exception as error:  # `datasets` raises its readers' own kinds
        if reader in ("json", "csv"):
            return _hold(files, error)
        raise _unreadable(files, error) from error
    if reader == "text":
        count = len(rows)
        rows = rows.filter(
            lambda texts: [bool(text.strip()) for text in texts],
            input_columns="text",
            batched=True,
        )
        if len(rows) < count:
            logger.info("left out %d blank lines", count - len(rows))
    remember_files(rows, files)
    return rows


def _hold(files: Sequence[pathlib.Path], error: Exception) -> HeldRows:
    """Rows line by line, so that each bad one can be told from the others.

    Raises:
        ValueError: no line is a row.
    """
    try:
        rows = hold(files)
    except ValueError:
        raise _unreadable(files, error) from error
    bad = [
        f"{place}: {row.reason}"
        for place, row in zip(rows.places, rows, strict=True)
        if isinstance(row, UnreadableRow)
    ]
    if len(bad) == len(rows):
        raise _unreadable(files, "; ".join(bad[:5]) or error) from error
    logger.warning(
        "%s: %d of %d lines hold no row, so all are held in memory",
        files[0], len(bad), len(rows),
    )  # fmt: skip
    return rows


def _unreadable(files: Sequence[pathlib.Path], cause: object) -> ValueError:
    if isinstance(cause, Exception):
        cause = cause.__cause__ or cause
    return ValueError(f"cannot read {', '.join(map(str, files[:3]))}: {cause}")


def _choose_split(
    loaded: datasets.Dataset | datasets.DatasetDict, split: str, origin: str
) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    for alias in split_aliases(split):
        if alias in loaded:
            return loaded[alias]
    raise ValueError(f"{origin} has no split {split!r}, only {sorted(loaded)}")


def load_hub(hub_name: str, split: str, **options: Any) -> Any:
    """A split of a data set on the hub, by `datasets.load_dataset` with `options`.

    Raises:
        ValueError: the hub does not give it, or has no such split.
    """
    try:
        loaded = datasets.load_dataset(hub_name, **options)
    except (OSError, datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"{hub_name!r} is no local file or folder, and the Hugging Face hub did "
            f"not give it ({error}). Without network, give a local path: a jsonl, "
            "json, parquet, csv, arrow or txt file, or a folder of them"
        ) from error
    return _choose_split(loaded, split, hub_name)
