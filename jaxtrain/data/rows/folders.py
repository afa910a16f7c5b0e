"""Local data files and folders: which are of a split, and what the first rows are.

Nothing here imports `datasets`, whose import takes seconds.
"""

import difflib
import errno
import functools
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.data.rows.files import SUFFIXES, make_units, reader_of
from jaxtrain.data.rows.formats import UnreadableRow
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.reading import AnyFile

logger = logging.getLogger(__name__)

# How others pack data files, beside gzip.
_PACKED = {".zst", ".bz2", ".xz", ".lz4", ".zip"}
SAVED = ("state.json", "dataset_dict.json")  # by `Dataset.save_to_disk`
_FIRST_ROWS = 100
_SHARD = re.compile(r"-(\d{5})-of-(\d{5}).*")
_VALIDATION = ("validation", "valid", "val", "dev")
# The spellings of each split. "eval", which is meant where none is named, is any that
# is held out; whoever names one must not be given another, as test for validation.
SPLITS = (
    ("train", "training"),
    _VALIDATION,
    ("test",),
    ("eval", "evaluation", *_VALIDATION, "test"),
)
_KNOWN = {alias for aliases in SPLITS for alias in aliases}


def first_rows(path: pathlib.Path, split: str) -> list[Mapping[str, Any]]:
    """The first rows of a local file or folder, as its first file has them.

    Empty where only `datasets` can tell, as of what it saved.

    Raises:
        ValueError: there is no such path, no data file of that split in it, or no row.
        OSError: it may not be read.
    """
    if not path.exists():
        hint = _nearest(path)
        if any(mark in path.name for mark in "*?"):
            hint = "a path is no pattern: name the folder, or the files with weights"
        where = "" if path.is_absolute() else f" in {os.getcwd()}"
        raise ValueError(f"no such file or folder{where}; {hint or 'check the path'}")
    if is_saved(path):
        return []  # by `datasets`, which alone reads it
    files = split_files(path, split) if path.is_dir() else [path]
    if not os.access(files[0], os.R_OK):
        raise PermissionError(errno.EACCES, "may not be read", str(files[0]))
    if reader_of(files[0]) is None:
        raise ValueError(f"its suffix is none of {SUFFIXES}")
    return rows_at_start(files[0])


def rows_at_start(file: AnyFile) -> list[Mapping[str, Any]]:
    """The first rows of a file.

    Raises:
        ValueError: it holds none.
    """
    units = make_units(file)
    items = (unit.row(item) for unit in units for item in unit.items())
    rows = list(itertools.islice(items, _FIRST_ROWS))
    bad = [row.reason for row in rows if isinstance(row, UnreadableRow)]
    if len(bad) == len(rows):
        reason = f"its first line {bad[0]}" if bad else "it is empty"
        raise ValueError(f"{file.name} holds no row: {reason}")
    return rows


def _nearest(path: pathlib.Path) -> str:
    """A question that names a path beside it with a like name; "" if there is none."""
    if not path.parent.is_dir():
        return ""
    beside = {pathlib.PurePath(name).stem: name for name in os.listdir(path.parent)}
    close = difflib.get_close_matches(path.stem, beside, n=1, cutoff=0.75)
    return (
        f"did you mean {shown(str(path.with_name(beside[close[0]])))}?" if close else ""
    )


