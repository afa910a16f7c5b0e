"""Data files in buckets: chosen by the rules of local folders.

Rows that are held are read from a copy on the local disk, as they are read several
times; a stream reads its files where they are.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtrain.config.folders import bucket_cache
from jaxtrain.data.rows.folders import SAVED, check_formats, choose_split, rows_at_start
from jaxtrain.storage.mirror import mirror_files
from jaxtrain.storage.reading import RemoteFile, list_files


def copy_data(address: str, split: str) -> pathlib.Path:
    """A local copy of a file, or of the files of a folder's split.

    Raises:
        ValueError: no data file of the split is there, or several formats.
        OSError: nothing is there, or it cannot be read.
    """
    files = list_files(address)
    if not _is_saved(files):
        files = _of_split(address, files, split)
    return mirror_files(address, files, bucket_cache())


def stream_files(address: str, split: str) -> list[RemoteFile] | None:
    """The files that a stream reads; None of what `datasets` saved, which is copied.

    Raises:
        ValueError, OSError: as of `copy_data`.
    """
    files = list_files(address)
    if _is_saved(files):
        return None
    return list(_of_split(address, files, split).values())


def first_remote_rows(address: str, split: str) -> list[Mapping[str, Any]]:
    """The first rows, as the first file has them (`folders.first_rows`).

    Raises:
        ValueError: no data file of the split is there, or no row in it.
        OSError: nothing is there, or it cannot be read.
    """
    files = stream_files(address, split)
    if files is None:
        return []  # by `datasets`, which alone reads it
    return rows_at_start(files[0])


def _of_split(
    address: str, files: Mapping[str, RemoteFile], split: str
) -> Mapping[str, RemoteFile]:
    if "" not in files:
        names = map(pathlib.PurePosixPath, files)
        chosen = map(str, choose_split(names, split, address))
        files = {name: files[name] for name in chosen}
    check_formats([*files.values()], address)
    return files


def _is_saved(files: Mapping[str, RemoteFile]) -> bool:
    """Whether `Dataset.save_to_disk` wrote them."""
    return any(name in files for name in SAVED)
