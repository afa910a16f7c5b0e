"""Load rows from files, folders or the Hugging Face hub, without holding them.

A path, or an address in a bucket, holds jsonl, json, parquet, csv, arrow or plain text
(one document a line), each also as `.gz`, or array_record. Or it is a folder of such
files, or one that `Dataset.save_to_disk` wrote. It is never a pattern. Any other name
is a data set of the hub.
"""

import json
import logging
import pathlib
from typing import Any, TypeAlias

from jaxtrain.data.rows.folders import (
    SAVED,
    check_formats,
    is_saved,
    looks_local,
    split_aliases,
    split_files,
)
from jaxtrain.data.rows.hf_datasets import Dataset, is_data_set
from jaxtrain.data.rows.indexed import FileRows, index_files
from jaxtrain.data.rows.remote import copy_data
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.address import is_remote

logger = logging.getLogger(__name__)

LoadedRows: TypeAlias = Dataset | FileRows


def load_rows(
    path_or_name: str, *, split: str = "train", max_rows: int | None = None
) -> LoadedRows:
    """Load the rows of one split: `FileRows` of data files, a `Dataset` of others.

    Args:
        path_or_name: a file, a folder, either in a bucket (gs://, s3://: it is copied
            to the local disk), or a data set's name on the hub.
        split: "train" or "eval", or a split's own name. A folder whose subfolders or
            files are named by split gives that split; any other folder, or a file,
            is taken whole.
        max_rows: keep only the first rows.

    Raises:
        ValueError: nothing to read there, the split is absent, a file cannot be read,
            or the hub cannot be reached.
    """
    path = pathlib.Path(path_or_name).expanduser()
    if is_remote(path_or_name):
        path = copy_data(path_or_name, split)
    rows: LoadedRows
    if path.exists():
        rows = _load_local(path, split)
    elif looks_local(path_or_name):
        raise ValueError(
            f"data path {shown(path_or_name)} does not exist: check the spelling, and"
            " that it is relative to the current folder"
        )
    else:
        rows = load_hub(path_or_name, split)
    if isinstance(rows, FileRows):
        rows = rows.first(max_rows)
    elif max_rows is not None and max_rows < len(rows):
        rows = rows.select(range(max_rows))
    logger.debug("loaded %d rows of split %r from %s", len(rows), split, path_or_name)
    return rows


def _load_local(path: pathlib.Path, split: str) -> LoadedRows:
    if (saved := load_saved(path, split)) is not None:
        return saved
    return index_files(data_files(path, split))


def data_files(path: pathlib.Path, split: str) -> list[pathlib.Path]:
    """A file, or those of a folder's split, which are of one format.

    Raises:
        ValueError: no data file, or several formats.
    """
    files = split_files(path, split) if path.is_dir() else [path]
    check_formats(files, str(path))
    return files


def load_saved(folder: pathlib.Path, split: str) -> Dataset | None:
    """What `save_to_disk` wrote to a folder, or None.

    Raises:
        ValueError: it is empty, or a file in it names others that are elsewhere.
    """
    if is_saved(folder):
        _check_saved(folder)
        import datasets

        try:
            loaded = datasets.load_from_disk(str(folder))
        except IndexError as error:  # of no file, nothing can be put together
            raise ValueError(f"{folder} holds no row, or a split of it none") from error
        return _choose_split(loaded, split, str(folder))
    return None


def _check_saved(folder: pathlib.Path) -> None:
    """Refuse a saved data set whose lists name files outside of it.

    Raises:
        ValueError: names the list and the file.
    """
    for file in (*(folder / name for name in SAVED), *folder.glob("*/state.json")):
        for name in map(str, _names_in(file)):
            if pathlib.PurePath(name).name != name or name == "..":
                raise ValueError(
                    f"{file} names {shown(name)}; the files of a saved data set must"
                    " lie beside the list of them"
                )


def _names_in(file: pathlib.Path) -> list[Any]:
    """The files and splits in a list; of a damaged list none, `datasets` refuses it."""
    try:
        content = json.loads(file.read_text("utf-8"))
        files = [each["filename"] for each in content.get("_data_files") or ()]
        return [*files, *(content.get("splits") or ())]
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return []
    except RecursionError:  # nested too deeply
        return []


def _choose_split(loaded: Any, split: str, origin: str) -> Dataset:
    if is_data_set(loaded):
        return loaded
    for alias in split_aliases(split):
        if alias in loaded:
            return loaded[alias]
    raise ValueError(
        f"{origin} has no split {shown(split)}, only {sorted(loaded)}: name one of them"
        " in data.train_split (or data.eval_split)"
    )


def load_hub(hub_name: str, split: str, **options: Any) -> Any:
    """A split of a data set on the hub, by `datasets.load_dataset` with `options`.

    Raises:
        ValueError: the hub does not give it, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(hub_name, **options)
    except (OSError, datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"{shown(hub_name)} is no local file or folder, and the Hugging Face hub"
            f" did not give it ({error}). Without network, give a local path: a jsonl, "
            "json, parquet, csv, arrow, array_record or txt file, or a folder of them"
        ) from error
    return _choose_split(loaded, split, hub_name)
