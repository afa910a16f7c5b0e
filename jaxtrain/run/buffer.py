"""The folder on this machine in which the records of a run in a bucket are written.

Objects cannot be appended to. So a run whose work directory is in a bucket writes to a
folder of the cache, and `run.workdir` uploads what has changed. On a disk the work
directory itself is that folder.
"""

import hashlib
import os
import pathlib
import re
from typing import Any

from jaxtrain.config.folders import cache_folder
from jaxtrain.storage.address import as_path, is_remote, name


def as_home(named: Any) -> Any:
    """A work directory's path as it was given: of a folder, or of an address."""
    return as_path(named) if is_remote(named) else pathlib.Path(named)


def local_folder(home: str | os.PathLike[str]) -> pathlib.Path:
    """The folder for a work directory; itself if it is on a disk."""
    if not is_remote(home):
        return pathlib.Path(home)
    address = os.fspath(home).rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    named = re.sub(r"[^A-Za-z0-9._-]", "-", name(address))[:60]
    return cache_folder() / "buckets" / f"{named}-{digest}"


def beside(directory: Any, other: str) -> pathlib.Path:
    """A folder beside that of the checkpoints, on this machine."""
    return local_folder(directory.parent) / other
