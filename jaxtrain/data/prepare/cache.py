"""Prepared data on disk, found again by a hash of all that made it.

The hash is of the rows, the tokenizer, the options, the libraries' versions and our own
source, so a stale entry is never found. Entries are folders of `.npy` files without
pickled objects, written aside and renamed when all of it is on disk, which is atomic;
runs and processes map them into memory and share its pages. An entry whose checksum is
not its content's is set aside and made anew. Remove the folder at will.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from jaxtrain import __version__
from jaxtrain.config.folders import cache_folder
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import Rows, prepare
from jaxtrain.data.prepare.workers import ALONE, Resources
from jaxtrain.data.rows.hf_datasets import is_data_set
from jaxtrain.data.rows.indexed import FileRows
from jaxtrain.run.durable import flush

logger = logging.getLogger(__name__)

_SEAL = "checksum.json"
_DATE = "strftime_now"  # a template that writes today's date


def prepare_cached(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    folder: str | os.PathLike[str] | None = None,
    resources: Resources = ALONE,
) -> PreparedDataset:
    """`prepare(rows, tokenizer, options)`, from disk if it was done before.

    While one process prepares, others that want the same wait for it.

    Args:
        folder: where entries are, and temporary files beside them; unset:
            `cache_folder()`.
        resources: as for `prepare`.

    Raises:
        ValueError: as `prepare`.
    """
    key = cache_key(rows, tokenizer, options)
    if key is None:
        return prepare(rows, tokenizer, options, resources=resources)
    root = pathlib.Path(folder).expanduser() if folder else cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"), _room(root / f"new-{key}") as room:
            beside = dataclasses.replace(resources, scratch=room)
            make = functools.partial(
                prepare, rows, tokenizer, options, resources=beside
            )
            return _load_or_make(root / key, make, room / "entry")
    except OSError as error:
        logger.warning("no cache of token ids: %s", error)
        return prepare(rows, tokenizer, options, resources=resources)


def cache_key(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions
) -> str | None:
    """The hash of everything that the result depends on; None where one is unknown.

    That is so for a tokenizer written in Python, and a chat template with a date.
    """
    template = tokenizer.chat_template
    if not tokenizer.is_fast or _DATE in str(template):
        return None
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")

    add([__version__, transformers.__version__, tokenizers.__version__])
    for source in sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")):
        digest.update(source.read_bytes())
    add(tokenizer.backend_tokenizer.to_str())
    add([type(tokenizer).__name__, template, tokenizer.special_tokens_map])
    add(dataclasses.asdict(options))
    for block in _blocks(rows):
        digest.update(block)
    return digest.hexdigest()


def _blocks(rows: Any) -> Iterator[bytes | memoryview]:
    """The rows' content in bytes."""
    if isinstance(rows, FileRows):
        yield from rows.contents()
        return
    if not is_data_set(rows):
        for row in rows:
            yield json.dumps(row, sort_keys=True, default=repr).encode() + b"\n"
        return
    for table in rows.with_format("arrow").iter(10_000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield memoryview(sink.getvalue())


def _load_or_make(
    entry: pathlib.Path, make: Callable[[], PreparedDataset], aside: pathlib.Path
) -> PreparedDataset:
    if (entry / _SEAL).is_file() and (found := _load(entry)) is not None:
        logger.debug("token ids from %s: %s", entry, found.stats.describe())
        return found
    made = make()
    aside.mkdir()
    made.save(aside)
    (aside / _SEAL).write_text(json.dumps({"checksum": _checksum(made)}))
    for path in [*aside.iterdir(), aside]:
        flush(path)
    os.replace(aside, entry)
    flush(entry.parent)
    logger.debug("token ids are kept in %s", entry)
    return PreparedDataset.load(entry)


def _load(entry: pathlib.Path) -> PreparedDataset | None:
    """What an entry holds; None if that is not what was written, and it is set aside.

    Raises:
        OSError: it cannot be set aside.
    """
    try:
        sealed = json.loads((entry / _SEAL).read_text())["checksum"]
        found = PreparedDataset.load(entry)
        if _checksum(found) == sealed:
            return found
        reason = "its checksum is another"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    damaged = entry.with_name(f"{entry.name}.damaged")
    shutil.rmtree(damaged, ignore_errors=True)  # of an earlier time
    os.replace(entry, damaged)
    logger.warning(
        "the token ids in the cache %s are damaged (%s): they are computed again, and"
        " the damaged ones were moved to %s; check the disk",
        entry, reason, damaged.name,
    )  # fmt: skip
    return None


def _checksum(data: PreparedDataset) -> str:
    """Of all arrays. Training wants the fingerprint too, which is kept in `data`."""
    digest = hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
    described = [data.row_length, data.pad_id, dataclasses.asdict(data.stats)]
    digest.update(json.dumps(described).encode())
    if data.difficulty is not None:
        digest.update(np.ascontiguousarray(data.difficulty).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _room(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder for the time of the block; what a killed process left goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
