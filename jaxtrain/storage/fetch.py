"""Copies of small files of a bucket on the local disk."""

import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from jaxtrain.storage import folders
from jaxtrain.storage.address import AnyPath, filesystem, is_remote, name
from jaxtrain.storage.errors import retrying

_NOTE = ".source.json"


def local_copy(address: AnyPath, cache_folder: AnyPath) -> pathlib.Path:
    """A local copy of a file, or of a folder of small files, of the same name.

    What is in the cache already is taken if size and tag are still those of the
    bucket. A local address is returned as it is.

    Raises:
        FileNotFoundError: there is nothing of this name.
        OSError: a file changed while it was read, more than once.
    """
    if not is_remote(address):
        return pathlib.Path(address)
    root = pathlib.Path(cache_folder).expanduser()
    entry = hashlib.sha256(os.fspath(address).rstrip("/").encode()).hexdigest()[:16]
    into = root / entry
    into.mkdir(parents=True, exist_ok=True)
    listed = folders.files_below(address)
    if not listed:
        raise FileNotFoundError(f"nothing is at {os.fspath(address)}")
    for relative, info in listed.items():
        target = into / name(address)
        fetch_file(info, target / relative if relative else target)
    return into / name(address)


def fetch_file(info: dict[str, Any], target: pathlib.Path) -> None:
    """Copy one object, unless the copy that is there is still the same.

    Args:
        info: of `folders.files_below`.
    """
    identity = {"size": info["size"], "tag": tag_of(info)}
    note = target.with_name(f".{target.name}{_NOTE}")
    if _is_fresh(target, note, identity):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    download(info, target)
    scratch = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
    scratch.write_text(json.dumps(identity))
    os.replace(scratch, note)


def tag_of(info: Mapping[str, Any]) -> str:
    """What changes whenever an object's content does."""
    found = (info.get(key) for key in ("etag", "ETag", "md5Hash", "generation"))
    return str(next(filter(None, found), "")).strip('"')


def _is_fresh(
    target: pathlib.Path, note: pathlib.Path, identity: dict[str, Any]
) -> bool:
    try:
        same_size = target.stat().st_size == identity["size"]
        return same_size and json.loads(note.read_text()) == identity
    except (OSError, ValueError):
        return False


def download(info: dict[str, Any], target: pathlib.Path) -> None:
    """Read an object aside, and give it its name when it is whole.

    Args:
        info: as of `fetch_file`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    retrying(lambda: _download(info, target), f"reading {info['full_name']}")


def _download(info: dict[str, Any], target: pathlib.Path) -> None:
    address = info["full_name"]
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        filesystem(address).get_file(address, str(scratch))
        size = scratch.stat().st_size
        if size != info["size"]:
            raise ConnectionError(
                f"{address}: {size} bytes came, not {info['size']}: cut, or changed"
            )
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