def is_saved(folder: pathlib.Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote it."""
    return any((folder / file).is_file() for file in SAVED)


def split_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The data files of a split; all files if none of them is named after a split."""
    names = [file.relative_to(folder) for file in folder.rglob("*")]
    return [folder / name for name in choose_split(names, split, str(folder))]


def choose_split(
    names: Iterable[pathlib.PurePath], split: str, folder: str
) -> list[pathlib.PurePath]:
    """Which of a folder's files, by their paths below it, are the data of a split.

    Shards of several names, such as train_sft-00000-of-00002.parquet beside
    train_prefs-00000-of-00001.parquet, are splits of these names, as for `datasets`.

    Raises:
        ValueError: none is, or "train" may be either of these.
    """
    names = tuple(names)
    _tell_packed(folder, tuple(sorted(filter(_is_packed, names))))
    chosen = _choose_split(names, split, folder)
    _tell_missing(folder, tuple(chosen))
    return chosen


def _is_packed(name: pathlib.PurePath) -> bool:
    """Whether it would be a data file, were it unpacked."""
    return name.suffix in _PACKED and reader_of(name.with_suffix("")) is not None


@functools.cache
def _tell_packed(folder: str, files: Sequence[pathlib.PurePath]) -> None:
    """Tell of data files that are passed over; once."""
    if files:
        logger.warning(
            "%s: %d data files such as %s are passed over, for only .gz is read packed:"
            " unpack them",
            *(shown(folder), len(files), shown(str(files[0]))),
        )


def _choose_split(
    names: Iterable[pathlib.PurePath], split: str, folder: str
) -> list[pathlib.PurePath]:
    named = sorted(name for name in names if reader_of(name))
    files = [n for n in named if not any(part.startswith(".") for part in n.parts)]
    if not files:
        raise ValueError(f"{folder} holds no data file: expected {SUFFIXES}")
    if own := [file for file in files if _has_own_name(file, split)]:
        return own
    by_split: dict[str | None, list[pathlib.PurePath]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    if set(by_split) == {None}:
        return by_split[None]
    for alias in split_aliases(split):
        if alias in by_split:
            _refuse_several(by_split[alias], alias, folder)
            return by_split[alias]
    if "train" in split_aliases(split) and None in by_split:
        return by_split[None]  # "data.jsonl" beside "eval.jsonl"
    found = {
        _own_name(file) if _is_named_shard(file, name) else name
        for name, files in by_split.items()
        if name
        for file in files
    }
    raise ValueError(
        f"{folder} has no split {shown(split)}, only {sorted(found)}: name a folder or"
        f" file {' or '.join(split_aliases(split))}, or point at one file"
    )


@functools.cache
def _tell_missing(folder: str, files: Sequence[pathlib.PurePath]) -> None:
    """Tell of shards that are not there, as after half a download; once."""
    present: dict[tuple[pathlib.PurePath, int], set[str]] = {}
    for file in files:
        if shard := _SHARD.search(file.name):
            name = file.with_name(file.name[: shard.start()])
            present.setdefault((name, int(shard[2])), set()).add(shard[1])
    for (name, total), numbers in present.items():
        if len(numbers) < total:
            logger.warning(
                "%s has %d of the %d files of %s: only these are read",
                *(shown(folder), len(numbers), total, shown(str(name))),
            )


def check_formats(files: Sequence[AnyFile], folder: str) -> None:
    """Refuse files of several formats, and such as are no data.

    Raises:
        ValueError: says which.
    """
    readers = {reader_of(file) for file in files}
    if len(readers) != 1:
        names = sorted(file.name for file in files)[:5]
        raise ValueError(
            f"{folder} mixes formats {sorted(map(str, readers))} "
            f"({', '.join(names)}...): keep one format in a folder"
        )
    if readers == {None}:
        raise ValueError(f"{files[0]} has no known suffix: use one of {SUFFIXES}")


def _split_of(file: pathlib.PurePath) -> str | None:
    """Which split a file's folders, or its own name, stand for."""
    # "train", "train-00000-of-00002", "my_data_validation"
    words = re.split("[-_]", _own_name(file).lower())
    names = (*_folders(file), words[0], words[-1])
    return next((name for name in names if name in _KNOWN), None)


def _own_name(file: pathlib.PurePath) -> str:
    """A file's name without its suffixes and the number of a shard."""
    return _SHARD.sub("", file.name.split(".")[0])


def _has_own_name(file: pathlib.PurePath, split: str) -> bool:
    """Whether a file is of a split by its whole name.

    "train" means all files that begin or end so, but of shards those of this name.
    """
    is_one = split not in _KNOWN or _is_named_shard(file, split)
    return is_one and _own_name(file) == split


def _is_named_shard(file: pathlib.PurePath, split: str) -> bool:
    """Whether a shard's own name, and no folder's, says that it is of a split."""
    return bool(_SHARD.search(file.name)) and split not in _folders(file)


def _folders(file: pathlib.PurePath) -> list[str]:
    return [folder.lower() for folder in file.parts[:-1]]


def _refuse_several(files: Sequence[pathlib.PurePath], split: str, folder: str) -> None:
    """Refuse shards of several names that would all be this split.

    Raises:
        ValueError: names them.
    """
    names = sorted({_own_name(f) for f in files if _is_named_shard(f, split)})
    if len(names) > 1:
        raise ValueError(
            f"{folder} has several splits that may be {shown(split)}: {names}; name one"
            " of them in data.train_split (or data.eval_split)"
        )


def split_aliases(split: str) -> tuple[str, ...]:
    """Every name that a split goes by, the one asked for first."""
    aliases = next((names for names in SPLITS if split in names), ())
    return tuple(dict.fromkeys((split, *aliases)))


def looks_local(name: str) -> bool:
    """Whether a name cannot be a hub repository (`name` or `owner/name`)."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or reader_of(pathlib.PurePath(name)) is not None
    )
