"""Prepared data on disk, found again by a hash of all that made it.

The hash is of the rows, the tokenizer, the options, the libraries' versions and our own
source, so a stale entry is never found. Entries are folders of `.npy` files without
pickled objects, written aside and renamed, which is atomic; runs and processes map them
into memory and share its pages. Nothing is ever deleted: remove the folder at will.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from jaxtrain import __version__
from jaxtrain.config.folders import cache_folder
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import Rows, prepare
from jaxtrain.data.rows.indexed import FileRows

logger = logging.getLogger(__name__)

_DATE = "strftime_now"  # a template that writes today's date


def prepare_cached(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    folder: str | os.PathLike[str] | None = None,
) -> PreparedDataset:
    """`prepare(rows, tokenizer, options)`, from disk if it was done before.

    While one process prepares, others that want the same wait for it.

    Args:
        folder: where entries are; unset: `cache_folder()`.

    Raises:
        ValueError: as `prepare`.
    """
    key = cache_key(rows, tokenizer, options)
    if key is None:
        return prepare(rows, tokenizer, options)
    root = pathlib.Path(folder).expanduser() if folder else cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            return _load_or_prepare(root / key, rows, tokenizer, options)
    except OSError as error:
        logger.warning("no cache of token ids: %s", error)
        return prepare(rows, tokenizer, options)


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


def _blocks(rows: Rows) -> Iterator[bytes | memoryview]:
    """The rows' content in bytes."""
    if isinstance(rows, FileRows):
        yield from rows.contents()
        return
    if not isinstance(rows, datasets.Dataset):
        for row in rows:
            yield json.dumps(row, sort_keys=True, default=repr).encode() + b"\n"
        return
    for table in rows.with_format("arrow").iter(10_000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield memoryview(sink.getvalue())


def _load_or_prepare(
    entry: pathlib.Path,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
) -> PreparedDataset:
    if (entry / "prepared.json").is_file():
        prepared = PreparedDataset.load(entry)
        logger.debug("token ids from %s: %s", entry, prepared.stats.describe())
        return prepared
    made = prepare(rows, tokenizer, options)
    aside = pathlib.Path(tempfile.mkdtemp(prefix="new-", dir=entry.parent))
    try:
        made.save(aside)
        os.replace(aside, entry)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    logger.debug("token ids are kept in %s", entry)
    return PreparedDataset.load(entry)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
