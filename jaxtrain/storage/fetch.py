"""Copy single objects of a bucket to the local disk, and tell their versions apart."""

import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from jaxtrain.storage.address import filesystem
from jaxtrain.storage.errors import retrying


def tag_of(info: Mapping[str, Any]) -> str:
    """The version of an object (`objects`): its generation, or its tag on s3://."""
    found = (info.get(key) for key in ("generation", "ETag", "etag", "md5Hash"))
    return str(next(filter(None, found), "")).strip('"')


def download(info: dict[str, Any], target: pathlib.Path) -> None:
    """Copy an object to `target`, which exists only once the copy is complete.

    Args:
        info: the object's entry in `folders.files_below`.
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
